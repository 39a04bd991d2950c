"""What the page shows about an image: the network's prediction, and where any spot of the image looks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.loading import Loaded
from ..data.bands import Bands, is_per_channel
from ..data.images import to_channels
from ..data.transforms.classify import channel_stats
from ..errors import UserError
from ..explain.figure import describe
from ..explain.maps import AttentionMap, maps_of
from ..explain.record import record
from ..fast.inference.optimize import try_optimize
from ..tasks.inference import get_inference
from .drawing import draw_look, enlarged, mark_spot

__all__ = ["Look", "Stage", "Viewer", "Visit"]

SHOWN = 720  # longest side of an image on the page
LONGEST = 3  # of what attention is computed on, the longer side is at most so many times the shorter one's wish


@dataclass(frozen=True)
class Stage:
    """A stage of the network that holds H-MHSA: its number from 0, its attention heads, how many levels have grids."""

    number: int
    heads: int
    local_levels: int


@dataclass
class Visit:
    """What one visitor's image leaves behind, for the next click.

    Attributes:
        image: As shown, RGB, no longer than ``SHOWN``.
        input: What attention is computed on, (1, C, h, w): the whole image at about the network's size.
        spot: The spot asked about, row and column of ``image``.
    """

    image: Image.Image
    input: Tensor
    spot: tuple[int, int]


@dataclass(frozen=True)
class Look:
    """One step of attention from one spot: an image, a title and plain words about it."""

    title: str
    words: str
    image: Image.Image = field(compare=False)


class Viewer:
    """A network that answers visitors, one at a time: hooks that watch attention must not see two images.

    Args:
        loaded: As :func:`transcnn.checkpoints.loading.load` gives it.
        device: Where to compute.
        optimize: Whether predictions come from the network as :func:`transcnn.fast.optimize` makes it; attention, which
            hooks watch, is always that of the network itself.
    """

    def __init__(self, loaded: Loaded, device: str | torch.device = "cpu", optimize: bool = True) -> None:
        self.loaded = loaded
        self.model = loaded.model.to(device).eval()
        fast = try_optimize(self.model) if optimize else None
        self.predicting = loaded if fast is None else replace(loaded, model=fast)
        self.device = torch.device(device)
        self.task = get_inference(loaded.task)
        self.pixel_range = loaded.preprocessing.get("pixel_range")
        self.transform = self.task.image_transform(loaded.preprocessing, loaded.info.get("task_args"))
        self.lock = threading.Lock()
        self.name = str(loaded.info.get("model") or type(loaded.model).__name__)
        self.stages = self._find_stages()

    @property
    def takes(self) -> str:
        """Which files the network takes, in a line; "" where these are photographs."""
        if not is_per_channel(self.pixel_range):
            return ""
        channels = len(self.pixel_range)
        return (
            f"This network takes images of {channels} channels: a TIFF of so many bands or pages, or a .npy array "
            f"(rows, columns, {channels}). {'The first three are' if channels >= 3 else 'The first is'} shown."
        )

    def visit(self, image: Any) -> Visit:
        """A new image, as ``read_image`` gives it; the spot is its middle."""
        shown = image.convert("RGB") if isinstance(image, Bands) else to_channels(image, 3)
        shown = enlarged(shown) if max(shown.size) < SHOWN else shown.copy()
        shown.thumbnail((SHOWN, SHOWN))
        middle = (shown.height // 2, shown.width // 2)
        return Visit(shown, self._whole(image), middle)

    def answer(self, image: Any, top_k: int = 5) -> dict[str, Any]:
        """What ``transcnn predict`` returns for this image; ``overlay`` is there, where the task has one."""
        given = self.task.model_input(self.transform, image)
        with self.lock, torch.inference_mode():
            prediction = self.task.predict_batch(self.predicting, [given], self.device, top_k)[0]
        row = prediction.to_dict()
        del row["file"]
        if not self.task.writes_images:
            return row
        overlay = prediction.plot(image)
        overlay.thumbnail((2 * SHOWN, 2 * SHOWN))
        return {**row, "overlay": overlay}

    def look(self, visit: Visit, stage: int, head: Literal["mean"] | int = "mean", block: int = -1) -> list[Look]:
        """Where the visit's spot looks in one block of a stage, level by level, the whole image last."""
        if not self.stages:
            raise UserError("this network holds no H-MHSA, so there is no attention to show")
        with self.lock:
            _, records = record(self.model, visit.input.to(self.device))
        blocks = [r for r in records if r.stage == stage]
        size = (visit.input.shape[2], visit.input.shape[3])
        place = to_other(visit.spot, (visit.image.height, visit.image.width), size)
        maps = maps_of(blocks[block], place, size, head)
        return [Look(_title(m, len(maps)), describe(m).replace("\n", " "), draw_look(visit.image, m)) for m in maps]

    def marked(self, visit: Visit) -> Image.Image:
        """The image with its spot marked."""
        return mark_spot(visit.image, visit.spot)

    def _whole(self, image: Any) -> Tensor:
        """The whole image as the network's input, its shorter side that of the network, its aspect kept."""
        config = self.loaded.preprocessing
        channels, *wanted = config["input_size"]
        side = min(wanted)
        short, long = sorted(image.size)
        scale = min(side / short, LONGEST * side / long)
        step = 1 if self.task.whole_image else 32  # decoders put halves together again
        width, height = (max(step, round(n * scale / step) * step) for n in image.size)
        small = to_channels(image, channels).resize((width, height), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.atleast_3d(np.asarray(small, np.float32)).transpose(2, 0, 1)) / 255  # (C, h, w)
        mean, std = (torch.tensor(channel_stats(config[key], channels))[:, None, None] for key in ("mean", "std"))
        return ((x - mean) / std)[None]

    def _find_stages(self) -> list[Stage]:
        """The stages by one run on an empty image; none for a network without H-MHSA."""
        x = torch.zeros(1, *self.loaded.preprocessing["input_size"], device=self.device)
        try:
            _, records = record(self.model, x)
        except UserError:
            return []
        last = {r.stage: r for r in records}
        return [Stage(number, r.attn.num_heads, len(r.qkv)) for number, r in last.items()]


def to_other(place: Sequence[int], size: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """A pixel of an image as one of the same image at another size."""
    row, column = (min(n - 1, max(0, p * n // had)) for p, had, n in zip(place, size, other, strict=True))
    return row, column


def _title(m: AttentionMap, levels: int) -> str:
    if m.grid_size is None:
        return "Far: the whole image"
    return "Near: inside its grid" if m.level == 1 else f"Farther: grids of level {m.level} of {levels}"
