"""Output classes: the stock ones with what is variational after the stock fields."""

from dataclasses import dataclass

from torch import Tensor
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from .posterior import AttentionStatistics, PosteriorRecord, PosteriorStatistics
from .predictive import PredictiveMeasures


@dataclass
class VariationalModelOutput(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast`, whose rows above the split are batch * S (row `b * S + s` is sample s of sequence b).

    Attributes:
        posteriors: one [`PosteriorRecord`] a posterior, with `output_posteriors=True`.
    """

    posteriors: tuple[PosteriorRecord, ...] | None = None


@dataclass
class VariationalCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` of a variational language model.

    Attributes:
        loss: nll + kl_weight * kl + reconstruction_weight * reconstruction, 0-dim, with labels.
        logits: [batch, length, vocab]; log p̄ in float32 with posterior samples, else the mean pass's logits.
        hidden_states, attentions: as usual, but with batch * S rows above the split.
        nll: negative log-likelihood per target token, nats, 0-dim, with labels.
        kl: KL divergence per target token summed over units, heads and layers, nats, before its weight, 0-dim, with
            labels.
        kl_per_layer: the same per variational layer, [variational layers], with labels.
        reconstruction: local reconstruction error per target token summed over layers, 0-dim, where the units have it.
        uncertainty: [`PredictiveMeasures`], each [batch, length], with `output_uncertainty=True`.
        posteriors: layer number to [`PosteriorStatistics`] of its feed-forward units, with `output_posteriors=True`.
        attention_posteriors: layer number to [`AttentionStatistics`], with `output_posteriors=True`.
        sample_logits: log-probabilities of each sample, [batch, S, length, vocab], with `output_sample_logits=True`.
    """

    nll: Tensor | None = None
    kl: Tensor | None = None
    kl_per_layer: Tensor | None = None
    reconstruction: Tensor | None = None
    uncertainty: PredictiveMeasures | None = None
    posteriors: dict[int, PosteriorStatistics] | None = None
    attention_posteriors: dict[int, AttentionStatistics] | None = None
    sample_logits: Tensor | None = None


@dataclass
class VariationalSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """`SequenceClassifierOutputWithPast` of a variational model.

    A sequence has one target in single-label classification, and `num_labels` of them in multi-label classification
    and regression.

    Attributes:
        loss: nll + kl_weight * kl + reconstruction_weight * reconstruction, 0-dim, with labels.
        logits: [batch, labels]; the mean pass's logits, or in float32 with posterior samples: log p̄ in single-label
            classification, the log-odds of the mean probability in multi-label classification, the mean in regression.
        hidden_states, attentions: as usual, but with batch * S rows above the split.
        nll: negative log-likelihood per target, nats (in regression the squared error), 0-dim, with labels.
        kl: KL divergence per target summed over positions, units, heads and layers, nats, before its weight, 0-dim,
            with labels.
        kl_per_layer: the same per variational layer, [variational layers], with labels.
        reconstruction: local reconstruction error per target summed over positions and layers, 0-dim, where the units
            have it.
        uncertainty: [`PredictiveMeasures`] of single-label classification, each [batch], with
            `output_uncertainty=True`; the token variance is that of the label's probability.
        posteriors, attention_posteriors: as in [`VariationalCausalLMOutput`].
        sample_logits: [batch, S, labels], with `output_sample_logits=True`: each sample's log-probabilities in
            single-label classification, its logits in multi-label classification and regression.
    """

    nll: Tensor | None = None
    kl: Tensor | None = None
    kl_per_layer: Tensor | None = None
    reconstruction: Tensor | None = None
    uncertainty: PredictiveMeasures | None = None
    posteriors: dict[int, PosteriorStatistics] | None = None
    attention_posteriors: dict[int, AttentionStatistics] | None = None
    sample_logits: Tensor | None = None


@dataclass
class VariationalTokenClassifierOutput(TokenClassifierOutput):
    """`TokenClassifierOutput` of a variational model.

    Attributes:
        loss: nll + kl_weight * kl + reconstruction_weight * reconstruction, 0-dim, with labels.
        logits: [batch, length, labels]; log p̄ in float32 with posterior samples, else the mean pass's logits.
        hidden_states, attentions: as usual, but with batch * S rows above the split.
        nll: negative log-likelihood per labelled token, nats, 0-dim, with labels.
        kl: KL divergence per labelled token summed over units, heads and layers, nats, before its weight, 0-dim, with
            labels.
        kl_per_layer: the same per variational layer, [variational layers], with labels.
        reconstruction: local reconstruction error per labelled token summed over layers, 0-dim, where the units have
            it.
        uncertainty: [`PredictiveMeasures`], each [batch, length], with `output_uncertainty=True`; the token variance
            is that of the label's probability.
        posteriors, attention_posteriors: as in [`VariationalCausalLMOutput`].
        sample_logits: log-probabilities of each sample, [batch, S, length, labels], with `output_sample_logits=True`.
    """

    nll: Tensor | None = None
    kl: Tensor | None = None
    kl_per_layer: Tensor | None = None
    reconstruction: Tensor | None = None
    uncertainty: PredictiveMeasures | None = None
    posteriors: dict[int, PosteriorStatistics] | None = None
    attention_posteriors: dict[int, AttentionStatistics] | None = None
    sample_logits: Tensor | None = None


@dataclass
class VariationalGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with the measures of each new token.

    Attributes:
        uncertainty: [`PredictiveMeasures`], each [rows, new tokens], aligned with the new tokens; 0 after a row's end.
    """

    uncertainty: PredictiveMeasures | None = None


@dataclass
class VariationalGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """`GenerateBeamDecoderOnlyOutput` with the measures of each new token of the returned beams.

    Attributes:
        uncertainty: as in [`VariationalGenerateOutput`].
    """

    uncertainty: PredictiveMeasures | None = None


@dataclass
class VariationalGenerateEncoderDecoderOutput(GenerateEncoderDecoderOutput):
    """`GenerateEncoderDecoderOutput` with the measures of each new token.

    Attributes:
        uncertainty: as in [`VariationalGenerateOutput`].
    """

    uncertainty: PredictiveMeasures | None = None


@dataclass
class VariationalGenerateBeamEncoderDecoderOutput(GenerateBeamEncoderDecoderOutput):
    """`GenerateBeamEncoderDecoderOutput` with the measures of each new token of the returned beams.

    Attributes:
        uncertainty: as in [`VariationalGenerateOutput`].
    """

    uncertainty: PredictiveMeasures | None = None
