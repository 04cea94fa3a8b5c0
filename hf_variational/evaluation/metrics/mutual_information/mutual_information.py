"""Mutual information H(p̄) − (1/S) Σ_s H(p_s) over posterior samples, nats: epistemic uncertainty.

`predictions` is its value for each token, as a model of hf_variational gives it, or the probabilities of all samples,
[samples, classes] for each token.
"""

import evaluate

from hf_variational.evaluation.metrics import inputs

_CITATION = r"""
@article{houlsby2011bayesian,
  title={Bayesian Active Learning for Classification and Preference Learning},
  author={Houlsby, Neil and Husz{\'a}r, Ferenc and Ghahramani, Zoubin and Lengyel, M{\'a}t{\'e}},
  journal={arXiv preprint arXiv:1112.5745},
  year={2011}
}
"""


class MutualInformation(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, [inputs.NUMBERS, inputs.SAMPLES], _CITATION)

    def _compute(self, predictions):
        return {"mutual_information": inputs.mean_measure("mutual_information", predictions)}
