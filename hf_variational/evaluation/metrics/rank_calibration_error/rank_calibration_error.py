"""Rank-calibration error: whether more uncertainty goes with a larger mean loss, however both are scaled.

`predictions` is an uncertainty, higher is less certain; `references` is the loss, 0 or 1 for an error or a real
number such as the NLL.
"""

import evaluate

from hf_variational.evaluation import calibration
from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@inproceedings{huang2024uncertainty,
  title={Uncertainty in Language Models: Assessment through Rank-Calibration},
  author={Huang, Xinmeng and Li, Shuo and Yu, Mengxin and others},
  booktitle={Conference on Empirical Methods in Natural Language Processing},
  year={2024}
}
"""
_ARGUMENTS = "num_bins (int, 20): equally filled bins of the uncertainty."


class RankCalibrationError(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.PAIRS, _CITATION, _ARGUMENTS)

    def _compute(self, predictions, references, num_bins=20):
        return {"rank_calibration_error": calibration.rank_calibration_error(predictions, references, num_bins)}
