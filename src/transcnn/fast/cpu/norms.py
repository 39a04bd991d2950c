"""GroupNorm and BatchNorm in training as functions of tensors, by C++ kernels, alone or with the SiLU after them.

Maps are (B, *S, C) and contiguous, C a multiple of 16, weights and biases (C) in fp32.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from . import call as cpu
from .call import FP32, Checked, any_size, require, thread_sums

__all__ = ["batch_norm_backward", "batch_norm_forward", "group_norm_backward", "group_norm_forward"]


def group_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """GroupNorm, with SiLU if wanted.

    Returns:
        The result (B, *S, C), and mean and 1/σ of each group, (B, groups, 2) in fp32.
    """
    sizes = _sizes("group_norm_forward", x, groups)
    y, statistics, least = torch.empty_like(x), _fp32(x, len(x), groups, 2), ctypes.c_float(eps)
    cpu.call(
        "group_norm_forward",
        x.dtype,
        any_size("x", x),
        any_size("y", y),
        *_by_channel(x, weight, bias),
        ("statistics", statistics, FP32, (len(x), groups, 2)),
        *(least, *sizes, groups, silu),
    )
    return y, statistics


def group_norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, silu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``x``, ``weight`` and ``bias``, the latter two in double precision."""
    groups = statistics.shape[1]
    sizes, dx, found = _sizes("group_norm_backward", x, groups), torch.empty_like(x), thread_sums(x)
    cpu.call(
        "group_norm_backward",
        x.dtype,
        any_size("x", x),
        ("grad", grad, x.dtype, tuple(x.shape)),
        any_size("dx", dx),
        *_by_channel(x, weight, bias),
        ("statistics", statistics, FP32, (len(x), groups, 2)),
        ("found", found, torch.double, (len(found), 2, x.shape[-1])),
        *(*sizes, groups, silu),
        threads=len(found),
    )
    of_bias, of_weight = found.sum(0)
    return dx, of_weight, of_bias


def batch_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """BatchNorm by the batch's own statistics, with SiLU if wanted.

    Returns:
        The result (B, *S, C), and mean, 1/σ, variance, scale and shift, (5, C) in fp32.
    """
    y, sums, statistics, least = torch.empty_like(x), thread_sums(x), _fp32(x, 5, x.shape[-1]), ctypes.c_float(eps)
    batch, positions, channels = _sizes("batch_norm_forward", x)
    cpu.call(
        "batch_norm_forward",
        x.dtype,
        *(any_size("x", x), any_size("y", y)),
        *_by_channel(x, weight, bias),
        ("statistics", statistics, FP32, (5, channels)),
        ("sums", sums, torch.double, (len(sums), 2, channels)),
        *(least, batch * positions, channels, silu),
        threads=len(sums),
    )
    return y, statistics


def batch_norm_backward(
    x: Tensor, grad: Tensor, statistics: Tensor, silu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``x``, of the weight and of the bias, the latter two in fp32."""
    dx, sums, factors, found = torch.empty_like(x), thread_sums(x), _fp32(x, 2, x.shape[-1]), _fp32(x, 2, x.shape[-1])
    batch, positions, channels = _sizes("batch_norm_backward", x)
    cpu.call(
        "batch_norm_backward",
        x.dtype,
        any_size("x", x),
        ("grad", grad, x.dtype, tuple(x.shape)),
        any_size("dx", dx),
        ("statistics", statistics, FP32, (5, channels)),
        ("factors", factors, FP32, (2, channels)),
        ("found", found, FP32, (2, channels)),
        ("sums", sums, torch.double, (len(sums), 2, channels)),
        *(batch * positions, channels, silu),
        threads=len(sums),
    )
    return dx, found[1].clone(), found[0].clone()  # which an optimizer keeps, each with memory of its own


def _by_channel(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Checked, Checked]:
    channels = (x.shape[-1],)
    return ("weight", weight, FP32, channels), ("bias", bias, FP32, channels)


def _sizes(kernel: str, x: Tensor, groups: int = 1) -> tuple[int, int, int]:
    batch, *sides, channels = x.shape
    require(channels % 16 == 0 and groups > 0 and channels % groups == 0, kernel, channels, groups)
    return batch, math.prod(sides), channels


def _fp32(x: Tensor, *shape: int) -> Tensor:
    """Memory where x is, whatever PyTorch's default dtype and device are."""
    return x.new_empty(shape, dtype=FP32)
