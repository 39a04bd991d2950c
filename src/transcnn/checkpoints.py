"""Reading weights: the published layouts, our own files, Lightning checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# The published layout's names -> ours, tried in order; names that none matches stay.
_RENAMES = [
    (r"^patch_embed\.(\d+)\.", r"stem.\1."),
    (r"^blocks\.(\d+)\.(\d+)\.conv\.", r"stages.\1.blocks.\2.irb."),
    (r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^classifier\.1\.", "head.fc."),
]


def convert_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    return state_dict
