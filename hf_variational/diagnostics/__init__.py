"""Diagnostics: what the units of a variational model do, and where they should be."""

from .band import Band, BandShares

__all__ = ["Band", "BandShares"]
