"""False positive rate at 95 % true positive rate of a score that should find errors or other text.

`predictions` is an uncertainty, higher is less certain; `references` is 1 for what should be uncertain (an error, a
window of another text) and 0 for the rest.
"""

import evaluate

from hf_variational.evaluation import ranking
from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@inproceedings{liang2018enhancing,
  title={Enhancing the Reliability of Out-of-Distribution Image Detection in Neural Networks},
  author={Liang, Shiyu and Li, Yixuan and Srikant, R.},
  booktitle={International Conference on Learning Representations},
  year={2018}
}
"""
_ARGUMENTS = "tpr (float, 0.95): the true positive rate."


class FprAtTpr(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.PAIRS, _CITATION, _ARGUMENTS)

    def _compute(self, predictions, references, tpr=0.95):
        return {"fpr_at_tpr": ranking.fpr_at_tpr(*inputs.sides(predictions, references), tpr)}
