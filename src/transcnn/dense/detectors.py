"""Networks for detection: torchvision's RetinaNet, Faster R-CNN and Mask R-CNN on a backbone's pyramid with an FPN."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ..data.images import padding_of
from ..errors import UserError
from ..layers import strided
from .pyramid import Pyramid, build_pyramid, layers_below

__all__ = ["DETECTORS", "Detector", "build"]

DETECTORS = ("retinanet", "fasterrcnn", "maskrcnn")
RATIOS = (0.5, 1.0, 2.0)


class PyramidFPN(nn.Module):
    """Images to the five maps that detectors look at, all of ``out_channels``; what torchvision calls a backbone.

    RetinaNet looks at strides 8 to 128, the others at 4 to 64.
    """

    def __init__(self, pyramid: Pyramid, out_channels: int, *, retina: bool) -> None:
        super().__init__()
        self.strides = (8, 16, 32) if retina else (4, 8, 16, 32)
        self.pyramid = pyramid
        extra = CoarseLevels(out_channels, out_channels) if retina else LastLevelMaxPool()
        channels = pyramid.channels[-len(self.strides) :]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra, nn.BatchNorm2d)
        self.out_channels = out_channels
        self.autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> five maps of float32, the finest first."""
        enabled, dtype = self.autocast
        with torch.autocast(x.device.type, dtype, enabled=enabled):
            maps = self.pyramid(x)
            found = self.fpn(OrderedDict((str(stride), maps[stride]) for stride in self.strides))
        return {name: value.float() for name, value in found.items()}


class CoarseLevels(LastLevelP6P7):
    """Strides 64 and 128, by convolutions that can be learnt in bfloat16 however narrow the image is."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """The FPN's maps, those that it was given, and its names; the maps and names with two more."""
        p6 = strided(self.p6, p[-1] if self.use_P5 else c[-1])
        return [*p, p6, strided(self.p7, F.relu(p6))], [*names, "p6", "p7"]


class Detector(nn.Module):
    """A detector of torchvision with our names: classes from 0 on, whatever the detector does about background.

    Under autocast only the pyramid is computed in 16 bits: coordinates of boxes need more.

    Args:
        net: The detector.
        offset: What the detector's labels are above ours.
    """

    def __init__(self, net: RetinaNet | FasterRCNN, offset: int, in_chans: int) -> None:
        super().__init__()
        self.net = net
        self.offset = offset
        self.in_chans = in_chans
        self.pretrained_cfg = {**(getattr(self.body, "pretrained_cfg", None) or {}), "classifier": self._class_layers()}

    @property
    def body(self) -> nn.Module:
        """The backbone's own module."""
        return self.net.backbone.pyramid.body  # pyright: ignore

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """In training a dictionary of losses, else for each image ``boxes``, ``labels``, ``scores`` (and ``masks``).

        What is found in an image doesn't depend on the others of the batch. In training images are padded to the
        largest of their batch.

        Args:
            images: Each (C, H, W) from 0 to 1, of any size.
            targets: Each ``boxes`` (N, 4) as x1, y1, x2, y2, ``labels`` (N,) and, for Mask R-CNN, ``masks`` (N, H, W).
        """
        kind = images[0].device.type
        self.net.backbone.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))  # pyright: ignore
        padded = [self._pad_short_side(image) for image in images]
        if targets is not None:
            targets = [
                {**target, "labels": target["labels"] + self.offset, **self._pad_masks(target)} for target in targets
            ]
        with torch.autocast(kind, enabled=False):
            if self.training:
                return self.net(padded, targets)
            found: dict[int, dict[str, Tensor]] = {}
            for chosen in self._of_one_size(padded):
                found.update(zip(chosen, self.net([padded[i] for i in chosen]), strict=True))
        return [self._inside(found[i], *image.shape[-2:]) for i, image in enumerate(images)]

    def _of_one_size(self, images: list[Tensor]) -> list[list[int]]:
        """The indices of images that torchvision pads to one size, so that each is seen as it is alone.

        Padding to the largest image of a batch would change what is found in the others.
        """
        sizes: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            like, _ = self.net.transform([torch.empty(image.shape, device="meta")])  # pyright: ignore
            sizes.setdefault(like.tensors.shape, []).append(i)
        return list(sizes.values())

    def _pad_short_side(self, image: Tensor) -> Tensor:
        """Pad an image of extreme aspect ratio with black: its short side would vanish in resizing."""
        height, width = image.shape[-2:]
        below, beside = padding_of((width, height), self.net.transform.max_size)  # pyright: ignore
        return F.pad(image, (0, beside, 0, below)) if below or beside else image

    def _pad_masks(self, target: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"masks": self._pad_short_side(target["masks"])} if "masks" in target else {}

    def _inside(self, row: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
        """One image's detections, with our labels, without what lies in the padding."""
        boxes = clip_boxes_to_image(row["boxes"], (height, width))
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
        row = {**row, "boxes": boxes, "labels": row["labels"] - self.offset}
        if "masks" in row:
            row["masks"] = row["masks"][..., :height, :width]
        return row if bool(kept.all()) else {name: value[kept] for name, value in row.items()}

    def _class_layers(self) -> list[str]:
        """The layers whose size depends on the number of classes, as ``load_checkpoint`` asks."""
        layers = ("head.classification_head.cls_logits", "roi_heads.box_predictor.cls_score")
        layers += ("roi_heads.box_predictor.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits")
        known = dict(self.net.named_modules())
        return [f"net.{layer}" for layer in layers if layer in known]

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer of each parameter, for layer-wise decay."""
        return layers_below(self, self.body)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Less memory for about a third more time in the backbone."""
        self.body.set_grad_checkpointing(enable)  # pyright: ignore


def build(name: str, task_args: dict[str, Any], *, num_classes: int, in_chans: int = 3, **kwargs: Any) -> Detector:
    """A detector by its backbone's name.

    Args:
        name: Of this package or of timm.
        task_args: The fields of :class:`~transcnn.settings.Detect`.
        num_classes: Without background.

    Raises:
        UserError: No such detector or network, or sizes that make no sense.
    """
    a = task_args
    if a["detector"] not in DETECTORS:
        raise UserError(f"detector must be one of {', '.join(DETECTORS)}, got {a['detector']!r}")
    if a["fpn_channels"] < 16 or a["fpn_channels"] % 16:
        raise UserError(f"fpn_channels must be a multiple of 16, got {a['fpn_channels']}")
    low, high = a["side_range"]
    if not 0 < low <= high or not 32 <= a["short_side"] <= a["long_side"]:
        raise UserError("short_side must be 32 or more, long_side not less, side_range two numbers above 0")
    if a.get("rois", 512) < 4:
        raise UserError(f"rois must be 4 or more, got {a['rois']}")
    pyramid = build_pyramid(name, in_chans=in_chans, **kwargs)
    cfg: Any = getattr(pyramid.body, "pretrained_cfg", None) or {}
    mean, std = (list(a.get(f"image_{name}") or cfg.get(name, ())) for name in ("mean", "std"))
    if not len(mean) == len(std) == in_chans:
        mean, std = [0.5] * in_chans, [0.25] * in_chans
    # torchvision draws one of these in training; the last one counts in evaluation.
    sides = [round(a["short_side"] * (low + (high - low) * i / 4)) for i in range(5)] if low < high else []
    common: dict[str, Any] = {
        "min_size": (*sides, a["short_side"]),
        "max_size": a["long_side"],
        "image_mean": mean,
        "image_std": std,
    }
    retina = a["detector"] == "retinanet"
    backbone = PyramidFPN(pyramid, a["fpn_channels"], retina=retina)
    base = [(a.get("anchor_size") or 32) * 2**level for level in range(5)]
    make = _retinanet if retina else _rcnn
    return Detector(make(backbone, num_classes, base, a, common), 0 if retina else 1, in_chans)


def _retinanet(backbone: PyramidFPN, classes: int, base: list[int], a: dict[str, Any], common: Any) -> RetinaNet:
    """Lin et al., 1708.02002; norms in its heads, as torchvision's second version has them."""
    anchors = AnchorGenerator(tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in base), (RATIOS,) * 5)
    width = backbone.out_channels
    norm = partial(nn.GroupNorm, math.gcd(width // 4, 32))
    head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], classes, norm_layer=norm)
    found = {"score_thresh": a["min_score"], "detections_per_img": a["max_found"]}
    return RetinaNet(backbone, classes, anchor_generator=anchors, head=head, **found, **common)


def _rcnn(backbone: PyramidFPN, classes: int, base: list[int], a: dict[str, Any], common: Any) -> FasterRCNN:
    """Ren et al., 1506.01497, and He et al., 1703.06870; a background class comes first."""
    width, levels = backbone.out_channels, ["4", "8", "16", "32"]
    parts: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(tuple((size,) for size in base), (RATIOS,) * 5),
        "box_roi_pool": MultiScaleRoIAlign(levels, 7, 2),
        "box_head": TwoMLPHead(width * 49, 4 * width),
        "box_predictor": FastRCNNPredictor(4 * width, classes + 1),
        "box_batch_size_per_image": a.get("rois", 512),
        "box_score_thresh": a["min_score"],
        "box_detections_per_img": a["max_found"],
    }
    if a["detector"] == "fasterrcnn":
        return FasterRCNN(backbone, **parts, **common)
    masks = {
        "mask_roi_pool": MultiScaleRoIAlign(levels, 14, 2),
        "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
        "mask_predictor": MaskRCNNPredictor(width, width, classes + 1),
    }
    return MaskRCNN(backbone, **masks, **parts, **common)
