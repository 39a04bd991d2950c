"""Whether an exported file gives the network's outputs, and how fast each is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data.images import read_image
from ..errors import UserError
from ..onnx.predict import to_input

__all__ = ["Row", "Run", "check", "comparisons", "refuse_beyond"]

Run = Callable[[np.ndarray], Any]  # images (B, C, H, W) to one array, or to a list of them


@dataclass(frozen=True)
class Row:
    """One line of the comparison between the network and the file.

    ``difference`` is the largest between two outputs, ``relative`` the same over the largest output; times are
    milliseconds an image, the median of five runs in turn (fewer of long ones). ``detections`` are a detector's.
    """

    batch: int
    height: int
    width: int
    difference: float
    relative: float
    torch_ms: float
    file_ms: float
    detections: int | None = None


def check(model: nn.Module, run: Run, batches: Iterator[np.ndarray]) -> list[Row]:
    """Compare the outputs and the speed of a network and an engine, a row for each batch (B, C, H, W)."""
    rows = []
    for batch in batches:
        tensor = torch.from_numpy(batch)
        try:
            wanted = _answer(model, tensor)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the network itself fails on images of shape {batch.shape}: {reason}") from error
        try:
            found = run(batch)
        except Exception as error:  # each engine has its own
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(f"the file fails on images of shape {batch.shape}: {reason}") from error
        count, _, height, width = batch.shape
        times = _time_in_turn(lambda tensor=tensor: _answer(model, tensor), lambda batch=batch: run(batch))
        each = [1000 * seconds / count for seconds in times]
        if isinstance(wanted, tuple):
            wanted, found = [part.numpy() for part in wanted], [np.asarray(part) for part in found]
            differences = _of_detections(wanted, found, max(height, width))
            rows.append(Row(count, height, width, *differences, *each, detections=len(wanted[0])))
        else:
            rows.append(Row(count, height, width, *_of_arrays(wanted.numpy(), found, batch.shape), *each))
    return rows


def refuse_beyond(rows: list[Row], tolerance: float, out: Path) -> None:
    """Raise UserError for a file whose outputs differ by more than ``tolerance``."""
    worst = max(rows, key=lambda row: row.relative)
    if not worst.relative <= tolerance:
        raise UserError(
            f"{out} is not kept: at {worst.batch}x{worst.height}x{worst.width} it differs from the network by "
            f"{worst.relative:.1e} of the largest output, the tolerance is {tolerance:.1e}"
        )


def comparisons(
    config: dict[str, Any], static: int | None, files: Sequence[str] | None, side: int | None = None
) -> Iterator[np.ndarray]:
    """Batches of three sizes, one of them odd and not square; with a fixed size, three batch sizes.

    Args:
        config: timm's data config.
        static: The fixed size.
        files: Images; without them made ones.
        side: Of the images, if not what ``config`` says.
    """
    channels, height, width = config["input_size"] if side is None else (config["input_size"][0], side, side)
    if static:
        shapes = [(1, static, static), (2, static, static), (3, static, static)]
    else:
        odd = (3, height * 3 // 4 + 1 | 1, width + 9 | 1)
        shapes = [(1, height, width), odd, (2, height * 3 // 2, width * 3 // 2)]
    sources = (
        [read_image(file, config.get("pixel_range")) for file in files]
        if files
        else [_made_image(seed) for seed in range(3)]
    )
    for count, *size in shapes:
        sized = {**config, "input_size": [channels, *size]}
        yield np.stack([to_input(sources[i % len(sources)], sized) for i in range(count)])


def _of_arrays(wanted: np.ndarray, found: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """The largest difference, and the same over the largest output."""
    if wanted.shape != found.shape:
        raise UserError(f"for {shape} the file's output is {found.shape} instead of {wanted.shape}")
    if not np.isfinite(found).all():
        return float("inf"), float("inf")
    difference = float(np.abs(wanted - found).max())
    return difference, difference / max(float(np.abs(wanted).max()), 1e-12)


def _of_detections(wanted: list[np.ndarray], found: list[np.ndarray], side: int) -> tuple[float, float]:
    """The same of two lists of detections, each compared with the nearest of its image and class in the other.

    Detections of equal scores may change places. A difference is that of scores, of probabilities in masks, or of boxes
    as shares of the image's longer side; one in the number of detections counts as infinite.
    """
    if len(wanted[0]) != len(found[0]):
        return float("inf"), float("inf")
    worst = 0.0
    for ours, theirs in ((wanted, found), (found, wanted)):
        for i in range(len(ours[0])):
            same = (theirs[2] == ours[2][i]) & (theirs[3] == ours[3][i])
            if not same.any():
                return float("inf"), float("inf")
            apart = np.abs(theirs[0][same] - ours[0][i]).max(1) / side
            apart = np.maximum(apart, np.abs(theirs[1][same] - ours[1][i]))
            if len(ours) > 4:
                apart = np.maximum(apart, np.abs(theirs[4][same] - ours[4][i]).max((1, 2)))
            worst = max(worst, float(apart.min()))
    return worst, worst


def _made_image(seed: int, side: int = 256) -> Image.Image:
    """Coloured noise with as much coarse as fine structure, as photographs have."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for cells in (2, 4, 8, 16, 32, 64):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / cells**0.5
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def _answer(model: nn.Module, images: torch.Tensor) -> Any:
    with torch.inference_mode():
        return model(images)


def _time_in_turn(*functions: Callable[[], Any]) -> list[float]:
    """The median seconds of each of five calls, in turn, so that other work slows all alike; long ones make fewer."""
    times: list[list[float]] = [[] for _ in functions]
    while len(times[0]) < 5 and sum(map(sum, times)) < 6:
        for function, own in zip(functions, times, strict=True):
            began = time.perf_counter()
            function()
            own.append(time.perf_counter() - began)
    return [sorted(own)[len(own) // 2] for own in times]
