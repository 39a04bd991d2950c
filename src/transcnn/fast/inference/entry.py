"""Entry points of inference-only modules: gradients are refused, autocast is off, inputs are cast to the weights'
dtype.

An optimized network computes in the dtype that was chosen for it. Autocast would cast the inputs of some operations and
not of others, while the kernels of this package need all of them in one dtype, so it is switched off inside.
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
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...errors import UserError

__all__ = ["InferenceOnly", "entry", "inference_only", "refuse_mask"]

Method = TypeVar("Method", bound=Callable[..., Any])
METHODS = ("forward", "forward_features", "forward_head", "forward_intermediates", "get_intermediate_layers")
NO_TRAINING = "an optimized model is inference-only; train the model that it was made from, then optimize that again"


class InferenceOnly(nn.Module):
    """A module without a training mode and without gradients."""

    def train(self, mode: bool = True) -> InferenceOnly:
        """Refuses ``mode=True``."""
        if mode:
            raise UserError(NO_TRAINING)
        super().train(False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> InferenceOnly:
        """Refuses ``requires_grad=True``."""
        if requires_grad:
            raise UserError(NO_TRAINING)
        return super().requires_grad_(False)

    def weight_like(self) -> Tensor | None:
        """A weight that has the dtype and device of the computation; None where there is none.

        BatchNorms don't count: those that aren't folded stay in fp32.
        """
        for module in self.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                for weight in module.parameters(recurse=False):
                    if weight.is_floating_point():
                        return weight
        return None


def entry(method: Method) -> Method:
    """A method of an :class:`InferenceOnly` module without gradients and autocast, its inputs cast to the weights'
    dtype.

    Raises:
        UserError: Gradients are enabled, and an input or a weight requires them.
    """

    @functools.wraps(method)
    def enter(self: InferenceOnly, *args: Any, **kwargs: Any) -> Any:
        _refuse_gradients(self, (args, kwargs))
        like = self.weight_like()
        with ExitStack() as stack:
            _enter(stack, like)
            if like is None:
                return method(self, *args, **kwargs)
            named = {name: _cast(x, like.dtype) for name, x in kwargs.items()}
            return method(self, *(_cast(x, like.dtype) for x in args), **named)

    return enter  # pyright: ignore


def refuse_mask(mask: Tensor | None) -> None:
    """An optimized network knows no masks."""
    if mask is not None:
        raise UserError("an optimized network takes no mask; give it items of one size, or use the original network")


def inference_only(model: nn.Module, cast: bool = True) -> nn.Module:
    """``model`` itself with another class, a subclass whose ``forward`` methods are entry points.

    With ``cast`` their inputs are cast to the dtype of the weights and their outputs to that of the input.
    ScriptModules and GraphModules, whose classes are generated, stay as they are. Copies and pickles keep the class.
    """
    if not isinstance(model, InferenceOnly | torch.jit.ScriptModule | torch.fx.GraphModule):
        model.__class__ = _class(type(model), cast)
    return model


class _Network(InferenceOnly):
    """A network that is inference-only; its class was ``_plain_class``."""

    _plain_class: type[nn.Module]
    _casts: bool
    _reshapes = False  # whether its code has been found to take views of maps that no channels-last one has

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__reduce_ex__(2)[2]  # pyright: ignore
        return _rebuild, (self._plain_class, self._casts), state


def _rebuild(plain: type[nn.Module], cast: bool) -> nn.Module:
    kind = _class(plain, cast)
    return kind.__new__(kind)


@functools.cache
def _class(plain: type[nn.Module], cast: bool) -> type[nn.Module]:
    names = [name for name in METHODS if inspect.isfunction(inspect.getattr_static(plain, name, None))]
    members: dict[str, Any] = {name: _network_entry(getattr(plain, name), cast) for name in names}
    members |= {"_plain_class": plain, "_casts": cast, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_Network, plain), members)


class _Reshape(TorchFunctionMode):
    """Has ``x.view(...)`` copy where it must: networks are written for contiguous maps, and these are channels-last."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes = func is Tensor.view and not kwargs and not isinstance(args[-1], torch.dtype)
        return (Tensor.reshape if sizes else func)(*args, **(kwargs or {}))


def _with_views(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a network, tried again, and from then on run, with :class:`_Reshape` where it fails without."""

    @functools.wraps(method)
    def run(self: _Network, *args: Any, **kwargs: Any) -> Any:
        if not self._reshapes:
            try:
                return method(self, *args, **kwargs)
            except RuntimeError as error:
                if not str(error).startswith("view size is not compatible") or torch.compiler.is_compiling():
                    raise
            self._reshapes = True
        with _Reshape():
            return method(self, *args, **kwargs)

    return run


def _network_entry(method: Callable[..., Any], cast: bool) -> Callable[..., Any]:
    method = _with_views(method)

    @functools.wraps(method)
    def enter(self: InferenceOnly, *args: Any, **kwargs: Any) -> Any:
        _refuse_gradients(self, (args, kwargs))
        like = self.weight_like()
        with ExitStack() as stack:
            _enter(stack, like)
            if not cast or like is None:
                return method(self, *args, **kwargs)
            input_dtype = next((x.dtype for x in _floating((args, kwargs))), like.dtype)
            return _cast(method(self, *_cast(args, like.dtype), **_cast(kwargs, like.dtype)), input_dtype)

    return enter


def _enter(stack: ExitStack, like: Tensor | None) -> None:
    """Switches gradients and autocast off until the stack is closed."""
    if torch.is_grad_enabled():
        stack.enter_context(torch.no_grad())
    kind = "cpu" if like is None else like.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        stack.enter_context(torch.autocast(kind, enabled=False))


def _refuse_gradients(module: nn.Module, inputs: Any) -> None:
    """Raise an error where gradients are asked for, which would be missing or wrong."""
    required = torch.is_grad_enabled() and (
        any(x.requires_grad for x in _floating(inputs)) or any(p.requires_grad for p in module.parameters())
    )
    if required or (_forward_mode() and any(forward_ad.unpack_dual(x).tangent is not None for x in _floating(inputs))):
        raise UserError(
            "an optimized model is inference-only, and an input or a weight requires gradients; call it under "
            "torch.no_grad(), or use the model that it was made from"
        )


def _forward_mode() -> bool:
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _floating(inputs: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point())


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """``x`` with every floating-point tensor in it cast, however deeply nested."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, x)
