# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (Triton compiles the kernels: what it makes of their arguments has no Python types.)
"""BatchNorm in training, and SiLU after it: forward and backward passes over a map seen as rows of channels, (P, C).

With z = γ·(x - μ)/σ + β = scale·x + shift, P positions, S = Σ dz and Q = Σ dz·(x - μ),

    dβ = S,   dγ = Q/σ,   dx = γ/σ·(dz - S/P - (x - μ)·Q/(P·σ²)) = a·dz + b·x + c

Sums over positions are made by some hundred programs, each of which leaves its part, (programs, 2, C); a program per
some channels then adds those up, always in the same order: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

__all__ = [
    "activate", "factors", "gate", "moments", "slopes", "sum_rows", "through",
]  # fmt: skip

ROWS, CHANNELS = 64, 64  # of a map, in one step of a program
PROGRAMS = 1024  # that share the positions, at most


@triton.jit
def _tile(step, rows, columns, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Places of one step's numbers in a (rows, columns) map, which of them exist, their channels and which exist."""
    p = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < columns
    return p[:, None] * columns + c[None, :], (p < rows)[:, None] & real[None, :], c, real


@triton.jit
def _gradient(x, grad, numbers, place, mask, c, real, columns, SILU: tl.constexpr):
    """x, and the gradient of z: ``grad`` itself or, with ``SILU``, what comes through SiLU from it."""
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        scale = tl.load(numbers + 2 * columns + c, mask=real, other=0.0)
        shift = tl.load(numbers + 3 * columns + c, mask=real, other=0.0)
        z = value * scale[None, :] + shift[None, :]
        s = tl.sigmoid(z)
        dz *= s * (1 + z * (1 - s))
    return value, dz


@triton.jit
def _keep(partial, first, second, columns, c, real):
    """A program's two sums to its place."""
    at = partial + tl.program_id(0) * 2 * columns + c
    tl.store(at, tl.sum(first, axis=0), mask=real)
    tl.store(at + columns, tl.sum(second, axis=0), mask=real)


@triton.jit
def _moments(x, pivot, partial, rows, columns, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Σ (x - pivot) and Σ (x - pivot)²: near the mean, so that no digits are lost where that is far from zero."""
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    near = tl.load(pivot + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    stride = tl.num_programs(0)
    for step in range(tl.program_id(0), tl.cdiv(rows, ROWS), 2 * stride):
        place, mask, _c, _real = _tile(step, rows, columns, ROWS, CHANNELS)
        later, mask2, _c, _real = _tile(step + stride, rows, columns, ROWS, CHANNELS)
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)  # two at once keep more of the memory busy
        value2 = tl.load(x + later, mask=mask2, other=0.0).to(tl.float32)
        d = tl.where(mask, value - near, 0.0)
        first += d
        second += d * d
        d = tl.where(mask2, value2 - near, 0.0)
        first += d
        second += d * d
    _keep(partial, first, second, columns, c, c < columns)


@triton.jit
def _added(partial, programs, columns, c, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Both sums of all programs, in double precision."""
    first = tl.zeros((PARTS, CHANNELS), tl.float64)
    second = tl.zeros((PARTS, CHANNELS), tl.float64)
    for start in range(0, programs, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < programs)[:, None] & (c < columns)[None, :]
        at = partial + part[:, None] * 2 * columns + c[None, :]
        first += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        second += tl.load(at + columns, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def _statistics(
    partial, pivot, weight, bias, running_mean, running_var, numbers, programs, rows, columns, eps, momentum,
    RUNNING: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < columns
    first, second = _added(partial, programs, columns, c, PARTS, CHANNELS)
    offset = first / rows
    mean = tl.load(pivot + c, mask=real, other=0.0).to(tl.float64) + offset
    variance = tl.maximum(second / rows - offset * offset, 0.0)
    inverse = 1.0 / tl.sqrt(variance + eps)
    scale = tl.load(weight + c, mask=real, other=0.0).to(tl.float64) * inverse
    shift = tl.load(bias + c, mask=real, other=0.0).to(tl.float64) - mean * scale
    tl.store(numbers + c, mean.to(tl.float32), mask=real)
    tl.store(numbers + columns + c, inverse.to(tl.float32), mask=real)
    tl.store(numbers + 2 * columns + c, scale.to(tl.float32), mask=real)
    tl.store(numbers + 3 * columns + c, shift.to(tl.float32), mask=real)
    if RUNNING:
        old = tl.load(running_mean + c, mask=real, other=0.0).to(tl.float64)
        tl.store(running_mean + c, (old + momentum * (mean - old)).to(running_mean.dtype.element_ty), mask=real)
        old = tl.load(running_var + c, mask=real, other=0.0).to(tl.float64)
        unbiased = variance * rows / (rows - 1)
        tl.store(running_var + c, (old + momentum * (unbiased - old)).to(running_var.dtype.element_ty), mask=real)


@triton.jit
def _activate(
    x, scale, shift, out, rows, columns,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    place, mask, c, real = _tile(tl.program_id(0), rows, columns, ROWS, CHANNELS)
    z = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        z *= tl.load(scale + c, mask=real, other=0.0).to(tl.float32)[None, :]
    if SHIFT:
        z += tl.load(shift + c, mask=real, other=0.0).to(tl.float32)[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(out + place, z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _slopes(
    x, grad, numbers, partial, rows, columns, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """S and Q from the gradient of z or, with ``SILU``, of SiLU(z)."""
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        place, mask, c, real = _tile(step, rows, columns, ROWS, CHANNELS)
        value, dz = _gradient(x, grad, numbers, place, mask, c, real, columns, SILU)
        first += dz
        second += dz * (value - tl.load(numbers + c, mask=real, other=0.0)[None, :])
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    _keep(partial, first, second, columns, c, c < columns)


@triton.jit
def _factors(
    partial, numbers, abc, of_weight, of_bias, programs, rows, columns, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """a, b and c, and the gradients of γ and β."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < columns
    s, q = _added(partial, programs, columns, c, PARTS, CHANNELS)
    mean = tl.load(numbers + c, mask=real, other=0.0).to(tl.float64)
    inverse = tl.load(numbers + columns + c, mask=real, other=0.0).to(tl.float64)
    scale = tl.load(numbers + 2 * columns + c, mask=real, other=0.0).to(tl.float64)
    by_x = -scale * inverse * inverse * q / rows
    tl.store(abc + c, scale.to(tl.float32), mask=real)
    tl.store(abc + columns + c, by_x.to(tl.float32), mask=real)
    tl.store(abc + 2 * columns + c, (-scale * s / rows - by_x * mean).to(tl.float32), mask=real)
    tl.store(of_weight + c, (q * inverse).to(of_weight.dtype.element_ty), mask=real)
    tl.store(of_bias + c, s.to(of_bias.dtype.element_ty), mask=real)


@triton.jit
def _through(
    x, grad, numbers, abc, out, rows, columns,
    NORM: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    place, mask, c, real = _tile(tl.program_id(0), rows, columns, ROWS, CHANNELS)
    value, dz = _gradient(x, grad, numbers, place, mask, c, real, columns, SILU)
    if NORM:
        by_grad = tl.load(abc + c, mask=real, other=0.0)
        by_x = tl.load(abc + columns + c, mask=real, other=0.0)
        rest = tl.load(abc + 2 * columns + c, mask=real, other=0.0)
        dz = by_grad[None, :] * dz + by_x[None, :] * value + rest[None, :]
    tl.store(out + place, dz.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gate(x, grad, numbers, out, partial, rows, columns, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The gradient of z from that of SiLU(z), and S and Q of it."""
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < columns
    mean = tl.load(numbers + c, mask=real, other=0.0)[None, :]
    for step in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        place, mask, _c, _real = _tile(step, rows, columns, ROWS, CHANNELS)
        value, dz = _gradient(x, grad, numbers, place, mask, c, real, columns, True)
        rounded = dz.to(out.dtype.element_ty)
        tl.store(out + place, rounded, mask=mask)
        first += rounded.to(tl.float32)
        second += rounded.to(tl.float32) * (value - mean)
    _keep(partial, first, second, columns, c, real)


@triton.jit
def _sum_rows(x, partial, rows, columns, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        place, mask, _c, _real = _tile(step, rows, columns, ROWS, CHANNELS)
        total += tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(partial + tl.program_id(0) * columns + c, tl.sum(total, axis=0), mask=c < columns)


def moments(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Mean, 1/σ, scale and shift of a map (…, C) for ``norm``, (4, C) in fp32; its running statistics go on."""
    partial = _room(x)
    positions, columns = _shape(x)
    near = norm.bias if norm.running_mean is None else norm.running_mean  # the mean's neighbour, or any number
    _moments[_shared(partial)](x, near, partial, positions, columns, ROWS=ROWS, CHANNELS=CHANNELS)
    numbers = torch.empty(4, columns, device=x.device)
    running = norm.track_running_stats and norm.running_mean is not None
    if running:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
    _statistics[(triton.cdiv(columns, 16),)](
        partial, near, norm.weight, norm.bias,
        norm.running_mean if running else numbers, norm.running_var if running else numbers, numbers,
        len(partial), positions, columns, norm.eps, norm.momentum, RUNNING=running, PARTS=64, CHANNELS=16,
    )  # fmt: skip
    return numbers


def activate(x: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool, out: Tensor | None = None) -> Tensor:
    """silu(scale·x + shift) of what is given, (…, C) and twice (C) -> (…, C)."""
    out = torch.empty_like(x) if out is None else out
    _activate[_each(x)](
        x, x if scale is None else scale, x if shift is None else shift, out, *_shape(x),
        SCALE=scale is not None, SHIFT=shift is not None, SILU=silu, ROWS=ROWS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return out


def slopes(x: Tensor, grad: Tensor, numbers: Tensor, silu: bool) -> Tensor:
    """Parts of S and Q from the gradient of the norm's output or, with ``silu``, of SiLU's; (programs, 2, C)."""
    partial = _room(x)
    _slopes[_shared(partial)](x, grad, numbers, partial, *_shape(x), SILU=silu, ROWS=ROWS, CHANNELS=CHANNELS)
    return partial


def factors(
    numbers: Tensor, positions: int, partial: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and c, (3, C), and the gradients of γ and β from parts of S and Q."""
    columns = partial.shape[2]
    abc = torch.empty(3, columns, device=partial.device)
    of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
    _factors[(triton.cdiv(columns, 16),)](
        partial, numbers, abc, of_weight, of_bias, len(partial), positions, columns,
        PARTS=64, CHANNELS=16,
    )  # fmt: skip
    return abc, of_weight, of_bias


def gate(x: Tensor, grad: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the norm's output from that of SiLU's, written over ``grad``, and parts of its S and Q."""
    partial = _room(x)
    _gate[_shared(partial)](x, grad, numbers, grad, partial, *_shape(x), ROWS=ROWS, CHANNELS=CHANNELS)
    return grad, partial


def through(
    x: Tensor, grad: Tensor, numbers: Tensor, abc: Tensor | None, silu: bool, out: Tensor | None = None
) -> Tensor:
    """The gradient of x from that of the norm's output or, with ``silu``, of SiLU's; without ``abc`` SiLU's alone."""
    out = torch.empty_like(x) if out is None else out
    _through[_each(x)](
        x, grad, numbers, numbers if abc is None else abc, out, *_shape(x),
        NORM=abc is not None, SILU=silu, ROWS=ROWS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return out


def sum_rows(x: Tensor) -> Tensor:
    """The sum over all positions, (…, C) -> (C), fp32."""
    partial = _room(x, 1)
    _sum_rows[_shared(partial)](x, partial, *_shape(x), ROWS=ROWS, CHANNELS=CHANNELS)
    return partial.sum((0, 1))


def _room(x: Tensor, sums: int = 2) -> Tensor:
    """Room for the sums over positions that programs leave, (programs, sums, C)."""
    rows, columns = _shape(x)
    programs = max(1, min(triton.cdiv(rows, ROWS), PROGRAMS // triton.cdiv(columns, CHANNELS)))
    return torch.empty(programs, sums, columns, device=x.device)


def _shape(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _each(x: Tensor) -> tuple[int, int]:
    rows, columns = _shape(x)
    return triton.cdiv(rows, ROWS), triton.cdiv(columns, CHANNELS)


def _shared(partial: Tensor) -> tuple[int, int]:
    return len(partial), triton.cdiv(partial.shape[-1], CHANNELS)
