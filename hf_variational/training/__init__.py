"""Training: the trainer and its arguments, recipes, data. Heavy imports wait until something is asked for."""

import importlib

_EXPORTS = {
    "VariationalTrainer": "trainer",
    "VariationalTrainingArguments": "arguments",
    "RegimeControl": "regime",
    "RegimeControlCallback": "regime",
    "BandSettings": "regime",
    "BandPenalty": "regime",
    "Projection": "regime",
    "Homeostasis": "regime",
    "Thermostat": "regime",
    "ScaleGuard": "regime",
    "BandCalibration": "regime",
    "AutoregressiveControl": "regime",
    "KL_SCHEDULES": "schedules",
    "kl_factor": "schedules",
    "load_text": "data",
    "pack": "data",
    "train_tokenizer": "data",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "run": "program",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
