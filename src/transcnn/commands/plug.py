"""``transcnn plug``: where H-MHSA can go in a network, and what it costs there."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from timm.models import is_model
from torch import nn
from torchvision.models import get_model, get_model_builder
from torchvision.models import list_models as torchvision_names

from ..backbone import ATTENTIONS
from ..checkpoints.files import check_writable
from ..checkpoints.loading import class_names_of, data_config_of, save_weights
from ..data.paths import StrPath
from ..errors import MAX_SIDE, UserError, check_range, first_line
from ..plugging.build import build_model
from ..plugging.cost import count, seconds_per_call
from ..plugging.places import Place, backbone, default_levels, find
from ..plugging.plug import plug as plug_in
from ..plugging.plug import plug_spec, plugged
from ..plugging.running import eval_mode, example_for
from ..text import print_whole, printable, rich_text
from ..variants import VARIANTS_ND, create_model

__all__ = ["plug"]


def plug(
    name: str,
    *,
    at: str | None = None,
    mode: Literal["add", "replace"] = "add",
    head_dim: int | None = None,
    layer: Literal["se", "ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam", "sk", "splat", "lambda", "nl"]
    | None = None,
    norm_layer: Literal["groupnorm1", "batchnorm2d", "batchnorm"] = "groupnorm1",
    img_size: int = 224,
    in_chans: int = 3,
    input: str | None = None,
    num_classes: int = 1000,
    pretrained: bool = False,
    batch_size: int = 4,
    out: StrPath | None = None,
) -> None:
    """Show where H-MHSA can go in a network; with --at, what the network costs before and after; with --out, save it.

    Args:
        name: A network of this package, of timm, or of torchvision (torchvision/resnet50 where both have the name).
        at: Modules to plug H-MHSA after, with commas; patterns such as layer4.*.conv2; or auto.
        mode: Add H-MHSA after the modules, or replace 3x3 convolutions (this changes the outputs).
        layer: Another attention of timm in the place of H-MHSA, for comparison.
        head_dim: Channels of one head; without it the largest of 64, 48, 32, 16, 8, 4, 2, 1 that divides the
            channels.
        norm_layer: The normalisation inside H-MHSA.
        img_size: Side of the image that resolutions, multiply-adds and images/s are for.
        in_chans: Channels of the images.
        input: Channels and sizes of one input in the place of both, for networks of sequences and volumes too:
            1x16000 (length), 3x16x112x112 (depth or time, height, width).
        num_classes: Outputs of the network.
        pretrained: Take the published weights.
        batch_size: Images at a time when images/s are measured.
        out: Save the plugged network as this .safetensors file, ready for transcnn train --init_from.

    Raises:
        UserError: No such network or module, or one that H-MHSA can't follow.
    """
    check_range(1, head_dim=head_dim, batch_size=batch_size)
    check_range(1, MAX_SIDE, img_size=img_size, in_chans=in_chans, num_classes=num_classes)
    sizes = _sizes_of(input) if input else (in_chans, img_size, img_size)
    in_chans = sizes[0]
    if out and (name.startswith("torchvision/") or not is_model(name)):
        raise UserError(f"--out needs a network of this package or of timm, which transcnn train can make; got {name}")
    if out:
        check_writable(Path(out))
    options: dict[str, Any] = dict(num_classes=num_classes, in_chans=in_chans, pretrained=pretrained)
    at = at or ("auto" if out or layer else None)
    with torch.device("cpu" if at else "meta"):  # the table alone needs no numbers
        model = make_network(name, **options).eval()
        example = example_for(model, sizes[1:])
    if at is None:
        _print_places(name, backbone(model, example), [place.name for place in find(model, "auto", example)], head_dim)
        return
    before = cost(model, example, batch_size)
    plug_in(model, at, mode=mode, layer=layer, head_dim=head_dim, norm_layer=norm_layer, example=example)
    what = layer or "H-MHSA"
    _print_costs(name, what, [place for place, _ in plugged(model)], before, cost(model, example, batch_size))
    if out:
        _save(Path(out), name, model, in_chans)


def _sizes_of(words: str) -> tuple[int, ...]:
    """``3x16x112x112`` as numbers: channels, then a length, height and width, or depth, height and width."""
    sizes = words.lower().split("x")
    if not 2 <= len(sizes) <= 4 or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise UserError(f"input must be channels and one to three sizes, such as 3x16x112x112, got {words!r}")
    check_range(1, MAX_SIDE**2, **{f"input {size}": int(size) for size in sizes})
    return tuple(map(int, sizes))


def make_network(name: str, *, num_classes: int, in_chans: int, pretrained: bool) -> nn.Module:
    """A network by its name: of this package or timm first, else of torchvision."""
    plain = name.removeprefix("torchvision/")
    if name in VARIANTS_ND:
        return create_model(name, num_classes=num_classes, in_chans=in_chans, pretrained=pretrained)
    if (plain == name and is_model(name.split(".")[0])) or plain not in torchvision_names():
        return build_model(name, num_classes=num_classes, in_chans=in_chans, pretrained=pretrained)
    if in_chans != 3:
        raise UserError(f"torchvision's networks take 3 channels, got in_chans={in_chans}")
    if pretrained and num_classes != 1000:
        raise UserError(f"torchvision's published weights are for 1000 classes, got num_classes={num_classes}")
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None, "num_classes": num_classes}
    if plain in ("googlenet", "inception_v3") and not pretrained:
        options["init_weights"] = False  # with a warning, else
    if "weights_backbone" in inspect.signature(get_model_builder(plain)).parameters:
        options["weights_backbone"] = None  # else it fetches a backbone's weights that nobody asked for
    try:
        return get_model(plain, **options)
    except Exception as error:  # of the network's arguments, or of the download
        raise UserError(f"can't make {name}: {first_line(error)}") from error


def cost(model: nn.Module, example: tuple[Any, ...], batch_size: int) -> dict[str, float]:
    """Parameters, multiply-adds of one image, and images/s (median of about a second, this machine as it is)."""
    images = example[0].expand(batch_size, *[-1] * (example[0].ndim - 1)).contiguous()
    with eval_mode(model), torch.no_grad():
        seconds = seconds_per_call(model, images)
    try:
        counts = count(model, example[0].to("meta"))
    except Exception:  # it looks at numbers, as detectors do
        counts = count(model, example[0])
    return {"params": counts.params, "macs": counts.macs, "images/s": batch_size / seconds}


def hmhsa_cost(place: Place, head_dim: int | None = None) -> dict[str, int]:
    """Parameters and multiply-adds that H-MHSA, with the levels that fit, and its scale would add at a place."""
    grid_sizes, pool_ratios = default_levels(*place.size)
    try:
        attention = ATTENTIONS[len(place.size)](
            place.channels, head_dim=head_dim, grid_sizes=grid_sizes, pool_ratios=pool_ratios, device="meta"
        )
    except ValueError as error:
        raise UserError(f"no H-MHSA fits after {place.name}: {error}") from error
    counts = count(attention, torch.empty(1, place.channels, *place.size, device="meta"))
    return {"params": counts.params + place.channels, "macs": counts.macs}


def _print_places(name: str, places: list[Place], automatic: list[str], head_dim: int | None) -> None:
    rows = []
    for place in places:
        added = hmhsa_cost(place, head_dim)
        mark = "auto" if place.name in automatic else ""
        size = "x".join(map(str, place.size))
        figures = (f"+{added['params'] / 1e6:.3f} M", f"+{added['macs'] / 1e9:.3f} G")
        rows.append((place.name, str(place.channels), str(place.stride), size, *figures, mark))
    _print_table(name, ("module", "channels", "stride", "resolution", "parameters", "multiply-adds", ""), rows)
    print("auto: where --at auto plugs. Any other module whose output is one map will do, by its name or a pattern.")


def _print_costs(name: str, what: str, at: list[str], before: dict[str, float], after: dict[str, float]) -> None:
    def row(title: str, figures: dict[str, float]) -> tuple[str, ...]:
        counts = (f"{figures['params'] / 1e6:.3f} M", f"{figures['macs'] / 1e9:.3f} G", f"{figures['images/s']:.1f}")
        return title, *counts

    rows = [row(name, before), row(f"with {what} at {', '.join(at)}", after)]
    _print_table("", ("network", "parameters", "multiply-adds", "images/s"), rows)


def _print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(rich_text, row))
    print_whole(table)


def _save(path: Path, name: str, model: nn.Module, in_chans: int) -> None:
    names = class_names_of(model)
    info = {"model": name, "model_args": {"plug": plug_spec(model)}, "task": "classify", "class_names": names}
    save_weights(path, model, {**info, "data_config": data_config_of(model, in_chans)})
    print(printable(f"saved {path}; train it with: transcnn train DATA --init_from {path}"))
