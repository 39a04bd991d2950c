"""All that one figure shows of a network and an image: attention, Grad-CAM and predictions."""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np
from torch import Tensor

from ..checkpoints.loading import Loaded
from ..errors import UserError
from .classes import grad_cam, gradient_attention
from .maps import maps_of
from .record import record

__all__ = ["explain_image", "find_class"]


def explain_image(
    loaded: Loaded,
    image: Any,
    query: tuple[int, int] | None = None,
    class_name: str | None = None,
    head: int | None = None,
) -> Any:
    """The :class:`~transcnn.explain.figure.Explanation` of a PIL image; ``query`` is a pixel of that image.

    Raises:
        UserError: No such class or pixel, or no classifier with H-MHSA.
    """
    from ..explain.figure import Explanation
    from ..tasks import get_task

    if loaded.task != "classify":
        raise UserError(f"explain is for classifiers; {loaded.source} is for the task {loaded.task}")
    transform = get_task(loaded.task).image_transform(loaded.preprocessing)
    pixels = transform.prepare(image)  # (C, H, W), uint8
    x = transform.finish(pixels[None], np.zeros(1, np.uint64)).to(next(loaded.model.parameters()).device)
    size = (x.shape[2], x.shape[3])
    logits, records = record(loaded.model, x)
    shares = logits[0].float().softmax(0)
    target = int(shares.argmax()) if class_name is None else find_class(class_name, loaded.class_names)
    cam = grad_cam(loaded.model, x, target)
    if query is not None:
        place = _in_crop(query, (image.height, image.width), size, loaded.preprocessing["crop_pct"])
    else:
        peak = int(cam.argmax()) if cam.any() else cam.numel() // 2 + size[1] // 2
        place = divmod(peak, size[1])
    last_blocks = {r.stage: r for r in records}  # the last block of each stage stays
    best = shares.topk(min(5, len(shares)))
    names = loaded.class_names
    return Explanation(
        image=_shown(pixels),
        query=place,
        stages=[maps_of(r, place, size, "mean" if head is None else head) for r in last_blocks.values()],
        top=[(names[i], share) for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)],
        class_name=names[target],
        cam=cam.numpy(),
        taken=gradient_attention(loaded.model, x, target).numpy(),
        title=f"{loaded.info.get('model', type(loaded.model).__name__)} says: {names[best.indices[0]]}, "
        f"{best.values[0]:.1%}",
        note=f"Attention of the last block of each stage, {'mean over heads' if head is None else f'head {head}'}. "
        "Colours go from 0 to each panel's largest value; "
        "an even share is what each cell would get if all were looked at alike.",
    )


def find_class(wanted: str, class_names: list[str]) -> int:
    """A class's number by its name (case doesn't matter) or number."""
    for names, word in ((class_names, wanted), ([n.casefold() for n in class_names], wanted.casefold())):
        if word in names:
            return names.index(word)
    if wanted.isdecimal() and int(wanted) < len(class_names):
        return int(wanted)
    folded = {name.casefold(): name for name in class_names}
    near = [folded[name] for name in difflib.get_close_matches(wanted.casefold(), folded, n=4)]
    some = ", ".join(near or class_names[:10])
    more = "near ones" if near else "the first ones" if len(class_names) > 10 else "there are"
    raise UserError(f"no class is named {wanted!r}; {more}: {some}")


def _in_crop(query: tuple[int, int], image: tuple[int, int], size: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """A pixel of the image as one of what the network sees: resized by the short side, then the middle cut out."""
    scale = max(int(n / crop_pct) / had for n, had in zip(size, image, strict=True))
    place = []
    for q, had, n in zip(query, image, size, strict=True):
        kept = min(had, 8 * min(image))  # of very long images the ends are cut off first
        resized = int(scale * kept + 1e-6)
        place.append(math.floor((q - (had - kept) // 2 + 0.5) * resized / kept) - round((resized - n) / 2))
    if not all(0 <= p < n for p, n in zip(place, size, strict=True)):
        half = [min(n / scale, had) / 2 for n, had in zip(size, image, strict=True)]
        (top, bottom), (left, right) = (
            (round(had / 2 - h), round(had / 2 + h) - 1) for h, had in zip(half, image, strict=True)
        )
        raise UserError(
            f"the network sees the middle of this image only, rows {top} to {bottom} and columns {left} to {right}; "
            f"the query {query[0]},{query[1]} is outside"
        )
    return place[0], place[1]


def _shown(pixels: Tensor) -> np.ndarray:
    """uint8 (C, H, W) as an image to show: grey, or its first three channels."""
    array = pixels.permute(1, 2, 0).numpy()
    return array[..., :3] if array.shape[2] >= 3 else array[..., 0]
