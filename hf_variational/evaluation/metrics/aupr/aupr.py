"""Area under the precision-recall curve (average precision) of a score that should find errors or other text.

`predictions` is an uncertainty, higher is less certain; `references` is 1 for what should be uncertain (an error, a
window of another text) and 0 for the rest.
"""

import evaluate

from hf_variational.evaluation import ranking
from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@inproceedings{hendrycks2017baseline,
  title={A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks},
  author={Hendrycks, Dan and Gimpel, Kevin},
  booktitle={International Conference on Learning Representations},
  year={2017}
}
"""


class Aupr(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.PAIRS, _CITATION)

    def _compute(self, predictions, references):
        return {"aupr": ranking.aupr(*inputs.sides(predictions, references))}
