"""Networks by name, of this package or of timm, with H-MHSA plugged in where a spec says so."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from torch import nn

from ..errors import UserError, first_line
from ..variants import VARIANTS_ND
from .plug import plug_like

__all__ = ["build_model", "source_of_weights"]


def build_model(name: str, plug: Any = None, **kwargs: Any) -> nn.Module:
    """``timm.create_model``, with errors for users: near names of one that is unknown, arguments that it refuses.

    ``plug`` puts H-MHSA in, as :func:`transcnn.plug_like` takes it: a spec, names or patterns.
    """
    base = name.split(".")[0]
    if base in VARIANTS_ND:
        raise UserError(f"{base} takes no images: a module of your own trains it, transcnn.create_model makes it")
    if not timm.is_model(base):
        if ":" in name or "/" in name:  # timm would read hf-hub:... and local-dir:..., and do what they say
            raise UserError(f"a model is named as timm lists it, got {name!r}; other weights: --init_from")
        near = difflib.get_close_matches(base, timm.list_models(), n=4, cutoff=0.5)
        hint = f"near ones: {', '.join(near)}" if near else "transcnn models lists ours, timm.list_models() all"
        raise UserError(f"no model is named {name!r}; {hint}")
    try:
        model = timm.create_model(name, **kwargs)
        return plug_like(model, plug) if plug else model
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"can't make {name} with {str(kwargs)[:300]}: {first_line(error)}") from error
    except (RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(f"can't make {name}: {first_line(error)}") from error
    except Exception as error:  # of the network or the hub: there are many kinds
        if not kwargs.get("pretrained"):
            raise
        raise UserError(_no_weights(name, error)) from error


def source_of_weights(name: str) -> str:
    """Where a network's published weights come from: "the package", a repository of the hub, an address; "" of none."""
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return ""
    if config.file:
        return "the package"
    return f"hf-hub:{config.hf_hub_id}" if config.hf_hub_id else str(config.url or "")


def _no_weights(name: str, error: Exception) -> str:
    """What to do where published weights can't be fetched."""
    source = source_of_weights(name)
    return (
        f"can't fetch the weights of {name}{f' from {source}' if source else ''}: {first_line(error, 200)}; offline, "
        "give --init_from a file of weights that is here, or train without --pretrained"
    )
