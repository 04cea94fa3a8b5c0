"""Bits per byte of the text: Σ NLL / (ln 2 · bytes), which does not depend on the tokenizer.

`predictions` is the log-probability of each token that came, nats. `references` is the UTF-8 bytes of each.
"""

import evaluate

from hf_variational.evaluation import likelihood
from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@article{gao2020pile,
  title={The {Pile}: An {800GB} Dataset of Diverse Text for Language Modeling},
  author={Gao, Leo and Biderman, Stella and Black, Sid and others},
  journal={arXiv preprint arXiv:2101.00027},
  year={2020}
}
"""


class BitsPerByte(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.PAIRS, _CITATION)

    def _compute(self, predictions, references):
        return {"bits_per_byte": likelihood.bits_per_byte(-predictions, references)}
