"""What is variational in a retrofitted model."""

from dataclasses import asdict, dataclass, field, fields
from numbers import Real

from ..modeling.configuration_variational_gpt import (
    OBJECTIVES,
    EVEConfig,
    VariationalAttentionConfig,
    check_num_posterior_samples,
)
from ..version import __version__


@dataclass
class VariationalSettings:
    """What is variational in a retrofitted model, kept as the dictionary `config.variational`.

    Attributes:
        eve: of the units of the feed-forward networks (FFNs), an [`EVEConfig`], or `None`.
        eve_layers: numbers of the layers whose units are variational.
        attention: a [`VariationalAttentionConfig`], or `None`.
        attention_layers: numbers of the layers whose attention is variational.
        target_modules: what names the FFNs' output projections, where the family's table does not.
        kl_weight: beta, used where `forward` is not given one.
        objective: `"elbo"`, the mean over posterior samples of the negative log-likelihood (NLL), or `"mc_nll"`, the
            NLL of the predictive distribution.
        num_posterior_samples: samples drawn in train mode where `forward` is not told how many.
        version: of hf_variational, which made it.

    Raises:
        ValueError: for a value outside these, naming it.
    """

    eve: EVEConfig | None = None
    eve_layers: list[int] = field(default_factory=list)
    attention: VariationalAttentionConfig | None = None
    attention_layers: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    kl_weight: float = 1e-4
    objective: str = "elbo"
    num_posterior_samples: int = 1
    version: str = __version__

    def __post_init__(self):
        check_num_posterior_samples(self.num_posterior_samples)
        is_number = isinstance(self.kl_weight, Real) and not isinstance(self.kl_weight, bool)
        if not is_number or not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"kl_weight must be a finite number of 0 or more, got {self.kl_weight!r}.")
        if self.objective not in OBJECTIVES:
            choices = ", ".join(map(repr, OBJECTIVES))
            raise ValueError(f"objective={self.objective!r} is unknown; choose one of {choices}.")

    @property
    def sites(self) -> list[tuple[int, str]]:
        """(layer, site) of each posterior, site `"ffn"` or `"attention"`."""
        return [(layer, "ffn") for layer in self.eve_layers] + [
            (layer, "attention") for layer in self.attention_layers
        ]

    def to_dict(self) -> dict:
        """A dictionary of JSON types that `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "VariationalSettings":
        """Reads `to_dict`'s dictionary.

        Raises:
            ValueError: for a field that this version of the package does not know, naming both versions.
        """
        made_by = values.get("version", "an unknown version")
        known = {item.name for item in fields(cls)}
        nested = {"eve": EVEConfig, "attention": VariationalAttentionConfig}
        unknown = [name for name in values if name not in known]
        for name, config in nested.items():
            inside = {item.name for item in fields(config)}
            unknown += [f"{name}.{key}" for key in values.get(name) or {} if key not in inside]
        if unknown:
            raise ValueError(
                f"This checkpoint was made by hf_variational {made_by} and has {', '.join(sorted(unknown))}, which "
                f"version {__version__}, the installed one, does not know: pip install -U 'hf-variational>={made_by}'."
            )
        given = dict(values)
        for name, config in nested.items():
            if given.get(name) is not None:
                given[name] = config.from_dict(given[name])
        return cls(**given)
