"""The trainer of variational language models: transformers' own, with what is about training a posterior."""

import math
import os
import re
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from ..evaluation.streaming import StreamingEvaluation, mask_repeated_rows
from .arguments import VariationalTrainingArguments
from .callbacks import InterruptCallback, RankNoiseCallback, own_noise
from .checkpoints import last_complete_checkpoint, non_finite_parameters, refuse_mixed_dtypes
from .diagnostics_callback import DiagnosticsCallback
from .naming import is_variational
from .recorder import StepRecorder, layer_names
from .regime.measuring import UnitSums
from .regime.steering import SteeringMixin
from .settings import settings_of
from .statistics import PARTS, StatisticsMean


@dataclass
class _Evaluation:
    """What one evaluation gathers: the metrics of both passes, sums over tokens of the loss and the KL, and means over
    tokens of the statistics of attention and, where there is a band, of the units.
    """

    mean_pass: StreamingEvaluation
    samples: StreamingEvaluation | None
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    attention: StatisticsMean = field(default_factory=StatisticsMean)
    units: UnitSums = field(default_factory=UnitSums)


class VariationalTrainer(SteeringMixin, Trainer):
    """
    [`~transformers.Trainer`] for variational language models. It also trains their deterministic twins and any other
    causal language model, so that comparisons share one loop.

    The loss is the model's own. This class moves the KL weight along its schedule, logs the parts of the loss and the
    state of the posteriors, evaluates the posterior samples and the mean pass, gives each process its own noise, saves
    on Ctrl-C, and stops when the loss is no longer finite.

    While training it logs `nll`, `kl` and `kl/layer_<number>` (nats per target token), `kl_weight`, and, measured on
    the steps that are logged, the state of the posteriors: of EVE units `posterior_scale`, `mean_energy` and
    `active_fraction`; of variational attention `attention_kl` (nats per token that carries KL, of all layers),
    `attention_concentration` or `attention_scale` (also by layer, `.../layer_<number>`), and of the sampled weights
    `attention_entropy` (nats) and `effective_keys`; of a model with both also `attention_kl_share`, the part of the KL
    that is the attention's. An evaluation logs the metrics of [`StreamingEvaluation`] as `eval_<metric>` for the
    predictive distribution over `eval_posterior_samples` posterior samples and as `eval_mean_pass_<metric>` for the
    mean pass, `eval_kl`, the same state of the attention, and `eval_loss`, the training objective. Where there are no
    posterior samples the two sets are the same. The posterior noise of an evaluation is the same each time and leaves
    the generator of the training where it was.

    With `regime` in its arguments it steers the EVE units (see [`RegimeControl`]), logs `regime/under`,
    `regime/inside` and `regime/over`, the shares of all units as last measured, and what the controls do, and of an
    evaluation `eval_regime_under`, `eval_regime_inside` and `eval_regime_over`.

    Args:
        model, args, ...: As in [`~transformers.Trainer`]; `args` are [`VariationalTrainingArguments`].

    Example:

    ```python
    >>> args = VariationalTrainingArguments("out", kl_schedule="linear_warmup", eval_posterior_samples=8)
    >>> trainer = VariationalTrainer(model, args, train_dataset=blocks, eval_dataset=held_out)
    >>> trainer.train()
    >>> trainer.evaluate()["eval_mutual_information"]
    ```
    """

    def __init__(self, model=None, args: VariationalTrainingArguments | None = None, *rest, **kwargs):
        if args is None:
            args = VariationalTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, VariationalTrainingArguments):
            raise TypeError(
                f"VariationalTrainer takes VariationalTrainingArguments, got {type(args).__name__}: they are "
                "transformers' TrainingArguments and more, so the same keywords work."
            )
        super().__init__(model, args, *rest, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("`compute_loss_func` would replace the model's own loss and its KL: leave it out.")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"torch.nn.DataParallel over {self.args.n_gpu} devices cannot split the KL weight: start one process "
                "per device with `accelerate launch`, or let CUDA_VISIBLE_DEVICES name one device."
            )
        self._recorder = StepRecorder()
        # on the CPU a look at the loss waits for nothing, and comes before the weights are touched
        self._checks_every_step = self.args.device.type == "cpu"
        self._evaluation: _Evaluation | None = None
        self._data_rank = self.args.process_index // self.get_tp_size()
        self._interrupt = InterruptCallback(self)
        self.add_callback(RankNoiseCallback(self._data_rank))
        self.add_callback(self._interrupt)
        self._diagnostics = DiagnosticsCallback(self)
        self.add_callback(self._diagnostics)
        if self.model is not None:
            self._make_regime()

    # ---- The loss ----

    @property
    def _layers(self) -> list[int]:
        """Numbers of the layers with a posterior; empty for a deterministic model, and for one whose samples are drawn
        from something that has no KL, as dropout masks are."""
        return sorted({layer for layer, _ in getattr(self.model, "posterior_sites", None) or []})

    @property
    def _has_variational_attention(self) -> bool:
        return any(site == "attention" for _, site in getattr(self.model, "posterior_sites", None) or [])

    def kl_weight(self) -> float:
        """The KL weight of the step that is being taken."""
        full = self.args.kl_weight if self.args.kl_weight is not None else settings_of(self.model).kl_weight
        return full * self.args.kl_factor(self.state.global_step, self.state.max_steps)

    def _forward_arguments(self, training: bool) -> dict:
        if not self._layers:
            return {}
        # filled on the device: copying a number there would wait for it
        weight = torch.full((), self.kl_weight(), dtype=torch.float32, device=self.args.device)
        arguments = {"kl_weight": weight}
        if self.args.free_bits > 0:
            arguments["free_bits"] = self.args.free_bits
        if not training:
            samples = self.args.eval_posterior_samples
            arguments.update(num_posterior_samples=samples, output_uncertainty=samples > 0)
            wanted = self._has_variational_attention or self._band is not None
            if self._evaluation is not None and wanted:
                arguments["output_posteriors"] = True
            return arguments
        if self.args.train_posterior_samples is not None:
            arguments["num_posterior_samples"] = self.args.train_posterior_samples
        if self._will_log() or self._will_measure():
            arguments["output_posteriors"] = True
        return {**arguments, **self._unit_weights()}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss at this step's KL weight; records its parts."""
        training = model.training
        extra = self._forward_arguments(training)
        loss, outputs = super().compute_loss(
            model, {**inputs, **extra}, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if training:
            self._record_step(model, inputs, loss, outputs, num_items_in_batch)
        elif self._evaluation is not None and num_items_in_batch is not None:
            self._record_evaluation(inputs, loss, outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _loss_scale(self, num_items_in_batch) -> float:
        """What the Trainer multiplies the model's loss with, so that the mean over processes is that of all tokens."""
        if num_items_in_batch is None:
            return 1.0 / self.current_gradient_accumulation_steps if self.model.training else 1.0
        if self.args.average_tokens_across_devices:
            return float(self.accelerator.num_processes // self.get_tp_size())
        return 1.0

    # ---- What a training step measures ----

    def _will_log(self) -> bool:
        args, done = self.args, self.state.global_step
        if args.logging_strategy == IntervalStrategy.NO:
            return False
        if done == 0 and args.logging_first_step:
            return True
        if args.logging_strategy == IntervalStrategy.EPOCH:
            return self.accelerator.gradient_state.end_of_dataloader or done + 1 >= self.state.max_steps
        return (done + 1) % self.state.logging_steps == 0

    def _record_step(self, model, inputs, loss: Tensor, outputs, num_items_in_batch) -> None:
        scale = self._loss_scale(num_items_in_batch)
        nll = outputs.get("nll")
        if nll is None:
            values = {"nll": loss.detach() * (scale if num_items_in_batch is None else 1.0)}
        else:
            values = {"nll": nll.detach() * scale}
        layers = self._layers
        if layers:
            values["kl"] = outputs.kl.detach() * scale
            per_layer = (outputs.kl_per_layer.detach() * scale).unbind()
            values.update(zip(layer_names(layers), per_layer, strict=True))
            if outputs.get("reconstruction") is not None:
                values["reconstruction"] = outputs["reconstruction"].detach() * scale
        step = self.state.global_step + 1
        self._recorder.add(step, values, self.kl_weight() if layers else None)
        if layers and self._will_log():
            self._recorder.add_statistics(outputs.get("posteriors"), outputs.get("attention_posteriors"))
            self._diagnostics.add(outputs.get("posteriors"))
        if self._will_measure():
            # the processes' values average to the whole batch's
            self._regime.measure(outputs["posteriors"], values["nll"] / self.accelerator.num_processes)
        if self._checks_every_step:
            if not self._recorder.last_is_finite():
                self._stop(model, inputs)
        elif self._recorder.full:
            if self._recorder.first_non_finite() is not None:
                self._stop()
            self._recorder.fold()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; the training log gets what the steps since the last one have measured."""
        if "loss" in logs:
            logs = {**logs, **self._flush()}
        super().log(logs, start_time)

    def _flush(self) -> dict[str, float]:
        found = None if self._checks_every_step else self._recorder.first_non_finite()
        statistics = self._recorder.non_finite_statistics() if found is not None else {}
        averages = self._recorder.flush(lambda values: self.accelerator.reduce(values, reduction="mean"))
        if not all(math.isfinite(averages[name]) for name in self._recorder.names if name in averages):
            self._stop(found=found, statistics=statistics)
        return averages if self._regime is None else {**averages, **self._regime.logs()}

    # ---- Not finite: stop, and say where ----

    def _stop_if_not_finite(self) -> None:
        if self._recorder.pending and self._recorder.first_non_finite() is not None:
            self._stop()

    def _stop(self, model=None, inputs=None, found=None, statistics=None):
        """Raises `FloatingPointError` that names the step, the layers and the last good checkpoint."""
        found = found or self._recorder.first_non_finite()
        statistics = statistics or self._recorder.non_finite_statistics()
        step, names = found or (self.state.global_step, [])
        if model is not None and not statistics and self._layers and not self.is_fsdp_enabled:
            statistics = self._probe(model, inputs)
        layers = {int(name.rpartition("_")[2]) for name in names if name.startswith("kl/")}
        layers.update(layer for bad in statistics.values() for layer in bad)
        message = [f"The loss is not finite at step {step}" + (f" ({', '.join(names)})." if names else ".")]
        if layers:
            first, *above = sorted(layers)
            parts = [PARTS[name] for name, bad in statistics.items() if first in bad]
            detail = f" (its {' and its '.join(parts)})" if parts else ""
            also = f", nor are those above it, {', '.join(map(str, above))}" if above else ""
            message.append(f"The posterior of layer {first} is not finite{detail}{also}.")
        elif self._layers and found is not None:
            message.append("Every layer's posterior is finite; the likelihood is not.")
        elif self._layers:
            message.append("It came from another process, whose message names the layer.")
        here = re.compile(rf"\.{min(layers)}\." if layers else "")
        nearest = sorted(
            non_finite_parameters(self.model), key=lambda name: not (is_variational(name) and here.search(name))
        )
        if nearest:
            more = f" and {len(nearest) - 3} more" if len(nearest) > 3 else ""
            message.append(f"Parameters that are not finite: {', '.join(nearest[:3])}{more}.")
        message.append(self._way_back())
        raise FloatingPointError(" ".join(message))

    @torch.no_grad()
    def _probe(self, model, inputs) -> dict[str, list[int]]:
        """One mean pass over the micro-batch that failed: a prior that follows the mean hides it from the KL."""
        probe = StepRecorder()
        bare = {name: value for name, value in inputs.items() if name != "labels"}
        unwrapped = self.accelerator.unwrap_model(model)
        outputs = unwrapped(**bare, num_posterior_samples=0, output_posteriors=True)
        probe.add_statistics(outputs.get("posteriors"), outputs.get("attention_posteriors"))
        return probe.non_finite_statistics()

    def _way_back(self) -> str:
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        if checkpoint is None:
            return "No checkpoint had been saved. Lower the learning rate or the gradient norm, and start again."
        return (
            f"The last good checkpoint is {checkpoint}: resume from it with a lower learning rate, gradient norm or "
            "KL weight."
        )

    # ---- Evaluation ----

    # The next three are about language models; a trainer of another kind of model overrides them.

    def _new_metrics(self) -> StreamingEvaluation:
        return StreamingEvaluation(cvar_fraction=self.args.cvar_fraction)

    def _update_metrics(self, metrics: StreamingEvaluation, outputs, labels: Tensor) -> None:
        metrics.update(outputs["logits"], labels, outputs.get("uncertainty"))

    def _num_targets(self, labels: Tensor) -> float:
        return float((labels[:, 1:] != -100).sum())

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's loop, whose forward passes also feed the streamed metrics of both passes."""
        samples = self.args.eval_posterior_samples if self._layers else 0
        self._evaluation = evaluation = _Evaluation(
            mean_pass=self._new_metrics(), samples=self._new_metrics() if samples else None
        )
        try:
            with own_noise(self.args.seed, self._data_rank, "evaluation", self.args.device):
                output = super().evaluation_loop(
                    dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
                )
        finally:
            self._evaluation = None
        output.metrics.update(self._evaluation_metrics(evaluation, metric_key_prefix))
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The Trainer's step over the posterior samples, then the mean pass over the same batch."""
        evaluation = self._evaluation
        if evaluation is None or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        inputs["labels"] = mask_repeated_rows(inputs["labels"], self.accelerator)
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if evaluation.samples is not None:
            bare = {name: value for name, value in inputs.items() if name != "labels"}
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**bare, num_posterior_samples=0)
            self._update_metrics(evaluation.mean_pass, outputs, inputs["labels"])
        return result

    def _record_evaluation(self, inputs, loss: Tensor, outputs, num_items_in_batch) -> None:
        evaluation = self._evaluation
        streaming = evaluation.mean_pass if evaluation.samples is None else evaluation.samples
        self._update_metrics(streaming, outputs, inputs["labels"])
        count = self._num_targets(inputs["labels"])
        # also where no row counts, so that the processes have vectors of one length to add up
        evaluation.attention.add(None, outputs.get("attention_posteriors"), weight=count)
        if self._band is not None:
            evaluation.units.add(outputs["posteriors"])
        if count == 0:
            return
        total = float(num_items_in_batch)
        kl = float(outputs["kl"]) if outputs.get("kl") is not None else 0.0
        loss = float(loss) / self._loss_scale(num_items_in_batch)
        evaluation.sums += torch.tensor([loss * total, kl * total, count], dtype=torch.float64)

    def _evaluation_metrics(self, evaluation: _Evaluation, prefix: str) -> dict[str, float]:
        device = self.args.device
        sums = evaluation.sums.to(device, torch.float32 if device.type == "mps" else torch.float64)
        if evaluation.attention:
            sums = torch.cat([sums, evaluation.attention.sums().to(sums)])
        sums = self.accelerator.reduce(sums, reduction="sum")
        loss, kl, count = sums[:3].tolist()
        if count == 0:
            return {}
        mean_pass = evaluation.mean_pass.gather(self.accelerator).compute()
        samples = mean_pass
        if evaluation.samples is not None:
            samples = evaluation.samples.gather(self.accelerator).compute()
        metrics = {f"{prefix}_loss": loss / count}
        if self._layers:
            metrics[f"{prefix}_kl"] = kl / count
        if evaluation.attention:
            state = evaluation.attention.summary(sums[3:], by_layer=False)
            metrics.update({f"{prefix}_{name}": float(value) for name, value in state.items()})
        if evaluation.units.units is not None:
            metrics.update(self._regime_metrics(evaluation.units, prefix))
        metrics.update({f"{prefix}_{name}": value for name, value in samples.items()})
        metrics.update({f"{prefix}_mean_pass_{name}": value for name, value in mean_pass.items()})
        return metrics

    # ---- Checkpoints ----

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As the Trainer's. `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no complete checkpoint in {self.args.output_dir} to resume from: start without "
                    "resuming, or name a checkpoint."
                )
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 2:
            refuse_mixed_dtypes(self.model)
        self._recorder = StepRecorder()
        self._interrupt.install()
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        except KeyboardInterrupt:
            self._save_interrupted()
            raise
        finally:
            self._interrupt.uninstall()
            self.is_in_train = False
        self._stop_if_not_finite()
        self._say_if_none_was_admitted()
        return output

    def _save_interrupted(self) -> None:
        """Saves where the exception came without the signal that is waited for, if the weights are of one step."""
        step, folder = self.state.global_step, self.args.output_dir
        # a second process cannot be asked to take part, and half an optimizer step belongs to no step
        if step == 0 or self.args.world_size > 1 or self._interrupt.in_optimizer_step or self._interrupt.at_once:
            return
        last = last_complete_checkpoint(folder)
        if last is None or os.path.basename(last) != f"checkpoint-{step}":
            self._save_checkpoint(self.model_wrapped, trial=None)

    def _save_checkpoint(self, model, trial) -> None:
        self._stop_if_not_finite()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; refuses to write weights that are not finite over good ones."""
        bad = non_finite_parameters(self.model)
        found = bool(bad)
        if self.is_fsdp_enabled:
            # every process holds a part, and all of them take part in saving
            flag = torch.tensor([float(found)], device=self.args.device)
            found = self.accelerator.reduce(flag, reduction="sum").item() > 0
        if found:
            where = f" ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''})" if bad else " (on another process)"
            raise FloatingPointError(
                f"The weights after step {self.state.global_step} are not finite{where}: they were not saved. "
                + self._way_back()
            )
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except SafetensorError as error:
            raise ValueError(
                f"The weights in {resume_from_checkpoint} cannot be read ({error}): the file is damaged or was cut "
                "off. Resume from an earlier checkpoint."
            ) from error
