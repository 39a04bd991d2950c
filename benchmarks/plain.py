"""The networks as the paper's formulas read, in plain eager PyTorch: what ``transcnn.optimize`` is measured against.

Maps are (B, C, H, W) throughout, attention is a matrix product, a softmax and a matrix product, and H and W must divide
by the grids, as in the released code, which this stands in for and shares no line with. Weights are those of
``transcnn.create_model(name)``; time it with

    transcnn compare --models transcnn_tiny --reference benchmarks/plain.py:plain
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import transcnn
from transcnn.attention import LocalStep


def plain(model: nn.Module | str = "transcnn_tiny") -> nn.Module:
    """``model`` (or a new network of that name), its attention computed the plain way from now on."""
    model = transcnn.create_model(model) if isinstance(model, str) else model
    for module in model.modules():
        if isinstance(module, LocalStep):
            module.forward = MethodType(local_step, module)
        elif isinstance(module, transcnn.HMHSA):
            module.forward = MethodType(hmhsa, module)
    return model


def local_step(self: LocalStep, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    g, heads = self.grid_size, channels // self.head_dim
    rows, columns = height // g, width // g
    qkv = self.qkv(self.norm(x)).reshape(batch, 3, heads, self.head_dim, rows, g, columns, g)
    q, k, v = qkv.permute(1, 0, 2, 4, 6, 5, 7, 3).reshape(3, -1, g * g, self.head_dim)  # (B·h·G, N, d)
    out = attention(q, k, v).reshape(batch, heads, rows, columns, g, g, self.head_dim)
    return self.grid_norm(x + out.permute(0, 1, 6, 2, 4, 3, 5).reshape(x.shape))


def hmhsa(self: transcnn.HMHSA, x: Tensor) -> Tensor:
    if not self.local:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        a = 0
    else:
        (step,), (ratio,) = self.local, self.pool_ratios  # two levels, as released
        a = step(x)
        q = self.q(a)
        k, v = self.kv(self.ds_norm(F.avg_pool2d(a, ratio))).chunk(2, dim=1)
    q, k, v = (t.reshape(len(x) * self.num_heads, self.head_dim, -1).transpose(1, 2) for t in (q, k, v))
    return self.proj(attention(q, k, v).transpose(1, 2).reshape(x.shape) + a)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1) @ v
