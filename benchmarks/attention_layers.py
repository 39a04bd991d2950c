"""Attention of other papers that no kept library has, or not as a layer for maps of any size: for plug(layer=...).

Each is (B, C, H, W) -> (B, C, H, W), made from a number of channels.
"""

from __future__ import annotations

import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from torch import Tensor, nn

__all__ = ["BAM", "SCA", "botnet_attention"]


class BAM(nn.Module):
    """``x·σ(M_c(x) + M_s(x))``: Park et al., "BAM: Bottleneck Attention Module", arXiv 1807.06514, equations 1 to 5.

    The identity that the paper adds is what :func:`transcnn.plug` adds anyway.
    """

    def __init__(self, dim: int, reduction: int = 16, dilation: int = 4) -> None:
        super().__init__()
        few = max(1, dim // reduction)
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, few, 1), nn.ReLU(), nn.Conv2d(few, dim, 1), nn.BatchNorm2d(dim)
        )
        layers: list[nn.Module] = [nn.Conv2d(dim, few, 1), nn.BatchNorm2d(few), nn.ReLU()]
        for _ in range(2):
            layers += [nn.Conv2d(few, few, 3, 1, dilation, dilation), nn.BatchNorm2d(few), nn.ReLU()]
        self.spatial = nn.Sequential(*layers, nn.Conv2d(few, 1, 1), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.channel(x) + self.spatial(x))


class SCA(nn.Module):
    """Channels first, then positions: Chen et al., "SCA-CNN", arXiv 1611.05594, section 3, without a caption's state.

    Both weights are softmaxes; here they are times the number of channels and of positions, so that their mean is 1.
    """

    def __init__(self, dim: int, hidden: int = 32) -> None:
        super().__init__()
        self.channel = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))  # equation 8
        self.spatial = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.Tanh(), nn.Conv2d(hidden, 1, 1))  # equation 6

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))  # (B, C)
        x = x * (self.channel(means[..., None])[..., 0].softmax(1) * x.shape[1])[..., None, None]
        weights = self.spatial(x)  # (B, 1, H, W)
        return x * (weights.flatten(1).softmax(1) * weights[0].numel()).view_as(weights)


def botnet_attention(dim: int, side: int, heads: int = 4) -> nn.Module:
    """Attention of all positions with relative positions: Srinivas et al., arXiv 2101.11605, for maps of one size."""
    return BottleneckAttn(dim, feat_size=(side, side), num_heads=heads)
