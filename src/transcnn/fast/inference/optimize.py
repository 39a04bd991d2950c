"""A copy of a network that computes the same, faster."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from ...backbone import TransCNN
from ...errors import UserError, first_line
from ..cuda_graphs import CapturedInference
from ..training.accelerate import restore_classes
from .attention import FastHMHSA
from .blocks import FastBlock, FastDualDownsample, FastStages, FastStem
from .convolutions import make_fast
from .entry import InferenceOnly, inference_only
from .folding import fold_batchnorms, fold_layer_scales
from .fusion import fuse_blocks
from .layers import NHWC, channels_last_memory
from .merging import merge_branches
from .patterns import is_block, is_conv_downsample, is_dual_downsample, is_hmhsa, is_stem, unhooked

__all__ = ["optimize", "try_optimize"]

_log = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {
    "32": torch.float32,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "16": torch.float16,
    "fp16": torch.float16,
}


@torch.inference_mode(False)  # weights made in that mode don't count their versions, so nothing packs them
def optimize(
    model: nn.Module,
    dtype: torch.dtype | str | None = None,
    compile: bool = False,
    example: Any = None,
    graphs: bool = False,
) -> nn.Module:
    """A copy of ``model`` that computes the same, faster, for inference alone; ``model`` itself stays as it is.

    For TransCNN and HAT-Net, any network that contains :class:`transcnn.HMHSA` (plugged CNNs, networks for dense
    prediction), and, with a smaller gain, any other CNN. BatchNorms are folded into the convolutions before and after
    them and GridNorm into V; maps are channels-last throughout, so that 1x1 convolutions are matrix products and
    cutting into grids is one copy; bias, activation and residual are fused into the product where oneDNN can. On a
    CPU with g++ installed, attention and inverted residuals run by C++ kernels, compiled at the first call (once for
    each kind of CPU: :mod:`transcnn.fast.cpu.build`). On a GPU the attention inside grids, and bias, activation and
    residual, run by Triton kernels where autotuning finds those faster. Outputs equal the model's up to rounding, at
    every input size. Autocast is off inside: the network computes in ``dtype``.

    Args:
        model: A network; the copy is in evaluation mode.
        dtype: What to compute in: ``torch.float32``, ``torch.bfloat16``, ``torch.float16`` or "fp32", "bf16", "fp16";
            None keeps the model's. Inputs are cast to it, outputs back to what the input was.
        compile: Also run it through ``torch.compile`` with frozen weights: a minute at the first call of each size. It
            compiles PyTorch's operations instead of the kernels above, so on a CPU it is for other CNNs.
        example: An input (or a tuple of inputs) to warm up with; later ones may have other sizes.
        graphs: On a GPU, capture the launches as a CUDA graph when a size is seen for the second time and replay them
            from then on: several times as fast where batches are small, for the memory of a pass for each size. The
            network is then ``.module`` of what is returned.

    Returns:
        The copy, which is inference-only: it can't be trained, no gradient flows through it, and its state dict isn't
        the model's. Weights, modules and hooks of it may change; other attributes (a stride, a slope) are read once.

    Raises:
        UserError: ``dtype`` is none of those above.
    """
    kind = _NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and kind not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(_NAMES)} or None, got {dtype!r}")
    fast = copy.deepcopy(model)
    fast.eval()  # which many a train() of its own makes return nothing
    restore_classes(fast)
    merge_branches(fast)
    for parameter in fast.parameters():
        parameter.requires_grad_(False)
    fast = _replace(fast)
    fold_batchnorms(fast)
    if torch.float16 not in (kind, *(p.dtype for p in fast.parameters())):  # a scale of 1e-6 is below its numbers
        fold_layer_scales(fast)
    fast.eval()  # new modules, too
    make_fast(fast)
    _to_channels_last(fast)
    parts = _computing(fast)
    fuse_blocks(fast, left=parts)
    for part in parts:
        if kind is not None:
            _cast(part, kind)
        inference_only(part)
    inference_only(fast, cast=parts == [fast])
    if compile:
        fast.compile(options={"freezing": True})
    fast = CapturedInference(fast) if graphs else fast
    if example is not None:
        with torch.no_grad():
            for _ in range(3 if graphs else 1):
                fast(*example) if isinstance(example, tuple) else fast(example)
    return fast


def try_optimize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module | None:
    """:func:`optimize`, or None where that fails, which a warning in the log says: the plain network is far slower."""
    try:
        return optimize(model, dtype)
    except Exception as error:  # of any network that timm knows
        _log.warning("%s runs as it is, for it can't be optimized: %s", type(model).__name__, first_line(error))
        return None


def _replace(module: nn.Module) -> nn.Module:
    """``module`` with every module that has a faster form replaced by it (:mod:`.patterns`)."""
    if isinstance(module, InferenceOnly):
        return module
    fast = _faster(module) if unhooked(module) else None
    if fast is not None:
        return fast
    for name, child in module.named_children():
        if type(module) is TransCNN and name == "stem" and is_stem(child) and unhooked(child):
            setattr(module, name, FastStem(child))
        else:
            setattr(module, name, _replace(child))
    if type(module) is TransCNN:
        FastStages.made_of(module.stages)
    return module


def _faster(module: Any) -> nn.Module | None:
    if is_block(module):
        return FastBlock(module.attn, (module.irb.conv1, module.irb.conv2, module.irb.conv3))
    if is_hmhsa(module):
        return FastHMHSA(module)
    if is_dual_downsample(module):
        residual = (module.residual, module.norm2)
        return FastDualDownsample((module.conv, module.norm1), module.pool, residual, module.act)
    if is_conv_downsample(module):
        return NHWC((module.conv, module.norm))
    return None


def _to_channels_last(module: nn.Module) -> None:
    """Put weights into that memory format, but for those of peft's layers, which take them for matrices in memory."""
    if hasattr(module, "base_layer"):
        return
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        tensor.data = channels_last_memory(tensor.data)
    for child in module.children():
        _to_channels_last(child)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights and buffers, but not those of BatchNorms, whose statistics need more precision."""
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)


def _computing(model: nn.Module) -> list[nn.Module]:
    """The modules that compute in the dtype asked for.

    Of torchvision's detectors that is the backbone alone, for boxes need more precision than bf16 has.
    """
    detectors = [m for m in model.modules() if isinstance(getattr(m, "backbone", None), nn.Module)]
    return [m.backbone for m in detectors if hasattr(m, "transform")] or [model]  # pyright: ignore
