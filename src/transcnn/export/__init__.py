"""Trained networks as files for other engines: written, checked against the network, and in 8 bits where that pays."""

from .command import Exported, export, export_model

__all__ = ["Exported", "export", "export_model"]
