"""Backbones of the paper's bibliography that neither timm nor torchvision has: from transformers and vit-pytorch.

They come with the extra "peers". Widths and depths are those of each network's own paper. PVT is the paper's to the
last parameter; vit-pytorch's networks differ from their papers' in details (T2T-ViT's tokens are wider before the first
block, LocalViT's local layer has a further 1x1 convolution): parameters, speed and accuracy are not those papers'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..errors import UserError, require

__all__ = ["MISSING", "PEERS"]

# Of the bibliography, what no library that is kept has.
MISSING = ("CeiT (arXiv 2103.11816)",)


class _Logits(nn.Module):
    """A classifier of transformers that takes images and gives logits, (B, 3, H, W) -> (B, classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        return self.model(x).logits


def _pvt(size: int, **arguments: Any) -> nn.Module:
    """PVT (arXiv 2102.12122) for images of side ``size``."""
    transformers = _require("transformers")
    config = transformers.PvtConfig(image_size=size, num_labels=1000, **arguments)
    return _Logits(transformers.PvtForImageClassification(config))


def _vit_pytorch(name: str, module: str, size: int, **arguments: Any) -> nn.Module:
    return getattr(_require(f"vit_pytorch.{module}"), name)(image_size=size, num_classes=1000, **arguments)


def _pvt_tiny(size: int, **changes: Any) -> nn.Module:
    return _pvt(size, **{"depths": [2, 2, 2, 2], **changes})


def _pvt_small(size: int, **changes: Any) -> nn.Module:
    return _pvt(size, **{"depths": [3, 4, 6, 3], **changes})


def _deepvit_s(size: int, **changes: Any) -> nn.Module:
    """DeepViT-S (arXiv 2103.11886)."""
    sizes = dict(patch_size=16, dim=396, depth=16, heads=12, dim_head=33, mlp_dim=3 * 396)
    return _vit_pytorch("DeepViT", "deepvit", size, **{**sizes, **changes})


def _t2t_vit_14(size: int, **changes: Any) -> nn.Module:
    """T2T-ViT-14 (arXiv 2101.11986)."""
    sizes = dict(dim=384, depth=14, heads=6, dim_head=64, mlp_dim=3 * 384)
    return _vit_pytorch("T2TViT", "t2t", size, **{**sizes, **changes})


def _localvit_t(size: int, **changes: Any) -> nn.Module:
    """LocalViT-T (arXiv 2104.05707)."""
    sizes = dict(patch_size=16, dim=192, depth=12, heads=3, dim_head=64, mlp_dim=4 * 192)
    model = _vit_pytorch("LocalViT", "local_vit", size, **{**sizes, **changes})
    # vit-pytorch 1.26.14 has a norm over the last axis on maps (B, C, H, W), which fails; over the channels is meant.
    for layer in model.modules():
        net = getattr(layer, "net", None)
        first = net[0] if isinstance(net, nn.Sequential) else None
        if isinstance(net, nn.Sequential) and isinstance(first, nn.LayerNorm) and isinstance(net[1], nn.Conv2d):
            net[0] = LayerNorm2d(first.normalized_shape[0])
    return model


# By name: makes the network for images of a side, with further arguments of its class.
PEERS: dict[str, Callable[..., nn.Module]] = {
    "pvt_tiny": _pvt_tiny,
    "pvt_small": _pvt_small,
    "deepvit_s": _deepvit_s,
    "t2t_vit_14": _t2t_vit_14,
    "localvit_t": _localvit_t,
}


def _require(module: str) -> Any:
    try:
        return require(module, "peers")
    except UserError as error:  # no fault of the user's where other networks are compared as well: a remark on its line
        raise ModuleNotFoundError(str(error)) from error
