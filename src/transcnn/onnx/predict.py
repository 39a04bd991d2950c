"""What images show, by an exported network and ONNX Runtime alone: no torch, no timm.

An ONNX file that ``transcnn export`` wrote holds all that it takes beside its weights: the class names, and how an
image becomes its input. That way is gone here with Pillow and numpy, and ends at timm's numbers.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.header import check_header, read_values
from ..data.images import MAX_ASPECT_RATIO, aspect_limit, crop_extreme_aspect, to_channels
from ..data.names import distinct_names
from ..errors import MAX_SIDE, UserError, first_line, require

__all__ = ["OnnxModel", "open_session", "to_input"]

INTERPOLATIONS = {
    name: getattr(Image.Resampling, name.upper()) for name in ("nearest", "bilinear", "bicubic", "lanczos")
}


def open_session(model: str | bytes, title: str, accelerator: str, threads: int = 0) -> Any:
    """ONNX Runtime's session of a file's path or of its content, which messages call ``title``."""
    ort = require("onnxruntime", "export")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # A thread that waits for work by spinning takes its core from those that read images: half of all CPU time, else.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; failures are raised anyway
    try:
        found = _providers(ort, accelerator)
        # Its second try is told on standard output, and without a GPU it is the first one again.
        session = ort.InferenceSession(model, options, providers=found, enable_fallback=int(len(found) > 1))
        for side in (*session.get_inputs(), *session.get_outputs()):
            _ = side.name, side.shape  # an error where a name is no UTF-8
        return session
    except UserError:
        raise
    except Exception as error:  # ONNX Runtime has a class of its own for each cause
        raise UserError(f"can't read {title}: {first_line(error)}") from error


class OnnxModel:
    """A network in an ONNX file: ``model(images)`` gives its outputs, images as :func:`to_input` makes them.

    Args:
        path: A file that ``transcnn export`` wrote.
        accelerator: ``cpu``, ``gpu``, or ``auto`` for the GPU where ONNX Runtime can use one.
        threads: Threads that compute; 0 lets ONNX Runtime choose.

    Attributes:
        info: All that the file says of itself; ``task``, ``class_names`` and ``data_config`` (timm's words) among it.
        fixed: The one (H, W) that it takes, where it was exported for one.

    Raises:
        UserError: No such file, no ONNX file, or one that ``transcnn export`` didn't write.
    """

    def __init__(self, path: str | os.PathLike[str], *, accelerator: str = "auto", threads: int = 0) -> None:
        if not Path(path).is_file():
            raise UserError(f"no such file: {path}")
        self.session = open_session(os.fspath(path), str(path), accelerator, threads)
        try:
            stored = self.session.get_modelmeta().custom_metadata_map
            self.info: dict[str, Any] = read_values(stored)
            self.class_names: list[str] = self.info["class_names"]  # equal ones get their index below
            self.data_config: dict[str, Any] = self.info["data_config"]
        except (ValueError, KeyError, RecursionError) as error:
            raise UserError(f"{path} was not written by transcnn export: class names and sizes are missing") from error
        check_header(self.info, path)
        self.class_names = distinct_names(self.class_names)
        self.task = str(self.info.get("task", "classify"))
        inputs, outputs = self.session.get_inputs(), [output.name for output in self.session.get_outputs()]
        wanted = ["boxes", "scores", "labels", "image"] if self.task == "detect" else ["logits"]
        shape = inputs[0].shape if inputs else []
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(shape) != 4 or not {*wanted} <= {*outputs}:
            raise UserError(
                f"{path} is no network to {self.task}: images (B, C, H, W) of float32 to {', '.join(wanted)}"
            )
        if isinstance(shape[1], int) and shape[1] != self.data_config["input_size"][0]:
            raise UserError(f"{path} takes {shape[1]} channels, but says {self.data_config['input_size'][0]}")
        if self.data_config["interpolation"] not in INTERPOLATIONS:
            raise UserError(
                f"{path} wants images resized by {self.data_config['interpolation']}, which isn't done here"
            )
        self._path = path
        self._input = inputs[0]
        fixed = [side for side in shape[2:] if isinstance(side, int)]
        if fixed and not (len(fixed) == 2 and all(1 <= side <= MAX_SIDE for side in fixed)):
            raise UserError(f"{path} takes images of {shape[2]}x{shape[3]}, which can't be meant")
        self.fixed: list[int] | None = fixed or None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """(B, C, H, W) -> (B, classes), or of a network that segments (B, classes, H, W); float32."""
        return self.outputs(images)["logits"]

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs by name; a detector's are those of :class:`transcnn.export.detect.DetectorGraph`."""
        names = [output.name for output in self.session.get_outputs()]
        try:
            found = dict(zip(names, self.session.run(names, {self._input.name: images}), strict=True))
        except Exception as error:  # ONNX Runtime has a class of its own for each cause
            raise UserError(f"{self._path} can't be run: {first_line(error)}") from error
        problem = self._problem(found, images.shape)
        if problem:
            raise UserError(f"{self._path} is damaged: {problem}")
        return found

    def _problem(self, found: dict[str, Any], shape: tuple[int, ...]) -> str:
        """What is wrong with the outputs of a file that isn't what it says; "" for nothing."""
        classes = len(self.class_names)
        if self.task != "detect":
            wanted = (shape[0], classes, *shape[2:]) if self.task == "segment" else (shape[0], classes)
            logits = np.asarray(found["logits"])
            return "" if logits.shape == wanted else f"logits of shape {logits.shape} instead of {wanted}"
        boxes, scores, labels = (np.asarray(found[name]) for name in ("boxes", "scores", "labels"))
        count = len(boxes) if boxes.ndim else -1
        masks = np.asarray(found.get("masks", np.zeros((max(count, 0), 1, 1))))
        if boxes.shape != (count, 4) or scores.shape != (count,) or labels.shape != (count,) or len(masks) != count:
            return f"boxes {boxes.shape}, scores {scores.shape} and labels {labels.shape}"
        if masks.ndim != 3 or boxes.dtype != np.float32 or scores.dtype != np.float32 or labels.dtype.kind not in "iu":
            return "boxes, scores, labels or masks of another type"
        if count and not (labels.min() >= 0 and labels.max() < classes and np.isfinite(boxes).all()):
            return "a label or a box that can't be"
        return ""

    def resize_to(self, img_size: int) -> None:
        """Let images be made ``img_size`` pixels large.

        Raises:
            UserError: The file was exported for one size.
        """
        if self.fixed and self.fixed != [img_size, img_size]:
            height, width = self.fixed
            raise UserError(f"the file was exported for images of {height}x{width} alone, got img_size={img_size}")
        self.data_config["input_size"] = [self.data_config["input_size"][0], img_size, img_size]


def to_input(image: Image.Image, data_config: dict[str, Any]) -> np.ndarray:
    """Make a network's input of an image: resize, crop, normalise, PIL -> float32 (C, H, W).

    Args:
        image: As :func:`transcnn.data.images.read_image` gives it.
        data_config: timm's words: ``input_size`` (C, H, W), ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``crop_mode``.
    """
    channels, height, width = data_config["input_size"]
    mean, std = (np.array(data_config[key], np.float32) for key in ("mean", "std"))
    image, mode = to_channels(image, channels), data_config.get("crop_mode") or "center"
    if mode == "center":
        image = crop_extreme_aspect(image, aspect_limit((height, width), data_config["crop_pct"]))
    elif mode == "border":
        image = crop_extreme_aspect(image, max(MAX_ASPECT_RATIO, height, width))
    resample = INTERPOLATIONS[data_config["interpolation"]]
    image = image.resize(_scaled(image.size, (width, height), data_config["crop_pct"], mode), resample)
    values = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)  # uint8 (C, h, w)
    fill = [round(255 * value) if mode == "border" else 0 for value in data_config["mean"]]
    pixels = _crop_or_pad(values, (height, width), fill).astype(np.float32, order="C")
    pixels -= 255 * mean[:, None, None]
    pixels /= 255 * std[:, None, None]
    return pixels


def _crop_or_pad(pixels: np.ndarray, size: tuple[int, int], fill: list[int]) -> np.ndarray:
    """The centre of (C, h, w) at (height, width); where it is too small each channel has its value of ``fill``."""
    for axis, want in ((1, size[0]), (2, size[1])):
        have = pixels.shape[axis]
        if have < want:
            widths = [(0, 0), (0, 0), (0, 0)]
            widths[axis] = ((want - have) // 2, (want - have + 1) // 2)
            padded = [np.pad(channel, widths[1:], constant_values=v) for channel, v in zip(pixels, fill, strict=True)]
            pixels = np.stack(padded)
        else:
            first = round((have - want) / 2)
            pixels = pixels[:, first : first + want] if axis == 1 else pixels[:, :, first : first + want]
    return pixels


def _scaled(size: tuple[int, int], wanted: tuple[int, int], crop_pct: float, mode: str) -> tuple[int, int]:
    """The (width, height) to resize to, as in timm: the target over ``crop_pct`` is just covered (``center``), covers
    the image (``border``), or is what both sides become (``squash``)."""
    goal = [math.floor(side / crop_pct) for side in wanted]
    if mode == "squash":
        return goal[0], goal[1]
    if mode == "border":
        ratio = max(have / side for have, side in zip(size, goal, strict=True))
        return round(size[0] / ratio), round(size[1] / ratio)
    if goal[0] == goal[1]:  # torchvision rounds the longer side down
        short, long = sorted(size)
        longer = int(goal[0] * long / short)
        return (goal[0], longer) if size[0] <= size[1] else (longer, goal[0])
    ratio = min(have / side for have, side in zip(size, goal, strict=True))
    return round(size[0] / ratio), round(size[1] / ratio)


def _providers(ort: Any, accelerator: str) -> list[str]:
    there = ort.get_available_providers()
    if accelerator == "gpu" and "CUDAExecutionProvider" not in there:
        raise UserError("this ONNX Runtime has no GPU support; it comes with: pip install onnxruntime-gpu")
    wanted = ("CPUExecutionProvider",) if accelerator == "cpu" else ("CUDAExecutionProvider", "CPUExecutionProvider")
    return [name for name in wanted if name in there]
