"""Parts of networks: modules of several names when a network is optimized, and what becomes of parts later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import LayerScale2d
from torch import Tensor, nn

from test_other_cnns import randomised, relative
from transcnn.fast import fold_batchnorms, optimize

CHANNELS = 16


def conv(size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, size, padding=size // 2)


def scale() -> LayerScale2d:
    return LayerScale2d(CHANNELS, init_values=0.3)


class Network(nn.Module):
    """Modules with the names given, run by a function of them and a map; one that can't be traced if need be."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], traced: bool = True, **modules: nn.Module) -> None:
        super().__init__()
        self.run, self.traced = run, traced
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x) if self.traced or x.sum() != 0.5 else x


def twice_named(order: str) -> nn.Module:
    first, norm, factor = conv(), nn.BatchNorm2d(CHANNELS), scale()
    more = {"list": nn.ModuleList([first, norm, factor]), "a": first, "n": norm, "s": factor}
    more |= {"again": first, "norm": norm, "scale": factor}
    run = {
        "by other names": lambda m, x: m.scale(m.norm(m.again(x))),
        "by both": lambda m, x: m.list[2](m.norm(m.a(x))),
        "in a list": lambda m, x: m.s(m.list[1](m.list[0](x))),
    }
    return Network(run[order], **more)


def shared(kind: str) -> nn.Module:
    """Two parts, traced one by one, that share a layer or the module which holds it."""
    layer, other, norm, factor = conv(), conv(), nn.BatchNorm2d(CHANNELS), scale()
    other.weight = layer.weight
    held, both = nn.Sequential(layer), nn.Sequential(layer, norm)
    p, q = {
        "a layer that norms follow": (nn.Sequential(layer, norm), nn.Sequential(layer, nn.BatchNorm2d(CHANNELS))),
        "a layer that one norm follows": (nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, norm)),
        "a norm": (nn.Sequential(layer, norm), nn.Sequential(nn.Tanh(), norm)),
        "what holds the layer": (nn.Sequential(held, norm), nn.Sequential(held, nn.Tanh())),
        "a layer that is scaled": (nn.Sequential(layer, scale()), nn.Sequential(layer, scale())),
        "a layer that is scaled once": (nn.Sequential(layer, scale()), nn.Sequential(layer, nn.Tanh())),
        "a scale": (nn.Sequential(layer, factor), nn.Sequential(conv(), factor)),
        "weights": (nn.Sequential(layer, norm), nn.Sequential(other, factor)),
        "all": (both, both),
    }[kind]
    return Network(lambda m, x: m.q(m.p(x)), traced=False, p=p, q=q)


SHARED = [
    *("a layer that norms follow", "a layer that one norm follows", "a norm", "what holds the layer"),
    *("a layer that is scaled", "a layer that is scaled once", "a scale", "weights", "all"),
]


@pytest.mark.parametrize("make", [twice_named, shared])
@torch.no_grad()
def test_modules_of_several_names_are_folded_under_each_or_not_at_all(make):
    torch.manual_seed(0)
    x = torch.randn(2, CHANNELS, 7, 6)
    for kind in ("by other names", "by both", "in a list") if make is twice_named else SHARED:
        model = randomised(make(kind))
        fast = optimize(model)
        assert relative(fast(x), model(x)) <= 2e-6, kind
        if make is twice_named or kind == "all":
            assert not any(isinstance(module, nn.BatchNorm2d | LayerScale2d) for module in fast.modules()), kind
    assert fold_batchnorms(twice_named("by both").eval()) == ["list.1"]


@torch.no_grad()
def test_pooling_with_one_number_for_both_sides():
    x = torch.randn(1, CHANNELS, 8, 7).to(memory_format=torch.channels_last)
    pool = nn.MaxPool2d((3,), (2,), (1,))  # pyright: ignore
    assert torch.equal(optimize(nn.Sequential(pool))(x), pool(x))
