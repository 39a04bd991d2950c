"""The C++ kernels for training as functions of tensors: attention, BN-SiLU-DWConv-BN-SiLU of an inverted residual, and
the gradient of a 1x1 convolution's weight.

All maps are (B, H, W, C) and contiguous; a BatchNorm is ``x * scale + shift`` with both (C) in fp32. Sums over
positions are returned for each thread, (threads, 2, C) in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import call as cpu
from .call import FP32, KERNEL_SIZES, Checked, any_size, heads_fit, optional, require, thread_sums

__all__ = [
    "bn_backward",
    "bn_silu",
    "bn_silu_backward_sums",
    "bn_silu_dwconv_backward",
    "bn_silu_dwconv_forward",
    "channel_sums",
    "global_backward",
    "global_forward",
    "grid_backward",
    "grid_forward",
    "pointwise_gradient",
]


def grid_forward(qkv: Tensor, head_dim: int, size: int, residual: Tensor | None = None) -> Tensor:
    """Attention inside each size×size grid, plus ``residual``, (B, H, W, 3C) -> (B, H, W, C)."""
    shape = _grid_shape(qkv, head_dim, size)
    out = qkv.new_empty(shape)
    maps = any_size("qkv", qkv), optional("residual", residual, qkv.dtype, shape), any_size("out", out)
    cpu.call("grid_forward", qkv.dtype, *maps, *shape, head_dim, size)
    return out


def grid_backward(qkv: Tensor, grad: Tensor, head_dim: int, size: int) -> Tensor:
    """The gradient of ``qkv`` from that of the result (B, H, W, C)."""
    shape, out = _grid_shape(qkv, head_dim, size), torch.empty_like(qkv)
    of_grad = ("grad", grad, qkv.dtype, shape)
    cpu.call("grid_backward", qkv.dtype, any_size("qkv", qkv), of_grad, any_size("out", out), *shape, head_dim, size)
    return out


def _grid_shape(qkv: Tensor, head_dim: int, size: int) -> tuple[int, int, int, int]:
    batch, height, width, three = qkv.shape
    require(three % 3 == 0 and heads_fit(three // 3, head_dim, qkv.dtype) and size >= 1, "grid", three, head_dim, size)
    return batch, height, width, three // 3


def global_forward(q: Tensor, kv: Tensor, head_dim: int, residual: Tensor | None = None) -> Tensor:
    """Attention to merged tokens, plus ``residual``, (B, N, C) and (B, M, 2C) -> (B, N, C)."""
    sizes, out = _global_sizes(q, kv, head_dim), torch.empty_like(q)
    added = optional("residual", residual, q.dtype, tuple(q.shape))
    cpu.call("global_forward", q.dtype, *_queries_and_tokens(q, kv), added, any_size("out", out), *sizes)
    return out


def global_backward(q: Tensor, kv: Tensor, grad: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The gradients of ``q`` and ``kv`` from that of the result (B, N, C)."""
    sizes, of_q, of_kv = _global_sizes(q, kv, head_dim), torch.empty_like(q), torch.empty_like(kv)
    of_grad = ("grad", grad, q.dtype, tuple(q.shape))
    out = any_size("dq", of_q), any_size("dkv", of_kv)
    cpu.call("global_backward", q.dtype, *_queries_and_tokens(q, kv), of_grad, *out, *sizes)
    return of_q, of_kv


def _queries_and_tokens(q: Tensor, kv: Tensor) -> tuple[Checked, Checked]:
    return any_size("q", q), ("kv", kv, q.dtype, (len(q), kv.shape[1], 2 * q.shape[2]))


def _global_sizes(q: Tensor, kv: Tensor, head_dim: int) -> tuple[int, int, int, int, int]:
    batch, positions, channels = q.shape
    tokens = kv.shape[1]
    require(heads_fit(channels, head_dim, q.dtype) and tokens >= 1, "global", channels, head_dim, tokens)
    return batch, positions, tokens, channels, head_dim


def channel_sums(x: Tensor) -> Tensor:
    """Sums of x and of its square."""
    sums = thread_sums(x)
    cpu.call("channel_sums", x.dtype, any_size("x", x), _of_sums(sums, x), *_positions(x), threads=len(sums))
    return sums


def bn_silu(x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    """SiLU of the normalised map; ``norm`` is scale and shift."""
    out = torch.empty_like(x)
    scale, shift = _by_channel(x, ("scale", "shift"), norm)
    cpu.call("bn_silu", x.dtype, any_size("x", x), scale, shift, any_size("out", out), *_positions(x))
    return out


def bn_silu_dwconv_forward(
    x: Tensor, norm: tuple[Tensor, Tensor], weight: Tensor, activate: bool = False
) -> tuple[Tensor, Tensor]:
    """Norm, SiLU and depthwise convolution with weights (k², C) in fp32.

    Returns:
        The convolution's result, and sums of it and of its square; with ``activate`` its SiLU instead of those.
    """
    out, size = torch.empty_like(x), _size(weight)
    sums, activated = (None, torch.empty_like(x)) if activate else (thread_sums(x), None)
    cpu.call(
        "bn_silu_dwconv_forward",
        x.dtype,
        any_size("x", x),
        *_by_channel(x, ("scale", "shift"), norm),
        ("weight", weight, FP32, (size**2, x.shape[3])),
        any_size("out", out),
        optional("activated", activated, x.dtype, tuple(x.shape)),
        None if sums is None else _of_sums(sums, x),
        *(*x.shape, size),
        threads=None if sums is None else len(sums),
    )
    found = activated if sums is None else sums
    assert found is not None
    return out, found


def bn_silu_backward_sums(m: Tensor, ds: Tensor, norm: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Sums of dz and of dz·(m - mean), with dz = ds·SiLU'(m·scale + shift); ``norm`` is scale, shift and mean."""
    sums = thread_sums(m)
    tensors = any_size("m", m), ("ds", ds, m.dtype, tuple(m.shape))
    cpu.call(
        "bn_silu_backward_sums",
        m.dtype,
        *tensors,
        *_by_channel(m, ("scale", "shift", "mean"), norm),
        _of_sums(sums, m),
        *_positions(m),
        threads=len(sums),
    )
    return sums


def bn_silu_dwconv_backward(
    m: Tensor,
    ds: Tensor,
    norm2: Sequence[Tensor],
    x: Tensor,
    norm1: Sequence[Tensor],
    flipped: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of all but the first norm.

    Args:
        m: What the convolution gave.
        ds: The gradient of the last activation.
        norm2: Scale and shift of the second norm, and the three factors that make the gradient of ``m``.
        x: What the first norm takes.
        norm1: Its scale, shift and mean.
        flipped: The convolution's weights (k², C), the last first.

    Returns:
        The gradient of the first norm's output (B, H, W, C), that of the weights for each thread (threads, k², C),
        and sums of the former as :func:`bn_silu_backward_sums` gives them.
    """
    out, sums, size = torch.empty_like(x), thread_sums(x), _size(flipped)
    dweight = flipped.new_zeros(len(sums), *flipped.shape)
    cpu.call(
        "bn_silu_dwconv_backward",
        x.dtype,
        ("m", m, x.dtype, tuple(x.shape)),
        ("ds", ds, x.dtype, tuple(x.shape)),
        *_by_channel(x, ("scale2", "shift2", "by dz", "by m", "rest"), norm2),
        any_size("x", x),
        *_by_channel(x, ("scale1", "shift1", "mean1"), norm1),
        ("flipped", flipped, FP32, (size**2, x.shape[3])),
        any_size("out", out),
        ("dweight", dweight, FP32, (len(sums), size**2, x.shape[3])),
        _of_sums(sums, x),
        *(*x.shape, size),
        threads=len(sums),
    )
    return out, dweight, sums


def bn_backward(dz: Tensor, x: Tensor, factors: Sequence[Tensor]) -> None:
    """dz·a + x·b + c for the three factors, written over ``dz``."""
    tensors = any_size("dz", dz), ("x", x, dz.dtype, tuple(dz.shape))
    cpu.call("bn_backward", dz.dtype, *tensors, *_by_channel(dz, ("by dz", "by x", "rest"), factors), *_positions(dz))


def _by_channel(x: Tensor, names: tuple[str, ...], tensors: Sequence[Tensor]) -> list[Checked]:
    return [(name, tensor, FP32, (x.shape[3],)) for name, tensor in zip(names, tensors, strict=True)]


def _positions(x: Tensor) -> tuple[int, int]:
    channels = x.shape[3]
    require(channels % 16 == 0, "training", channels)
    return x.shape[:3].numel(), channels


def _size(weight: Tensor) -> int:
    size = round(len(weight) ** 0.5)
    require(size in KERNEL_SIZES and weight.shape[1] % 16 == 0, "bn_silu_dwconv", *weight.shape)
    return size


def _of_sums(sums: Tensor, x: Tensor) -> Checked:
    return "sums", sums, torch.double, (len(sums), 2, x.shape[3])


def pointwise_gradient(x: Tensor, grad: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of a 1x1 convolution's weight (C', C) and, if wanted, bias (C') in fp32.

    ``x`` is (N, C), ``grad`` that of the result, (N, C').
    """
    (positions, inputs), outputs, threads = x.shape, grad.shape[-1], torch.get_num_threads()
    require(inputs % 16 == 0 and outputs % 16 == 0, "pointwise_gradient", inputs, outputs)
    shape = (outputs, inputs) if outputs <= inputs else (inputs, outputs)
    found = x.new_zeros(threads, *shape, dtype=FP32)
    sums = x.new_zeros(threads, outputs, dtype=FP32) if bias else None
    cpu.call(
        "pointwise_gradient",
        x.dtype,
        any_size("x", x),
        ("grad", grad, x.dtype, (positions, outputs)),
        ("found", found, FP32, (threads, *shape)),
        optional("sums", sums, FP32, (threads, outputs)),
        *(positions, inputs, outputs),
        threads=threads,
    )
    weight = found[0] if threads == 1 else found.sum(0)
    return weight if outputs <= inputs else weight.t().contiguous(), None if sums is None else sums.sum(0)
