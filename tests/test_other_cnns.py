"""CNNs that aren't ours, by optimize(): sums and activations fused, branches merged, the same answers."""

from __future__ import annotations

import copy
import operator
import pickle
import random
from collections import Counter
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ConvNeXt, EfficientNet, get_model
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig

from transcnn.fast import optimize
from transcnn.fast.inference.activations import WRITTEN, activation
from transcnn.fast.inference.chains import Chain
from transcnn.fast.inference.convolutions import FastConv2d, FastLinear, onednn_fits

pytestmark = pytest.mark.skipif(not onednn_fits(torch.zeros(1)), reason="needs oneDNN")
BF16 = pytest.param(
    torch.bfloat16, id="bf16", marks=pytest.mark.skipif(not onednn_fits(torch.zeros(1).bfloat16()), reason="no bf16")
)
DTYPES = [pytest.param(torch.float32, id="fp32"), BF16]
SMALL = dict(embed_dim=(8, 16), depth=(2, 1))
HOSTS: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "repvit_m0_9": SMALL,
    "fastvit_t8": dict(layers=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16)),
    "mobileone_s0": {},
    "starnet_s1": dict(base_dim=8, depths=(1, 1, 1, 1)),
    "mobilenetv3_small_050": {},
    "torchvision resnet18": {},
    "torchvision convnext": dict(block_setting=[CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)]),
    "torchvision efficientnet": dict(
        inverted_residual_setting=[FusedMBConvConfig(4, 3, 1, 16, 16, 2), MBConvConfig(4, 3, 2, 16, 24, 2, 1, 1)],
        dropout=0.0,
    ),
}
TORCHVISION = {"convnext": ConvNeXt, "efficientnet": EfficientNet}


def host_named(name: str, **arguments: Any) -> nn.Module:
    """timm's network of this name, or torchvision's."""
    library, _, other = name.rpartition(" ")
    if not library:
        return timm.create_model(name, num_classes=7, **arguments)
    return TORCHVISION.get(other, partial(get_model, other))(num_classes=7, **arguments)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def randomised(model: nn.Module) -> nn.Module:
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=1 / p[0].numel() ** 0.5)
        else:
            nn.init.uniform_(p, 0.4, 1.2) if name.endswith(("weight", "gamma")) else nn.init.normal_(p, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


class Calls:
    """Counts how often oneDNN fuses what, and how often a kernel computes several layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: Counter = Counter()
        for kind in (FastConv2d, FastLinear):
            monkeypatch.setattr(kind, "fused", self.counted(kind.fused))
        monkeypatch.setattr(Chain, "run", self.run_counted(Chain.run))

    def counted(self, fused: Any) -> Any:
        def count(layer: nn.Module, x: Tensor, other: Tensor | None, act: Any, reuse: bool = False) -> Tensor | None:
            y = fused(layer, x, other, act, reuse)
            self.found["reused"] += y is not None and y is other
            self.found["sum" if other is not None else "plain"] += y is not None
            self.found[act[0]] += y is not None
            return y

        return count

    def run_counted(self, run: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Tensor | None:
            y = run(*args, **kwargs)
            self.found["kernel"] += y is not None
            return y

        return count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_hosts_give_the_same(host, dtype, monkeypatch):
    torch.manual_seed(0)
    model = randomised(host_named(host, **HOSTS[host]))
    x = torch.randn(2, 3, 65, 70).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    fast, calls = optimize(model, dtype), Calls(monkeypatch)
    ours = relative(fast(x), exact)
    assert sum(calls.found[what] for what in ("sum", "kernel", "relu", "gelu", "swish", "hardswish")) > 0
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        theirs = relative(model(x.float()), exact)
    assert ours <= (max(4 * theirs, 2e-6) if dtype == torch.float32 else 1.5 * theirs + 2e-3)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(x), fast(x))


@pytest.mark.parametrize("host", ["test_convnext", "fastvit_t8", "test_vit3"])
@torch.no_grad()
def test_layer_scales_are_folded(host):
    torch.manual_seed(0)
    model = randomised(timm.create_model(host, num_classes=7, **HOSTS.get(host, {})))

    def scales(network: nn.Module) -> list[str]:
        return [name for name, _ in network.named_parameters() if name.endswith("gamma")]

    assert not scales(optimize(model))
    kept = scales(optimize(model, "fp16"))  # whose smallest number is larger than many a scale
    assert len(kept) > 3
    x = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    owner = model.get_submodule(kept[0].rpartition(".")[0])
    owner.register_forward_hook(lambda module, given, output: output * 3)
    fast = optimize(model)
    assert scales(fast) == kept[:1]
    assert relative(fast(x), model(x)) <= 5e-6


class Block(nn.Module):
    """A block whose forward pass is given."""

    def __init__(self, forward: Any, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.act = act or nn.ReLU(inplace=True)
        self.nothing, self.compute = nn.Identity(), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def in_place_between(m: Block, x: Tensor) -> Tensor:
    y = m.conv1(x)
    x = x.mul_(2)  # after the convolution has read it
    return y + x


def added_to_itself(m: Block, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return y + y


def read_twice(m: Block, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return m.conv2(y) + m.act(y)


def input_changed(m: Block, x: Tensor) -> Tensor:
    z = x + 1
    z += m.conv1(x)
    return z * 2


def broadcast(m: Block, x: Tensor) -> Tensor:
    return m.act(m.conv1(x) + x.mean((2, 3), keepdim=True))


def changed_under_another_name(m: Block, x: Tensor) -> Tensor:
    z = x
    z += m.conv1(x)
    return z + x


def changed_after_identity(m: Block, x: Tensor) -> Tensor:
    y = nn.functional.relu(x)
    z = m.nothing(y)
    z += m.conv1(x)
    return z + y


def read_later(m: Block, x: Tensor) -> Tensor:
    z = m.conv2(x)
    return (m.conv1(x) + z) * z


def seen_later(m: Block, x: Tensor) -> Tensor:
    z = m.conv2(x)
    view = z.flatten(2)
    y = m.conv1(x) + z
    return y * view.view(y.shape)


BLOCKS = {
    "residual": (lambda m, x: m.act(m.conv2(F.relu(m.conv1(x))) + x), {"relu": 2, "sum": 1, "plain": 1}),
    "two convolutions": (lambda m, x: m.conv1(x) + m.conv2(x), {"sum": 1, "none": 1, "reused": 1}),
    "read later": (read_later, {"sum": 1, "none": 1}),
    "seen later": (seen_later, {"sum": 1, "none": 1}),
    "in place between": (in_place_between, {}),
    "itself": (added_to_itself, {}),
    "read twice": (read_twice, {}),  # the activation changes what conv2 reads
    "another changed": (input_changed, {}),
    "another name": (changed_under_another_name, {}),
    "after nothing": (changed_after_identity, {}),
    "one's own": (lambda m, x: operator.iadd(m.conv2(m.conv1(x)), x), {"sum": 1, "none": 1}),
    "broadcast": (broadcast, {}),
    "activation alone": (lambda m, x: m.act(x) + 1, {}),
    "a number": (lambda m, x: m.conv1(x) + 1, {}),
}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_what_is_fused_and_what_is_not(name, monkeypatch):
    forward, expected = BLOCKS[name]
    model = nn.Sequential(Block(forward), nn.Conv2d(8, 8, 1))
    x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()(x.double())
    fast, calls = optimize(model), Calls(monkeypatch)
    assert relative(fast(x.clone()), exact) <= 2e-6
    assert +calls.found == expected


class Around(nn.Module):
    """Blocks with sums that stand in another module than their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(lambda m, x: m.conv2(m.conv1(x))), Block(lambda m, x: m.conv2(m.act(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return F.relu(self.second(x) + x)


@torch.no_grad()
def test_sums_in_another_module_than_the_layers(monkeypatch):
    model, x = nn.Sequential(nn.Sequential(Around(), Around())), torch.randn(2, 8, 9, 7)
    model[0][0].second.act = model[0][1].second.act = nn.Tanh()  # changes nothing in place
    exact = copy.deepcopy(model).double()(x.double())
    fast, calls = optimize(model), Calls(monkeypatch)
    given = x.clone(memory_format=torch.channels_last)
    assert relative(fast(given), exact) <= 2e-6
    assert torch.equal(given, x)
    # One sum is written over its map: the input isn't the network's own, and what Tanh reads it might keep.
    assert +calls.found == {"sum": 4, "none": 2, "relu": 2, "reused": 1}
    handle = fast[0][1].second.register_forward_hook(lambda *_: torch.zeros_like(x))
    assert not torch.equal(fast(x), exact)
    handle.remove()
    fast[0][1].second = nn.Identity()
    model[0][1].second = nn.Identity()
    assert relative(fast(x), model(x)) <= 2e-6


@pytest.mark.parametrize("mode", ["made", "optimized", "copied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_inference_mode(mode, dtype):
    """Whenever it begins; maps in any memory format, as a view by the network's own code may leave them."""

    def contiguous(m: Any, x: Tensor) -> Tensor:
        y = m.conv1(x)
        return F.relu(m.conv2(y.contiguous()) + y)

    with torch.inference_mode(mode == "made"):
        torch.manual_seed(0)
        model = nn.Sequential(Block(contiguous), Block(contiguous))
    with torch.inference_mode(mode in ("made", "optimized")):
        fast = optimize(model, dtype)
    x = torch.randn(2, 8, 24, 32)
    with torch.inference_mode():
        fast = copy.deepcopy(fast) if mode == "copied" else fast
        exact = copy.deepcopy(model).double()(x.double())
        assert relative(fast(x), exact) <= (2e-6 if dtype == torch.float32 else 1e-2)


def one_of_each_family(seed: int) -> list[str]:
    """A network of each of timm's modules that has one of less than 20 M parameters, by chance."""
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm.model_entrypoint(name).__module__, []).append(name)
    found, rng = [], random.Random(seed)
    for names in families.values():
        rng.shuffle(names)
        small = (name for name in names[:5] if parameters(name) < 20e6)
        found += [name for name, _ in zip(small, range(1), strict=False)]
    return found


def parameters(name: str) -> float:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())
    except Exception:  # some of timm's can't be made there
        return torch.inf


@pytest.mark.slow
@torch.no_grad()
def test_a_network_of_each_family_of_timms():
    """Attention of others, caches, odd layers: whatever timm has, two minutes of it."""
    wrong, names = {}, one_of_each_family(seed=0)
    for name in names:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        size = model.pretrained_cfg["input_size"][-1]
        x = torch.randn(2, 3, *((size, size) if model.pretrained_cfg.get("fixed_input_size") else (96, 128)))
        exact = copy.deepcopy(model).double()(x.double())
        for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
            theirs = relative(copy.deepcopy(model).to(dtype)(x.to(dtype)), exact)
            ours = relative(optimize(model, dtype)(x), exact)
            if ours > 4 * theirs + most:
                wrong[name, dtype] = ours, theirs
    assert len(names) > 50
    assert not wrong


class Caching(nn.Module):
    """A block that keeps something of a call, as LeViT and EfficientFormer keep the biases of their attention."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.where, self.kept, self.rows, self.calls = where, {}, [], 0
        self.register_buffer("bias", torch.randn(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "dict":
            key = str(x.device)
            self.kept[key] = bias = self.kept.get(key, self.bias + 0)
        elif self.where == "list":
            self.rows.append(self.bias + x[0])
            bias = self.rows.pop() if len(self.rows) > 1 else self.bias
        elif self.where == "attribute":
            self.calls += 1
            bias = self.bias * self.calls
        else:
            self.bias, bias = self.bias + 1, self.bias
        return F.relu(self.conv2(self.conv1(x)) + bias + x)


@pytest.mark.parametrize("where", ["dict", "list", "attribute", "buffer"])
@torch.no_grad()
def test_blocks_that_keep_something_of_a_call(where):
    """Tracing leaves nothing in them, and each call does what it did."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Caching(where), nn.BatchNorm2d(8), Caching(where))).eval()
    x = torch.randn(2, 8, 9, 7)
    fast = pickle.loads(pickle.dumps(optimize(model)))
    for _ in range(3):
        assert relative(fast(x), model(x)) <= 2e-6


@torch.no_grad()
def test_what_hooks_keep_is_not_written_over():
    model = nn.Sequential(Block(lambda m, x: F.relu(m.conv1(x) + m.conv2(m.nothing(x)))))
    x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)
    fast = optimize(model)
    for name in ("conv1", "conv2"):
        kept: list[Tensor] = []
        handle = getattr(fast[0], name).register_forward_hook(lambda module, given, output, to=kept: to.append(output))
        fast(x)
        handle.remove()
        (ours,) = kept
        assert relative(ours, getattr(model[0], name)(x)) <= 2e-6


class Dynamic(nn.Module):
    """What can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(BLOCKS["residual"][0])

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() > 0 else self.block(-x)


@torch.no_grad()
def test_blocks_in_what_cannot_be_traced(monkeypatch):
    model = nn.Sequential(nn.Sequential(Dynamic(), nn.Identity()))
    x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)
    fast, calls = optimize(model), Calls(monkeypatch)
    assert relative(fast(x), model(x)) <= 2e-6
    assert +calls.found == BLOCKS["residual"][1]


@torch.no_grad()
def test_hooks_and_modules_that_come_later_count():
    model = nn.Sequential(Block(BLOCKS["residual"][0]))
    x = torch.randn(1, 8, 6, 6)
    fast = optimize(model)
    handle = fast[0].act.register_forward_hook(lambda *_: torch.zeros(1, 8, 6, 6))
    assert not fast(x).any()
    handle.remove()
    assert relative(fast(x), model(x)) <= 2e-6
    fast[0].act = nn.Tanh()
    assert relative(fast(x), torch.tanh(model[0].conv2(F.relu(model[0].conv1(x))) + x)) <= 2e-6
    model[0].act.register_forward_hook(lambda *_: torch.ones(1, 8, 6, 6))  # before, too
    assert (optimize(model)(x) == 1).all()


ACTIVATIONS = [way for way in WRITTEN if isinstance(way, type)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda kind: f"{kind.__module__[:4]} {kind.__name__}")
@torch.no_grad()
def test_every_activation(act, dtype):
    assert activation(act()) is not None
    block = Block(lambda m, x: m.act(m.conv1(x) + x) + m.act(m.conv2(x)), act()).to(dtype)
    x = (3 * torch.randn(2, 8, 9, 7)).to(dtype)
    x[0, 0, 0, 0] = torch.nan
    exact, fast = copy.deepcopy(block).double()(x.double()), optimize(nn.Sequential(block), dtype)
    last = fast(x.to(memory_format=torch.channels_last))
    assert torch.equal(fast(x).isnan(), exact.isnan())
    if act is nn.ReLU:  # oneDNN's makes 0 of NaN
        last = last.where(~exact.isnan(), torch.nan)
    assert torch.equal(last.isnan(), exact.isnan())
    for ours in (fast(x), last):
        assert relative(ours.nan_to_num(), exact.nan_to_num()) <= (2e-6 if dtype == torch.float32 else 1e-2)


@torch.no_grad()
def test_whatever_a_convolution_is_given():
    for conv, shape in (
        (nn.Conv2d(4, 6, 3), (1, 4, 2, 9)),  # no position is left
        (nn.Conv2d(4, 6, 3), (1, 5, 9, 9)),
        (nn.Conv2d(4, 6, 3), (4, 9)),
    ):
        with pytest.raises(RuntimeError):
            optimize(nn.Sequential(conv))(torch.zeros(shape))
    options = [
        dict(stride=(1, 2)),
        dict(dilation=2, groups=2),
        dict(padding="same"),
        dict(padding_mode="circular", padding=1),
    ]
    for more in options:
        conv = nn.Conv2d(4, 6, 3, **more)
        for x in (torch.randn(2, 4, 9, 11), torch.randn(4, 9, 11), torch.randn(2, 9, 11, 4).permute(0, 3, 1, 2)):
            assert relative(optimize(nn.Sequential(conv))(x), conv(x)) <= 1e-6
    linear = nn.Linear(5, 3)
    for x in (torch.randn(5), torch.randn(4, 5), torch.randn(2, 3, 5, 5).transpose(1, 2), torch.zeros(0, 5)):
        assert torch.allclose(optimize(nn.Sequential(linear))(x), linear(x), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_first_convolutions_read_images_as_they_are(dtype):
    torch.manual_seed(0)
    for channels, width, bias, act in ((3, 32, True, nn.GELU()), (1, 16, False, nn.ReLU6()), (4, 24, True, nn.SiLU())):
        model = nn.Sequential(Head(nn.Conv2d(channels, width, 3, 2, 1, bias=bias), act)).to(dtype)
        fast, double = optimize(model, dtype), copy.deepcopy(model).double()
        for size in ((2, channels, 9, 40), (1, channels, 1, 1), (3, channels, 70, 7)):
            image = torch.randn(size).to(dtype)
            for x in (image, image.contiguous(memory_format=torch.channels_last), image.flip(3).mT.contiguous().mT):
                assert relative(fast(x), double(x.double())) <= (2e-6 if dtype == torch.float32 else 1e-2)
        with pytest.raises(RuntimeError):
            fast(torch.zeros(1, channels + 1, 9, 9).to(dtype))
        fast[0].conv.weight.mul_(2)
        double[0].conv.weight.mul_(2)
        assert relative(fast(image), double(image.double())) <= (2e-6 if dtype == torch.float32 else 1e-2)


class Head(nn.Module):
    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act = conv, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@torch.no_grad()
def test_packed_weights_follow_the_weights_and_the_size():
    conv = nn.Conv2d(8, 16, 3)
    fast = optimize(nn.Sequential(conv))
    for size in ((1, 8, 9, 9), (4, 8, 30, 30), (1, 8, 9, 9)):
        x = torch.randn(size)
        for change in (lambda w: None, lambda w: w.mul_(2), lambda w: w.copy_(torch.randn_like(w))):
            change(fast[0].weight)
            assert relative(fast(x), F.conv2d(x, fast[0].weight, fast[0].bias)) <= 1e-6
    with torch.inference_mode():
        made = optimize(nn.Sequential(conv))
        assert relative(made(x), conv(x)) <= 1e-6
    assert relative(made(x), conv(x)) <= 1e-6
