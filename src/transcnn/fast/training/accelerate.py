"""Replaces layers of a network by those that train faster, and back."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ...attention import HMHSA, HMHSA1d, HMHSA3d, LocalStep
from ...blocks import InvertedResidual, Stem
from ...errors import UserError
from ..inference.entry import InferenceOnly
from .attention import KernelHMHSA, KernelHMHSA1d, KernelHMHSA3d
from .depthwise import KernelDepthwise, KernelDepthwise1d, KernelDepthwise3d, gains_depthwise
from .layers import (
    KernelPointwise,
    KernelPointwise3d,
    KernelStridedPointwise,
    is_pointwise,
    is_pointwise3d,
    is_strided_pointwise,
)
from .local import KernelLocalStep
from .norms import KernelBatchNorm2d, KernelGroupNorm
from .residual import KernelInvertedResidual
from .stem import KernelStem

__all__ = ["accelerate_training", "plain", "restore_classes"]

# Each pair has the same parameters, buffers and attributes: a module changes its class, and nothing else.
FASTER: dict[type[nn.Module], type[nn.Module]] = {
    LocalStep: KernelLocalStep,
    HMHSA: KernelHMHSA,
    HMHSA1d: KernelHMHSA1d,
    HMHSA3d: KernelHMHSA3d,
    InvertedResidual: KernelInvertedResidual,
    Stem: KernelStem,
    nn.BatchNorm2d: KernelBatchNorm2d,
    nn.GroupNorm: KernelGroupNorm,
}
# Of a convolution it depends on its shape.
FASTER_CONVS: list[tuple[type[nn.Module], type[nn.Module], Callable[[nn.Module], bool]]] = [
    (nn.Conv2d, KernelPointwise, is_pointwise),
    (nn.Conv2d, KernelStridedPointwise, is_strided_pointwise),
    (nn.Conv3d, KernelPointwise3d, is_pointwise3d),
    (nn.Conv1d, KernelDepthwise1d, gains_depthwise),
    (nn.Conv2d, KernelDepthwise, gains_depthwise),
    (nn.Conv3d, KernelDepthwise3d, gains_depthwise),
]
PLAIN = {faster: slower for slower, faster in [*FASTER.items(), *(pair[:2] for pair in FASTER_CONVS)]}


def accelerate_training(model: nn.Module) -> nn.Module:
    """Let ``model`` train with kernels of this package where those are faster, in place; returns the model.

    On a CPU those are local and global attention, BatchNorm of images, GroupNorm, the gradients of depthwise
    convolutions of 5 to 9, 5x5 to 9x9 and 3x3x3 to 9x9x9, of 1x1 convolutions' weights and of 1x1x1
    convolutions (of any network) and, fused, BatchNorm, SiLU and depthwise convolution of every inverted residual of
    images; on a GPU the attention inside grids and, for large maps, the same fused layers, BatchNorm, 1x1 convolutions
    with a bias and the merging of tokens. Images must be channels-last
    (``model.to(memory_format=torch.channels_last)``, and the images as well), and volumes are best so
    (``torch.channels_last_3d``). Parameters, state dict and hooks stay the same, outputs and gradients up to rounding.

    A strided 1x1 convolution of fewer than 16 channels (in RepVGG, MobileOne and FastViT) becomes
    :class:`.layers.KernelStridedPointwise`, for PyTorch's gradient may overwrite other memory on a CPU.

    Modules of exactly PyTorch's and our classes change their class; :func:`plain` changes it back. Call that before
    torch.fx traces the network, and before gradients of gradients (``create_graph=True``) or several at once
    (``is_grads_batched=True``) are computed, all of which raise an error.
    PyTorch's own attention has no second derivatives on a CPU but by ``SDPBackend.MATH``.
    """
    for module in model.modules():
        convs = (faster for conv, faster, gains in FASTER_CONVS if type(module) is conv and gains(module))
        faster = next(convs, FASTER.get(type(module)))
        if faster is not None:
            module.__class__ = faster
    return model


def plain(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate_training`, in place; returns the model. On any other model it changes nothing.

    :func:`transcnn.optimize` can't be undone, for norms are folded into weights; it makes a copy, so the model that it
    was made from is what you want.

    Raises:
        UserError: The model is an optimized one, or a part of it is of a subclass of an accelerated layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, InferenceOnly):
            raise UserError("an optimized model can't be made plain again; use the model that it was made from")
        if isinstance(module, tuple(PLAIN)) and type(module) not in PLAIN:
            raise UserError(f"{name or 'the model'} is a {type(module).__name__}, a subclass of an accelerated layer")
    restore_classes(model)
    return model


def restore_classes(model: nn.Module) -> None:
    """Change the class of each accelerated module back."""
    for module in model.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
