"""Work in parts that fit a processor's cache.

What is several times as wide as the map itself (Q, K and V together, the hidden map of an inverted residual) costs more
time on its way to memory and back than in the arithmetic, and freshly taken memory costs even more. Made and used up a
few images, rows or tiles at a time it stays in the cache, and a large image needs little memory beyond its maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["Part", "eager_cpu", "hooked", "in_parts", "recorded"]

Part = tuple[slice, slice, slice]  # of the images, rows and columns; an index of (B, H, W, C)
CACHE = 2**23  # bytes of the widest map of one part


def eager_cpu(x: Tensor) -> bool:
    """Whether this runs on a processor, operation by operation."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def hooked(module: nn.Module) -> bool:
    """Whether somebody has hooks on this very module, which wouldn't fire where something else runs in its place."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def recorded() -> bool:
    """Whether something writes operations down or transforms them: it must see PyTorch's own, not our kernels."""
    transformed = torch._C._are_functorch_transforms_active()  # whose tensors have no memory of their own
    return torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0 or transformed


def in_parts(
    compute: Callable[[Part], Tensor],
    x: Tensor,
    channels: int,
    unit: int = 1,
    reach: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """``compute(part)`` for all parts of ``x`` (B, H, W, C), put together again.

    Parts are some images, rows of one image (``unit`` rows or a multiple, but for the last), or, where ``reach`` is
    given and rows would be too few, tiles of one image, so that a map of ``channels`` fits the cache. Where there is
    no such cache to mind, the whole is one part.

    Args:
        compute: Gives the result (b, h, w, C') of a part; ``x[part]`` is what it covers.
        x: What the parts are of.
        channels: Of the widest map that ``compute`` makes.
        unit: How many rows belong together.
        reach: How far beyond its part ``compute`` looks; that border is computed twice, so tiles are kept compact.
        out: A map that nobody needs any more, to put the results in; it may be left as it is.
    """
    found = list(_parts(x, channels, unit, reach))
    if len(found) == 1:
        return compute(found[0])
    for part in found:
        piece = compute(part)
        if out is None:
            out = piece.new_empty(*x.shape[:3], piece.shape[3])
        out[part] = piece
    assert out is not None
    return out


def _parts(x: Tensor, channels: int, unit: int, reach: int) -> Iterator[Part]:
    batch, height, width, _ = x.shape
    if not eager_cpu(x) or not x.numel():
        yield slice(0, batch), slice(0, height), slice(0, width)
        return
    room = max(1, CACHE // (channels * x.element_size()))  # positions that fit
    images, rows, columns = max(1, room // (height * width)), height, width
    if height * width > room:
        least = max(1, 8 * reach)  # of fewer, a fifth and more would be computed twice
        if reach and room // width < least:
            columns = _even(width, max(least, math.isqrt(room)))
        rows = max(unit, least, room // columns // unit * unit)
    for first in range(0, batch, images):
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                yield (
                    slice(first, min(first + images, batch)),
                    slice(top, min(top + rows, height)),
                    slice(left, min(left + columns, width)),
                )


def _even(length: int, most: int) -> int:
    """The size of equal pieces of ``length``, none longer than ``most``."""
    return math.ceil(length / math.ceil(length / most))
