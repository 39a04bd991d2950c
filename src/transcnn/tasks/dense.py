"""What segmentation and detection have in common."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from typing import Any

import numpy as np

from ..data.images import BrokenImage
from ..data.loading.data_module import DataModule
from ..data.loading.loader import make_loader
from ..data.sets.dense_dataset import DenseDataset
from ..errors import UserError
from ..settings import Augment
from .base import Task
from .inference import DenseInference

__all__ = ["DenseTask"]

SAMPLED = 16  # images of a split that are looked at for their sizes
MAX_BATCH = 8  # whole images that are held at a time to be evaluated; more gains nothing


class DenseTask(DenseInference, Task):
    """A task whose predictions are drawn, and whose loaders give whole images with what is in them."""

    @classmethod
    @abstractmethod
    def train_transform(cls, data_config: dict[str, Any], augment: Augment, task_args: dict[str, Any]) -> Any:
        """The training split's transform, with the augmentation of ``augment``."""

    @classmethod
    def loaders(
        cls, splits: Any, data_config: dict[str, Any], augment: Augment, task_args: dict[str, Any], **settings: Any
    ) -> DataModule:
        """Loaders that augment the training split as ``augment`` says."""
        cls.refuse_mixing(augment)
        train = cls.train_transform(data_config, augment, task_args)
        return DataModule(splits, train, cls.image_transform(data_config, task_args), **settings)  # pyright: ignore

    @classmethod
    def split_loader(
        cls, split: DenseDataset, data_config: dict[str, Any], task_args: dict[str, Any], **settings: Any
    ) -> Any:
        """A loader of whole images and their truth."""
        transform = cls.image_transform(data_config, task_args)
        split = split.with_transform(transform, pixel_range=data_config.get("pixel_range"))
        settings["batch_size"] = min(settings["batch_size"], MAX_BATCH)
        return make_loader(split, **settings)  # pyright: ignore

    @classmethod
    def largest_size(cls, splits: Any, task_args: dict[str, Any]) -> tuple[int, int] | None:
        """That of some images of the training and validation splits, as they are resized for the network."""
        found = []
        for split in (splits.train, splits.val):
            for i in np.linspace(0, len(split) - 1, min(SAMPLED, len(split))).astype(int).tolist():
                with suppress(BrokenImage):
                    width, height = split.read(i)[0].size
                    factor = cls.enlargement(min(height, width), max(height, width), task_args)
                    found.append((round(height * factor), round(width * factor)))
        return max(found, key=max, default=None)

    @classmethod
    @abstractmethod
    def enlargement(cls, short: int, long: int, task_args: dict[str, Any]) -> float:
        """The factor, the largest of training and evaluation, by which an image of these sides is resized."""

    @classmethod
    def refuse_mixing(cls, augment: Augment) -> None:
        """Raise UserError for augmentation that would leave the truth behind."""
        for name in ("mixup", "cutmix", "aa", "reprob", "sizes"):
            if getattr(augment, name):
                raise UserError(f"{name} is for classification alone, got {getattr(augment, name)} to {cls.name}")
