"""Perplexity: exp of the mean negative log-likelihood per token, of one tokenizer.

`predictions` is the log-probability of each token that came, nats.
"""

import math

import evaluate

from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@article{jelinek1977perplexity,
  title={Perplexity -- a Measure of the Difficulty of Speech Recognition Tasks},
  author={Jelinek, Fred and Mercer, Robert L. and Bahl, Lalit R. and Baker, James K.},
  journal={Journal of the Acoustical Society of America},
  volume={62},
  year={1977}
}
"""


class Perplexity(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.NUMBERS, _CITATION)

    def _compute(self, predictions):
        return {"perplexity": math.exp(-predictions.mean())}
