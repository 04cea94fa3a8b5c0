"""Tiny models, inputs and noise sources that the integration tests share."""

import torch

from hf_variational import EVEConfig, VariationalGPTConfig, VariationalGPTForCausalLM, posterior_noise

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


def tiny_config(**options) -> VariationalGPTConfig:
    return VariationalGPTConfig(**{**SHAPE, "eve": eve_config(), **options})


def tiny_model(seed: int = 0, **options) -> VariationalGPTForCausalLM:
    """A model in eval mode whose EVE parameters have moved away from where they start, so that all of them matter."""
    torch.manual_seed(seed)
    model = VariationalGPTForCausalLM(tiny_config(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".eve." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def endless(model):
    """Generates to `max_new_tokens` whatever tokens come."""
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int = 2, length: int = 6, seed: int = 3) -> torch.Tensor:
    """Token ids without padding and end tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


class RowNoise:
    """Noise of its own for every row, sample, layer and position (one for all positions with `noise="sequence"`).

    Args:
        rows: the rows of the table that the sequences of a batch take; `None`: the first ones, in order.
        seed: of the table.

    Attributes:
        requests: what was asked, in order.
    """

    def __init__(self, rows=None, seed: int = 11):
        self.rows = rows
        self.seed = seed
        self.requests = []

    def _table(self, layer, row, num_samples, width):
        generator = torch.Generator().manual_seed(self.seed + 1000 * layer + row)
        return torch.randn(num_samples, POSITIONS, *width, generator=generator)

    def __call__(self, request):
        self.requests.append(request)
        blocks = []
        for index, row in enumerate(range(request.batch) if self.rows is None else self.rows):
            table = self._table(request.layer, row, request.num_samples, request.shape[2:])
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
