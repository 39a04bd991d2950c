"""The local step of H-MHSA in training, by a Triton or a C++ kernel where one fits.

The kernels take maps (B, H, W, C) with square grids. A sequence is a map of one row; the grids of a volume that it
divides into are cut out, each a map of its own. PyTorch's operations run where grids differ by axis, where a volume
doesn't divide, and where there is a mask.
"""

from __future__ import annotations

import math

from torch import Tensor

from ...attention import LocalStep
from ...attention import grid_attention as plain
from ...grids import channels_first, channels_last, cut_into_grids, join_grids
from ..dispatch import eager_cpu, to_nchw, uses_triton_grids
from ..limits import refuse_fx
from .attention import added_by_kernel, fits_training, grid_attention

__all__ = ["KernelLocalStep"]


class KernelLocalStep(LocalStep):
    """:class:`transcnn.attention.LocalStep` that trains with a kernel where one fits."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        refuse_fx(x)
        size = self.grid_size
        if mask is not None or not isinstance(size, int):
            return super().forward(x, mask)
        qkv = self.qkv(self.norm(x))
        tokens = channels_last(qkv)  # (B, *S, 3C)
        if x.ndim == 4:
            residual = channels_last(x)
            if residual.dtype == qkv.dtype and uses_triton_grids(residual, self.head_dim, size):
                from ..triton import local_attention

                return self.grid_norm(to_nchw(local_attention.grid_attention(tokens, self.head_dim, size, residual)))
            if fits_training(tokens, self.head_dim) and added_by_kernel(residual, tokens):
                return self.grid_norm(to_nchw(grid_attention(tokens, self.head_dim, size, residual)))
            fits = fits_training(tokens, self.head_dim)
            out = to_nchw(grid_attention(tokens, self.head_dim, size)) if fits else None
        elif x.ndim == 3:
            tokens = tokens.contiguous()  # PyTorch has no channels-last for sequences
            fits = fits_training(tokens, self.head_dim)
            out = channels_first(grid_attention(tokens[:, None], self.head_dim, size)[:, 0]) if fits else None
        else:
            out = self._attend_in_volume(qkv, size)
        if out is None:
            out = plain(qkv, self.head_dim, size, self.fused_attn)
        return self.grid_norm(x + out)

    def _attend_in_volume(self, qkv: Tensor, size: int) -> Tensor | None:
        """(B, 3C, D, H, W) -> (B, C, D, H, W), if it divides into grids and the kernel runs on those."""
        if not eager_cpu(qkv) or any(side % size for side in qkv.shape[2:]) or not qkv.numel():
            return None
        rows, _ = cut_into_grids(qkv, size)  # (B·G, N, 3C)
        rows = rows[:, None]  # each grid a row of its own
        if not fits_training(rows, self.head_dim):
            return None
        out = grid_attention(rows, self.head_dim, math.prod((size,) * 3))[:, 0]
        return join_grids(out, size, len(qkv), qkv.shape[2:])
