"""What variational models are compared with, behind the same interface: a file for each method."""

from importlib import import_module

# Registers its class with the Auto classes.
from .ensemble import EnsembleConfig, EnsembleForCausalLM
from .mc_dropout import mc_dropout, remove_mc_dropout

# Imported when first asked for: a checkpoint does not need them, and some need optional dependencies.
_LAZY = {
    "Cost": ".costs",
    "measure_cost": ".costs",
    "tempered": ".temperature",
    "untempered": ".temperature",
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
    "diagonal_laplace",
    "last_layer_laplace",
    "lora_ensemble",
    "mc_dropout",
    "measure_cost",
    "pvera_samples",
    "remove_last_layer_laplace",
    "remove_mc_dropout",
    "tempered",
    "untempered",
]
