"""Where a network looks, and what it goes by: attention maps, rollout, class maps, their scores, and one figure."""

from .classes import grad_cam, gradient_attention
from .maps import AttentionMap, attention_maps
from .rollout import attention_rollout
from .scores import Scores, deletion_insertion

__all__ = [
    "AttentionMap",
    "Scores",
    "attention_maps",
    "attention_rollout",
    "deletion_insertion",
    "grad_cam",
    "gradient_attention",
]
