"""hf_variational: language models that carry a distribution inside, for transformers.

Importing the package registers its models with transformers' Auto classes.
"""

import warnings
from importlib import import_module
from importlib.util import find_spec

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from . import (
    baselines as _baselines,  # noqa: F401  registers ensembles
)
from . import (
    hub as _hub,  # noqa: F401  registers the writer of model cards
)
from . import (
    modeling,
)
from . import (
    retrofit as _retrofit,
)
from .modeling import *  # noqa: F403
from .version import __version__

# Imported when first asked for: they pull in accelerate and datasets, which a user of a checkpoint does not need.
_LAZY = {
    "VariationalTrainer": ".training",
    "VariationalTrainingArguments": ".training",
    "RegimeControl": ".training",
    "variationalize": ".retrofit",
    "to_deterministic": ".retrofit",
    "calibrate_prior": ".retrofit.calibrate",
    "fit_scale": ".retrofit.scale",
    "FittedScale": ".retrofit.scale",
    "EVEAdapterConfig": ".retrofit.peft",
    "UncertaintyController": ".acting",
    "AdaptiveSampling": ".acting",
    "fit_temperature": ".evaluation",
    "token_scores": ".evaluation",
    "token_windows": ".evaluation",
    "evaluate_domains": ".evaluation",
    "variational_class": ".retrofit",
    "StreamingEvaluation": ".evaluation",
    "evaluate_language_model": ".evaluation",
    "model_card": ".hub",
    "save_for_hub": ".hub",
    "push_to_hub": ".hub",
}

AutoConfig.register(modeling.VariationalGPTConfig.model_type, modeling.VariationalGPTConfig)
AutoModel.register(modeling.VariationalGPTConfig, modeling.VariationalGPTModel)
AutoModelForCausalLM.register(modeling.VariationalGPTConfig, modeling.VariationalGPTForCausalLM)
AutoModelForSequenceClassification.register(
    modeling.VariationalGPTConfig, modeling.VariationalGPTForSequenceClassification
)
AutoModelForTokenClassification.register(modeling.VariationalGPTConfig, modeling.VariationalGPTForTokenClassification)

if find_spec("peft") is not None:
    try:
        from .retrofit import peft as _peft  # noqa: F401  registers the method "EVE"
    except ImportError as error:
        warnings.warn(
            f"The installed peft is not one that hf_variational's adapters work with ({error}): install peft 0.21 or "
            "update hf-variational. Everything else works.",
            stacklevel=2,
        )


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    if name.startswith("Variational"):
        return getattr(_retrofit.classes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


__all__ = ["__version__"]
__all__ += modeling.__all__
