"""The attention inside grids where a kernel of our own makes it: in training on GPUs and processors, and in inference
on GPUs; the plain path runs wherever none fits or it is faster."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attention import LocalStep
from ..attention import grid_attention as plain
from .gpu.runs import fastest, fits
from .steps import grid_attention, trainable

__all__ = ["KernelLocalStep", "takes_grids"]


class KernelLocalStep(LocalStep):
    """:class:`transcnn.attention.LocalStep` that trains with a kernel wherever there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # (B, H, W, 3C)
        own = x.permute(0, 2, 3, 1)
        if own.dtype == qkv.dtype and takes_grids(own, self.head_dim, self.grid_size):
            from .gpu.grids import grid_attention as fused

            return self.grid_norm(fused(qkv, self.head_dim, self.grid_size, own).permute(0, 3, 1, 2))
        if trainable(qkv, self.head_dim):
            out = grid_attention(qkv, self.head_dim, self.grid_size).permute(0, 3, 1, 2)
        else:
            out = plain(qkv.permute(0, 3, 1, 2), self.head_dim, self.grid_size)
        return self.grid_norm(x + out)


def takes_grids(like: Tensor, head_dim: int, size: int) -> bool:
    """Whether the kernel for GPUs attends inside the grids of maps (B, H, W, C) like this one.

    It and the plain path are timed at the first call with a new shape, with the backward pass where gradients are on.
    """
    if not fits(like):
        return False
    from .gpu.grids import supports

    if not supports(like.dtype, head_dim, size):
        return False
    key = ("grids", tuple(like.shape), like.dtype, head_dim, size, torch.is_grad_enabled())
    return fastest(key, lambda: _ways(like, head_dim, size)) == 0


def _ways(like: Tensor, head_dim: int, size: int) -> list[Callable[[], object]]:
    """The kernel and the plain path, on zeros."""
    from .gpu.grids import grid_attention as fused

    batch, height, width, channels = like.shape
    qkv = torch.zeros(batch, height, width, 3 * channels, dtype=like.dtype, device=like.device)
    qkv.requires_grad_(torch.is_grad_enabled())
    own = torch.zeros_like(qkv[..., :channels])

    def run(attend: Callable[[], Tensor]) -> None:
        out = attend()
        if qkv.requires_grad:
            torch.autograd.grad(out, qkv, out.detach())

    def usual() -> Tensor:
        return own + plain(qkv.permute(0, 3, 1, 2), head_dim, size).permute(0, 2, 3, 1)

    return [lambda: run(lambda: fused(qkv, head_dim, size, own)), lambda: run(usual)]
