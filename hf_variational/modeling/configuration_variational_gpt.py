"""Configuration of VariationalGPT: the Llama fields plus what is variational."""

import math
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real

from transformers import LlamaConfig

MEANS = ("identity", "gain", "linear")
SCALES = ("scalar", "unit", "input")
POOLS = ("mean", "sum", "sum_sqrtk")
NOISES = ("token", "sequence")
PRIORS = ("standard", "empirical", "centered", "autoregressive")
OBJECTIVES = ("elbo", "mc_nll")


def _number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}.")


def _one_of(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def _whole_number(name: str, value, minimum: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}.{hint}")


def check_num_posterior_samples(value) -> int:
    """Returns `value` if it is a number of posterior samples; raises `ValueError` that names it otherwise."""
    hint = " 0 is the mean pass; 8 is a good start for uncertainty."
    _whole_number("num_posterior_samples", value, 0, hint)
    return int(value)


@dataclass(kw_only=True)
class EVEConfig:
    """Configuration of a layer of EVE variational neurons (arXiv 2603.28219, section 3; arXiv 2602.18250).

    For the hidden activation `h` of a token, unit `i` holds `z_i ~ N(mu_i(h), sigma_i(h)^2)` and passes `z_i` on.

    Args:
        mean: `"identity"` mu = h (adds nothing), `"gain"` mu = g * h, `"linear"` mu = W h + b. All start at mu = h.
        scale: `"scalar"` one log-scale a layer, `"unit"` one per unit (and latent dimension), `"input"`
            a function of h.
        scale_rank: rank r of the input scale, log sigma = B A h + c, with B starting at 0; `None`: full affine;
            `"auto"`: 8 with `scale="input"`. The other scales have none.
        latent_dim: latent width k of a unit.
        pool: how a unit's k values become its activity: `"mean"`, `"sum"`, or `"sum_sqrtk"` (the sum over sqrt(k)).
        noise: `"token"` draws fresh noise at each position, `"sequence"` once per sequence and posterior sample (the
            cache keeps it while decoding; a pass without a cache draws its own).
        prior: `"standard"` N(0, 1), `"empirical"` N(m_i, s_i^2) learned per unit, `"centered"` N(sg[mu], s^2),
            `"autoregressive"` N(phi * mu_{t-1}, s^2) along a sequence, whose first position takes the standard prior.
        prior_scale: s of the centered and autoregressive priors, and where the empirical prior's s_i start.
        autoregressive_coefficient: phi.
        initial_scale: sigma at initialisation.
        log_scale_min, log_scale_max: log sigma is clipped to this range.
        reconstruction_weight: weight of the local reconstruction of h from z; 0 adds no decoder.

    Raises:
        ValueError: for a value outside these, naming the field and what it may be.
    """

    mean: str = "identity"
    scale: str = "input"
    scale_rank: int | str | None = "auto"
    latent_dim: int = 1
    pool: str = "mean"
    noise: str = "token"
    prior: str = "empirical"
    prior_scale: float = 1.0
    autoregressive_coefficient: float = 0.9
    initial_scale: float = 0.1
    log_scale_min: float = -12.0
    log_scale_max: float = 2.0
    reconstruction_weight: float = 0.0

    def __post_init__(self):
        _one_of("mean", self.mean, MEANS)
        _one_of("scale", self.scale, SCALES)
        _one_of("pool", self.pool, POOLS)
        _one_of("noise", self.noise, NOISES)
        _one_of("prior", self.prior, PRIORS)
        if self.scale_rank == "auto":
            self.scale_rank = 8 if self.scale == "input" else None
        if self.scale_rank is not None:
            if self.scale != "input":
                raise ValueError(
                    f"scale_rank={self.scale_rank} needs scale='input', got scale={self.scale!r}: "
                    "set scale='input' or scale_rank=None."
                )
            _whole_number("scale_rank", self.scale_rank, 1, " Use None for the full affine scale.")
        _whole_number("latent_dim", self.latent_dim, 1)
        for item in fields(self):
            if item.type is float or item.type == "float":
                _number(item.name, getattr(self, item.name))
        for name in ("prior_scale", "initial_scale"):
            if not getattr(self, name) > 0 or math.isinf(getattr(self, name)):
                raise ValueError(f"{name} must be a positive finite number, got {getattr(self, name)!r}.")
        if not self.log_scale_min < self.log_scale_max:
            raise ValueError(f"log_scale_min={self.log_scale_min} must be below log_scale_max={self.log_scale_max}.")
        if not self.log_scale_min <= math.log(self.initial_scale) <= self.log_scale_max:
            raise ValueError(
                f"initial_scale={self.initial_scale} lies outside the allowed range "
                f"[{math.exp(self.log_scale_min):.3g}, {math.exp(self.log_scale_max):.3g}] = exp([log_scale_min, "
                "log_scale_max]): choose another, or widen the range."
            )
        if not -1.0 <= self.autoregressive_coefficient <= 1.0:
            raise ValueError(
                f"autoregressive_coefficient must be in [-1, 1], got {self.autoregressive_coefficient!r}."
            )
        if not self.reconstruction_weight >= 0:
            raise ValueError(f"reconstruction_weight must be 0 or more, got {self.reconstruction_weight!r}.")

    def to_dict(self) -> dict:
        """A dictionary of JSON types that `EVEConfig.from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "EVEConfig":
        """Builds the configuration from `to_dict`'s dictionary; raises `ValueError` for a key it does not know."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"EVEConfig does not know {', '.join(map(repr, unknown))}; it knows {', '.join(known)}. "
                "A checkpoint of a newer version of hf_variational needs that version."
            )
        return cls(**values)


class VariationalGPTConfig(LlamaConfig):
    """Configuration of VariationalGPT: `LlamaConfig` plus the variational fields.

    Args:
        eve: an [`EVEConfig`], its dictionary, or `None` for the deterministic twin.
        variational_layers: numbers of the layers whose feed-forward units are variational; `None`: all.
        kl_weight: beta, the weight of the KL in the loss, used where `forward` is not given one.
        objective: `"elbo"`, the mean over posterior samples of the negative log-likelihood (NLL), or `"mc_nll"`, the
            NLL of the predictive distribution.
        num_posterior_samples: samples drawn in train mode where `forward` is not told how many.

    Example:

    ```python
    >>> from hf_variational import EVEConfig, VariationalGPTConfig

    >>> config = VariationalGPTConfig(
    ...     hidden_size=256, num_hidden_layers=6, num_attention_heads=8, intermediate_size=1024,
    ...     eve=EVEConfig(prior="centered"), variational_layers=[4, 5],
    ... )
    ```
    """

    model_type = "variational_gpt"
    keys_to_ignore_at_inference = [
        "past_key_values", "nll", "kl", "kl_per_layer", "reconstruction", "uncertainty", "posteriors", "sample_logits",
    ]  # fmt: skip
    # Only the attention is sharded: a unit's scale reads the whole hidden activation, so the feed-forward is not.
    base_model_tp_plan = {name: plan for name, plan in LlamaConfig.base_model_tp_plan.items() if ".self_attn." in name}

    eve: EVEConfig | dict | None = field(default_factory=EVEConfig)
    variational_layers: list[int] | None = None
    kl_weight: float = 1e-4
    objective: str = "elbo"
    num_posterior_samples: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if isinstance(self.eve, dict):
            self.eve = EVEConfig.from_dict(self.eve)
        elif self.eve is not None and not hasattr(self.eve, "latent_dim"):
            raise ValueError(f"eve must be an EVEConfig, its dictionary, or None, got {self.eve!r}.")
        _number("kl_weight", self.kl_weight)
        _one_of("objective", self.objective, OBJECTIVES)
        check_num_posterior_samples(self.num_posterior_samples)
        if not self.kl_weight >= 0 or math.isinf(self.kl_weight):
            raise ValueError(f"kl_weight must be a finite number of 0 or more, got {self.kl_weight!r}.")
        self.variational_layer_indices()

    def variational_layer_indices(self) -> list[int]:
        """The sorted numbers of the variational layers; empty for the deterministic twin.

        Raises:
            ValueError: if `variational_layers` is empty or names a layer that the model does not have.
        """
        if self.eve is None:
            return []
        if self.variational_layers is None:
            return list(range(self.num_hidden_layers))
        if not isinstance(self.variational_layers, (list, tuple)):
            raise ValueError(
                f"variational_layers must be a list of layer numbers or None, got {self.variational_layers!r}."
            )
        if not self.variational_layers:
            raise ValueError("variational_layers=[] leaves nothing variational: use eve=None, or None for all layers.")
        for layer in self.variational_layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"variational_layers names {layer!r}, but the layers are 0 to {self.num_hidden_layers - 1}."
                )
        return sorted(set(self.variational_layers))

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; what is variational in `kwargs` is checked like the rest."""
        ours = {name: kwargs.pop(name) for name in cls.__annotations__ if name in kwargs}
        return super().from_dict({**config_dict, **ours}, **kwargs)

    def to_dict(self) -> dict:
        """`LlamaConfig.to_dict` with the nested `EVEConfig` as a dictionary of JSON types."""
        output = super().to_dict()
        if isinstance(self.eve, EVEConfig):
            output["eve"] = self.eve.to_dict()
        return output


__all__ = ["EVEConfig", "VariationalGPTConfig"]
