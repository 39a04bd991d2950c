"""Hierarchical multi-head self-attention (H-MHSA) in convolutional networks."""

from .attention import HMHSA
from .backbone import TransCNN, create_model, list_models
from .checkpoints import load_checkpoint

__version__ = "0.1.0"
__all__ = ["HMHSA", "TransCNN", "create_model", "list_models", "load_checkpoint"]
