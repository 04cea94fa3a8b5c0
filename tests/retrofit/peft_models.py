"""Tiny models with EVE adapters, and what they are compared with."""

import copy

import torch
from eve_families import TINY, centered, given, stock
from eve_reference import UnitNoise
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from hf_variational import posterior_noise, variationalize
from hf_variational.retrofit.peft import EVEAdapterConfig
from hf_variational.retrofit.peft.layer import eve_layers

# One of each shape: Conv1D, gated, rows laid end to end, an encoder, stacked experts, two towers, a new head.
NAMES = ["gpt2", "llama", "opt", "bert-masked", "mixtral", "t5", "bert-single"]
CAUSAL = ["gpt2", "llama", "opt", "mixtral"]
_TASKS = {"next": "CAUSAL_LM", "translation": "SEQ_2_SEQ_LM", "single": "SEQ_CLS", "tokens": "TOKEN_CLS"}


def config(name: str, layers="all", **options) -> EVEAdapterConfig:
    """A configuration whose samples can be told apart."""
    given_options = {"eve": centered(), "kl_weight": 0.1, "task_type": _TASKS.get(TINY[name].task), **options}
    return EVEAdapterConfig(layers=layers, **given_options)


def adapted(
    name: str, layers="all", base: PreTrainedModel | None = None, adapter_name: str = "default", **options
) -> PeftModel:
    """A stock model with an adapter whose posterior has moved away from its start, in eval mode."""
    base = stock(name) if base is None else base
    torch.manual_seed(2)
    model = get_peft_model(base, config(name, layers, **options), adapter_name=adapter_name)
    move(model, adapter_name)
    return model.eval()


@torch.no_grad()
def move(model, adapter_name: str = "default", seed: int = 1, by: float = 0.2) -> None:
    """Moves the posterior of an adapter (and its prior) off its start."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in posterior(model, adapter_name).values():
        tensor.add_(by * torch.randn(tensor.shape, generator=generator).to(tensor))


def posterior(model, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of an adapter's posterior, by (layer, name)."""
    found = {}
    for layer in eve_layers(model):
        if adapter_name in layer.eve_posterior:
            module = layer.eve_posterior[adapter_name]
            found |= {(layer.index, key): value for key, value in module.state_dict(keep_vars=True).items()}
    return found


def twin(model: PeftModel, plain: PreTrainedModel, adapter_name: str = "default") -> PreTrainedModel:
    """`plain` retrofitted with the posterior of an adapter of `model`."""
    tensors = posterior(model, adapter_name)
    settings = model.peft_config[adapter_name].settings([])
    other = variationalize(
        copy.deepcopy(plain),
        eve=settings.eve,
        layers=sorted({layer for layer, _ in tensors}),
        kl_weight=settings.kl_weight,
        objective=settings.objective,
    )
    from hf_variational.retrofit.ffn import eve_modules

    for layer, module in eve_modules(other).items():
        module.load_state_dict({key: value for (index, key), value in tensors.items() if index == layer})
    return other


def sampled(model, name: str, samples: int = 3, **options):
    """A forward pass with posterior samples whose noise is the same in every call."""
    with posterior_noise(UnitNoise()):
        return model(**given(name, padding=2), num_posterior_samples=samples, **options)
