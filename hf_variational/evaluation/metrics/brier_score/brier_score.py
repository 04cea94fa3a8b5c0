"""Brier score: the mean squared difference between probabilities and what came.

`predictions` is the probability of an event and `references` 0 or 1; or the probabilities of all classes and the class
that came, where the score is summed over classes, from 0 to 2.
"""

import evaluate
import torch
from sklearn.metrics import brier_score_loss

from hf_variational.evaluation import calibration
from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@article{brier1950verification,
  title={Verification of Forecasts Expressed in Terms of Probability},
  author={Brier, Glenn W.},
  journal={Monthly Weather Review},
  volume={78},
  year={1950}
}
"""


class BrierScore(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, [inputs.CLASSES, inputs.PAIRS], _CITATION)

    def _compute(self, predictions, references):
        probabilities = torch.tensor(predictions, dtype=torch.float64)
        if probabilities.dim() == 1:
            return {"brier_score": float(brier_score_loss(references, predictions, pos_label=1))}
        return {"brier_score": float(calibration.brier(probabilities, torch.tensor(references)).mean())}
