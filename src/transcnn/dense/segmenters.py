"""Networks for segmentation: a backbone's pyramid, a decoder of segmentation-models-pytorch, a 1x1 layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, require
from ..plain import with_new_names
from .pyramid import Pyramid, build_pyramid, layers_below

__all__ = ["DECODERS", "Segmenter", "build", "class_weights"]

COARSEST = 32


def _fpn(channels: list[int], width: int) -> tuple[nn.Module, int]:
    """Panoptic FPN's (Kirillov et al., 1901.02446), which PVT and our paper call Semantic FPN; stride 4."""
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

    if width % 64:
        raise UserError(f"decoder_channels of fpn must be a multiple of 64 (its norms have 32 groups), got {width}")
    return FPNDecoder(channels, pyramid_channels=width, segmentation_channels=width // 2), width // 2


def _pspnet(channels: list[int], width: int) -> tuple[nn.Module, int]:
    """Pyramid pooling (Zhao et al., 1612.01105) of the coarsest map; stride 32."""
    from segmentation_models_pytorch.decoders.pspnet.decoder import PSPDecoder

    return PSPDecoder(channels, out_channels=width), width


def _upernet(channels: list[int], width: int) -> tuple[nn.Module, int]:
    """UPerNet (Xiao et al., 1807.10221): pyramid pooling on top of an FPN, all levels merged; stride 4."""
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    return UPerNetDecoder(channels, decoder_channels=width), width


def _unet(channels: list[int], width: int) -> tuple[nn.Module, int]:
    """U-Net (Ronneberger et al., 1505.04597) up to full size, half as wide with each step; stride 1."""
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

    widths = [max(8, width >> step) for step in range(5)]
    return UnetDecoder(channels, decoder_channels=widths), widths[-1]


DECODERS = {"fpn": (_fpn, 256), "pspnet": (_pspnet, 512), "upernet": (_upernet, 256), "unet": (_unet, 256)}


class Segmenter(nn.Module):
    """Images (B, C, H, W) of any size to logits (B, classes, H, W).

    Sizes that the decoder's downsampling doesn't divide are padded with zeros on the right and below, and the logits
    cropped.

    Args:
        backbone: The pyramid.
        decoder: One of ``DECODERS``.
        num_classes: Outputs for each pixel.
        decoder_channels: Its width; None is what its paper has.
        logit_adjustment: Subtracted from the logits of each class in evaluation (classes,).
    """

    def __init__(
        self,
        backbone: Pyramid,
        decoder: str,
        num_classes: int,
        in_chans: int,
        decoder_channels: int | None = None,
        logit_adjustment: Tensor | None = None,
    ) -> None:
        super().__init__()
        require("segmentation_models_pytorch", "dense")
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head

        if decoder not in DECODERS:
            raise UserError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        make, width = DECODERS[decoder]
        width = width if decoder_channels is None else decoder_channels
        if width < 8:
            raise UserError(f"decoder_channels must be 8 or more, got {width}")
        self.backbone = backbone
        self.decoder, channels = make([in_chans, *backbone.channels], width)
        self.head = SegmentationHead(channels, num_classes, kernel_size=1)
        initialize_decoder(self.decoder)
        initialize_head(self.head)
        self.register_buffer("logit_adjustment", logit_adjustment, persistent=False)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.pretrained_cfg = {**(getattr(backbone.body, "pretrained_cfg", None) or {}), "classifier": "head.0"}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes, H, W)."""
        height, width = x.shape[-2:]
        # BatchNorm needs more than one position, so an image of one tile gets a second one: without a branch, which a
        # traced graph would keep as it was for the example.
        tiles = (torch.sym_max(height, width) + COARSEST - 1) // COARSEST
        alone = COARSEST * (2 - torch.sym_min(tiles, 2))
        x = F.pad(x, (0, -width % COARSEST + alone, 0, -height % COARSEST))  # pyright: ignore  (sizes of a trace)
        maps = self.backbone(x)
        # The decoders' lists begin with the image and stride 2, of which a map without channels stands for none.
        finest = maps.get(2, x.new_zeros(x.shape[0], 0, x.shape[2] // 2, x.shape[3] // 2))
        logits = self.head(self.decoder([x, finest, *(maps[stride] for stride in maps if stride > 2)]))
        logit_adjustment: Any = self.logit_adjustment
        if logit_adjustment is not None and not self.training:
            logits = logits - logit_adjustment[:, None, None]
        if logits.shape[-2:] != x.shape[-2:]:
            logits = F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    @property
    def body(self) -> nn.Module:
        """The backbone's own module."""
        return self.backbone.body

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer of each parameter, for layer-wise decay."""
        return layers_below(self, self.body)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Less memory for about a third more time in the backbone."""
        self.body.set_grad_checkpointing(enable)  # pyright: ignore


def build(name: str, task_args: dict[str, Any], *, num_classes: int, in_chans: int = 3, **kwargs: Any) -> Segmenter:
    """A segmenter by its backbone's name.

    Args:
        name: Of this package or of timm.
        task_args: The fields of :class:`~transcnn.settings.Segment`, and the classes' ``shares`` of training pixels.
        num_classes, in_chans, kwargs: As for the backbone.

    Raises:
        UserError: No such network or decoder, or settings outside their values.
    """
    task_args = with_new_names(task_args)
    strength = task_args.get("logit_adjustment", 0.0)
    if not 0 <= strength <= 1:
        raise UserError(f"logit_adjustment must be from 0 to 1, got {strength}")
    weights = class_weights(task_args.get("class_weights", "none"), task_args.get("shares"))
    logit_adjustment = None
    if strength and weights is not None:
        logit_adjustment = strength * torch.where(weights > 0, weights, 1.0).log()
    backbone = build_pyramid(name, in_chans=in_chans, **kwargs)
    return Segmenter(
        backbone, task_args["decoder"], num_classes, in_chans, task_args.get("decoder_channels"), logit_adjustment
    )


def class_weights(kind: str, shares: list[float] | None) -> Tensor | None:
    """A weight for each class by its share of the training pixels; classes that don't occur weigh nothing."""
    if kind == "none" or not shares:
        return None
    share = torch.tensor(shares)
    occurs = share > 0
    weights = share[occurs].median() / share.clamp(min=1e-9) if kind == "median" else 1 / torch.log(1.02 + share)
    return torch.where(occurs, weights, 0.0)
