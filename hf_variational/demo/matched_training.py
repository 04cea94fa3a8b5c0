"""Two models that differ in their EVE units only, trained on the same batches."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..modeling import VariationalGPTForCausalLM
from ..presentation.plots import Curve
from ..training import VariationalTrainer, VariationalTrainingArguments
from ..training.naming import is_variational
from .settings import DemoSettings

__all__ = ["LABELS", "Trained", "matched_models", "train_all"]


LABELS = {"deterministic": "deterministic", "eve": "EVE"}
CURVE_POINTS, CURVE_BLOCKS = 5, 16


class _Bar(TrainerCallback):
    """A progress bar, and the seconds spent in training steps alone (evaluation has a cost of its own)."""

    def __init__(self, progress: Progress, name: str, steps: int):
        self.progress, self.name, self.seconds = progress, name, 0.0
        self.task = progress.add_task(name, total=steps, nll="")

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        nll = (logs or {}).get("nll", (logs or {}).get("loss"))
        if nll is not None:
            self.progress.update(self.task, nll=f"NLL {float(nll):.3f}")


@dataclass(frozen=True)
class Trained:
    model: VariationalGPTForCausalLM
    seconds: float
    curve: Curve


def matched_models(settings: DemoSettings, tokenizer, seed: int) -> dict[str, VariationalGPTForCausalLM]:
    """Both models with the same weights, but for those that only EVE has."""
    torch.manual_seed(seed)
    deterministic = VariationalGPTForCausalLM(settings.config(tokenizer, eve=None))
    eve = VariationalGPTForCausalLM(settings.config(tokenizer, settings.eve))
    result = eve.load_state_dict(deterministic.state_dict(), strict=False)
    unmatched = [name for name in result.missing_keys if not is_variational(name)] + list(result.unexpected_keys)
    if unmatched:
        raise RuntimeError(f"the two models do not match: {unmatched}")
    return {"deterministic": deterministic, "eve": eve}


def _train(name, model, settings: DemoSettings, training, held_out, runs: Path, seed: int, progress) -> Trained:
    arguments = VariationalTrainingArguments(
        output_dir=str(runs / name),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=max(1, round(settings.warmup_share * settings.steps)),
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        kl_schedule="linear_warmup",
        kl_warmup_ratio=1.0,
        logging_steps=max(1, settings.steps // 60),
        eval_strategy="steps",
        eval_steps=max(1, settings.steps // CURVE_POINTS),
        eval_posterior_samples=min(4, settings.posterior_samples),
        save_strategy="no",
        report_to=[],
        seed=seed,
        data_seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # For the curve alone, so a part of the held-out blocks from all over it is enough; the tables take all of them.
    watched = held_out.select(range(0, len(held_out), max(1, len(held_out) // CURVE_BLOCKS)))
    trainer = VariationalTrainer(model=model, args=arguments, train_dataset=training, eval_dataset=watched)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    bar = _Bar(progress, LABELS[name], settings.steps)
    trainer.add_callback(bar)
    trainer.train()
    history = trainer.state.log_history
    logged = [(entry["step"], entry["nll"]) for entry in history if "nll" in entry]
    evaluated = [(entry["step"], entry["eval_nll"]) for entry in history if "eval_nll" in entry]
    curve = Curve(LABELS[name], *map(list, zip(*logged, strict=True)), *map(list, zip(*evaluated, strict=True)))
    return Trained(model, bar.seconds, curve)


def train_all(
    models: dict[str, VariationalGPTForCausalLM],
    settings: DemoSettings,
    training,
    held_out,
    runs: Path,
    seed: int,
    console,
) -> dict[str, Trained]:
    columns = (
        TextColumn("{task.description:<13}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[nll]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        return {
            name: _train(name, model, settings, training, held_out, runs, seed, progress)
            for name, model in models.items()
        }
