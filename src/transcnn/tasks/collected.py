"""Tasks whose scores need the outputs of all images at once: ranks, thresholds, correlations."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.processes import gather
from .image import ImageTask

__all__ = ["CollectedTask"]


class CollectedTask(ImageTask):
    """An image task with a row of labels an image, NaN where one isn't known; its outputs are kept until scored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget()

    @abstractmethod
    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of each entry, (B, L) -> (B, L); entries of labels are known."""

    @abstractmethod
    def figures(self, indices: np.ndarray, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """The scores of all images: indices in the split (N,), outputs (N, L), labels (N, L)."""

    def known_mean(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of the entries that are known; 0 where none is."""
        known = ~labels.isnan()
        losses = torch.where(known, self.losses(outputs, labels.nan_to_num()), 0.0)
        return losses.sum() / known.sum().clamp(min=1)

    def loss(self, batch: Any) -> Tensor:
        """Of the labels that are known, after resizing and mixing where those are asked for."""
        images, labels = batch
        images = self.resized(images)
        if self.mixup is not None:
            images, labels = self.mixed(images, labels)
        return self.known_mean(self(images).float(), labels)

    def evaluate_batch(self, batch: Any, batch_idx: int) -> None:
        """Keep outputs and labels, with their indices in the split."""
        images, labels = batch
        indices = np.array([self.sample_index(self._seen + i) for i in range(len(labels))], np.int64)
        self._seen += len(labels)
        outputs = self(images).float()
        counted = (~labels.isnan()).any(1).cpu().numpy()  # no broken file, no padding, some label known
        rows = (indices, outputs.cpu().numpy(), labels.cpu().numpy())
        self._rows.append(tuple(part[counted] for part in rows))

    def scores(self) -> dict[str, Any]:
        """:meth:`figures` and ``loss``, ``images``, of all processes together."""
        width = len(self.class_names)
        none = (np.zeros(0, np.int64), *(np.zeros((0, width), np.float32),) * 2)
        parts = [np.concatenate(column) for column in zip(none, *self._rows, strict=True)]
        indices, outputs, labels = (np.concatenate(column) for column in zip(*gather(tuple(parts)), strict=True))
        order = np.argsort(indices, kind="stable")
        indices, outputs, labels = indices[order], outputs[order], labels[order]
        self._forget()
        loss = self.known_mean(torch.from_numpy(outputs).to(self.device), torch.from_numpy(labels).to(self.device))
        found = {**self.figures(indices, outputs, labels), "loss": float(loss)}
        return {**found, "images": torch.tensor(len(indices))}

    def _forget(self) -> None:
        self._seen = 0
        self._rows: list[tuple[np.ndarray, ...]] = []
