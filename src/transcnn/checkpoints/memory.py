"""What a forward pass takes, told before it is tried: a line instead of the system's kill, or of hours."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UserError, first_line
from ..plugging.cost import count
from ..plugging.running import attributes_kept, empty_state
from .available import SMALL, available_bytes, input_shape
from .loading import Loaded

__all__ = ["check_forward", "forward_bytes"]

SMALL_IMAGE = 1 << 20  # pixels of an image up to which no multiply-adds are counted
MAX_MACS = 10**13  # of an image whose size a file chooses: minutes on a CPU, ten times what the largest networks need


def check_forward(loaded: Loaded, images: int = 1, *, chosen: bool = False) -> None:
    """See that a network can be run at the size that its images are resized to, as far as shapes alone tell.

    Args:
        loaded: The network, with the size.
        images: Of a batch.
        chosen: The user gave the size: how long it takes is for them to know, and the network may be for another alone.

    Raises:
        UserError: A batch doesn't fit into this machine's memory, a file asks for a size that takes hours, or the
            network doesn't take images of the chosen one.
    """
    channels, height, width = input_shape(loaded)
    pixels = height * width
    network: Any = getattr(loaded.model, "body", loaded.model)
    words = f"{loaded.source}: an image of {width}x{height}, as it asks for, takes"
    try:
        if pixels > SMALL_IMAGE and not chosen:
            macs = count(_OnMeta(network), torch.empty(1, channels, height, width, device="meta")).macs
            if macs > MAX_MACS:
                raise UserError(
                    f"{words} {macs:.1e} multiply-adds; a smaller size can be given where --img_size is one"
                )
        free = available_bytes() if pixels * images > SMALL else None
        if free is not None and (needed := images * forward_bytes(network, (channels, height, width))) > free:
            raise UserError(
                f"{words.replace('an image', f'a batch of {images} images')} {needed / 2**30:.1f} GiB of memory or "
                f"more, and {free / 2**30:.1f} GiB are free: smaller images or batches need less"
            )
    except UserError:
        raise
    except Exception:  # a network for one size alone, or one that looks at numbers: running it says what is wrong
        pass
    if chosen:
        _check_size(loaded, (channels, height, width))


def _check_size(loaded: Loaded, shape: tuple[int, int, int]) -> None:
    """Raise UserError for a network that doesn't take an image (C, H, W), such as a ViT made for one size."""
    with suppress(Exception):  # shapes alone tell it of most
        _OnMeta(loaded.model)(torch.empty(1, *shape, device="meta"))
        return
    device = next((parameter.device for parameter in loaded.model.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode():
            loaded.model(torch.zeros(1, *shape, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{loaded.source} takes no images of {shape[2]}x{shape[1]}: {first_line(error)}") from error


class _OnMeta(nn.Module):
    """A network on the meta device, without a copy of its weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = [network]  # not a child: its parameters stay where they are
        self._state = empty_state(network)

    def forward(self, x: Tensor) -> Any:
        with attributes_kept(self._network[0]):
            return functional_call(self._network[0], self._state, (x,), tie_weights=False)


class _Fused(TorchFunctionMode):
    """Attention as fused kernels compute it, without a matrix of scores; shapes alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and len(args) >= 3:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class _Peak(TorchDispatchMode):
    """Bytes of all tensors that live at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def forward_bytes(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Bytes that the forward pass of one image (C, H, W) holds at its peak, without weights."""
    network = _OnMeta(network)
    with torch.no_grad(), _Fused(), _Peak() as tracked:
        network(torch.empty(1, *shape, device="meta"))
    return tracked.peak
