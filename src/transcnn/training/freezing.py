"""Parts of a network that stay as they are: the first stages, modules by patterns, or all but what answers."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from timm.models import group_parameters
from torch import nn

from ..data.sources.source import abbreviate
from ..errors import UserError

__all__ = ["freeze"]


def freeze(network: nn.Module, backbone: nn.Module, spec: Sequence[str]) -> list[nn.Module]:
    """Freeze parameters in place; returns the modules that hold none but frozen ones, which are to stay in eval mode.

    Args:
        network: What is trained.
        backbone: The part of it that is frozen from; a classifier is its own.
        spec: ``all``: the backbone without its classifier (linear probing); a number of stages, the stem with them; or
            patterns of names of modules or parameters, such as ``stages.0*``.

    Raises:
        UserError: More stages than there are, a pattern that fits nothing, or nothing left to learn.
    """
    parameters = dict(backbone.named_parameters())
    frozen: set[str] = set()
    for word in spec:
        if word == "all":
            frozen |= {*parameters} - _classifier(backbone)
        elif word.isdecimal():
            frozen |= _first_stages(backbone, int(word))
        else:
            found = {name for name in parameters if _fits(name, word)}
            if not found:
                children = [name for name, _ in backbone.named_children()]
                raise UserError(f"freeze: nothing is named {word!r}; the network's parts are {abbreviate(children)}")
            frozen |= found
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in network.parameters()):
        raise UserError(f"freeze {' '.join(spec)} leaves nothing to learn")
    return [m for m in network.modules() if (inner := list(m.parameters())) and not any(p.requires_grad for p in inner)]


def _fits(name: str, pattern: str) -> bool:
    """Whether a parameter or a module that holds it has a name of the pattern."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def _classifier(backbone: nn.Module) -> set[str]:
    """Names of the parameters of the last layer; none of a backbone without one."""
    last = getattr(backbone, "get_classifier", lambda: None)()
    if not isinstance(last, nn.Module):
        return set()
    own = {id(p) for p in last.parameters()}
    return {name for name, p in backbone.named_parameters() if id(p) in own}


def _first_stages(backbone: Any, count: int) -> set[str]:
    """Parameters of the stem and the first stages."""
    if hasattr(backbone, "group_matcher"):
        groups: Any = group_parameters(backbone, backbone.group_matcher(coarse=True), reverse=True)
        last = max(groups.values())  # the classifier
        stages = {name: int(group) for name, group in groups.items() if group < last}
    else:  # timm's features_only: its children in order, those that give a map of stride 4 or more ending a stage
        ends = {f["module"].replace(".", "_") for f in backbone.feature_info.get_dicts() if f["reduction"] >= 4}
        stages, at = {}, 0
        names = [name for name, _ in backbone.named_children()]
        first = min((i for i, name in enumerate(names) if name in ends), default=0)
        for i, name in enumerate(names):
            at += i >= first and (i == first or names[i - 1] in ends)
            stages |= {f"{name}.{inner}": at for inner, _ in getattr(backbone, name).named_parameters()}
    most = max(stages.values(), default=0)
    if not 1 <= count <= most:
        raise UserError(f"freeze: the network has {most} stages, got {count}; all but the last layer: --freeze all")
    return {name for name, stage in stages.items() if stage <= count}
