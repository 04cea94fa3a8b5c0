"""hf_variational: language models that carry a distribution inside, for transformers.

Importing the package registers its models with transformers' Auto classes.
"""

from importlib import import_module

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from . import (
    hub as _hub,  # noqa: F401  registers the writer of model cards
)
from . import (
    modeling,
)
from .modeling import *  # noqa: F403

__version__ = "0.1.0"

# Imported when first asked for: they pull in accelerate and datasets, which a user of a checkpoint does not need.
_LAZY = {
    "VariationalTrainer": ".training",
    "VariationalTrainingArguments": ".training",
    "add_variational_attention": ".retrofit",
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


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


__all__ = ["__version__"]
__all__ += modeling.__all__
