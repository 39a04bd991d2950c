"""Where a plugged branch lives in its host, and who runs it.

The host's modules keep their classes, names and places in the tree, because checkpoints, ``isinstance``, indexing and
timm's helpers all rely on them; a wrapper would rename them. A branch is a child named ``hmhsa`` of the module that it
follows. An ``nn.Sequential``, or any module that runs its children in order, runs it as its last child. Other modules
get a forward hook, a plain function with a path, so that copying, pickling, tracing and exporting see nothing unusual.
Where a module hands its children other things than maps (a dense block), the branch lives in one of those children and
the hook still runs it after the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from ..errors import UserError
from .branches import NAME, Plug
from .running import Example, call, run

__all__ = ["choose_holders"]


def choose_holders(model: nn.Module, plugs: Sequence[Plug], example: Example | None) -> list[Plug]:
    """Settle for each place where the branch lives and who runs it (see the top of this file)."""
    unknown = {each.at: model.get_submodule(each.at) for each in plugs}
    unknown = {
        at: module
        for at, module in unknown.items()
        if type(module).forward is not nn.Sequential.forward and any(module.children())
    }
    inputs: dict[nn.Module, tuple[Any, Any]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[module] = tree_map(lambda x: x, (args, kwargs))  # lists of its own: dense blocks add to theirs

    if unknown:
        handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in unknown.values()]
        try:
            run(model, example, meta=True)
        except UserError:
            run(model, example)
        finally:
            for handle in handles:
                handle.remove()
    settled = []
    taken = {each.at for each in plugs}  # each can hold its own branch
    for each in plugs:
        module = model.get_submodule(each.at)
        if each.at in unknown:
            free = [name for name in _holders_in(module) if not name or f"{each.at}.{name}" not in taken]
            inside, hooked = _try_holders(each.at, module, free, *inputs[module])
            taken.add(f"{each.at}.{inside}")
        else:
            inside, hooked = "", not isinstance(module, nn.Sequential)
        settled.append(replace(each, inside=inside, hooked=hooked))
    return settled


class _Probe(nn.Module):
    """Passes its input on, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(x)
        return x


def _holders_in(module: nn.Module) -> list[str]:
    """Descendants that a branch might live in, by their names; those of earlier plugs, and what holds one, aren't."""
    names = ["", *reversed([name for name, _ in module.named_children()])]
    names += [name for name, inner in module.named_modules() if not any(inner.children())]
    return [name for name in names if NAME not in name.split(".") and not hasattr(module.get_submodule(name), NAME)]


def _try_holders(at: str, module: nn.Module, holders: Sequence[str], args: Any, kwargs: Any) -> tuple[str, bool]:
    """Which of them can hold a child more without harm ("" is the module), and whether a hook must run it."""
    for inside in holders:
        probe, holder = _Probe(), module.get_submodule(inside)
        holder.add_module(NAME, probe)
        try:
            output = call(module, args, kwargs)
        except Exception:  # the module runs all its children, and not on maps
            continue
        finally:
            delattr(holder, NAME)
        if not probe.seen:
            return inside, True
        if not inside and len(probe.seen) == 1 and output is probe.seen[0]:
            return inside, False
    raise UserError(f"nothing inside of {at} can hold one more H-MHSA; plug fewer of the modules in it")
