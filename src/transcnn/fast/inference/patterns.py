"""Which modules :func:`transcnn.fast.optimize` may replace: those whose function is known from their classes alone.

A subclass may have a forward pass of its own, a hook may change what a module returns, and a plugged module takes the
place of one of ours. So classes must be exactly the expected ones, without hooks, at every level below; everything else
stays as it is.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from timm.layers import DropPath
from torch import nn

from ...attention import HMHSA, HMHSA1d, HMHSA3d, LocalStep
from ...blocks import Block, ConvDownsample, DualDownsample, InvertedResidual, Stem
from ..dispatch import hooked
from .layers import is_plain_conv

__all__ = ["is_block", "is_conv_downsample", "is_dual_downsample", "is_hmhsa", "is_stem", "unhooked"]


def unhooked(module: nn.Module) -> bool:
    """Whether no hooks are registered on this module or below."""
    return not any(map(hooked, module.modules()))


def is_block(module: Any) -> bool:
    """A block with its inverted residual."""
    if type(module) is not Block or type(module.drop_path) not in (nn.Identity, DropPath):
        return False
    return is_hmhsa(module.attn) and _is_inverted_residual(module.irb)


def is_hmhsa(module: Any) -> bool:
    """An H-MHSA with its local steps and projections."""
    if type(module) not in (HMHSA, HMHSA1d, HMHSA3d):
        return False
    steps = [step for step in module.local if type(step) is LocalStep]
    projections = [module.q, module.kv] if module.local else [module.qkv]
    convs = [*projections, module.proj, *(step.qkv for step in steps)]
    return len(steps) == len(module.local) and all(map(is_plain_conv, convs))


def is_dual_downsample(module: Any) -> bool:
    """TransCNN's downsampling."""
    return type(module) is DualDownsample and is_plain_conv(module.conv) and is_plain_conv(module.residual)


def is_conv_downsample(module: Any) -> bool:
    """HAT-Net's downsampling."""
    return type(module) is ConvDownsample and is_plain_conv(module.conv)


def is_stem(module: Any) -> TypeGuard[Stem]:
    """TransCNN's stem."""
    return type(module) is Stem and all(map(is_plain_conv, _convs(module)))


def _is_inverted_residual(module: Any) -> bool:
    if type(module) is not InvertedResidual:
        return False
    parts = (module.conv1, module.conv2, module.conv3)
    return all(type(part) is nn.Sequential for part in parts) and all(map(is_plain_conv, _convs(*parts)))


def _convs(*modules: nn.Sequential | Stem) -> list[nn.Module]:
    """The convolutions among these layers."""
    return [layer for module in modules for layer in module if isinstance(layer, nn.modules.conv._ConvNd)]
