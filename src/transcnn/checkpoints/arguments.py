"""What a file may say of the network that its weights are for: plain values under known names, of bounded size.

``timm.create_model`` takes arguments that read files, write them and download (``pretrained_cfg``, ``checkpoint_path``,
``cache_dir``, ...), names that are addresses (``hf-hub:``, ``local-dir:``), and whatever classes accept. So nothing
reaches it from a file but a registered name and the arguments listed here: those that shape a network. What trains a
network keeps to the same list, so that what it writes can be read. (Needs no torch: exported files are checked, too.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..errors import MAX_SIDE
from ..plain import check_plain, with_new_names

__all__ = ["ARGUMENTS", "DENSE", "PRIVATE", "check_model_args", "check_model_name", "check_task_args", "short"]

MAX_SIZE = 1 << 14  # widths, kernels, grids, outputs: no network in use comes near
MAX_DEPTH = 512  # blocks of a stage
MAX_ITEMS = 64  # of a list
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_.-]+)?")
_WORD = re.compile(r"[A-Za-z0-9_]{0,40}")

Check = Callable[[Any], bool]


class Kind:
    """What an argument may be.

    Args:
        says: The allowed values in words, for messages.
        fits: Whether a value is one of them.
        nested: How deep lists of such values may be, a list of lists is 2; 0 allows none.
        none: Whether None is allowed, also inside lists.
    """

    def __init__(self, says: str, fits: Check, *, nested: int = 0, none: bool = True) -> None:
        self.says = f"{says}{', or lists of them' if nested else ''}"
        self.fits = fits
        self.nested = nested
        self.none = none

    def __call__(self, value: Any, nested: int | None = None) -> bool:
        nested = self.nested if nested is None else nested
        if isinstance(value, list | tuple):
            return nested > 0 and len(value) <= MAX_ITEMS and all(self(item, nested - 1) for item in value)
        return self.none if value is None else self.fits(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _is_int(value)


def _ints(low: int, high: int, nested: int = 0, *, none: bool = True) -> Kind:
    return Kind(f"integers from {low} to {high}", lambda v: _is_int(v) and low <= v <= high, nested=nested, none=none)


def _numbers(low: float, high: float, nested: int = 0, *, none: bool = True) -> Kind:
    return Kind(f"numbers from {low} to {high}", lambda v: _is_number(v) and low <= v <= high, nested=nested, none=none)


def _one_of(*choices: str, none: bool = False) -> Kind:
    return Kind(f"one of {', '.join(choices)}", lambda v: isinstance(v, str) and v in choices, none=none)


_flag = Kind("true or false", lambda v: isinstance(v, bool), nested=1)
_word = Kind("a word", lambda v: isinstance(v, str) and bool(_WORD.fullmatch(v)), nested=1)
_sizes = _ints(0, MAX_SIZE, 2)
_depths = _ints(0, MAX_DEPTH, 2)
_factors = _numbers(0, 1024, 2)
_shares = _numbers(0, 1, 1)
_flag_or_size = Kind("true, false or a size", lambda v: isinstance(v, bool) or _sizes(v, 0), nested=1)
_levels = Kind("sizes, in lists of lists, or 'auto'", lambda v: v == "auto" or _sizes(v, 0), nested=2)


_any = Kind(
    "numbers, words, true or false", lambda v: any(kind(v, 0) for kind in (_flag, _factors, _sizes, _word)), nested=2
)


# Arguments of TransCNN (all but device and dtype) and of timm's networks, by what they may be.
ARGUMENTS: dict[str, Kind] = {
    name: kind
    for kind, names in {
        _sizes: """num_classes in_chans dims embed_dim embed_dims channels widths head_dim num_heads heads head_widths
            kernel_size kernel_sizes patch_size window_size stem_width stem_size stem_stride stem_chs dim num_features
            head_hidden_size base_width cardinality num_init_features growth_rate groups output_stride down_kernel_size
            sr_ratios init_channels initial_chs final_chs base_dim base_dims reg_tokens block_reduce_first hidden_sizes
            patch_sizes strides bn_size""",
        _levels: "grid_sizes pool_ratios",
        _ints(1, 3, none=False): "ndim",
        _depths: "depth depths layers block_config num_blocks serial_depths parallel_depth depth_token_only",
        _ints(1, MAX_SIDE, 1): "img_size",
        _factors: """expansions expand_ratio mlp_ratio mlp_ratios width_factor width_mult depth_mult conv_ratio
            bottle_ratio se_ratio init_values layer_scale_init_value ls_init_value head_init_scale norm_eps""",
        _shares: """drop_rate drop_path_rate drop_block_rate proj_drop_rate attn_drop_rate pos_drop_rate
            patch_drop_rate""",
        _word: """global_pool act_layer norm_layer aa_layer stem_type pad_type pos_embed design token_mixers rope_type
            attn_type""",
        _flag: """qkv_bias proj_bias qk_norm class_token no_embed_class fc_norm pre_norm final_norm use_fc_norm
            use_abs_pos_emb use_rel_pos_bias use_shared_rel_pos_bias use_rot_pos_emb dynamic_img_size dynamic_img_pad
            strict_img_size zero_init_last conv_mlp use_grn head_norm_first conv_bias avg_down replace_stem_pool
            swiglu_mlp scale_mlp qkv_fused patch_norm aux_logits fix_stem distilled use_post_norm use_overlap_down
            extra_norm_stage scale_mlp_norm scale_attn_norm""",
        _flag_or_size: "downsamples use_pos_emb attn_groups",
    }.items()
    for name in names.split()
}

_path = Kind("a module's name", lambda v: isinstance(v, str) and len(v) <= 300 and v.isprintable(), none=False)
_levels_of_plug = _ints(1, MAX_SIZE, 2, none=False)
_LAYERS = ("se", "ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam", "sk", "splat", "lambda", "nl")  # of timm
PLUG: dict[str, Kind] = {
    "at": _path,
    "mode": _one_of("add", "replace"),
    "dim": _ints(1, MAX_SIZE, none=False),
    "head_dim": _ints(1, MAX_SIZE, none=False),
    "grid_sizes": _levels_of_plug,
    "pool_ratios": _levels_of_plug,
    "norm_layer": _one_of("batchnorm1d", "batchnorm2d", "batchnorm3d", "batchnorm", "groupnorm1"),
    "stride": _ints(1, 64, 1, none=False),
    "inside": _path,
    "hooked": Kind("true or false", lambda v: isinstance(v, bool), none=False),
    "ndim": _ints(1, 3, none=False),
    "layer": _one_of(*_LAYERS, none=True),
}

_flag_or_none = Kind("true or false", lambda v: isinstance(v, bool))
_range = _numbers(1e-3, 1e3, 1, none=False)
TABLE = ("images", "target", "file_column", "split_column", "separator", "group")  # what ``settings.Table`` holds
_columns = Kind("a name", lambda v: isinstance(v, str) and len(v) <= 4096, nested=1)
_table = Kind(
    f"names with values of {', '.join(TABLE)}",
    lambda v: isinstance(v, dict) and v.keys() <= {*TABLE} and all(_columns(v[name], name == "target") for name in v),
)
TASKS: dict[str, dict[str, Kind]] = {
    "classify": {
        "flip": _flag_or_none,
        "table": _table,
        "loss": _one_of("ce", "focal"),
        "focal_gamma": _numbers(0, 10, none=False),
        "class_weights": Kind(
            "none, balanced, sqrt or numbers by name",
            lambda v: v in ("none", "balanced", "sqrt") if isinstance(v, str) else isinstance(v, dict),
            none=False,
        ),
        "logit_adjustment": _numbers(0, 10, none=False),
        "sampler": _one_of("shuffle", "balanced"),
        "report_map": _one_of("pca", "tsne"),
    },
    "multilabel": {
        "table": _table,
        "loss": _one_of("bce", "asl"),
        "class_weights": _one_of("none", "balanced", "sqrt"),
        "threshold": _numbers(0, 1),
    },
    "regress": {"table": _table, "loss": _one_of("mse", "l1", "huber")},
    "segment": {
        "decoder": _one_of("fpn", "pspnet", "upernet", "unet"),
        "decoder_channels": _ints(8, 1 << 12),
        "loss": _one_of("ce", "dice", "both"),
        "class_weights": _one_of("none", "median", "log"),
        "logit_adjustment": _numbers(0, 1, none=False),
        "ignore_index": _ints(-1, 1 << 16),
        "resize": _ints(1, MAX_SIDE),
        "scale_range": _range,
        "window": _ints(1, MAX_SIDE),
        "flip": _flag_or_none,
    },
    "detect": {
        "detector": _one_of("retinanet", "fasterrcnn", "maskrcnn"),
        "fpn_channels": _ints(16, 1 << 12, none=False),
        "short_side": _ints(32, MAX_SIDE, none=False),
        "long_side": _ints(32, MAX_SIDE, none=False),
        "side_range": _range,
        "anchor_size": _ints(1, MAX_SIDE),
        "image_mean": _numbers(-1e6, 1e6, 1),
        "image_std": _numbers(1e-6, 1e6, 1),
        "rois": _ints(4, MAX_SIZE, none=False),
        "min_score": _numbers(0, 1000, none=False),
        "max_found": _ints(1, 10_000, none=False),
    },
}
DENSE = ("segment", "detect")  # tasks whose answers lie in the image; those of all others are about it as a whole
PRIVATE = ("shares", "counts", "without", "table")  # of a task's settings: about the training data and where it lies
REQUIRED = {
    "regress": ("mean", "std"),
    "segment": ("decoder",),
    "detect": ("detector", "fpn_channels", "short_side", "long_side", "side_range", "min_score", "max_found"),
}


def check_model_name(name: Any) -> None:
    """Raise ValueError unless ``name`` is plain: of a registry, with a tag perhaps; no address and no path."""
    if not isinstance(name, str) or len(name) > 200 or not _NAME.fullmatch(name):
        raise ValueError(
            f"a model's name is letters, digits and _, perhaps with a tag behind a point, got {short(name)}"
        )


def check_model_args(args: Any, also: Collection[str] = ()) -> None:
    """Raise ValueError unless ``args`` are arguments of a network by name, ``plug`` (lines of a plug spec) among them.

    ``also`` names arguments of a network that the user's own code has registered; their values are numbers or words.
    """
    if not isinstance(args, dict):
        raise ValueError(f"model_args must be names with values, got {short(args)}")
    for name, value in args.items():
        if name == "plug":
            check_plug(value)
            continue
        kind = ARGUMENTS.get(name) or (_any if name in also else None)
        if kind is None:
            raise ValueError(
                f"model_args: {short(name)} is no argument that shapes a network, or not one that is allowed"
            )
        if not kind(value):
            raise ValueError(f"model_args: {name} must be {kind.says}, got {short(value)}")


def check_plug(lines: Any) -> None:
    """Raise ValueError unless ``lines`` is what :func:`transcnn.plug_spec` gives."""
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"plug must be the lines of a plug spec, got {short(lines)}")
    taken = set()
    for line in lines:
        if missing := [name for name in PLUG if name not in line and name not in ("inside", "hooked", "ndim", "layer")]:
            raise ValueError(f"plug: {missing[0]} is missing in {short(line)}")
        for name, value in line.items():
            if name not in PLUG:
                raise ValueError(f"plug: there is no {short(name)}, only {', '.join(PLUG)}")
            if not PLUG[name](value):
                raise ValueError(f"plug: {name} must be {PLUG[name].says}, got {short(value)}")
        ndim, sizes = line.get("ndim", 2), (line["grid_sizes"], line["pool_ratios"])
        if len(line["stride"]) != ndim or len(sizes[0]) != len(sizes[1]):
            raise ValueError("plug: stride is a number a dimension, and grid_sizes and pool_ratios are equally many")
        if any(isinstance(size, list | tuple) and len(size) != ndim for level in sizes for size in level):
            raise ValueError(f"plug: grid_sizes and pool_ratios hold a number a level, or {ndim}, got {short(sizes)}")
        if line["at"] in taken:
            raise ValueError(f"plug: {short(line['at'])} occurs twice")
        taken.add(line["at"])


def check_task_args(task: str, args: Mapping[str, Any], classes: int) -> None:
    """Raise ValueError unless a task's settings are of the right kinds; unknown ones, which nothing reads, may stay."""
    args = with_new_names(args)
    for name, kind in TASKS[task].items():
        if name in args and not kind(args[name]):
            raise ValueError(f"task_args: {name} must be {kind.says}, got {short(args[name])}")
    if missing := [name for name in REQUIRED.get(task, ()) if name not in args]:
        raise ValueError(f"task_args: {missing[0]} is missing")
    for name in ("scale_range", "side_range"):
        if name in args and (not isinstance(args[name], list | tuple) or len(args[name]) != 2):
            raise ValueError(f"task_args: {name} must be two numbers, got {short(args[name])}")
    for name, fits in _PER_CLASS.items():
        values = args.get(name)
        if values is not None and not (isinstance(values, list) and len(values) == classes and all(map(fits, values))):
            raise ValueError(
                f"task_args: {name} must have one entry for each of {classes} classes, got {short(values)}"
            )


def _is_colour(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(_is_int(v) and 0 <= v <= 255 for v in value)


_PER_CLASS: dict[str, Check] = {
    "label_ids": lambda v: isinstance(v, str) or (_is_int(v) and abs(v) < 1 << 63),
    "thresholds": lambda v: _is_number(v) and 0 <= v <= 1,
    "mean": lambda v: _is_number(v) and abs(v) < 1e30,
    "std": lambda v: _is_number(v) and 0 < v < 1e30,
    "counts": lambda v: _is_int(v) and v >= 0,
    "shares": lambda v: _is_number(v) and 0 <= v <= 1,
    "colours": _is_colour,
}


def short(value: Any) -> str:
    """A value for a message, on one line and not longer than 80 characters."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a number of many digits"
    if isinstance(value, dict | list | tuple | set):
        try:
            check_plain(value, "a value")
        except ValueError as error:
            return str(error)
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
