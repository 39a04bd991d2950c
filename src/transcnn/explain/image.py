"""All that one figure shows of a network and an image: attention, Grad-CAM and predictions."""

from __future__ import annotations

import difflib
import logging
import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.loading import Loaded
from ..data.bands import Bands
from ..data.images import aspect_limit, to_channels
from ..errors import UserError
from ..onnx.answers import answers
from .classes import grad_cam, gradient_attention
from .maps import maps_of
from .record import record

__all__ = ["explain_image", "find_class"]

_log = logging.getLogger(__name__)
MAX_SIDE = 800  # pixels of the photograph in each panel


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
    from ..tasks.inference import get_inference

    _log.info("the network runs as it is, not optimized: explaining needs gradients, and hooks that watch attention")
    task = get_inference(loaded.task)
    if not task.whole_image:
        raise UserError(f"explain is for classifiers; {loaded.source} is for the task {loaded.task}")
    transform = task.image_transform(loaded.preprocessing)
    pixels = transform.prepare(image)  # (C, H, W), uint8
    x = transform.finish(pixels[None], np.zeros(1, np.uint64)).to(next(loaded.model.parameters()))
    size = (x.shape[2], x.shape[3])
    logits, records = record(loaded.model, x)
    said = answers(
        loaded.task, logits.detach().float().cpu().numpy(), loaded.class_names, loaded.info.get("task_args"), 5
    )
    answer = said[0]
    top = [(entry["label"], entry["score"]) for entry in answer.get("top", ())] or list(answer["values"].items())
    target = find_class(top[0][0] if class_name is None else class_name, loaded.class_names)
    cam = grad_cam(loaded.model, x, target)
    if query is not None:
        place = _in_crop(query, (image.height, image.width), size, loaded.preprocessing)
    else:
        place = divmod(int(cam.argmax()), size[1]) if cam.any() else (size[0] // 2, size[1] // 2)
    last_blocks = {r.stage: r for r in records}  # the last block of each stage stays
    names = loaded.class_names
    return Explanation(
        image=_shown(image, pixels, loaded.preprocessing),
        query=place,
        stages=[maps_of(r, place, size, "mean" if head is None else head) for r in last_blocks.values()],
        top=top[:5],
        shares="top" in answer,
        class_name=names[target],
        cam=cam.numpy(),
        taken=gradient_attention(loaded.model, x, target).numpy(),
        title=f"{loaded.info.get('model', type(loaded.model).__name__)} predicts {top[0][0]}, "
        + (f"{100 * top[0][1]:.1f} %" if "top" in answer else f"{top[0][1]:,.6g}"),
        note=_about_channels(image)
        + f"Attention of the last block of each stage, {'mean over heads' if head is None else f'head {head}'}. "
        "Colours go from 0 to each panel's largest value; "
        "an even share is what each cell would get if all were looked at alike.",
    )


def _about_channels(image: Any) -> str:
    """What is shown of an image of more channels than eyes see, for the small print; nothing of a photograph."""
    if not isinstance(image, Bands):
        return ""
    what = "the first three as red, green and blue" if image.channels >= 3 else "the first in grey"
    return f"Of {image.channels} channels {what}, each stretched.\n"


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


def _crop_box(image: tuple[int, int], size: tuple[int, int], config: dict[str, Any]) -> list[tuple[float, float]]:
    """(start, end) in rows and in columns of what the network sees, as ``config`` says it is resized and cropped."""
    mode, goal = config.get("crop_mode") or "center", [int(n / config["crop_pct"]) for n in size]
    scales = [side / had for side, had in zip(goal, image, strict=True)]
    if mode != "squash":
        scales = [(max if mode == "center" else min)(scales)] * 2
    limit = aspect_limit(size, config["crop_pct"])
    box = []
    for had, n, scale in zip(image, size, scales, strict=True):
        # Of very long images the ends are cut off first.
        kept = min(had, limit * min(image)) if mode == "center" else had
        cut = mode == "center" and goal[0] == goal[1]  # torchvision rounds the longer side down, timm to the nearest
        resized = int(scale * kept + 1e-6) if cut else max(1, round(scale * kept))
        first = round((resized - n) / 2) if resized >= n else -((n - resized) // 2)
        box.append(((had - kept) // 2 + first * kept / resized, (had - kept) // 2 + (first + n) * kept / resized))
    return box


def _in_crop(
    query: tuple[int, int], image: tuple[int, int], size: tuple[int, int], config: dict[str, Any]
) -> tuple[int, int]:
    """A pixel of the image as one of what the network sees, resized and cropped."""
    box = _crop_box(image, size, config)
    place = [
        math.floor((q + 0.5 - start) * n / (end - start)) for q, n, (start, end) in zip(query, size, box, strict=True)
    ]
    if not all(0 <= p < n for p, n in zip(place, size, strict=True)):
        (top, bottom), (left, right) = (
            (max(0, round(start)), min(had, round(end)) - 1) for (start, end), had in zip(box, image, strict=True)
        )
        raise UserError(
            f"the network sees the middle of this image only, rows {top} to {bottom} and columns {left} to {right}; "
            f"the query {query[0]},{query[1]} is outside"
        )
    return place[0], place[1]


def _shown(image: Any, pixels: Tensor, config: dict[str, Any]) -> np.ndarray:
    """What the network sees of an image, at the image's own resolution (at most ``MAX_SIDE``), uint8 (H, W[, 3]).

    ``pixels`` is the network's input, uint8 (C, H, W), which is shown where it has more pixels or other channels.
    """
    if isinstance(image, Bands):  # both as people see them
        seen = np.array(Bands(pixels.permute(1, 2, 0).numpy()).convert("RGB"))
        image, pixels = image.convert("RGB"), torch.from_numpy(seen).permute(2, 0, 1)
    channels, *size = pixels.shape
    (top, bottom), (left, right) = _crop_box((image.height, image.width), (size[0], size[1]), config)
    scale = min(1.0, MAX_SIDE / max(bottom - top, right - left))
    bordered = config.get("crop_mode") == "border"  # what lies outside of the image is the mean
    if channels in (1, 3) and max(bottom - top, right - left) > max(size) and not bordered:
        shown = to_channels(image, channels)
        wide = (round((right - left) * scale), round((bottom - top) * scale))
        box = (max(0.0, left), max(0.0, top), min(image.width, right), min(image.height, bottom))
        return np.asarray(shown.resize(wide, Image.Resampling.LANCZOS, box))
    array = pixels.permute(1, 2, 0).numpy()
    return array[..., :3] if channels >= 3 else array[..., 0]
