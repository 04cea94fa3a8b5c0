"""Tiny models whose every variational parameter has something to be wrong about."""

import torch

from hf_variational import (
    EVEConfig,
    VariationalAttentionConfig,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
)

VOCAB = 43
VARIATIONAL = (".eve.", ".posterior.")


def attention_config(kind: str = "dirichlet", data_dependent: bool | str = False, **options):
    """Attention that is random enough for its samples to be told apart."""
    settings = {"initial_scale": 0.7, "initial_concentration": 6.0, "prior_concentration": 3.0, "hidden_size": 5}
    return VariationalAttentionConfig(kind=kind, data_dependent=data_dependent, **{**settings, **options})


def tiny_model(eve: dict | None = None, seed: int = 0, perturb: bool = True, **options) -> VariationalGPTForCausalLM:
    """A model in eval mode, 3 layers of width 16. `perturb` moves what is variational away from its start."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.25,
        "kl_weight": 0.1,
        "eve": EVEConfig(**{"initial_scale": 0.5, **(eve or {})}),
    }
    model = VariationalGPTForCausalLM(VariationalGPTConfig(**{**settings, **options})).eval()
    if perturb:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in VARIATIONAL):
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def twin_of(model: VariationalGPTForCausalLM) -> VariationalGPTForCausalLM:
    """The deterministic twin with the model's weights."""
    config = VariationalGPTConfig(**{**model.config.to_dict(), "eve": None, "attention": None})
    config._attn_implementation = model.config._attn_implementation
    twin = VariationalGPTForCausalLM(config).eval()
    loaded = twin.load_state_dict(model.state_dict(), strict=False)
    assert not loaded.missing_keys
    assert all(any(part in name for part in VARIATIONAL) for name in loaded.unexpected_keys)
    return twin


def token_ids(batch: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of `loss` in every parameter that has one; leaves `.grad` alone."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}


def assert_same_gradients(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest entry of each tensor."""
    assert actual.keys() == expected.keys()
    for name in expected:
        atol = tolerance * expected[name].abs().max().item() + 1e-9
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
