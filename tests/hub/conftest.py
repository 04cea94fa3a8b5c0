import pytest
import torch

from hf_variational import EVEConfig, VariationalGPTConfig, VariationalGPTForCausalLM


def build(**options) -> VariationalGPTForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 67,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "eve": EVEConfig(initial_scale=0.5, scale_rank=2),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = VariationalGPTForCausalLM(VariationalGPTConfig(**{**settings, **options})).eval()
    with torch.no_grad():
        # the input-dependent part of the scale starts at zero: give it something to be wrong about
        for name, parameter in model.named_parameters():
            if ".eve." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model():
    return build()


@pytest.fixture
def twin():
    return build(eve=None)


@pytest.fixture
def registered():
    """The classes as `register_for_auto_class` leaves them, for one test."""
    before = {cls: cls._auto_class for cls in (VariationalGPTForCausalLM, VariationalGPTConfig)}
    VariationalGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    VariationalGPTConfig.register_for_auto_class()
    yield
    for cls, auto_class in before.items():
        cls._auto_class = auto_class
