"""Training arguments: transformers' own plus what is variational."""

import json
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..checks import check_number, check_whole
from .regime.settings import RegimeControl
from .schedules import KL_SCHEDULES, kl_factor

# Ends of the names of metrics that a good model has little of.
_SMALLER_IS_BETTER = ("nll", "kl", "perplexity", "error", "loss")


@dataclass
class VariationalTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] for [`VariationalTrainer`].

    Three defaults differ from transformers': `logging_nan_inf_filter` is off, because hiding a loss that is not finite
    would hide the reason to stop (and testing for it waits for the accelerator at every step); `data_seed` follows
    `seed`, so that the order of the data does not depend on the noise that the processes have drawn; and `use_cpu` is
    set where several processes meet on a machine without an accelerator, which would else train apart from each other.

    Args:
        kl_schedule (`str`, defaults to `"constant"`):
            `"constant"`, `"linear_warmup"` or `"cyclical"`: how the KL weight gets to its full value.
        kl_weight (`float`, *optional*):
            Full weight of the KL in the loss. `None` takes the model configuration's.
        kl_warmup_ratio (`float`, defaults to 0.1):
            Share of all steps over which `"linear_warmup"` rises.
        kl_warmup_steps (`int`, defaults to 0):
            Steps over which `"linear_warmup"` rises; 0 leaves it to `kl_warmup_ratio`.
        kl_cycles (`int`, defaults to 4):
            Cycles of `"cyclical"`.
        kl_cycle_ratio (`float`, defaults to 0.5):
            Share of each cycle over which `"cyclical"` rises.
        free_bits (`float`, defaults to 0.0):
            Nats a latent (a unit; in attention a head's row of weights) may spend before its KL is charged.
        train_posterior_samples (`int`, *optional*):
            Posterior samples of a training step. `None` takes the model configuration's; 0 trains the mean pass.
        eval_posterior_samples (`int`, defaults to 8):
            Posterior samples of the evaluation; 0 evaluates the mean pass only.
        cvar_fraction (`float`, defaults to 0.05):
            Share of the tokens, the worst predicted ones, whose mean negative log-likelihood is `eval_cvar_nll`.
        regime ([`RegimeControl`], `dict` or `str`, *optional*):
            How the regime of the EVE units is steered: itself, a dictionary of its fields, or that as JSON. With
            `regime.min_inside` the metric that chooses the best checkpoint is gated: one with less of its units
            inside their band is no candidate.

    `greater_is_better`, where it is left out, is also `False` for a `metric_for_best_model` that ends in `nll`, `kl`,
    `perplexity` or `error`; transformers knows `loss` alone.

    Example:

    ```python
    >>> args = VariationalTrainingArguments("out", kl_schedule="linear_warmup", kl_weight=1e-4, max_steps=1000)
    ```
    """

    kl_schedule: str = field(
        default="constant", metadata={"help": f"Schedule of the KL weight: {', '.join(KL_SCHEDULES)}."}
    )
    kl_weight: float | None = field(
        default=None, metadata={"help": "Full weight of the KL; none takes the model configuration's."}
    )
    kl_warmup_ratio: float = field(
        default=0.1, metadata={"help": "Share of all steps over which the linear warm-up rises."}
    )
    kl_warmup_steps: int = field(
        default=0, metadata={"help": "Steps over which the linear warm-up rises; 0 leaves it to the ratio."}
    )
    kl_cycles: int = field(default=4, metadata={"help": "Cycles of the cyclical schedule."})
    kl_cycle_ratio: float = field(
        default=0.5, metadata={"help": "Share of each cycle over which the cyclical schedule rises."}
    )
    free_bits: float = field(
        default=0.0, metadata={"help": "Nats a unit or a row of attention weights may spend before its KL is charged."}
    )
    train_posterior_samples: int | None = field(
        default=None, metadata={"help": "Posterior samples in training; none takes the model configuration's."}
    )
    eval_posterior_samples: int = field(
        default=8, metadata={"help": "Posterior samples in evaluation; 0 evaluates the mean pass only."}
    )
    cvar_fraction: float = field(
        default=0.05, metadata={"help": "Share of the tokens, the worst predicted ones, in eval_cvar_nll."}
    )
    regime: dict | str | None = field(
        default=None, metadata={"help": "Regime control of the EVE units: the fields of RegimeControl."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to leave losses that are not finite out of the log."}
    )

    def __post_init__(self):
        if self.kl_schedule not in KL_SCHEDULES:
            raise ValueError(f"kl_schedule={self.kl_schedule!r} is unknown: choose one of {', '.join(KL_SCHEDULES)}.")
        if self.kl_weight is not None:
            check_number("kl_weight", self.kl_weight, 0.0)
        check_number("kl_warmup_ratio", self.kl_warmup_ratio, 0.0, 1.0)
        check_whole("kl_warmup_steps", self.kl_warmup_steps, 0)
        check_whole("kl_cycles", self.kl_cycles, 1)
        check_number("kl_cycle_ratio", self.kl_cycle_ratio, 0.0, 1.0, open_low=True)
        check_number("free_bits", self.free_bits, 0.0)
        check_whole("eval_posterior_samples", self.eval_posterior_samples, 0)
        if self.train_posterior_samples is not None:
            check_whole("train_posterior_samples", self.train_posterior_samples, 0)
        check_number("cvar_fraction", self.cvar_fraction, 0.0, 1.0, open_low=True)
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} would replace the model's own loss, and with "
                "it the KL: set it to 0."
            )
        self._read_regime()
        if self.data_seed is None:
            self.data_seed = self.seed
        if not torch.accelerator.is_available():
            # torch would say at every data loader that there is nothing to pin memory for
            self.dataloader_pin_memory = False
            self.use_cpu = self.use_cpu or int(os.environ.get("WORLD_SIZE", "1")) > 1
        super().__post_init__()

    def _read_regime(self) -> None:
        if isinstance(self.regime, str):
            self.regime = json.loads(self.regime)
        self.regime = RegimeControl.of(self.regime)
        if self.regime is not None and self.regime.min_inside is not None and self.metric_for_best_model is None:
            raise ValueError(
                f"regime.min_inside={self.regime.min_inside} says which checkpoints may be the best one, and nothing "
                "chooses a best one: set metric_for_best_model='nll' (with an eval_strategy and a save_strategy)."
            )
        metric = self.metric_for_best_model
        if self.greater_is_better is None and metric is not None and metric.endswith(_SMALLER_IS_BETTER):
            self.greater_is_better = False

    def to_dict(self) -> dict:
        """As transformers', with the regime control as a dictionary of JSON types."""
        values = super().to_dict()
        if isinstance(self.regime, RegimeControl):
            values["regime"] = self.regime.to_dict()
        return values

    def kl_factor(self, step: int, total_steps: int) -> float:
        """Factor of the KL weight at an optimizer step, counted from 0."""
        return kl_factor(
            self.kl_schedule,
            step,
            total_steps,
            warmup_steps=self.kl_warmup_steps,
            warmup_ratio=self.kl_warmup_ratio,
            cycles=self.kl_cycles,
            cycle_ratio=self.kl_cycle_ratio,
        )
