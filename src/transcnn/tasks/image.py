"""What the tasks have in common whose answer is about an image as a whole: data, loaders, mixing, growing images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from ..data.bands import is_per_channel
from ..data.loading.data_module import DataModule
from ..data.loading.loader import make_loader
from ..data.sets.classify import open_set, open_splits
from ..data.sets.image_dataset import ImageDataset
from ..data.sets.splits import Splits
from ..data.sources.files import dense_layout
from ..data.sources.targets import Classes, Targets
from ..data.transforms.classify import policy_for, train_transform
from ..errors import UserError
from ..settings import Augment, Table, TrainSettings, as_plain
from .base import Task
from .inference import ImageInference

__all__ = ["ImageTask"]

_log = logging.getLogger(__name__)
# Settings of augmentation that only some policies read.
READ_BY = {
    **dict.fromkeys(("pad", "degrees", "zoom"), ("small",)),
    **dict.fromkeys(("scale", "ratio"), ("imagenet",)),
    **dict.fromkeys(("hflip", "vflip", "color_jitter", "aa", "reprob"), ("small", "imagenet")),
}


class ImageTask(ImageInference, Task):
    """A task with one answer an image: a class, labels, numbers. Batches are (images (B, C, H, W), labels (B, ...))."""

    targets: ClassVar[type[Targets]] = Classes  # a new one for each data set that is opened
    mixup: Mixup | None = None  # what mixes a batch, where one was asked for

    @classmethod
    def args_of(cls, settings: TrainSettings) -> dict[str, Any]:
        """The task's own settings, and which columns of a table are what."""
        table = {name: value for name, value in as_plain(settings)["table"].items() if value is not None}
        return {**super().args_of(settings), **({"table": table} if table else {})}

    @classmethod
    def open_data(cls, data: str | None, task_args: dict[str, Any], **settings: Any) -> Splits:
        """The splits of a data set of labelled images."""
        table = Table(**task_args.get("table", {}))
        try:
            return open_splits(data, table=table, targets=cls.targets(), **settings)
        except UserError as error:
            if data and (task := dense_layout(data)):
                raise UserError(f"{data} looks like data to {task}: add --task {task} ({error})") from error
            raise

    @classmethod
    def loaders(
        cls, splits: Any, data_config: dict[str, Any], augment: Augment, task_args: dict[str, Any], **settings: Any
    ) -> DataModule:
        """Loaders that augment the training split as ``augment`` says."""
        in_chans, *size = data_config["input_size"]
        a = augment
        _warn_of_unread(a, size)
        train = train_transform(
            tuple(size),
            in_chans=in_chans,
            policy=a.policy,
            mean=data_config["mean"],
            std=data_config["std"],
            interpolation=data_config["interpolation"],
            scale=a.scale,
            ratio=a.ratio,
            pad=a.pad,
            hflip=a.hflip,
            vflip=a.vflip,
            degrees=a.degrees,
            zoom=a.zoom,
            color_jitter=a.color_jitter,
            aa=a.aa,
            re_prob=a.reprob,
            re_mode=a.remode,
            bands=is_per_channel(data_config.get("pixel_range")),
        )
        balanced = task_args.get("sampler") == "balanced"
        return DataModule(splits, train, cls.image_transform(data_config), balanced=balanced, **settings)

    @classmethod
    def open_split(
        cls, data: str | None, split: str, class_names: list[str], task_args: dict[str, Any], **settings: Any
    ) -> ImageDataset:
        """One split of a data set of labelled images."""
        table = Table(**task_args.get("table", {}))
        return open_set(data, split, class_names=class_names, table=table, targets=cls.targets(), **settings)

    @classmethod
    def split_loader(
        cls, split: ImageDataset, data_config: dict[str, Any], task_args: dict[str, Any], **settings: Any
    ) -> Any:
        """A loader of (images, labels) over one split."""
        transform = cls.image_transform(data_config)
        return make_loader(split.with_transform(transform, pixel_range=data_config.get("pixel_range")), **settings)

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images are mixed in pairs: of an odd number the last one is left out, a single one is mixed with itself."""
        assert self.mixup is not None
        if len(images) == 1:
            images, labels = self.mixup(torch.cat([images, images]), torch.cat([labels, labels]))
            return images[:1], labels[:1]
        even = len(images) // 2 * 2
        return self.mixup(images[:even], labels[:even])

    def warnings_about(self, scores: dict[str, Any]) -> list[str]:
        """Also that epochs of smaller images are evaluated at the full size, where they do worse."""
        found = super().warnings_about(scores)
        if (side := self._smaller_side()) is not None:
            size = "x".join(map(str, self.data_config["input_size"][1:]))
            found.append(f"trained at {side}x{side} so far and evaluated at {size}: scores rise with the last size")
        return found

    def resized(self, images: Tensor) -> Tensor:
        """Training images at the side that the present epoch has (``Augment.sizes``)."""
        side = self._smaller_side()
        return images if side is None else F.interpolate(images, (side, side), mode="bilinear", antialias=True)

    def _smaller_side(self) -> int | None:
        ends = self.augment.size_ends or []
        nth = sum(self.current_epoch >= end * self.epochs for end in ends)
        return None if nth == len(ends) else (self.augment.sizes or [])[nth]


def _warn_of_unread(augment: Augment, size: Sequence[int]) -> None:
    """Log settings that were given and that the policy for images of this size doesn't read."""
    policy, default = policy_for(augment.policy, size), Augment()
    if augment.aa and augment.color_jitter:
        _log.warning("color_jitter=%s has no effect beside aa, which changes colours itself", augment.color_jitter)
    for name, policies in READ_BY.items():
        value = getattr(augment, name)
        if value and value != getattr(default, name) and policy not in policies:
            shape, wanted = "x".join(map(str, size)), " or ".join(policies)
            _log.warning("%s=%s has no effect: %s reads it, images of %s get %s", name, value, wanted, shape, policy)
