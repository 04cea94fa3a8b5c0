"""The models that the benchmarks compare: one size, variational or not."""

from dataclasses import dataclass

import torch

from hf_variational import EVEConfig, VariationalGPTConfig, VariationalGPTForCausalLM


@dataclass(frozen=True)
class Size:
    """The shape of every model of a benchmark."""

    hidden_size: int = 384
    intermediate_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    vocab_size: int = 8192

    def config(self, eve: EVEConfig | None, layers: list[int] | None = None) -> VariationalGPTConfig:
        return VariationalGPTConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            vocab_size=self.vocab_size,
            bos_token_id=None,
            eos_token_id=None,
            eve=eve,
            variational_layers=layers,
        )

    def describe(self) -> str:
        return (
            f"{self.num_hidden_layers} layers of width {self.hidden_size} ({self.num_attention_heads} heads, "
            f"feed-forward {self.intermediate_size}), vocabulary {self.vocab_size:,}"
        )


TINY = Size(hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2, vocab_size=128)


def build(size: Size, eve: EVEConfig | None, layers: list[int] | None = None, seed: int = 0):
    """A freshly initialised model; `eve=None` is the deterministic twin."""
    torch.manual_seed(seed)
    return VariationalGPTForCausalLM(size.config(eve, layers))


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
