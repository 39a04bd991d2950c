"""Trained networks as files for other engines."""

from .exporting import Exported, export_model

__all__ = ["Exported", "export_model"]
