"""``transcnn explain``: one picture of where a network looks in an image, and what it goes by."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data.images import BrokenImage, read_image
from ..errors import UserError, require
from ..runs import Loaded, load, write_whole
from .classes import grad_cam, gradient_attention
from .maps import maps_of
from .record import record

__all__ = ["explain", "explain_image"]


def explain(
    checkpoint: str,
    image: str,
    *,
    query: str | None = None,
    class_name: str | None = None,
    head: int | None = None,
    img_size: int | None = None,
    out: str | None = None,
    quiet: bool = False,
) -> str:
    """Draw one picture of where a network looks in an image: attention near and far in each stage, Grad-CAM, answers.

    Args:
        checkpoint: A run's directory, a .safetensors or .ckpt of ours, or the name of a published model.
        image: The image file.
        query: Row and column of the pixel to ask about, as 120,80; without it, the one where Grad-CAM is strongest.
        class_name: The class to explain, by name or number; without it, the likeliest.
        head: One attention head instead of the mean over all.
        img_size: Another size than the network was trained at.
        out: The picture's file (.png, .pdf, .svg); without it NAME_explain.png where the command is run.
        quiet: Print nothing but errors.

    Returns:
        The picture's file.

    Raises:
        UserError: No such checkpoint, image, class or pixel, or no classifier with H-MHSA.
    """
    require("matplotlib", "train")
    from ..engine import quiet_libraries
    from ..report.plots import style
    from .picture import draw

    target = Path(out) if out else Path(f"{Path(image).stem}_explain.png")
    if target.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"out must end in .png, .pdf or .svg, got {target}")
    with quiet_libraries():
        loaded = load(checkpoint)
    if img_size is not None:
        loaded.preprocessing["input_size"] = [loaded.preprocessing["input_size"][0], img_size, img_size]
    try:
        picture = read_image(image)
    except BrokenImage as error:
        raise UserError(f"can't read {image}: {error}") from error
    place = None if query is None else _pixel(query, (picture.height, picture.width))
    explanation = explain_image(loaded, picture, place, class_name, head)
    with style():
        figure = draw(explanation)
        write_whole(target, lambda path: figure.savefig(path, format=target.suffix[1:].lower()))
    if not quiet:
        print(f"written: {target}")
    return str(target)


def explain_image(
    loaded: Loaded,
    image: Any,
    query: tuple[int, int] | None = None,
    class_name: str | None = None,
    head: int | None = None,
) -> Any:
    """The :class:`~transcnn.explain.picture.Explanation` of a PIL image; ``query`` is a pixel of that image.

    Raises:
        UserError: As for :func:`explain`.
    """
    from ..tasks import get_task
    from .picture import Explanation

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


def _pixel(text: str, size: tuple[int, int]) -> tuple[int, int]:
    """``"120,80"`` as a row and a column of an image of ``size``."""
    words = text.strip("()[] ").split(",")
    try:
        row, column = (int(word) for word in words)
    except ValueError as error:
        raise UserError(f"query must be a row and a column as 120,80, got {text!r}") from error
    if not (0 <= row < size[0] and 0 <= column < size[1]):
        raise UserError(
            f"the query must be within 0,0 and {size[0] - 1},{size[1] - 1} (the image's rows and columns), got {text}"
        )
    return row, column


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
