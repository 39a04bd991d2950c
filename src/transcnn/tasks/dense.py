"""What segmentation and detection have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from ..data.loading.data_module import DataModule
from ..data.loading.loader import make_loader
from ..data.sets.dense_dataset import DenseDataset
from ..errors import UserError
from ..settings import Augment
from .base import Task

__all__ = ["DenseTask"]

MAX_BATCH = 8  # whole images that are held at a time to be evaluated; more gains nothing


class DenseTask(Task):
    """A task whose predictions are drawn, and whose loaders give whole images with what is in them."""

    writes_images = True

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
        split.transform = cls.image_transform(data_config, task_args)
        split.pixel_range = data_config.get("pixel_range")
        settings["batch_size"] = min(settings["batch_size"], MAX_BATCH)
        return make_loader(split, **settings)  # pyright: ignore

    @classmethod
    def model_input(cls, transform: Any, image: Any, file: str) -> Any:
        """The image as the network sees it, itself, and its file."""
        return transform(image)[0], image, file

    @classmethod
    def refuse_mixing(cls, augment: Augment) -> None:
        """Raise UserError for augmentation that would leave the truth behind."""
        for name in ("mixup", "cutmix", "aa", "reprob", "sizes"):
            if getattr(augment, name):
                raise UserError(f"{name} is for classification alone, got {getattr(augment, name)} to {cls.name}")
