"""Classwise calibration error: the gap between probability and share of each class, over bins and classes.

`predictions` is the probabilities of all classes, `references` the class. What is added is kept: for a vocabulary use
`hf_variational.evaluation.ClasswiseCalibration`, which keeps classes times bins.
"""

import evaluate
import torch

from hf_variational.evaluation import calibration
from hf_variational.evaluation.metrics import inputs

_CITATION = r"""
@inproceedings{kull2019beyond,
  title={Beyond Temperature Scaling: Obtaining Well-Calibrated Multi-Class Probabilities with {Dirichlet} Calibration},
  author={Kull, Meelis and Perello Nieto, Miquel and K{\"a}ngsepp, Markus and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}
"""
_ARGUMENTS = "num_bins (int, 15): equal-width bins."


class ClasswiseCalibrationError(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.CLASSES, _CITATION, _ARGUMENTS)

    def _compute(self, predictions, references, num_bins=15):
        classwise = calibration.ClasswiseCalibration(num_bins)
        classwise.update(torch.tensor(predictions, dtype=torch.float64), torch.tensor(references))
        return {"classwise_calibration_error": classwise.compute()}
