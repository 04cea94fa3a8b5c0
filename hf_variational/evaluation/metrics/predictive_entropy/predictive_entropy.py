"""Predictive entropy H(p̄) of the mean p̄ over posterior samples, nats: total uncertainty.

`predictions` is its value for each token, as a model of hf_variational gives it, or the probabilities of all samples,
[samples, classes] for each token.
"""

import evaluate

from hf_variational.evaluation.metrics import inputs

_CITATION = r"""
@inproceedings{depeweg2018decomposition,
  title={Decomposition of Uncertainty in {Bayesian} Deep Learning for Efficient and Risk-Sensitive Learning},
  author={Depeweg, Stefan and Hern{\'a}ndez-Lobato, Jos{\'e} Miguel and Doshi-Velez, Finale and Udluft, Steffen},
  booktitle={International Conference on Machine Learning},
  year={2018}
}
"""


class PredictiveEntropy(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, [inputs.NUMBERS, inputs.SAMPLES], _CITATION)

    def _compute(self, predictions):
        return {"predictive_entropy": inputs.mean_measure("predictive_entropy", predictions)}
