"""Whether an exported file gives the network's outputs, and how fast each is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data.bands import Bands, is_per_channel
from ..data.images import BrokenImage, read_image, to_channels
from ..errors import UserError, first_line
from ..onnx.dense import detections as detections_by_file
from ..onnx.predict import to_input
from ..plugging.cost import interleaved_seconds

__all__ = ["Row", "Run", "check", "check_detections", "comparisons", "example_images", "refuse_beyond"]

NOISE = 4.0  # a file may differ from the network by so many times the network's own rounding

Run = Callable[[np.ndarray], Any]  # images (B, C, H, W) to one array, or to a list of them


@dataclass(frozen=True)
class Row:
    """One line of the comparison between the network and the file.

    ``difference`` is the largest between two outputs, ``relative`` the same over the largest output; times are
    milliseconds an image, the median of five runs in turn (fewer of long ones). ``detections`` are a detector's.
    ``noise`` is the network's own: the same difference between its answers in float32 and in float64, where asked for.
    """

    batch: int
    height: int
    width: int
    difference: float
    relative: float
    torch_ms: float
    file_ms: float
    detections: int | None = None
    noise: float = 0.0


def check(model: nn.Module, run: Run, batches: Iterator[np.ndarray], noise_above: float | None = None) -> list[Row]:
    """Compare the outputs and the speed of a network and an engine, a row for each batch (B, C, H, W).

    Where they differ by more than ``noise_above``, the network's own rounding is measured, too.
    """
    rows = []
    for batch in batches:
        tensor = torch.from_numpy(batch)
        try:
            wanted = _answer(model, tensor)
        except RuntimeError as error:
            reason = first_line(error)
            raise UserError(f"the network itself fails on images of shape {batch.shape}: {reason}") from error
        try:
            found = run(batch)
        except Exception as error:  # each engine has its own
            reason = first_line(error)
            raise UserError(f"the file fails on images of shape {batch.shape}: {reason}") from error
        count, _, height, width = batch.shape
        times = _median_seconds(lambda tensor=tensor: _answer(model, tensor), lambda batch=batch: run(batch))
        each = [1000 * seconds / count for seconds in times]
        if isinstance(wanted, tuple):
            wanted, found = [part.numpy() for part in wanted], [np.asarray(part) for part in found]
            differences = _of_detections(wanted, found, max(height, width))
            rows.append(Row(count, height, width, *differences, *each, detections=len(wanted[0])))
        else:
            differences = _of_arrays(wanted.numpy(), found, batch.shape)
            unsure = noise_above is not None and noise_above < differences[1] < float("inf")
            noise = _noise(model, tensor, wanted.numpy()) if unsure else 0.0
            rows.append(Row(count, height, width, *differences, *each, noise=noise))
    return rows


def _noise(model: nn.Module, images: torch.Tensor, answers: np.ndarray) -> float:
    """The largest difference of a network's answers to those that it gives in float64, over the largest."""
    exact = _answer(copy.deepcopy(model).double(), images.double()).numpy()
    return float(np.abs(exact - answers).max()) / max(float(np.abs(exact).max()), 1e-12)


def check_detections(
    detector: nn.Module, outputs: Callable[[np.ndarray], dict[str, np.ndarray]], images: list[Any], info: Any
) -> list[Row]:
    """Compare what ``transcnn predict`` finds by a detector and by its exported file, a row for each image.

    Args:
        detector: The network.
        outputs: The file: (1, C, H, W) to its outputs by name.
        images: As :func:`transcnn.data.images.read_image` gives them.
        info: What the file holds.
    """
    rows = []
    for image in images:
        pixels = np.atleast_3d(np.asarray(to_channels(image, info["data_config"]["input_size"][0]), np.float32))
        tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255

        def by_network(tensor: torch.Tensor = tensor) -> Any:
            return _answer(detector, [tensor])[0]  # pyright: ignore

        def by_file(image: Image.Image = image) -> dict[str, np.ndarray]:
            return detections_by_file(outputs, image, info)

        try:
            ours, theirs = by_network(), by_file()
        except Exception as error:  # each engine has its own
            reason = first_line(error)
            raise UserError(f"the file fails on an image of {image.height}x{image.width}: {reason}") from error
        wanted = [ours[name].numpy() for name in ("boxes", "scores", "labels")]
        found = [np.asarray(theirs[name]) for name in ("boxes", "scores", "labels")]
        lists = [[*some, np.zeros(len(some[0]))] for some in (wanted, found)]
        if "masks" in theirs:
            for some, masks in zip(lists, (ours["masks"].numpy(), theirs["masks"]), strict=True):
                some.append(masks[:, 0])
        differences = _of_detections(lists[0], lists[1], max(image.size), floor=info["task_args"]["min_score"])
        times = [1000 * seconds for seconds in _median_seconds(by_network, by_file)]
        rows.append(Row(1, image.height, image.width, *differences, *times, detections=len(wanted[0])))
    return rows


def refuse_beyond(rows: list[Row], tolerance: float, out: Path) -> None:
    """Raise UserError for a file whose outputs differ by more than ``tolerance``, and than rounding explains."""
    beyond = [row for row in rows if not row.relative <= max(tolerance, NOISE * row.noise)]  # NaN is
    if beyond:
        worst = max(beyond, key=lambda row: row.relative)
        raise UserError(
            f"{out} is not kept: at {worst.batch}x{worst.height}x{worst.width} it differs from the network by "
            f"{worst.relative:.1e} of the largest output, the tolerance is {max(tolerance, NOISE * worst.noise):.1e}"
        )


def comparisons(
    config: dict[str, Any], static: int | None, files: Sequence[str] | None, *, small: bool = True
) -> Iterator[np.ndarray]:
    """Batches of three sizes, one of them odd and not square, and of three small ones; fixed sizes: three batch sizes.

    Args:
        config: timm's data config.
        static: The fixed size.
        files: Images; without them generated ones.
        small: Whether there are small ones: 1x1, and two of sides up to 32 and 64.
    """
    channels, height, width = config["input_size"]
    if static:
        shapes = [(1, static, static), (2, static, static), (3, static, static)]
    else:
        odd = (3, height * 3 // 4 + 1 | 1, width + 9 | 1)
        shapes = [(1, height, width), odd, (2, height * 3 // 2, width * 3 // 2)]
        draw = np.random.default_rng(height * width)
        shapes += [(1, 1, 1), *((2, *draw.integers(1, most + 1, 2).tolist()) for most in (32, 64))] if small else []
    sources = example_images(config, files)
    for count, *size in shapes:
        sized = {**config, "input_size": [channels, *size]}
        yield np.stack([to_input(sources[i % len(sources)], sized) for i in range(count)])


def example_images(config: dict[str, Any], files: Sequence[str] | None) -> list[Any]:
    """The images of some files; without them generated ones, of two shapes."""
    ends = config.get("pixel_range")
    if files:
        return [_read(file, ends) for file in files]
    if is_per_channel(ends):
        return [_made_bands(0, ends), _made_bands(1, ends).resize((251, 187)), _made_bands(2, ends)]
    return [_made_image(0), _made_image(1).resize((251, 187)), _made_image(2)]


def _read(file: str, ends: Any) -> Any:
    try:
        return read_image(file, ends)
    except BrokenImage as error:
        raise UserError(f"can't read {file}: {error}") from error


def _of_arrays(wanted: np.ndarray, found: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """The largest difference, and the same over the largest output."""
    if wanted.shape != found.shape:
        raise UserError(f"for {shape} the file's output is {found.shape} instead of {wanted.shape}")
    if not np.isfinite(wanted).all():
        raise UserError(f"the network's own answers to images of shape {shape} aren't all finite numbers")
    if not np.isfinite(found).all():
        return float("inf"), float("inf")
    difference = float(np.abs(wanted - found).max())
    return difference, difference / max(float(np.abs(wanted).max()), 1e-12)


def _of_detections(
    wanted: list[np.ndarray], found: list[np.ndarray], side: int, floor: float | None = None
) -> tuple[float, float]:
    """The same of two lists of detections, each compared with the nearest of its image and class in the other.

    Detections of equal scores may change places. A difference is that of scores, of probabilities in masks (their mean,
    where masks have the image's size), or of boxes as shares of the image's longer side. One that the other list lacks
    counts as infinite, but for those whose score is within a thousandth of ``floor`` or of the least that was kept:
    rounding decides about them.
    """
    kept = [0.0 if floor is None else floor, *(float(some[1].min()) for some in (wanted, found) if len(some[1]))]
    least = max(kept) if floor is not None else -1.0
    if floor is None and len(wanted[0]) != len(found[0]):
        return float("inf"), float("inf")
    worst = 0.0
    for ours, theirs in ((wanted, found), (found, wanted)):
        for i in range(len(ours[0])):
            same = (theirs[2] == ours[2][i]) & (theirs[3] == ours[3][i])
            apart = np.abs(theirs[0][same] - ours[0][i]).max(1, initial=0) / side
            apart = np.maximum(apart, np.abs(theirs[1][same] - ours[1][i]))
            if len(ours) > 4:
                masks = np.abs(theirs[4][same] - ours[4][i])
                apart = np.maximum(apart, masks.max((1, 2)) if floor is None else masks.mean((1, 2)))
            nearest = float(apart.min(initial=np.inf))
            if floor is not None and nearest > 1e-2 and ours[1][i] <= least + 1e-3:
                continue
            worst = max(worst, nearest)
    return worst, worst


def _made_image(seed: int, side: int = 256) -> Image.Image:
    """Coloured noise with as much coarse as fine structure, as photographs have."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for cells in (2, 4, 8, 16, 32, 64):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / cells**0.5
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def _made_bands(seed: int, pixel_range: Sequence[Sequence[float]]) -> Bands:
    """The same in any number of channels, of whose ranges it has the whole."""
    planes = [np.asarray(_made_image(seed + 3 * k), np.float32) for k in range(-(-len(pixel_range) // 3))]
    shares = np.concatenate(planes, axis=-1)[..., : len(pixel_range)] / np.float32(255)
    low, high = np.array(pixel_range, np.float32).T
    return Bands(low + shares * (high - low), pixel_range)


def _answer(model: nn.Module, images: torch.Tensor) -> Any:
    with torch.inference_mode():
        return model(images)


def _median_seconds(network: Callable[[], Any], file: Callable[[], Any]) -> list[float]:
    return [median(own) for own in interleaved_seconds({"network": network, "file": file}, 5, budget=6).values()]
