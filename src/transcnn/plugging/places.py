"""Where H-MHSA can go in a network: its places, found by running one example through it.

A *place* is a module whose output is one (B, C, H, W) tensor, in a CNN for sequences (B, C, L), for volumes
(B, C, D, H, W): what the network's first convolution takes. :func:`backbone` lists those on the network's main path,
:func:`find` resolves ``at="auto"``, names and glob patterns. :mod:`transcnn.plugging.plug` puts the H-MHSA there.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..attention import CONVS, SIZES
from ..errors import UserError
from ..levels import further_levels
from .running import Example, coarsest, map_of, ndim_of, run

__all__ = ["Place", "backbone", "default_levels", "find"]

AUTO_STRIDES = (8, 16, 32)
# Their output doesn't say where the backbone is: a size of its own, or the very input.
_NO_PLACES = (
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
)
_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """One module that H-MHSA can follow: its dotted name, and the map that it makes from the example.

    ``stride`` is how many positions of the image's side one position of the map stands for, as a power of two (of a
    volume's or a video's side that shrank most);
    ``size`` is the map's (H, W), or (L,) or (D, H, W), ``in_size`` that of the module's input.
    """

    name: str
    channels: int
    stride: int
    size: tuple[int, ...]
    in_channels: int = 0
    in_size: tuple[int, ...] = (0, 0)


@dataclass
class _Call:
    """One call of one module during the example: the shapes of its input and output maps, and the calls inside."""

    name: str
    module: nn.Module
    before: _Shape | None = None  # the coarsest map among its inputs, if any
    after: _Shape | None = None  # its output, if that is one map
    inside: list[_Call] = field(default_factory=list)


def find(model: nn.Module, at: str | Iterable[str], example: Example | None = None) -> list[Place]:
    """The places that ``at`` means, in the order in which the network runs them.

    Args:
        model: The network; it is run once, in evaluation mode and without gradients, and left as it was.
        at: ``"auto"``: the last place of the backbone at each of strides 8, 16 and 32 (or, in a network that has none
            of these and in those for sequences and volumes, at its three largest strides). Else dotted module names or
            glob patterns, as a list or one string with commas; ``*`` stays within one part of a name, so
            ``layer4.*.conv2`` is one conv per block.
        example: A batch to run, a tensor or a tuple of arguments; None takes one black image of the size that the
            network's ``pretrained_cfg`` names, or 224x224; networks for sequences and volumes need one.

    Raises:
        UserError: A pattern matches nothing; a module doesn't run, runs more than once, or its output isn't one
            (B, C, H, W) tensor; the network can't be run on the example.
    """
    if getattr(model, "output_fmt", "NCHW") == "NHWC":  # timm's mark of MambaOut, Swin and the like
        raise UserError(f"{type(model).__name__} keeps its maps as (B, H, W, C); H-MHSA needs (B, C, H, W)")
    root, image = _record(model, example)
    if at == "auto":
        chosen = _automatic(_backbone_calls(root), image)
        if not chosen:
            raise UserError(f"at='auto' found no module with a {map_of(model)} output; name the places yourself")
        return chosen
    patterns = at.split(",") if isinstance(at, str) else list(at)
    if not patterns:
        raise UserError("at must be 'auto', or name one module or more; got none")
    calls: dict[str, list[_Call]] = {}
    for call in _walk(root):
        calls.setdefault(call.name, []).append(call)
    names = _match([pattern.strip() for pattern in patterns], [name for name, _ in model.named_modules() if name])
    places = {name: _as_place(name, calls.get(name, []), image) for name in names}
    return [places[name] for name in calls if name in places]


def backbone(model: nn.Module, example: Example | None = None) -> list[Place]:
    """The modules that the network's main path runs one after the other, each with one downsampling at most.

    Containers that span several strides (``features``, ``blocks``, ``stages``) are looked into; blocks and stages
    aren't. The backbone ends where maps grow again (a decoder) or shrink to few channels (a head).
    """
    root, image = _record(model, example)
    return [_as_place(call.name, [call], image) for call in _backbone_calls(root)]


def default_levels(*size: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Grid sizes and pool ratios that fit a map, by the rule of the paper's networks; of other dimensions by "auto".

    Theirs at 256x256 are grids of 8 and ratios 8, 4, 2 for maps of side 64, 32, 16, and plain attention at 8; HAT-Net's
    at 224x224 are grids of 7 at 28 and 14. So: the ratio is the power of two that leaves about 8 (or 7) merged tokens
    to a side, the grid is 7 where only that divides the map and else 8, and a map of up to 10 has no grids.
    """
    if len(size) != 2:
        return further_levels(size)
    side = max(size)
    ratio = 2 ** max(round(math.log2(side / 7.5)), 0)
    if ratio == 1:
        return (), ()
    sevens = all(n % 7 == 0 and n % 8 for n in size)
    return (7 if sevens else 8,), (ratio,)


def _record(model: nn.Module, example: Example | None) -> tuple[_Call, tuple[int, ...]]:
    """Run the example, and return the tree of module calls and the example's (H, W)."""
    if any(is_lazy(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise UserError(
            f"{type(model).__name__} holds lazy modules, whose channels the first call settles: run it once"
        )
    try:
        return _record_on(model, example, meta=True)
    except UserError:  # some networks look at numbers, or hold tensors that are no buffers
        return _record_on(model, example, meta=False)


def _record_on(model: nn.Module, example: Example | None, meta: bool) -> tuple[_Call, tuple[int, ...]]:
    top = _Call("", nn.Identity())
    stack = [top]
    ndim = ndim_of(model)

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered = _Call(name, module, before=coarsest((args, kwargs), ndim))
            stack[-1].inside.append(entered)
            stack.append(entered)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        left = stack.pop()
        if isinstance(output, Tensor) and output.ndim == ndim + 2:
            left.after = tuple(output.shape)

    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.RecursiveScriptModule) and not isinstance(module, torch.jit.TracedModule):
                raise UserError(f"{name or type(model).__name__} is compiled by torch.jit.script, which takes no hooks")
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        image = run(model, example, meta)
    finally:
        for handle in handles:
            handle.remove()
    return top.inside[0], image


def _walk(call: _Call) -> Iterator[_Call]:
    yield call
    for inner in call.inside:
        yield from _walk(inner)


def _shrinkage(before: _Shape, after: _Shape) -> float:
    return (math.prod(before[2:]) / math.prod(after[2:])) ** (1 / (len(after) - 2))


def _backbone_calls(root: _Call) -> list[_Call]:
    calls: list[_Call] = []
    _collect(root, calls, root.before)
    times: dict[str, int] = {}
    for call in _walk(root):
        times[call.name] = times.get(call.name, 0) + 1
    return [call for call in calls if times[call.name] == 1]


def _collect(call: _Call, into: list[_Call], image: _Shape | None) -> bool:
    """Add the backbone's calls within ``call`` to ``into``; False once the backbone has ended.

    ``image`` is the network's input; None inside an encoder with its decoder, whose halves may be nested further.
    """
    if isinstance(call.module, _NO_PLACES):
        pooled = call.before and call.after and call.before != call.after and set(call.after[2:]) == {1}
        return not pooled
    if call.before and call.after:
        shrinkage = _shrinkage(call.before, call.after)
        if (call.name and shrinkage < 0.7) or call.after[1] * 8 < call.before[1]:
            return False  # a decoder's maps grow, a dense head leaves few channels
        if (image is None or call.before[2:] == image[2:]) and _is_encoder_decoder(call):
            image = None
        elif call.name and (shrinkage < 2.9 or not call.inside):  # Inception's unpadded convolutions pass 2 a little
            into.append(call)
            return True
    return all(_collect(inner, into, image) for inner in call.inside)


def _is_encoder_decoder(call: _Call) -> bool:
    """Whether maps shrink and grow again inside: MONAI's U-Net is one module, each level of it within the last."""
    each = [_shrinkage(c.before, c.after) for inner in call.inside for c in _walk(inner) if c.before and c.after]
    return any(s > 1.4 for s in each) and any(s < 0.7 for s in each)


def _automatic(calls: Sequence[_Call], image: tuple[int, ...]) -> list[Place]:
    by_stride: dict[int, list[_Call]] = {}
    for call in calls:
        by_stride.setdefault(_stride(image, call.after), []).append(call)
    strides = [stride for stride in AUTO_STRIDES if stride in by_stride]
    if len(image) != 2:  # one second of sound or of video has strides of its own, or none
        whole = [
            stride for stride, at in by_stride.items() if any(max(call.after[2:]) > 1 for call in at if call.after)
        ]
        strides = [stride for stride in sorted(whole) if stride > 1][-3:] or whole
    elif not strides:
        strides = sorted(stride for stride in by_stride if 1 < stride < min(image))[-3:]
    return [_as_place(_last(by_stride[stride]).name, [_last(by_stride[stride])], image) for stride in strides]


def _last(calls: Sequence[_Call]) -> _Call:
    """The last of these calls, short of a head's 1x1 convolution that only widens the channels for the classifier."""

    def channels(call: _Call) -> int:
        return call.after[1] if call.after else 0

    base = max((i for i, call in enumerate(calls) if _is_spatial(call.module)), default=0)
    last = calls[base]
    for call in calls[base + 1 :]:
        if channels(call) != channels(last) or (call.before and call.before[1] != channels(last)):
            break
        last = call
    return last


def _is_spatial(module: nn.Module) -> bool:
    def mixes_positions(m: nn.Module) -> bool:
        return (
            any(k != 1 for k in m.kernel_size) if isinstance(m, tuple(CONVS.values())) else "Pool" in type(m).__name__
        )

    return any(mixes_positions(m) for m in module.modules())


def _stride(image: tuple[int, ...], shape: _Shape | None) -> int:
    assert shape is not None
    each = [had / has for had, has in zip(image, shape[2:], strict=True)]
    mean = math.sqrt(each[0] * each[1]) if len(each) == 2 else max(each)  # video keeps its frames for longer
    return 2 ** max(round(math.log2(mean)), 0)


def _match(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that match any pattern, part by part between the dots."""
    matched: dict[str, None] = {}
    for pattern in patterns:
        parts = pattern.split(".")
        hits = [
            name
            for name in names
            if len(split := name.split(".")) == len(parts) and all(map(fnmatchcase, split, parts))
        ]
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4)
            if not near:
                near = [name for name in names if "." not in name][:8]
            raise UserError(f"no module is called {pattern!r}; near: {', '.join(near)}")
        matched.update(dict.fromkeys(hits))
    return list(matched)


def _is_channels_last(module: nn.Module, after: _Shape, image: tuple[int, ...]) -> bool:
    """Whether a module's maps are (B, H, W, C), as torchvision's Swin's are: sides like the image's, and channels last.

    Only where a layer inside says so, too: maps of any sides come from strides that differ.
    """

    def is_like(sizes: tuple[int, ...]) -> bool:
        ratio = (math.prod(image) / math.prod(sizes)) ** (1 / len(image))
        return all(abs(n / ratio - size) < 1 for n, size in zip(image, sizes, strict=True))

    def mixes_last(layer: nn.Module) -> bool:
        if isinstance(layer, nn.LayerNorm):
            return layer.normalized_shape[-1] == after[-1]
        return isinstance(layer, nn.Linear) and layer.out_features == after[-1]

    return not is_like(after[2:]) and is_like(after[1:-1]) and any(map(mixes_last, module.modules()))


def _as_place(name: str, calls: Sequence[_Call], image: tuple[int, ...]) -> Place:
    if len(calls) != 1:
        times = f"runs {len(calls)} times" if calls else "doesn't run"
        raise UserError(f"{name} {times} when the network runs once; H-MHSA can follow modules that run exactly once")
    before, after = calls[0].before, calls[0].after
    if after is None:
        raise UserError(
            f"the output of {name} is not one (B, C, {SIZES[len(image)]}) tensor, so H-MHSA can't follow it"
        )
    if _is_channels_last(calls[0].module, after, image):
        raise UserError(
            f"{name} makes maps (B, {SIZES[len(image)]}, C), of shape {after}; H-MHSA needs (B, C, {SIZES[len(image)]})"
        )
    before = before or (0,) * len(after)
    return Place(name, after[1], _stride(image, after), after[2:], before[1], before[2:])
