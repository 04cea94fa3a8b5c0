"""Prediction-rejection ratio: 1 for the oracle's order of rejection, 0 for a random one.

`predictions` is an uncertainty, higher is less certain; `references` is the loss, 0 or 1 for an error or a real
number such as the NLL.
"""

import evaluate

from hf_variational.evaluation import ranking
from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@inproceedings{malinin2021uncertainty,
  title={Uncertainty Estimation in Autoregressive Structured Prediction},
  author={Malinin, Andrey and Gales, Mark},
  booktitle={International Conference on Learning Representations},
  year={2021}
}
"""


class PredictionRejectionRatio(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.PAIRS, _CITATION)

    def _compute(self, predictions, references):
        return {"prediction_rejection_ratio": ranking.prediction_rejection_ratio(predictions, references)}
