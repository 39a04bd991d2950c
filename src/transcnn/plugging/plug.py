"""H-MHSA, or another attention, in any CNN: put it after named modules, train it, take it out again.

Paper: arXiv 2106.03180 calls H-MHSA "readily pluggable into any CNN architecture"; this module does so by one call.
"""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attention import CONVS, default_head_dim
from ..backbone import norm_layers
from ..errors import UserError, first_line
from ..grids import Size
from .branches import LAYERS, NAME, ConvReplacement, HMHSABranch, Layer, Plug
from .holders import choose_holders
from .places import Place, default_levels, find
from .running import Example, call

__all__ = [
    "LAYERS",
    "ConvReplacement",
    "HMHSABranch",
    "load_host",
    "plug",
    "plug_like",
    "plug_spec",
    "plugged",
    "plugged_parameters",
    "unplug",
]

_log = logging.getLogger(__name__)


def plug(
    model: nn.Module,
    at: str | Iterable[str] = "auto",
    *,
    mode: Literal["add", "replace"] = "add",
    layer: Layer | None = None,
    head_dim: int | None = None,
    grid_sizes: Sequence[Size] | None = None,
    pool_ratios: Sequence[Size] | None = None,
    norm_layer: str | Callable[[int], nn.Module] = "groupnorm1",
    example: Example | None = None,
) -> nn.Module:
    """Put H-MHSA into a CNN, in place, and return it.

    With ``mode="add"`` each named module's output x becomes ``x + scale·HMHSA(x)``. ``scale`` is zero at first: the
    outputs stay exactly what they were until training changes them. The network's own tensors keep their names.
    ``mode="replace"`` puts H-MHSA in the place of 3x3 convolutions, as Bottleneck Transformers do (arXiv 2101.11605);
    that changes the outputs at once, and warns so. :func:`unplug` undoes both. Plug before ``torch.compile``, DDP and
    the making of the optimiser.

    Args:
        model: Any CNN, for images, sequences or volumes; one example is run through it for channels and resolutions.
        at: ``"auto"``: after the last module at each of strides 8, 16 and 32 (in CNNs for sequences and volumes at the
            three largest strides). Else dotted names or glob patterns of modules, a list or one string with commas. To
            replace: convolutions, or modules that hold some, of which all 3x3 ones with as many outputs as inputs are
            replaced (``"auto"``: in the last stage).
        mode: ``"add"`` or ``"replace"``.
        layer: Another attention in the place of H-MHSA, to compare like with like: the name of one of timm's that take
            any map, such as ``"se"``, ``"eca"``, ``"cbam"`` or ``"nl"``, or a callable from channels to a layer that
            keeps the shape of a map. The arguments that follow, but for ``example``, are H-MHSA's and not for it.
        head_dim: Channels of one head; None takes the largest of 64, 48, 32, 16, 8, 4, 2, 1 that divides the channels.
        grid_sizes, pool_ratios: As for :class:`~transcnn.HMHSA`, the same at each place; None takes what fits the
            place's resolution (:func:`transcnn.plugging.places.default_levels`). Give both or none.
        norm_layer: ``"groupnorm1"``, ``"batchnorm"``, or a callable from channels to a layer. The default, HAT-Net's,
            has no running statistics: it is the same in training and evaluation, with one image a batch, and beside a
            frozen host, where BatchNorm's fresh statistics would start out far from the host's maps.
        example: What to run: a tensor or a tuple of arguments; None is one black image of the network's own size. CNNs
            for sequences and volumes need one.

    Raises:
        UserError: Nothing matches, a place is plugged already, its output is no single (B, C, H, W) tensor, the network
            doesn't take the example, or is compiled already; the network is then as it was.
        ValueError: ``head_dim``, ``grid_sizes`` or ``pool_ratios`` don't fit, as for :class:`~transcnn.HMHSA`.
    """
    _check_uncompiled(model)
    if mode not in ("add", "replace"):
        raise UserError(f"mode must be 'add' or 'replace', got {mode!r}")
    if (grid_sizes is None) != (pool_ratios is None):
        raise UserError(f"give both of grid_sizes and pool_ratios or none, got {grid_sizes} and {pool_ratios}")
    places = find(model, at, example)
    ndim = len(places[0].size)
    if isinstance(norm_layer, str) and norm_layer not in norm_layers(ndim):
        raise UserError(f"norm_layer must be one of {', '.join(norm_layers(ndim))} or a callable, got {norm_layer!r}")
    _check_layer(layer, ndim, head_dim=head_dim, grid_sizes=grid_sizes)
    if mode == "replace":
        places = _convolutions(model, places[-1:] if at == "auto" else places, example)
    levels = None if grid_sizes is None or pool_ratios is None else (tuple(grid_sizes), tuple(pool_ratios))
    plugs = [_plug_for(model, place, mode, layer, head_dim, levels, norm_layer) for place in places]
    _check_free(model, plugs)
    if mode == "add":
        plugs = choose_holders(model, plugs, example)
    else:
        warnings.warn("mode='replace' changes the model's outputs: H-MHSA starts untrained", stacklevel=2)
    return _attach(model, plugs)


def _plug_for(
    model: nn.Module,
    place: Place,
    mode: str,
    layer: Layer | None,
    head_dim: int | None,
    levels: tuple[tuple[Size, ...], tuple[Size, ...]] | None,
    norm_layer: str | Callable[[int], nn.Module],
) -> Plug:
    """What is plugged in at a place; levels that aren't given fit its map."""
    size = place.size if mode == "add" else place.in_size  # H-MHSA runs before the pooling that does the stride
    grid_sizes, pool_ratios = ((), ()) if layer else levels or default_levels(*size)
    plug = Plug(
        at=place.name,
        mode=mode,
        dim=place.channels,
        head_dim=head_dim or default_head_dim(place.channels),
        grid_sizes=grid_sizes,
        pool_ratios=pool_ratios,
        norm_layer=norm_layer,
        stride=_conv_stride(model, place) if mode == "replace" else (1,) * len(size),
        ndim=len(size),
        layer=layer,
    )
    if layer is not None and not isinstance(layer, str):
        _try_layer(plug, size)
    return plug


def unplug(model: nn.Module) -> nn.Module:
    """Take all H-MHSA out again, in place: the same modules, names, hooks and tensors as before :func:`plug`.

    What training changed in the host's own tensors stays changed. Convolutions that were replaced come back.
    """
    for name, module in list(plugged(model)):
        if isinstance(module, ConvReplacement):
            _exchange(model, module, module.original().train(module.training))
            continue
        place = model.get_submodule(name)
        if module.plug.hooked:
            hooks = place._forward_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "func", None) is _run_branch]:
                del hooks[key]
        delattr(place.get_submodule(module.plug.inside), NAME)
    return model


def plugged(model: nn.Module) -> Iterator[tuple[str, HMHSABranch | ConvReplacement]]:
    """Each H-MHSA that was plugged in, with the name of the module that it follows (or replaces)."""
    for name, module in model.named_modules():
        if isinstance(module, ConvReplacement):
            yield name, module
        elif isinstance(module, HMHSABranch):
            inside = f".{module.plug.inside}" if module.plug.inside else ""
            yield name.removesuffix(f"{inside}.{NAME}"), module


def plugged_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the plugged H-MHSA alone, for an optimiser beside a frozen host.

    ``model.requires_grad_(False)``, then ``p.requires_grad_()`` for each of these, trains nothing else. Keep the host's
    BatchNorms from updating their statistics with ``model.eval()``: the plugged parts are the same in both modes
    (but for ``norm_layer="batchnorm2d"``).
    """
    for _, module in plugged(model):
        yield from module.parameters()


def plug_spec(model: nn.Module) -> list[dict[str, Any]]:
    """What was plugged where, as JSON-able dicts for a file's metadata; :func:`plug_like` makes it again."""
    spec = []
    for name, module in plugged(model):
        if not isinstance(module.plug.norm_layer, str):
            raise UserError(f"{name} was plugged with norm_layer={module.plug.norm_layer}; only names can be written")
        if callable(module.plug.layer):
            raise UserError(f"{name} was plugged with layer={module.plug.layer}; only names can be written")
        line = asdict(replace(module.plug, at=name))
        usual = {"ndim": 2, "layer": None}
        spec.append({key: value for key, value in line.items() if key not in usual or value != usual[key]})
    return spec


def plug_like(model: nn.Module, spec: str | Iterable[str | Mapping[str, Any]]) -> nn.Module:
    """Plug as ``spec`` of :func:`plug_spec` says, in place, without running the network; returns the network.

    Names and patterns are taken too, and given to :func:`plug`: what a user writes and what a file holds are one.

    Raises:
        UserError: A module of ``spec`` isn't in the network, or is plugged already.
    """
    spec = spec if isinstance(spec, str) else list(spec)
    if not spec:
        return model
    if isinstance(spec, str) or all(isinstance(line, str) for line in spec):
        return plug(model, spec)  # pyright: ignore
    _check_uncompiled(model)
    plugs = [_read(line) for line in spec]  # pyright: ignore
    modules = dict(model.named_modules())
    for each in plugs:
        if f"{each.at}.{each.inside}".rstrip(".") not in modules:
            raise UserError(f"{type(model).__name__} has no module {each.at!r} to plug H-MHSA in")
    _check_free(model, plugs)
    return _attach(model, plugs)


def load_host(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Load a checkpoint of the host, or of the plugged network, into a plugged network.

    Returns (and logs) the names of the H-MHSA tensors that ``state_dict`` doesn't hold; they keep their values.

    Raises:
        UserError: Any other tensor is missing, unexpected, or of another shape; nothing is loaded then.
    """
    own, ours, kept = model.state_dict(), set(), {}
    for name, module in model.named_modules(remove_duplicate=False):  # tensors go by each of a module's names
        if isinstance(module, HMHSABranch | ConvReplacement):
            ours.update(f"{name}.{key}" for key in module.state_dict())
        if isinstance(module, ConvReplacement):
            kept.update({f"{name}.{key}": tensor for key, tensor in module.original().state_dict().items()})
    known = {**kept, **own}
    missing = [key for key in own if key not in state_dict]
    wrong = {
        "missing": [key for key in missing if key not in ours],
        "unexpected": [key for key in state_dict if key not in known],
        "of another shape": [key for key, t in state_dict.items() if key in known and known[key].shape != t.shape],
    }
    if any(wrong.values()):
        lists = [f"{len(k)} {what}: {', '.join(k[:3])}{', …' * (len(k) > 3)}" for what, k in wrong.items() if k]
        raise UserError(f"the checkpoint is not one of this host; tensors {'; '.join(lists)}")
    model.load_state_dict({key: tensor for key, tensor in state_dict.items() if key in own}, strict=False)
    for key in kept.keys() & state_dict.keys():
        kept[key].copy_(state_dict[key])
    if missing:
        _log.warning("only the %d H-MHSA tensors are not in the checkpoint; they keep their values", len(missing))
    return missing


def _run_branch(module: nn.Module, args: Any, output: Tensor, *, path: str) -> Tensor:
    """The forward hook: found by its path, so that copies of the module run their own branch."""
    return module.get_submodule(path)(output)


def _read(line: Mapping[str, Any]) -> Plug:
    try:
        levels = {
            key: tuple(tuple(size) if isinstance(size, list | tuple) else size for size in line[key])
            for key in ("grid_sizes", "pool_ratios")
        }
        plug = Plug(**{**line, **levels, "stride": tuple(line["stride"])})
        _check_layer(plug.layer, plug.ndim)
        return plug
    except UserError:
        raise
    except (KeyError, TypeError) as error:
        raise UserError(f"not a line of a plug spec: {dict(line)} ({error})") from error


def _attach(model: nn.Module, plugs: Iterable[Plug]) -> nn.Module:
    made = [(each, _make(model, each)) for each in plugs]  # all first: an error leaves the network as it was
    for each, new in made:
        module = model.get_submodule(each.at)
        new.train(module.training)
        if each.mode == "replace":
            _exchange(model, module, new)
            continue
        module.get_submodule(each.inside).add_module(NAME, new)
        if each.hooked:
            path = f"{each.inside}.{NAME}".lstrip(".")
            # First of the module's hooks, so that others (timm's feature hooks) see what the branch makes.
            module.register_forward_hook(functools.partial(_run_branch, path=path), prepend=True)
    return model


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place, under each name that it has: networks run modules by any of theirs."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def _make(model: nn.Module, plug: Plug) -> HMHSABranch | ConvReplacement:
    module = model.get_submodule(plug.at)
    if plug.mode == "add":
        return HMHSABranch(plug, next(itertools.chain(module.parameters(), model.parameters()), None))
    if not isinstance(module, CONVS[plug.ndim]):
        raise UserError(f"{plug.at} is no {CONVS[plug.ndim].__name__} to replace")
    return ConvReplacement(plug, module)


def _check_uncompiled(model: nn.Module) -> None:
    """Refuse what torch.compile has seen: its code would leave out hooks that come later, without a word."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            what = f"{name} of the network" if name else "the network"
            raise UserError(f"{what} is compiled already, and would leave out what is plugged in; plug, then compile")


def _check_free(model: nn.Module, plugs: Sequence[Plug]) -> None:
    taken = {name for name, _ in plugged(model)}
    homes: set[str] = set()
    for each in plugs:
        home = f"{each.at}.{each.inside}".rstrip(".")
        if home in homes:
            raise UserError(f"{home} would hold two H-MHSA; name each place once")
        homes.add(home)
        if each.at in taken or any(each.at.startswith(f"{name}.{NAME}") for name in taken):
            raise UserError(f"{each.at} is plugged already; unplug(model) takes all H-MHSA out")
        if hasattr(model.get_submodule(each.at), NAME) or hasattr(model.get_submodule(home), NAME):
            raise UserError(f"{home} has an attribute {NAME!r} already")


def _check_layer(layer: Layer | None, ndim: int, **of_hmhsa: Any) -> None:
    """Refuse what is no layer to plug in, and H-MHSA's own arguments beside one."""
    if layer is None:
        return
    given = [name for name, value in of_hmhsa.items() if value is not None]
    if given:
        raise UserError(f"{given[0]} is an argument of H-MHSA, and layer={layer!r} takes its place")
    if not (callable(layer) or layer in LAYERS):
        raise UserError(
            f"layer must be one of {', '.join(LAYERS)}, or a callable from channels to a layer; got {layer!r}"
        )
    if not callable(layer) and ndim != 2:
        raise UserError(f"timm's {layer!r} is for images; for maps of {ndim} dimensions layer must be a callable")


def _try_layer(plug: Plug, size: tuple[int, ...]) -> None:
    """Refuse a layer that doesn't keep the shape of the place's map."""
    layer = plug.attention(torch.zeros(1))
    shape = (1, plug.dim, *size)
    try:
        made = call(layer, (torch.zeros(shape),), {})
    except Exception as error:
        raise UserError(f"layer's {type(layer).__name__} can't take a map {shape}: {first_line(error)}") from error
    if not isinstance(made, Tensor) or made.shape != shape:
        raise UserError(f"layer's {type(layer).__name__} must keep the shape of a map {shape}, got {_described(made)}")


def _described(made: Any) -> str:
    return str(tuple(made.shape)) if isinstance(made, Tensor) else type(made).__name__


def _conv_stride(model: nn.Module, place: Place) -> tuple[int, ...]:
    conv: Any = model.get_submodule(place.name)
    return conv.stride


def _convolutions(model: nn.Module, places: Sequence[Place], example: Example | None) -> list[Place]:
    """The convolutions to replace: the places that are some, and the fitting 3x3 ones inside the others."""
    names: list[str] = []
    for place in places:
        module = model.get_submodule(place.name)
        inside = [
            f"{place.name}.{name}".rstrip(".")
            for name, conv in module.named_modules()
            if isinstance(conv, CONVS[len(place.size)])
            and (not name or (set(conv.kernel_size) == {3} and conv.in_channels == conv.out_channels))
        ]
        if not inside:
            raise UserError(f"{place.name} holds no 3x3 convolution with as many outputs as inputs to replace")
        names.extend(inside)
    convs = find(model, names, example)
    for conv in convs:
        fits = tuple(-(-n // s) for n, s in zip(conv.in_size, _conv_stride(model, conv), strict=True))
        if conv.in_channels != conv.channels or conv.size != fits:
            raise UserError(
                f"{conv.name} can't be replaced: it makes {(conv.channels, *conv.size)} of "
                f"{(conv.in_channels, *conv.in_size)}, H-MHSA {(conv.in_channels, *fits)}"
            )
    return convs
