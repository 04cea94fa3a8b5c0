"""Tiny models, inputs and noise sources that the integration tests share."""

import torch

from hf_variational import (
    EVEConfig,
    VariationalAttentionConfig,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
    posterior_noise,
)

VOCABULARY = 61
PAD, BOS, EOS = 0, 1, 2
POSITIONS = 64

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    # wide, so that predictive distributions differ from token to token and from sample to sample
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def eve_config(**options) -> EVEConfig:
    if options.get("scale", "input") == "input":
        options = {"scale_rank": 2, **options}
    return EVEConfig(**{"initial_scale": 0.5, **options})


def attention_config(kind: str = "dirichlet", data_dependent: bool | str = False, **options):
    """Attention that is random enough for its samples to be told apart."""
    settings = {"initial_scale": 0.7, "initial_concentration": 6.0, "prior_concentration": 3.0, "hidden_size": 5}
    return VariationalAttentionConfig(kind=kind, data_dependent=data_dependent, **{**settings, **options})


def tiny_config(**options) -> VariationalGPTConfig:
    return VariationalGPTConfig(**{**SHAPE, "eve": eve_config(), **options})


def tiny_model(seed: int = 0, **options) -> VariationalGPTForCausalLM:
    """A model in eval mode whose variational parameters have moved away from their start, so that all matter."""
    torch.manual_seed(seed)
    model = VariationalGPTForCausalLM(tiny_config(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".eve." in name or ".posterior." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def twin_of(model) -> VariationalGPTForCausalLM:
    """The deterministic twin with the model's weights, and its attention implementation."""
    config = VariationalGPTConfig(**{**model.config.to_dict(), "eve": None, "attention": None})
    config._attn_implementation = model.config._attn_implementation
    twin = VariationalGPTForCausalLM(config).eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(".eve." in name or ".posterior." in name for name in unexpected)
    return twin


def endless(model):
    """Generates to `max_new_tokens` whatever tokens come."""
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int = 2, length: int = 6, seed: int = 3) -> torch.Tensor:
    """Token ids without padding and end tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


class RowNoise:
    """Noise of its own for every row, sample, layer and position (one for all positions with `noise="sequence"`), of
    attention weights for every head and key position too.

    Args:
        rows: the rows of the table that the sequences of a batch take; `None`: the first ones, in order.
        seed: of the table.
        sample, of: the one posterior sample to answer with, of how many; `None`: all those that are asked for.

    Attributes:
        requests: what was asked, in order.
    """

    def __init__(self, rows=None, seed: int = 11, sample: int | None = None, of: int | None = None):
        self.rows = rows
        self.seed = seed
        self.sample = sample
        self.of = of
        self.requests = []
        self.tables = {}

    def _table(self, layer, row, num_samples, width):
        generator = torch.Generator().manual_seed(self.seed + 1000 * layer + row)
        return torch.randn(num_samples, POSITIONS, *width, generator=generator)

    def _weights_table(self, layer, row, num_samples, heads):
        """[samples, query positions, key positions, heads, 2]"""
        name = (layer, row, num_samples, heads)
        if name not in self.tables:
            generator = torch.Generator().manual_seed(self.seed + 1000 * layer + row + 500_000)
            shape = (num_samples, POSITIONS, POSITIONS, heads, 2)
            self.tables[name] = torch.randn(shape, generator=generator)
        return self.tables[name]

    def __call__(self, request):
        self.requests.append(request)
        samples = request.num_samples if self.of is None else self.of
        kept = slice(None) if self.sample is None else slice(self.sample, self.sample + 1)
        blocks = []
        for index, row in enumerate(range(request.batch) if self.rows is None else self.rows):
            if request.site == "attention":
                _, heads, _, _, draws = request.shape
                table = self._weights_table(request.layer, row, samples, heads)[kept]
                # where a key is masked its position means nothing
                keys = request.key_positions[index].clamp(0, POSITIONS - 1)
                picked = table[:, request.positions[index][:, None], keys]
                blocks.append(picked.permute(0, 3, 1, 2, 4)[..., :draws])
            else:
                table = self._table(request.layer, row, samples, request.shape[2:])[kept]
                blocks.append(table[:, :1] if request.positions is None else table[:, request.positions[index]])
        return torch.cat(blocks).reshape(request.shape)


def measures_of_sequences(model, sequences, new_tokens, noise, **inputs):
    """The measures of the last `new_tokens` tokens of `sequences`, from one full forward pass under `noise`."""
    with torch.no_grad(), posterior_noise(noise):
        out = model(sequences, output_uncertainty=True, use_cache=False, **inputs)
    first = sequences.shape[1] - new_tokens - 1
    return out.uncertainty.map(lambda measure: measure[:, first:-1])


def assert_same_measures(actual, expected, where=None):
    """All six measures agree and none is NaN; `where` [rows, new tokens] restricts the comparison."""
    assert set(actual) == set(expected)
    assert len(actual) == 6
    for name in expected:
        mask = torch.ones_like(expected[name], dtype=torch.bool) if where is None else where
        torch.testing.assert_close(
            actual[name][mask],
            expected[name][mask],
            atol=2e-6,
            rtol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def stock_llama(seed: int = 0, **options):
    """A stock model of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **options})).eval()
