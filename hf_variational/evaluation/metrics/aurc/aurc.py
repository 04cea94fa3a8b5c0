"""Area under the risk-coverage curve: the mean risk over all shares of predictions that are accepted.

`predictions` is an uncertainty, higher is less certain; `references` is the loss, 0 or 1 for an error or a real
number such as the NLL.
"""

import evaluate

from hf_variational.evaluation import ranking
from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@inproceedings{geifman2019bias,
  title={Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers},
  author={Geifman, Yonatan and Uziel, Guy and El-Yaniv, Ran},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""


class Aurc(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.PAIRS, _CITATION)

    def _compute(self, predictions, references):
        return {"aurc": ranking.aurc(predictions, references)}
