"""VariationalGPT that classifies sequences and tokens: Llama's classification heads over posterior samples."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple, logging

from .configuration_variational_gpt import VariationalGPTConfig
from .heads import VariationalHeadMixin
from .modeling_variational_gpt import VariationalGPTModel, VariationalGPTPreTrainedModel
from .objective import IGNORE_INDEX, ScoredTokens, attended_positions
from .outputs import VariationalSequenceClassifierOutput, VariationalTokenClassifierOutput
from .predictive import log_mean_exp, widen
from .readout import read_out
from .sample_axis import repeat_rows
from .saving import CardMixin

logger = logging.get_logger(__name__)

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class VariationalGPTForSequenceClassification(
    CardMixin, VariationalHeadMixin, VariationalGPTPreTrainedModel, LlamaForSequenceClassification
):
    """VariationalGPT with a linear head on a sequence's last token; as in Llama, `config.problem_type` says whether it
    predicts one label, several, or numbers.

    The loss is the negative evidence lower bound per target. The latents of every attended position stand between a
    sequence and its label, so all of them are paid for: the KL is summed over the attended positions (also those that
    the label turns out not to depend on) and divided by the number of targets. It therefore grows with the length of
    the sequences, unlike a language model's, which has a target at each position.

    Example:

    ```python
    >>> import hf_variational
    >>> from transformers import AutoModelForSequenceClassification

    >>> model = AutoModelForSequenceClassification.from_pretrained("my-classifier")
    >>> out = model(input_ids, attention_mask=attention_mask, num_posterior_samples=8, output_uncertainty=True)
    >>> out.logits.exp()  # the predictive distribution, [batch, labels]
    >>> out.uncertainty.mutual_information  # [batch]
    ```
    """

    def __init__(self, config: VariationalGPTConfig):
        # Not Llama's: it would look the decoder's class up in the Auto classes.
        VariationalGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = VariationalGPTModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
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
        num_posterior_samples: int | None = None,
        output_uncertainty: bool = False,
        output_posteriors: bool | None = None,
        output_sample_logits: bool = False,
        kl_weight: Tensor | float | None = None,
        free_bits: float = 0.0,
        **kwargs,
    ) -> VariationalSequenceClassifierOutput:
        """
        Args:
            labels: whole numbers [batch], -100 where a sequence has none (single-label classification); 0 and 1,
                [batch, labels] (multi-label classification); numbers [batch, labels], or [batch] of one label
                (regression). Where `config.problem_type` is `None` the first labels decide it, as in Llama.
            num_posterior_samples: S; 0 is the mean pass; `None`: 0 in eval mode, the config's in train mode.
            output_uncertainty: returns `uncertainty`; needs S >= 1 and single-label classification.
            output_posteriors: returns `posteriors`.
            output_sample_logits: returns `sample_logits`; needs S >= 1.
            kl_weight: beta of this pass, a number or a 0-dim tensor; `None`: the config's.
            free_bits, unit_weights (in `kwargs`): as in `VariationalGPTForCausalLM`.
            num_items_in_batch (in `kwargs`): targets of the whole accumulated batch, the loss's divisor: labelled
                sequences in single-label classification, else sequences times labels (what a Trainer counts).

        Raises:
            ValueError: for a batch of several sequences without `config.pad_token_id`, labels of another shape than
                these, uncertainty asked of a mean pass or of anything but single-label classification, or see
                `VariationalGPTModel`.
            RuntimeError: if fewer posteriors are recorded than there are variational layers.
        """
        asked = {"output_uncertainty": output_uncertainty, "output_sample_logits": output_sample_logits}
        num_samples = self._resolve_num_samples(num_posterior_samples, **asked)
        problem_type = self._resolve_problem_type(labels)
        if output_uncertainty and problem_type != "single_label_classification":
            raise ValueError(
                "output_uncertainty=True measures a distribution over classes, but this model's problem_type is "
                f"{problem_type!r}: use output_sample_logits=True and the spread of the samples."
            )
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        scored = None
        if labels is not None and inputs is not None:
            scored = self._scored(labels, problem_type, attention_mask, inputs, kwargs.get("num_items_in_batch"))
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
        logits = self._pool(self.score(outputs.last_hidden_state), input_ids, inputs.shape[0])
        objective = self.config.objective
        if problem_type == "single_label_classification":
            read = read_classes(logits.unsqueeze(1), num_samples, objective, scored, **asked)
            read["logits"] = read["logits"].squeeze(1)
            if output_uncertainty:
                read["uncertainty"] = read["uncertainty"].map(lambda measure: measure.squeeze(1))
            if output_sample_logits:
                read["sample_logits"] = read["sample_logits"].squeeze(2)
        else:
            read = read_values(logits, num_samples, problem_type, objective, scored, output_sample_logits)
        fields |= read
        if scored is not None:
            fields |= self._loss(fields["nll"], outputs.posteriors, scored, kl_weight, free_bits)
        return VariationalSequenceClassifierOutput(**fields)

    def _resolve_problem_type(self, labels: Tensor | None) -> str:
        if self.config.problem_type is not None:
            if self.config.problem_type not in PROBLEM_TYPES:
                raise ValueError(
                    f"problem_type={self.config.problem_type!r} is unknown; choose from {', '.join(PROBLEM_TYPES)}."
                )
            return self.config.problem_type
        problem_type = problem_type_of(self.config)
        is_class = labels is None or labels.dtype in (torch.long, torch.int)
        if problem_type == "single_label_classification" and not is_class:
            problem_type = "multi_label_classification"
        if labels is not None:
            # As in transformers: pipelines read it off the config that is saved with the trained model.
            self.config.problem_type = problem_type
        return problem_type

    def _scored(self, labels, problem_type, attention_mask, inputs, num_items_in_batch) -> ScoredTokens:
        """The targets, [batch, 1] or [batch, labels], and the positions that carry KL, [batch, length]."""
        batch, num_labels = inputs.shape[0], self.config.num_labels
        is_class = problem_type == "single_label_classification"
        expected = (batch,) if is_class else (batch, num_labels)
        width = 1 if is_class else num_labels
        is_whole = labels.numel() == batch * width and (labels.ndim == 0 or labels.shape[0] == batch)
        if not is_whole or (is_class and labels.is_floating_point()):
            raise ValueError(
                f"problem_type={problem_type!r} with num_labels={num_labels} needs "
                f"{'whole numbers' if is_class else 'labels'} of shape {expected}, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}: change the labels, or problem_type or num_labels in the config."
            )
        targets = labels.reshape(batch, width)
        has_target = (targets != IGNORE_INDEX) if is_class else torch.ones_like(targets, dtype=torch.bool)
        if num_items_in_batch is None:
            num_items_in_batch = has_target.sum().clamp(min=1)
        elif torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(targets.device)
        weights = attended_positions(attention_mask, inputs) * has_target[:, :1].to(inputs.device)
        return ScoredTokens(targets, weights, num_items_in_batch)

    def _pool(self, logits: Tensor, input_ids: Tensor | None, batch: int) -> Tensor:
        """The logits of each row's last token that is not padding, [rows, length, labels] to [rows, labels]."""
        pad_token_id = self.config.pad_token_id
        if pad_token_id is None and batch != 1:
            raise ValueError(
                f"Cannot handle batch sizes > 1 if no padding token is defined: got {batch} sequences, and the last "
                "token of each is found by config.pad_token_id, which is None. Set it."
            )
        if pad_token_id is None or input_ids is None:
            if pad_token_id is not None:
                logger.warning_once(
                    f"{self.__class__.__name__} will not detect padding tokens in `inputs_embeds`. Results may be "
                    "unexpected if using padding tokens in conjunction with `inputs_embeds.`"
                )
            return logits[:, -1]
        # The rightmost one, so that padding may stand on either side.
        positions = torch.arange(input_ids.shape[-1], device=input_ids.device, dtype=torch.int32)
        last = (positions * (input_ids != pad_token_id)).argmax(-1).to(logits.device)
        last = repeat_rows(last, logits.shape[0] // batch)
        return logits[torch.arange(logits.shape[0], device=logits.device), last]


class VariationalGPTForTokenClassification(
    CardMixin, VariationalHeadMixin, VariationalGPTPreTrainedModel, LlamaForTokenClassification
):
    """VariationalGPT with a linear head on each token; its loss is the negative evidence lower bound per labelled
    token.

    A position carries KL if it is attended and its label is not -100: exactly the tokens that the loss is divided by.

    Example:

    ```python
    >>> import hf_variational
    >>> from transformers import AutoModelForTokenClassification

    >>> model = AutoModelForTokenClassification.from_pretrained("my-tagger")
    >>> out = model(input_ids, attention_mask=attention_mask, num_posterior_samples=8, output_uncertainty=True)
    >>> out.uncertainty.mutual_information  # [batch, length]
    ```
    """

    def __init__(self, config: VariationalGPTConfig):
        VariationalGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = VariationalGPTModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.score = nn.Linear(
            config.hidden_size, self.num_labels, bias=getattr(config, "token_classification_bias", True)
        )
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
        num_posterior_samples: int | None = None,
        output_uncertainty: bool = False,
        output_posteriors: bool | None = None,
        output_sample_logits: bool = False,
        kl_weight: Tensor | float | None = None,
        free_bits: float = 0.0,
        **kwargs,
    ) -> VariationalTokenClassifierOutput:
        """
        Args:
            labels: [batch, length]; position t is scored on `labels[t]`, -100 is left out.
            num_posterior_samples: S; 0 is the mean pass; `None`: 0 in eval mode, the config's in train mode.
            output_uncertainty: returns `uncertainty`; needs S >= 1.
            output_posteriors: returns `posteriors`.
            output_sample_logits: returns `sample_logits`; needs S >= 1.
            kl_weight: beta of this pass, a number or a 0-dim tensor; `None`: the config's.
            free_bits, unit_weights (in `kwargs`): as in `VariationalGPTForCausalLM`.
            num_items_in_batch (in `kwargs`): labelled tokens of the whole accumulated batch, the loss's divisor.

        Raises:
            ValueError: if uncertainty is asked of a mean pass, the labels are not one a token, or see
                `VariationalGPTModel`.
            RuntimeError: if fewer posteriors are recorded than there are variational layers.
        """
        asked = {"output_uncertainty": output_uncertainty, "output_sample_logits": output_sample_logits}
        num_samples = self._resolve_num_samples(num_posterior_samples, **asked)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        scored = None
        if labels is not None and inputs is not None:
            if labels.shape != inputs.shape[:2]:
                raise ValueError(
                    f"labels must be one a token, {tuple(inputs.shape[:2])}, got shape {tuple(labels.shape)}."
                )
            scored = ScoredTokens.of(None, attention_mask, labels, kwargs.get("num_items_in_batch"))
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
        del fields["past_key_values"]  # which the stock output has no field for
        logits = self.score(self.dropout(outputs.last_hidden_state))
        fields |= read_classes(logits, num_samples, self.config.objective, scored, **asked)
        if scored is not None:
            fields |= self._loss(fields["nll"], outputs.posteriors, scored, kl_weight, free_bits)
        return VariationalTokenClassifierOutput(**fields)


def read_classes(
    logits: Tensor,
    num_samples: int,
    objective: str,
    scored: ScoredTokens | None = None,
    output_uncertainty: bool = False,
    output_sample_logits: bool = False,
) -> dict:
    """Joins the samples of a distribution over classes into p̄.

    Args:
        logits: [batch * S, length, labels]; row `b * S + s` is sample `s` of sequence `b`.
        num_samples: S; 0: one row a sequence.
        objective: `"elbo"`: the mean over samples of the NLL; `"mc_nll"`: the NLL of p̄.
        scored: with targets [batch, length], -100 where there is none.

    Returns:
        the output's fields: `logits` [batch, length, labels] (log p̄, with S >= 1), `nll` per target, `uncertainty`,
        `sample_logits`.
    """
    targets = None if scored is None else scored.targets.to(logits.device, torch.long)
    if num_samples == 0:
        nll = None
        if targets is not None:
            nll = F.cross_entropy(widen(logits).flatten(0, 1), targets.flatten(), reduction="sum") / scored.num_items
        return {"logits": logits, "nll": nll}
    joined = read_out(
        logits,
        None,
        num_samples,
        logits.shape[-1],
        objective,
        targets=targets,
        observed=targets,
        output_uncertainty=output_uncertainty,
        output_sample_logits=output_sample_logits,
    )
    return {
        "logits": joined.logits,
        "nll": None if scored is None else joined.nll_sum / scored.num_items,
        "uncertainty": joined.uncertainty,
        "sample_logits": joined.sample_logits,
    }


def read_values(
    logits: Tensor,
    num_samples: int,
    problem_type: str,
    objective: str,
    scored: ScoredTokens | None = None,
    output_sample_logits: bool = False,
) -> dict:
    """Joins the samples of multi-label classification (independent probabilities p_l) or of regression.

    The NLL of a number is its squared error: that of a Gaussian of variance 1/2, without the constant.

    Args:
        logits: [batch * S, labels]; row `b * S + s` is sample `s` of sequence `b`.
        num_samples: S; 0: one row a sequence.
        problem_type: `"multi_label_classification"`: the joined logits are the log-odds of the mean over samples of
            p_l; `"regression"`: they are the mean.
        objective: `"elbo"`: the mean over samples of the NLL; `"mc_nll"`: the NLL of the joined logits.
        scored: with targets [batch, labels].

    Returns:
        the output's fields: `logits` [batch, labels], `nll` per target, `sample_logits`.
    """
    is_regression = problem_type == "regression"
    samples = widen(logits).unflatten(0, (-1, max(num_samples, 1)))
    joined = samples.mean(1) if is_regression else log_odds_of_mean(samples)
    fields = {"logits": joined if num_samples else logits}
    if scored is not None:
        predicted = joined.unsqueeze(1) if objective == "mc_nll" else samples
        targets = scored.targets.to(predicted.device, predicted.dtype).unsqueeze(1).expand_as(predicted)
        measure = F.mse_loss if is_regression else F.binary_cross_entropy_with_logits
        fields["nll"] = measure(predicted, targets, reduction="none").mean(1).sum() / scored.num_items
    if output_sample_logits:
        fields["sample_logits"] = samples
    return fields


def problem_type_of(config) -> str:
    """What a sequence classifier predicts, as far as its configuration alone says."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def log_odds_of_mean(logits: Tensor) -> Tensor:
    """log p̄ / (1 - p̄) of the mean probability over samples, [batch, S, labels] to [batch, labels]."""
    return log_mean_exp(F.logsigmoid(logits), dim=1) - log_mean_exp(F.logsigmoid(-logits), dim=1)


def _classifier_dropout(config: VariationalGPTConfig) -> float:
    for name in ("classifier_dropout", "hidden_dropout"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return 0.1


__all__ = ["VariationalGPTForSequenceClassification", "VariationalGPTForTokenClassification"]
