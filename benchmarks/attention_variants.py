"""The same network with another attention in its blocks: what benchmarks/attention.py compares.

``create_model("attention_host", variant=...)`` makes one; ``make_local`` and the like make those of
``transcnn_nano`` without arguments, for ``transcnn compare --reference benchmarks/attention_variants.py:make_local``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import create_model, is_model, register_model
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from transcnn import HMHSA, TransCNN
from transcnn.attention import LocalStep, global_attention, merge
from transcnn.backbone import _init_weights, norm_layers

VARIANTS: dict[str, str] = {
    "none": "no attention: inverted residuals alone",
    "local": "the local step alone: attention inside grids",
    "global": "the global step alone: attention to merged tokens, as PVTv2's linear attention",
    "swin": "windows, shifted in every other block, with relative positions (Swin, timm's)",
    "full": "plain attention of all positions to all",
    "hmhsa2": "H-MHSA of two levels, as published",
    "hmhsa3": "H-MHSA of three levels",
}


class NoAttention(nn.Module):
    """Adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(1)


class LocalAttention(nn.Module):
    """Proj(A₁): H-MHSA without its global step, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, head_dim: int, grid_size: int, norm_layer: Any) -> None:
        super().__init__()
        self.step = LocalStep(norm_layer(dim), nn.Conv2d(dim, 3 * dim, 1), norm_layer(dim), head_dim, grid_size)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.step(x))


class GlobalAttention(nn.Module):
    """Each position attends to the merged tokens of its own map, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, head_dim: int, ratio: int, norm_layer: Any) -> None:
        super().__init__()
        self.norm, self.ds_norm = norm_layer(dim), norm_layer(dim)
        self.q, self.kv, self.proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.head_dim, self.ratio = head_dim, ratio

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(self.ds_norm(merge(x, self.ratio))).chunk(2, dim=1)
        return self.proj(global_attention(self.q(self.norm(x)), k, v, self.head_dim))


class ShiftedWindows(nn.Module):
    """timm's window attention, (B, C, H, W) -> (B, C, H, W); ``shift`` 0 leaves the windows where they are."""

    def __init__(self, dim: int, head_dim: int, window: int, shift: int, norm_layer: Any) -> None:
        super().__init__()
        self.norm = norm_layer(dim)
        self.swin = SwinTransformerBlock(
            dim,
            (window, window),
            num_heads=dim // head_dim,
            window_size=window,
            shift_size=shift,
            always_partition=True,  # any size of map, larger ones than in training too
            dynamic_mask=True,
        )
        self.swin.norm1 = self.swin.norm2 = self.swin.mlp = nn.Identity()  # the host's norm and its inverted residual

    def forward(self, x: Tensor) -> Tensor:
        return self.swin._attn(self.norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def attention_host(
    pretrained: bool = False, variant: str = "hmhsa2", host: str = "transcnn_nano", side: int = 32, **kwargs: Any
) -> nn.Module:
    """``host`` with the attention of one of ``VARIANTS`` in every block, for images of about ``side`` pixels.

    Grids, windows and ratios are the host's own; no grid or window is larger than the map at ``side``.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    model = create_model(host, **kwargs)
    assert isinstance(model, TransCNN)
    norm = norm_layers()["batchnorm2d"]
    for info, stage in zip(model.feature_info, model.stages, strict=True):
        for i, block in enumerate(stage.blocks):  # pyright: ignore
            block.attn = exchanged(variant, block.attn, max(1, side // info["reduction"]), i, norm)
    return model.apply(_init_weights)  # the host's, so that none of them starts better than others


def exchanged(variant: str, attn: HMHSA, side: int, nth: int, norm: Any) -> nn.Module:
    """What takes the place of ``attn`` in the ``nth`` block of a stage whose maps have ``side`` positions a side."""
    dim, head_dim = attn.dim, attn.head_dim
    if not attn.grid_sizes:  # the last stage, where the host's attention is plain: all see each other anyway
        grid, ratio = side, 1
    else:
        grid, ratio = min(attn.grid_sizes[0], side), attn.pool_ratios[0]
    if variant == "none":
        return NoAttention()
    if variant == "local":
        return LocalAttention(dim, head_dim, grid, norm)
    if variant == "global":
        return GlobalAttention(dim, head_dim, ratio, norm)
    if variant == "swin":
        shift = grid // 2 if nth % 2 and grid < side else 0
        return ShiftedWindows(dim, head_dim, grid, shift, norm)
    if variant == "full" and attn.grid_sizes:
        return HMHSA(dim, head_dim=head_dim, grid_sizes=(), pool_ratios=(), norm_layer=norm)
    if variant == "hmhsa3" and attn.grid_sizes:
        grids, ratios = (*attn.grid_sizes, min(4, max(1, side // ratio))), (*attn.pool_ratios, 2)
        return HMHSA(dim, head_dim=head_dim, grid_sizes=grids, pool_ratios=ratios, norm_layer=norm)
    return attn


if not is_model("attention_host"):  # compare imports this file by its path, perhaps once more
    register_model(attention_host)


def _factory(variant: str) -> Any:
    return partial(create_model, "attention_host", variant=variant)


make_none, make_local, make_global = map(_factory, ("none", "local", "global"))
make_swin, make_full, make_hmhsa2, make_hmhsa3 = map(_factory, ("swin", "full", "hmhsa2", "hmhsa3"))
