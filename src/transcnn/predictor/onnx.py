"""Predictions by an exported file and ONNX Runtime alone: no torch."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.arguments import DENSE
from ..checkpoints.available import check_resizable
from ..errors import MAX_SIDE, UserError, check_range, first_line
from ..onnx.answers import answers
from ..onnx.dense import class_logits, detections
from ..onnx.features import add_output, pooled
from ..onnx.predict import OnnxModel, open_session, to_input
from ..report.answers import NOT_A_NUMBER, Detections, Embedding, Failure, Prediction, Segmentation, prediction_of
from .base import Predictor

__all__ = ["OnnxPredictor"]


class OnnxPredictor(Predictor):
    """A network in an ONNX file of ``transcnn export``; threads run it side by side.

    Args:
        path: The file.
        accelerator: ``cpu``, ``gpu``, or ``auto`` for the GPU where ONNX Runtime can use one.

    Attributes:
        network: The file, as :class:`transcnn.onnx.predict.OnnxModel`.
    """

    def __init__(self, path: str | os.PathLike[str], accelerator: str = "cpu") -> None:
        self.network = OnnxModel(path, accelerator=accelerator)
        self._accelerator = accelerator
        self._sessions: dict[str | None, tuple[Any, str]] = {}  # by layer
        self.model = None
        self.task, self.class_names = self.network.task, self.network.class_names
        self.preprocessing, self.info = self.network.data_config, self.network.info
        self.source = os.fspath(path)
        if self.task in DENSE and self.network.fixed:
            raise UserError(
                f"images to {self.task} have many sizes, the file takes one alone; export it without --static"
            )

    def resize_input(self, img_size: int | None) -> None:
        """Have images resized to another side than the network was trained at; None leaves it.

        Raises:
            UserError: The file was exported for one size, or segments or detects.
        """
        check_range(1, MAX_SIDE, img_size=img_size)
        check_resizable(self, img_size)
        if img_size is not None:
            self.network.resize_to(img_size)

    def _steps(self, top_k: int) -> tuple[Any, Any]:
        if self.task not in DENSE:
            args = self.info.get("task_args")

            def predict_inputs(inputs: list[np.ndarray]) -> list[Prediction]:
                outputs = self.network(np.stack(inputs))
                return [prediction_of(row) for row in answers(self.task, outputs, self.class_names, args, top_k)]

            return partial(to_input, data_config=self.preprocessing), predict_inputs
        return _unchanged, lambda images: [self._dense(image, top_k) for image in images]

    def _embed_steps(self, layer: str | None) -> tuple[Any, Any]:
        if self.task in DENSE:
            raise UserError(f"features of a file are a classifier's; this one is for the task {self.task}")
        if layer not in self._sessions:
            content, name = add_output(self.source, layer)
            self._sessions[layer] = open_session(content, self.source, self._accelerator), name
        session, name = self._sessions[layer]

        def embed_inputs(inputs: list[np.ndarray]) -> list[Prediction]:
            images = np.stack(inputs)
            try:
                (found,) = session.run([name], {session.get_inputs()[0].name: images})
            except Exception as error:  # ONNX Runtime has a class of its own for each cause
                raise UserError(f"{self.source} can't be run: {first_line(error)}") from error
            return [Embedding(vector=vector) for vector in pooled(found, images.shape, name)]

        return partial(to_input, data_config=self.preprocessing), embed_inputs

    def _dense(self, image: Image.Image, top_k: int) -> Prediction:
        args = self.info.get("task_args") or {}
        if self.task == "segment":
            logits = class_logits(self.network.outputs, image, self.info)
            if not np.isfinite([logits.min(), logits.max()]).all():
                return Failure(error=NOT_A_NUMBER)
            return replace(Segmentation.of(logits.argmax(0), self.class_names, args, top_k), image=image)
        found = detections(self.network.outputs, image, self.info)
        return replace(Detections.of(found, self.class_names, args), image=image)


def _unchanged(image: Image.Image) -> Image.Image:
    return image
