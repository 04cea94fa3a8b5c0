"""EVE as a PEFT method: the base stays frozen and unshipped, an adapter holds the posterior.

Importing it registers the method `"EVE"` with peft, which `import hf_variational` does where peft is installed.
"""

from .config import EVEAdapterConfig
from .layer import EVELayer
from .model import EVEModel
from .registration import register

register(EVEAdapterConfig, EVEModel)

__all__ = ["EVEAdapterConfig", "EVELayer", "EVEModel"]
