"""What a stage of TransCNN and HAT-Net is made of: blocks, and the downsampling before them.

All take and give maps (B, C, H, W). Letters as in :mod:`transcnn.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .attention import HMHSA
from .layers import strided

__all__ = ["Block", "ConvDownsample", "DualDownsample", "InvertedResidual", "Stage", "Stem", "dilate"]


class Stem(nn.Sequential):
    """The layers of the stem one after another, (B, in_chans, H, W) -> (B, C, H', W').

    timm's ``features_only`` calls them by itself, without what :func:`transcnn.layers.strided` does for images up to
    four pixels wide.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W')."""
        x = input
        for layer in self:
            x = strided(layer, x)
        return x


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
        **dd: Any,
    ) -> None:
        super().__init__()
        hidden = dim * expansion
        expand = nn.Conv2d(dim, hidden, 1, bias=False, **dd)
        depthwise = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, bias=False, **dd)
        project = nn.Conv2d(hidden, dim, 1, bias=False, **dd)
        if pre_norm:
            self.conv1 = nn.Sequential(norm_layer(dim), expand, act_layer())
            self.conv2 = nn.Sequential(depthwise, act_layer())
        else:
            self.conv1 = nn.Sequential(expand, norm_layer(hidden), act_layer())
            self.conv2 = nn.Sequential(depthwise, norm_layer(hidden), act_layer())
        self.conv3 = nn.Sequential(project, norm_layer(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.conv3(self.conv2(self.conv1(x)))


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

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.irb(x))


def _as_buffers(module: nn.Module) -> nn.Module:
    """``module`` with its parameters turned into buffers of the same names."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
    return module


class ConvDownsample(nn.Module):
    """HAT-Net's downsampling: conv3x3/2, norm; (B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, in_chs: int, out_chs: int, *, norm_layer: Callable[[int], nn.Module], **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 3, stride=2, padding=1, **dd)
        self.norm = norm_layer(out_chs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""
        return self.norm(strided(self.conv, x))


class DualDownsample(nn.Module):
    """TransCNN's downsampling, a convolution and a pooling branch summed; (B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        norm_layer: Callable[[int], nn.Module],
        act_layer: Callable[[], nn.Module],
        **dd: Any,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 3, stride=2, padding=1, **dd)
        self.norm1 = norm_layer(out_chs)
        self.pool: nn.Module = nn.MaxPool2d(2, ceil_mode=True)  # rounds odd sizes up, as the strided convolution does
        self.residual = nn.Conv2d(in_chs, out_chs, 1, **dd)
        self.norm2 = norm_layer(out_chs)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""
        return self.act(self.norm1(strided(self.conv, x)) + self.norm2(self.residual(self._pooled(x))))

    def _pooled(self, x: Tensor) -> Tensor:
        if type(self.pool) is nn.MaxPool2d and torch.compiler.is_exporting():
            # The same for exported graphs: OpenVINO refuses to pool a map of one row or column.
            return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2)
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.downsample(x)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
