"""optimize() gives the same answers: every design, odd sizes, plugged and dense networks, both precisions."""

import copy
import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import transcnn
from transcnn.attention import attend as training_attend
from transcnn.errors import UserError
from transcnn.fast import accelerate_training, fold_batchnorms, optimize, plain
from transcnn.fast.cpu import support
from transcnn.fast.inference import attend as kernel
from transcnn.fast.inference import tiles
from transcnn.fast.inference.attention import FastHMHSA
from transcnn.fast.inference.blocks import FastBlock, FastDualDownsample, FastInvertedResidual, FastStem
from transcnn.fast.training.layers import KernelPointwise

SIZES = [(64, 64), (97, 131), (33, 40)]
NETWORKS = {
    "transcnn": {},
    "hatnet": dict(design="hatnet", norm_layer="groupnorm1", grid_sizes=(8, 7, 7, None)),
    "three levels": dict(grid_sizes=((4, 2), (4, 2), 4, None), pool_ratios=((2, 2), (2, 3), 2, None)),
    "ratio that doesn't divide the grid": dict(grid_sizes=(4, 4, 4, 4), pool_ratios=(3, 5, 2, 1)),
    "wide heads": dict(dims=(32, 64, 64, 64), head_dim=32),
    "norms that can't be folded": dict(norm_layer=lambda channels: nn.InstanceNorm2d(channels, affine=True)),
    "batch statistics": dict(norm_layer=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)),
    "another activation": dict(act_layer="gelu"),
}


def fill(model: nn.Module) -> nn.Module:
    """Weights with which every layer matters and nothing saturates."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.5 / p[0].numel() ** 0.5)
        else:
            nn.init.uniform_(p, 0.4, 0.8) if name.endswith("weight") else nn.init.normal_(p, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.4, 0.8)
    return model.eval()


def network(**changes) -> nn.Module:
    return fill(timm.create_model("transcnn_test", **changes))


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((ours.double() - exact.double()).norm() / exact.double().norm()).detach())


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_equal_at_every_size(kind):
    model = network(**NETWORKS[kind])
    fast = optimize(model)
    assert any(isinstance(module, FastBlock) for module in fast.modules())
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        assert error(fast(x), model(x)) <= 1e-5


@pytest.mark.parametrize("kind", ["transcnn", "hatnet", "three levels", "large kernels"])
@pytest.mark.parametrize("cache", [1, 10_000, 40_000])  # bytes: a few rows, more rows, one image at a time
@torch.no_grad()
def test_computing_in_tiles_changes_nothing(kind, cache, monkeypatch):
    model = network(**NETWORKS.get(kind, dict(kernel_sizes=(7, 5, 5, 3))))
    fast, x = optimize(model), torch.randn(3, 3, 113, 70)
    whole = fast(x)
    block = next(module for module in fast.modules() if isinstance(module, FastBlock))
    residual = next(module for module in block.modules() if isinstance(module, FastInvertedResidual))
    sizes: dict[str, list[int]] = {"qkv": [], "q": [], "hidden": []}
    for name, module in (("qkv", block.attn.local[0].qkv), ("q", block.attn.q), ("hidden", residual.expand)):
        module.register_forward_hook(lambda module, inputs, output, name=name: sizes[name].append(output.nbytes))
    monkeypatch.setattr(tiles, "CACHE", cache)
    assert error(fast(x), model(x)) <= 1e-5
    assert error(fast(x), whole) <= 1e-6
    assert all(len(calls) >= 2 * 3 for calls in sizes.values())  # two passes, each image by itself at least
    row = 18 * 3 * 8 * 4  # bytes of a row of Q, K and V; the hidden map has two thirds of that
    assert max(sizes["qkv"]) <= max(1.4 * cache, 8 * 24 / 18 * row)  # padded, or a row of grids
    assert max(sizes["q"]) <= max(cache, row)
    assert max(sizes["hidden"]) <= max(cache, 13 * row) + 6 * row


@torch.no_grad()
def test_steps_that_merge_nothing_between_them():
    attn = transcnn.HMHSA(8, head_dim=4, grid_sizes=[4, 3, 2], pool_ratios=[1, 2, 2]).eval()
    x = torch.randn(2, 8, 21, 13)
    assert error(optimize(attn)(x), attn(x)) <= 1e-5


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 64, 64), (1, 512, 512), (2, 100, 3001), (1, 3000, 40)])
@pytest.mark.parametrize(("channels", "multiple", "halo"), [(64, 1, 0), (192, 8, 0), (512, 1, 1), (2048, 1, 3)])
def test_tiles_cover_all_once_with_a_small_overlap(shape, channels, multiple, halo):
    batch, height, width = shape
    seen = torch.zeros(*shape, 1)
    computed = []

    def count(tile):
        images, rows, columns = (side.stop - side.start for side in tile)
        assert tile[1].start % multiple == 0
        assert images * rows * columns <= max(2**23 / (4 * channels), multiple * width, (8 * halo) ** 2)
        computed.append(images * min(rows + 2 * halo, height) * min(columns + 2 * halo, width))
        seen[tile] += 1
        return seen[tile].clone()

    assert (tiles.in_tiles(count, seen, channels, multiple, halo) == 1).all()
    assert sum(computed) <= 1.6 * batch * height * width  # (8 + 2)² / 8² where a tile is as small as it may get


@pytest.mark.parametrize("kind", ["transcnn", "hatnet", "three levels"])
@torch.no_grad()
def test_bf16_rounds_no_worse_than_autocast_does(kind):
    model = network(**NETWORKS[kind])
    x = torch.randn(4, 3, 97, 131)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        usual = error(model(x), exact)
    y = optimize(model, "bf16")(x)
    assert y.dtype == torch.float32  # as the input
    assert error(y, exact) <= 2 * usual


@torch.no_grad()
def test_features_and_intermediates():
    model = network()
    fast = optimize(model)
    x = torch.randn(1, 3, 70, 50)
    for ours, theirs in zip(
        fast.forward_intermediates(x, intermediates_only=True),
        model.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        assert error(ours, theirs) <= 1e-5
    features = fill(timm.create_model("transcnn_test", features_only=True))
    for ours, theirs in zip(optimize(features)(x), features(x), strict=True):
        assert error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("host", ["resnet18", "mobilenetv3_small_050", "regnetx_002"])
@torch.no_grad()
def test_a_plugged_host(host):
    from transcnn.plugging.plug import plug

    model = fill(plug(fill(timm.create_model(host, num_classes=7))))
    x = torch.randn(2, 3, 97, 131)
    fast = optimize(model)
    assert any(isinstance(module, FastHMHSA) for module in fast.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert error(fast(x), model(x)) <= 1e-5


@torch.no_grad()
def test_a_dense_model():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = fill(smp.FPN("tu-transcnn_test", encoder_weights=None, encoder_depth=5, classes=4))
    x = torch.randn(1, 3, 96, 128)
    assert error(optimize(model)(x), model(x)) <= 1e-5


@torch.no_grad()
def test_the_model_itself_stays_as_it_was():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    fast = optimize(model, torch.bfloat16, example=torch.randn(1, 3, 40, 40))
    assert model.training
    assert not fast.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = copy.deepcopy(fast)
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(again(x), fast(x))


def channels(module: nn.Module) -> int:
    """Of the map that this part of an optimized network takes."""
    return 3 if isinstance(module, FastStem) else module.weight_like().shape[1]


REPRODUCED = ["transcnn_tiny", "transcnn_nano", "hatnet_tiny", "plugged resnet18"]


@pytest.fixture(scope="module")
def published() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    models = {name: transcnn.create_model(name).eval() for name in REPRODUCED[:3]}
    return models | {REPRODUCED[3]: fill(transcnn.plug(timm.create_model("resnet18", num_classes=7))).eval()}


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("name", REPRODUCED)
@torch.no_grad()
def test_autocast_is_off_inside(name, dtype, native, published, monkeypatch):
    """Under autocast some tensors that kernels were given had another dtype: wrong answers, or memory overwritten."""
    if not native:
        monkeypatch.setattr(support, "supports", lambda dtype: False)
    model = published[name]
    fast = optimize(model, dtype)
    x = torch.randn(2, 3, *((32, 32) if name == "transcnn_nano" else (64, 64)))
    expected = fast(x)
    assert error(expected, model(x)) <= (3e-2 if dtype else 1e-5)
    for autocast in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", autocast):
            for method in ("__call__", "forward_features"):
                if hasattr(fast, method):
                    ours = getattr(fast, method)(x)
                    assert ours.dtype == torch.float32
            assert torch.equal(fast(x), expected)
            assert torch.equal(fast(x.to(autocast)).float(), fast(x.to(autocast).float()).to(autocast).float())
            for module in fast.modules():  # entered one by one
                if isinstance(module, FastBlock | FastHMHSA | FastDualDownsample | FastStem):
                    part = torch.randn(1, channels(module), 9, 8)
                    ours = module(part)
                    with torch.autocast("cpu", enabled=False):
                        assert torch.equal(ours, module(part))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # PyTorch's own forward mode
@pytest.mark.parametrize("kind", ["transcnn", "plugged"])
def test_gradients_are_refused(kind):
    model = network() if kind == "transcnn" else fill(transcnn.plug(timm.create_model("resnet18", num_classes=7)))
    fast, x = optimize(model), torch.randn(1, 3, 40, 40)
    inner = next(module for module in fast.modules() if isinstance(module, FastBlock | FastHMHSA))
    assert not fast(x).requires_grad
    with torch.no_grad():
        expected = fast(x)
        assert torch.equal(fast(x.clone().requires_grad_()), expected)
    for ask in (
        fast,
        fast.forward_features,
        lambda x: inner(x.new_zeros(1, channels(inner), 5, 5) * x.sum()),
    ):
        with pytest.raises(UserError, match="inference-only"):
            ask(x.clone().requires_grad_())
        with torch.autograd.forward_ad.dual_level(), pytest.raises(UserError, match="inference-only"):
            ask(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    for refuse in (fast.train, fast.requires_grad_, inner.train, inner.requires_grad_):
        with pytest.raises(UserError, match="inference-only"):
            refuse()
    for p in fast.parameters():
        p.requires_grad = True
    with pytest.raises(UserError, match="inference-only"):
        fast(x)
    assert torch.equal(fast.requires_grad_(False).train(False)(x), expected)


def test_errors():
    fast = optimize(network())
    with pytest.raises(UserError, match="inference-only"):
        fast.train()
    with pytest.raises(UserError, match=r"dtype must be one of .*bf16.* got 'int8'"):
        optimize(network(), "int8")
    with pytest.raises(ValueError, match=r"expected a \(B, 8, H, W\) tensor, got \(1, 4, 5, 5\)"):
        FastHMHSA(transcnn.HMHSA(8))(torch.zeros(1, 4, 5, 5))


class Odd(nn.Module):
    """A convolution that two read, one called twice, one with a hook, and one that can be folded."""

    def __init__(self):
        super().__init__()
        self.read_twice, self.norm1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.twice, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.hooked, self.norm3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.plain, self.norm4 = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.hooked.register_forward_hook(lambda module, inputs, output: output * 2)

    def forward(self, x):
        y = self.read_twice(x)
        x = self.norm1(y) + y
        x = self.norm2(self.twice(self.twice(x)))
        return self.norm4(self.plain(self.norm3(self.hooked(x))))


@torch.no_grad()
def test_only_norms_that_alone_read_a_convolution_are_folded():
    model = fill(Odd())
    folded = copy.deepcopy(model)
    assert fold_batchnorms(folded) == ["norm4"]
    x = torch.randn(1, 3, 9, 9)
    assert error(folded(x), model(x)) <= 1e-6
    assert error(optimize(model)(x), model(x)) <= 1e-6


@pytest.mark.parametrize("below", ["drop", "act"])
@torch.no_grad()
def test_what_is_hooked_inside_a_norm_with_activation_stays(below):
    model = fill(timm.create_model("test_efficientnet", num_classes=3))
    getattr(model.blocks[2][0].bn1, below).register_forward_hook(lambda module, inputs, output: 1.5 * output)
    x = torch.randn(2, 24, 8, 8)
    assert error(optimize(model).blocks[2](x), model.blocks[2](x)) <= 1e-5


@pytest.mark.parametrize("hook", ["none", "block", "attention", "residual"])
@pytest.mark.parametrize("kind", ["transcnn", "hatnet", "large kernels"])
@torch.no_grad()
def test_folded_layers_keep_their_bias(kind, hook):
    """Where hooks keep the plain layers in use, and where folding is all that is asked for."""
    model = network(**NETWORKS.get(kind, dict(kernel_sizes=(7, 5, 5, 3))))
    block = model.stages[1].blocks[0]
    module = {"block": block, "attention": block.attn, "residual": block.irb}.get(hook)
    if module is not None:
        module.register_forward_hook(lambda module, inputs, output: output * 1.01)
    x = torch.randn(2, 3, 40, 37)
    folded = copy.deepcopy(model)
    assert fold_batchnorms(folded) or kind == "hatnet"
    assert error(folded(x), model(x)) <= 1e-5
    assert error(optimize(model)(x), model(x)) <= 1e-5


@torch.no_grad()
def test_the_children_of_a_model_that_cannot_be_traced_are_folded():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.body(x) if x.mean() > 0 else self.body(-x)

    model = fill(Untraceable())
    folded = copy.deepcopy(model)
    assert fold_batchnorms(folded) == ["body.1"]
    x = torch.randn(1, 3, 9, 9)
    assert error(folded(x), model(x)) <= 1e-6


@pytest.mark.parametrize("scores", [1, 40, 300, 2**22])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_chunks(scores, masked, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_SCORES", scores)
    q, k, v = (torch.randn(3, 2, n, 8) for n in (11, 6, 6))
    mask = (torch.rand(3, 1, 1, 6) > 0.4).index_fill(3, torch.tensor(0), True) if masked else None
    exact = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
    assert error(kernel._chunked(q, k, v, mask), exact) <= 1e-6
    assert error(kernel.attend(q, k, v, mask), exact) <= 1e-6
    assert error(kernel.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask), exact) <= 2e-2


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_training_equals_the_fused_kernel(masked):
    leaves = [torch.randn(4, 2, n, 16, requires_grad=True) for n in (20, 9, 9)]
    mask = (torch.rand(4, 1, 1, 9) > 0.4).index_fill(3, torch.tensor(0), True) if masked else None
    exact = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    up = torch.randn_like(exact)
    expected = torch.autograd.grad(exact, leaves, up)
    halves = [x.detach().bfloat16().requires_grad_() for x in leaves]
    out = training_attend(*halves, mask)
    assert out.dtype == torch.bfloat16
    assert error(out, exact) <= 1e-2
    for ours, theirs in zip(torch.autograd.grad(out, halves, up.bfloat16()), expected, strict=True):
        assert error(ours, theirs) <= 2e-2


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    model = network()
    fast = optimize(model, compile=True)
    for size in ((64, 64), (48, 80)):
        x = torch.randn(2, 3, *size)
        assert error(fast(x), model(x)) <= 1e-5


@torch.no_grad()
def test_published_weights(shared):
    import importlib.util

    spec = importlib.util.spec_from_file_location("parity_weights", shared / "parity" / "weights.py")
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    from transcnn.checkpoints.published import convert_state_dict

    for name in ("transcnn_tiny", "hatnet_tiny"):
        model = timm.create_model(name).eval()
        tensors = {key: torch.from_numpy(value) for key, value in published.state_dict(name).items()}
        model.load_state_dict(convert_state_dict(tensors, model))
        x = torch.from_numpy(published.images(1, 97, 131))
        assert error(optimize(model)(x), model(x)) <= 1e-5


@pytest.mark.parametrize(
    "at",
    [
        "stem",
        "stages.1.downsample.conv",
        "stages.0.blocks.0.attn.proj",
        "stages.0.blocks.0.attn.local.0.qkv",
        "stages.0.blocks.0.irb.conv2.0",
    ],
)
@torch.no_grad()
def test_hooks_anywhere_below_are_obeyed(at):
    model = network(dims=(32, 64, 64, 96), head_dim=32)
    x = torch.randn(2, 3, 40, 37)
    before = model.forward_features(x)
    model.get_submodule(at).register_forward_hook(lambda module, inputs, output: output * 1.5)
    effect = error(model.forward_features(x), before)
    assert effect > 1e-4
    assert error(optimize(model).forward_features(x), model.forward_features(x)) <= min(1e-5, effect / 100)


@torch.no_grad()
def test_what_is_plugged_below_a_block_stays():
    model = network(dims=(32, 64, 64, 96), head_dim=32)
    x = torch.randn(2, 3, 40, 37)
    before = model.forward_features(x)
    transcnn.plug(model, ["stages.0.blocks.0.irb", "stages.1.downsample.conv"]).eval()
    for name, p in model.named_parameters():
        if name.endswith("scale"):
            p.fill_(1.0)
    assert error(model.forward_features(x), before) > 0.01
    assert error(optimize(model).forward_features(x), model.forward_features(x)) <= 1e-5


@torch.no_grad()
def test_no_images():
    for model in (network(), network(dims=(32, 64, 64, 96), head_dim=32), fill(timm.create_model("resnet10t"))):
        x = torch.randn(0, 3, 40, 37)
        assert optimize(model)(x).shape == model(x).shape
        assert optimize(model, "bf16")(x).dtype == torch.float32


@pytest.mark.parametrize("host", ["transcnn", "plugged"])
@torch.no_grad()
def test_a_network_in_bf16_may_be_cast_again_and_gives_features(host):
    model = network() if host == "transcnn" else fill(transcnn.plug(timm.create_model("resnet10t", num_classes=7)))
    x = torch.randn(2, 3, 40, 37)
    fast = optimize(model, "bf16")
    for dtype in (torch.float32, torch.bfloat16):
        fast.to(dtype)
        assert fast(x).dtype == fast.forward_features(x).dtype == torch.float32
        assert error(fast(x), model(x)) <= 3e-2
        assert error(fast.forward_features(x), model.forward_features(x)) <= 3e-2
        assert error(fast.forward_head(fast.forward_features(x)), model(x)) <= 5e-2
        for ours, exact in zip(
            fast.forward_intermediates(x, intermediates_only=True),
            model.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            assert ours.dtype == torch.float32
            assert error(ours, exact) <= 3e-2


@torch.no_grad()
def test_flops_are_counted():
    model, x = network(dims=(32, 64, 64, 96), head_dim=32), torch.randn(1, 3, 64, 64)
    counts = []
    for counted in (model, optimize(model)):
        with FlopCounterMode(display=False) as counter:
            counted(x)
        counts.append(counter.get_total_flops())
    assert 0.95 <= counts[1] / counts[0] <= 1.0


def test_training_layers_are_plain_again():
    model = network(dims=(32, 64, 64, 96), head_dim=32).to(memory_format=torch.channels_last).train()
    x = torch.randn(2, 3, 40, 37).contiguous(memory_format=torch.channels_last)
    classes = [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    expected = model(x)
    model.load_state_dict(state)
    accelerated = accelerate_training(model)
    assert [type(module) for module in accelerated.modules()] != classes
    with pytest.raises(UserError, match=r"call transcnn.fast.plain\(model\)"):
        torch.autograd.grad(accelerated(x).sum(), list(model.parameters())[:1], create_graph=True)[0].sum().backward()
    with pytest.raises(UserError, match=r"call transcnn.fast.plain\(model\)"):
        torch.fx.symbolic_trace(accelerated)
    model.load_state_dict(state)
    assert plain(accelerated) is model
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), expected)
    torch.fx.symbolic_trace(model)
    with pytest.raises(UserError, match="can't be made plain again"):
        plain(nn.Sequential(optimize(model)))

    class Own(KernelPointwise):
        pass

    with pytest.raises(UserError, match="0 is a Own, a subclass"):
        plain(nn.Sequential(Own(3, 4, 1)))


@pytest.mark.parametrize("kind", ["transcnn", "plugged", "optimized"])
@torch.no_grad()
def test_timms_switch_of_the_fused_attention_is_obeyed(kind, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("the fused attention ran")

    def build_one() -> nn.Module:
        torch.manual_seed(0)
        made = network() if kind != "plugged" else fill(transcnn.plug(timm.create_model("resnet10t", num_classes=7)))
        return optimize(made) if kind == "optimized" else made

    x = torch.randn(2, 3, 40, 37)
    expected = build_one()(x)
    timm.layers.set_fused_attn(False)
    try:
        model = build_one()
    finally:
        timm.layers.set_fused_attn(True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", forbidden)
    assert error(model(x), expected) <= 1e-5
    with pytest.raises(AssertionError, match="the fused attention ran"):
        build_one()(x)


@pytest.mark.parametrize("dtype", [None, "bf16"])
@torch.no_grad()
def test_a_detector(dtype):
    """Its backbone computes in bf16, its boxes in fp32."""
    from transcnn.dense.detectors import build
    from transcnn.settings import Detect

    options = dict(detector="retinanet", fpn_channels=32, short_side=64, long_side=96, min_score=0.0, max_found=20)
    model = build("transcnn_test", {**dataclasses.asdict(Detect()), **options}, num_classes=3).eval()
    fast, images = optimize(model, dtype), [torch.rand(3, 70, 50), torch.rand(3, 40, 40)]
    with torch.autocast("cpu", torch.bfloat16):
        found = fast(images)
    for ours, exact in zip(found, model(images), strict=True):
        assert ours["boxes"].dtype == ours["scores"].dtype == torch.float32
        assert len(ours["boxes"]) == len(exact["boxes"])
        if dtype is None:
            torch.testing.assert_close(ours["boxes"], exact["boxes"], atol=1e-2, rtol=1e-4)
    backbone = next(p for p in fast.net.backbone.parameters())
    assert backbone.dtype == (torch.float32 if dtype is None else torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in fast.net.head.parameters())
