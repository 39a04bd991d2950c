"""The same function, faster: :func:`optimize` makes a copy of a trained network for inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .attention import HMHSA, LocalStep
from .backbone import TransCNN
from .blocks import Block, ConvDownsample, DualDownsample, InvertedResidual, StridedConv2d
from .depthwise import DepthwiseConv2d
from .errors import UserError
from .kernels.blocks import FastBlock, FastDualDownsample, FastHMHSA, FastStem
from .kernels.entry import Frozen, infers_only
from .kernels.gpu.graphs import RecordedInference, RecordedTraining
from .kernels.grid import KernelLocalStep
from .kernels.layers import KernelBatchNorm2d, KernelPointwise, is_pointwise
from .kernels.middle import KernelInvertedResidual
from .kernels.parts import hooked
from .kernels.steps import KernelHMHSA
from .kernels.tokens import OnTokens, affine

__all__ = ["accelerate_training", "fold_batchnorms", "optimize", "record_training"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {
    "32": torch.float32,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "16": torch.float16,
    "fp16": torch.float16,
}


def optimize(
    model: nn.Module,
    dtype: torch.dtype | str | None = None,
    compile: bool = False,
    example: Any = None,
    graphs: bool = False,
) -> nn.Module:
    """A copy of ``model`` that computes the same, faster, for inference alone; ``model`` itself stays as it is.

    Works on TransCNN and HAT-Net, on any network that holds :class:`transcnn.HMHSA` (plugged CNNs, networks for dense
    prediction), and, less spectacularly, on any other CNN. What it does: BatchNorms are folded into the convolutions
    before and after them and GridNorm into V; maps are channels-last throughout, so that 1x1 convolutions are matrix
    products and cutting into grids is one copy; bias, activation and residual are part of the product where oneDNN
    can do so. On a processor with g++ at hand, attention and inverted residuals run by kernels of our own, which are
    compiled at the first call (once for a kind of processor: :mod:`transcnn.kernels.native.build`). Outputs equal the
    model's up to rounding, at every input size. On a GPU the attention inside grids, and what follows products and
    convolutions, run by kernels in Triton where those win a race at the first call.

    Args:
        model: A network; its evaluation mode is what is copied.
        dtype: What to compute in: ``torch.float32``, ``torch.bfloat16``, ``torch.float16`` or "fp32", "bf16", "fp16";
            None keeps the model's. Inputs are cast to it, outputs back to what the input was.
        compile: Also run it through ``torch.compile`` with frozen weights: a minute at the first call of each size. It
            compiles PyTorch's operations in place of our kernels, so on a processor it is for other CNNs.
        example: An input (or a tuple of inputs) to warm up with; any further one may have another size.
        graphs: On a GPU, record the launches as a CUDA graph when a size is seen for the second time and play them back
            from then on: several times as fast where batches are small, for the memory of a pass for each size. The
            network is then in ``.module`` of what is returned.

    Returns:
        The copy, in evaluation mode. It can't be trained; its state dict isn't the model's.

    Raises:
        UserError: ``dtype`` is none of those above.
    """
    kind = _NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and kind not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(_NAMES)} or None, got {dtype!r}")
    fast = copy.deepcopy(model).eval()
    for parameter in fast.parameters():
        parameter.requires_grad_(False)
    fast = _replace(fast)
    fold_batchnorms(fast)
    fast = fast.to(memory_format=torch.channels_last)  # pyright: ignore
    parts = _computing(fast)
    for part in parts:
        if kind is not None:
            _cast(part, kind)
        infers_only(part)
    infers_only(fast, cast=parts == [fast])
    if compile:
        fast.compile(options={"freezing": True})
    fast = RecordedInference(fast) if graphs else fast
    if example is not None:
        with torch.no_grad():
            for _ in range(3 if graphs else 1):
                fast(*example) if isinstance(example, tuple) else fast(example)
    return fast


def record_training(model: nn.Module) -> RecordedTraining:
    """A function that calls ``model`` with its forward and backward passes played back as CUDA graphs, for one GPU.

        model = transcnn.fast.accelerate_training(model.cuda().to(memory_format=torch.channels_last))
        forward = transcnn.fast.record_training(model)
        loss = criterion(forward(images), labels)  # and loss.backward(), optimizer.step() as ever

    A step is some thousand launches, for which a GPU waits while batches are small; played back they take none of the
    processor's time. Each shape is recorded when it is seen for the third time. What can't be recorded, evaluation and
    anything on a processor runs as ``model(images)`` would: :class:`transcnn.kernels.gpu.graphs.RecordedTraining`.
    """
    return RecordedTraining(model)


def accelerate_training(model: nn.Module) -> nn.Module:
    """Let ``model`` train with kernels of our own where those are faster, in place; returns the model.

    On a processor those are both kinds of attention and the middle of every inverted residual; on a GPU the attention
    inside grids and, for large maps, that middle, BatchNorm, 1x1 convolutions with a bias and the merging of tokens.
    Maps must be channels-last (``model.to(memory_format=torch.channels_last)``, and the images as well). Parameters,
    state dict and, up to rounding, answers and gradients stay the same.
    """
    for module in model.modules():
        if type(module) is LocalStep:
            module.__class__ = KernelLocalStep
        elif type(module) is HMHSA:
            module.__class__ = KernelHMHSA
        elif type(module) is InvertedResidual:
            module.__class__ = KernelInvertedResidual
        elif type(module) is nn.BatchNorm2d:
            module.__class__ = KernelBatchNorm2d
        elif is_pointwise(module):
            module.__class__ = KernelPointwise
    return model


def fold_batchnorms(model: nn.Module) -> list[str]:
    """Fold every BatchNorm of ``model`` (in evaluation mode, in place) that follows a convolution read by it alone.

    Which those are is told by a symbolic trace; where a network can't be traced, its parts are. Modules with hooks
    are left alone. The names of the folded norms are returned; identities take their places.
    """
    modules = dict(model.named_modules())
    folded = []
    for conv_name, norm_name in _pairs(model):
        conv, norm = modules[conv_name], modules[norm_name]
        parent, _, child = norm_name.rpartition(".")
        conv_parent, _, conv_child = conv_name.rpartition(".")
        setattr(modules[conv_parent], conv_child, fuse_conv_bn_eval(conv, norm))  # pyright: ignore
        setattr(modules[parent], child, _after_norm(norm))
        folded.append(norm_name)
    return folded


def _replace(module: nn.Module) -> nn.Module:
    """``module`` with every part that has a faster form replaced by it; a part with hooks below stays as it is."""
    if not any(map(hooked, module.modules())):
        if isinstance(module, Block):
            parts = (module.irb.conv1, module.irb.conv2, module.irb.conv3)
            return FastBlock(module.attn, parts)
        if isinstance(module, HMHSA) and type(module).forward is HMHSA.forward:
            return FastHMHSA(module)
        if isinstance(module, DualDownsample):
            return FastDualDownsample(
                (module.conv, module.norm1), module.pool, (module.residual, module.norm2), module.act
            )
        if isinstance(module, ConvDownsample):
            return OnTokens((module.conv, module.norm))
    for name, child in module.named_children():
        if isinstance(module, TransCNN) and name == "stem":
            setattr(module, name, FastStem([child]))
        else:
            setattr(module, name, _replace(child))
    return module


class _Tracer(torch.fx.Tracer):
    """Sees into everything but PyTorch's layers, norms of any library, and what was replaced already."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = Frozen | StridedConv2d | DepthwiseConv2d | KernelPointwise | nn.modules.batchnorm._BatchNorm
        return isinstance(m, own) or super().is_leaf_module(m, module_qualified_name)


def _pairs(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of each convolution and the BatchNorm that alone reads it."""
    if isinstance(model, Frozen) or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return
    try:
        graph = _Tracer().trace(model)
    except Exception:  # tracing runs the network's own code, which may fail on a proxy in any way
        for name, child in model.named_children():
            yield from _pairs(child, f"{prefix}{name}.")
        return
    modules = dict(model.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, torch.fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        conv, norm = modules[str(source.target)], modules[str(node.target)]
        once = calls.count(source.target) == 1 and calls.count(node.target) == 1
        if (
            once
            and type(conv) in (nn.Conv2d, StridedConv2d, DepthwiseConv2d, KernelPointwise)
            and _foldable(norm)
            and not hooked(conv)
            and not hooked(norm)
        ):
            yield prefix + str(source.target), prefix + str(node.target)


def _foldable(norm: nn.Module) -> bool:
    """Whether this is a BatchNorm with fixed statistics, PyTorch's or timm's with an activation of its own."""
    from timm.layers import BatchNormAct2d

    return affine(norm) is not None or (type(norm) is BatchNormAct2d and norm.running_mean is not None)


def _after_norm(norm: nn.Module) -> nn.Module:
    """What is left of a BatchNorm that was folded: its activation if it has one."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep weights in ``dtype``, but for BatchNorms, whose statistics need more digits."""
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)


def _computing(model: nn.Module) -> list[nn.Module]:
    """The parts that compute in the dtype asked for.

    torchvision's detectors keep everything but their backbone, for boxes need more digits than bf16 has.
    """
    detectors = [m for m in model.modules() if isinstance(getattr(m, "backbone", None), nn.Module)]
    return [m.backbone for m in detectors if hasattr(m, "transform")] or [model]  # pyright: ignore
