"""Pooled features of a network's layers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.arguments import DENSE
from ..errors import UserError, require
from ..onnx.features import has_channels_last
from ..plugging.running import eval_mode

__all__ = ["MAP_IMAGES", "features_of", "map_of"]

MAP_IMAGES, MAP_SECONDS = 500, 5.0  # a map shows so many images at most, and takes about so long
BATCH = 32

Features = Callable[[list[Any], torch.device], Tensor]


def features_of(model: nn.Module, task: str, layer: str | None) -> Features:
    """From a list of a task's inputs and the model's device to their features (B, C).

    Args:
        model: In evaluation mode.
        task: What it is for.
        layer: Whose output is pooled, a module's dotted name; without it what the classifier's last layer is given, or
            the backbone's last map.

    Raises:
        UserError: No such layer.
    """
    if layer is not None:
        modules = dict(model.named_modules())
        if not layer or layer not in modules:
            near = difflib.get_close_matches(layer, modules, n=3)
            raise UserError(f"the network has no layer {layer!r}{f'; near: {chr(44).join(near)}' if near else ''}")
        return partial(_watched, model, task, modules[layer], layer)
    if task in DENSE:
        return partial(_watched, model, task, model.body, "the backbone")  # pyright: ignore
    if not (hasattr(model, "forward_head") and hasattr(model, "forward_features")):
        raise UserError(f"{type(model).__name__} doesn't say which are its features: give a layer")
    return partial(_before_the_head, model)


def map_of(model: nn.Module, images: Any, per_second: float, by: str = "pca") -> tuple[np.ndarray, list[int]] | None:
    """Labelled images on a plane by their features.

    Args:
        model: A classifier.
        images: The split, with the transform of evaluation; ``images[i]`` is (C, H, W) and a label, -1 for none.
        per_second: How many images the model was seen to take.
        by: ``pca``, the first two principal components, or ``tsne``, scikit-learn's t-SNE from there on.

    Returns:
        Points (N, 2) and labels of images spread over the split; None where there are fewer than four, or where the
        model doesn't say which are its features.
    """
    count = min(len(images), MAP_IMAGES, int(MAP_SECONDS * per_second))
    if count < 4 or not (hasattr(model, "forward_head") and hasattr(model, "forward_features")):
        return None
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    chosen = np.unique(np.linspace(0, len(images) - 1, count).astype(int)).tolist()
    vectors, labels = [], []
    with eval_mode(model), torch.inference_mode():
        for start in range(0, len(chosen), BATCH):
            pairs = [pair for pair in (images[i] for i in chosen[start : start + BATCH]) if pair[1] >= 0]
            if pairs:
                vectors.append(_before_the_head(model, [image for image, _ in pairs], device).float().cpu())
                labels += [int(label) for _, label in pairs]
    found = torch.cat(vectors).numpy() if vectors else np.zeros((0, 2), np.float32)
    if len(found) < 4 or found.shape[1] < 2 or not np.isfinite(found).all():
        return None
    if by == "tsne":
        tsne: Any = require("sklearn.manifold", "train").TSNE
        perplexity = min(30.0, (len(found) - 1) / 3)
        return tsne(2, init="pca", perplexity=perplexity, random_state=0).fit_transform(found), labels
    pca: Any = require("sklearn.decomposition", "train").PCA
    return pca(2, svd_solver="full").fit_transform(found), labels


def _before_the_head(model: Any, inputs: list[Tensor], device: torch.device) -> Tensor:
    images = torch.stack(inputs).to(device)
    return _pooled(model.forward_head(model.forward_features(images), pre_logits=True), "head", images.shape)


def _watched(
    model: nn.Module, task: str, module: nn.Module, name: str, inputs: list[Any], device: torch.device
) -> Tensor:
    """What a module gives while the model runs."""
    given: list[Any] = []
    # To segment or detect whole images go one by one.
    images = (inputs[0][0][None] if task in DENSE else torch.stack(inputs)).to(device)
    handle = module.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    try:
        model([images[0]] if task == "detect" else images)
    finally:
        handle.remove()
    if not given:
        raise UserError(f"{name} did not run, so it has no output")
    return _pooled(given[-1], name, images.shape, _says_channels_last(model, module))


def _says_channels_last(model: nn.Module, module: nn.Module) -> bool | None:
    """Whether maps of a module of a model are (B, H, W, C), as far as these say it; None where their shape must.

    Of timm's networks that carry a mark of it (Swin, MambaOut), all but convolutions and their norms give such.
    """
    if isinstance(module, nn.Linear):
        return True
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
        return False
    marked = [part for part in (model, getattr(model, "body", None)) if getattr(part, "output_fmt", "") == "NHWC"]
    return True if any(module is inner for part in marked for inner in part.modules()) else None  # pyright: ignore


def _pooled(output: Any, name: str, images: Sequence[int], channels_last: bool | None = None) -> Tensor:
    """(B, C, H, W), (B, H, W, C), tokens (B, N, C) or (B, C) of images of this shape -> (B, C).

    Of several outputs it is the last.
    """
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = list(output.values())
        if not isinstance(output, list | tuple) or not output:
            raise UserError(f"{name} gives no tensor, but {type(output).__name__}")
        output = output[-1]
    count = images[0]
    if output.ndim not in (2, 3, 4) or len(output) != count:  # such as windows of all images in a row
        raise UserError(f"{name} gives {tuple(output.shape)}, not features of {count} image{'s' * (count != 1)}")
    if output.ndim == 3:
        return output.mean(1)
    if output.ndim == 2:
        return output
    last = has_channels_last(output.shape, images) if channels_last is None else channels_last
    return output.mean((1, 2) if last else (2, 3))
