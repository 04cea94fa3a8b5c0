"""What a checkpoint needs: configuration, models, and the mathematics they run on."""

from .attention import AttentionPosterior
from .classification_variational_gpt import (
    VariationalGPTForSequenceClassification,
    VariationalGPTForTokenClassification,
)
from .configuration_variational_gpt import EVEConfig, VariationalAttentionConfig, VariationalGPTConfig
from .eve import EVE
from .generation import UncertaintyStoppingCriteria, VariationalGenerationMixin
from .modeling_variational_gpt import VariationalGPTForCausalLM, VariationalGPTModel, VariationalGPTPreTrainedModel
from .outputs import (
    VariationalCausalLMOutput,
    VariationalGenerateBeamOutput,
    VariationalGenerateOutput,
    VariationalModelOutput,
    VariationalSequenceClassifierOutput,
    VariationalTokenClassifierOutput,
)
from .posterior import AttentionStatistics, PosteriorStatistics, UnitWeights
from .predictive import PredictiveMeasures, log_mean_probability, predictive_measures
from .sample_axis import NoiseRequest, posterior_noise

__all__ = [
    "AttentionPosterior",
    "AttentionStatistics",
    "EVE",
    "EVEConfig",
    "NoiseRequest",
    "PosteriorStatistics",
    "PredictiveMeasures",
    "UncertaintyStoppingCriteria",
    "UnitWeights",
    "VariationalAttentionConfig",
    "VariationalCausalLMOutput",
    "VariationalGPTConfig",
    "VariationalGPTForCausalLM",
    "VariationalGPTForSequenceClassification",
    "VariationalGPTForTokenClassification",
    "VariationalGPTModel",
    "VariationalGPTPreTrainedModel",
    "VariationalGenerateBeamOutput",
    "VariationalGenerateOutput",
    "VariationalGenerationMixin",
    "VariationalModelOutput",
    "VariationalSequenceClassifierOutput",
    "VariationalTokenClassifierOutput",
    "log_mean_probability",
    "posterior_noise",
    "predictive_measures",
]
