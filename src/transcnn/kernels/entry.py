"""Where calls enter what only infers: gradients are refused, autocast is off, inputs are in the dtype of the weights.

An optimized network computes in the dtype that was chosen for it. Autocast would cast the inputs of some operations
and not of others, between kernels of our own that want all of them alike, so it is switched off inside.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import UserError

__all__ = ["Frozen", "entry", "infers_only"]

Method = TypeVar("Method", bound=Callable[..., Any])
METHODS = ("forward", "forward_features", "forward_head", "forward_intermediates", "get_intermediate_layers")
ONLY_INFERS = "an optimized model only infers; train the model that it was made from, then optimize again"


class Frozen(nn.Module):
    """A module that only infers: it has no training mode, and no gradient flows through it."""

    def train(self, mode: bool = True) -> Frozen:
        """Refuses ``mode=True``."""
        if mode:
            raise UserError(ONLY_INFERS)
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Frozen:
        """Refuses ``requires_grad=True``."""
        if requires_grad:
            raise UserError(ONLY_INFERS)
        return super().requires_grad_(False)

    def weight_like(self) -> Tensor | None:
        """A weight whose dtype and device are those of the computation; None where there is none.

        BatchNorms say nothing: what is left of them stays in fp32.
        """
        for part in self.modules():
            if not isinstance(part, nn.modules.batchnorm._BatchNorm):
                for weight in part.parameters(recurse=False):
                    if weight.is_floating_point():
                        return weight
        return None


def entry(method: Method) -> Method:
    """A method of a :class:`Frozen` without gradients and autocast; tensors that it is given are cast to its dtype.

    Raises:
        UserError: Gradients are on, and an input or a weight asks for them.
    """

    @functools.wraps(method)
    def enter(self: Frozen, *args: Any) -> Any:
        _refuse_gradients(self, args)
        like = self.weight_like()
        with ExitStack() as stack:
            _enter(stack, like)
            return method(self, *(_cast(x, like.dtype) if like is not None else x for x in args))

    return enter  # pyright: ignore


def infers_only(model: nn.Module, cast: bool = True) -> nn.Module:
    """``model`` itself, of a class of its own whose ``forward`` and its like are entries; a copy stays one.

    ``cast`` casts what they are given to the dtype of the weights, and what they give to that of the input. Modules
    whose class is made by PyTorch's tracers stay as they are.
    """
    if not isinstance(model, Frozen | torch.jit.ScriptModule | torch.fx.GraphModule):
        model.__class__ = _class(type(model), cast)
    return model


class _Network(Frozen):
    """A network that only infers; what it was before is ``_plain_class``."""

    _plain_class: type[nn.Module]
    _casts: bool

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__reduce_ex__(2)[2]  # pyright: ignore
        return _remade, (self._plain_class, self._casts), state


def _remade(plain: type[nn.Module], cast: bool) -> nn.Module:
    kind = _class(plain, cast)
    return kind.__new__(kind)


@functools.cache
def _class(plain: type[nn.Module], cast: bool) -> type[nn.Module]:
    names = [name for name in METHODS if inspect.isfunction(inspect.getattr_static(plain, name, None))]
    members: dict[str, Any] = {name: _network_entry(getattr(plain, name), cast) for name in names}
    members |= {"_plain_class": plain, "_casts": cast, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_Network, plain), members)


def _network_entry(method: Callable[..., Any], cast: bool) -> Callable[..., Any]:
    @functools.wraps(method)
    def enter(self: Frozen, *args: Any, **kwargs: Any) -> Any:
        _refuse_gradients(self, (args, kwargs))
        like = self.weight_like()
        with ExitStack() as stack:
            _enter(stack, like)
            if not cast or like is None:
                return method(self, *args, **kwargs)
            given = next((x.dtype for x in _floating((args, kwargs))), like.dtype)
            return _cast(method(self, *_cast(args, like.dtype), **_cast(kwargs, like.dtype)), given)

    return enter


def _enter(stack: ExitStack, like: Tensor | None) -> None:
    """Until the stack is left, no gradients are recorded and no autocast casts."""
    if torch.is_grad_enabled():
        stack.enter_context(torch.no_grad())
    kind = "cpu" if like is None else like.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        stack.enter_context(torch.autocast(kind, enabled=False))


def _refuse_gradients(module: nn.Module, inputs: Any) -> None:
    """Raise an error where somebody waits for gradients, which would come back wrong or not at all."""
    asked = torch.is_grad_enabled() and (
        any(x.requires_grad for x in _floating(inputs)) or any(p.requires_grad for p in module.parameters())
    )
    if asked or (_forward_mode() and any(forward_ad.unpack_dual(x).tangent is not None for x in _floating(inputs))):
        raise UserError(
            "an optimized model only infers, and an input or a weight asks for gradients; call it under "
            "torch.no_grad(), or take the model that it was made from"
        )


def _forward_mode() -> bool:
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _floating(inputs: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point())


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """``x`` with every floating-point tensor in it, however deep, cast."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, x)
