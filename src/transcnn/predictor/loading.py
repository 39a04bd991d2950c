"""One call from whatever names a trained network to its predictions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import UserError
from .onnx import OnnxPredictor

if TYPE_CHECKING:
    from .network import NetworkPredictor

__all__ = ["FEW", "load"]

FEW = 16  # images; for fewer, optimizing and loading kernels takes longer than it saves


def load(
    source: str | os.PathLike[str],
    model: str | None = None,
    *,
    accelerator: str = "cpu",
    precision: str = "32",
    optimize: bool = False,
) -> NetworkPredictor | OnnxPredictor:
    """A trained network, ready to predict: ``transcnn.load("runs/RUN").predict("photo.jpg")``.

    Args:
        source: A run's directory, a .safetensors or .ckpt of this package, the name of a model with weights, a folder
            that ``save_pretrained`` wrote, ``hf-hub:USER/NAME``, or an .onnx file of ``transcnn export``, for which
            torch needn't be there.
        model: The classifier that a file of weights is for which doesn't say so, such as the authors' .pth files.
        accelerator: Where the network computes: ``cpu``, ``gpu``, or ``auto`` for the GPU where there is one.
        precision: Arithmetic: ``32``, ``bf16``, ``16`` (on a GPU), or ``auto`` for bf16 where the CPU has it.
        optimize: Run the network as :func:`transcnn.optimize` makes it: the same predictions up to rounding, several
            times as fast, after some seconds; ``model`` is then for inference alone. A network that can't be stays.

    Returns:
        A :class:`Predictor`. Of weights it is also a :class:`Loaded`, whose ``model`` is a PyTorch module.

    Raises:
        UserError: There is no such thing, it is damaged, or its weights don't fit.
    """
    if os.fspath(source).lower().endswith(".onnx"):
        if model is not None:
            raise UserError(f"model is for a file of weights that doesn't name its network; got {os.fspath(source)}")
        if precision not in ("32", "auto"):
            raise UserError(f"precision is for networks of PyTorch; {os.fspath(source)} computes as it was exported")
        return OnnxPredictor(source, accelerator)
    from ..checkpoints.loading import load as load_weights
    from ..distributed.runtime import check_accelerator, quiet_libraries
    from .network import NetworkPredictor

    check_accelerator(accelerator)
    with quiet_libraries():
        return NetworkPredictor.of(load_weights(source, model), accelerator, precision, optimize)
