"""Whether the C++ kernels compute what PyTorch computes, tried on small inputs once in a process."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build, inference, norms, passes, training
from .call import FP32
from .inverted_residual import inverted_residual, pack_inverted_residual, pack_squeeze

__all__ = ["supports"]

Case = tuple[str, Tensor, Tensor]  # a kernel, its result, and PyTorch's
Rand = Callable[..., Tensor]

_log = logging.getLogger(__name__)
_lock = threading.Lock()


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels are there, compute in ``dtype``, and give PyTorch's results.

    Where they don't, the library is compiled again; if that doesn't help, PyTorch's operations are used, and the log
    says so (level WARNING).
    """
    with _lock:
        return _supports(dtype)


def _checked(dtype: torch.dtype) -> str:
    """``_first_wrong`` in a thread of its own: the hooks that gradient checkpointing sets here would call back here."""
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_first_wrong, dtype).result()


@functools.cache
def _supports(dtype: torch.dtype) -> bool:
    bit = {torch.float32: 1, torch.bfloat16: 2}.get(dtype, 0)
    if not build.isa_support() & bit:
        return False
    wrong = _checked(dtype)
    if wrong and build.rebuild() is not None:
        _log.info("the C++ kernel %r was wrong; the library was compiled again", wrong)
        wrong = _checked(dtype) if build.isa_support() & bit else ""
    if wrong:
        _log.warning("the C++ kernel %r is wrong on this CPU, PyTorch's operations are used", wrong)
        return False
    return bool(build.isa_support() & bit)


def _first_wrong(dtype: torch.dtype) -> str:
    """The name of the first kernel that is missing or doesn't agree with PyTorch; empty if all do."""
    bound = 1e-4 if dtype == FP32 else 3e-2
    name = ""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            for name, ours, exact in _cases(dtype):
                difference = (ours.double() - exact.double()).norm() / exact.double().norm()
                if not difference <= bound:  # NaN, too
                    return name
        except (AttributeError, ValueError):  # a function that isn't there
            return f"after {name}" if name else "all"
    return ""


def _cases(dtype: torch.dtype) -> Iterator[Case]:
    """Each kernel's result and PyTorch's, of small inputs that no other random numbers depend on."""
    generator = torch.Generator("cpu").manual_seed(0)

    def rand(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).mul_(0.3).to(to)

    x = rand(1, 5, 6, 64)
    yield from _convolutions(rand, x)
    yield from _passes(rand, x)
    yield from _attention(rand, x)
    yield from _attention_in_training(rand, x)
    yield from _layers_in_training(rand, x)


def _convolutions(rand: Rand, x: Tensor) -> Iterator[Case]:
    zeros = x.new_zeros(64)
    expand, depthwise, project = rand(64, 64), rand(64, 1, 3, 3), rand(64, 64)
    packed = pack_inverted_residual(expand, zeros, depthwise, zeros, project, zeros)
    y = F.silu(F.conv2d(x.double().permute(0, 3, 1, 2), expand.double()[..., None, None]))
    y = F.silu(F.conv2d(y, depthwise.double(), padding=1, groups=64))
    y = F.conv2d(y, project.double()[..., None, None]).permute(0, 2, 3, 1)
    yield "inverted_residual", inverted_residual(x, None, *packed), y

    square = rand(32, 64, 3, 3)
    y = F.conv2d(x.double().permute(0, 3, 1, 2), square.double(), stride=2, padding=1).permute(0, 2, 3, 1)
    yield "convolution", inference.convolution(x, inference.pack_convolution(square, None), 3, 2, (1, 1)), y

    first, second, image = rand(16, 3, 3, 3), rand(32, 16, 3, 3), rand(1, 3, 9, 10)
    y = F.silu(F.conv2d(image.double(), first.double(), stride=2, padding=1))
    y = F.conv2d(y, second.double(), stride=2, padding=1).permute(0, 2, 3, 1)
    affine = inference.pack_stem(first, zeros[:16], second, zeros[:32])
    yield "stem", inference.stem(image, *affine, (2, 2)), y

    pooled = F.max_pool2d(x.double().permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1)
    pointwise, branch = rand(64, 64), rand(1, 3, 3, 64)
    y = F.silu(branch.double() + pooled @ pointwise.double().mT)
    yield "downsample", inference.downsample(x, branch, inference.pack_pointwise(pointwise, zeros)), y


def _passes(rand: Rand, x: Tensor) -> Iterator[Case]:
    few, many = rand(16, 64), rand(64, 16)
    gate = torch.sigmoid(F.silu(x.double().mean((1, 2)) @ few.double().mT) @ many.double().mT)
    packed = pack_squeeze(few, None, many, None)
    yield "squeeze", passes.squeeze(x, packed), x.double() * gate[:, None, None]

    one = torch.ones(64, device="cpu", dtype=FP32)
    y = F.group_norm(x.double().permute(0, 3, 1, 2), 1).permute(0, 2, 3, 1)
    yield "group_norm", passes.group_norm(x, one, one, 1e-5, residual=x), y + 1 + x.double()

    y = F.max_pool2d(x.double().permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
    yield "max_pool", passes.max_pool(x, passes.Window(3, 2, (1, 1))), y

    y = F.avg_pool2d(x.double().permute(0, 3, 1, 2), 4, ceil_mode=True).permute(0, 2, 3, 1)
    yield "average_pool", passes.average_pool(x, (4, 4)), y
    yield "layer_norm", passes.layer_norm(x, one, one, 1e-5), F.layer_norm(x.double(), (64,)) + 1


def _attention(rand: Rand, x: Tensor) -> Iterator[Case]:
    three = rand(1, 30, 192)
    y = _attend(three[..., :64].double(), three[..., 64:].double(), 1.0)
    yield "full_attention", inference.full_attention(three, 32), y

    zeros, qkv = x.new_zeros(192), rand(192, 64)
    tokens = (x.double() @ qkv.double().mT).flatten(1, 2)
    y = x.double() + _attend(tokens[..., :64], tokens[..., 64:], 1.0).view(x.shape)
    packed = inference.pack_pointwise(qkv, zeros)
    yield "local_attention", inference.local_attention(x, x, packed, None, 32, 8), y

    q, kv = rand(64, 64), rand(1, 7, 128)
    y = _attend((x.double() @ q.double().mT).flatten(1, 2), kv.double(), 1.0).view(x.shape)
    packed = inference.pack_pointwise(q, zeros[:64])
    eye = inference.pack_pointwise(torch.eye(64, device="cpu", dtype=x.dtype), zeros[:64])
    yield "global_attention", inference.global_attention(x.clone(), None, packed, kv, eye, [], 32), y + x.double()


def _attention_in_training(rand: Rand, x: Tensor) -> Iterator[Case]:
    three, grad = rand(1, 5, 6, 192), rand(1, 5, 6, 64)
    leaf = three.double().requires_grad_()
    with torch.enable_grad():
        y = _attend(leaf.flatten(1, 2)[..., :64], leaf.flatten(1, 2)[..., 64:], 32**-0.5).view(grad.shape)
        (slope,) = torch.autograd.grad(y, leaf, grad.double())
    yield "grid_forward", training.grid_forward(three, 32, 8, x), y.detach() + x.double()
    yield "grid_backward", training.grid_backward(three, grad, 32, 8), slope

    flat, kv, grad = x.flatten(1, 2), rand(1, 7, 128), grad.flatten(1, 2)
    leaves = [flat.double().requires_grad_(), kv.double().requires_grad_()]
    with torch.enable_grad():
        y = _attend(leaves[0], leaves[1], 32**-0.5)
        slopes = torch.autograd.grad(y, leaves, grad.double())
    yield "global_forward", training.global_forward(flat, kv, 32, flat), y.detach() + flat.double()
    for ours, slope in zip(training.global_backward(flat, kv, grad, 32), slopes, strict=True):
        yield "global_backward", ours, slope


def _layers_in_training(rand: Rand, x: Tensor) -> Iterator[Case]:
    scale, shift, weight = rand(64, to=FP32) + 1, rand(64, to=FP32), rand(64, 1, 3, 3, to=FP32)
    z = F.silu(x.double() * scale.double() + shift.double())
    y = F.conv2d(z.permute(0, 3, 1, 2), weight.double(), padding=1, groups=64).permute(0, 2, 3, 1)
    ours, _ = training.bn_silu_dwconv_forward(x, (scale, shift), weight.flatten(1).t().contiguous())
    yield "bn_silu_dwconv_forward", ours, y
    _, ours = training.bn_silu_dwconv_forward(x, (scale, shift), weight.flatten(1).t().contiguous(), activate=True)
    yield "bn_silu_dwconv_forward", ours, F.silu(y)
    yield "bn_silu", training.bn_silu(x, (scale, shift)), z
    sums = torch.stack([x.double().sum((0, 1, 2)), x.double().square().sum((0, 1, 2))])
    yield "channel_sums", training.channel_sums(x).sum(0), sums

    grad = rand(1, 5, 6, 64)
    yield from _norms(x, grad, scale, shift)
    rows = x.flatten(0, 2), grad.flatten(0, 2)
    slopes = rows[1].double().mT @ rows[0].double(), rows[1].double().sum(0)
    for ours, slope in zip(training.pointwise_gradient(*rows, bias=True), slopes, strict=True):
        if ours is not None:
            yield "pointwise_gradient", ours, slope


def _norms(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> Iterator[Case]:
    leaves = exact, scale, shift = [t.double().requires_grad_() for t in (x.movedim(3, 1), weight, bias)]
    with torch.enable_grad():
        for groups in (1, 0):  # 0 for a BatchNorm
            z = F.group_norm(exact, 1, scale, shift) if groups else F.batch_norm(exact, None, None, scale, shift, True)
            y = F.silu(z).movedim(1, 3)
            slopes = torch.autograd.grad(y, leaves, grad.double())
            if groups:
                ours, statistics = norms.group_norm_forward(x, weight, bias, groups, 1e-5, silu=True)
                found = norms.group_norm_backward(x, grad, weight, bias, statistics, silu=True)
            else:
                ours, statistics = norms.batch_norm_forward(x, weight, bias, 1e-5, silu=True)
                found = norms.batch_norm_backward(x, grad, statistics, silu=True)
            name = "group_norm" if groups else "batch_norm"
            yield f"{name}_forward", ours, y.detach()
            for one, slope in zip(found, (slopes[0].movedim(1, 3), *slopes[1:]), strict=True):
                yield f"{name}_backward", one, slope


def _attend(q: Tensor, kv: Tensor, scale: float) -> Tensor:
    """Two heads of 32 channels, (B, N, 64) and (B, M, 128) -> (B, N, 64)."""
    heads = [t.unflatten(-1, (2, 32)).transpose(1, 2) for t in (q, kv[..., :64], kv[..., 64:])]
    return ((heads[0] @ heads[1].mT * scale).softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
