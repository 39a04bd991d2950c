"""The memory of a training step, estimated before the first one: a line instead of the system's kill."""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from ..checkpoints.available import SMALL, available_bytes
from ..errors import UserError
from ..fast import accelerate_training

__all__ = ["bytes_kept", "check_memory"]

PROBES = (4, 2)  # a step is tried with sides divided by these


def check_memory(
    network: nn.Module, images: int, shape: tuple[int, int, int], *, processes: int, dtype: torch.dtype | None
) -> None:
    """See that a training step fits into the machine's memory, estimated from its backbone: on CPUs alone.

    Args:
        network: A network, or one around a backbone that is its ``body``.
        images: Of a step of this process.
        shape: Of one image (C, H, W).
        processes: On this machine.
        dtype: Of autocast, if there is any.

    Raises:
        UserError: It doesn't.
    """
    free = available_bytes()
    if free is None or images * shape[1] * shape[2] <= SMALL:
        return
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    body: Any = getattr(network, "body", network)
    try:
        kept = bytes_kept(body, shape, dtype)
    except (RuntimeError, ValueError, AssertionError):  # a network for one size alone
        return
    needed = processes * (4 * weights + images * kept)  # gradients, two averages of an optimizer
    if needed > free:
        raise UserError(
            f"a step of {images} images of {shape[2]}x{shape[1]} takes {needed / 2**30:.1f} GiB of memory or more, and "
            f"{free / 2**30:.1f} GiB are free: give a smaller --batch_size (with --accumulate), smaller images, "
            "a smaller --model, or --grad_checkpointing"
        )


def bytes_kept(body: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype | None = None) -> float:
    """What the forward pass of one image keeps for the backward pass, extrapolated from smaller ones.

    With n pixels it is a·n + b·n²: maps grow with n, the scores of plain attention with n².
    """
    body = copied_for_training(body)
    channels, height, width = shape
    sizes = [(max(32, height // part), max(32, width // part)) for part in PROBES]
    (n1, k1), (n2, k2) = ((h * w, _kept(body, (channels, h, w), dtype) / (h * w)) for h, w in sizes)
    slope = max(0.0, (k2 - k1) / (n2 - n1)) if n2 > n1 else 0.0
    pixels = height * width
    return pixels * (k2 + slope * (pixels - n2))


def copied_for_training(body: nn.Module) -> nn.Module:
    """A copy that computes as the run will."""
    return accelerate_training(copy.deepcopy(body).train().to(memory_format=torch.channels_last))  # pyright: ignore


def _kept(body: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype | None) -> float:
    """Bytes kept for one image; two are tried, as norms need two values."""
    own = {p.untyped_storage().data_ptr() for p in body.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.autocast("cpu", dtype) if dtype is not None else nullcontext())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        outputs = body(torch.zeros(2, *shape).contiguous(memory_format=torch.channels_last))
        total = sum(kept.values()) / 2
        del outputs
    return total
