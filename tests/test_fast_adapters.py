"""optimize() keeps what adapters add: modules of other classes, with a convolution's attributes, in its place."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from transcnn.fast import fold_batchnorms, optimize
from transcnn.fast.inference.blocks import FastInvertedResidual

PLACES = [
    "stem.0",
    "stages.0.blocks.0.attn.local.0.qkv",
    "stages.0.blocks.0.attn.proj",
    "stages.1.blocks.0.irb.conv1.0",
    "stages.1.downsample.conv",
    "stages.2.blocks.0.attn.q",
    "stages.3.blocks.0.attn.qkv",
    "head.fc",
]
X = torch.randn(2, 3, 45, 38, generator=torch.Generator().manual_seed(0))


class LowRank(nn.Module):
    """As peft's: a layer, the product of two small ones beside it, and the layer's ``weight`` as its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A, self.lora_B = (copy.deepcopy(layer) for _ in range(2))
        if isinstance(layer, nn.Conv2d):
            self.lora_B = nn.Conv2d(layer.out_channels, layer.out_channels, 1)
        else:
            self.lora_B = nn.Linear(layer.out_features, layer.out_features)
        nn.init.normal_(self.lora_B.weight, std=0.2)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def network() -> nn.Module:
    model = timm.create_model("transcnn_test", num_classes=4).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=1 / p[0].numel() ** 0.5) if p.ndim > 1 else nn.init.uniform_(p, 0.5, 1.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def check(adapted: nn.Module, without: nn.Module) -> nn.Module:
    """The optimized network, which equals the adapted one, which is far from the network without adapters."""
    optimized = optimize(adapted)
    with torch.no_grad():
        wanted = adapted(X)
        largest = wanted.abs().max()
        assert (wanted - without(X)).abs().max() > 0.01 * largest
        for fast in (optimized, optimize(optimized)):
            assert (fast(X) - wanted).abs().max() <= 1e-5 * largest
        assert (optimize(adapted, "bf16")(X) - wanted).abs().max() <= 0.1 * largest
        folded = copy.deepcopy(adapted)
        fold_batchnorms(folded)
        assert (folded(X) - wanted).abs().max() <= 1e-5 * largest
        assert torch.equal(adapted(X), wanted)
    return optimized


@pytest.mark.parametrize("place", PLACES)
def test_a_layer_with_an_adapter_stays_and_the_others_are_fast(place):
    adapted = network()
    without = copy.deepcopy(adapted)
    adapted.set_submodule(place, LowRank(adapted.get_submodule(place)))
    optimized = check(adapted, without)
    assert any(isinstance(module, FastInvertedResidual) for module in optimized.modules())


@pytest.mark.parametrize("dora", [False, True])
def test_a_network_of_peft(dora):
    peft = pytest.importorskip("peft")
    model = network()
    targets = [name for name in PLACES if name != "head.fc"]
    settings = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["head.fc"], use_dora=dora)
    adapted = peft.get_peft_model(copy.deepcopy(model), settings).eval()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.3 / p[0].numel() ** 0.5)
    check(adapted, model)
    with torch.no_grad():  # and what peft's own model holds
        wanted = adapted(X)
        assert (optimize(adapted.base_model.model)(X) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
