"""Networks as people write and use them: modules of several names, views of maps, parts by themselves, transforms."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm2d, LayerScale2d
from torch import Tensor, nn

from test_other_cnns import randomised, relative
from transcnn import HMHSA
from transcnn.checkpoints.loading import Loaded
from transcnn.compare.engines import prepare_training
from transcnn.errors import UserError
from transcnn.export.exporting import _as_exported
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


def inverted_residual() -> nn.Sequential:
    """What kernels compute as a whole, so that it is replayed from the third call on."""
    middle = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
    return nn.Sequential(conv(1), nn.ReLU(), middle, nn.ReLU(), nn.Dropout(0.5), conv(1))


def often(module: nn.Module, x: Tensor) -> Tensor:
    """The result of the fourth call, which replays what it can."""
    with torch.no_grad():
        return [module(x) for _ in range(4)][-1]


@pytest.fixture
def sequence() -> tuple[nn.Module, nn.Module, Tensor]:
    """A sequence, the same as a part of an optimized network that has been called, and an input."""
    plain, x = randomised(inverted_residual()), torch.randn(1, CHANNELS, 8, 8)
    fast = optimize(nn.Sequential(plain))[0]  # pyright: ignore
    assert relative(often(fast, x), often(plain, x)) <= 2e-6
    return plain, fast, x


def test_sequences_that_grow_shrink_and_are_cut(sequence):
    plain, fast, x = sequence
    for change in (
        lambda row: row.append(nn.Tanh()),
        lambda row: row.insert(1, nn.Tanh()),
        lambda row: row.pop(0),
        lambda row: row.extend([nn.Hardswish(), conv().requires_grad_(False).eval()]) if len(row) < 7 else row.pop(-1),
    ):
        for row in (plain, fast):
            change(row)
        assert relative(often(fast, x), often(plain, x)) <= 2e-6
    assert relative(often(fast[1:3], x), often(plain[1:3], x)) <= 2e-6
    stages = optimize(timm.create_model("transcnn_test", dims=(32, 32, 32, 64), head_dim=32).eval()).stages
    x = torch.randn(1, 32, 16, 16)
    assert torch.equal(often(stages[:2], x), often(stages[1], often(stages[0], x)))


def test_dropout_that_is_switched_on_again(sequence):
    _, fast, x = sequence
    expected = often(fast, x)
    fast[4].train()
    with torch.no_grad():
        assert len({float(fast(x).sum()) for _ in range(4)}) == 4
    fast[4].eval()
    assert torch.equal(often(fast, x), expected)


def test_parts_alone_have_gradients_or_say_that_they_have_none(sequence):
    plain, fast, x = sequence
    others = [nn.MaxPool2d(2), nn.LayerNorm(8), nn.Linear(8, 3), conv()]
    others = list(zip(others, optimize(nn.Sequential(*others)), strict=True))  # pyright: ignore
    x = x.to(memory_format=torch.channels_last)
    for theirs, ours in ((plain, fast), *others):
        expected, found = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours(found).square().sum().backward()
        theirs(expected).square().sum().backward()
        assert relative(found.grad, expected.grad) <= 1e-5, type(theirs)
    fast[0].weight.requires_grad_()  # by the weights alone
    fast(x).square().sum().backward()
    plain.zero_grad()
    plain(x).square().sum().backward()
    assert relative(fast[0].weight.grad, plain[0].weight.grad) <= 1e-5
    stages = optimize(timm.create_model("transcnn_test", dims=(32, 32, 32, 64), head_dim=32).eval()).stages
    often(stages, x := torch.randn(1, 32, 16, 16))
    with pytest.raises(UserError, match="inference-only"):
        stages(x.requires_grad_())


class Watch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


def test_modules_that_keep_what_they_see_see_each_call():
    fast = optimize(timm.create_model("transcnn_test", dims=(32, 32, 32, 64), head_dim=32).eval())
    fast.stages[1] = nn.Sequential(fast.stages[1], watch := Watch())
    for _ in range(4):
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            fast(x)
            assert torch.equal(watch.seen, fast.stages[:2](fast.stem(x)))


def test_shallow_copies_with_weights_of_their_own():
    block = optimize(nn.Sequential(HMHSA(32, head_dim=16, grid_sizes=[4], pool_ratios=[2]).eval()))[0]  # pyright: ignore
    x = torch.randn(1, 32, 8, 8)
    expected, copied = often(block, x), copy.copy(block)
    copied._modules = copied._modules | {"proj": copy.deepcopy(block.proj)}
    copied.proj.weight.mul_(2)
    copied.proj.bias.mul_(2)
    assert relative(often(copied, x), 2 * expected) <= 1e-6
    assert torch.equal(often(block, x), expected)
    with torch.no_grad():
        assert torch.equal(block(x=x, mask=None), expected)  # by keyword, as the plain one


class Views(nn.Module):
    """As many a tutorial has it; and with a view in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(CHANNELS * 12, 5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.features(x)
        x = x.view(torch.int32).view(x.dtype) if x.dtype == torch.float32 else x
        return self.head(x.view(x.size(0), -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_views_that_only_contiguous_maps_have(dtype):
    model, x = randomised(Views()), torch.randn(3, CHANNELS, 8, 6)
    fast, bound = optimize(model, dtype), 2e-6 if dtype == torch.float32 else 2e-2
    for calls in (2, 3, 4):  # the first is tried twice
        assert relative(fast(x), model(x)) <= bound
        assert fast.calls == calls
    assert relative(pickle.loads(pickle.dumps(fast))(x), model(x)) <= bound
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fast(torch.randn(1, CHANNELS, 8, 8))


KINDS: dict[str, dict[str, Any]] = {
    "transcnn": {},
    "three levels": dict(grid_sizes=((4, 2), (4, 2), 4, None), pool_ratios=((2, 2), (2, 3), 2, None)),
    "hatnet": dict(design="hatnet", norm_layer="groupnorm1"),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of some operations under vmap
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_of_batches(kind):
    model = randomised(timm.create_model("transcnn_test", num_classes=5, **KINDS[kind]))
    fast, x = optimize(model), torch.randn(3, 1, 3, 39, 32)
    often(fast, x[0])
    assert relative(torch.vmap(fast)(x), torch.stack([model(images) for images in x])) <= 1e-5


@torch.no_grad()
def test_hooks_on_the_attention_of_an_optimized_block_are_called():
    model, x = randomised(timm.create_model("transcnn_test", num_classes=5)), torch.randn(1, 3, 32, 32)
    fast = optimize(model)
    expected = often(fast, x)
    for net in (model, fast):
        handle = net.stages[1].blocks[0].attn.register_forward_hook(lambda module, args, y: 2 * y)
    assert relative(often(fast, x), model(x)) <= 1e-5 < relative(fast(x), expected)
    handle.remove()
    assert torch.equal(often(fast, x), expected)


class Frozen(nn.Sequential):
    """Whose ``train`` forgets to return the network, as many do that keep norms as they are."""

    def train(self, mode: bool = True) -> None:  # pyright: ignore
        super().train(mode)
        self[1].eval()


@torch.no_grad()
def test_a_network_whose_train_returns_nothing():
    model, x = Frozen(conv(), nn.BatchNorm2d(CHANNELS), nn.ReLU()), torch.randn(1, CHANNELS, 5, 5)
    randomised(model)
    fast = optimize(model)
    assert fast.eval() is fast
    assert relative(fast(x), model(x)) <= 2e-6
    prepare_training(nn.Sequential(model, nn.Flatten()), "fp32")
    exported = _as_exported(Loaded(model.double(), "classify", [], {}, "", {}))
    assert exported.model is not None
    assert not any(module.training for module in exported.model.modules())


@torch.no_grad()
def test_optimized_networks_are_one_graph_to_a_compiler():
    attention = HMHSA(CHANNELS, head_dim=8, grid_sizes=[4], pool_ratios=[2])
    model = randomised(nn.Sequential(attention, LayerNorm2d(CHANNELS), inverted_residual(), nn.MaxPool2d(2)))
    fast, x = optimize(model), torch.randn(1, CHANNELS, 9, 8)
    often(fast, x)
    assert relative(torch.compile(fast, backend="eager", fullgraph=True)(x), model(x)) <= 1e-5
