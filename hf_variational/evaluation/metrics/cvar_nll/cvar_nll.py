"""Conditional value at risk of the NLL: its mean over the worst tokens, nats.

`predictions` is the log-probability of each token that came, nats.
"""

import evaluate
import torch

from hf_variational.evaluation import likelihood
from hf_variational.evaluation.metrics import inputs

_CITATION = """\
@article{rockafellar2000optimization,
  title={Optimization of Conditional Value-at-Risk},
  author={Rockafellar, R. Tyrrell and Uryasev, Stanislav},
  journal={Journal of Risk},
  volume={2},
  year={2000}
}
"""
_ARGUMENTS = "fraction (float, 0.05): share of the tokens in the tail."


class CvarNll(evaluate.Metric):
    def _info(self):
        return inputs.module_info(__doc__, inputs.NUMBERS, _CITATION, _ARGUMENTS)

    def _compute(self, predictions, fraction=0.05):
        return {"cvar_nll": likelihood.conditional_value_at_risk(torch.from_numpy(-predictions), fraction)}
