"""The one place where peft's registry of methods is extended.

peft 0.21 has a function to register a method, but only for names that stand in an enumeration that is closed.
"""

import warnings

from peft import PeftType, __version__
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import register_peft_method

NAME = "EVE"
# The adapters' parameters stand under names that begin with it.
PREFIX = "eve_"


def register(config_class: type, model_class: type) -> bool:
    """Registers the method `"EVE"` with peft.

    Returns:
        Whether peft knows it now. If not, a warning says why; the rest of the package does not need it.
    """
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(NAME) is config_class:
        return True
    try:
        if NAME in PeftType.__members__:
            raise ValueError(f"another method has the name {NAME!r}")
        if not hasattr(BaseTuner, "_get_adapter_state_dict"):
            raise ValueError("a method does not say yet how it is saved")
        _add_member(NAME)
        register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix=PREFIX)
    except Exception as error:
        warnings.warn(
            f"peft {__version__} does not take the method {NAME!r} ({type(error).__name__}: {error}), so adapters of "
            "hf_variational neither train nor load here: update hf-variational, or install peft 0.21 or newer.",
            stacklevel=2,
        )
        return False
    return True


def _add_member(name: str) -> None:
    """Adds a member whose value is its name to `PeftType`."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
