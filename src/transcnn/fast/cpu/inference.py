"""The C++ kernels for inference as functions of tensors. :func:`..dispatch.fits_cpu` says what they can compute."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import call as cpu
from .activations import IDENTITY, SILU, Activation, activation
from .call import FP32, PANEL, Checked, depth_fits, heads_fit, optional, require, round_up

__all__ = [
    "Packed",
    "convolution",
    "downsample",
    "full_attention",
    "global_attention",
    "in_fp32",
    "local_attention",
    "pack_convolution",
    "pack_pointwise",
    "pack_stem",
    "packed_matrix",
    "pointwise",
    "stem",
]

Affine = tuple[Tensor, Tensor]  # weight and bias


class _Level(ctypes.Structure):
    _fields_ = (("map", ctypes.c_void_p), ("ratio", ctypes.c_long))


class _Images(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("sizes", ctypes.c_long * 4), ("strides", ctypes.c_long * 4))


class _Conv(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_long)
        for name in (
            *("batch", "height", "width", "channels", "out_height", "out_width", "outputs"),
            *("size", "stride", "above", "before"),
        )
    )


class Packed:
    """A module's weights in the layout that a kernel reads, packed at the first call and again whenever they changed.

    Changes are seen by the tensors' version counters, which ``tensor.data.mul_()`` and its like evade. Tensors that
    were made in inference mode have none, so they are packed at every call.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make, self._cached = make, None

    def __call__(self, *weights: Tensor | None) -> Any:
        """What ``make(*weights)`` gives."""
        cached = self._cached
        if cached is not None and all(map(_unchanged, cached[0], weights)):
            return cached[1]
        versions = None
        if not any(w is not None and w.is_inference() for w in weights):
            # References to the tensors keep their memory from being used by others, with the same address.
            versions = [None if w is None else (w.detach(), w._version) for w in weights]
        made = self._make(*weights)
        if versions is not None:
            self._cached = versions, made
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, (self._make,)  # a copy packs its own


def _unchanged(cached: tuple[Tensor, int] | None, weight: Tensor | None) -> bool:
    if cached is None or weight is None:
        return cached is weight
    tensor, version = cached
    same = weight.data_ptr() == tensor.data_ptr() and weight.dtype == tensor.dtype and not weight.is_inference()
    return same and weight._version == version


def in_fp32(*weights: Tensor) -> tuple[Tensor, ...]:
    """Scales and shifts as the kernels of norms take them."""
    return tuple(weight.float().contiguous() for weight in weights)


def pack_pointwise(weight: Tensor, bias: Tensor) -> Affine:
    """Weights (N, K) in transposed panels of 32 rows, zeros beyond N, in bf16 with pairs along K; the bias in fp32."""
    n, k = weight.shape
    weight = F.pad(weight, (0, 0, 0, -n % PANEL))
    pair = _pair(weight.dtype)
    return weight.view(-1, PANEL, k // pair, pair).transpose(1, 2).contiguous(), bias.float()


def pack_convolution(weight: Tensor, bias: Tensor | None) -> Affine:
    """The weights (N, C, k, k) of a convolution as :func:`convolution` takes them."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return pack_pointwise(weight.permute(0, 2, 3, 1).flatten(1), bias)


def convolution(
    x: Tensor,
    matrix: Affine,
    size: int = 1,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    act: Activation = IDENTITY,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """act(conv(x) + residual), (B, H, W, C) -> (B, H', W', C').

    Args:
        x: The map.
        matrix: Weights (C', C, k, k) packed by :func:`pack_convolution`.
        size, stride: Of the kernel, both ways.
        padding: Rows of zeros above and below the map, and columns before and after it.
        act: The activation.
        residual: (B, H', W', C').
        out: Where the result is written, which may be ``residual``.
    """
    x = x.contiguous()
    batch, height, width, channels = shape = tuple(x.shape)
    outputs, dtype = len(matrix[1]), x.dtype
    require(min(size, stride) >= 1 and min(padding) >= 0, "convolution", size, stride, *padding)
    sides = (height + 2 * padding[0] - size) // stride + 1, (width + 2 * padding[1] - size) // stride + 1
    fits = min(sides) >= 1 and outputs % 16 == channels % 16 == 0 and depth_fits(size * size * channels, dtype)
    require(fits, "convolution", channels, outputs, size, stride, *padding, height, width)
    residual = None if residual is None else residual.to(dtype).contiguous()
    out = x.new_empty(batch, *sides, outputs) if out is None else out
    cpu.call(
        "convolution",
        dtype,
        ("x", x, dtype, shape),
        optional("residual", residual, dtype, (batch, *sides, outputs)),
        ("out", out, dtype, (batch, *sides, outputs)),
        *packed_matrix("matrix", matrix, dtype, outputs, size * size * channels),
        activation(act),
        _Conv(*shape, *sides, outputs, size, stride, *padding),
    )
    return out


def pack_stem(
    first: Tensor, first_bias: Tensor | None, second: Tensor | None = None, second_bias: Tensor | None = None
) -> tuple[Affine, Affine | None]:
    """The weights of two 3x3 convolutions, or of one, as :func:`stem` takes them."""
    bias = first.new_zeros(len(first)) if first_bias is None else first_bias
    affine = first.float().flatten(1).t().contiguous(), bias.float()
    if second is None or second_bias is None:
        return affine, None
    rows = second.permute(0, 2, 3, 1).flatten(1)  # (C", 9·C')
    if rows.dtype == torch.bfloat16:
        rows = F.pad(rows, (0, -rows.shape[1] % PANEL))
    return affine, pack_pointwise(rows, second_bias)


def stem(x: Tensor, first: Affine, second: Affine | None, strides: tuple[int, int], act: Activation = SILU) -> Tensor:
    """3x3 convolution, activation, 3x3 convolution, with these strides (1 or 2); (B, C, H, W) -> (B, H', W', C').

    Where ``second`` is None the second stride is 1.
    """
    batch, channels, height, width = x.shape
    for stride in strides:
        height, width = -(-height // stride), -(-width // stride)
    hidden, dtype = len(first[1]), x.dtype
    outputs = hidden if second is None else len(second[1])
    depth = 9 * hidden if dtype == FP32 else round_up(9 * hidden)
    fits = set(strides) <= {1, 2} and hidden % 16 == outputs % 16 == 0 and (second is not None or strides[1] == 1)
    require(fits, "stem", hidden, outputs, *strides)
    cpu.check_memory("stem", "x", x, dtype, tuple(x.shape))
    out = x.new_empty(batch, height, width, outputs)
    images = _Images(x.data_ptr(), (ctypes.c_long * 4)(*x.shape), (ctypes.c_long * 4)(*x.stride()))
    kind = activation(act)
    cpu.call(
        "stem",
        dtype,
        images,
        ("out", out, dtype, (batch, height, width, outputs)),
        ("first", first[0], FP32, (9 * channels, hidden)),
        ("first bias", first[1], FP32, (hidden,)),
        *((None, None) if second is None else packed_matrix("second", second, dtype, outputs, depth)),
        *(hidden, outputs, depth if second is not None else 0, *strides),
        kind,
    )
    return out


def downsample(x: Tensor, y: Tensor, matrix: Affine) -> Tensor:
    """SiLU(y + matrix·MaxPool2d(2, ceil_mode=True)(x)), (B, H, W, C) -> (B, ⌈H/2⌉, ⌈W/2⌉, C'), written over y."""
    x, y = x.contiguous(), y.contiguous()
    batch, height, width, channels = x.shape
    outputs, dtype = y.shape[-1], x.dtype
    require(depth_fits(channels, dtype) and outputs % 16 == 0, "downsample", channels, outputs)
    cpu.call(
        "downsample",
        dtype,
        ("x", x, dtype, (batch, height, width, channels)),
        ("y", y, dtype, (batch, (height + 1) // 2, (width + 1) // 2, outputs)),
        *packed_matrix("matrix", matrix, dtype, outputs, channels),
        *(batch, height, width, channels, outputs),
    )
    return y


def local_attention(x: Tensor, normed: Tensor, qkv: Affine, scale: Tensor | None, head_dim: int, size: int) -> Tensor:
    """x, times ``scale`` (C) where given, plus the attention of ``normed`` inside each grid, all (B, H, W, C)."""
    x, normed = x.contiguous(), normed.to(x.dtype).contiguous()
    out = torch.empty_like(x)
    batch, height, width, channels = x.shape
    dtype, shape = x.dtype, (batch, height, width, channels)
    require(heads_fit(channels, head_dim, dtype) and size >= 1, "local_attention", channels, head_dim, size)
    cpu.call(
        "local_attention",
        dtype,
        ("x", x, dtype, shape),
        ("normed", normed, dtype, shape),
        ("out", out, dtype, shape),
        *packed_matrix("qkv", qkv, dtype, 3 * channels, channels),
        optional("scale", scale, FP32, (channels,)),
        *(batch, height, width, channels, head_dim, size),
    )
    return out


def global_attention(
    a1: Tensor,
    residual: Tensor | None,
    q: Affine,
    kv: Tensor,
    proj: Affine,
    further: Sequence[tuple[Tensor, int]],
    head_dim: int,
) -> Tensor:
    """The global step of H-MHSA, the sum of all levels and the last projection, plus ``residual`` where given.

    Args:
        a1: A₁ (B, H, W, C), which the result is written over.
        residual: (B, H, W, C), added to the result.
        q, proj: Packed weights of the projections.
        kv: K and V of the merged tokens, (B, M, 2C).
        further: A₂, A₃, ..., each (B, ⌈H/r⌉, ⌈W/r⌉, C) with its r.
        head_dim: Channels of a head.
    """
    a1, kv = a1.contiguous(), kv.contiguous()
    batch, height, width, channels = a1.shape
    dtype, shape, tokens = a1.dtype, (batch, height, width, channels), kv.shape[1]
    residual = None if residual is None else residual.to(dtype).contiguous()
    levels = [(a.contiguous(), ratio) for a, ratio in further]
    fits = heads_fit(channels, head_dim, dtype) and tokens >= 1 and all(ratio >= 1 for _, ratio in levels)
    require(fits, "global_attention", channels, head_dim, tokens, *(ratio for _, ratio in levels))
    for a, ratio in levels:
        cpu.check("global_attention", "level", a, dtype, (batch, -(-height // ratio), -(-width // ratio), channels))
    pointers = (_Level * len(levels))(*(_Level(a.data_ptr(), ratio) for a, ratio in levels))
    packed = batch * channels // head_dim * round_up(tokens) * (head_dim + round_up(head_dim))  # K and V
    cpu.call(
        "global_attention",
        dtype,
        ("a1", a1, dtype, shape),
        optional("residual", residual, dtype, shape),
        *packed_matrix("q", q, dtype, channels, channels),
        ("kv", kv, dtype, (batch, tokens, 2 * channels)),
        *packed_matrix("proj", proj, dtype, channels, channels),
        pointers,
        len(levels),
        ("packed", a1.new_empty(packed), dtype, (packed,)),
        *(batch, height, width, channels, head_dim, tokens),
    )
    return a1


def full_attention(qkv: Tensor, head_dim: int) -> Tensor:
    """softmax(Q·Kᵀ)·V of each head, (B, N, 3C) -> (B, N, C), of scaled Q."""
    qkv = qkv.contiguous()
    batch, tokens, three = qkv.shape
    channels, dtype = three // 3, qkv.dtype
    require(three % 3 == 0 and heads_fit(channels, head_dim, dtype), "full_attention", three, head_dim)
    out = qkv.new_empty(batch, tokens, channels)
    given = ("qkv", qkv, dtype, (batch, tokens, three)), ("out", out, dtype, (batch, tokens, channels))
    cpu.call("full_attention", dtype, *given, batch, tokens, channels, head_dim)
    return out


def pointwise(x: Tensor, matrix: Affine, residual: Tensor | None = None) -> Tensor:
    """A linear layer or 1x1 convolution, packed by :func:`pack_pointwise`, plus ``residual``, (..., C) -> (..., C')."""
    rows = (1, 1, -1)
    residual = None if residual is None else residual.contiguous().view(*rows, residual.shape[-1])
    y = convolution(x.contiguous().view(*rows, x.shape[-1]), matrix, residual=residual)
    return y.view(*x.shape[:-1], y.shape[-1])


def packed_matrix(name: str, packed: Affine, dtype: torch.dtype, outputs: int, inputs: int) -> tuple[Checked, Checked]:
    """What :func:`pack_pointwise` makes of weights (outputs, inputs), to be checked."""
    pair = _pair(dtype)
    panels = (round_up(outputs) // PANEL, inputs // pair, PANEL, pair)
    return (name, packed[0], dtype, panels), (f"{name} bias", packed[1], FP32, (outputs,))


def _pair(dtype: torch.dtype) -> int:
    """How many numbers of a row lie together in a panel: 32 bits of them."""
    return 1 if dtype == FP32 else 2
