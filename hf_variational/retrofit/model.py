"""Stock classes that take `num_posterior_samples`: a mixin, and the class made of it and any stock class."""

import inspect
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from numbers import Real

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from ..modeling.attention import AttentionPosterior
from ..modeling.classification_variational_gpt import log_odds_of_mean, problem_type_of
from ..modeling.configuration_variational_gpt import VariationalAttentionConfig, check_num_posterior_samples
from ..modeling.generation import VariationalGenerationMixin
from ..modeling.heads import NonReentrantMixin, check_samples_for
from ..modeling.objective import IGNORE_INDEX, ScoredTokens, attended_positions, posterior_penalties, shift_targets
from ..modeling.posterior import check_complete
from ..modeling.predictive import log_mean_probability, predictive_measures, widen
from ..modeling.sample_axis import SampleAxis, prepare_cache, repeat_rows, tokens_held
from .attention import IMPLEMENTATIONS, attention_modules, decoder_layers, install_posteriors

# What `forward` takes beside the stock arguments.
_OURS = {
    "num_posterior_samples": None,
    "output_uncertainty": False,
    "output_posteriors": False,
    "output_sample_logits": False,
    "kl_weight": None,
    "free_bits": 0.0,
}
_TARGETS = ("labels", "shift_labels", "start_positions", "end_positions", "next_sentence_label")
_SCORED = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")
# What an output has behind the stock fields.
_ADDED = ("nll", "kl", "kl_per_layer", "uncertainty", "attention_posteriors", "sample_logits")


@dataclass
class VariationalSettings:
    """What is variational in a retrofitted model, kept as `config.variational`.

    Attributes:
        attention: dictionary of a [`VariationalAttentionConfig`].
        attention_layers: numbers of the layers whose attention is variational.
        kl_weight: beta, used where `forward` is not given one.
        num_posterior_samples: samples drawn in train mode where `forward` is not told how many.
    """

    attention: dict
    attention_layers: list[int]
    kl_weight: float = 1e-4
    num_posterior_samples: int = 1

    def __post_init__(self):
        check_num_posterior_samples(self.num_posterior_samples)
        is_number = isinstance(self.kl_weight, Real) and not isinstance(self.kl_weight, bool)
        if not is_number or not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"kl_weight must be a finite number of 0 or more, got {self.kl_weight!r}.")


class VariationalMixin(NonReentrantMixin):
    """Gives a stock class posteriors, samples and the KL. Stands before the stock class among the bases.

    `logits` (and the logits of spans) come back joined: the log of the mean over samples of the probabilities,
    [batch, ...] in float32; in multi-label classification the log-odds of the mean probability, and in regression the
    mean.
    Everything else that is computed above the first variational layer (hidden states, attentions, what a base model
    answers with) has batch * S rows, row `b * S + s` being sample `s` of sequence `b`.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        settings = getattr(config, "variational", None)
        if settings is not None:
            install(self, VariationalSettings(**settings))

    def __reduce_ex__(self, protocol):
        if type(self) is not variational_class(self.stock_class):
            return super().__reduce_ex__(protocol)
        # Its class is made of the stock one, and stands in no module under its name.
        return _new, (self.stock_class,), self.__dict__

    @property
    def settings(self) -> VariationalSettings:
        """What is variational in this model."""
        return VariationalSettings(**self.config.variational)

    @property
    def posterior_sites(self) -> list[tuple[int, str]]:
        """(layer, site) of each posterior."""
        if getattr(self.config, "variational", None) is None:
            return []
        return [(layer, "attention") for layer in self.settings.attention_layers]

    @property
    def variational_layers(self) -> list[int]:
        """Numbers of the layers where anything is variational."""
        return sorted({layer for layer, _ in self.posterior_sites})

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As in transformers, and the posteriors that a checkpoint does not have."""
        super().initialize_weights()
        # Not in `_init_weights`: the modules of the base model are initialized by the base model's own class.
        for module in self.modules():
            if isinstance(module, AttentionPosterior):
                module.init_weights()

    def resolve_num_samples(self, num_posterior_samples: int | None) -> int:
        """The number of samples of this pass: as asked, or the default of the mode the model is in."""
        if not self.posterior_sites:
            if num_posterior_samples:
                raise ValueError(
                    f"num_posterior_samples={num_posterior_samples}, but nothing in this {type(self).__name__} is "
                    "variational: use add_variational_attention first."
                )
            return 0
        if num_posterior_samples is None:
            return self.settings.num_posterior_samples if self.training else 0
        return check_num_posterior_samples(num_posterior_samples)

    def _run(self, stock, inputs: dict, ours: dict):
        """A forward pass: `stock` is the stock class's forward, `inputs` its arguments by name."""
        num_samples = self.resolve_num_samples(ours["num_posterior_samples"])
        check_samples_for(num_samples, **{name: ours[name] for name in ("output_uncertainty", "output_sample_logits")})
        if not self.posterior_sites:
            return stock(**inputs)
        targets = {name: inputs[name] for name in _TARGETS if inputs.get(name) is not None}
        record = bool(ours["output_posteriors"] or targets)
        if (num_samples or record) and self.config._attn_implementation not in IMPLEMENTATIONS.values():
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} never has the attention weights in its "
                "hands, so their posterior cannot be sampled or its KL computed: use "
                f"model.set_attn_implementation({IMPLEMENTATIONS['sdpa']!r}), or run the mean pass "
                "(num_posterior_samples=0, without labels)."
            )
        if self.config._attn_implementation not in IMPLEMENTATIONS.values():
            return stock(**inputs)
        axis, scored = self._axis(inputs, num_samples, record, ours["output_posteriors"])
        num_items = inputs.pop("num_items_in_batch", None) if targets else None
        as_tuple = inputs.pop("return_dict", getattr(self.config, "return_dict", True)) is False
        outputs = stock(**self._rows(inputs, axis), sample_axis=axis, return_dict=True)
        missed = set(self.variational_layers) - axis.visited
        if missed and (num_samples or record):
            raise RuntimeError(
                f"The attention of layers {sorted(missed)} never saw the posterior samples: the layers of "
                f"{type(self).__name__} do not hand their keyword arguments down to it."
            )
        if self.training and torch.is_grad_enabled() and not targets and outputs.get("loss") is not None:
            raise ValueError(
                f"The loss of this {type(self).__name__} has no targets among {', '.join(_TARGETS)}, so its KL has "
                "nothing to be divided by: train the stock model instead, or take a loss of the logits yourself."
            )
        outputs = _output_class(type(outputs))(**outputs)
        if num_samples:
            self._join(outputs, axis, inputs, ours)
        if record:
            self._add_posteriors(outputs, axis, scored, ours, num_items)
        return outputs.to_tuple() if as_tuple else outputs

    def _axis(self, inputs: dict, num_samples: int, record: bool, statistics: bool):
        main = inputs.get("inputs_embeds")
        main = inputs.get(self.main_input_name) if main is None else main
        if main is None:
            raise ValueError(f"{type(self).__name__} needs {self.main_input_name}.")
        mask = inputs.get("attention_mask")
        is_text = self.main_input_name == "input_ids"
        scored = token_weights = None
        if record and is_text:
            token_weights = attended_positions(mask, main)
        if any(inputs.get(name) is not None for name in _TARGETS):
            scored = self._scored(mask, main if is_text else None, inputs)
            token_weights = token_weights if scored.weights is None else scored.weights
        positions = inputs.get("position_ids")
        cache = self._prepared_cache(inputs, num_samples)
        axis = SampleAxis(
            num_samples,
            main.shape[0],
            positions if positions is not None and positions.ndim == 2 else None,
            record=record,
            statistics=bool(record and statistics),
            token_weights=token_weights,
            cache=cache if num_samples else None,
            seen=tokens_held(cache),
            tape=[] if record else None,
        )
        attentions = inputs.get("output_attentions")
        axis.attentions = self.config.output_attentions if attentions is None else attentions
        return axis, scored

    def _scored(self, mask: Tensor | None, text: Tensor | None, inputs: dict) -> ScoredTokens:
        """The targets of a pass and the tokens that carry KL; weights of `None`: every position of the layer."""
        num_items = inputs.get("num_items_in_batch")
        if self._shifts_labels:
            return ScoredTokens.of(inputs.get("labels"), mask, inputs.get("shift_labels"), num_items)
        targets = next(inputs[name] for name in _TARGETS if inputs.get(name) is not None)
        has_target = targets != IGNORE_INDEX
        count = has_target.sum().clamp(min=1) if num_items is None else num_items
        weights = None if text is None else attended_positions(mask, text)
        is_per_token = text is not None and targets.ndim == 2 and targets.shape == text.shape[:2]
        if is_per_token and not targets.is_floating_point():
            weights = has_target * weights
        return ScoredTokens(targets, weights, count)

    @property
    def _shifts_labels(self) -> bool:
        """Whether the target of a position is the next one's label. Not every language model's name says so, which is
        all that transformers' `loss_type` knows.
        """
        return self.can_generate()

    def _prepared_cache(self, inputs: dict, num_samples: int):
        cache = inputs.get("past_key_values")
        use_cache = inputs.get("use_cache")
        use_cache = getattr(self.config, "use_cache", False) if use_cache is None else use_cache
        if cache is None and use_cache and num_samples and not self.training and self._can_cache:
            cache = inputs["past_key_values"] = DynamicCache(config=self.config)
        if cache is not None:
            layers = self.config.get_text_config().num_hidden_layers
            prepare_cache(cache, layers, self.variational_layers[0], num_samples, shared_at_split=False)
        return cache

    @property
    def _can_cache(self) -> bool:
        if "past_key_values" not in inspect.signature(self.forward).parameters:
            return False
        return all(getattr(module, "is_causal", True) for module in attention_modules(self).values())

    def _rows(self, inputs: dict, axis: SampleAxis) -> dict:
        """The stock forward's arguments: targets for each row of the logits, and inputs too for a head that picks
        positions by them.
        """
        if axis.num_samples <= 1:
            return inputs
        inputs = dict(inputs)
        for name, value in inputs.items():
            repeat = name in _TARGETS or not self.can_generate()
            if repeat and torch.is_tensor(value) and value.ndim and value.shape[0] == axis.batch:
                # Of one row the copies would lie in one place, and stock losses view their targets flat.
                inputs[name] = repeat_rows(value, axis.num_samples).contiguous()
        return inputs

    def _join(self, outputs, axis: SampleAxis, inputs: dict, ours: dict) -> None:
        names = [name for name in _SCORED if outputs.get(name) is not None]
        for name in ("output_uncertainty", "output_sample_logits"):
            if ours[name] and "logits" not in names:
                raise ValueError(f"{name}=True is about the logits, which {type(self).__name__} does not answer with.")
        for name in names:
            sampled = outputs[name]
            if name == "logits":
                self._measure(outputs, sampled, axis, inputs, ours)
            outputs[name] = self._joined(sampled, axis)

    def _joined(self, sampled: Tensor, axis: SampleAxis) -> Tensor:
        kind = self._problem()
        if kind == "single_label_classification":
            return log_mean_probability(sampled, axis.num_samples)
        sampled = widen(sampled).unflatten(0, (axis.batch, -1))
        return sampled.mean(1) if kind == "regression" else log_odds_of_mean(sampled)

    def _problem(self) -> str:
        if not type(self).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
            return "single_label_classification"
        return problem_type_of(self.config)

    def _measure(self, outputs, sampled: Tensor, axis: SampleAxis, inputs: dict, ours: dict) -> None:
        if ours["output_uncertainty"]:
            if self._problem() != "single_label_classification":
                raise ValueError(
                    "output_uncertainty measures a distribution over classes, and problem_type is "
                    f"{self._problem()!r}: use output_sample_logits=True and the spread of the samples."
                )
            observed = None
            if self._shifts_labels and inputs.get("input_ids") is not None:
                observed = shift_targets(inputs["input_ids"])[:, -sampled.shape[1] :]
            flat = sampled.unsqueeze(1) if sampled.ndim == 2 else sampled
            measures = predictive_measures(flat, axis.num_samples, observed)
            outputs["uncertainty"] = measures if sampled.ndim == 3 else measures.map(lambda value: value.squeeze(1))
        if ours["output_sample_logits"]:
            logits = widen(sampled).unflatten(0, (axis.batch, -1))
            categorical = self._problem() == "single_label_classification"
            outputs["sample_logits"] = torch.log_softmax(logits, -1) if categorical else logits

    def _add_posteriors(self, outputs, axis: SampleAxis, scored: ScoredTokens | None, ours: dict, num_items):
        # What a checkpointed layer's recomputation records again belongs to nobody.
        records, axis.tape = tuple(axis.tape), None
        check_complete(records, self.posterior_sites)
        if scored is not None and outputs.get("loss") is not None:
            if scored.weights is None:
                rows = records[0].statistics.kl
                scored.weights = rows.new_ones(axis.batch, rows.shape[1])
            penalties = posterior_penalties(records, scored, ours["free_bits"])
            weight = self.settings.kl_weight if ours["kl_weight"] is None else ours["kl_weight"]
            outputs["nll"] = outputs["loss"]
            if num_items is not None:
                # Many stock heads take the mean over their micro-batch whatever the whole batch has.
                count = (scored.targets != IGNORE_INDEX).sum()
                outputs["nll"] = torch.where(count > 0, outputs["nll"] * (count / num_items), 0.0)
            outputs["loss"] = outputs["nll"] + weight * penalties.charged_kl
            outputs["kl"], outputs["kl_per_layer"] = penalties.kl, penalties.kl_per_layer
        if ours["output_posteriors"]:
            outputs["attention_posteriors"] = {
                record.layer: record.statistics.over_samples(axis.batch) for record in records
            }


def _enter_rows(module: nn.Module, args: tuple, kwargs: dict):
    """Forward pre-hook of the layers from the first variational one on: their arguments get a row for each sample."""
    return _change_rows(
        args, kwargs, lambda value, axis: axis.expand(value) if value.shape[0] == axis.batch else value
    )


def _leave_rows(module: nn.Module, args: tuple, kwargs: dict):
    """Forward pre-hook of the layers below: what has a row for each sample, all alike there, keeps one a sequence."""
    return _change_rows(
        args, kwargs, lambda value, axis: value[:: axis.num_samples] if value.shape[0] == axis.rows else value
    )


def _change_rows(args: tuple, kwargs: dict, change):
    axis = kwargs.get("sample_axis")
    if axis is None or axis.num_samples <= 1:
        return None

    def changed(value):
        if isinstance(value, tuple):
            return tuple(changed(item) for item in value)
        return change(value, axis) if torch.is_tensor(value) and value.ndim > 1 else value

    return changed(args), {name: changed(value) for name, value in kwargs.items()}


def install(model: PreTrainedModel, settings: VariationalSettings) -> None:
    attention = VariationalAttentionConfig.from_dict(settings.attention)
    install_posteriors(model, attention, settings.attention_layers)
    for index, layer in enumerate(decoder_layers(model)):
        hook = _leave_rows if index < settings.attention_layers[0] else _enter_rows
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    ignored = getattr(model.config, "keys_to_ignore_at_inference", None) or ["past_key_values"]
    model.config.keys_to_ignore_at_inference = list(dict.fromkeys([*ignored, *_ADDED]))
    # Any other implementation stays, and runs the mean pass alone.
    stock = model.config._attn_implementation
    if stock in IMPLEMENTATIONS:
        model.set_attn_implementation(IMPLEMENTATIONS[stock])


@cache
def _output_class(stock: type[ModelOutput]) -> type[ModelOutput]:
    """A stock output class with fields for what we add: torch rebuilds an output from its class's fields."""
    fields = [(name, object, field(default=None)) for name in _ADDED]
    return make_dataclass(f"Variational{stock.__name__}", fields, bases=(stock,), namespace={"__module__": __name__})


def _new(stock: type[PreTrainedModel]) -> PreTrainedModel:
    made = variational_class(stock)
    return made.__new__(made)


@cache
def variational_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The variational subclass of a stock class: `variational_class(BertForMaskedLM).from_pretrained(folder)` loads
    what `add_variational_attention` and `save_pretrained` made, or any stock checkpoint.
    """
    if issubclass(model_class, VariationalMixin):
        return model_class
    stock = inspect.signature(model_class.forward)
    names = [name for name, parameter in stock.parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    def forward(self, *args, **kwargs):
        inputs = dict(zip(names[1:], args, strict=False)) | kwargs
        ours = {name: inputs.pop(name, default) for name, default in _OURS.items()}
        return self._run(super(variational, self).forward, inputs, ours)

    # generate, pipelines and Trainer ask the signature what a model takes.
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in _OURS.items()]
    parameters = list(stock.parameters.values())
    tail = [parameter for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
    forward.__signature__ = stock.replace(parameters=[*(p for p in parameters if p not in tail), *ours, *tail])
    forward.__doc__ = model_class.forward.__doc__
    generation = (VariationalGenerationMixin,) if issubclass(model_class, GenerationMixin) else ()
    kept = getattr(model_class, "_keep_in_fp32_modules_strict", None) or []
    variational = type(
        # The stock name: config.json has it, which stock tools read, and pipelines know a class by it.
        model_class.__name__,
        (VariationalMixin, *generation, model_class),
        {
            "__qualname__": f"Variational{model_class.__name__}",
            "forward": forward,
            "stock_class": model_class,
            "_keep_in_fp32_modules_strict": [*kept, "posterior"],
            "__module__": __name__,
            "__doc__": f"{model_class.__name__} with variational attention.",
        },
    )
    return variational
