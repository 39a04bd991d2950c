"""``transcnn export``: write a trained network as a file for other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..checkpoints.files import make_folder
from ..data.paths import StrPath, as_text
from ..errors import MAX_SIDE, UserError, check_range
from ..text import print_whole, printable

__all__ = ["export"]


def export(
    checkpoint: StrPath,
    *,
    model: str | None = None,
    format: Literal["onnx", "torch", "openvino"] = "onnx",
    out: StrPath | None = None,
    static: int | None = None,
    images: list[StrPath] | None = None,
    tolerance: float | None = None,
    int8: bool = False,
    calibrate: StrPath | None = None,
    max_loss: float = 0.5,
    quiet: bool = False,
) -> Any:
    """Write a trained network as a file for other engines, and check that its outputs are the same.

    The file takes images (B, C, H, W) that are resized and normalised already; how is written in the file itself and
    in a small JSON beside it, with the class names. transcnn predict FILE.onnx does it by ONNX Runtime alone.

    Args:
        checkpoint: A run's directory, a .safetensors or .ckpt of this package, or the name of a published model.
        model: The network that a file of weights is for which doesn't say so, such as the authors' .pth files.
        format: onnx for ONNX Runtime and most others, torch for torch.export's .pt2, openvino for its .xml and .bin.
        out: The file; without it model.onnx (.pt2, .xml) in the run's directory, else a name after the checkpoint.
        static: One side of image alone, which makes a simpler and faster graph; the batch stays free.
        images: Images to compare on; without it generated ones.
        tolerance: Largest difference, relative to the largest output; a file beyond it is not kept. Without it 1e-5 to
            classify, and 1e-4 for a million pixels' outputs, or boxes.
        int8: Compute in 8 bits: a smaller file, faster where the CPU has 8-bit products. ONNX classifiers alone.
        calibrate: For int8, images with classes as transcnn eval takes them: some find the ranges of numbers, others,
            the test split if there is one, print the accuracy before and after.
        max_loss: Points of top-1 that int8 may cost; a file beyond it is not kept.
        quiet: Print nothing but errors.

    Returns:
        An :class:`~transcnn.export.Exported`: the file, what it says of itself, and the comparison.

    Raises:
        UserError: No such checkpoint, a missing extra, a network that can't be exported, or one whose file answers
            otherwise.
    """
    from ..checkpoints.loading import load  # not before the words of the command line are known to be right
    from ..checkpoints.memory import check_forward
    from ..export.exporting import FORMATS, export_model

    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    check_range(1, MAX_SIDE, static=static)
    check_range(0, tolerance=tolerance, max_loss=max_loss)
    loaded = load(checkpoint, model)
    check_forward(loaded)
    target = Path(out) if out else _default_target(as_text(checkpoint), FORMATS[format].suffix)
    if int8 != (calibrate is not None):
        raise UserError("int8 and calibrate go together: --int8 true --calibrate DATA")
    if int8 and format != "onnx":
        raise UserError(f"int8 is for the format onnx, which OpenVINO reads as well, got {format!r}")
    make_folder(target.parent, target.name)
    checked: dict[str, Any] = {"static": static, "images": images, "tolerance": tolerance}
    result = export_model(loaded, target, format=format, calibrate=as_text(calibrate), max_loss=max_loss, **checked)
    if not quiet:
        _print(result, format)
    return result


def _default_target(checkpoint: str, suffix: str) -> Path:
    path = Path(checkpoint)
    if path.is_dir():
        return path / f"model{suffix}"
    stem = path.with_suffix("").name if path.is_file() else checkpoint.replace(":", "-").replace("/", "-")
    return Path(f"{stem}{suffix}")


def _print(result: Any, format: str) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("images", "largest difference", "relative", "torch ms/image", f"{format} ms/image"):
        table.add_column(column, justify="right")
    for row in result.rows:
        size = f"{row.batch}x{row.height}x{row.width}"
        numbers = (f"{row.difference:.1e}", f"{row.relative:.1e}", f"{row.torch_ms:.2f}", f"{row.file_ms:.2f}")
        table.add_row(size, *numbers)
    print_whole(table)
    size = sum(file.stat().st_size for file in (result.file, result.file.with_suffix(".bin")) if file.exists())
    if "int8" in result.info:
        score = result.info["int8"]
        print(
            f"8 bits: top-1 from {score['top1_before']:.2f} to {score['top1_after']:.2f} % of {score['test_images']:,} "
            f"images, {score['times_as_fast']:.2f} times as fast as 32-bit floats here"
        )
    if all(row.detections == 0 for row in result.rows):
        print("nothing was found in these images, so they compare little; give --images of the kind it was trained on")
    print(f"written: {printable(result.file)} ({size / 1e6:.1f} MB) and {printable(result.file.with_suffix('.json'))}")
