"""What layers that train by kernels refuse, in one clear line each: second derivatives and torch.fx."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor

from ..errors import UserError

__all__ = ["first_order", "refuse_fx"]


def refuse_fx(x: Tensor) -> None:
    """Refuse torch.fx, which can't trace the choice between implementations."""
    if isinstance(x, torch.fx.Proxy):
        raise UserError(
            "torch.fx can't trace a network after accelerate_training; call transcnn.fast.plain(model) first"
        )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass by kernels, which has no derivatives itself."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # with create_graph=True alone
            raise UserError(
                "kernels of accelerate_training have first derivatives only; "
                "call transcnn.fast.plain(model) before you use create_graph=True"
            )
        return backward(ctx, *grads)

    return run
