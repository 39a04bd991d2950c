"""What takes a pass or two over a map, by C++ kernels: norms, squeeze-and-excitation, pooling."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import call as cpu
from .activations import IDENTITY, SIGMOID, SILU, Activation, CActivation, activation
from .call import FP32, any_size, optional, require
from .inference import Affine

__all__ = ["CSqueeze", "Window", "average_pool", "group_norm", "layer_norm", "max_pool", "squeeze", "squeeze_struct"]


class CSqueeze(ctypes.Structure):
    """The struct of squeeze.h."""

    _fields_ = (
        ("reduce", ctypes.c_void_p),
        ("reduce_bias", ctypes.c_void_p),
        ("expand", ctypes.c_void_p),
        ("expand_bias", ctypes.c_void_p),
        ("squeezed", ctypes.c_long),
        ("images", ctypes.c_long),
        ("act", CActivation),
        ("gate", CActivation),
    )
    weights: Any = None  # that it points to


class Window(NamedTuple):
    """Of a pooling layer; as many rows and columns of padding after the map as before."""

    size: int
    stride: int
    padding: tuple[int, int] = (0, 0)  # above and before


class _Pool(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_long)
        for name in (
            *("batch", "height", "width", "channels", "down", "across"),
            *("size", "stride", "above", "before"),
        )
    )


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: Activation = IDENTITY,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """act(GroupNorm(1, C)(x)) + residual, (B, *S, C) -> (B, *S, C), with weight and bias (C) in fp32.

    ``out``, where the result is written, may be ``x`` or ``residual``.
    """
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    residual = None if residual is None else residual.to(x.dtype).contiguous()
    batch, channels, shape = len(x), x.shape[-1], tuple(x.shape)
    kind, least = activation(act), ctypes.c_float(eps)
    cpu.call(
        "group_norm",
        x.dtype,
        ("x", x, x.dtype, shape),
        optional("residual", residual, x.dtype, shape),
        ("out", out, x.dtype, shape),
        ("weight", weight, FP32, (channels,)),
        ("bias", bias, FP32, (channels,)),
        *(least, kind, batch, math.prod(shape[1:-1]), channels),
    )
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the channels, (..., C) -> (..., C), with weight and bias (C) in fp32."""
    x = x.contiguous()
    channels, shape, least = x.shape[-1], tuple(x.shape), ctypes.c_float(eps)
    out = torch.empty_like(x)
    cpu.call(
        "layer_norm",
        x.dtype,
        ("x", x, x.dtype, shape),
        ("out", out, x.dtype, shape),
        ("weight", weight, FP32, (channels,)),
        ("bias", bias, FP32, (channels,)),
        *(least, x.numel() // channels, channels),
    )
    return out


def squeeze(
    x: Tensor,
    weights: tuple[Affine, Affine],
    acts: tuple[Activation, Activation] = (SILU, SIGMOID),
    out: Tensor | None = None,
) -> Tensor:
    """Squeeze-and-excitation, (B, H, W, C) -> (B, H, W, C).

    Args:
        x: The map.
        weights: Packed by :func:`.inverted_residual.pack_squeeze`.
        acts: After the first product and after the second.
        out: Where the result is written, which may be ``x``.
    """
    x = x.contiguous()
    batch, height, width, channels = shape = tuple(x.shape)
    hidden = len(weights[1][1])
    require(channels <= hidden < channels + cpu.PANEL, "squeeze", channels, hidden)
    struct = squeeze_struct("squeeze", weights, acts, batch)
    out = torch.empty_like(x) if out is None else out
    given = ("x", x, x.dtype, shape), ("out", out, x.dtype, shape)
    cpu.call("squeeze", x.dtype, *given, struct, batch, height * width, channels, hidden)
    return out


def squeeze_struct(
    kernel: str, weights: tuple[Affine, Affine], acts: tuple[Activation, Activation], images: int
) -> CSqueeze:
    """What kernels get of packed weights."""
    (reduce, reduce_bias), (expand, expand_bias) = weights
    squeezed, hidden = len(reduce_bias), len(expand_bias)
    for name, weight, size in (
        ("reduce", reduce, (hidden, squeezed)),
        ("reduce bias", reduce_bias, (squeezed,)),
        ("excite", expand, (squeezed, hidden)),
        ("excite bias", expand_bias, (hidden,)),
    ):
        cpu.check(kernel, name, weight, FP32, size)
    require(squeezed % 16 == 0, kernel, squeezed)
    pointers = (w.data_ptr() for w in (reduce, reduce_bias, expand, expand_bias))
    made = CSqueeze(*pointers, squeezed, images, *map(activation, acts))
    made.weights = weights
    return made


def max_pool(x: Tensor, window: Window) -> Tensor:
    """(B, H, W, C) -> (B, H', W', C), as :class:`torch.nn.MaxPool2d`."""
    x = x.contiguous()
    batch, height, width, channels = x.shape
    size, stride, (above, before) = window
    require(stride >= 1, "max_pool", stride)
    down, across = (height + 2 * above - size) // stride + 1, (width + 2 * before - size) // stride + 1
    fits = min(size, down, across) >= 1 and 0 <= 2 * min(above, before) <= 2 * max(above, before) <= size
    require(fits, "max_pool", size, stride, above, before, height, width)
    out = x.new_empty(batch, down, across, channels)
    sizes = _Pool(batch, height, width, channels, down, across, size, stride, above, before)
    given = any_size("x", x), ("out", out, x.dtype, tuple(out.shape))
    cpu.call("max_pool", x.dtype, *given, sizes)
    return out


def average_pool(x: Tensor, ratio: tuple[int, int]) -> Tensor:
    """The mean of each patch's real positions, (B, H, W, C) -> (B, ⌈H/r⌉, ⌈W/r'⌉, C)."""
    x = x.contiguous()
    batch, height, width, channels = x.shape
    require(min(ratio) >= 1, "average_pool", *ratio)
    out = x.new_empty(batch, -(-height // ratio[0]), -(-width // ratio[1]), channels)
    given = any_size("x", x), ("out", out, x.dtype, tuple(out.shape))
    cpu.call("average_pool", x.dtype, *given, batch, height, width, channels, *ratio)
    return out
