"""What layers that train by kernels refuse, in one clear line each: second or batched derivatives, and torch.fx."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor  # pyright: ignore

from ..errors import UserError

__all__ = ["first_order", "refuse_fx"]


def refuse_fx(x: Tensor) -> None:
    """Refuse torch.fx, which can't trace the choice between implementations."""
    if isinstance(x, torch.fx.Proxy):
        raise UserError(
            "torch.fx can't trace a network after accelerate_training; call transcnn.fast.plain(model) first"
        )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass by kernels, which has no derivatives itself: asking for those raises an error.

    So does asking for several gradients at once, whose tensors have no memory of their own.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        if any(map(_batched, grads)):
            raise UserError(
                "kernels of accelerate_training have no batched gradients (is_grads_batched=True, vectorize=True); "
                "call transcnn.fast.plain(model) before the forward pass"
            )
        if not torch.is_grad_enabled():  # as nearly always; with create_graph=True it is
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        anchor = torch.zeros((), requires_grad=True)  # so that the results have a backward pass
        tensors = iter(_NoSecondDerivative.apply(anchor, *(x for x in found if isinstance(x, Tensor))))
        return tuple(next(tensors) if isinstance(x, Tensor) else x for x in found)

    return run


def _batched(grad: Tensor) -> bool:
    """Whether this is what vmap, or autograd's own of older days, makes of a gradient."""
    return is_batchedtensor(grad) or is_legacy_batchedtensor(grad)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore
        raise UserError(
            "kernels of accelerate_training have no second derivatives; call transcnn.fast.plain(model) before the "
            "forward pass, and on a CPU run that within torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
