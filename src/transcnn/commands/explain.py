"""``transcnn explain``: one figure of where a network looks in an image, and what its prediction rests on."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.files import check_writable
from ..data.images import BrokenImage, read_image
from ..data.paths import StrPath, as_text
from ..errors import MAX_SIDE, UserError, check_range, require
from ..imports import gc_paused
from ..text import printable

__all__ = ["explain"]


def explain(
    checkpoint: StrPath,
    image: StrPath,
    *,
    model: str | None = None,
    query: str | None = None,
    class_name: str | None = None,
    head: int | None = None,
    img_size: int | None = None,
    out: StrPath | None = None,
    quiet: bool = False,
) -> str:
    """Plot where a network looks in an image: attention near and far in each stage, Grad-CAM, the top classes.

    Args:
        checkpoint: A run's directory, a .safetensors or .ckpt of this package, or the name of a published model.
        image: The image file.
        model: The network that a file of weights is for which doesn't say so, such as the authors' .pth files.
        query: Row and column of the pixel to ask about, as 120,80; without it, the one where Grad-CAM is strongest.
        class_name: The class to explain, by name or number; without it, the most probable.
        head: One attention head instead of the mean over all.
        img_size: Another size than the network was trained at.
        out: The figure's file (.png, .pdf, .svg); without it NAME_explain.png where the command is run.
        quiet: Print nothing but errors.

    Returns:
        The figure's file.

    Raises:
        UserError: No such checkpoint, image, class or pixel, or no classifier with H-MHSA.
    """
    check_range(0, head=head)
    check_range(1, MAX_SIDE, img_size=img_size)
    require("matplotlib", "train")
    with gc_paused():  # not before the words of the command line are known to be right
        from ..checkpoints.loading import load
        from ..checkpoints.memory import check_forward
        from ..distributed.runtime import quiet_libraries
        from ..explain.figure import draw
        from ..explain.image import explain_image
        from ..report.plots import save_figure, style

    target = Path(out) if out else Path(f"{Path(image).stem}_explain.png")
    if target.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"out must end in .png, .pdf or .svg, got {target}")
    check_writable(target, [as_text(image)])
    with quiet_libraries():
        loaded = load(checkpoint, model)
    loaded.resize_input(img_size)
    check_forward(loaded, chosen=img_size is not None)
    try:
        pixels = read_image(image, loaded.preprocessing.get("pixel_range"))
    except BrokenImage as error:
        raise UserError(f"can't read {image}: {error}") from error
    place = None if query is None else _pixel(query, (pixels.height, pixels.width))
    explanation = explain_image(loaded, pixels, place, class_name, head)
    with style([explanation.class_name, *(name for name, _ in explanation.top)]):
        figure = draw(explanation)
        save_figure(figure, target)
    if not quiet:
        print(f"written: {printable(target)}")
    return str(target)


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
