"""Which kernel makes the attention inside grids.

On a GPU it is that of :mod:`transcnn.kernels.grid_triton` where it is there, fits and wins; in training on a processor
that of :mod:`transcnn.kernels.steps`; the plain path else.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..attention import LocalStep
from ..attention import grid_attention as plain
from .steps import grid_attention, trainable

__all__ = ["KernelLocalStep", "grid_kernel"]

Kernel = Callable[..., Tensor]  # qkv (B, H, W, 3C), head_dim, grid size, scale of the scores -> (B, H, W, C)


class KernelLocalStep(LocalStep):
    """:class:`transcnn.attention.LocalStep` that trains with a kernel wherever there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # (B, H, W, 3C)
        kernel = grid_kernel(qkv[..., : x.shape[1]], self.head_dim, self.grid_size)
        if kernel is None and trainable(qkv, self.head_dim):
            kernel = grid_attention
        if kernel is None:
            out = plain(qkv.permute(0, 3, 1, 2), self.head_dim, self.grid_size)
        else:
            out = kernel(qkv, self.head_dim, self.grid_size).permute(0, 3, 1, 2)
        return self.grid_norm(x + out)


def grid_kernel(like: Tensor, head_dim: int, size: int) -> Kernel | None:
    """The kernel for maps (B, H, W, C) like this one; None where there is none or the plain path is faster.

    Both are timed at the first call with a new shape; that costs some milliseconds.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (like.is_cuda or interpreted):
        return None
    try:
        from . import grid_triton
    except ImportError:
        return None
    if not grid_triton.supports(like.dtype, head_dim, size):
        return None
    if interpreted or _wins(tuple(like.shape), like.dtype, like.device, head_dim, size, torch.is_grad_enabled()):
        return grid_triton.grid_attention
    return None


@functools.lru_cache(maxsize=4096)
def _wins(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, head_dim: int, size: int, backward: bool
) -> bool:
    """Time both on zeros of this shape, with the backward pass where gradients are on; the kernel must not fail."""
    from .grid_triton import grid_attention as fused

    qkv = torch.zeros(*shape[:3], 3 * shape[3], dtype=dtype, device=device)

    def usual(qkv: Tensor, head_dim: int, size: int) -> Tensor:
        return plain(qkv.permute(0, 3, 1, 2), head_dim, size).permute(0, 2, 3, 1)

    def seconds(attend: Kernel) -> float:
        leaf = qkv.detach().requires_grad_(backward)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for i in range(8):
            if i == 3:
                start.record()
            out = attend(leaf, head_dim, size)
            if backward:
                torch.autograd.grad(out, leaf, out.detach())
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)

    try:
        with torch.cuda.device(device):
            return seconds(fused) < seconds(usual)
    except Exception:  # an old GPU, too little shared memory, a Triton that doesn't fit: the plain path always runs
        return False
