"""Branches that only training needs, merged into one convolution: RepVGG, RepViT, MobileOne, FastViT and others."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from ..dispatch import hooked

__all__ = ["merge_branches"]

_log = logging.getLogger(__name__)
_METHODS = ("fuse", "reparameterize", "switch_to_deploy")


def merge_branches(model: nn.Module) -> None:
    """Merge the branches of every module of timm's that knows how to, in place; those with hooks stay as they are.

    The first makes a layer that takes the module's place, the others change the module itself; both are timm's own, as
    in ``timm.utils.model.reparameterize_model``.
    """
    for name, child in list(model.named_children()):
        method = next((method for method in _METHODS if callable(getattr(child, method, None))), None)
        known = type(child).__module__.startswith("timm.") and not any(map(hooked, child.modules()))
        if method is None or not known:
            merge_branches(child)
            continue
        merged = _merged(child, method)
        if merged is None:
            merge_branches(child)
            continue
        setattr(model, name, merged.eval())
        merge_branches(merged)


@torch.no_grad()
def _merged(module: Any, method: str) -> nn.Module | None:
    """A copy with its branches merged, in double precision; None where timm can't merge them."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    try:
        made = copy.deepcopy(module).double()
        made = getattr(made, method)() or made
        return made.to(module.dtype if weight is None else weight.dtype)
    except Exception as error:  # a method of that name which is something else
        _log.info("the branches of %s aren't merged: %s", type(module).__name__, error)
        return None
