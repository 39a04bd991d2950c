"""Masks of real positions: what padding is kept out of, where a batch holds items of several sizes filled up to one.

A mask is (B, 1, *S), bool, for maps (B, C, *S), S being L, or H, W, or D, H, W. Letters as in
:mod:`transcnn.attention`.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

__all__ = ["check_mask", "keep_real", "never_none", "normalise", "unless_traced", "unless_whole"]


def unless_traced(mask: Tensor | None) -> Tensor | None:
    """``mask``; None where torch.fx traces, which gives every argument a stand-in: what it traces takes no mask."""
    return None if isinstance(mask, torch.fx.Proxy) else mask


def unless_whole(mask: Tensor | None) -> Tensor | None:
    """``mask``; None where every position is real: without a mask the same comes out, in two thirds of the time.

    Looked at on a CPU alone and where code runs eagerly: a GPU would be waited for, and a graph holds no such choice.
    """
    graph = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    if graph or type(mask) is not Tensor or mask.device.type != "cpu":
        return mask
    return None if mask.all() else mask


def keep_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` (B, C, *S) with zeros where ``mask`` (B, 1, *S) is false."""
    return x if mask is None else x.masked_fill(~mask, 0)


def normalise(norm: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``norm(x)``, (B, C, *S) -> (B, C, *S), its statistics those of the positions where ``mask`` is true."""
    if mask is None:
        return norm(x)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and (norm.training or norm.running_mean is None):
        return _normalise_batch(norm, x, mask[:, 0])
    if isinstance(norm, nn.GroupNorm) and not hasattr(norm, "act"):  # timm's with an activation have one
        return _normalise_items(norm, norm.num_groups, x, mask)
    if isinstance(norm, nn.modules.instancenorm._InstanceNorm) and not norm.track_running_stats:
        return _normalise_items(norm, x.shape[1], x, mask)
    return norm(x)


def _normalise_batch(norm: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Real positions, wherever in the batch, are for BatchNorm a batch of maps of one position each."""
    y = x.movedim(1, -1)  # (B, *S, C)
    real = y[mask]  # (n, C)
    if len(real):
        real = norm(real[(..., *(None,) * (x.ndim - 2))]).flatten(1)
    return y.new_zeros(y.shape, dtype=real.dtype).index_put((mask,), real).movedim(-1, 1)


def _normalise_items(norm: nn.Module, groups: int, x: Tensor, mask: Tensor) -> Tensor:
    """GroupNorm of each item over its real positions."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype).flatten(2).unflatten(1, (groups, -1))  # (B, groups, C/groups, N)
    real = mask.flatten(2)[:, None].to(dtype)  # (B, 1, 1, N)
    count = (real.sum(-1, keepdim=True) * y.shape[2]).clamp(min=1)  # (B, 1, 1, 1)
    y = y - (y * real).sum((2, 3), keepdim=True) / count
    variance = (y * real).square().sum((2, 3), keepdim=True) / count  # (B, groups, 1, 1)
    y = (y * (variance + norm.eps).rsqrt()).flatten(1, 2)  # pyright: ignore
    if norm.weight is not None:
        y = y * norm.weight[:, None] + norm.bias[:, None]  # pyright: ignore
    return y.view(x.shape).to(x.dtype)


def never_none(keys: Tensor | None) -> Tensor | None:
    """``keys`` (..., M), all of them where there would be none: a softmax of nothing isn't a number."""
    return None if keys is None else keys | ~keys.any(-1, keepdim=True)


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    """Refuse what is no mask of real positions for ``x`` (B, C, *S)."""
    if mask is None:
        return
    expected = (x.shape[0], 1, *x.shape[2:])
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(f"mask must be a bool tensor {expected}, got {mask.dtype} {tuple(mask.shape)}")
