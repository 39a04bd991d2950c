"""The stem in training, its norm and SiLU one kernel on a CPU."""

from __future__ import annotations

from torch import Tensor

from ...blocks import Stem
from ...layers import strided
from ..limits import refuse_fx
from .norms import run_fused

__all__ = ["KernelStem"]


class KernelStem(Stem):
    """:class:`transcnn.blocks.Stem` that trains with kernels of this package where they fit."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W')."""
        refuse_fx(input)
        return run_fused(self, input, strided) if mask is None else super().forward(input, mask)
