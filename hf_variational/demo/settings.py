"""How large the demo's models are and how long they train."""

from __future__ import annotations

from dataclasses import dataclass

from ..modeling import EVEConfig, VariationalGPTConfig

__all__ = ["QUICK", "DemoSettings"]


@dataclass(frozen=True)
class DemoSettings:
    """The size of both models and how long they train; `eve` is the only difference between them."""

    vocab_size: int = 1024
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    intermediate_size: int = 336
    block_size: int = 128
    batch_size: int = 8
    steps: int = 1600
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_share: float = 0.1
    posterior_samples: int = 8
    new_tokens: int = 80
    temperature: float = 0.8
    characters: int | None = None
    initializer_range: float = 0.02
    # Noise that starts small beside the activations and grows as the KL's weight rises over the whole training: a
    # scale that is large from the start drowns units that have learned nothing yet.
    # In layers this narrow rank 8 would be 2.7 % of the parameters; rank 4 keeps the models matched within 2 %.
    scale_rank: int = 4
    initial_scale: float = 0.01
    prior_scale: float = 0.05
    kl_weight: float = 1e-3

    @property
    def tokens(self) -> int:
        """Tokens each model sees in training."""
        return self.steps * self.batch_size * self.block_size

    @property
    def eve(self) -> EVEConfig:
        """What the EVE model has and its twin has not."""
        return EVEConfig(
            scale="input",
            scale_rank=self.scale_rank,
            prior="empirical",
            initial_scale=self.initial_scale,
            prior_scale=self.prior_scale,
        )

    def config(self, tokenizer, eve: EVEConfig | None) -> VariationalGPTConfig:
        return VariationalGPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            # Room to generate beyond a block; the positions are rotary, so it adds no parameters.
            max_position_embeddings=4 * self.block_size,
            tie_word_embeddings=True,
            initializer_range=self.initializer_range,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eve=eve,
            kl_weight=self.kl_weight,
        )


QUICK = DemoSettings(
    vocab_size=384,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    block_size=32,
    batch_size=4,
    steps=6,
    posterior_samples=2,
    new_tokens=12,
    characters=20_000,
)
