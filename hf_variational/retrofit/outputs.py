"""What a retrofitted model answers with: the stock output, and fields for what we add."""

from dataclasses import field, make_dataclass

from transformers import modeling_outputs
from transformers.utils import ModelOutput

# What an output has behind the stock fields.
ADDED = (
    *("nll", "kl", "kl_per_layer", "reconstruction", "uncertainty"),
    *("posteriors", "attention_posteriors", "sample_logits"),
)
_made: dict[type[ModelOutput], type[ModelOutput]] = {}


def output_class(stock: type[ModelOutput]) -> type[ModelOutput]:
    """A stock output class with fields for what we add: torch rebuilds an output from its class's fields."""
    if stock not in _made:
        fields = [(name, object, field(default=None)) for name in ADDED]
        name = f"Variational{stock.__name__}"
        _made[stock] = make_dataclass(name, fields, bases=(stock,), namespace={"__module__": __name__})
    return _made[stock]


# Ahead of the first pass, because torch.compile cannot trace the making of a class.
for _stock in list(vars(modeling_outputs).values()):
    if isinstance(_stock, type) and issubclass(_stock, ModelOutput) and _stock is not ModelOutput:
        output_class(_stock)
