"""The demo: a deterministic model and an EVE model of the same size, trained on the same text and compared.

Both start from the same weights and see the same batches in the same order for as many steps. The text is what every
CPython carries, so nothing is downloaded.
"""

from .output import prepare_output
from .settings import DemoSettings
from .texts import DemoTexts, demo_texts

__all__ = ["DemoSettings", "DemoTexts", "demo_texts", "prepare_output"]
