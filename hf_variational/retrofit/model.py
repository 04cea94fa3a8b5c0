"""Stock classes that take `num_posterior_samples`: the mixin that stands before a stock class among the bases."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..modeling.attention import AttentionPosterior
from ..modeling.classification_variational_gpt import log_odds_of_mean, problem_type_of
from ..modeling.configuration_variational_gpt import check_num_posterior_samples
from ..modeling.eve import EVE
from ..modeling.heads import NonReentrantMixin, check_samples_for
from ..modeling.objective import IGNORE_INDEX, posterior_penalties
from ..modeling.posterior import check_complete, check_unit_weights
from ..modeling.predictive import widen
from ..modeling.readout import read_out
from ..modeling.sample_axis import repeat_rows
from .attention import IMPLEMENTATIONS
from .axes import TARGETS, Pass, pass_of, shifts_labels
from .install import install, make_variational
from .outputs import output_class
from .passes import active_axes, checkpoint_in_pass
from .settings import VariationalSettings

# What `forward` takes beside the stock arguments.
ARGUMENTS = {
    "num_posterior_samples": None,
    "output_uncertainty": False,
    "output_posteriors": False,
    "output_sample_logits": False,
    "kl_weight": None,
    "free_bits": 0.0,
    "unit_weights": None,
}
_SCORED = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")


class VariationalMixin(NonReentrantMixin):
    """Gives a stock class posteriors, samples and the KL. Stands before the stock class among the bases.

    `logits` (and the logits of spans) come back joined: the log of the mean over samples of the probabilities,
    [batch, ...] in float32; in multi-label classification the log-odds of the mean probability, and in regression the
    mean.
    Everything else that is computed above the first variational layer (hidden states, attentions, what a base model
    answers with) has batch * S rows, row `b * S + s` being sample `s` of sequence `b`.
    """

    # What knows the settings of the active adapter, where adapters and not the config make the model variational.
    adapters = None

    def __init__(self, config, *args, **kwargs):
        made = type(config)
        if made is self.config_class:
            # Some stock heads ask AutoModel for their base model, which must be the stock one inside this one.
            config.__class__ = self.stock_class.config_class
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.__class__ = made
        make_variational(config, self.config_class)
        if getattr(config, "variational", None) is not None:
            install(self, self.settings)

    @property
    def settings(self) -> VariationalSettings:
        """What is variational in this model."""
        if self.adapters is not None:
            return self.adapters.settings(self)
        values = getattr(self.config, "variational", None)
        # Kept, because it is asked in every forward pass, and torch.compile cannot trace the reading.
        kept = self.__dict__.get("_settings")
        if kept is None or kept[0] is not values:
            kept = values, VariationalSettings() if values is None else VariationalSettings.from_dict(values)
            self.__dict__["_settings"] = kept
        return kept[1]

    @property
    def posterior_sites(self) -> list[tuple[int, str]]:
        """(layer, site) of each posterior, site `"ffn"` or `"attention"`."""
        return self.settings.sites

    @property
    def variational_layers(self) -> list[int]:
        """Numbers of the layers where anything is variational."""
        return sorted({layer for layer, _ in self.posterior_sites})

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As in transformers, and the posteriors that a checkpoint does not have."""
        super().initialize_weights()
        # Not in `_init_weights`: the modules of the base model are initialized by the base model's own class.
        for module in self.modules():
            if isinstance(module, (EVE, AttentionPosterior)):
                module.init_weights()

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        if enable and getattr(gradient_checkpointing_func, "func", None) is not checkpoint_in_pass:
            options = getattr(gradient_checkpointing_func, "keywords", {})
            in_pass = partial(checkpoint_in_pass, checkpoint=gradient_checkpointing_func)
            if "use_reentrant" in options:
                in_pass = partial(in_pass, use_reentrant=options["use_reentrant"])
            gradient_checkpointing_func = in_pass
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def resolve_num_samples(self, num_posterior_samples: int | None) -> int:
        """The number of samples of this pass: as asked, or the default of the mode the model is in."""
        settings = self.settings
        if not settings.sites:
            if num_posterior_samples:
                raise ValueError(
                    f"num_posterior_samples={num_posterior_samples}, but nothing in this {type(self).__name__} is "
                    "variational: use variationalize, or enable the adapter, first."
                )
            return 0
        if num_posterior_samples is None:
            return settings.num_posterior_samples if self.training else 0
        return check_num_posterior_samples(num_posterior_samples)

    def _run(self, stock, inputs: dict, ours: dict):
        """A forward pass: `stock` is the stock class's forward, `inputs` its arguments by name."""
        num_samples = self.resolve_num_samples(ours["num_posterior_samples"])
        check_samples_for(num_samples, **{name: ours[name] for name in ("output_uncertainty", "output_sample_logits")})
        settings = self.settings
        if not settings.sites:
            return stock(**inputs)
        targets = {name: inputs[name] for name in TARGETS if inputs.get(name) is not None}
        record = bool(ours["output_posteriors"] or targets)
        if settings.attention is not None and self.config._attn_implementation not in IMPLEMENTATIONS.values():
            if num_samples or record:
                _refuse_kernel(self.config._attn_implementation)
            return stock(**inputs)
        check_unit_weights(ours["unit_weights"], [layer for layer, site in settings.sites if site == "ffn"])
        passed = pass_of(self, inputs, num_samples, record, bool(ours["output_posteriors"]), ours["unit_weights"])
        _refuse_continuation(settings, passed)
        _refuse_mean_encoder(settings, passed, inputs)
        num_items = inputs.pop("num_items_in_batch", None) if targets else None
        as_tuple = inputs.pop("return_dict", getattr(self.config, "return_dict", True)) is False
        with active_axes(passed.axes):
            outputs = stock(**self._rows(inputs, passed, settings), return_dict=True)
        if num_samples or record:
            self._check_visited(passed, settings, inputs)
        outputs = output_class(type(outputs))(**outputs)
        if num_samples:
            self._join(outputs, passed, ours)
        if targets and num_samples and settings.objective == "mc_nll":
            outputs["loss"] = self._predictive_nll(outputs, passed)
        elif outputs.get("loss") is not None and num_items is not None:
            # Many stock heads take the mean over their micro-batch whatever the whole batch has.
            count = (passed.targets != IGNORE_INDEX).sum()
            outputs["loss"] = torch.where(count > 0, outputs["loss"] * (count / num_items), 0.0)
        if self.training and torch.is_grad_enabled() and not targets and outputs.get("loss") is not None:
            raise ValueError(
                f"The loss of this {type(self).__name__} has no targets among {', '.join(TARGETS)}, so its KL has "
                "nothing to be divided by: train the stock model instead, or take a loss of the logits yourself."
            )
        if record:
            self._add_posteriors(outputs, passed, ours, settings)
        return outputs.to_tuple() if as_tuple else outputs

    def _check_visited(self, passed: Pass, settings: VariationalSettings, inputs: dict) -> None:
        expected = set(settings.sites)
        if inputs.get("encoder_outputs") is not None:
            expected = {(layer, site) for layer, site in expected if layer >= passed.first_layers[-1]}
        missed = sorted(expected - passed.main.visited)
        if missed:
            raise RuntimeError(
                f"The posteriors of (layer, site) {missed} never saw the posterior samples: {type(self).__name__} "
                "does not call these modules, as when a kernel of another library takes their place."
            )

    def _rows(self, inputs: dict, passed: Pass, settings: VariationalSettings) -> dict:
        """The stock forward's arguments: targets for each row of the logits, and inputs too for a head that picks
        positions by them.
        """
        axis = passed.main
        inputs = dict(inputs)
        if axis.num_samples and settings.objective == "mc_nll" and shifts_labels(self):
            for name in TARGETS:  # the stock loss would be of each sample
                inputs.pop(name, None)
        if axis.num_samples <= 1:
            return inputs
        for name, value in inputs.items():
            repeat = name in TARGETS or not self.can_generate()
            if repeat and torch.is_tensor(value) and value.ndim and value.shape[0] == axis.batch:
                # Of one row the copies would lie in one place, and stock losses view their targets flat.
                inputs[name] = repeat_rows(value, axis.num_samples).contiguous()
        return inputs

    def _join(self, outputs, passed: Pass, ours: dict) -> None:
        names = [name for name in _SCORED if outputs.get(name) is not None]
        asked = {name: ours[name] for name in ("output_uncertainty", "output_sample_logits")}
        for name, wanted in asked.items():
            if wanted and "logits" not in names:
                raise ValueError(f"{name}=True is about the logits, which {type(self).__name__} does not answer with.")
        problem = self._problem()
        for name in names:
            if problem == "single_label_classification":
                self._join_categorical(outputs, name, passed, asked if name == "logits" else {})
            else:
                self._join_numbers(outputs, name, passed.main.batch, problem, asked)

    def _join_categorical(self, outputs, name: str, passed: Pass, asked: dict) -> None:
        sampled = outputs[name]
        per_position = sampled.ndim == 3
        observed = passed.observed
        if observed is not None:
            observed = observed[:, -sampled.shape[1] :]
        readout = read_out(
            sampled if per_position else sampled.unsqueeze(1),
            None,
            passed.main.num_samples,
            sampled.shape[-1],
            self.settings.objective,
            observed=observed,
            **asked,
        )
        outputs[name] = readout.logits if per_position else readout.logits.squeeze(1)
        if readout.uncertainty is not None:
            measures = readout.uncertainty
            outputs["uncertainty"] = measures if per_position else measures.map(lambda value: value.squeeze(1))
        if readout.sample_logits is not None:
            samples = readout.sample_logits
            outputs["sample_logits"] = samples if per_position else samples.squeeze(2)

    def _join_numbers(self, outputs, name: str, batch: int, problem: str, asked: dict) -> None:
        if asked["output_uncertainty"]:
            raise ValueError(
                f"output_uncertainty measures a distribution over classes, and problem_type is {problem!r}: use "
                "output_sample_logits=True and the spread of the samples."
            )
        samples = widen(outputs[name]).unflatten(0, (batch, -1))
        outputs[name] = samples.mean(1) if problem == "regression" else log_odds_of_mean(samples)
        if name == "logits" and asked["output_sample_logits"]:
            outputs["sample_logits"] = samples

    def _problem(self) -> str:
        if not type(self).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
            return "single_label_classification"
        return problem_type_of(self.config)

    def _predictive_nll(self, outputs, passed: Pass) -> Tensor:
        """The NLL of the predictive distribution per target, nats, 0-dim."""
        logits, targets = outputs.get("logits"), passed.targets
        if logits is None or self._problem() != "single_label_classification" or targets.is_floating_point():
            raise ValueError(
                "objective='mc_nll' is the NLL of one distribution over classes per target, which "
                f"{type(self).__name__} does not answer with: use objective='elbo'."
            )
        targets = targets.reshape(-1).to(logits.device)
        total = F.nll_loss(logits.reshape(len(targets), -1), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / passed.num_items

    def _add_posteriors(self, outputs, passed: Pass, ours: dict, settings: VariationalSettings) -> None:
        records = tuple(passed.main.tape)
        for axis in passed.axes:
            # What a checkpointed layer's recomputation records again belongs to nobody.
            axis.tape = None
        check_complete(records, settings.sites)
        if passed.targets is not None and outputs.get("loss") is not None:
            parts = [posterior_penalties(here, scored, ours["free_bits"]) for here, scored in passed.scored(records)]
            weight = settings.kl_weight if ours["kl_weight"] is None else ours["kl_weight"]
            outputs["nll"] = outputs["loss"]
            for part in parts:
                outputs["loss"] = part.added_to(outputs["loss"], weight, settings.eve)
            outputs["kl"] = sum(part.kl for part in parts)
            outputs["kl_per_layer"] = torch.cat([part.kl_per_layer for part in parts])
            errors = [part.reconstruction for part in parts if part.reconstruction is not None]
            if errors:
                outputs["reconstruction"] = sum(errors)
        if ours["output_posteriors"]:
            for name, site in (("posteriors", "ffn"), ("attention_posteriors", "attention")):
                outputs[name] = {
                    record.layer: record.statistics.over_samples(passed.main.batch)
                    for record in records
                    if record.site == site
                }


def _refuse_kernel(implementation: str) -> None:
    raise ValueError(
        f"attn_implementation={implementation!r} never has the attention weights in its hands, so their posterior "
        f"cannot be sampled or its KL computed: use model.set_attn_implementation({IMPLEMENTATIONS['sdpa']!r}), or "
        "run the mean pass (num_posterior_samples=0, without labels)."
    )


def _refuse_continuation(settings: VariationalSettings, passed: Pass) -> None:
    axis = passed.main
    if axis.record and settings.eve is not None and settings.eve.prior == "autoregressive" and int(axis.seen) > 0:
        raise ValueError(
            f"The autoregressive prior of a position needs the posterior mean before it, and past_key_values starts "
            f"at position {int(axis.seen)}: ask for labels or output_posteriors of the whole sequence, without a "
            "filled cache."
        )


def _refuse_mean_encoder(settings: VariationalSettings, passed: Pass, inputs: dict) -> None:
    encoded, axis = inputs.get("encoder_outputs"), passed.main
    if encoded is None or axis.num_samples <= 1 or min(settings.sites)[0] >= passed.first_layers[-1]:
        return
    if encoded[0].shape[0] != axis.rows:
        raise ValueError(
            f"encoder_outputs has {encoded[0].shape[0]} rows, and the encoder's layers are variational: with "
            f"num_posterior_samples={axis.num_samples} its states have batch times samples, {axis.rows} rows. Give "
            "input_ids, and the encoder samples too."
        )
