"""Existing models made variational: their feed-forward networks, and their attention."""

from .classes import variational_class
from .convert import to_deterministic, variationalize
from .model import VariationalMixin
from .settings import VariationalSettings

__all__ = ["VariationalMixin", "VariationalSettings", "to_deterministic", "variational_class", "variationalize"]
