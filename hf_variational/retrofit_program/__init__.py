"""`hf-variational retrofit`: a pretrained model is made variational, and measured before and after.

It joins retrofit, training, evaluation, hub and presentation, so nothing but the command line imports it.
"""

from .program import run

__all__ = ["run"]
