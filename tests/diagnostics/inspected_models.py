"""Tiny models whose units are in known states, data for them, and their statistics by brute force."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_variational import (
    EVEConfig,
    VariationalAttentionConfig,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
    variationalize,
)
from hf_variational.modeling.eve import EVE

VOCAB, UNITS, LAYERS = 29, 12, 3
LENGTHS = (9, 4, 7, 5, 8, 3, 6)


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def padded(rows, side="right"):
    """One batch of all rows."""
    width = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for row, tokens in enumerate(rows):
        here = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[row, here], mask[row, here] = torch.tensor(tokens), 1
    # Counted without padding: a network that reads a query sees its position in it.
    return [{"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}]


def gpt(attention=None, **eve):
    """A VariationalGPT whose posterior has moved away from its start."""
    torch.manual_seed(0)
    config = VariationalGPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=UNITS,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.3,
        kl_weight=0.01,
        eve=EVEConfig(**{"initial_scale": 0.5, **eve}),
        attention=attention,
    )
    model = VariationalGPTForCausalLM(config)
    return moved(model).eval()


def moved(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".eve" in name or ".posterior" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def dirichlet():
    return VariationalAttentionConfig("dirichlet", initial_concentration=6.0, prior_concentration=3.0)


def stock(family="llama"):
    torch.manual_seed(0)
    if family == "gpt2":
        shape = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(**shape, n_inner=UNITS, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=UNITS,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
            initializer_range=0.3,
        )
    )


def retrofitted(family="llama", **eve):
    return moved(variationalize(stock(family), eve=EVEConfig(**{"initial_scale": 0.5, **eve}))).eval()


def by_brute_force(model, rows):
    """Mean KL, sigma and mu^2 of each unit in the mean pass: of every sequence alone, from what enters EVE, by the
    closed form in float64. Of models whose units have one latent dimension and a scale that depends on the input.
    """
    seen = {}
    modules = {m.layer_idx: m for m in model.modules() if isinstance(m, EVE) and getattr(m, "is_active", True)}
    handles = [
        eve.register_forward_pre_hook(lambda module, args: seen.setdefault(module.layer_idx, []).append(args[0]))
        for eve in modules.values()
    ]
    with torch.no_grad():
        for tokens in rows:
            model(torch.tensor([tokens]), output_posteriors=True, num_posterior_samples=0)
    for handle in handles:
        handle.remove()
    found = {}
    for layer, eve in modules.items():
        # The last token of a sequence predicts nothing.
        h = torch.cat([one[0, :-1] for one in seen[layer]]).double()
        mean = h * eve.gain.double() if eve.config.mean == "gain" else h
        raw = h @ eve.scale_down.double().T @ eve.scale_up.double().T + eve.log_scale.double()
        sigma = raw.clamp(eve.config.log_scale_min, eve.config.log_scale_max).exp()
        prior = torch.distributions.Normal(torch.zeros(UNITS, dtype=torch.double), 1.0)
        if eve.config.prior == "empirical":
            prior = torch.distributions.Normal(eve.prior_mean.double(), eve.prior_log_scale.double().exp())
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, sigma), prior)
        found[layer] = {"kl": kl.mean(0), "scale": sigma.mean(0), "mean_energy": mean.square().mean(0)}
    return found
