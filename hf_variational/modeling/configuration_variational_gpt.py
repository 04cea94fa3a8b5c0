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
ATTENTION_KINDS = ("gaussian", "approximate_dirichlet", "dirichlet")
ATTENTION_PRIORS = ("contextual", "constant", "uniform")


def _number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}.")


def _one_of(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def _whole_number(name: str, value, minimum: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}.{hint}")


def _positive(name: str, value) -> None:
    _number(name, value)
    if not value > 0 or math.isinf(value):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}.")


def _from_known(cls, values: dict):
    """`cls(**values)`; raises `ValueError` for a key that it does not know."""
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{cls.__name__} does not know {', '.join(map(repr, unknown))}; it knows {', '.join(known)}. "
            "A checkpoint of a newer version of hf_variational needs that version."
        )
    return cls(**values)


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
        learn_autoregressive_coefficient: whether phi is learned, per unit and inside (-1, 1), from there on. Its s is
            `prior_scale` all the same.
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
    learn_autoregressive_coefficient: bool = False
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
            _positive(name, getattr(self, name))
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
        if self.learn_autoregressive_coefficient:
            if self.prior != "autoregressive":
                raise ValueError(
                    f"learn_autoregressive_coefficient=True needs prior='autoregressive', got prior={self.prior!r}."
                )
            if abs(self.autoregressive_coefficient) == 1.0:
                raise ValueError(
                    f"autoregressive_coefficient={self.autoregressive_coefficient!r} cannot be learned, for it moves "
                    "inside (-1, 1): start with 0.99, or set learn_autoregressive_coefficient=False."
                )
        if not self.reconstruction_weight >= 0:
            raise ValueError(f"reconstruction_weight must be 0 or more, got {self.reconstruction_weight!r}.")

    def to_dict(self) -> dict:
        """A dictionary of JSON types that `EVEConfig.from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "EVEConfig":
        """Builds the configuration from `to_dict`'s dictionary; raises `ValueError` for a key it does not know."""
        return _from_known(cls, values)


@dataclass
class VariationalAttentionConfig:
    """Configuration of variational attention (Cinquin et al. 2021, arXiv 2110.04020).

    Let A be the masked logits of a query's row and m = softmax(A). The row of attention weights is random around m,
    and the mean pass is ordinary attention:

    - `"gaussian"`: softmax of N(A, sigma^2);
    - `"dirichlet"`: Dirichlet(a m);
    - `"approximate_dirichlet"`: the same with the inverse-CDF approximation of its Gammas (Joo et al. 2020), whose
      samples are too narrow for concentrations a m_k above about 0.1.

    Args:
        kind: one of these.
        data_dependent: what sigma or a depends on. `False`: one learned number per head; `"query"`: a network of one
            hidden layer (ReLU) per head on the query; `True`: such a network on the row of logits, as in the paper,
            which limits a row to `max_position_embeddings` keys (with padding, and all the room of a static cache).
        hidden_size: width of that hidden layer.
        prior: `"contextual"`: N(A, sigma_p^2), or Dirichlet(a_p m), which follow the mean and leave it free;
            Dirichlet kinds also `"constant"`: each visible key has concentration a_p; `"uniform"`: a_p in all, shared
            equally among the keys that the query sees.
        prior_scale: sigma_p.
        prior_concentration: a_p.
        initial_scale: sigma at initialisation.
        initial_concentration: a at initialisation.
        initial_raw: start of the raw parameter, drawn from N(initial_raw, 0.01^2), with sigma or a its softplus: -7
            is the paper's. `None`: the two fields above, and the parameter's unit is what they name.

    Raises:
        ValueError: for a value outside these, naming the field and what it may be.
    """

    kind: str = "dirichlet"
    data_dependent: bool | str = "query"
    hidden_size: int = 16
    prior: str = "contextual"
    prior_scale: float = 0.5
    prior_concentration: float = 10.0
    initial_scale: float = 0.1
    initial_concentration: float = 100.0
    initial_raw: float | None = None

    def __post_init__(self):
        _one_of("kind", self.kind, ATTENTION_KINDS)
        if not isinstance(self.data_dependent, bool) and self.data_dependent != "query":
            raise ValueError(
                f"data_dependent={self.data_dependent!r} is unknown; choose False, 'query', or True (the logits)."
            )
        _one_of("prior", self.prior, ATTENTION_PRIORS)
        if self.kind == "gaussian" and self.prior != "contextual":
            raise ValueError(
                f"prior={self.prior!r} is a prior over concentrations: kind='gaussian' has prior='contextual', "
                "N(A, prior_scale^2)."
            )
        _whole_number("hidden_size", self.hidden_size, 1)
        for name in ("prior_scale", "prior_concentration", "initial_scale", "initial_concentration"):
            _positive(name, getattr(self, name))
        if self.initial_raw is not None:
            _number("initial_raw", self.initial_raw)

    @property
    def initial_value(self) -> float:
        """sigma or a at initialisation, where `initial_raw` does not say."""
        return self.initial_scale if self.kind == "gaussian" else self.initial_concentration

    @property
    def prior_value(self) -> float:
        """sigma_p or a_p."""
        return self.prior_scale if self.kind == "gaussian" else self.prior_concentration

    def to_dict(self) -> dict:
        """A dictionary of JSON types that `VariationalAttentionConfig.from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "VariationalAttentionConfig":
        """Builds the configuration from `to_dict`'s dictionary; raises `ValueError` for a key it does not know."""
        return _from_known(cls, values)


class VariationalGPTConfig(LlamaConfig):
    """Configuration of VariationalGPT: `LlamaConfig` plus the variational fields.

    Args:
        eve: an [`EVEConfig`], its dictionary, or `None` for deterministic feed-forward units.
        variational_layers: numbers of the layers whose feed-forward units are variational; `None`: all.
        attention: a [`VariationalAttentionConfig`], its dictionary, or `None` for deterministic attention (with
            `eve=None`: the deterministic twin).
        attention_layers: numbers of the layers whose attention is variational; `None`: all.
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
        "past_key_values", "nll", "kl", "kl_per_layer", "reconstruction", "uncertainty", "posteriors",
        "attention_posteriors", "sample_logits",
    ]  # fmt: skip
    # Only the attention is sharded: a unit's scale reads the whole hidden activation, so the feed-forward is not.
    base_model_tp_plan = {name: plan for name, plan in LlamaConfig.base_model_tp_plan.items() if ".self_attn." in name}

    eve: EVEConfig | dict | None = field(default_factory=EVEConfig)
    variational_layers: list[int] | None = None
    attention: VariationalAttentionConfig | dict | None = None
    attention_layers: list[int] | None = None
    kl_weight: float = 1e-4
    objective: str = "elbo"
    num_posterior_samples: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.eve = _nested("eve", self.eve, EVEConfig, "latent_dim")
        self.attention = _nested("attention", self.attention, VariationalAttentionConfig, "data_dependent")
        _number("kl_weight", self.kl_weight)
        _one_of("objective", self.objective, OBJECTIVES)
        check_num_posterior_samples(self.num_posterior_samples)
        if not self.kl_weight >= 0 or math.isinf(self.kl_weight):
            raise ValueError(f"kl_weight must be a finite number of 0 or more, got {self.kl_weight!r}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}: "
                "choose another number of heads, or another width."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}: choose a divisor of it."
            )
        self.variational_layer_indices()
        if self.attention is not None:
            # A posterior has numbers for every head, and a shard of the heads would read those of the first ones.
            self.base_model_tp_plan = {}

    def eve_layer_indices(self) -> list[int]:
        """The sorted numbers of the layers whose feed-forward units are variational; raises as below."""
        return self._layers("variational_layers", "eve")

    def attention_layer_indices(self) -> list[int]:
        """The sorted numbers of the layers whose attention is variational; raises as below."""
        return self._layers("attention_layers", "attention")

    def variational_layer_indices(self) -> list[int]:
        """The sorted numbers of the layers where anything is variational; empty for the deterministic twin.

        Raises:
            ValueError: if `variational_layers` or `attention_layers` is empty or names a layer that the model does
                not have.
        """
        return sorted({*self.eve_layer_indices(), *self.attention_layer_indices()})

    def _layers(self, name: str, kind: str) -> list[int]:
        layers = getattr(self, name)
        if getattr(self, kind) is None:
            return []
        if layers is None:
            return list(range(self.num_hidden_layers))
        if not isinstance(layers, (list, tuple)):
            raise ValueError(f"{name} must be a list of layer numbers or None, got {layers!r}.")
        if not layers:
            raise ValueError(f"{name}=[] leaves nothing variational: use {kind}=None, or None for all layers.")
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.num_hidden_layers:
                raise ValueError(f"{name} names {layer!r}, but the layers are 0 to {self.num_hidden_layers - 1}.")
        return sorted(set(layers))

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; what is variational in `kwargs` is checked like the rest."""
        ours = {name: kwargs.pop(name) for name in cls.__annotations__ if name in kwargs}
        return super().from_dict({**config_dict, **ours}, **kwargs)

    def to_dict(self) -> dict:
        """`LlamaConfig.to_dict` with the nested configurations as dictionaries of JSON types."""
        output = super().to_dict()
        for name in ("eve", "attention"):
            nested = getattr(self, name)
            if nested is not None and not isinstance(nested, dict):
                output[name] = nested.to_dict()
        return output


def _nested(name: str, value, cls: type, mark: str):
    """The nested configuration: as it is, or built of its dictionary."""
    if isinstance(value, dict):
        return cls.from_dict(value)
    # By a field of its own, because remote code brings a class of the same name.
    if value is not None and not hasattr(value, mark):
        raise ValueError(f"{name} must be a {cls.__name__}, its dictionary, or None, got {value!r}.")
    return value


__all__ = ["EVEConfig", "VariationalAttentionConfig", "VariationalGPTConfig"]
