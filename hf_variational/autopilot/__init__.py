"""AutoPilot: a search for a recipe, `hf-variational autopilot`. Optuna waits until something is asked for."""

import importlib

_EXPORTS = {
    "Space": "dimensions",
    "load_space": "space",
    "seconds_of": "options",
    "SearchOutcome": "outcome",
    "search": "program",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
