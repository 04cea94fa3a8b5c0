"""Top-1 flip rate: share of the posterior samples whose most probable token is not the mean distribution's.

`predictions` is its value for each token, as a model of hf_variational gives it, or the probabilities of all samples,
[samples, classes] for each token.
"""

import evaluate

from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@article{ruffenach2026variational,
  title={Variational Neurons in Transformers for Language Modeling},
  author={Ruffenach},
  journal={arXiv preprint arXiv:2603.28219},
  year={2026}
}
"""


class Top1FlipRate(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, [inputs.NUMBERS, inputs.SAMPLES], _CITATION)

    def _compute(self, predictions):
        return {"top1_flip_rate": inputs.mean_measure("top1_flip_rate", predictions)}
