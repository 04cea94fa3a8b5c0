"""Configuration of an EVE adapter."""

import importlib
import os
from dataclasses import asdict, dataclass, field, fields

from packaging.version import InvalidVersion, Version
from peft import PeftConfig, PeftType

from ...modeling.configuration_variational_gpt import EVEConfig
from ...version import __version__
from ..settings import VariationalSettings
from .card import write_card
from .registration import NAME


@dataclass
class EVEAdapterConfig(PeftConfig):
    """Configuration of the PEFT method "EVE": the units of a frozen model's feed-forward networks (FFNs) become
    random, and only their posterior is trained, saved and shared. What the mean pass predicts does not change (with
    `mean="identity"`).

    Args:
        eve: configuration of the units, an [`EVEConfig`] or its dictionary, as which it is kept; `None`:
            `EVEConfig(prior="centered")`.
        layers: `"all"`; `"last"` or `"last_quarter"` (of the decoder); a list of numbers, counted from the encoder's
            first layer on; or a regular expression for whole names of layers.
        target_modules: names (or ends of names, or one regular expression) of the FFNs' output projections, for an
            architecture where they cannot be told.
        modules_to_save: names of modules that are trained and saved beside the posterior, such as a new head.
        kl_weight: beta, the weight of the KL in the loss.
        objective: `"elbo"`, or `"mc_nll"`: the loss is the NLL of the predictive distribution over the samples.
        num_posterior_samples: samples drawn in train mode where `forward` is not told how many.
        layer_units: of a saved adapter, the number of units by layer number: what it was trained for, and the only
            base it is put into.
        version: of hf_variational, which wrote the adapter.

    Raises:
        ValueError: for a value outside these; for an adapter written by a newer version with fields that this one does
            not know.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from hf_variational import EVEAdapterConfig, EVEConfig

    >>> config = EVEAdapterConfig(eve=EVEConfig(prior="centered"), layers="last_quarter", task_type="CAUSAL_LM")
    >>> model = get_peft_model(base, config)
    >>> out = model(**inputs, num_posterior_samples=8, output_uncertainty=True)
    ```
    """

    eve: EVEConfig | dict | None = field(default=None, metadata={"help": "Configuration of the units."})
    layers: str | list[int] = field(default="all", metadata={"help": "Which layers' units are variational."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the FFNs' output projections, where they cannot be told."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that are trained and saved beside the posterior."}
    )
    kl_weight: float = field(default=1e-4, metadata={"help": "Weight of the KL in the loss."})
    objective: str = field(default="elbo", metadata={"help": "'elbo' or 'mc_nll'."})
    num_posterior_samples: int = field(default=1, metadata={"help": "Posterior samples in train mode."})
    layer_units: dict[str, int] | None = field(
        default=None, metadata={"help": "Of a saved adapter, the number of units by layer number."}
    )
    version: str | None = field(default=None, metadata={"help": "Version of hf_variational that wrote the adapter."})

    # Where the adapter was put: not a field, so that a configuration can serve for several bases.
    _placed = None

    def __new__(cls, *args, **kwargs):
        # peft drops fields that a constructor does not take, with a warning; ours change what the adapter computes.
        unknown = sorted(set(kwargs) - {item.name for item in fields(cls)})
        if unknown and _is_newer(kwargs.get("version")):
            raise ValueError(_newer(kwargs["version"], unknown))
        return super().__new__(cls)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        self.version = self.version or __version__
        if isinstance(self.eve, dict):
            unknown = sorted(set(self.eve) - {item.name for item in fields(EVEConfig)})
            if unknown and _is_newer(self.version):
                raise ValueError(_newer(self.version, [f"eve.{name}" for name in unknown]))
            self.eve = EVEConfig.from_dict(self.eve)
        if self.eve is None:
            self.eve = EVEConfig(prior="centered")
        if not isinstance(self.eve, EVEConfig):
            raise ValueError(f"eve must be an EVEConfig, its dictionary or None, got {self.eve!r}.")
        self.eve = self.eve.to_dict()
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            raise ValueError(
                "target_modules='all-linear' is not for EVE, which stands at the one projection that ends a layer's "
                "FFN: leave target_modules out."
            )
        for name in ("layers", "target_modules", "modules_to_save"):
            if isinstance(getattr(self, name), (set, tuple)):
                setattr(self, name, sorted(getattr(self, name)))
        self.settings([])

    def settings(self, layers: list[int]) -> VariationalSettings:
        """What is variational in a model whose layers `layers` have this adapter.

        Raises:
            ValueError: for a field that is not what it may be.
        """
        return VariationalSettings(
            eve=EVEConfig.from_dict(self.eve),
            eve_layers=layers,
            target_modules=self.target_modules,
            kl_weight=self.kl_weight,
            objective=self.objective,
            num_posterior_samples=self.num_posterior_samples,
        )

    def place(self, units: dict[int, int]) -> None:
        """Remembers for `to_dict` the number of units by layer number."""
        self._placed = {str(layer): count for layer, count in units.items()}

    def to_dict(self) -> dict:
        """The configuration as a dictionary of JSON types."""
        return {**asdict(self), "version": __version__, "layer_units": self._placed or self.layer_units}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As in peft; also writes the adapter's card, `README.md`, unless a person wrote one."""
        if kwargs.get("auto_mapping_dict"):
            kwargs["auto_mapping_dict"] = _stock_mapping(kwargs["auto_mapping_dict"])
        super().save_pretrained(save_directory, **kwargs)
        write_card(self, save_directory)


def _is_newer(version: str | None) -> bool:
    try:
        return version is not None and Version(version) > Version(__version__)
    except InvalidVersion:
        return True


def _newer(version: str, unknown: list[str]) -> str:
    return (
        f"This adapter was made by hf_variational {version} and has {', '.join(unknown)}, which version "
        f"{__version__}, the installed one, does not know: pip install -U 'hf-variational>={version}'."
    )


def _stock_mapping(mapping: dict) -> dict:
    """How `AutoPeftModel` finds the base's class; of a variational one the stock class, which others have too."""
    module = importlib.import_module(mapping["parent_library"])
    stock = getattr(getattr(module, mapping["base_model_class"], None), "stock_class", None)
    return mapping if stock is None else {"base_model_class": stock.__name__, "parent_library": stock.__module__}
