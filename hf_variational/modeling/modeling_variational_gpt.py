"""VariationalGPT: the Llama architecture with variational feed-forward units."""

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import AttentionPosterior
from .configuration_variational_gpt import VariationalGPTConfig, check_num_posterior_samples
from .eve import EVE
from .generation import VariationalGenerationMixin
from .heads import NonReentrantMixin, VariationalHeadMixin
from .layers_variational_gpt import VariationalGPTDecoderLayer
from .loading import WholeFilesMixin
from .objective import ScoredTokens, attended_positions, following_positions, shift_targets
from .outputs import VariationalCausalLMOutput, VariationalModelOutput
from .posterior import PosteriorTap, UnitWeights, check_unit_weights
from .readout import read_out
from .sample_axis import SampleAxis, prepare_cache, tokens_held
from .saving import CardMixin


class VariationalGPTPreTrainedModel(WholeFilesMixin, NonReentrantMixin, LlamaPreTrainedModel):
    config: VariationalGPTConfig
    config_class = VariationalGPTConfig
    _no_split_modules = ["VariationalGPTDecoderLayer"]
    _keep_in_fp32_modules_strict = [
        *("log_scale", "scale_down", "scale_up", "scale_weight", "prior_log_scale", "prior_coefficient"),
        "posterior",
    ]
    _can_record_outputs = {
        "hidden_states": VariationalGPTDecoderLayer,
        "attentions": LlamaAttention,
        "posteriors": OutputRecorder(PosteriorTap),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (EVE, AttentionPosterior)):
            module.init_weights()
        else:
            super()._init_weights(module)

    @property
    def variational_layers(self) -> list[int]:
        """Numbers of the layers where anything is variational."""
        return self.config.variational_layer_indices()

    @property
    def posterior_sites(self) -> list[tuple[int, str]]:
        """(layer, site) of each posterior, site `"ffn"` or `"attention"`."""
        units = [(layer, "ffn") for layer in self.config.eve_layer_indices()]
        return units + [(layer, "attention") for layer in self.config.attention_layer_indices()]


class VariationalGPTModel(VariationalGPTPreTrainedModel, LlamaModel):
    """The decoder without a head.

    With S posterior samples `last_hidden_state`, and all hidden states and attentions above the split, have batch * S
    rows: row `b * S + s` is sample `s` of sequence `b`.
    """

    def __init__(self, config: VariationalGPTConfig):
        # Not LlamaModel's: it would build and initialise every layer that is replaced here.
        VariationalGPTPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [VariationalGPTDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_posterior_samples: int | None = None,
        output_posteriors: bool = False,
        output_statistics: bool | None = None,
        token_weights: Tensor | None = None,
        unit_weights: dict[int, UnitWeights] | None = None,
        **kwargs,
    ) -> VariationalModelOutput:
        """
        Args:
            num_posterior_samples: S; 0 is the mean pass; `None`: 0 in eval mode, the config's in train mode.
            output_posteriors: returns the tape.
            output_statistics: whether the tape has per-unit statistics; `None`: yes, if there is a tape.
            token_weights: [batch, length], 1 at the positions that the statistics average; `None`: the attended ones.
            unit_weights: layer number to [`UnitWeights`]: what its units are charged, each by itself.

        Raises:
            ValueError: for a number of samples that is not a whole number of at least 0, or samples without
                variational layers, or a cache that was filled with another number of samples, or weights for units
                that are not there.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        num_samples = self.resolve_num_samples(num_posterior_samples)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given_position_ids = position_ids
        seen = tokens_held(past_key_values)
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # Only a caller's can pack several sequences in a row, and looking for that waits for the device.
            position_ids=given_position_ids,
        )
        check_unit_weights(unit_weights, self.config.eve_layer_indices())
        split = self.variational_layers[0] if self.variational_layers else self.config.num_hidden_layers
        if past_key_values is not None and self.variational_layers:
            prepare_cache(past_key_values, self.config.num_hidden_layers, split, num_samples)
        record = output_posteriors and bool(self.variational_layers)
        if (
            record
            and self.config.eve is not None
            and self.config.eve.prior == "autoregressive"
            and past_key_values is not None
        ):
            _refuse_continuation(past_key_values)
        attended = attended_positions(attention_mask, inputs_embeds) if record else None
        axis = SampleAxis(
            num_samples,
            inputs_embeds.shape[0],
            position_ids,
            record=record,
            statistics=record and output_statistics is not False,
            token_weights=attended if token_weights is None else token_weights,
            follows=following_positions(attended, position_ids) if record else None,
            cache=past_key_values if num_samples else None,
            seen=seen,
            unit_weights=unit_weights,
        )
        per_row = {
            "attention_mask": causal_mask,
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids=position_ids),
        }
        hidden_states = inputs_embeds
        for layer_idx, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = layer(
                hidden_states,
                sample_axis=axis,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **per_row,
                **kwargs,
            )
            if layer_idx == split and num_samples > 1:
                _refuse_packed_kernels(kwargs)
                per_row = {name: _expand(value, axis) for name, value in per_row.items()}
        return VariationalModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
        )

    def resolve_num_samples(self, num_posterior_samples: int | None) -> int:
        """The number of samples of this pass: as asked, or the default of the mode the model is in."""
        if num_posterior_samples is None:
            default = self.config.num_posterior_samples if self.training else 0
            return default if self.variational_layers else 0
        check_num_posterior_samples(num_posterior_samples)
        if num_posterior_samples and not self.variational_layers:
            raise ValueError(
                f"num_posterior_samples={num_posterior_samples}, but this model has no variational layer (eve=None, "
                "attention=None): use num_posterior_samples=0, or a config with an EVEConfig or a "
                "VariationalAttentionConfig."
            )
        return num_posterior_samples


class VariationalGPTForCausalLM(
    CardMixin, VariationalHeadMixin, VariationalGPTPreTrainedModel, VariationalGenerationMixin, LlamaForCausalLM
):
    """VariationalGPT with a language modelling head; its loss is the negative evidence lower bound per target token.

    Example:

    ```python
    >>> import hf_variational
    >>> from transformers import AutoModelForCausalLM

    >>> model = AutoModelForCausalLM.from_pretrained("my-variational-gpt")
    >>> out = model(input_ids, num_posterior_samples=8, output_uncertainty=True)
    >>> out.uncertainty.mutual_information  # [batch, length]
    ```
    """

    def __init__(self, config: VariationalGPTConfig):
        VariationalGPTPreTrainedModel.__init__(self, config)
        self.model = VariationalGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_posterior_samples: int | None = None,
        output_uncertainty: bool = False,
        output_posteriors: bool | None = None,
        output_sample_logits: bool = False,
        kl_weight: Tensor | float | None = None,
        free_bits: float = 0.0,
        **kwargs,
    ) -> VariationalCausalLMOutput:
        """
        Args:
            labels: [batch, length]; position t is scored on `labels[t + 1]`, -100 is left out.
            logits_to_keep: as in transformers: the positions whose logits (and measures) are computed.
            num_posterior_samples: S; 0 is the mean pass; `None`: 0 in eval mode, the config's in train mode.
            output_uncertainty: returns `uncertainty`; needs S >= 1.
            output_posteriors: returns `posteriors`.
            output_sample_logits: returns `sample_logits`; needs S >= 1.
            kl_weight: beta of this pass, a number or a 0-dim tensor (which a schedule may move without recompiling);
                `None`: the config's.
            free_bits: nats of KL per unit that cost nothing: a layer is charged at each token for at least
                `free_bits * units`.
            num_items_in_batch (in `kwargs`): target tokens of the whole accumulated batch, the loss's divisor.
            unit_weights (in `kwargs`): layer number to [`UnitWeights`]: what its units are charged, each by itself.

        Raises:
            ValueError: if uncertainty is asked of a mean pass, or see `VariationalGPTModel`.
            RuntimeError: if fewer posteriors are recorded than there are variational layers.
        """
        asked = {"output_uncertainty": output_uncertainty, "output_sample_logits": output_sample_logits}
        num_samples = self._resolve_num_samples(num_posterior_samples, **asked)
        scored = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError(f"labels score every position: leave out logits_to_keep, got {logits_to_keep!r}.")
            scored = ScoredTokens.of(labels, attention_mask, **kwargs)
        outputs, fields = self._run_decoder(
            num_samples,
            scored,
            output_posteriors,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = keep_positions(outputs.last_hidden_state, logits_to_keep)
        if num_samples == 0:
            fields |= self._read_mean_pass(hidden_states, scored)
        else:
            tokens = labels if input_ids is None else input_ids
            observed = None
            if output_uncertainty and tokens is not None:
                observed = keep_positions(shift_targets(tokens), logits_to_keep)
            fields |= self._read_samples(hidden_states, num_samples, scored, observed=observed, **asked)
        if scored is not None:
            fields |= self._loss(fields["nll"], outputs.posteriors, scored, kl_weight, free_bits)
        return VariationalCausalLMOutput(**fields)

    def _read_mean_pass(self, hidden_states: Tensor, scored: ScoredTokens | None) -> dict:
        logits = self.lm_head(hidden_states)
        if scored is None:
            return {"logits": logits}
        nll = self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=scored.targets,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=scored.num_items,
        )
        return {"logits": logits, "nll": nll}

    def _read_samples(self, hidden_states: Tensor, num_samples: int, scored: ScoredTokens | None, **options) -> dict:
        joined = read_out(
            hidden_states,
            self.lm_head,
            num_samples,
            self.config.vocab_size,
            self.config.objective,
            targets=None if scored is None else scored.targets,
            **options,
        )
        return {
            "logits": joined.logits,
            "nll": None if scored is None else joined.nll_sum / scored.num_items,
            "uncertainty": joined.uncertainty,
            "sample_logits": joined.sample_logits,
        }


def keep_positions(tensor: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The last `logits_to_keep` positions (0: all), or those that a 1-D tensor numbers, of [rows, length, ...]."""
    return tensor[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


def _expand(value, axis: SampleAxis):
    """Brings a per-row tensor, or a tuple of them, above the split; what all rows share stays as it is."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_expand(item, axis) for item in value)
    if not torch.is_tensor(value):
        raise ValueError(
            f"Posterior samples cannot expand an attention mask of type {type(value).__name__}: use "
            "attn_implementation='sdpa' or 'eager', or num_posterior_samples=0."
        )
    return value if value.shape[0] == 1 else axis.expand(value)


def _refuse_continuation(cache: Cache) -> None:
    seen = int(cache.get_seq_length())
    # The cache itself holds keys and values alone, not the posterior means that the prior goes on from.
    if seen > 0:
        raise ValueError(
            f"The autoregressive prior of a position needs the posterior mean before it, and past_key_values starts "
            f"at position {seen}: ask for labels or output_posteriors of the whole sequence, without a filled cache."
        )


def _refuse_packed_kernels(kwargs: dict) -> None:
    for name in ("cu_seq_lens_q", "cu_seqlens_q"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} lists the sequences of one row for a kernel, and posterior samples make more rows: use "
                "num_posterior_samples of 0 or 1, or pack with position_ids."
            )


__all__ = ["VariationalGPTForCausalLM", "VariationalGPTModel", "VariationalGPTPreTrainedModel"]
