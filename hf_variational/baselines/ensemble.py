"""Deep ensembles: networks trained independently, each of which is one posterior sample.

Lakshminarayanan, Pritzel and Blundell 2017 (*Simple and Scalable Predictive Uncertainty Estimation using Deep
Ensembles*, arXiv 1612.01474), section 2.4: with M networks of weights θ_m,

    p̄(y | x) = (1/M) Σ_m p(y | x, θ_m).

The members run one after another. One cache holds the layers of all of them, so that beams move it whole.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.initialization import no_init_weights
from transformers.utils import can_return_tuple

from ..modeling.configuration_variational_gpt import check_num_posterior_samples
from ..modeling.generation import VariationalGenerationMixin
from ..modeling.heads import check_samples_for
from ..modeling.modeling_variational_gpt import keep_positions
from ..modeling.outputs import VariationalCausalLMOutput
from .samples import join_samples

_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "use_cache")


class EnsembleConfig(PreTrainedConfig):
    """Configuration of an [`EnsembleForCausalLM`].

    Args:
        members: dictionaries of the members' configurations, each with its `model_type`, all with one `vocab_size`.

    Raises:
        ValueError: for no members, encoder-decoders, or members with different vocabularies or sliding windows.
    """

    model_type = "ensemble"
    keys_to_ignore_at_inference = ["past_key_values", "nll", "uncertainty", "sample_logits"]

    members: list[dict] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.members is None:  # transformers makes a bare one to tell what differs from the defaults
            return
        if not self.members:
            raise ValueError("An ensemble has at least one member, got members=[].")
        configs = self.member_configs()
        for name in ("vocab_size", "sliding_window"):
            values = {getattr(config, name, None) for config in configs}
            if len(values) > 1:
                raise ValueError(
                    f"The members of an ensemble have one {name}, got {sorted(values, key=str)}: their distributions, "
                    "or their caches, would not fit together."
                )
        if any(config.is_encoder_decoder for config in configs):
            raise ValueError("The members of an ensemble are decoder-only language models, got an encoder-decoder.")
        self.vocab_size = configs[0].vocab_size
        for name in _SHARED:
            setattr(self, name, getattr(configs[0], name, None))
        # What caches are made by: the layers of all members, one member after another.
        self.member_layers = [config.num_hidden_layers for config in configs]
        self.num_hidden_layers = sum(self.member_layers)
        if any(getattr(config, "layer_types", None) for config in configs):
            self.layer_types = [kind for config in configs for kind in _layer_types(config)]

    def member_configs(self) -> list[PreTrainedConfig]:
        """The members' configurations, made anew."""
        return [AutoConfig.for_model(**member) for member in self.members]


class EnsembleForCausalLM(VariationalGenerationMixin, PreTrainedModel):
    """An ensemble of language models, whose members are its posterior samples.

    `num_posterior_samples` is the number of members if nothing else is said; a smaller S is the first S members, and 0
    the first member alone, as itself. A member that is variational itself takes part with its mean pass. `loss` and
    `nll` are the negative log-likelihood of p̄ per target token, in nats.

    Example:

    ```python
    >>> ensemble = EnsembleForCausalLM.from_members(["twin-0", "twin-1", "twin-2", "twin-3", "twin-4"])
    >>> out = ensemble(**inputs, output_uncertainty=True)
    >>> out.uncertainty.mutual_information  # [batch, length]
    >>> ensemble.save_pretrained("ensemble")  # one folder
    ```
    """

    config: EnsembleConfig
    config_class = EnsembleConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = False

    def __init__(self, config: EnsembleConfig, members: Iterable[PreTrainedModel] | None = None):
        super().__init__(config)
        if members is None:
            kernel = config._attn_implementation
            members = [
                AutoModelForCausalLM.from_config(one, attn_implementation=kernel) for one in config.member_configs()
            ]
        # Children, not a list of modules: transformers asks a model's children alone what they tie and do not split.
        for number, member in enumerate(members):
            self.add_module(f"member_{number}", member)
        self.post_init()

    @classmethod
    def from_members(cls, members: Iterable[str | Path | PreTrainedModel], **options) -> "EnsembleForCausalLM":
        """Builds an ensemble, in eval mode, of checkpoints (loaded here) or of models (taken as they are).

        Args:
            members: folders, names on the Hub, or models.
            options: handed to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ValueError: as [`EnsembleConfig`]; for one model given twice.
        """
        models = [
            member if isinstance(member, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(member, **options)
            for member in members
        ]
        if len({id(model) for model in models}) < len(models):
            raise ValueError("The same model is given twice, as one member: give a copy (copy.deepcopy(model)).")
        config = EnsembleConfig(members=[model.config.to_dict() for model in models])
        config.dtype = models[0].dtype
        with no_init_weights():
            ensemble = cls(config, models)
        ensemble.generation_config = type(models[0].generation_config)(**models[0].generation_config.to_dict())
        ensemble.generation_config.num_posterior_samples = len(models)
        ensemble.generation_config._from_model_config = False
        return ensemble.eval()

    @property
    def members(self) -> list[PreTrainedModel]:
        """The members, `member_0` and so on."""
        return [getattr(self, f"member_{number}") for number in range(len(self.config.member_layers))]

    @property
    def variational_layers(self) -> list[int]:
        """Numbers of the layers in which the samples come apart: those of the deepest member."""
        return list(range(max(self.config.member_layers)))

    def get_input_embeddings(self) -> nn.Module:
        """The first member's."""
        return self.members[0].get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The first member's."""
        return self.members[0].get_output_embeddings()

    def resize_token_embeddings(self, *args, **kwargs):
        """Refused: members are resized one by one."""
        raise ValueError(
            "resize_token_embeddings would resize one member's vocabulary: resize each of `members`, then make the "
            "ensemble anew with EnsembleForCausalLM.from_members(ensemble.members)."
        )

    def resolve_num_samples(self, num_posterior_samples: int | None) -> int:
        """The number of members of this pass; `None`: all."""
        if num_posterior_samples is None:
            return len(self.members)
        return check_at_most(num_posterior_samples, len(self.members), "members")

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_posterior_samples: int | None = None,
        output_uncertainty: bool = False,
        output_sample_logits: bool = False,
        **kwargs,
    ) -> VariationalCausalLMOutput:
        """
        Args:
            labels: [batch, length]; position t is scored on `labels[t + 1]`, -100 is left out.
            num_posterior_samples: S, the members that take part; `None`: all; 0: the first alone.
            output_uncertainty, output_sample_logits: as in [`VariationalGPTForCausalLM`]; they need S >= 1.

        Raises:
            ValueError: for more samples than members; for a cache that other members filled.
        """
        ours = {"output_uncertainty": output_uncertainty, "output_sample_logits": output_sample_logits}
        num_samples = self.resolve_num_samples(num_posterior_samples)
        check_samples_for(num_samples, **ours)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"use_cache": use_cache, "logits_to_keep": logits_to_keep, **kwargs}
        caches = self._caches(past_key_values, max(num_samples, 1))
        logits = [
            _logits(member, {**inputs, "past_key_values": cache})
            for member, cache in zip(self.members, caches, strict=False)
        ]
        states = torch.stack([one.to(logits[0].device) for one in logits], dim=1).flatten(0, 1)
        joined = join_samples(states, None, max(num_samples, 1), {**inputs, "labels": labels}, ours)
        if num_samples == 0:
            joined["logits"] = logits[0]
        return VariationalCausalLMOutput(past_key_values=past_key_values, **joined)

    def _caches(self, cache: Cache | None, members: int) -> list[Cache | None]:
        """A view of the cache for each of the first `members` members, which share its layers."""
        if cache is None:
            return [None] * members
        if cache.offloading:
            raise ValueError(
                "An offloaded cache moves its layers in the order of one model, not of several: use the dynamic or a "
                "static cache."
            )
        while len(cache.layers) < self.config.num_hidden_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        views, start = [], 0
        for count in self.config.member_layers[:members]:
            views.append(Cache(layers=cache.layers[start : start + count]))
            start += count
        lengths = {int(view.get_seq_length()) for view in views}
        if len(lengths) > 1:
            raise ValueError(
                f"past_key_values holds {sorted(lengths)} tokens of different members: go on with as many "
                "num_posterior_samples as it was filled with, or start again with a new cache."
            )
        return views


def check_at_most(num_posterior_samples: int, most: int, what: str) -> int:
    """Returns a number of samples; raises `ValueError` if there are fewer members to take them from."""
    if check_num_posterior_samples(num_posterior_samples) > most:
        raise ValueError(
            f"num_posterior_samples={num_posterior_samples}, but this ensemble has {most} {what}, each of which is "
            f"one sample: ask for at most {most}."
        )
    return int(num_posterior_samples)


def _logits(member: PreTrainedModel, inputs: dict) -> Tensor:
    known = inspect.signature(member.forward).parameters
    given = {name: value for name, value in inputs.items() if name in known and value is not None}
    logits = member(**given, return_dict=True).logits
    return logits if "logits_to_keep" in known else keep_positions(logits, inputs["logits_to_keep"])


def _layer_types(config: PreTrainedConfig) -> list[str]:
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers


AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig)
AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM)
