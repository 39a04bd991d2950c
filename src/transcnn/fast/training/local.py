"""The local step of H-MHSA in training, by a Triton or a C++ kernel where one fits."""

from __future__ import annotations

from torch import Tensor

from ...attention import LocalStep
from ...attention import grid_attention as plain
from ..dispatch import to_nchw, uses_triton_grids
from ..limits import refuse_fx
from .attention import fits_training, grid_attention

__all__ = ["KernelLocalStep"]


class KernelLocalStep(LocalStep):
    """:class:`transcnn.attention.LocalStep` that trains with a kernel where one fits."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        refuse_fx(x)
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # (B, H, W, 3C)
        residual = x.permute(0, 2, 3, 1)
        if residual.dtype == qkv.dtype and uses_triton_grids(residual, self.head_dim, self.grid_size):
            from ..triton import local_attention

            a = local_attention.grid_attention(qkv, self.head_dim, self.grid_size, residual)
            return self.grid_norm(to_nchw(a))
        if fits_training(qkv, self.head_dim):
            out = to_nchw(grid_attention(qkv, self.head_dim, self.grid_size))
        else:
            out = plain(to_nchw(qkv), self.head_dim, self.grid_size, self.fused_attn)
        return self.grid_norm(x + out)
