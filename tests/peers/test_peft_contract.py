"""What peft does with a network: low-rank adapters on its convolutions and its head, merged and saved."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import SMALL, images, small
from torch import nn

peft = pytest.importorskip("peft")

each_kind = pytest.mark.parametrize("kind", SMALL)
ADAPTERS = {
    "lora": lambda **names: peft.LoraConfig(r=4, **names),
    "dora": lambda **names: peft.LoraConfig(r=4, use_dora=True, **names),
    "loha": lambda **names: peft.LoHaConfig(r=4, **names),
    "lokr": lambda **names: peft.LoKrConfig(r=4, **names),
}


def convolutions(model: nn.Module) -> list[str]:
    """Those that adapters take: of depthwise ones peft wants a rank that their channels divide."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]


@each_kind
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_on_every_convolution_learn_and_merge(kind, adapter):
    model, x = small(kind), images()
    names = convolutions(model)
    head = next(name for name, m in model.named_modules() if m is model.get_classifier())
    config = ADAPTERS[adapter](target_modules=[*names, head])
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    assert len(layers) == len(names) + 1
    adapted(x).square().sum().backward()
    learnt = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in learnt.values())
    with torch.no_grad():
        if adapter != "lokr":  # whose first product isn't zero
            torch.testing.assert_close(adapted(x), model(x), rtol=1e-4, atol=1e-4)
        for p in learnt.values():
            p.add_(torch.randn_like(p), alpha=0.01)
        expected = adapted(x)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-3, atol=1e-3)
    assert (expected - model(x)).abs().max() > 1e-3
    assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
    assert set(merged.state_dict()) == set(model.state_dict())


@each_kind
def test_adapters_are_saved_without_the_network(kind, tmp_path):
    model, x = small(kind), images()
    head = next(name for name, m in model.named_modules() if m is model.get_classifier())
    config = peft.LoraConfig(r=4, target_modules=convolutions(model)[:6], modules_to_save=[head])
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        torch.testing.assert_close(again(x), adapted(x), rtol=0, atol=0)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(x), model(x), rtol=0, atol=0)
