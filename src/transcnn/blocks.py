"""What a stage of TransCNN and HAT-Net is made of: blocks, and the downsampling before them.

All take and give maps (B, C, H, W), or sequences (B, C, L) or volumes (B, C, D, H, W) where ``ndim`` is 1 or 3, and,
where items of several sizes are filled up to one, which positions of those are real, (B, 1, H, W). Padding is zero
before every convolution that mixes positions, and enters no statistics and no maximum. Letters as in
:mod:`transcnn.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, use_fused_attn
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .attention import CONVS, HMHSA
from .grids import Size, coarser
from .layers import strided
from .masking import keep_real, normalise, unless_traced

MAX_POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}

__all__ = ["Block", "ConvDownsample", "DualDownsample", "InvertedResidual", "Parts", "Stage", "Stem", "dilate"]


class Stem(nn.Sequential):
    """The layers of the stem one after another, (B, in_chans, H, W) -> (B, C, H', W').

    timm's ``features_only`` calls them by itself, without what :func:`transcnn.layers.strided` does for images up to
    four pixels wide.
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W')."""
        x, mask = input, unless_traced(mask)
        if mask is not None:
            return self._masked(x, mask)
        for layer in self:
            x = strided(layer, x)
        return x

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, nn.modules.conv._ConvNd):
                x, mask = strided(layer, keep_real(x, mask)), coarser(mask, layer.stride)
            else:
                x = normalise(layer, x, mask)
        return keep_real(x, mask)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection, (B, C, H, W) -> (B, C, H, W); no residual inside.

    ``pre_norm=False`` (TransCNN) normalises after each convolution, ``pre_norm=True`` (HAT-Net) before the first and
    after the last.
    """

    def __init__(
        self,
        dim: int,
        expansion: int,
        kernel_size: int,
        *,
        pre_norm: bool,
        norm_layer: Callable[[int], nn.Module],
        act_layer: Callable[[], nn.Module],
        ndim: int = 2,
        **dd: Any,
    ) -> None:
        super().__init__()
        hidden, conv = dim * expansion, CONVS[ndim]
        expand = conv(dim, hidden, 1, bias=False, **dd)
        depthwise = conv(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, bias=False, **dd)
        project = conv(hidden, dim, 1, bias=False, **dd)
        if pre_norm:
            self.conv1 = nn.Sequential(norm_layer(dim), expand, act_layer())
            self.conv2 = nn.Sequential(depthwise, act_layer())
        else:
            self.conv1 = nn.Sequential(expand, norm_layer(hidden), act_layer())
            self.conv2 = nn.Sequential(depthwise, norm_layer(hidden), act_layer())
        self.conv3 = nn.Sequential(project, norm_layer(dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        mask = unless_traced(mask)
        if mask is None:
            return self.conv3(self.conv2(self.conv1(x)))
        for layers in (self.conv1, self.conv2, self.conv3):
            for layer in layers:
                x = normalise(layer, x, mask)
            x = keep_real(x, mask)
        return x


class Block(nn.Module):
    """x + DropPath(H-MHSA(x)), then x + DropPath(InvertedResidual(x)); (B, C, H, W) -> (B, C, H, W).

    ``proj_norm`` is a layer that the published HAT-Net weights hold and its forward pass never uses. It is kept so that
    checkpoints are the published ones, as buffers: nothing that freezes or thaws parameters makes an optimizer or DDP
    wait for its gradient.
    """

    def __init__(
        self, attn: HMHSA, irb: InvertedResidual, drop_path: float = 0.0, proj_norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.attn = attn
        self.irb = irb
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        if proj_norm is not None:
            self.proj_norm = _as_buffers(proj_norm)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        mask = unless_traced(mask)
        if mask is None:
            x = x + self.drop_path(self.attn(x))
            return x + self.drop_path(self.irb(x))
        x = x + self.drop_path(self.attn(x, mask))
        return x + self.drop_path(self.irb(x, mask))


def _as_buffers(module: nn.Module) -> nn.Module:
    """``module`` with its parameters turned into buffers of the same names."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
    return module


class ConvDownsample(nn.Module):
    """HAT-Net's downsampling: conv3x3/2, norm; (B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(
        self, in_chs: int, out_chs: int, *, norm_layer: Callable[[int], nn.Module], ndim: int = 2, **dd: Any
    ) -> None:
        super().__init__()
        self.conv = CONVS[ndim](in_chs, out_chs, 3, stride=2, padding=1, **dd)
        self.norm = norm_layer(out_chs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""
        mask = unless_traced(mask)
        if mask is None:
            return self.norm(strided(self.conv, x))
        real = coarser(mask, self.conv.stride)
        return keep_real(normalise(self.norm, strided(self.conv, x), real), real)


class DualDownsample(nn.Module):
    """TransCNN's downsampling, a convolution and a pooling branch summed; (B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        norm_layer: Callable[[int], nn.Module],
        act_layer: Callable[[], nn.Module],
        ndim: int = 2,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.conv = CONVS[ndim](in_chs, out_chs, 3, stride=2, padding=1, **dd)
        self.norm1 = norm_layer(out_chs)
        self.pool: nn.Module = MAX_POOLS[ndim](
            2, ceil_mode=True
        )  # rounds odd sizes up, as the strided convolution does
        self.residual = CONVS[ndim](in_chs, out_chs, 1, **dd)
        self.norm2 = norm_layer(out_chs)
        self.act = act_layer()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""
        mask = unless_traced(mask)
        if mask is None:
            return self.act(self.norm1(strided(self.conv, x)) + self.norm2(self.residual(self._pooled(x))))
        real = coarser(mask, self.conv.stride)
        pooled = keep_real(self._pooled(x.masked_fill(~mask, -torch.inf)), real)
        y = normalise(self.norm1, strided(self.conv, x), real) + normalise(self.norm2, self.residual(pooled), real)
        return keep_real(self.act(y), real)

    def _pooled(self, x: Tensor) -> Tensor:
        if type(self.pool) in MAX_POOLS.values() and torch.compiler.is_exporting():
            # The same for exported graphs: OpenVINO refuses to pool a map of one row or column.
            ndim = x.ndim - 2
            return MAX_POOLS[ndim](2)(F.pad(x, (0, 1) * ndim, value=-torch.inf))
        return self.pool(x)


def dilate(stage: Stage, rate: int) -> None:
    """Let a stage keep the size of the map that it gets, dilated so that its weights see the same pixels as before.

    In place: its downsampling gets a stride of 1 and the dilation of the map before it (``rate``), its depthwise
    convolutions twice that. At every second row and column its convolutions compute what they did with the stride.
    """
    down = stage.downsample
    if isinstance(down, ConvDownsample | DualDownsample):
        down.conv.stride, down.conv.dilation, down.conv.padding = (1, 1), (rate, rate), (rate, rate)
    if isinstance(down, DualDownsample):
        beyond = nn.ConstantPad2d((0, rate, 0, rate), -torch.inf)  # the largest of those that there are
        down.pool = nn.Sequential(beyond, nn.MaxPool2d(2, stride=1, dilation=rate))
    for block in stage.blocks:
        conv: Any = block.irb.conv2[0]  # pyright: ignore
        conv.dilation = (2 * rate, 2 * rate)
        conv.padding = (2 * rate * (conv.kernel_size[0] // 2),) * 2


class Stage(nn.Module):
    """A downsampling and a row of blocks, (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def coarser(self, mask: Tensor) -> Tensor:
        """Which positions of this stage's map are real, given those of its input's."""
        conv = getattr(self.downsample, "conv", None)  # the first stage has none
        return mask if conv is None else coarser(mask, conv.stride)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        mask = unless_traced(mask)
        if mask is not None:
            return self._masked(x, mask)
        x = self.downsample(x)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.downsample(x) if isinstance(self.downsample, nn.Identity) else self.downsample(x, mask)
        blocks = [partial(block, mask=self.coarser(mask)) for block in self.blocks]
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(blocks, x)
        for block in blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class Parts:
    """Makes a network's parts, all of one design, with the same kinds of attention, norm and activation."""

    design: str  # transcnn or hatnet
    attention: type[HMHSA]
    norm_layer: Callable[[int], nn.Module]
    act_layer: Callable[[], nn.Module]
    dd: dict[str, Any]  # device and dtype

    def norm(self, channels: int) -> nn.Module:
        return self.norm_layer(channels).to(**self.dd)

    def stem(self, in_chans: int, width: int, dim: int, strides: tuple[int, int]) -> Stem:
        """Two convolutions with a norm between them."""
        conv = CONVS[self.attention.ndim]
        return Stem(
            conv(in_chans, width, 3, stride=strides[0], padding=1, **self.dd),
            self.norm(width),
            self.act_layer(),
            conv(width, dim, 3, stride=strides[1], padding=1, **self.dd),
        )

    def downsample(self, in_dim: int | None, dim: int) -> nn.Module:
        """What stands before a stage's blocks: nothing before the first, whose ``in_dim`` is None."""
        if in_dim is None:
            return nn.Identity()
        norm, ndim = self.norm, self.attention.ndim
        if self.design == "hatnet":
            return ConvDownsample(in_dim, dim, norm_layer=norm, ndim=ndim, **self.dd)
        return DualDownsample(in_dim, dim, norm_layer=norm, act_layer=self.act_layer, ndim=ndim, **self.dd)

    def block(
        self,
        dim: int,
        expansion: int,
        kernel_size: int,
        head_dim: int | None,
        grid_sizes: Sequence[Size],
        pool_ratios: Sequence[Size],
        drop_path: float,
    ) -> Block:
        """H-MHSA and an inverted residual."""
        hatnet, levels = self.design == "hatnet", dict(grid_sizes=grid_sizes, pool_ratios=pool_ratios)
        attn = self.attention(dim, head_dim=head_dim, **levels, norm_layer=self.norm, **self.dd)
        attn.set_fused_attn(use_fused_attn())
        irb = InvertedResidual(
            dim,
            expansion,
            kernel_size,
            pre_norm=hatnet,
            norm_layer=self.norm,
            act_layer=self.act_layer,
            ndim=self.attention.ndim,
            **self.dd,
        )
        return Block(attn, irb, drop_path, proj_norm=self.norm(dim) if hatnet else None)
