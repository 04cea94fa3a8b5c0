"""The variational classes of the families, made of the stock ones: `VariationalGPT2ForCausalLM` and its like."""

import inspect
import sys
from functools import cache

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin

from ..modeling.generation import VariationalGenerationMixin
from ..modeling.loading import WholeFilesMixin
from ..modeling.saving import CardMixin
from .families import FAMILIES
from .model import ARGUMENTS, VariationalMixin
from .outputs import ADDED
from .seq2seq import EncoderSamplesMixin

AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForImageClassification,
)


def variational_name(stock: str) -> str:
    """GPT2LMHeadModel to VariationalGPT2ForCausalLM, BertModel to VariationalBertModel."""
    # By the end of a class's name transformers finds its loss.
    if stock.endswith("LMHeadModel"):
        stock = f"{stock.removesuffix('LMHeadModel')}ForCausalLM"
    return f"Variational{stock}"


@cache
def variational_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class of a variational model: the stock one, with a `model_type` of its own.

    Of a family that is not in the table the stock class itself, which stock tools find.
    """
    if stock.model_type not in FAMILIES:
        return stock
    ignored = getattr(stock, "keys_to_ignore_at_inference", None) or ["past_key_values"]
    return type(
        f"Variational{stock.__name__}",
        (stock,),
        {
            "__module__": __name__,
            "__doc__": f"{stock.__name__} with `variational`: the dictionary of a `VariationalSettings`.",
            "model_type": f"variational_{stock.model_type}",
            "keys_to_ignore_at_inference": list(dict.fromkeys([*ignored, *ADDED])),
            # A unit's scale reads the whole hidden activation, and a head's posterior has numbers for every head.
            "base_model_tp_plan": {},
        },
    )


@cache
def variational_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The variational subclass of a stock class: `variational_class(BertForMaskedLM).from_pretrained(folder)` loads
    what `variationalize` and `save_pretrained` made, or any stock checkpoint.
    """
    if issubclass(model_class, VariationalMixin):
        return model_class
    stock = inspect.signature(model_class.forward)
    names = [name for name, parameter in stock.parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    def forward(self, *args, **kwargs):
        inputs = dict(zip(names[1:], args, strict=False)) | kwargs
        ours = {name: inputs.pop(name, default) for name, default in ARGUMENTS.items()}
        return self._run(super(variational, self).forward, inputs, ours)

    # generate, pipelines and Trainer ask the signature what a model takes.
    ours = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in ARGUMENTS.items()
    ]
    parameters = list(stock.parameters.values())
    tail = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
    forward.__signature__ = stock.replace(parameters=[*(p for p in parameters if p not in tail), *ours, *tail])
    forward.__doc__ = model_class.forward.__doc__
    bases = [CardMixin, WholeFilesMixin, VariationalMixin]
    if issubclass(model_class, GenerationMixin):
        bases += [EncoderSamplesMixin, VariationalGenerationMixin]
    kept = getattr(model_class, "_keep_in_fp32_modules_strict", None) or []
    name = variational_name(model_class.__name__)
    variational = type(
        name,
        (*bases, model_class),
        {
            "__doc__": f"{model_class.__name__} with posteriors; see [`variationalize`].",
            "__module__": __name__,
            "config_class": variational_config_class(model_class.config_class),
            "forward": forward,
            "stock_class": model_class,
            "_keep_in_fp32_modules_strict": [*kept, "posterior", "eve"],
        },
    )
    # Where pickle looks for it.
    setattr(sys.modules[__name__], name, variational)
    _read_files_as(name, model_class.__name__)
    return variational


def _read_files_as(name: str, stock: str) -> None:
    """Has transformers convert the names in a checkpoint of a class or `model_type` as it does for the stock one's."""
    mapping = get_checkpoint_conversion_mapping(stock)
    if mapping is not None:
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


def _register(model_type: str) -> None:
    """Makes the classes of a family and registers them with the Auto classes."""
    stock = CONFIG_MAPPING[model_type]
    config = variational_config_class(stock)
    setattr(sys.modules[__name__], config.__name__, config)
    AutoConfig.register(config.model_type, config)
    _read_files_as(config.model_type, model_type)
    for auto in AUTO_CLASSES:
        if stock in auto._model_mapping:
            found = auto._model_mapping[stock]
            for model_class in found if isinstance(found, tuple) else (found,):
                auto.register(config, variational_class(model_class))
                break


for _model_type in FAMILIES:
    _register(_model_type)


def __getattr__(name: str):
    # An unpickled model of a family that is not in the table: its class is made of the stock one.
    import transformers

    stock = getattr(transformers, name.removeprefix("Variational"), None)
    if name.startswith("Variational") and inspect.isclass(stock) and issubclass(stock, PreTrainedModel):
        return variational_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
