"""A tiny model whose samples differ, and noise that depends on which sequence, sample and position asks for it."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_variational import EVEConfig, NoiseRequest, VariationalGPTConfig, VariationalGPTForCausalLM

VOCAB = 23
END = 1


def made(eve: EVEConfig | None = None, deterministic: bool = False, **options) -> VariationalGPTForCausalLM:
    torch.manual_seed(0)
    eve = eve or EVEConfig(scale="input", scale_rank=2, initial_scale=0.6)
    config = VariationalGPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
        eve=None if deterministic else eve,
        variational_layers=None if deterministic else [1, 2],
        **options,
    )
    model = VariationalGPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale_up"):
                parameter.normal_(0, 2.0)
        model.lm_head.weight.mul_(3)
    return model


def llama() -> LlamaForCausalLM:
    """A stock model, to be made variational."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


def texts(count: int = 12, length: int = 10, seed: int = 1) -> list[list[int]]:
    """Sequences of two lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2, VOCAB, (length - 3 * (index % 2),), generator=generator).tolist() for index in range(count)
    ]


class KeyedNoise:
    """Standard normal noise that is a function of layer, sequence, sample and position, whoever asks and in which
    parts; a request without numbers is of all sequences and samples from 0 on.
    """

    def __init__(self, sequences: int = 16, samples: int = 32, positions: int = 32, units: int = 20):
        generator = torch.Generator().manual_seed(7)
        self.table = torch.randn(3, sequences, samples, positions, units, generator=generator)

    def __call__(self, request: NoiseRequest) -> Tensor:
        sequences = getattr(request, "sequences", None)
        samples = getattr(request, "samples", None)
        sequences = torch.arange(request.batch) if sequences is None else sequences
        samples = torch.arange(request.num_samples) if samples is None else samples
        table = self.table[request.layer][sequences[:, None, None], samples[None, :, None]]
        if request.positions is None:
            return table[:, :, 0, :1].flatten(0, 1)
        picked = self.table[request.layer][
            sequences[:, None, None], samples[None, :, None], request.positions[:, None, :].clamp(min=0)
        ]
        return picked.flatten(0, 1)
