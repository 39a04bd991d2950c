"""What the networks do around PyTorch's strided convolutions, so that those are right in bfloat16 on a CPU, too.

Where a stride of 2 leaves one column, PyTorch's bfloat16 kernels for CPUs are wrong: from five rows on the output is
uninitialised memory, often NaN, and so are columns of the weight gradient. Further columns of zeros give a second
column, which is cut off.
"""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["drop_columns", "strided", "widen"]


def strided(conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(x)``, correct in bfloat16 on narrow maps, too, (B, C, H, W) -> (B, C', H', W').

    Hooks of the convolution see the wider maps. Another module in the convolution's place, or one with other options
    than a network's (3x3, padded with zeros by its dilation), is just called.
    """
    if not isinstance(conv, nn.Conv2d) or not _as_made(conv):
        return conv(x)
    return drop_columns(conv(widen(x)), x)


def _as_made(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (3, 3) and conv.padding == conv.dilation and conv.padding_mode == "zeros"


def widen(x: Tensor) -> Tensor:
    """A map of one or two columns with columns of zeros up to three, where PyTorch needs them; others as they are."""
    return F.pad(x, (0, 3 - x.shape[-1])) if _too_narrow(x) else x


def drop_columns(y: Tensor, x: Tensor) -> Tensor:
    """What a convolution made of ``widen(x)``, without the columns that it would not have made of ``x``."""
    if not _too_narrow(x):
        return y
    return y[..., :1] if y.shape[-1] == 2 else y[..., : x.shape[-1]]  # with a stride of 2, with none


def _too_narrow(x: Tensor) -> bool:
    if x.shape[-1] > 2 or x.device.type != "cpu" or torch.compiler.is_exporting():  # files take any size
        return False
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16 or autocast


torch.fx.wrap("widen")  # their branches on the size can't be traced
torch.fx.wrap("drop_columns")
