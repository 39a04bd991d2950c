"""A backbone's maps at strides 2, 4, 8, 16 and 32: what decoders and detectors are put on.

Any network of this package or of timm that has ``features_only``, and such a one plugged with H-MHSA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..plugging.build import build_model

__all__ = ["STRIDES", "Pyramid", "build_pyramid", "layers_below"]

STRIDES = (2, 4, 8, 16, 32)


def layers_below(network: nn.Module, body: nn.Module) -> Callable[[str], int]:
    """From a parameter's name to its layer, for layer-wise decay: the backbone's parts in order, then all on top of it.

    (As timm asks a ``group_matcher`` for it; without one it takes each 12 parameters for a layer.)
    """
    prefix = next(f"{name}." for name, module in network.named_modules() if module is body)
    parts = [name for name, part in body.named_children() if next(part.parameters(), None) is not None]

    def layer(name: str) -> int:
        part = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        return parts.index(part) if part in parts else len(parts)

    return layer


class Pyramid(nn.Module):
    """Images (B, C, H, W) to maps at the strides 2 (where the backbone has it), 4, 8, 16 and 32, finest first.

    Coarse levels that a backbone lacks are max-pooled from its last; of several maps of a stride the last is taken.
    Sizes are rounded up.

    Args:
        body: What gives the maps, finest first: timm's ``features_only`` network, plugged or not.
        channels: Of each map.
        reductions: Stride of each map.

    Attributes:
        channels: Of each stride in ``STRIDES``; 0 for stride 2 where the backbone begins with 4.
    """

    def __init__(self, body: nn.Module, channels: list[int], reductions: list[int]) -> None:
        super().__init__()
        self.body = body
        self.channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"  # timm's mark of Swin, MambaOut and the like
        self.places = {stride: i for i, stride in enumerate(reductions)}  # the last of equals
        usable = sorted(stride for stride in self.places if stride in STRIDES)
        if len(usable) < 2 or 4 not in usable or usable != list(STRIDES[STRIDES.index(usable[0]) :][: len(usable)]):
            raise UserError(
                f"a pyramid needs maps at strides 4, 8, 16 and 32 (coarse ones may be missing), this backbone has "
                f"{', '.join(map(str, reductions))}"
            )
        self.top = usable[-1]
        self.channels = [
            0 if stride < usable[0] else channels[self.places[min(stride, self.top)]] for stride in STRIDES
        ]

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """(B, C, H, W) -> {stride: (B, C', ⌈H/stride⌉, ⌈W/stride⌉)}."""
        maps = self.body(x)
        if self.channels_last:
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        found = {stride: maps[i] for stride, i in self.places.items() if stride in STRIDES}
        for stride in STRIDES[STRIDES.index(self.top) + 1 :]:
            found[stride] = F.max_pool2d(found[stride // 2], 2, ceil_mode=True)
        return dict(sorted(found.items()))


def build_pyramid(name: str, **kwargs: Any) -> Pyramid:
    """The pyramid of a network by name.

    Args:
        name: Of this package or of timm.
        kwargs: For ``timm.create_model``: ``pretrained``, ``in_chans``, and the network's own; ``plug`` puts H-MHSA in.

    Raises:
        UserError: No such network, or one without maps at these strides.
    """
    body = build_model(name, features_only=True, **kwargs)
    info: Any = body.feature_info
    return Pyramid(body, list(info.channels()), list(info.reduction()))
