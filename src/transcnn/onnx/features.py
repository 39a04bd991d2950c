"""Features inside an exported classifier: a tensor of its graph as a second output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError, first_line, require

__all__ = ["add_output", "has_channels_last", "pooled"]

PASSED = ("Add", "Identity", "Cast", "Reshape", "Squeeze", "Flatten", "QuantizeLinear", "DequantizeLinear")
LAST_LAYERS = ("Gemm", "MatMul", "Conv")
MOST_STEPS = 32


def add_output(path: str | os.PathLike[str], tensor: str | None) -> tuple[bytes, str]:
    """A file's graph with a tensor as a further output, and the tensor's name.

    Args:
        path: An exported file.
        tensor: Its name; without it, what the layer is given that makes the logits.

    Raises:
        UserError: There is none, or the file can't be read.
    """
    onnx = require("onnx", "export")
    try:
        model = onnx.load(os.fspath(path))
        made = {output: node for node in model.graph.node for output in node.output}
        name = tensor if tensor is not None else _before_the_head(model.graph, made)
        if name is None or name not in made:
            wanted = "layer before its logits that is known here" if tensor is None else f"tensor {tensor!r}"
            raise UserError(f"{os.fspath(path)} has no {wanted}; give the name of one of its tensors as layer")
        if name not in {output.name for output in model.graph.output}:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        return model.SerializeToString(), name
    except UserError:
        raise
    except Exception as error:  # protobuf's and the library's own, of damaged files
        raise UserError(f"can't read {os.fspath(path)}: {first_line(error)}") from error


def _before_the_head(graph: Any, made: dict[str, Any]) -> str | None:
    """The input of the layer that makes the logits."""
    name = "logits"
    for _ in range(MOST_STEPS):
        node = made.get(name)
        if node is None:
            return None
        computed = [given for given in node.input if given in made]
        if node.op_type in LAST_LAYERS:
            return computed[0] if computed else None
        if node.op_type not in PASSED or not computed:
            return None
        name = computed[0]
    return None


def has_channels_last(shape: Sequence[int], images: Sequence[int]) -> bool:
    """Whether a map of four dimensions is (B, H, W, C), as Swin's and ConvNeXt's inner layers give it.

    Maps of square images (B, C, H, W) tell: height and width are equal, and channels are another number.
    """
    _, first, second, third = shape
    return images[-1] == images[-2] and first == second != third


def pooled(features: Any, images: Sequence[int], name: str) -> np.ndarray:
    """(B, C, H, W), (B, H, W, C), tokens (B, N, C) or (B, C) of images of this shape -> (B, C) of float32.

    Raises:
        UserError: It is something else.
    """
    values = np.asarray(features)
    if values.dtype.kind != "f" or values.ndim not in (2, 3, 4) or len(values) != images[0]:
        raise UserError(f"{name} gives {values.shape} of {values.dtype}, not features of {images[0]} images")
    last = values.ndim == 4 and has_channels_last(values.shape, images)
    axes = {2: (), 3: (1,), 4: (1, 2) if last else (2, 3)}[values.ndim]
    return values.astype(np.float32).mean(axes) if axes else values.astype(np.float32)
