"""Tiny random models of the families whose attention can be made variational, their inputs, targets and noise."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as hf
from torch import Tensor

from hf_variational import NoiseRequest, VariationalAttentionConfig
from hf_variational.retrofit import variationalize

VOCAB, LABELS, LENGTH, LAYERS, HEADS, POSITIONS = 64, 3, 8, 3, 4, 64
KINDS = ["gaussian", "approximate_dirichlet", "dirichlet"]
DEPENDENT = [False, "query", True]

# No dropout, so that train mode and eval mode compute the same; wide, so that samples can be told apart.
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_BERT = {**_TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {
    **{name: _TEXT[name] for name in ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id")},
    **{"n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS, "eos_token_id": None},
    **{"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
}
_DISTILBERT = {
    **{"dim": 32, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 48, "vocab_size": VOCAB},
    **{"max_position_embeddings": POSITIONS, "initializer_range": 0.25, "dropout": 0.0, "attention_dropout": 0.0},
}
_OPT = {
    **{name: value for name, value in _TEXT.items() if name not in ("intermediate_size", "initializer_range")},
    **{"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.25},
}
_VIT = {
    **{name: _TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    **{"image_size": 16, "patch_size": 4, "initializer_range": 0.25},
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_THREE = {"num_labels": LABELS}


@dataclass(frozen=True)
class Family:
    """A stock class, its configuration, and what it is for.

    `task` is the kind of target: `"next"` token, `"masked"` token, `"tokens"`, `"single"` label, `"multi"` label,
    `"regression"`, `"spans"`, or `None`.
    """

    model: type
    config: type
    options: dict = field(repr=False)
    task: str | None = None
    implementations: tuple[str, ...] = ("sdpa", "eager")

    @property
    def is_image(self) -> bool:
        return self.config is hf.ViTConfig

    @property
    def is_decoder(self) -> bool:
        return self.task == "next" or self.config not in (
            hf.BertConfig,
            hf.RobertaConfig,
            hf.DistilBertConfig,
            hf.ViTConfig,
        )


FAMILIES = {
    "bert": Family(hf.BertModel, hf.BertConfig, _BERT),
    "bert-masked": Family(hf.BertForMaskedLM, hf.BertConfig, _BERT, "masked"),
    "bert-single": Family(hf.BertForSequenceClassification, hf.BertConfig, {**_BERT, **_THREE}, "single"),
    "bert-multi": Family(hf.BertForSequenceClassification, hf.BertConfig, {**_BERT, **_THREE}, "multi"),
    "bert-regression": Family(
        hf.BertForSequenceClassification, hf.BertConfig, {**_BERT, "num_labels": 1}, "regression"
    ),
    "bert-tokens": Family(hf.BertForTokenClassification, hf.BertConfig, {**_BERT, **_THREE}, "tokens"),
    "bert-spans": Family(hf.BertForQuestionAnswering, hf.BertConfig, _BERT, "spans"),
    "bert-next": Family(hf.BertLMHeadModel, hf.BertConfig, {**_BERT, "is_decoder": True}, "next"),
    "roberta-masked": Family(hf.RobertaForMaskedLM, hf.RobertaConfig, _BERT, "masked"),
    "distilbert-masked": Family(hf.DistilBertForMaskedLM, hf.DistilBertConfig, _DISTILBERT, "masked"),
    "vit": Family(hf.ViTModel, hf.ViTConfig, _VIT),
    "vit-single": Family(hf.ViTForImageClassification, hf.ViTConfig, {**_VIT, **_THREE}, "single"),
    "gpt2": Family(hf.GPT2Model, hf.GPT2Config, _GPT2),
    "gpt2-next": Family(hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2, "next"),
    "gpt2-single": Family(hf.GPT2ForSequenceClassification, hf.GPT2Config, {**_GPT2, **_THREE}, "single"),
    "qwen3": Family(hf.Qwen3ForCausalLM, hf.Qwen3Config, {**_GROUPED, "head_dim": 8}, "next"),
    "gemma": Family(
        hf.GemmaForCausalLM, hf.GemmaConfig, {**_GROUPED, "num_key_value_heads": 1, "head_dim": 8}, "next"
    ),
    "gemma2": Family(
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config,
        # softcaps that bite
        {**_GROUPED, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
        "next",
        ("eager",),
    ),
    "llama": Family(hf.LlamaForCausalLM, hf.LlamaConfig, _GROUPED, "next"),
    "mistral": Family(hf.MistralForCausalLM, hf.MistralConfig, {**_GROUPED, "sliding_window": 4}, "next"),
    "opt": Family(hf.OPTForCausalLM, hf.OPTConfig, _OPT, "next"),
    "neox": Family(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {**_TEXT, "hidden_dropout": 0.0}, "next"),
    "phi": Family(hf.PhiForCausalLM, hf.PhiConfig, _TEXT, "next"),
}
WITH_TARGETS = [name for name, family in FAMILIES.items() if family.task]
LANGUAGE_MODELS = [name for name, family in FAMILIES.items() if family.task == "next"]
# One of each kind of target.
TASKS = ["bert-masked", "bert-tokens", "bert-single", "bert-multi", "bert-regression", "bert-spans", "vit-single"]
TASKS += ["gpt2-next", "gpt2-single", "llama"]


def stock(name: str, implementation: str | None = None, **options) -> hf.PreTrainedModel:
    """A stock model in eval mode."""
    family = FAMILIES[name]
    torch.manual_seed(7)
    config = family.config(**{**family.options, **options})
    if family.task == "multi":
        config.problem_type = "multi_label_classification"
    return family.model._from_config(config, attn_implementation=implementation or family.implementations[0]).eval()


def attention(kind: str = "dirichlet", data_dependent: bool | str = False, **options) -> VariationalAttentionConfig:
    """Attention that is random enough for its samples to be told apart."""
    settings = {"initial_scale": 0.7, "initial_concentration": 6.0, "prior_concentration": 3.0, "hidden_size": 5}
    return VariationalAttentionConfig(kind=kind, data_dependent=data_dependent, **{**settings, **options})


def retrofitted(
    model: str | hf.PreTrainedModel,
    kind: str = "dirichlet",
    data_dependent: bool | str = False,
    layers="all",
    **options,
) -> hf.PreTrainedModel:
    """A copy of a stock model made variational, whose posteriors have moved away from their start."""
    model = stock(model) if isinstance(model, str) else copy.deepcopy(model)
    options = {"kl_weight": 0.1, "train": "all", **options}
    model = variationalize(model, attention=attention(kind, data_dependent), layers=layers, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in posterior_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def posterior_parameters(model) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if ".posterior." in name}


def inputs(name: str, batch: int = 2, length: int = LENGTH, padding: int = 0, seed: int = 3) -> dict[str, Tensor]:
    """What `forward` takes; the first sequence has `padding` tokens of padding, in front for decoders."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(seed)
    if family.is_image:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        padded = slice(0, padding) if family.is_decoder else slice(length - padding, length)
        ids[0, padded], mask[0, padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def targets(name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Targets of every sequence in `given`; of tokens some have none, and padding has none."""
    task, main = FAMILIES[name].task, next(iter(given.values()))
    batch, generator = main.shape[0], torch.Generator().manual_seed(5)

    def below(limit, *shape):
        return torch.randint(0, limit, shape, generator=generator)

    if task in ("next", "masked", "tokens"):
        labels = main.clone() if task == "next" else below(LABELS, *main.shape)
        if task != "next":
            labels[below(3, *main.shape) == 0] = -100
        return {"labels": labels.masked_fill(given["attention_mask"] == 0, -100)}
    if task == "spans":
        return {"start_positions": below(LENGTH, batch), "end_positions": below(LENGTH, batch)}
    if task == "multi":
        return {"labels": below(2, batch, LABELS).float()}
    if task == "regression":
        return {"labels": torch.randn(batch, generator=generator)}
    return {"labels": below(LABELS, batch)}


class WeightsNoise:
    """Standard normal noise for every (layer, sequence, sample, query position, key position, head, draw).

    Args:
        sequences: the sequences of the table that the rows of a batch take, in order; `None`: the first ones.
        samples: posterior samples of the table.
        only: the samples to answer with; `None`: all.
    """

    def __init__(self, sequences: list[int] | None = None, samples: int = 3, only: list[int] | None = None):
        self.sequences, self.samples, self.only = sequences, samples, only
        self.tables: dict = {}

    def _table(self, layer: int, sequence: int) -> Tensor:
        if (layer, sequence) not in self.tables:
            generator = torch.Generator().manual_seed(1000 * layer + sequence)
            shape = (self.samples, 24, 24, HEADS, 2)
            self.tables[layer, sequence] = torch.randn(shape, generator=generator)
        return self.tables[layer, sequence]

    def __call__(self, request: NoiseRequest) -> Tensor:
        sequences = range(request.batch) if self.sequences is None else self.sequences
        kept = list(range(self.samples)) if self.only is None else self.only
        assert (len(list(sequences)), len(kept)) == (request.batch, request.num_samples)
        rows = []
        for row, sequence in enumerate(sequences):
            # Where a query or a key is padding its position means nothing.
            queries = request.positions[row].cpu().clamp(0, 23)
            keys = request.key_positions[row].cpu().clamp(0, 23)
            picked = self._table(request.layer, sequence)[kept][:, queries[:, None], keys]
            rows.append(picked.permute(0, 3, 1, 2, 4)[..., : request.shape[-1]])
        return torch.cat(rows)


Gradients = dict[str, Tensor]


def gradients(model, loss: Tensor, where: Callable[[str], bool] = lambda name: True) -> Gradients:
    """Gradient of `loss` in every parameter that has one."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if where(name)}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}


def assert_same_gradients(actual: Gradients, expected: Gradients, tolerance: float = 2e-5) -> None:
    """Equal to `tolerance` of the largest entry of each tensor."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        atol = tolerance * wanted.abs().max().item() + 2e-7
        torch.testing.assert_close(
            actual[name], wanted, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
