"""What each H-MHSA did in one forward pass, recorded by hooks; the modules and their forward stay as they are.

``forward`` runs attention as one fused call and never holds the weights. Here they are computed again from the very
queries and keys that the layers gave, with the same cutting into grids.

Letters as in :mod:`transcnn.attention`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..attention import HMHSA, SIZES
from ..checkpoints.loading import Loaded, data_config_of
from ..data.bands import Bands
from ..data.images import BrokenImage
from ..data.inputs import input_name, read_input
from ..errors import UserError
from ..grids import Size, cut_into_grids
from ..plugging.running import eval_mode

__all__ = ["ImageLike", "Record", "as_input", "check_stage", "heads_of", "local_weights", "record", "token_weights"]

ImageLike = Tensor | Image.Image | str | os.PathLike[str]


@dataclass(eq=False)
class Record:
    """One H-MHSA in one forward pass of one image.

    Attributes:
        name: The module's dotted name.
        attn: The module.
        owner: The module that holds it: a block, a plugged branch, or itself.
        stage: Which stage it belongs to, from 0.
        x: Its input, (1, C, H, W).
        qkv: Queries, keys and values of each local step, (1, 3C, H_l, W_l).
        mixed: X + Attn of each local step, before GridNorm, (1, C, H_l, W_l).
        q: Queries of the global step, (1, C, H, W).
        k, v: Its keys and values, (1, C, H_L, W_L).
        summed: What goes into the last projection, (1, C, H, W).
        y: Its output, (1, C, H, W).
        output: The owner's output; that of H-MHSA where the owner gives no map.
    """

    name: str
    attn: HMHSA
    owner: nn.Module
    x: Tensor
    stage: int = 0
    qkv: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    summed: Tensor = field(init=False)
    y: Tensor = field(init=False)
    output: Tensor = field(init=False)

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of the map (length of a sequence; depth, height and width of a volume)."""
        return tuple(self.x.shape[2:])


def as_input(model: nn.Module | Loaded, image: ImageLike) -> tuple[nn.Module, Tensor]:
    """The module and its input (1, C, H, W), on the module's device; (1, C, L) or (1, C, D, H, W) as its H-MHSA takes.

    A tensor is taken as normalised already. A PIL image or a file is made upright and normalised as the model wants it,
    and keeps its size: any size works.

    Raises:
        UserError: The file can't be read, or the tensor isn't one image.
    """
    module = model.model if isinstance(model, Loaded) else model
    x: Any = image
    if isinstance(image, str | os.PathLike | Image.Image):
        try:
            pixel_range = model.preprocessing.get("pixel_range") if isinstance(model, Loaded) else None
            x = read_input(image if isinstance(image, Image.Image) else Path(image), pixel_range)
        except BrokenImage as error:
            raise UserError(f"can't read {input_name(image, 1)}: {error}") from error
    if isinstance(x, Image.Image | Bands):
        from torchvision.transforms import functional as tvf

        from ..data.transforms.classify import channel_stats
        from ..data.transforms.pixels import to_pixels

        in_chans = model.preprocessing["input_size"][0] if isinstance(model, Loaded) else getattr(model, "in_chans", 3)
        config = model.preprocessing if isinstance(model, Loaded) else data_config_of(module, in_chans)
        mean, std = channel_stats(config["mean"], in_chans), channel_stats(config["std"], in_chans)
        x = tvf.normalize(to_pixels(x, in_chans).float() / 255, list(mean), list(std))
    ndim = next((m.ndim for m in module.modules() if isinstance(m, HMHSA)), 2)
    x = x[None] if x.ndim == ndim + 1 else x
    if x.ndim != ndim + 2 or len(x) != 1:
        letters = f"C, {SIZES[ndim]}"
        raise UserError(
            f"expected one {'image' if ndim == 2 else 'input'}, ({letters}) or (1, {letters}), got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise UserError(f"a tensor must be a normalised image of floats, got {x.dtype}; a PIL image is normalised here")
    like = next(module.parameters(), x)
    return module, x.detach().to(device=like.device, dtype=like.dtype)


def record(model: nn.Module, image: Tensor, *, gradients: bool = False) -> tuple[Any, list[Record]]:
    """Run the model on one image; its output, and a record of each H-MHSA in the order in which they ran.

    With ``gradients`` the tensors stay in the graph, also where no parameter asks for gradients.

    Raises:
        UserError: No H-MHSA ran.
    """
    modules = dict(model.named_modules())
    records: list[Record] = []
    handles: list[Any] = []
    try:
        for name, module in modules.items():
            if isinstance(module, HMHSA):
                owner = modules[name.rpartition(".")[0]] if name else module
                plain = isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict) or owner is model
                handles += _watch(name, module, module if plain else owner, records)
        if gradients and image.is_inference():
            image = image.clone()  # one that can be in a graph
        with eval_mode(model), torch.set_grad_enabled(gradients):
            output = model(image.requires_grad_() if gradients else image)
    finally:
        for handle in handles:
            handle.remove()
    if not records:
        raise UserError(f"{type(model).__name__} ran no H-MHSA, so there is no attention to show; see transcnn.plug")
    _number_stages(records)
    return output, records


def _watch(name: str, attn: HMHSA, owner: nn.Module, records: list[Record]) -> list[Any]:
    """Hooks that begin a record when ``attn`` is called, and fill the latest one of it."""

    def latest() -> Record:
        return next(r for r in reversed(records) if r.attn is attn)

    def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given: list[Any] = [*args, *(kwargs[key] for key in ("x", "mask") if key in kwargs)]
        if len(given) > 1 and given[1] is not None and not bool(given[1].all()):
            raise UserError(f"{name or 'the network'} runs with a mask; maps are of inputs without padding: cut it off")
        records.append(Record(name, attn, owner, given[0]))

    def keep(put: Callable[[Record, Tensor], None]) -> Callable[..., None]:
        return lambda module, args, output: put(latest(), output)

    def end(_: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or output.ndim != attn.ndim + 2:
            return None  # several things, or no map: the output is then that of H-MHSA itself
        latest().output = output
        return output.clone()  # what comes next may write into it

    def both(r: Record, kv: Tensor) -> None:
        r.k, r.v = kv.chunk(2, dim=1)

    def all_three(r: Record, qkv: Tensor) -> None:
        r.q, r.k, r.v = qkv.chunk(3, dim=1)

    def summed(_: nn.Module, args: Any) -> None:
        latest().summed = args[0]

    def mixed(_: nn.Module, args: Any) -> None:
        latest().mixed.append(args[0])

    handles = [attn.register_forward_pre_hook(begin, with_kwargs=True), attn.proj.register_forward_pre_hook(summed)]
    for step in attn.local:
        handles.append(step.qkv.register_forward_hook(keep(lambda r, out: r.qkv.append(out))))  # pyright: ignore
        handles.append(step.grid_norm.register_forward_pre_hook(mixed))  # pyright: ignore
    if attn.local:
        handles.append(attn.q.register_forward_hook(keep(lambda r, out: setattr(r, "q", out))))
        handles.append(attn.kv.register_forward_hook(keep(both)))
    else:
        handles.append(attn.qkv.register_forward_hook(keep(all_three)))
    handles.append(attn.register_forward_hook(keep(lambda r, out: setattr(r, "y", out))))
    handles += [each.register_forward_hook(end) for each in dict.fromkeys((attn, owner))]
    return handles


def _number_stages(records: Sequence[Record]) -> None:
    """Our own networks' stages by their names; in others, neighbours with maps of one shape are one stage."""
    named = [re.search(r"(?:^|\.)stages[._](\d+)\.", r.name) for r in records]
    stage = -1
    shape = None
    for r, match in zip(records, named, strict=True):
        if r.x.shape != shape:
            stage, shape = stage + 1, r.x.shape
        r.stage = int(match[1]) if match and all(named) else stage


def check_stage(records: Sequence[Record], stage: int | None) -> list[Record]:
    """The records of one stage (negative numbers count from the end), or all of them.

    Raises:
        UserError: There is no such stage.
    """
    if stage is None:
        return list(records)
    stages = sorted({r.stage for r in records})
    if stage < 0 and -stage <= len(stages):
        stage = stages[stage]
    if stage not in stages:
        raise UserError(f"stage must be one of {', '.join(map(str, stages))} (or negative, from the end), got {stage}")
    return [r for r in records if r.stage == stage]


# --- weights ----------------------------------------------------------------------------------------------------


def token_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q·Kᵀ/√d) where ``mask`` is true, (..., N, d) and (..., M, d) -> (..., N, M), in float32 or better."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


def local_weights(qkv: Tensor, head_dim: int, grid_size: Size) -> tuple[Tensor, Tensor]:
    """Weights and values inside each grid, (1, 3C, *S) -> (G, h, N, N) and (G, h, N, d)."""
    tokens, mask = cut_into_grids(qkv, grid_size)  # (G, N, 3C)
    q, k, v = tokens.unflatten(2, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)  # (G, h, N, d) each
    return token_weights(q, k, mask), v


def heads_of(x: Tensor, head_dim: int) -> Tensor:
    """(1, C, *S) -> (h, N, d)."""
    return x[0].flatten(1).unflatten(0, (-1, head_dim)).mT
