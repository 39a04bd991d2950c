"""A detector as one graph, for export: a batch of images in, a list of detections out, all sizes free.

torchvision's detectors go through lists of images, whose lengths and sizes a graph would take for constants. Here the
same steps are taken by the detector's own layers on whole tensors. Suppression keeps images, levels and classes apart
by moving each to coordinates of its own. What it finds is what torchvision finds, up to rounding
(``tests/test_export_detect.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from ..dense.detectors import Detector

__all__ = ["DetectorGraph"]

COARSEST = 32
MOST = 1 << 28  # boxes of a batch
SMALLEST = {"rpn": 1e-3, "box": 1e-2}  # sides below which torchvision throws boxes away
LARGEST_SCALE = 4.135166556742356  # log(1000 / 16): growth of a box is cut off there


class DetectorGraph(nn.Module):
    """Images (B, C, H, W), resized and normalised, to detections of all of them, most confident first.

    Answers ``boxes`` (N, 4) as x1, y1, x2, y2 in pixels of the input, ``scores`` (N,), ``labels`` (N,) from 0 on,
    ``image`` (N,), which says to which image each belongs, and for Mask R-CNN ``masks`` (N, 28, 28), probabilities
    inside the box.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.net: Any = detector.net
        self.retina = detector.offset == 0
        anchors = self.net.anchor_generator if self.retina else self.net.rpn.anchor_generator
        for level, cells in enumerate(anchors.cell_anchors):
            self.register_buffer(f"cells{level}", cells.clone().float(), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> boxes, scores, labels, image (and masks)."""
        size = images.shape[-2], images.shape[-1]
        images = F.pad(images, (0, -size[1] % COARSEST, 0, -size[0] % COARSEST))
        maps = self.net.backbone(images)
        if self.retina:
            return self._retina(list(maps.values()), images, size)
        return self._rcnn(maps, images, size)

    def _anchors(self, level: int, grid: Tensor, images: Tensor) -> Tensor:
        """(A, 4) of one map, in the order of its places and of the anchors at each."""
        height, width = grid.shape[-2], grid.shape[-1]
        cells = getattr(self, f"cells{level}")
        y = torch.arange(height, device=grid.device) * (images.shape[-2] // height)
        x = torch.arange(width, device=grid.device) * (images.shape[-1] // width)
        y, x = y[:, None].expand(height, width), x[None].expand(height, width)
        return (torch.stack([x, y, x, y], -1).reshape(-1, 1, 4) + cells).reshape(-1, 4)

    def _retina(self, maps: list[Tensor], images: Tensor, size: Any) -> tuple[Tensor, ...]:
        head, net = self.net.head, self.net
        batch, classes = images.shape[0], head.classification_head.num_classes
        boxes, scores, labels = [], [], []
        for level, one in enumerate(maps):
            logits = head.classification_head([one]).flatten(1)  # (B, A·classes)
            deltas = head.regression_head([one])  # (B, A, 4)
            best, chosen = logits.sigmoid().topk(torch.sym_min(net.topk_candidates, logits.shape[1]), 1)
            place = chosen // classes
            deltas = deltas.gather(1, place[..., None].expand(-1, -1, 4))
            boxes.append(_decode(deltas, self._anchors(level, one, images)[place], net.box_coder.weights, size))
            scores.append(best)
            labels.append(chosen % classes)
        found = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(labels, 1)
        image = torch.arange(batch, device=images.device)[:, None].expand_as(found[1])
        flat = (found[0].reshape(-1, 4), found[1].reshape(-1), found[2].reshape(-1), image.reshape(-1))
        sure = _where(flat[1] > net.score_thresh)
        boxes, scores, labels, image = (part[sure] for part in flat)
        kept = _suppress(boxes, scores, labels, image, net.nms_thresh)
        kept = _first(kept, image[kept], net.detections_per_img, batch)
        return boxes[kept], scores[kept], labels[kept], image[kept]

    def _rcnn(self, maps: dict[str, Tensor], images: Tensor, size: Any) -> tuple[Tensor, ...]:
        heads, batch = self.net.roi_heads, images.shape[0]
        boxes, image = self._propose(list(maps.values()), images, size)
        features = heads.box_head(self._pool(heads.box_roi_pool, maps, boxes, image))
        logits, deltas = heads.box_predictor(features)
        classes = logits.shape[1] - 1  # the first is background
        deltas = deltas.reshape(-1, classes + 1, 4)[:, 1:]
        spread = boxes[:, None].expand(-1, classes, 4)
        boxes = _decode(deltas, spread, heads.box_coder.weights, size).reshape(-1, 4)
        scores = logits.softmax(1)[:, 1:].reshape(-1)
        label = torch.arange(classes, device=images.device)[None].expand(image.shape[0], classes).reshape(-1)
        image = image[:, None].expand(image.shape[0], classes).reshape(-1)
        sure = _where((scores > heads.score_thresh) & _large(boxes, SMALLEST["box"]))
        boxes, scores, label, image = boxes[sure], scores[sure], label[sure], image[sure]
        kept = _suppress(boxes, scores, label, image, heads.nms_thresh)
        kept = _first(kept, image[kept], heads.detections_per_img, batch)
        boxes, scores, label, image = boxes[kept], scores[kept], label[kept], image[kept]
        if not heads.has_mask():
            return boxes, scores, label, image
        features = heads.mask_head(self._pool(heads.mask_roi_pool, maps, boxes, image))
        masks = heads.mask_predictor(features)[:, 1:].sigmoid()
        index = label[:, None, None, None].expand(-1, 1, masks.shape[2], masks.shape[3])
        return boxes, scores, label, image, masks.gather(1, index)[:, 0]

    def _propose(self, maps: list[Tensor], images: Tensor, size: Any) -> tuple[Tensor, Tensor]:
        """The region proposal network's boxes (N, 4) of all images, and the image of each."""
        rpn, batch = self.net.rpn, images.shape[0]
        boxes, scores, groups = [], [], []
        for level, (logits, deltas) in enumerate(zip(*rpn.head(maps), strict=True)):
            deltas = deltas.permute(0, 2, 3, 1).reshape(batch, -1, 4)
            flat = logits.permute(0, 2, 3, 1).reshape(batch, -1)
            best, place = flat.topk(torch.sym_min(rpn.pre_nms_top_n(), flat.shape[1]), 1)
            deltas = deltas.gather(1, place[..., None].expand(-1, -1, 4))
            boxes.append(_decode(deltas, self._anchors(level, logits, images)[place], rpn.box_coder.weights, size))
            scores.append(best.sigmoid())
            groups.append(torch.full_like(best, level, dtype=torch.int64))
        box, score, level = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(groups, 1)
        image = torch.arange(batch, device=images.device)[:, None].expand_as(level)
        box, score, level, image = box.reshape(-1, 4), score.reshape(-1), level.reshape(-1), image.reshape(-1)
        real = _where(_large(box, SMALLEST["rpn"]) & (score >= rpn.score_thresh))
        box, score, level, image = box[real], score[real], level[real], image[real]
        kept = _suppress(box, score, level, image, rpn.nms_thresh)
        kept = _first(kept, image[kept], rpn.post_nms_top_n(), batch)
        return box[kept], image[kept]

    def _pool(self, pool: Any, maps: dict[str, Tensor], boxes: Tensor, image: Tensor) -> Tensor:
        """(N, C, S, S) of boxes, each from the level that suits its size (FPN, equation 1)."""
        strides = [int(name) for name in pool.featmap_names]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        level = torch.floor(pool.canonical_level + torch.log2(area.sqrt() / pool.canonical_scale) + 1e-6)
        level = level.clamp(2, 1 + len(strides))
        rois = torch.cat([image[:, None].to(boxes.dtype), boxes], 1)
        total: Any = 0.0
        for i, stride in enumerate(strides):
            cut = roi_align(maps[str(stride)], rois, pool.output_size, 1 / stride, pool.sampling_ratio)
            total = torch.where((level == 2 + i)[:, None, None, None], cut, total)
        return total


def _decode(deltas: Tensor, anchors: Tensor, weights: Any, size: Any) -> Tensor:
    """Boxes (..., 4) that the deltas (..., 4) make of anchors, cut off at the image's border."""
    extent = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * extent
    scale = deltas.new_tensor(weights)
    centre = deltas[..., :2] / scale[:2] * extent + centre
    half = 0.5 * torch.exp((deltas[..., 2:] / scale[2:]).clamp(max=LARGEST_SCALE)) * extent
    x = torch.stack([centre[..., 0] - half[..., 0], centre[..., 0] + half[..., 0]], -1).clamp(0, size[1])
    y = torch.stack([centre[..., 1] - half[..., 1], centre[..., 1] + half[..., 1]], -1).clamp(0, size[0])
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def _large(boxes: Tensor, side: float) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0] >= side) & (boxes[:, 3] - boxes[:, 1] >= side)


def _suppress(boxes: Tensor, scores: Tensor, kind: Tensor, image: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within each kind (a class, a level) of each image; what stays, most confident first.

    Kinds lie side by side and images one below the other: in one line the many boxes of a batch would come to
    coordinates of which float32 holds quarters of a pixel.
    """
    side = torch.cat([boxes.reshape(-1), boxes.new_zeros(1)]).max() + 1
    apart = torch.stack([kind, image, kind, image], 1).to(boxes.dtype) * side
    return _counted(nms(boxes + apart, scores, threshold))


def _first(kept: Tensor, image: Tensor, most: int, batch: Any) -> Tensor:
    """The first ``most`` of each image."""
    own = image[:, None] == torch.arange(batch, device=image.device)[None]
    rank = (own.to(torch.int64).cumsum(0) * own).sum(1)
    return kept[_where(rank <= most)]


def _where(true: Tensor) -> Tensor:
    return _counted(true.nonzero()[:, 0])


def _counted(places: Tensor) -> Tensor:
    """The same, with a bound on how many: the tracer's own bounds don't fit into 64 bits once they are multiplied."""
    torch._check(places.shape[0] <= MOST)
    return places
