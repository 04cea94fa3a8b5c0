"""`hf-variational inspect`: what the units of a model do on a text, as a table, a page and a file of numbers.

It joins diagnostics, training's readers and presentation, so nothing but the command line imports it.
"""

from .program import run

__all__ = ["run"]
