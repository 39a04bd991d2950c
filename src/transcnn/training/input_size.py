"""The size that a classifier's images are resized to where the user gives none: by what the images are."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
from timm.models import get_pretrained_cfg

from ..data.images import BrokenImage
from ..settings import TrainSettings

__all__ = ["choose_img_size"]

LOOKED_AT = 16  # images
LARGEST, STEP = 224, 32  # a size is chosen up to what ImageNet's networks take, in steps that every stride divides


def choose_img_size(s: TrainSettings, splits: Any, *, quiet: bool) -> TrainSettings:
    """Settings with an ``img_size`` where the network was made for smaller images than there are, and say so.

    Photographs would lose what they show at the 32 pixels of ``transcnn_nano``. The size stays where it is given,
    where the weights that are loaded were trained at theirs, and where files would have to be fetched to look at them.
    """
    cfg = get_pretrained_cfg(s.model)
    given = s.img_size is not None or "img_size" in (s.model_args or {}) or s.augment.sizes
    if s.task != "classify" or given or cfg is None or cfg.fixed_input_size or splits.train.groups is not None:
        return s
    own, found = cfg.input_size[-1], _short_side(splits.train)
    if found is None or own / 2 <= found <= 1.5 * own or found > own >= LARGEST:
        return s
    chosen, why = own, "which the network was made for"
    if s.pretrained or s.init_from:
        why = "which its weights are for"
    elif found > own and (fitting := min(LARGEST, found // STEP * STEP)) > own:
        chosen, why = fitting, f"instead of the {own}x{own} that {s.model} was made for"
    if not quiet:
        print(
            f"{s.model}: images of about {found} pixels are resized to {chosen}x{chosen}, {why} "
            "(--img_size gives another size)",
            file=sys.stderr,
        )
    return s if chosen == own else replace(s, img_size=chosen, origins={**s.origins, "img_size": "the images"})


def _short_side(train: Any) -> int | None:
    """The median of some images' shorter sides; None where none can be read."""
    sides = []
    for i in np.linspace(0, len(train) - 1, min(LOOKED_AT, len(train))).astype(int).tolist():
        with suppress(BrokenImage):
            sides.append(min(train.read(i)[0].size))
    return int(median(sides)) if sides else None
