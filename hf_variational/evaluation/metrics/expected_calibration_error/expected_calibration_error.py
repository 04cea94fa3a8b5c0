"""Expected calibration error: Σ_b n_b / n · |accuracy_b − confidence_b| over bins of the confidence.

`predictions` is the probability of the predicted token, `references` whether it was right, 0 or 1.
"""

import evaluate

from hf_variational.evaluation import calibration
from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@inproceedings{naeini2015obtaining,
  title={Obtaining Well Calibrated Probabilities Using Bayesian Binning},
  author={Naeini, Mahdi Pakdaman and Cooper, Gregory F. and Hauskrecht, Milos},
  booktitle={AAAI Conference on Artificial Intelligence},
  year={2015}
}
"""
_ARGUMENTS = """num_bins (int, 15): bins.
binning (str, "width"): "width" for equal-width bins, "mass" for equally filled ones."""


class ExpectedCalibrationError(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.PAIRS, _CITATION, _ARGUMENTS)

    def _compute(self, predictions, references, num_bins=15, binning="width"):
        error = calibration.expected_calibration_error(predictions, references, num_bins, binning)
        return {"expected_calibration_error": error}
