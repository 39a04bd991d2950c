"""How well a map says what a network goes by: take away, or put in, what it calls important, and watch the answer.

V. Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", arXiv 1806.07421.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import functional as tvf

from ..checkpoints.loading import Loaded
from ..errors import UserError
from ..onnx.answers import probabilities
from ..plugging.running import eval_mode
from .classes import check_logits, check_target
from .record import ImageLike, as_input

__all__ = ["Scores", "deletion_insertion"]


@dataclass(frozen=True, eq=False)
class Scores:
    """The areas under the two curves, and the curves.

    Attributes:
        deletion: Mean probability of the class while the most important pixels go first: low is good.
        insertion: While they come first: high is good.
        fractions: Share of the pixels taken away or put in, (steps + 1,).
        deletion_curve, insertion_curve: The probability at each of them.
    """

    deletion: float
    insertion: float
    fractions: np.ndarray
    deletion_curve: np.ndarray
    insertion_curve: np.ndarray


def deletion_insertion(
    model: nn.Module | Loaded,
    image: ImageLike,
    values: Tensor,
    target: int | None = None,
    *,
    steps: int = 32,
    batch_size: int = 64,
    seed: int = 0,
) -> Scores:
    """Score a map of an image.

    Deletion sets the pixels to 0, the mean colour of normalised images, those of the largest values first; insertion
    starts with a blurred image (Gaussian, of a standard deviation of an eighth of the short side) and puts in the real
    pixels in the same order. Pixels of equal value come in an order drawn at random.

    Args:
        model, image: As for :func:`~transcnn.explain.attention_maps`; the model gives logits.
        values: The map, (H, W).
        target: Number of the class whose probability is watched; None is the most probable one.
        steps: Steps from no pixel to all.
        batch_size: Images run at a time.
        seed: Of the order of equal pixels.

    Probabilities are softmax's, those of several labels an image (a :class:`~transcnn.checkpoints.loading.Loaded` says
    so) each label's own.

    Raises:
        UserError: The map isn't of the image's size, no such class, fewer than one step, or no network of classes.
    """
    module, x = as_input(model, image)
    task = model.task if isinstance(model, Loaded) else "classify"
    if task not in ("classify", "multilabel"):
        raise UserError(f"deletion and insertion watch the probability of a class; this network is for the task {task}")
    size = tuple(x.shape[2:])
    if x.ndim != 4:
        raise UserError(f"deletion and insertion are for images (1, C, H, W), got {tuple(x.shape)}")
    if tuple(values.shape) != size:
        raise UserError(f"the map must be of the image's size {size}, got {tuple(values.shape)}")
    if steps < 1:
        raise UserError(f"steps must be 1 or more, got {steps}")
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}")
    ranks = _ranks(values, seed).to(x.device)  # (H, W), 0 is the most important pixel
    fractions = np.linspace(0, 1, steps + 1)
    kept = torch.from_numpy(np.rint(fractions * values.numel())).to(x.device)
    chosen = ranks < kept[:, None, None, None]  # (steps + 1, 1, H, W)
    empty, blurred = torch.zeros_like(x), blur(x)
    images = torch.cat([torch.where(chosen, empty, x), torch.where(chosen, x, blurred)])
    with eval_mode(module), torch.no_grad():
        logits = torch.cat([check_logits(module(batch)) for batch in images.split(batch_size)]).float().cpu()
    which = check_target(target, logits[0])
    curves = torch.from_numpy(probabilities(task, logits.numpy())[:, which]).view(2, -1).double()
    areas = torch.trapezoid(curves, torch.from_numpy(fractions), dim=1).tolist()
    return Scores(areas[0], areas[1], fractions, *curves.numpy())


def blur(x: Tensor) -> Tensor:
    """A Gaussian blur of an eighth of the short side, (1, C, H, W) -> (1, C, H, W)."""
    sigma = min(x.shape[2:]) / 8
    kernel = min(2 * round(3 * sigma) + 1, 2 * min(x.shape[2:]) - 1)  # reflection allows no larger one
    return tvf.gaussian_blur(x.float(), [kernel, kernel], [sigma, sigma]).to(x.dtype)


def _ranks(values: Tensor, seed: int) -> Tensor:
    """The place of each pixel when sorted from the largest value to the smallest, (H, W)."""
    flat = values.detach().cpu().double().flatten().numpy()
    ties = np.random.default_rng(seed).permutation(flat.size)
    order = np.lexsort((ties, -flat))
    ranks = np.empty(flat.size, np.int64)
    ranks[order] = np.arange(flat.size)
    return torch.from_numpy(ranks).view(values.shape)
