"""What every baseline shares: posterior samples are rows of the batch, from the input to the logits.

A method only says what makes the rows of one sequence differ. Row `b * S + s` is sample `s` of sequence `b`, as in the
variational models, so that `forward`, `generate` and evaluation are the same for all.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..modeling.configuration_variational_gpt import check_num_posterior_samples
from ..modeling.generation import VariationalGenerationMixin
from ..modeling.heads import check_samples_for
from ..modeling.modeling_variational_gpt import keep_positions
from ..modeling.objective import ScoredTokens, shift_targets
from ..modeling.readout import read_out
from ..modeling.sample_axis import prepare_cache, repeat_rows
from ..retrofit.outputs import output_class

# What `forward` takes beside the stock arguments.
ARGUMENTS = {"num_posterior_samples": None, "output_uncertainty": False, "output_sample_logits": False}
TARGETS = ("labels", "shift_labels", "num_items_in_batch")


class RowSamplesMixin(VariationalGenerationMixin):
    """Gives a stock language model posterior samples. Stands before the stock class among the bases.

    With S samples `logits` are log p̄, [batch, length, vocab] in float32, `loss` and `nll` are the negative
    log-likelihood of p̄ per target token, in nats, and `uncertainty` and `sample_logits` are those of
    [`VariationalCausalLMOutput`]; hidden states, attentions and the cache have batch * S rows. With S = 0, the mean
    pass, the stock class answers.
    """

    stock_class: type[PreTrainedModel]

    @property
    def variational_layers(self) -> list[int]:
        """Numbers of the layers in which the samples come apart; the head counts as the layer behind the last."""
        return list(range(self.config.get_text_config().num_hidden_layers))

    def sampling(self, num_samples: int, batch: int) -> AbstractContextManager:
        """Inside it the `batch * num_samples` rows of a stock forward pass differ by sample."""
        raise TypeError(f"{type(self).__name__} does not say what makes its samples differ.")

    def resolve_num_samples(self, num_posterior_samples: int | None) -> int:
        """The number of samples of this pass; `None`: the mean pass."""
        return 0 if num_posterior_samples is None else check_num_posterior_samples(num_posterior_samples)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves the stock checkpoint: a method is not a part of it, and is called again where it is loaded."""
        with self._as_stock():
            return self.save_pretrained(save_directory, *args, **kwargs)

    @contextmanager
    def _as_stock(self) -> Iterator[None]:
        """Inside it the model is of its stock class, which may ask itself whether it is variational."""
        made, self.__class__ = self.__class__, self.stock_class
        try:
            yield
        finally:
            self.__class__ = made

    def _run(self, inputs: dict, ours: dict):
        """A forward pass with the stock class's arguments by name, and ours."""
        num_samples = self.resolve_num_samples(ours["num_posterior_samples"])
        check_samples_for(num_samples, **{name: ours[name] for name in ("output_uncertainty", "output_sample_logits")})
        as_tuple = inputs.pop("return_dict", getattr(self.config, "return_dict", True)) is False
        if num_samples == 0:
            outputs = self._stock_pass(inputs)
        else:
            outputs = self._sampled(inputs, num_samples, ours)
        return outputs.to_tuple() if as_tuple else outputs

    def _stock_pass(self, inputs: dict):
        with self._as_stock():
            outputs = self.forward(**inputs, return_dict=True)
        return output_class(type(outputs))(**outputs)

    def _sampled(self, inputs: dict, num_samples: int, ours: dict):
        batch = batch_of(inputs)
        rows = {name: _repeated(value, batch, num_samples) for name, value in inputs.items() if name not in TARGETS}
        rows["past_key_values"] = self._prepared_cache(inputs, num_samples)
        with self.sampling(num_samples, batch):
            outputs = self._stock_pass(rows)
        return type(outputs)(**{**outputs, **join_samples(outputs.logits, None, num_samples, inputs, ours)})

    def _prepared_cache(self, inputs: dict, num_samples: int) -> Cache | None:
        cache, use_cache = inputs.get("past_key_values"), inputs.get("use_cache")
        use_cache = getattr(self.config, "use_cache", False) if use_cache is None else use_cache
        if cache is None and use_cache and not self.training:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            layers = len(cache.layers) or self.config.get_text_config().num_hidden_layers
            prepare_cache(cache, layers, 0, num_samples, shared_at_split=False)
        return cache


def join_samples(states: Tensor, head, num_samples: int, inputs: dict, ours: dict) -> dict:
    """Joins the rows of S samples into the predictive distribution.

    Args:
        states: [batch * S, length, ...]; logits, or hidden states for `head`.
        head: from a block of positions of `states` to logits, [batch * S, positions, vocab]; `None`: they are logits.
        inputs: of the forward pass, with its targets.
        ours: the arguments of `ARGUMENTS`.

    Returns:
        The fields `logits`, `uncertainty` and `sample_logits` of an output, and with labels `loss` and `nll`; those
        that were not asked for are left out.

    Raises:
        ValueError: for labels with `logits_to_keep`.
    """
    keep = inputs.get("logits_to_keep", 0)
    scored = None
    if inputs.get("labels") is not None or inputs.get("shift_labels") is not None:
        if torch.is_tensor(keep) or keep:
            raise ValueError(f"labels score every position: leave out logits_to_keep, got {keep!r}.")
        scored = ScoredTokens.of(
            inputs.get("labels"), None, inputs.get("shift_labels"), inputs.get("num_items_in_batch")
        )
    observed, tokens = None, inputs.get("labels") if inputs.get("input_ids") is None else inputs["input_ids"]
    if ours["output_uncertainty"] and tokens is not None:
        observed = keep_positions(shift_targets(tokens), keep)
    joined = read_out(
        states,
        head,
        num_samples,
        states.shape[-1] if head is None else head.vocab_size,
        "mc_nll",
        targets=None if scored is None else scored.targets.to(states.device),
        observed=observed,
        output_uncertainty=ours["output_uncertainty"],
        output_sample_logits=ours["output_sample_logits"],
    )
    fields = {"logits": joined.logits, "uncertainty": joined.uncertainty, "sample_logits": joined.sample_logits}
    if scored is not None:
        fields["loss"] = fields["nll"] = joined.nll_sum / scored.num_items
    return {name: value for name, value in fields.items() if value is not None}


def batch_of(inputs: dict) -> int:
    """The number of sequences of a forward pass."""
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return inputs[name].shape[0]
    raise ValueError("Give exactly one of input_ids and inputs_embeds.")


@cache
def sampling_class(mixin: type[RowSamplesMixin], model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of a stock class that samples as `mixin` says."""
    stock = inspect.signature(model_class.forward)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in stock.parameters.items() if parameter.kind in kinds][1:]

    def forward(self, *args, **kwargs):
        inputs = dict(zip(names, args, strict=False)) | kwargs
        ours = {name: inputs.pop(name, default) for name, default in ARGUMENTS.items()}
        return self._run(inputs, ours)

    # generate, pipelines and Trainer ask the signature what a model takes.
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in ARGUMENTS.items()
        if name not in stock.parameters
    ]
    parameters = list(stock.parameters.values())
    tail = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
    forward.__signature__ = stock.replace(parameters=[*(p for p in parameters if p not in tail), *added, *tail])
    forward.__doc__ = model_class.forward.__doc__
    name = f"{mixin.__name__.removesuffix('Mixin')}{model_class.__name__}"
    members = {"__doc__": mixin.__doc__, "__module__": mixin.__module__, "forward": forward}
    return type(name, (mixin, model_class), {**members, "stock_class": model_class})


def adopt(model: PreTrainedModel, mixin: type[RowSamplesMixin]) -> None:
    """Gives a stock model the class that samples as `mixin` says, in place; `abandon` takes it away.

    Raises:
        ValueError: for a model that is no decoder-only language model of transformers, or that samples already.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}: unwrap it first.")
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is no decoder-only language model, which this baseline is for.")
    if getattr(model, "variational_layers", None):
        raise ValueError(
            f"{type(model).__name__} has posterior samples of its own already: start again from the deterministic "
            "model (to_deterministic, remove_mc_dropout, untempered or peft's unload give it back)."
        )
    model.__class__ = sampling_class(mixin, type(model))


def abandon(model: PreTrainedModel, mixin: type[RowSamplesMixin], maker: str) -> None:
    """Gives a model that `adopt` changed its stock class back, in place; `maker`: the function that changed it."""
    if not isinstance(model, mixin):
        raise ValueError(f"{type(model).__name__} was not made by {maker}: nothing to take back.")
    model.__class__ = model.stock_class


def _repeated(value, batch: int, num_samples: int):
    if num_samples == 1:
        return value
    if isinstance(value, dict):
        return {name: _repeated(item, batch, num_samples) for name, item in value.items()}
    if type(value).__name__ == "BlockMask":
        raise ValueError(
            "Posterior samples cannot expand an attention mask of type BlockMask: use attn_implementation='sdpa' or "
            "'eager', or num_posterior_samples=0."
        )
    # What has one axis (positions to keep, cache positions) has no row for each sequence.
    is_per_row = torch.is_tensor(value) and value.ndim > 1 and value.shape[0] == batch
    return repeat_rows(value, num_samples).contiguous() if is_per_row else value
