"""BatchNorm and GroupNorm that train by C++ or Triton kernels, alone or with the SiLU after them.

PyTorch's read and write a map several times more. Here statistics, result and gradient of an image (of a batch, where
it fits) are computed while it is in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...grids import channels_last
from ..cpu import norms as cpu
from ..dispatch import eager_cpu, fits_cpu, globally_hooked, hooked, own_nchw, to_nchw, to_nhwc
from ..limits import first_order, refuse_fx
from .layers import uses_triton

__all__ = ["KernelBatchNorm2d", "KernelGroupNorm", "run_fused", "track"]

MIN_NUMEL = 2**18  # of a map on a CPU; below, calling these kernels takes longer than they save
Norm = nn.BatchNorm2d | nn.GroupNorm


class KernelBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics and gradients take one pass over the map each, (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        refuse_fx(input)
        supported = self.training and self.affine and torch.is_grad_enabled()
        if not (supported and input.ndim == 4 and input.shape[1] == self.num_features):
            return super().forward(input)
        if self.momentum is not None and uses_triton(input):
            from ..triton.autograd import batch_norm

            return batch_norm(input, self)
        return _batch_norm(self, input, silu=False) if _fits(self, input, silu=False) else super().forward(input)


class KernelGroupNorm(nn.GroupNorm):
    """GroupNorm whose statistics and gradients take one pass over the map each, (B, C, *S) -> (B, C, *S)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        refuse_fx(input)
        return _group_norm(self, input, silu=False) if _fits(self, input, silu=False) else super().forward(input)


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def run_fused(layers: Iterable[nn.Module], x: Tensor, run: Callable[[nn.Module, Tensor], Tensor] = _call) -> Tensor:
    """``x`` through these layers by ``run``, each SiLU together with the norm before it where a kernel knows both."""
    waiting = list(layers)
    while waiting:
        layer = waiting.pop(0)
        if waiting and _fuses(layer, waiting[0]) and _fits(layer, x, silu=True):  # pyright: ignore
            waiting.pop(0)
            kernel = _batch_norm if isinstance(layer, nn.BatchNorm2d) else _group_norm
            x = kernel(layer, x, silu=True)  # pyright: ignore
        else:
            x = run(layer, x)
    return x


def _fuses(norm: nn.Module, act: nn.Module) -> bool:
    own = type(norm) is KernelGroupNorm or (type(norm) is KernelBatchNorm2d and norm.training)
    return own and type(act) is nn.SiLU and not act.inplace and not (hooked(norm) or hooked(act) or globally_hooked())


def track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, positions: int) -> None:
    """Let a norm's running statistics follow those of a batch of so many positions, (C) both."""
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    momentum = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((variance * (positions / (positions - 1))).to(norm.running_var.dtype), momentum)


def _gains(norm: Norm, x: Tensor, silu: bool) -> bool:
    """Whether the C++ kernels take less time than PyTorch, with a SiLU after the norm or alone."""
    slow = isinstance(norm, nn.GroupNorm) and x.dtype == torch.float32 and not silu
    return x.numel() >= MIN_NUMEL and not slow


def _fits(norm: Norm, x: Tensor, silu: bool) -> bool:
    """Whether the C++ kernels train this norm on maps like this one, and faster than PyTorch."""
    weight, bias = norm.weight, norm.bias
    if not eager_cpu(x):  # first of all: whatever exports would hold the sizes to be those that are compared here
        return False
    if weight is None or bias is None or not torch.is_grad_enabled() or x.ndim < 4 or not _gains(norm, x, silu):
        return False
    fits = weight.dtype == bias.dtype == torch.float32 and weight.device.type == "cpu"
    if not (fits and fits_cpu(x, x.shape[1], gemm=False) and x.shape[1] == len(weight)):
        return False
    apart = len(x) * norm.num_groups if isinstance(norm, nn.GroupNorm) else len(weight)  # means
    return x.numel() > apart and channels_last(x).is_contiguous()


def _batch_norm(norm: nn.BatchNorm2d, x: Tensor, silu: bool) -> Tensor:
    return _BatchNorm.apply(x, norm.weight, norm.bias, norm, silu)  # pyright: ignore


def _group_norm(norm: nn.GroupNorm, x: Tensor, silu: bool) -> Tensor:
    options = norm.num_groups, norm.eps, silu
    return _GroupNorm.apply(x, norm.weight, norm.bias, *options)  # pyright: ignore


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, silu: bool) -> Tensor:
        x = channels_last(x)
        weight, bias = (t.detach().contiguous() for t in (weight, bias))
        y, statistics = cpu.batch_norm_forward(x, weight, bias, norm.eps, silu)
        track(norm, statistics[0], statistics[2], x.shape[:-1].numel())
        ctx.save_for_backward(x, statistics)
        ctx.silu = silu
        return own_nchw(y)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, statistics = ctx.saved_tensors
        dx, *found = cpu.batch_norm_backward(x, to_nhwc(grads[0].to(x.dtype)), statistics, ctx.silu)
        return to_nchw(dx), *found, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        x = channels_last(x)
        weight, bias = torch.stack([weight.detach(), bias.detach()])  # which may change before the backward pass
        y, statistics = cpu.group_norm_forward(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.silu = silu
        return own_nchw(y)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, bias, statistics = ctx.saved_tensors
        found = cpu.group_norm_backward(x, to_nhwc(grads[0].to(x.dtype)), weight, bias, statistics, ctx.silu)
        return to_nchw(found[0]), found[1].to(weight.dtype), found[2].to(bias.dtype), None, None, None
