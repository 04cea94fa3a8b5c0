"""Configuration of the EVE forecaster."""

from dataclasses import field
from numbers import Integral

from transformers import PreTrainedConfig

from hf_variational import EVEConfig

OBJECTIVES = ("mse", "nll", "mc_nll")
AGGREGATIONS = ("mean", "median", "score")


def _choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def linear_eve(**fields) -> EVEConfig:
    """The papers' neuron: affine mean, input-dependent scale, N(0, 1) prior."""
    return EVEConfig(**{"mean": "linear", "prior": "standard", **fields})


class EVEForecasterConfig(PreTrainedConfig):
    """Configuration of [`EVEForecaster`].

    Args:
        lookback: values that a forecast reads; an even number, the previous and the current window are its halves.
        horizon: values that it predicts.
        units: EVE neurons of the bank, the width of the encoder's summary.
        moving_average: width of the moving average that splits off the trend, an odd number.
        eve: an [`EVEConfig`] or its dictionary.
        deterministic: the twin: the same weights of the mean, z is the mean, no KL.
        objective: `"mse"` the squared error of the aggregated forecast, `"nll"` the mean over posterior samples of the
            Gaussian negative log-likelihood with a learned scale, `"mc_nll"` that of the mixture of the samples.
        aggregation: how samples become one forecast: `"mean"`, `"median"`, or `"score"`, the mean weighted by the
            softmax over samples of a learned score of z.
        kl_weight: beta, where `forward` is not given one.
        num_posterior_samples: samples in train mode, where `forward` is not told how many.

    Raises:
        ValueError: for a value outside these, or for learned scores that no objective would train.
    """

    model_type = "eve_forecaster"
    keys_to_ignore_at_inference = ["nll", "kl", "kl_per_layer", "reconstruction", "uncertainty", "posteriors"]

    lookback: int = 336
    horizon: int = 96
    units: int = 1024
    moving_average: int = 25
    eve: EVEConfig | dict = field(default_factory=linear_eve)
    deterministic: bool = False
    objective: str = "mse"
    aggregation: str = "mean"
    kl_weight: float = 1e-4
    num_posterior_samples: int = 1

    def to_dict(self) -> dict:
        """As in transformers, with the neurons' configuration as a dictionary of JSON types."""
        return {**super().to_dict(), "eve": self.eve.to_dict()}

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if isinstance(self.eve, dict):
            self.eve = EVEConfig.from_dict(self.eve)
        for name, least in (("lookback", 2), ("horizon", 1), ("units", 1), ("num_posterior_samples", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.lookback % 2:
            raise ValueError(f"lookback={self.lookback} has no halves: choose an even number.")
        if self.moving_average % 2 == 0 or not 1 <= self.moving_average <= self.lookback:
            raise ValueError(
                f"moving_average must be an odd number from 1 to lookback={self.lookback}, got {self.moving_average}."
            )
        _choice("objective", self.objective, OBJECTIVES)
        _choice("aggregation", self.aggregation, AGGREGATIONS)
        if self.aggregation == "score" and self.objective != "mse":
            raise ValueError(
                f"aggregation='score' is trained by objective='mse' alone, got objective={self.objective!r}: the "
                "likelihoods weigh all samples alike. Choose aggregation='mean' or 'median'."
            )
        if not self.kl_weight >= 0:
            raise ValueError(f"kl_weight must be a number of 0 or more, got {self.kl_weight!r}.")
