"""Existing models made variational: attention through transformers' attention interface."""

from .convert import add_variational_attention
from .model import VariationalMixin, variational_class

__all__ = ["VariationalMixin", "add_variational_attention", "variational_class"]
