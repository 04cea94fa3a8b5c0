"""Sharing a checkpoint: its card, its code, and the push to the Hub."""

from .cards import model_card
from .save import push_to_hub, save_for_hub, write_model_card

__all__ = ["model_card", "push_to_hub", "save_for_hub", "write_model_card"]
