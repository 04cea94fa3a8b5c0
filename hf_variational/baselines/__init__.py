"""What variational models are compared with, behind the same interface: a file for each method."""

from importlib import import_module

from .costs import Cost, measure_cost
from .ensemble import EnsembleConfig, EnsembleForCausalLM
from .mc_dropout import mc_dropout, remove_mc_dropout
from .temperature import tempered, untempered

# Imported when first asked for: they need optional dependencies.
_LAZY = {
    "lora_ensemble": ".lora",
    "pvera_samples": ".pvera",
    "diagonal_laplace": ".weight_laplace",
    "last_layer_laplace": ".laplace",
    "remove_last_layer_laplace": ".laplace",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


__all__ = [
    "Cost",
    "EnsembleConfig",
    "EnsembleForCausalLM",
    "mc_dropout",
    "measure_cost",
    "remove_mc_dropout",
    "tempered",
    "untempered",
]
