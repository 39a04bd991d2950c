"""The kernels for training as functions of tensors: attention, and the middle of an inverted residual.

All maps are (B, H, W, C) and contiguous; a norm is ``x * scale + shift`` with both (C) in fp32. Sums are those of each
thread by itself, (threads, 2, C) in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import calls
from .calls import FP32, SIZES, Checked, heads_fit, require

__all__ = [
    "activate",
    "finish",
    "global_backward",
    "global_forward",
    "grid_backward",
    "grid_forward",
    "middle_backward",
    "middle_forward",
    "moments",
    "steepen",
]


def grid_forward(qkv: Tensor, head_dim: int, size: int) -> Tensor:
    """Attention inside each size×size grid, (B, H, W, 3C) -> (B, H, W, C)."""
    shape = _grid_shape(qkv, head_dim, size)
    out = qkv.new_empty(shape)
    calls.call("grid_forward", qkv.dtype, _map("qkv", qkv), _map("out", out), *shape, head_dim, size)
    return out


def grid_backward(qkv: Tensor, grad: Tensor, head_dim: int, size: int) -> Tensor:
    """The gradient of ``qkv`` for one of the result (B, H, W, C)."""
    shape, out = _grid_shape(qkv, head_dim, size), torch.empty_like(qkv)
    of_grad = ("grad", grad, qkv.dtype, shape)
    calls.call("grid_backward", qkv.dtype, _map("qkv", qkv), of_grad, _map("out", out), *shape, head_dim, size)
    return out


def _grid_shape(qkv: Tensor, head_dim: int, size: int) -> tuple[int, int, int, int]:
    batch, height, width, three = qkv.shape
    require(three % 3 == 0 and heads_fit(three // 3, head_dim, qkv.dtype) and size >= 1, "grid", three, head_dim, size)
    return batch, height, width, three // 3


def global_forward(q: Tensor, kv: Tensor, head_dim: int) -> Tensor:
    """Attention to merged tokens, (B, N, C) and (B, M, 2C) -> (B, N, C)."""
    sizes, out = _global_sizes(q, kv, head_dim), torch.empty_like(q)
    calls.call("global_forward", q.dtype, *_queries_and_tokens(q, kv), _map("out", out), *sizes)
    return out


def global_backward(q: Tensor, kv: Tensor, grad: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The gradients of ``q`` and ``kv`` for one of the result (B, N, C)."""
    sizes, of_q, of_kv = _global_sizes(q, kv, head_dim), torch.empty_like(q), torch.empty_like(kv)
    of_grad = ("grad", grad, q.dtype, tuple(q.shape))
    out = _map("dq", of_q), _map("dkv", of_kv)
    calls.call("global_backward", q.dtype, *_queries_and_tokens(q, kv), of_grad, *out, *sizes)
    return of_q, of_kv


def _queries_and_tokens(q: Tensor, kv: Tensor) -> tuple[Checked, Checked]:
    return _map("q", q), ("kv", kv, q.dtype, (len(q), kv.shape[1], 2 * q.shape[2]))


def _global_sizes(q: Tensor, kv: Tensor, head_dim: int) -> tuple[int, int, int, int, int]:
    batch, positions, channels = q.shape
    tokens = kv.shape[1]
    require(heads_fit(channels, head_dim, q.dtype) and tokens >= 1, "global", channels, head_dim, tokens)
    return batch, positions, tokens, channels, head_dim


def moments(x: Tensor) -> Tensor:
    """Sums of x and of its square."""
    sums = _sums(x)
    calls.call("moments", x.dtype, _map("x", x), _of_sums(sums, x), *_positions(x), threads=len(sums))
    return sums


def activate(x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    """SiLU of the normalised map; ``norm`` is scale and shift."""
    out = torch.empty_like(x)
    scale, shift = _by_channel(x, ("scale", "shift"), norm)
    calls.call("activate", x.dtype, _map("x", x), scale, shift, _map("out", out), *_positions(x))
    return out


def middle_forward(x: Tensor, norm: tuple[Tensor, Tensor], taps: Tensor) -> tuple[Tensor, Tensor]:
    """Norm, SiLU and depthwise convolution with weights (k², C) in fp32; also sums of the result and of its square."""
    out, sums, size = torch.empty_like(x), _sums(x), _size(taps)
    calls.call(
        "middle_forward",
        x.dtype,
        _map("x", x),
        *_by_channel(x, ("scale", "shift"), norm),
        ("taps", taps, FP32, (size**2, x.shape[3])),
        _map("out", out),
        _of_sums(sums, x),
        *(*x.shape, size),
        threads=len(sums),
    )
    return out, sums


def steepen(m: Tensor, ds: Tensor, norm: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Sums of dz and of dz·(m - mean), with dz = ds·SiLU'(m·scale + shift); ``norm`` is scale, shift and mean."""
    sums = _sums(m)
    tensors = _map("m", m), ("ds", ds, m.dtype, tuple(m.shape))
    calls.call(
        "steepen",
        m.dtype,
        *tensors,
        *_by_channel(m, ("scale", "shift", "mean"), norm),
        _of_sums(sums, m),
        *_positions(m),
        threads=len(sums),
    )
    return sums


def middle_backward(
    m: Tensor,
    ds: Tensor,
    norm2: Sequence[Tensor],
    x: Tensor,
    norm1: Sequence[Tensor],
    turned: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What comes back through all but the first norm.

    Args:
        m: What the convolution gave.
        ds: The gradient of the last activation.
        norm2: Scale and shift of the second norm, and the three factors that make the gradient of ``m``.
        x: What the first norm takes.
        norm1: Its scale, shift and mean.
        turned: The convolution's weights (k², C), the last first.

    Returns:
        The gradient behind the first norm (B, H, W, C), that of the weights by thread (threads, k², C), and sums of the
        former as :func:`steepen` gives them.
    """
    out, sums, size = torch.empty_like(x), _sums(x), _size(turned)
    dtaps = torch.zeros(len(sums), *turned.shape)
    calls.call(
        "middle_backward",
        x.dtype,
        ("m", m, x.dtype, tuple(x.shape)),
        ("ds", ds, x.dtype, tuple(x.shape)),
        *_by_channel(x, ("scale2", "shift2", "by z", "by m", "rest"), norm2),
        _map("x", x),
        *_by_channel(x, ("scale1", "shift1", "mean1"), norm1),
        ("turned", turned, FP32, (size**2, x.shape[3])),
        _map("out", out),
        ("dtaps", dtaps, FP32, (len(sums), size**2, x.shape[3])),
        _of_sums(sums, x),
        *(*x.shape, size),
        threads=len(sums),
    )
    return out, dtaps, sums


def finish(dz: Tensor, x: Tensor, factors: Sequence[Tensor]) -> None:
    """dz·a + x·b + c for the three factors, written over ``dz``."""
    tensors = _map("dz", dz), ("x", x, dz.dtype, tuple(dz.shape))
    calls.call("finish", dz.dtype, *tensors, *_by_channel(dz, ("by z", "by x", "rest"), factors), *_positions(dz))


def _map(name: str, x: Tensor) -> Checked:
    """A tensor that gives the sizes for the others."""
    return name, x, x.dtype, tuple(x.shape)


def _by_channel(x: Tensor, names: tuple[str, ...], tensors: Sequence[Tensor]) -> list[Checked]:
    return [(name, tensor, FP32, (x.shape[3],)) for name, tensor in zip(names, tensors, strict=True)]


def _positions(x: Tensor) -> tuple[int, int]:
    channels = x.shape[3]
    require(channels % 16 == 0, "training", channels)
    return x.shape[:3].numel(), channels


def _size(taps: Tensor) -> int:
    size = round(len(taps) ** 0.5)
    require(size in SIZES and taps.shape[1] % 16 == 0, "middle", *taps.shape)
    return size


def _sums(x: Tensor) -> Tensor:
    return torch.zeros(torch.get_num_threads(), 2, x.shape[3], dtype=torch.double)


def _of_sums(sums: Tensor, x: Tensor) -> Checked:
    return "sums", sums, torch.double, (len(sums), 2, x.shape[3])
