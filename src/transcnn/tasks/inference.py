"""From an image to a network's input, and from its outputs to a prediction, by task.

What training and scoring need isn't imported here: Lightning and torchmetrics take longer than a small network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.bands import is_per_channel
from ..data.transforms.classify import Transform, eval_transform
from ..data.transforms.detect import DetectTransform
from ..data.transforms.segment import EvalTransform
from ..onnx.answers import answers
from ..report.answers import NOT_A_NUMBER, Detections, Failure, Prediction, Segmentation, prediction_of
from . import check_task
from .sliding import sliding_window_inference

__all__ = [
    "DenseInference",
    "DetectInference",
    "ImageInference",
    "Inference",
    "SegmentInference",
    "get_inference",
    "logits_of_pixels",
]


class Inference(ABC):
    """What a task does with a trained network; a task's class is one of these."""

    whole_image: ClassVar[bool] = False  # whether it answers about an image as a whole, by a network as timm makes them
    writes_images: ClassVar[bool] = False  # whether ``predict`` writes masks or overlays, of whole images one by one

    @staticmethod
    @abstractmethod
    def image_transform(data_config: dict[str, Any], task_args: dict[str, Any] | None = None) -> Any:
        """What one image goes through before a trained model sees it, called as ``transform(image, seed)``."""

    @classmethod
    def model_input(cls, transform: Any, image: Any) -> Any:
        """What ``predict_batch`` is given for one image; ``transform`` is ``image_transform``'s."""
        return transform(image, 0)

    @classmethod
    @abstractmethod
    def predict_batch(cls, loaded: Any, inputs: list[Any], device: torch.device, top_k: int) -> list[Prediction]:
        """What a trained network says about each of several images.

        Args:
            loaded: As :func:`transcnn.checkpoints.loading.load` gives it, on ``device``.
            inputs: From ``model_input``.
            device: Where to compute.
            top_k: Most classes to list.
        """


class ImageInference(Inference):
    """One answer an image: a class, labels, numbers."""

    whole_image = True

    @staticmethod
    def image_transform(data_config: dict[str, Any], task_args: dict[str, Any] | None = None) -> Transform:
        """Resize, crop, normalise, as ``data_config`` says."""
        in_chans, *size = data_config["input_size"]
        return eval_transform(
            tuple(size),
            in_chans=in_chans,
            mean=data_config["mean"],
            std=data_config["std"],
            interpolation=data_config["interpolation"],
            crop_pct=data_config["crop_pct"],
            crop_mode=data_config.get("crop_mode") or "center",
            bands=is_per_channel(data_config.get("pixel_range")),
        )

    @classmethod
    def predict_batch(cls, loaded: Any, inputs: list[Any], device: torch.device, top_k: int) -> list[Prediction]:
        """As an exported file's outputs are read: :func:`transcnn.onnx.answers.answers`."""
        outputs = loaded.model(torch.stack(inputs).to(device)).float().cpu().numpy()
        rows = answers(loaded.task, outputs, loaded.class_names, loaded.info.get("task_args"), top_k)
        return [prediction_of(row) for row in rows]


class DenseInference(Inference):
    """Answers that are drawn on their image."""

    writes_images = True

    @classmethod
    def model_input(cls, transform: Any, image: Any) -> Any:
        """The image as the network sees it, and itself."""
        return transform(image)[0], image


class SegmentInference(DenseInference):
    """A class for each pixel."""

    @staticmethod
    def image_transform(data_config: dict[str, Any], task_args: dict[str, Any] | None = None) -> EvalTransform:
        """Normalise the whole image, resized if the settings say so."""
        return EvalTransform(
            in_chans=data_config["input_size"][0],
            mean=data_config["mean"],
            std=data_config["std"],
            resize=(task_args or {}).get("resize"),
        )

    @classmethod
    def predict_batch(cls, loaded: Any, inputs: list[Any], device: torch.device, top_k: int) -> list[Prediction]:
        """The class of each pixel of each image, at its own size."""
        args, names, made = loaded.info["task_args"], loaded.class_names, []
        for pixels, image in inputs:
            size = (image.height, image.width)
            logits = logits_of_pixels(loaded.model, pixels[None].to(device), size, len(names), args)
            if not bool(torch.stack(logits.aminmax()).isfinite().all()):  # ``argmax`` would say the first class
                made.append(Failure(error=NOT_A_NUMBER))
                continue
            labels = logits[0].argmax(0).cpu().numpy()
            made.append(replace(Segmentation.of(labels, names, args, top_k), image=image))
        return made


class DetectInference(DenseInference):
    """Boxes with names, and masks of Mask R-CNN."""

    @staticmethod
    def image_transform(data_config: dict[str, Any], task_args: dict[str, Any] | None = None) -> DetectTransform:
        """The image as it is; the detector resizes and normalises it."""
        masks = (task_args or {}).get("detector") == "maskrcnn"
        return DetectTransform(in_chans=data_config["input_size"][0], masks=masks)

    @classmethod
    def predict_batch(cls, loaded: Any, inputs: list[Any], device: torch.device, top_k: int) -> list[Prediction]:
        """The objects in each image."""
        args, made = loaded.info.get("task_args") or {}, []
        for pixels, image in inputs:  # one by one: a hundred masks at the full size of a photograph are large
            found = {name: value.cpu().numpy() for name, value in loaded.model([pixels.to(device)])[0].items()}
            made.append(replace(Detections.of(found, loaded.class_names, args), image=image))
        return made


def get_inference(task: str) -> type[Inference]:
    """The class of a task's inference."""
    check_task(task)
    return {"segment": SegmentInference, "detect": DetectInference}.get(task, ImageInference)


def logits_of_pixels(
    network: Callable[[Tensor], Tensor], images: Tensor, size: Any, classes: int, task_args: dict[str, Any]
) -> Tensor:
    """Logits (B, classes, H, W) at ``size``, with windows and mirroring as the settings say."""
    window, flip = task_args.get("window"), task_args.get("flip", False)
    logits = sliding_window_inference(network, images, classes, window=window, flip=flip)
    if logits.shape[-2:] != tuple(size):
        logits = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
    return logits
