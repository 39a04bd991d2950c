"""Knowledge distillation: learning from another network's predictions as well as from the labels.

As DeiT does it (Touvron et al., 2012.12877, section 4), with one head that learns both, for there is no token to give
the teacher's predictions to. With logits z of the student and t of the teacher, labels y, and a share alpha:

    hard    (1 - alpha) CE(z, y) + alpha CE(z, argmax t)                                            (eq. 3; alpha 1/2)
    soft    (1 - alpha) CE(z, y) + alpha tau^2 KL(softmax(z / tau), softmax(t / tau))               (eq. 2)

The KL term is summed over classes and averaged over images, as the paper writes it (DeiT's program divides by the
number of classes as well).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.loading import Loaded, load
from ..data.bands import is_per_channel
from ..errors import UserError, first_line
from ..settings import Distill

__all__ = ["Teacher"]

_log = logging.getLogger(__name__)


class Teacher:
    """A trained network whose predictions for the student's augmented images are learnt from.

    It is no module of the student's: no checkpoint, average or optimizer knows of it.

    Args:
        settings: ``distill_from`` names it.
        class_names: The student's classes. A teacher of the same names has its outputs reordered to them; one with
            none of the names, but as many classes, is taken in order, with a warning.
        data_config: How the student's images were normalised; where the teacher's were otherwise, it is given its own.
        sizes: Sides that the student's images have in other epochs (``Augment.sizes``).

    Raises:
        UserError: No such network, or one for another task, other channels, another number of classes, or classes of
            which only some have the student's names.
    """

    def __init__(
        self, settings: Distill, class_names: list[str], data_config: dict[str, Any], sizes: Sequence[int] = ()
    ) -> None:
        check(settings)
        self.settings = settings
        loaded = load(str(settings.distill_from))
        self.order = _order(loaded, class_names, data_config)
        self.model: nn.Module = loaded.model.eval().requires_grad_(False)
        self.scale, self.shift = _normalisation(data_config, loaded.preprocessing)
        channels, *size = data_config["input_size"]
        for height, width in dict.fromkeys([(*size,), *((side, side) for side in sizes)]):
            self._check_size(loaded, (channels, height, width))

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self  # it never changes: the averaged copy of a student needs none of its own

    def _check_size(self, loaded: Loaded, size: Sequence[int]) -> None:
        """See that the teacher takes images of the student's size (C, H, W) where its own is another."""
        own = loaded.preprocessing["input_size"]
        if list(size) == list(own):
            return
        try:
            self(torch.zeros(1, *size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the teacher {loaded.source} is made for images of {own[2]}x{own[1]}, the student gets "
                f"{size[2]}x{size[1]}: {first_line(error)}"
            ) from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The student's input (B, C, H, W) -> the teacher's logits (B, classes) in the student's order."""
        device = next(self.model.parameters()).device
        if device != images.device:
            self.model.to(images.device)
        if self.scale is not None and self.shift is not None:
            images = images * self.scale.to(images) + self.shift.to(images)
        logits = self.model(images).float()
        return logits if self.order is None else logits[:, self.order]

    def loss(self, label_loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """The loss against the labels and that against the teacher, in their shares."""
        s, predictions = self.settings, self(images)
        if s.distill_type == "hard":
            distance = F.cross_entropy(logits, predictions.argmax(1))
        else:
            ours, theirs = ((z / s.distill_tau).log_softmax(1) for z in (logits, predictions))
            distance = F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * s.distill_tau**2
        return (1 - s.distill_alpha) * label_loss + s.distill_alpha * distance


def check(settings: Distill) -> None:
    """Refuse values that make no sense; raises UserError."""
    if not 0 <= settings.distill_alpha <= 1:
        raise UserError(f"distill_alpha must be from 0 to 1, got {settings.distill_alpha}")
    if settings.distill_tau <= 0:
        raise UserError(f"distill_tau must be above 0, got {settings.distill_tau}")


def _order(teacher: Loaded, class_names: list[str], data_config: dict[str, Any]) -> Tensor | None:
    """The teacher's outputs in the student's order of classes; None where that is its own."""
    if teacher.task != "classify":
        raise UserError(f"the teacher {teacher.source} is for the task {teacher.task}; distillation needs a classifier")
    theirs, ours = teacher.preprocessing["input_size"][0], data_config["input_size"][0]
    if theirs != ours:
        raise UserError(f"the teacher {teacher.source} takes images of {theirs} channels, the student of {ours}")
    if is_per_channel(teacher.preprocessing.get("pixel_range")) != is_per_channel(data_config.get("pixel_range")):
        raise UserError(f"one of the teacher {teacher.source} and the student reads numbers, the other photographs")
    if len(teacher.class_names) != len(class_names):
        raise UserError(
            f"the teacher {teacher.source} knows {len(teacher.class_names)} classes, the data has {len(class_names)}"
        )
    if teacher.class_names == class_names:
        return None
    known = set(teacher.class_names)
    unknown = [name for name in class_names if name not in known]
    if len(unknown) == len(class_names):
        _log.warning(
            "the teacher %s has none of the data's class names: its classes are taken in order", teacher.source
        )
        return None
    if unknown or len(known) < len(class_names):
        which = ", ".join(map(repr, unknown[:5])) or "two classes of one name"
        raise UserError(f"the teacher {teacher.source} has some of the data's class names, but not all: {which}")
    return torch.tensor([teacher.class_names.index(name) for name in class_names])


def _normalisation(student: dict[str, Any], teacher: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Factor and summand that make the student's input the teacher's; None where they are alike."""
    with suppress(KeyError):
        ours, theirs = _scale(student), _scale(teacher)
        if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            return (ours[1] / theirs[1]).float(), ((ours[0] - theirs[0]) / theirs[1]).float()
    return None, None


def _scale(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What becomes 0 in a network's input, and what is one more: of 8-bit images from 0 to 1, of Bands as they are."""
    mean, std = (torch.tensor(config[key], dtype=torch.float64).view(-1, 1, 1) for key in ("mean", "std"))
    if not is_per_channel(ends := config.get("pixel_range")):
        return mean, std
    low, high = torch.tensor(ends, dtype=torch.float64).view(-1, 2, 1, 1).unbind(1)
    return low + mean * (high - low), std * (high - low)
