"""Hierarchical multi-head self-attention (H-MHSA) in convolutional networks."""

from .attention import HMHSA
from .backbone import TransCNN

__version__ = "0.1.0"
__all__ = ["HMHSA", "TransCNN"]
