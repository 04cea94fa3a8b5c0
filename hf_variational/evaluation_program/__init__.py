"""`hf-variational evaluate --output`: a model and its baselines measured on text, in a report.

It joins evaluation, baselines, training's readers and presentation, so nothing but the command line imports it.
"""

from .program import run

__all__ = ["run"]
