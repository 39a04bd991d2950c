"""Predictions by a network of PyTorch's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..checkpoints.available import check_resizable
from ..checkpoints.loading import Loaded
from ..checkpoints.memory import check_forward
from ..distributed.runtime import check_accelerator, choose_precision
from ..fast.inference.optimize import try_optimize
from ..report.answers import Embedding, Prediction
from ..tasks.features import features_of
from ..tasks.inference import get_inference
from .base import Predictor

__all__ = ["NetworkPredictor"]


@dataclass
class NetworkPredictor(Loaded, Predictor):
    """A :class:`Loaded` that predicts: ``NetworkPredictor(model, task, class_names, preprocessing, source, info)``.

    Threads take turns at the network; images are decoded and resized outside of that.

    Attributes:
        autocast: The dtype of :func:`torch.autocast`; None for the network's own arithmetic.
    """

    autocast: torch.dtype | None = None
    _turn: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def of(cls, loaded: Loaded, accelerator: str, precision: str, optimize: bool) -> NetworkPredictor:
        """From what ``checkpoints.loading.load`` gives; the arguments are those of :func:`transcnn.load`."""
        check_accelerator(accelerator)
        loaded.model.to("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")
        word = choose_precision(precision, accelerator)
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(word)
        fast = try_optimize(loaded.model, dtype) if optimize else None
        model, dtype = (loaded.model, dtype) if fast is None else (fast, None)  # autocast would do nothing inside
        return cls(
            model, loaded.task, loaded.class_names, loaded.preprocessing, loaded.source, loaded.info, autocast=dtype
        )

    def resize_input(self, img_size: int | None) -> None:
        """Have images resized to another side than the network was trained at; None leaves it.

        Raises:
            UserError: A side of 0 or less, or a network that segments or detects.
        """
        check_resizable(self, img_size)
        super().resize_input(img_size)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turn=threading.Lock())

    def check_memory(self, images: int, *, chosen: bool = False) -> None:
        """See that a batch's inputs fit into memory, and what the network makes of them on its way."""
        super().check_memory(images, chosen=chosen)
        check_forward(self, self._at_once(images), chosen=chosen)

    def _steps(self, top_k: int) -> tuple[Any, Any]:
        task, device = get_inference(self.task), self._device

        def predict_inputs(inputs: list[Any]) -> list[Prediction]:
            with self._computing(device):
                return task.predict_batch(self, inputs, device, top_k)

        return self._make_input(), predict_inputs

    def _embed_steps(self, layer: str | None) -> tuple[Any, Any]:
        device, features = self._device, features_of(self.model, self.task, layer)

        def embed_inputs(inputs: list[Any]) -> list[Prediction]:
            with self._computing(device):
                vectors = features(inputs, device).float().cpu().numpy()
            return [Embedding(vector=vector) for vector in vectors]

        return self._make_input(), embed_inputs

    def _make_input(self) -> Any:
        task = get_inference(self.task)
        return partial(task.model_input, task.image_transform(self.preprocessing, self.info.get("task_args")))

    @property
    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    @contextmanager
    def _computing(self, device: torch.device) -> Iterator[None]:
        """One thread's turn at the network."""
        autocast = torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()
        with self._turn, torch.inference_mode(), autocast:
            yield
