"""Running one example through a network, in evaluation mode, and leaving the network as it was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import CONVS, SIZES
from ..errors import UserError, first_line

__all__ = [
    "Example",
    "attributes_kept",
    "call",
    "coarsest",
    "empty_state",
    "eval_mode",
    "example_for",
    "map_of",
    "ndim_of",
    "run",
]

Example = Tensor | tuple[Any, ...]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without recomputation of blocks (gradient checkpointing); afterwards all is as it was."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    checkpointing = [module for module in modules if getattr(module, "grad_checkpointing", None) is True]
    model.eval()
    for module in checkpointing:
        module.grad_checkpointing = False  # pyright: ignore
    try:
        yield
    finally:
        for module, was in zip(modules, training, strict=True):
            module.training = was
        for module in checkpointing:
            module.grad_checkpointing = True  # pyright: ignore


def example_for(model: nn.Module, size: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    """One black image that the network should take: its channels, size (if not given), device and dtype.

    A sequence or a volume, of the size given, where the network's first convolution takes those.
    """
    first = _first_conv(model)
    if first is None:
        raise UserError(f"{type(model).__name__} holds no convolution, so there is no feature map to put H-MHSA on")
    ndim = first.weight.ndim - 2
    config = getattr(model, "pretrained_cfg", None) or {}
    if size is None:
        size = tuple(config.get("input_size", (3, 224, 224))[1:]) if ndim == 2 else ()
    if len(size) != ndim:
        raise UserError(
            f"{type(model).__name__} takes {map_of(model)}, and its size must be given: "
            f"example=torch.zeros(1, C, {SIZES[ndim]}), on the command line --input {'x'.join('3' + 'N' * ndim)}"
        )
    # timm's models say how many channels they take: the first convolution may follow a space-to-depth.
    in_chans = getattr(model, "in_chans", None) or (first.in_channels if first.in_channels <= 4 else 3)
    return (first.weight.new_zeros(1, in_chans, *size),)


def _first_conv(model: nn.Module) -> Any:
    return next((module for module in model.modules() if isinstance(module, tuple(CONVS.values()))), None)


def ndim_of(model: nn.Module) -> int:
    """Dimensions of a network's maps: what its first convolution takes."""
    first = _first_conv(model)
    return 2 if first is None else first.weight.ndim - 2


def map_of(model: nn.Module) -> str:
    """A network's maps in words: "(B, C, H, W)"."""
    return f"(B, C, {SIZES[ndim_of(model)]})"


def run(model: nn.Module, example: Example | None, meta: bool = False) -> tuple[int, ...]:
    """Run the example through the network, and return its (H, W), or whatever sizes its maps have.

    With ``meta`` on tensors without numbers: nothing is computed, so that even a large network takes a moment.
    """
    arguments = example_for(model) if example is None else example if isinstance(example, tuple) else (example,)
    image = coarsest(arguments, ndim_of(model))
    if image is None:
        raise UserError(f"example must hold a {map_of(model)} tensor")
    if meta:
        arguments = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in arguments)
    try:
        call(model, arguments, {})
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"{type(model).__name__} can't be run on an example of shape {image} ({reason}); "
            f"give one that it takes, as example=torch.zeros{map_of(model)}"
        ) from error
    return image[2:]


def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's output in evaluation mode and without gradients, on the meta device if the arguments are there."""
    with eval_mode(module), torch.no_grad():
        if not any(x.is_meta for x in _tensors((args, kwargs))):
            return module(*args, **kwargs)
        with attributes_kept(module):
            return torch.func.functional_call(module, empty_state(module), args, kwargs, tie_weights=False)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards all attributes are as before: what networks keep for the next call (anchors) would have no numbers."""
    before = [(part, dict(part.__dict__)) for part in model.modules()]
    contents = [(held, held.copy()) for _, held in before for held in held.values() if type(held) in (dict, list)]
    try:
        yield
    finally:
        for part, attributes in before:
            for name in part.__dict__.keys() - attributes.keys():
                del part.__dict__[name]
            part.__dict__.update(attributes)
        for held, content in contents:
            held.clear()
            held.update(content) if isinstance(held, dict) else held.extend(content)


def empty_state(module: nn.Module) -> dict[str, Tensor]:
    """Tensors of the meta device for all of a network's, for ``functional_call`` without ties of its own.

    By one name of each module: torch would exchange those of a module with two names twice, and leave it without.
    """
    return {
        f"{name}.{key}".lstrip("."): tensor.to("meta")
        for name, part in module.named_modules()
        for key, tensor in itertools.chain(
            part.named_parameters(recurse=False, remove_duplicate=False),
            part.named_buffers(recurse=False, remove_duplicate=False),
        )
    }


def coarsest(value: Any, ndim: int) -> tuple[int, ...] | None:
    """The shape of the smallest map of so many dimensions within nested arguments."""
    maps = [tuple(x.shape) for x in _tensors(value) if x.ndim == ndim + 2]
    return min(maps, key=lambda shape: math.prod(shape[2:])) if maps else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(_tensors(v) for v in value.values())
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(_tensors(v) for v in value)
