"""Mean negative log-likelihood per token, nats: the logarithmic score, lower is better.

`predictions` is the log-probability of each token that came, nats.
"""

import evaluate

from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@article{good1952rational,
  title={Rational Decisions},
  author={Good, I. J.},
  journal={Journal of the Royal Statistical Society, Series B},
  volume={14},
  year={1952}
}
"""


class Nll(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.NUMBERS, _CITATION)

    def _compute(self, predictions):
        return {"nll": -float(predictions.mean())}
