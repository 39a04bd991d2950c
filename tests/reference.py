"""H-MHSA once more: slow, in NumPy, one grid, head and position after the other, straight from the paper's formulas.

It shares no code with ``src`` and knows nothing of padding, masks or reshaping; the tests demand that ours equals it.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy import ndarray as Array


def hmhsa(
    x: Array,
    weights: dict[str, Array],
    head_dim: int,
    grid_sizes: tuple[int, ...],
    pool_ratios: tuple[int, ...],
    norm: str,
    training: bool = False,
) -> Array:
    """(B, C, H, W) -> (B, C, H, W); ``weights`` is the module's state_dict, ``norm`` is ``batch`` or ``group``."""

    def normalise(name: str, y: Array) -> Array:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if norm == "group":  # one group: each image over all its values
            mean, var, eps = y.mean((1, 2, 3), keepdims=True), y.var((1, 2, 3), keepdims=True), 1e-6
        elif training:
            mean, var, eps = y.mean((0, 2, 3), keepdims=True), y.var((0, 2, 3), keepdims=True), 1e-5
        else:
            mean, var = (per_channel(weights[f"{name}.running_{which}"]) for which in ("mean", "var"))
            eps = 1e-5
        return (y - mean) / np.sqrt(var + eps) * per_channel(scale) + per_channel(shift)

    def project(name: str, y: Array) -> Array:
        bias = weights.get(f"{name}.bias", np.zeros(len(weights[f"{name}.weight"])))
        return np.einsum("oc,bchw->bohw", weights[f"{name}.weight"][:, :, 0, 0], y) + per_channel(bias)

    if not grid_sizes:
        q, k, v = np.split(project("qkv", normalise("norm", x)), 3, axis=1)
        return project("proj", attention(q, k, v, head_dim))

    steps = []
    tokens = x
    for level, (grid, ratio) in enumerate(zip(grid_sizes, pool_ratios, strict=True)):
        name = f"local.{level}"
        q, k, v = np.split(project(f"{name}.qkv", normalise(f"{name}.norm", tokens)), 3, axis=1)
        inside = np.empty_like(tokens)
        for rows, columns in patches(tokens, grid):
            here = (slice(None), slice(None), rows, columns)
            inside[here] = attention(q[here], k[here], v[here], head_dim)
        step = normalise(f"{name}.grid_norm", tokens + inside)
        steps.append(step)
        tokens = pool(step, ratio)

    q = project("q", steps[0])
    k, v = np.split(project("kv", normalise("ds_norm", tokens)), 2, axis=1)
    y = attention(q, k, v, head_dim) + steps[0]
    size = 1
    for step, ratio in zip(steps[1:], pool_ratios, strict=False):
        size *= ratio
        for i, j in np.ndindex(y.shape[2:]):
            y[:, :, i, j] += step[:, :, i // size, j // size]
    return project("proj", y)


def attention(q: Array, k: Array, v: Array, head_dim: int) -> Array:
    """softmax(QKᵀ/√d)·V for each image, head and query; maps (B, C, H, W) and twice (B, C, H', W')."""
    out = np.empty_like(q)
    for b in range(q.shape[0]):
        for start in range(0, q.shape[1], head_dim):
            head = slice(start, start + head_dim)
            keys = k[b, head].reshape(head_dim, -1)  # (d, M)
            values = v[b, head].reshape(head_dim, -1)
            for i, j in np.ndindex(q.shape[2:]):
                scores = q[b, head, i, j] @ keys / np.sqrt(head_dim)
                share = np.exp(scores - scores.max())
                out[b, head, i, j] = values @ (share / share.sum())
    return out


def pool(x: Array, ratio: int) -> Array:
    """The mean of each patch, over the positions that it really has."""
    batch, channels, height, width = x.shape
    out = np.empty((batch, channels, -(-height // ratio), -(-width // ratio)))
    for rows, columns in patches(x, ratio):
        out[:, :, rows.start // ratio, columns.start // ratio] = x[:, :, rows, columns].mean((2, 3))
    return out


def patches(x: Array, size: int) -> list[tuple[slice, slice]]:
    """Where the size×size patches of a map lie, from the top left corner; those at the border are smaller."""
    height, width = x.shape[2:]
    return [
        (slice(i, min(i + size, height)), slice(j, min(j + size, width)))
        for i in range(0, height, size)
        for j in range(0, width, size)
    ]


def per_channel(values: Array) -> Array:
    return values[None, :, None, None]


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
