"""The networks by name: TransCNN's and HAT-Net's published sizes, and five of ours.

Importing this module registers every name of ``VARIANTS`` with timm, so ``timm.create_model`` knows them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import nn

from .backbone import TransCNN
from .checkpoints.published import convert_state_dict
from .levels import resolve_auto
from .weights.labels import CIFAR10, TINY_IMAGENET

__all__ = ["PAPER_TOP1", "VARIANTS", "create_model", "list_models"]

_HATNET: dict[str, Any] = dict(
    design="hatnet", norm_layer="groupnorm1", expansions=(8, 8, 4, 4), grid_sizes=(8, 7, 7, None)
)

VARIANTS: dict[str, dict[str, Any]] = {
    "transcnn_tiny": dict(dims=(64, 128, 256, 512)),
    "transcnn_small": dict(dims=(64, 128, 256, 512), depths=(3, 4, 8, 3), expansions=(4, 4, 6, 6)),
    "transcnn_medium": dict(dims=(64, 128, 320, 640), depths=(3, 4, 12, 3), expansions=(4, 4, 6, 6)),
    "transcnn_large": dict(dims=(64, 128, 384, 768), depths=(3, 4, 16, 3), expansions=(4, 4, 6, 6)),
    "hatnet_tiny": dict(_HATNET, dims=(48, 96, 240, 384), head_dim=48, depths=(2, 2, 6, 3), kernel_sizes=(3, 3, 3, 3)),
    "hatnet_small": dict(_HATNET, dims=(64, 128, 320, 512), depths=(2, 3, 8, 3), kernel_sizes=(3, 3, 3, 3)),
    "hatnet_medium": dict(_HATNET, dims=(64, 128, 320, 512), depths=(3, 6, 18, 3)),
    "hatnet_large": dict(_HATNET, dims=(64, 128, 320, 640), depths=(3, 8, 27, 3), kernel_sizes=(3, 3, 3, 3)),
    # Ours: for images of 32x32, for those of 64 to 256 pixels, and for tests in milliseconds.
    "transcnn_nano": dict(
        dims=(64, 128, 160),
        depths=(1, 3, 2),
        expansions=(2, 2, 3),
        kernel_sizes=(3, 3, 3),
        head_dim=None,
        stem_width=32,
        stem_stride=2,
        grid_sizes=(8, 4, None),
        pool_ratios=(4, 2, None),
        drop_rate=0.0,
    ),
    "transcnn_micro": dict(
        dims=(32, 64, 160, 256),
        depths=(1, 2, 4, 2),
        expansions=(2, 3, 3, 3),
        kernel_sizes=(3, 3, 3, 3),
        head_dim=32,
        stem_stride=2,
        grid_sizes=(8, 8, 4, None),
        pool_ratios=(8, 4, 2, None),
        drop_rate=0.0,
    ),
    "transcnn_test": dict(
        dims=(8, 16, 16, 32),
        depths=(1, 1, 1, 1),
        expansions=(2, 2, 2, 2),
        kernel_sizes=(3, 3, 3, 3),
        head_dim=8,
        stem_width=8,
        grid_sizes=(4, 4, 2, None),
        pool_ratios=(4, 2, 2, None),
        drop_rate=0.0,
    ),
}

# Ours for sequences and volumes. timm's registry doesn't hold them: its networks take images.
VARIANTS_ND: dict[str, dict[str, Any]] = {
    "transcnn1d_nano": dict(
        ndim=1,
        in_chans=1,
        dims=(24, 48, 64, 96, 128),
        depths=(1, 1, 1, 2, 2),
        expansions=(2, 2, 2, 2, 3),
        kernel_sizes=(9, 9, 9, 9, 9),
        head_dim=None,
        grid_sizes=(64, 64, 64, 64, None),
        pool_ratios=(32, 16, 8, 4, None),
        drop_rate=0.0,
    ),
    "transcnn3d_nano": dict(
        ndim=3,
        in_chans=1,
        dims=(24, 48, 96),
        depths=(1, 2, 2),
        expansions=(2, 2, 2),
        kernel_sizes=(3, 3, 3),
        head_dim=None,
        stem_stride=2,
        grid_sizes=(4, 4, None),
        pool_ratios=(4, 2, None),
        drop_rate=0.0,
    ),
}

# ImageNet-1K top-1 in percent as the papers report them (arXiv 2106.03180, v1 for TransCNN); not measured here.
PAPER_TOP1 = {
    "transcnn_tiny": 80.4,
    "transcnn_small": 83.1,
    "transcnn_medium": 83.8,
    "transcnn_large": 84.2,
    "hatnet_tiny": 79.8,
    "hatnet_small": 82.6,
    "hatnet_medium": 84.0,
    "hatnet_large": 84.2,
}


def _cfg(file: str | None = None, size: int = 256, **changes: Any) -> dict[str, Any]:
    """timm's description of one set of weights; ``file`` is under the releases of the paper's repository."""
    source = "https://github.com/yun-liu/TransCNN"
    return {
        "url": f"{source}/releases/download/{file}" if file else "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (-(-size // 32), -(-size // 32)),
        "fixed_input_size": False,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2106.03180",
        "origin_url": source,
        **changes,
    }


_SIZES = ("tiny", "small", "medium", "large")

default_cfgs = generate_default_cfgs(
    {
        **{f"transcnn_{size}.in1k": _cfg(f"v1.0/TransCNN-{size.title()}.pth") for size in _SIZES},
        **{f"hatnet_{size}.in1k": _cfg(f"v2.0/HAT-Net_{size.title()}.pth", 224) for size in _SIZES},
        # Ours, in the package: made by commands/pack_weights.py.
        "transcnn_nano.cifar10": {
            **_cfg(size=32, num_classes=10, crop_pct=1.0, pool_size=(4, 4), origin_url="", license="apache-2.0"),
            "file": str(Path(__file__).with_name("weights") / "transcnn_nano.cifar10.safetensors"),
            "label_names": CIFAR10,
        },
        "transcnn_nano.untrained": _cfg(size=32, num_classes=10, crop_pct=1.0, pool_size=(4, 4)),
        "transcnn_micro.tiny_imagenet": {
            **_cfg(size=64, num_classes=200, crop_pct=1.0, pool_size=(4, 4), origin_url="", license="apache-2.0"),
            "file": str(Path(__file__).with_name("weights") / "transcnn_micro.tiny_imagenet.safetensors"),
            "label_names": TINY_IMAGENET,
        },
        "transcnn_micro.untrained": _cfg(size=64, num_classes=200, crop_pct=1.0, pool_size=(4, 4)),
        "transcnn_test.untrained": _cfg(size=64, num_classes=10, crop_pct=1.0),
    }
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> TransCNN:
    kwargs = resolve_auto(VARIANTS[variant], {**VARIANTS[variant], **kwargs}, pretrained)
    return build_model_with_cfg(
        TransCNN,
        variant,
        pretrained,
        pretrained_filter_fn=convert_state_dict,
        feature_cfg={"out_indices": tuple(range(len(kwargs["dims"]))), "flatten_sequential": True},
        kwargs_filter=("img_size",),  # any size works, so there is nothing to set
        **kwargs,
    )


@register_model
def transcnn_tiny(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """TransCNN-Tiny, 13.3 M parameters (2106.03180v1, table 1)."""
    return _create("transcnn_tiny", pretrained, **kwargs)


@register_model
def transcnn_small(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """TransCNN-Small, 26.5 M parameters (2106.03180v1, table 1)."""
    return _create("transcnn_small", pretrained, **kwargs)


@register_model
def transcnn_medium(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """TransCNN-Medium, 48.3 M parameters (2106.03180v1, table 1)."""
    return _create("transcnn_medium", pretrained, **kwargs)


@register_model
def transcnn_large(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """TransCNN-Large, 80.0 M parameters (2106.03180v1, table 1)."""
    return _create("transcnn_large", pretrained, **kwargs)


@register_model
def hatnet_tiny(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """HAT-Net-Tiny, 12.7 M parameters (2106.03180, later version)."""
    return _create("hatnet_tiny", pretrained, **kwargs)


@register_model
def hatnet_small(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """HAT-Net-Small, 25.7 M parameters (2106.03180, later version)."""
    return _create("hatnet_small", pretrained, **kwargs)


@register_model
def hatnet_medium(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """HAT-Net-Medium, 42.9 M parameters (2106.03180, later version)."""
    return _create("hatnet_medium", pretrained, **kwargs)


@register_model
def hatnet_large(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """HAT-Net-Large, 63.1 M parameters (2106.03180, later version)."""
    return _create("hatnet_large", pretrained, **kwargs)


@register_model
def transcnn_nano(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """Ours, for images of about 32x32: at most 1.5 M parameters, a stem of stride 2."""
    return _create("transcnn_nano", pretrained, **kwargs)


@register_model
def transcnn_micro(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """Ours, for images of 64 to 256 pixels and dense prediction on them: at most 4 M parameters, a stem of stride 2."""
    return _create("transcnn_micro", pretrained, **kwargs)


@register_model
def transcnn_test(pretrained: bool = False, **kwargs: Any) -> TransCNN:
    """Ours, for tests: a few thousand parameters, a forward pass in milliseconds."""
    return _create("transcnn_test", pretrained, **kwargs)


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Make a network by name: ``timm.create_model``, for which importing this package has registered its names.

    Args:
        name: One of :func:`list_models`, with a tag or without (``transcnn_tiny.in1k``), or whatever timm knows,
            ``local-dir:DIRECTORY`` and ``hf-hub:ID`` included; or one for sequences or volumes, ``transcnn1d_nano`` or
            ``transcnn3d_nano``, which have no published weights and one input channel unless told otherwise.
        pretrained: Load the published weights; they are downloaded once and kept in torch.hub's cache.
        kwargs: ``num_classes``, ``in_chans``, ``features_only`` and the like, and any argument of :class:`TransCNN`.

    Raises:
        ValueError: No such network, or an argument outside its values.
    """
    if name in VARIANTS_ND:
        if pretrained:
            raise ValueError(f"there are no weights of {name}; pretrained must be False")
        kwargs = resolve_auto(VARIANTS_ND[name], {**VARIANTS_ND[name], **kwargs}, pretrained)
        kwargs.pop("img_size", None)  # any size works
        return TransCNN(**kwargs)
    if ":" not in name and not is_model(name):
        raise ValueError(f"no network is called {name!r}; this package has {', '.join((*VARIANTS, *VARIANTS_ND))}")
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def list_models() -> list[str]:
    """The names of this package's networks for images; ``timm.create_model`` knows them too.

    :func:`create_model` also makes ``transcnn1d_nano`` for sequences and ``transcnn3d_nano`` for volumes.
    """
    return list(VARIANTS)
