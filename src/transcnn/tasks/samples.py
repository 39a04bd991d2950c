"""A sheet of training images as the network sees them, augmented, with their labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.bands import is_per_channel
from ..errors import UserError
from ..report.classify import save_figures
from ..report.overlay import blend, draw_detections, palette
from ..report.plots import plot_images
from .base import Task

__all__ = ["write_samples"]

IMAGES = 12


def write_samples(run_dir: Path, learner: Task, dataset: Any) -> None:
    """Write ``run_dir/report/augmented.png`` of images spread over a training split, as its transform gives them."""
    folder = run_dir / "report"
    chosen = sorted({i * len(dataset) // IMAGES for i in range(IMAGES)})
    try:
        cells = [_cell(learner, *dataset[i]) for i in chosen]
        folder.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError):
        return  # training meets the same and says so, in all processes
    title = "Training images as the network sees them"
    save_figures(folder, {"augmented.png": lambda: plot_images(cells, title)}, learner.class_names)


def _cell(learner: Task, image: Tensor, truth: Any) -> tuple[Image.Image, list[str]]:
    """An image with its label below it, or its label map or boxes drawn in."""
    names, config = learner.class_names, learner.data_config
    if learner.name == "detect":
        found = {key: value.numpy() for key, value in truth.items() if key in ("boxes", "labels", "masks")}
        shown = draw_detections(_as_image(image), found, names, palette(len(names)), 0.0, enlarge=160)
        count = len(found["boxes"])
        return shown, [f"{count} box{'es' if count != 1 else ''}"]
    if is_per_channel(config.get("pixel_range")):  # no photograph: two deviations below the mean are black
        shown = _as_image(image / 4 + 0.5)
    else:
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
        shown = _as_image(image * std + mean)
    if learner.name == "segment":
        colours = learner.task_args.get("colours") or palette(len(names))
        labels = np.where(truth.numpy() < len(names), truth.numpy(), -1)
        found = [names[i] for i in np.unique(labels[labels >= 0])]
        return blend(shown, labels, colours, 0.4), [", ".join(found) or "nothing that counts"]
    return shown, [learner.caption(truth)]


def _as_image(pixels: Tensor) -> Image.Image:
    """(C, H, W) from 0 to 1 -> an image, grey unless it has three channels or more."""
    array = (255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., :3] if array.shape[2] >= 3 else array[..., 0])
