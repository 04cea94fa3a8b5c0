"""The layers of VariationalGPT: Llama's, with variational feed-forward units and variational attention."""

from functools import partial

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .attention import AttentionPosterior, mean_weights
from .configuration_variational_gpt import VariationalGPTConfig
from .eve import EVE
from .sample_axis import SampleAxis


class VariationalGPTMLP(LlamaMLP):
    """A Llama feed-forward layer whose units are EVE neurons: W_out z instead of W_out h."""

    def __init__(self, config: VariationalGPTConfig, layer_idx: int):
        super().__init__(config)
        self.eve = EVE(config.eve, config.intermediate_size, layer_idx)

    def forward(self, x: Tensor, sample_axis: SampleAxis) -> Tensor:
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.eve(h, sample_axis))


class VariationalGPTAttention(LlamaAttention):
    """Llama attention of a model with variational attention: in the layers that have a posterior the weights are
    random variables. The mean pass runs the model's attention implementation.
    """

    def __init__(self, config: VariationalGPTConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.posterior = None
        if layer_idx in config.attention_layer_indices():
            self.posterior = AttentionPosterior(
                config.attention, config.num_attention_heads, self.head_dim, layer_idx, config.max_position_embeddings
            )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        sample_axis: SampleAxis,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As in transformers; with S samples a layer with a posterior answers with batch * S rows, while keys and
        values stay one row a sequence where the rows split here.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        options = {"scaling": self.scaling, "dropout": self.attention_dropout if self.training else 0.0}
        implementation = self.config._attn_implementation
        output = weights = None
        if self.posterior is not None and (sample_axis.num_samples or sample_axis.record):
            _refuse_kernel(implementation)
            output, weights = self.posterior(query, key, value, attention_mask, sample_axis, **options)
        if output is None:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            output, weights = attend(self, query, key, value, attention_mask, **options, **kwargs)
        if weights is None and output_attentions:
            weights = mean_weights(query, key, attention_mask, scaling=self.scaling)
        return self.o_proj(output.flatten(-2)), weights


class VariationalGPTDecoderLayer(LlamaDecoderLayer):
    """A Llama decoder layer; in the first variational one the rows split, in its attention or after it."""

    def __init__(self, config: VariationalGPTConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.has_variational_units = layer_idx in config.eve_layer_indices()
        self.has_variational_attention = layer_idx in config.attention_layer_indices()
        if self.has_variational_units:
            self.mlp = VariationalGPTMLP(config, layer_idx)
        if config.attention is not None:
            self.self_attn = VariationalGPTAttention(config, layer_idx)

    def forward(self, hidden_states: Tensor, sample_axis: SampleAxis | None = None, **kwargs) -> Tensor:
        attention = self.self_attn
        if isinstance(attention, VariationalGPTAttention):
            attention = partial(attention, sample_axis=sample_axis)
        attended, _ = attention(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if self.has_variational_attention:
            hidden_states = sample_axis.expand(hidden_states)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if not self.has_variational_units:
            return hidden_states + self.mlp(normed)
        update = self.mlp(normed, sample_axis)
        return sample_axis.expand(hidden_states) + update


def _refuse_kernel(attn_implementation: str) -> None:
    if attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation={attn_implementation!r} never has the attention weights in its hands, so their "
            "posterior cannot be sampled or its KL computed: load the model with attn_implementation='sdpa', or run "
            "the mean pass (num_posterior_samples=0, without labels and output_posteriors)."
        )
