# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (Triton compiles the kernels: what it makes of their arguments has no Python types.)
"""BatchNorm in training, and SiLU after it: forward and backward passes over a map flattened to (P, C).

With z = γ·(x - μ)/σ + β = scale·x + shift, P positions, S = Σ dz and Q = Σ dz·(x - μ),

    dβ = S,   dγ = Q/σ,   dx = γ/σ·(dz - S/P - (x - μ)·Q/(P·σ²)) = a·dz + b·x + c

Sums over positions are computed by some hundred programs as partial sums (programs, 2, C); a second kernel adds those
up, always in the same order: the result is reproducible bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

__all__ = [
    "affine_silu",
    "backward_sums",
    "batch_statistics",
    "bn_factors",
    "norm_backward",
    "silu_backward",
    "sum_rows",
]

ROWS, CHANNELS = 64, 64  # of a tile
MAX_PROGRAMS = 1024  # over positions


@triton.jit
def _tile(step, rows, columns, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets of one step's tile in a (rows, columns) map and their mask, its channels and their mask."""
    p = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    valid = c < columns
    return p[:, None] * columns + c[None, :], (p < rows)[:, None] & valid[None, :], c, valid


@triton.jit
def _gradient(x, grad, statistics, offset, mask, c, valid, columns, SILU: tl.constexpr):
    """x, and the gradient of z: ``grad`` itself or, with ``SILU``, its product with SiLU'(z)."""
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        scale = tl.load(statistics + 2 * columns + c, mask=valid, other=0.0)
        shift = tl.load(statistics + 3 * columns + c, mask=valid, other=0.0)
        z = value * scale[None, :] + shift[None, :]
        s = tl.sigmoid(z)
        dz *= s * (1 + z * (1 - s))
    return value, dz


@triton.jit
def _store_partial(partial, first, second, columns, c, valid):
    """Stores a program's two partial sums."""
    at = partial + tl.program_id(0) * 2 * columns + c
    tl.store(at, tl.sum(first, axis=0), mask=valid)
    tl.store(at + columns, tl.sum(second, axis=0), mask=valid)


@triton.jit
def _centred_sums(x, pivot, partial, rows, columns, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Σ (x - pivot) and Σ (x - pivot)²; the pivot is near the mean, so that squares don't cancel."""
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    near = tl.load(pivot + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    stride = tl.num_programs(0)
    for step in range(tl.program_id(0), tl.cdiv(rows, ROWS), 2 * stride):
        offset, mask, _c, _real = _tile(step, rows, columns, ROWS, CHANNELS)
        later, mask2, _c, _real = _tile(step + stride, rows, columns, ROWS, CHANNELS)
        value = tl.load(x + offset, mask=mask, other=0.0).to(
            tl.float32
        )  # two loads in flight use more of the bandwidth
        value2 = tl.load(x + later, mask=mask2, other=0.0).to(tl.float32)
        d = tl.where(mask, value - near, 0.0)
        first += d
        second += d * d
        d = tl.where(mask2, value2 - near, 0.0)
        first += d
        second += d * d
    _store_partial(partial, first, second, columns, c, c < columns)


@triton.jit
def _total(partial, programs, columns, c, PARTIALS: tl.constexpr, CHANNELS: tl.constexpr):
    """Both sums of all programs, in double precision."""
    first = tl.zeros((PARTIALS, CHANNELS), tl.float64)
    second = tl.zeros((PARTIALS, CHANNELS), tl.float64)
    for start in range(0, programs, PARTIALS):
        part = start + tl.arange(0, PARTIALS)
        mask = (part < programs)[:, None] & (c < columns)[None, :]
        at = partial + part[:, None] * 2 * columns + c[None, :]
        first += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        second += tl.load(at + columns, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def _statistics(
    partial, pivot, weight, bias, running_mean, running_var, statistics, programs, rows, columns, eps, momentum,
    RUNNING: tl.constexpr, PARTIALS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = c < columns
    first, second = _total(partial, programs, columns, c, PARTIALS, CHANNELS)
    shift_of_mean = first / rows
    mean = tl.load(pivot + c, mask=valid, other=0.0).to(tl.float64) + shift_of_mean
    variance = tl.maximum(second / rows - shift_of_mean * shift_of_mean, 0.0)
    inverse = 1.0 / tl.sqrt(variance + eps)
    scale = tl.load(weight + c, mask=valid, other=0.0).to(tl.float64) * inverse
    shift = tl.load(bias + c, mask=valid, other=0.0).to(tl.float64) - mean * scale
    tl.store(statistics + c, mean.to(tl.float32), mask=valid)
    tl.store(statistics + columns + c, inverse.to(tl.float32), mask=valid)
    tl.store(statistics + 2 * columns + c, scale.to(tl.float32), mask=valid)
    tl.store(statistics + 3 * columns + c, shift.to(tl.float32), mask=valid)
    if RUNNING:
        old = tl.load(running_mean + c, mask=valid, other=0.0).to(tl.float64)
        tl.store(running_mean + c, (old + momentum * (mean - old)).to(running_mean.dtype.element_ty), mask=valid)
        old = tl.load(running_var + c, mask=valid, other=0.0).to(tl.float64)
        unbiased = variance * rows / (rows - 1)
        tl.store(running_var + c, (old + momentum * (unbiased - old)).to(running_var.dtype.element_ty), mask=valid)


@triton.jit
def _affine_silu(
    x, scale, shift, out, rows, columns,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    offset, mask, c, valid = _tile(tl.program_id(0), rows, columns, ROWS, CHANNELS)
    z = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        z *= tl.load(scale + c, mask=valid, other=0.0).to(tl.float32)[None, :]
    if SHIFT:
        z += tl.load(shift + c, mask=valid, other=0.0).to(tl.float32)[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(out + offset, z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_sums(
    x, grad, statistics, partial, rows, columns, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """S and Q from the gradient of z or, with ``SILU``, of SiLU(z)."""
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        offset, mask, c, valid = _tile(step, rows, columns, ROWS, CHANNELS)
        value, dz = _gradient(x, grad, statistics, offset, mask, c, valid, columns, SILU)
        first += dz
        second += dz * (value - tl.load(statistics + c, mask=valid, other=0.0)[None, :])
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    _store_partial(partial, first, second, columns, c, c < columns)


@triton.jit
def _bn_factors(
    partial, statistics, abc, of_weight, of_bias, programs, rows, columns,
    PARTIALS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """a, b and c, and the gradients of γ and β."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = c < columns
    s, q = _total(partial, programs, columns, c, PARTIALS, CHANNELS)
    mean = tl.load(statistics + c, mask=valid, other=0.0).to(tl.float64)
    inverse = tl.load(statistics + columns + c, mask=valid, other=0.0).to(tl.float64)
    scale = tl.load(statistics + 2 * columns + c, mask=valid, other=0.0).to(tl.float64)
    by_x = -scale * inverse * inverse * q / rows
    tl.store(abc + c, scale.to(tl.float32), mask=valid)
    tl.store(abc + columns + c, by_x.to(tl.float32), mask=valid)
    tl.store(abc + 2 * columns + c, (-scale * s / rows - by_x * mean).to(tl.float32), mask=valid)
    tl.store(of_weight + c, (q * inverse).to(of_weight.dtype.element_ty), mask=valid)
    tl.store(of_bias + c, s.to(of_bias.dtype.element_ty), mask=valid)


@triton.jit
def _norm_backward(
    x, grad, statistics, abc, out, rows, columns,
    NORM: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    offset, mask, c, valid = _tile(tl.program_id(0), rows, columns, ROWS, CHANNELS)
    value, dz = _gradient(x, grad, statistics, offset, mask, c, valid, columns, SILU)
    if NORM:
        by_grad = tl.load(abc + c, mask=valid, other=0.0)
        by_x = tl.load(abc + columns + c, mask=valid, other=0.0)
        rest = tl.load(abc + 2 * columns + c, mask=valid, other=0.0)
        dz = by_grad[None, :] * dz + by_x[None, :] * value + rest[None, :]
    tl.store(out + offset, dz.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_backward(x, grad, statistics, out, partial, rows, columns, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The gradient of z from that of SiLU(z), and S and Q of it."""
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    valid = c < columns
    mean = tl.load(statistics + c, mask=valid, other=0.0)[None, :]
    for step in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        offset, mask, _c, _real = _tile(step, rows, columns, ROWS, CHANNELS)
        value, dz = _gradient(x, grad, statistics, offset, mask, c, valid, columns, True)
        rounded = dz.to(out.dtype.element_ty)
        tl.store(out + offset, rounded, mask=mask)
        first += rounded.to(tl.float32)
        second += rounded.to(tl.float32) * (value - mean)
    _store_partial(partial, first, second, columns, c, valid)


@triton.jit
def _sum_rows(x, partial, rows, columns, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        offset, mask, _c, _real = _tile(step, rows, columns, ROWS, CHANNELS)
        total += tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(partial + tl.program_id(0) * columns + c, tl.sum(total, axis=0), mask=c < columns)


def batch_statistics(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Mean, 1/σ, scale and shift of a map (…, C) for ``norm``, (4, C) in fp32; updates its running statistics."""
    partial = _partial_sums(x)
    positions, columns = _shape(x)
    near = norm.bias if norm.running_mean is None else norm.running_mean  # near the mean, or anything
    _centred_sums[_grid_of_partial(partial)](x, near, partial, positions, columns, ROWS=ROWS, CHANNELS=CHANNELS)
    statistics = torch.empty(4, columns, device=x.device)
    running = norm.track_running_stats and norm.running_mean is not None
    if running:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
    _statistics[(triton.cdiv(columns, 16),)](
        partial, near, norm.weight, norm.bias,
        norm.running_mean if running else statistics, norm.running_var if running else statistics, statistics,
        len(partial), positions, columns, norm.eps, norm.momentum, RUNNING=running, PARTIALS=64, CHANNELS=16,
    )  # fmt: skip
    return statistics


def affine_silu(x: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool, out: Tensor | None = None) -> Tensor:
    """silu(scale·x + shift), each of the three optional, (…, C) and twice (C) -> (…, C)."""
    out = torch.empty_like(x) if out is None else out
    _affine_silu[_grid(x)](
        x, x if scale is None else scale, x if shift is None else shift, out, *_shape(x),
        SCALE=scale is not None, SHIFT=shift is not None, SILU=silu, ROWS=ROWS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return out


def backward_sums(x: Tensor, grad: Tensor, statistics: Tensor, silu: bool) -> Tensor:
    """Partial sums of S and Q from the gradient of the norm's output or, with ``silu``, of SiLU's; (programs, 2, C)."""
    partial = _partial_sums(x)
    _backward_sums[_grid_of_partial(partial)](
        x, grad, statistics, partial, *_shape(x), SILU=silu, ROWS=ROWS, CHANNELS=CHANNELS
    )
    return partial


def bn_factors(
    statistics: Tensor, positions: int, partial: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and c, (3, C), and the gradients of γ and β from partial sums of S and Q."""
    columns = partial.shape[2]
    abc = torch.empty(3, columns, device=partial.device)
    of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
    _bn_factors[(triton.cdiv(columns, 16),)](
        partial, statistics, abc, of_weight, of_bias, len(partial), positions, columns,
        PARTIALS=64, CHANNELS=16,
    )  # fmt: skip
    return abc, of_weight, of_bias


def silu_backward(x: Tensor, grad: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the norm's output from that of SiLU's, written over ``grad``, and partial sums of its S and Q."""
    partial = _partial_sums(x)
    _silu_backward[_grid_of_partial(partial)](
        x, grad, statistics, grad, partial, *_shape(x), ROWS=ROWS, CHANNELS=CHANNELS
    )
    return grad, partial


def norm_backward(
    x: Tensor, grad: Tensor, statistics: Tensor, abc: Tensor | None, silu: bool, out: Tensor | None = None
) -> Tensor:
    """The gradient of x from that of the norm's output or, with ``silu``, of SiLU's; without ``abc`` SiLU's alone."""
    out = torch.empty_like(x) if out is None else out
    _norm_backward[_grid(x)](
        x, grad, statistics, statistics if abc is None else abc, out, *_shape(x),
        NORM=abc is not None, SILU=silu, ROWS=ROWS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return out


def sum_rows(x: Tensor) -> Tensor:
    """The sum over all positions, (…, C) -> (C), fp32."""
    partial = _partial_sums(x, 1)
    _sum_rows[_grid_of_partial(partial)](x, partial, *_shape(x), ROWS=ROWS, CHANNELS=CHANNELS)
    return partial.sum((0, 1))


def _partial_sums(x: Tensor, sums: int = 2) -> Tensor:
    """Memory for the programs' partial sums over positions, (programs, sums, C)."""
    rows, columns = _shape(x)
    programs = max(1, min(triton.cdiv(rows, ROWS), MAX_PROGRAMS // triton.cdiv(columns, CHANNELS)))
    return torch.empty(programs, sums, columns, device=x.device)


def _shape(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _grid(x: Tensor) -> tuple[int, int]:
    rows, columns = _shape(x)
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, CHANNELS)


def _grid_of_partial(partial: Tensor) -> tuple[int, int]:
    return len(partial), triton.cdiv(partial.shape[-1], CHANNELS)
