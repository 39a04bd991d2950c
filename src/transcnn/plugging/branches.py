"""What is plugged in: H-MHSA, or another attention, beside a module's output or in a convolution's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import create_attn, use_fused_attn
from torch import Tensor, nn

from ..attention import Conv
from ..backbone import ATTENTIONS, norm_layers
from ..errors import UserError
from ..grids import Size, merge, one_if_equal

__all__ = ["LAYERS", "NAME", "ConvReplacement", "HMHSABranch", "Layer", "Plug"]

NAME = "hmhsa"  # of the child that holds a branch
# timm's attention layers that need nothing but a number of channels, and keep the shape of every map.
LAYERS = ("se", "ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam", "sk", "splat", "lambda", "nl")
Layer = str | Callable[[int], nn.Module]


@dataclass(frozen=True)
class Plug:
    """All that it takes to make one plug again, without running the network: a line of :func:`plug_spec`."""

    at: str  # the module that H-MHSA follows, or the convolution that it replaces
    mode: str  # "add" or "replace"
    dim: int
    head_dim: int
    grid_sizes: tuple[Size, ...]
    pool_ratios: tuple[Size, ...]
    norm_layer: str | Callable[[int], nn.Module]
    stride: tuple[int, ...] = (1, 1)  # of a replaced convolution
    inside: str = ""  # the descendant of the module that holds the branch; "" is the module itself
    hooked: bool = False  # whether a forward hook runs the branch
    ndim: int = 2  # of the maps
    layer: Layer | None = None  # in the place of H-MHSA

    def attention(self, like: Tensor | None) -> nn.Module:
        made = {} if like is None else {"device": like.device, "dtype": like.dtype}
        if self.layer is not None:
            layer: Any = create_attn(self.layer, self.dim) if isinstance(self.layer, str) else self.layer(self.dim)
            if not isinstance(layer, nn.Module):
                raise UserError(f"layer must make a module from a number of channels, got a {type(layer).__name__}")
            return layer.to(**made)
        norm = norm_layers(self.ndim)[self.norm_layer] if isinstance(self.norm_layer, str) else self.norm_layer
        attention = ATTENTIONS[self.ndim](
            self.dim,
            head_dim=self.head_dim,
            grid_sizes=self.grid_sizes,
            pool_ratios=self.pool_ratios,
            norm_layer=norm,
            **made,
        )
        attention.set_fused_attn(use_fused_attn())
        return attention


class HMHSABranch(nn.Module):
    """``y = x + scale·HMHSA(x)``, (B, C, *S) -> (B, C, *S); ``scale`` is learnt per channel and starts at 0."""

    def __init__(self, plug: Plug, like: Tensor | None = None) -> None:
        super().__init__()
        self.plug = plug
        self.attn = plug.attention(like)
        like = next(self.attn.parameters(), like)
        made = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.scale = nn.Parameter(torch.zeros(plug.dim, **made))  # (C,)

    def reset_parameters(self) -> None:
        """The scale as at first, by the name under which PyTorch asks after ``to_empty``; its layers have their own."""
        nn.init.zeros_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S) of the same dtype, whatever autocast makes of the branch."""
        return x + (self.scale[(..., *(None,) * self.plug.ndim)] * self.attn(x)).to(x.dtype)


class ConvReplacement(nn.Module):
    """H-MHSA in a convolution's place, then average pooling by its stride, (B, C, *S) -> (B, C, *⌈S/s⌉).

    After Srinivas et al., "Bottleneck Transformers for Visual Recognition", arXiv 2101.11605. The convolution is kept
    for :func:`unplug`, outside of the tree: it is no part of ``parameters()`` or ``state_dict()``.
    """

    def __init__(self, plug: Plug, conv: Conv) -> None:
        super().__init__()
        self.plug = plug
        self.attn = plug.attention(conv.weight)
        self._conv = (conv,)  # in a tuple, so that it isn't registered

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *⌈S/s⌉)."""
        return merge(self.attn(x), one_if_equal(self.plug.stride))

    def original(self) -> Conv:
        """The replaced convolution, on the device and of the dtype that the network has now."""
        like = next(self.attn.parameters(), None)
        return self._conv[0] if like is None else self._conv[0].to(like)
