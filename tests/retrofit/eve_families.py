"""Tiny random models of every family whose feed-forward units can be made variational, their inputs and targets."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers as hf
from families import FAMILIES as WITH_INTERFACE
from families import HEADS, LABELS, LAYERS, LENGTH, VOCAB
from torch import Tensor, nn

from hf_variational import EVEConfig, variationalize

UNITS = 48

_GROUPED = WITH_INTERFACE["llama"].options
_PLAIN = {name: value for name, value in _GROUPED.items() if name != "num_key_value_heads"}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_GPT2 = {**WITH_INTERFACE["gpt2"].options, "n_inner": UNITS}
_BERT = WITH_INTERFACE["bert"].options
_DISTILBERT = WITH_INTERFACE["distilbert-masked"].options
_OPT = WITH_INTERFACE["opt"].options
_VIT = WITH_INTERFACE["vit"].options
_SHORT = {name: _PLAIN[name] for name in ("hidden_size", "vocab_size", "initializer_range", "pad_token_id")}
_NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
_FALCON = {
    **_SHORT,
    **_NO_ENDS,
    **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_hidden_size": UNITS},
    **{"hidden_dropout": 0.0, "attention_dropout": 0.0},
}
_BLOOM = {**_SHORT, **_NO_ENDS, "n_layer": LAYERS, "n_head": HEADS, "hidden_dropout": 0.0, "attention_dropout": 0.0}
_T5 = {
    **{"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": UNITS, "num_layers": LAYERS, "num_heads": HEADS},
    **{"num_decoder_layers": LAYERS, "relative_attention_num_buckets": 8, "dropout_rate": 0.0, "pad_token_id": 0},
    # Its initialisation has a factor where others have a standard deviation.
    **{"eos_token_id": None, "decoder_start_token_id": 1, "initializer_factor": 1.0},
}
_THREE = {"num_labels": LABELS}
_LLAMA_LIKE = "model.layers.{}.mlp.down_proj"
_BERT_LIKE = ".encoder.layer.{}.output.dense"


@dataclass(frozen=True)
class Tiny:
    """A stock class, its configuration, where its W_out are, and what it is for.

    `task` is the kind of target: `"next"` token, `"masked"` token, `"tokens"`, `"single"` label, `"translation"`, or
    `None`. `projections` are patterns of module names, a tower each; `units` is the width of what enters them.
    """

    model: type
    config: type
    options: dict
    task: str | None
    projections: tuple[str, ...]
    units: int = UNITS

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def is_decoder(self) -> bool:
        return self.task == "next" or self.config in (hf.GPT2Config, hf.LlamaConfig)

    @property
    def takes_positions(self) -> bool:
        """Whether what a position is can be told: where padding stands in front, it must be."""
        return self.is_decoder and self.config is not hf.BloomConfig

    @property
    def depth(self) -> int:
        return LAYERS * len(self.projections)

    def projection(self, layer: int) -> str:
        """Name of the W_out of a layer, counted over the towers."""
        return self.projections[layer // LAYERS].format(layer % LAYERS)

    def layer(self, layer: int) -> str:
        """Name of a layer, counted over the towers."""
        pattern = self.projections[layer // LAYERS]
        return pattern[: pattern.index("{}") + 2].format(layer % LAYERS)

    def eve(self, layer: int) -> str:
        """Name of the neurons beside it."""
        return self.projection(layer).rpartition(".")[0] + ".eve"


def _next(model: type, config: type, options: dict, projection: str = _LLAMA_LIKE, **more) -> Tiny:
    return Tiny(model, config, options, "next", (projection,), **more)


def _encoder(prefix: str, classes: list[type], config: type, options: dict, projection: str) -> dict[str, Tiny]:
    tasks = {"masked": options, "single": {**options, **_THREE}, "tokens": {**options, **_THREE}}
    return {
        f"{prefix}-{task}": Tiny(model, config, settings, task, (f"{prefix}{projection}",))
        for model, (task, settings) in zip(classes, tasks.items(), strict=True)
    }


TINY = {
    "gpt2": _next(hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2, "transformer.h.{}.mlp.c_proj"),
    "gpt_neox": _next(
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig,
        WITH_INTERFACE["neox"].options,
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    ),
    "gptj": _next(hf.GPTJForCausalLM, hf.GPTJConfig, {**_GPT2, "rotary_dim": 4}, "transformer.h.{}.mlp.fc_out"),
    "opt": _next(hf.OPTForCausalLM, hf.OPTConfig, _OPT, "model.decoder.layers.{}.fc2"),
    "phi": _next(hf.PhiForCausalLM, hf.PhiConfig, _PLAIN, "model.layers.{}.mlp.fc2"),
    "phi3": _next(hf.Phi3ForCausalLM, hf.Phi3Config, {**_GROUPED, "original_max_position_embeddings": 64}),
    "bloom": _next(hf.BloomForCausalLM, hf.BloomConfig, _BLOOM, "transformer.h.{}.mlp.dense_4h_to_h", units=4 * 32),
    "falcon": _next(hf.FalconForCausalLM, hf.FalconConfig, _FALCON, "transformer.h.{}.mlp.dense_4h_to_h"),
    "falcon-alibi": _next(
        hf.FalconForCausalLM,
        hf.FalconConfig,
        {**_FALCON, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    "llama": _next(hf.LlamaForCausalLM, hf.LlamaConfig, _GROUPED),
    "mistral": _next(hf.MistralForCausalLM, hf.MistralConfig, {**_GROUPED, "sliding_window": 4}),
    "mixtral": _next(
        hf.MixtralForCausalLM,
        hf.MixtralConfig,
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "model.layers.{}.mlp.experts.down_proj",
    ),
    "qwen2": _next(hf.Qwen2ForCausalLM, hf.Qwen2Config, _GROUPED),
    "qwen3": _next(hf.Qwen3ForCausalLM, hf.Qwen3Config, _HEAD_DIM),
    "gemma": _next(hf.GemmaForCausalLM, hf.GemmaConfig, {**_HEAD_DIM, "num_key_value_heads": 1}),
    "gemma2": _next(
        hf.Gemma2ForCausalLM, hf.Gemma2Config, {**_HEAD_DIM, "sliding_window": 4, "query_pre_attn_scalar": 8}
    ),
    "gemma3_text": _next(
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        {**_HEAD_DIM, "sliding_window": 4, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    ),
    "olmo2": _next(hf.Olmo2ForCausalLM, hf.Olmo2Config, _GROUPED),
    "smollm3": _next(hf.SmolLM3ForCausalLM, hf.SmolLM3Config, _GROUPED),
    "starcoder2": _next(
        hf.Starcoder2ForCausalLM,
        hf.Starcoder2Config,
        {**_GROUPED, "residual_dropout": 0.0, "embedding_dropout": 0.0},
        "model.layers.{}.mlp.c_proj",
    ),
    "cohere2": _next(hf.Cohere2ForCausalLM, hf.Cohere2Config, {**_GROUPED, "sliding_window": 4, "logit_scale": 1.0}),
    "bert-next": _next(
        hf.BertLMHeadModel, hf.BertConfig, {**_BERT, "is_decoder": True}, "bert.encoder.layer.{}.output.dense"
    ),
    "gpt2-single": Tiny(
        hf.GPT2ForSequenceClassification,
        hf.GPT2Config,
        {**_GPT2, **_THREE},
        "single",
        ("transformer.h.{}.mlp.c_proj",),
    ),
    "llama-single": Tiny(
        hf.LlamaForSequenceClassification, hf.LlamaConfig, {**_GROUPED, **_THREE}, "single", (_LLAMA_LIKE,)
    ),
    **_encoder(
        "bert",
        [hf.BertForMaskedLM, hf.BertForSequenceClassification, hf.BertForTokenClassification],
        hf.BertConfig,
        _BERT,
        _BERT_LIKE,
    ),
    **_encoder(
        "roberta",
        [hf.RobertaForMaskedLM, hf.RobertaForSequenceClassification, hf.RobertaForTokenClassification],
        hf.RobertaConfig,
        _BERT,
        _BERT_LIKE,
    ),
    **_encoder(
        "distilbert",
        [hf.DistilBertForMaskedLM, hf.DistilBertForSequenceClassification, hf.DistilBertForTokenClassification],
        hf.DistilBertConfig,
        {**_DISTILBERT, "seq_classif_dropout": 0.0},
        ".transformer.layer.{}.ffn.lin2",
    ),
    "vit": Tiny(hf.ViTForImageClassification, hf.ViTConfig, {**_VIT, **_THREE}, "single", ("vit.layers.{}.mlp.fc2",)),
    "t5": Tiny(
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        _T5,
        "translation",
        ("encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"),
    ),
    "t5-gated": Tiny(
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "translation",
        ("encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"),
    ),
    "t5-encoder": Tiny(hf.T5EncoderModel, hf.T5Config, _T5, None, ("encoder.block.{}.layer.1.DenseReluDense.wo",)),
}
EVERY = list(TINY)
# Without the variants of a family and the heads that differ in nothing but their name.
CAUSAL = [name for name, tiny in TINY.items() if tiny.task == "next"]
GENERATING = [*CAUSAL, "t5", "t5-gated"]
WITH_TARGETS = [name for name, tiny in TINY.items() if tiny.task]
# One of each shape of model, for what does not depend on more.
FEW = ["gpt2", "llama", "opt", "bloom", "mixtral", "t5", "bert-masked", "bert-single", "vit"]


def stock(name: str, **options) -> hf.PreTrainedModel:
    """A stock model in eval mode."""
    tiny = TINY[name]
    torch.manual_seed(7)
    model = tiny.model(tiny.config(**{**tiny.options, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start at constants, which would hide a wrong one.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def centered(**options) -> EVEConfig:
    """The contract's neurons; a scale large enough for samples to be told apart."""
    return EVEConfig(**{"scale": "input", "scale_rank": 4, "prior": "centered", "initial_scale": 0.4, **options})


def retrofitted(
    model: str | hf.PreTrainedModel, layers="all", eve: EVEConfig | None = None, moved: bool = True, **options
) -> hf.PreTrainedModel:
    """A copy of a stock model made variational, whose posteriors have moved away from their start."""
    model = stock(model) if isinstance(model, str) else copy.deepcopy(model)
    options = {"kl_weight": 0.1, "train": "all", **options}
    torch.manual_seed(11)
    model = variationalize(model, eve=centered() if eve is None else eve, layers=layers, **options)
    return move(model) if moved else model


@torch.no_grad()
def move(model: hf.PreTrainedModel, by: float = 0.2) -> hf.PreTrainedModel:
    """Moves the posterior (and the prior) off its start."""
    generator = torch.Generator().manual_seed(1)
    for tensor in added(model).values():
        tensor.add_(by * torch.randn(tensor.shape, generator=generator).to(tensor))
    return model


def is_added(name: str) -> bool:
    return ".eve." in name or ".posterior." in name


def added(model: hf.PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and buffers that a stock model does not have."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if is_added(name)}


def added_parameters(model: hf.PreTrainedModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if is_added(name)}


def given(
    name: str, batch: int = 2, length: int = LENGTH, padding: int = 0, seed: int = 3, positions: bool = True
) -> dict[str, Tensor]:
    """What `forward` takes; the first sequence has `padding` tokens of padding, in front for decoders.

    Position ids are among it where padding is in front and the model takes them.
    """
    tiny, generator = TINY[name], torch.Generator().manual_seed(seed)
    if tiny.config is hf.ViTConfig:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        padded = slice(0, padding) if tiny.is_decoder else slice(length - padding, length)
        ids[0, padded], mask[0, padded] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    if tiny.task == "translation":
        target = torch.randint(3, VOCAB, (batch, length - 2), generator=generator)
        found["decoder_input_ids"] = torch.cat([torch.ones_like(target[:, :1]), target[:, :-1]], 1)
    if positions and tiny.takes_positions:
        found["position_ids"] = positions_of(mask)
    return found


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def targets(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Targets of every sequence in `inputs`; of tokens some have none, and padding has none."""
    task, main = TINY[name].task, next(iter(inputs.values()))
    generator = torch.Generator().manual_seed(5)

    def below(limit, *shape):
        return torch.randint(0, limit, shape, generator=generator)

    if task == "single":
        return {"labels": below(LABELS, main.shape[0])}
    if task == "translation":
        start = inputs["decoder_input_ids"]
        labels = torch.cat([start[:, 1:], below(VOCAB, len(start), 1)], 1)
        labels[0, -2:] = -100
        return {"labels": labels}
    labels = main.clone() if task == "next" else below(VOCAB if task == "masked" else LABELS, *main.shape)
    # Shifted or not, a token without a target is found at the positions 3 and 4 of the last sequence.
    labels[-1, 3:5] = -100
    if task == "masked":
        labels[below(3, *main.shape) == 0] = -100
    return {"labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


def answer(outputs) -> Tensor:
    """The logits, or of a model without a head the last hidden state."""
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def attended(name: str, inputs: dict[str, Tensor]) -> Tensor | slice:
    """Where an answer means something: [batch, length], or everywhere."""
    tiny = TINY[name]
    per_token = tiny.task in ("next", "masked", "tokens", None)
    return inputs["attention_mask"].bool() if per_token else slice(None)


def rows_of(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in inputs.items()}


def each_layer(model: hf.PreTrainedModel, name: str) -> Iterator[tuple[int, nn.Module]]:
    for layer in range(TINY[name].depth):
        yield layer, model.get_submodule(TINY[name].layer(layer))


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 5e-5) -> None:
    """Equal to `tolerance` of the largest entry of each tensor, but for the noise of a gradient that is 0 by nature,
    as that of the bias of attention's keys.
    """
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        atol = tolerance * wanted.abs().max().item() + 2e-6
        torch.testing.assert_close(
            actual[name], wanted, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
