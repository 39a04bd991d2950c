"""H-MHSA once more: slow, in NumPy, one grid, head and position after the other, straight from the paper's formulas.

It shares no code with ``src`` and knows nothing of padding, masks or reshaping; the tests demand that ours equals it.
"""

from __future__ import annotations

import itertools
import zlib

import numpy as np
from numpy import ndarray as Array


def hmhsa(
    x: Array,
    weights: dict[str, Array],
    head_dim: int,
    grid_sizes: tuple[int | tuple[int, ...], ...],
    pool_ratios: tuple[int | tuple[int, ...], ...],
    norm: str,
    training: bool = False,
    mask: Array | None = None,
) -> Array:
    """(B, C, *S) -> (B, C, *S) for any number of sizes S, zero where ``mask`` (B, 1, *S) is false.

    ``weights`` is the module's state_dict, ``norm`` is ``batch`` or ``group``.
    """
    ndim = x.ndim - 2

    def normalise(name: str, y: Array, real: Array) -> Array:
        scale, shift = (per_channel(weights[f"{name}.{which}"], ndim) for which in ("weight", "bias"))
        if norm == "batch" and not training:
            mean, var = (per_channel(weights[f"{name}.running_{which}"], ndim) for which in ("mean", "var"))
            return (y - mean) / np.sqrt(var + 1e-5) * scale + shift
        mean, var = np.zeros_like(y), np.ones_like(y)
        if norm == "group":  # one group: each item over all its values
            for b in range(len(y)):
                values = y[b][:, real[b, 0]]
                if values.size:
                    mean[b], var[b] = values.mean(), values.var()
            return (y - mean) / np.sqrt(var + 1e-6) * scale + shift
        for c in range(y.shape[1]):
            values = y[:, c][real[:, 0]]
            if values.size:
                mean[:, c], var[:, c] = values.mean(), values.var()
        return (y - mean) / np.sqrt(var + 1e-5) * scale + shift

    def project(name: str, y: Array) -> Array:
        weight = weights[f"{name}.weight"]
        bias = weights.get(f"{name}.bias", np.zeros(len(weight)))
        return np.einsum("oc,bc...->bo...", weight.reshape(len(weight), -1), y) + per_channel(bias, ndim)

    mask = np.ones((len(x), 1, *x.shape[2:]), bool) if mask is None else mask
    x = np.where(mask, x, 0)
    if not grid_sizes:
        q, k, v = np.split(project("qkv", normalise("norm", x, mask)), 3, axis=1)
        return np.where(mask, project("proj", attention(q, k, v, head_dim, mask)), 0)

    steps = []
    tokens, real = x, mask
    for level, (grid, ratio) in enumerate(zip(grid_sizes, pool_ratios, strict=True)):
        name = f"local.{level}"
        q, k, v = np.split(project(f"{name}.qkv", normalise(f"{name}.norm", tokens, real)), 3, axis=1)
        inside = np.empty_like(tokens)
        for patch in patches(tokens, grid):
            here = (slice(None), slice(None), *patch)
            inside[here] = attention(q[here], k[here], v[here], head_dim, real[here])
        step = normalise(f"{name}.grid_norm", tokens + inside, real)
        steps.append(step)
        tokens, real = pool(step, ratio, real)

    q = project("q", steps[0])
    k, v = np.split(project("kv", normalise("ds_norm", tokens, real)), 2, axis=1)
    y = attention(q, k, v, head_dim, real) + steps[0]
    size = [1] * ndim
    for step, ratio in zip(steps[1:], pool_ratios, strict=False):
        size = [s * r for s, r in zip(size, per_axis(ratio, ndim), strict=True)]
        for place in np.ndindex(y.shape[2:]):
            merged = tuple(p // s for p, s in zip(place, size, strict=True))
            y[(slice(None), slice(None), *place)] += step[(slice(None), slice(None), *merged)]
    return np.where(mask, project("proj", y), 0)


def attention(q: Array, k: Array, v: Array, head_dim: int, real: Array) -> Array:
    """softmax(QKᵀ/√d)·V for each item, head and query over the keys that are ``real``; zero where none is.

    Maps (B, C, *S) and twice (B, C, *S'), ``real`` (B, 1, *S').
    """
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for start in range(0, q.shape[1] if real[b].any() else 0, head_dim):
            head = slice(start, start + head_dim)
            keys = k[b, head][:, real[b, 0]]  # (d, M)
            values = v[b, head][:, real[b, 0]]
            for place in np.ndindex(q.shape[2:]):
                scores = q[(b, head, *place)] @ keys / np.sqrt(head_dim)
                share = np.exp(scores - scores.max())
                out[(b, head, *place)] = values @ (share / share.sum())
    return out


def pool(x: Array, ratio: int | tuple[int, ...], real: Array | None = None) -> tuple[Array, Array]:
    """The mean of each patch over the positions that it really has, and which patches have any."""
    real = np.ones((len(x), 1, *x.shape[2:]), bool) if real is None else real
    ratios = per_axis(ratio, x.ndim - 2)
    sides = [-(-n // r) for n, r in zip(x.shape[2:], ratios, strict=True)]
    out, kept = np.zeros((*x.shape[:2], *sides)), np.zeros((len(x), 1, *sides), bool)
    for patch in patches(x, ratio):
        place = tuple(side.start // r for side, r in zip(patch, ratios, strict=True))
        for b in range(len(x)):
            values = x[(b, slice(None), *patch)][:, real[(b, 0, *patch)]]
            if values.size:
                out[(b, slice(None), *place)] = values.mean(1)
                kept[(b, 0, *place)] = True
    return out, kept


def patches(x: Array, size: int | tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Where the patches of a map lie, from the top left corner; those at the border are smaller."""
    sides = [
        [slice(i, min(i + s, n)) for i in range(0, n, s)]
        for n, s in zip(x.shape[2:], per_axis(size, x.ndim - 2), strict=True)
    ]
    return list(itertools.product(*sides))


def per_axis(size: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    return (size,) * ndim if isinstance(size, int) else size


def per_channel(values: Array, ndim: int = 2) -> Array:
    return values.reshape(1, -1, *(1,) * ndim)


def weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    """Reproducible weights that make every layer matter; each tensor depends on its name, shape and the seed alone."""
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(f"{seed}:{name}".encode()))
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(0)
        elif name.endswith(("bias", "running_mean")):
            tensors[name] = 0.1 * rng.standard_normal(shape)
        elif len(shape) == 1:  # a norm's scale or variance
            tensors[name] = rng.uniform(0.4, 0.8, shape)
        else:
            tensors[name] = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return tensors
