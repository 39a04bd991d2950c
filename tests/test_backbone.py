"""What timm, segmentation libraries and people expect of every network of this package, and the published figures.

``transcnn_test``, in milliseconds, stands for them all in most tests, as TransCNN and as HAT-Net.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, group_parameters, save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import reference
import transcnn
from timing import allowed
from transcnn.backbone import TransCNN
from transcnn.blocks import Block, ConvDownsample, DualDownsample
from transcnn.fast import accelerate_training, optimize
from transcnn.layers import strided
from transcnn.variants import VARIANTS

HATNET = dict(design="hatnet", norm_layer="groupnorm1")
DESIGNS = {"transcnn": {}, "hatnet": HATNET}
PARAMETERS = {
    "transcnn_tiny": 13_315_976,
    "transcnn_small": 26_538_824,
    "transcnn_medium": 48_322_504,
    "transcnn_large": 80_033_352,
    "hatnet_tiny": 12_655_912,
    "hatnet_small": 25_747_784,
    "hatnet_medium": 42_942_472,
    "hatnet_large": 63_132_488,
}
SIZES = [(32, 32), (97, 131), (33, 500), (64, 96), (225, 63)]


def make(**kwargs) -> TransCNN:
    """A transcnn_test in which every layer matters (freshly initialised, all answers are about the head's bias)."""
    model = transcnn.create_model("transcnn_test", **kwargs).eval()
    return fill(model)


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    values = {name: torch.from_numpy(value) for name, value in reference.weights(shapes, seed).items()}
    model.load_state_dict(values)
    return model


def sizes_of(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and blocks of each stage."""
    return VARIANTS[name]["dims"], VARIANTS[name].get("depths", (2, 2, 4, 2))


def images(*size: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(size)).to(dtype)


@pytest.fixture
def weights_file(tmp_path) -> Path:
    """The weights of ``make()`` in a file that timm reads."""
    path = tmp_path / "weights.pth"
    torch.save(make().state_dict(), path)
    return path


# --- the published figures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = transcnn.create_model(name)
    unused = sum(b.numel() for n, b in model.named_buffers() if ".proj_norm." in n)
    assert unused == (2 * sum(d * n for d, n in zip(*sizes_of(name), strict=True)) if "hatnet" in name else 0)
    assert sum(p.numel() for p in model.parameters()) + unused == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_table_is_the_published_one(name):
    with torch.device("meta"):
        model = transcnn.create_model(name)
    published = {
        "transcnn_tiny": ([64, 128, 256, 512], [2, 2, 4, 2], 64),
        "transcnn_small": ([64, 128, 256, 512], [3, 4, 8, 3], 64),
        "transcnn_medium": ([64, 128, 320, 640], [3, 4, 12, 3], 64),
        "transcnn_large": ([64, 128, 384, 768], [3, 4, 16, 3], 64),
        "hatnet_tiny": ([48, 96, 240, 384], [2, 2, 6, 3], 48),
        "hatnet_small": ([64, 128, 320, 512], [2, 3, 8, 3], 64),
        "hatnet_medium": ([64, 128, 320, 512], [3, 6, 18, 3], 64),
        "hatnet_large": ([64, 128, 320, 640], [3, 8, 27, 3], 64),
    }
    dims = [info["num_chs"] for info in model.feature_info]
    depths = [len(stage.blocks) for stage in model.stages]
    attention = [stage.blocks[0].attn for stage in model.stages]
    assert (dims, depths, attention[0].head_dim) == published[name]
    grids = [(8,), (8,), (8,), ()] if name.startswith("transcnn") else [(8,), (7,), (7,), ()]
    assert [attn.grid_sizes for attn in attention] == grids
    assert [attn.pool_ratios for attn in attention] == [(8,), (4,), (2,), ()]
    assert model.default_cfg["input_size"] == (3, 256, 256) if name.startswith("transcnn") else (3, 224, 224)
    assert model.drop_rate == 0.2


@pytest.mark.parametrize(
    ("name", "expected"), [("hatnet_tiny", 2.0), ("hatnet_small", 4.3), ("hatnet_medium", 8.3), ("hatnet_large", 11.5)]
)
def test_multiply_adds_are_the_published_ones(name, expected):
    """The paper counts layers, not attention's products: convolutions, the linear head, a norm's scale and shift."""
    values = []
    with torch.device("meta"):
        model = transcnn.create_model(name).eval()
        for layer in model.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.register_forward_hook(lambda layer, args, y: values.append(y.numel()))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    flops = counter.get_flop_counts()["Global"]
    layers = (flops[torch.ops.aten.convolution] + flops[torch.ops.aten.addmm]) / 2
    assert 0.99 < layers / (layers + sum(values)) < 1
    assert round((layers + sum(values)) / 1e9, 1) == expected


def test_nano_is_small():
    model = transcnn.create_model("transcnn_nano").eval()
    assert sum(p.numel() for p in model.parameters()) <= 1_500_000
    assert model(images(2, 3, 32, 32)).shape == (2, 10)


def test_micro_is_small_and_has_four_maps_for_dense_tasks():
    model = transcnn.create_model("transcnn_micro").eval()
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert model(images(2, 3, 64, 64)).shape == (2, 200)
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16]


# --- the registry -------------------------------------------------------------------------------------------------


def test_names_are_registered_with_timm():
    assert transcnn.list_models() == list(VARIANTS)
    assert sorted(timm.list_models(module="variants")) == sorted(VARIANTS)
    assert set(timm.list_models("transcnn*", pretrained=True)) == {
        *(f"transcnn_{size}.in1k" for size in ("tiny", "small", "medium", "large")),
        "transcnn_nano.cifar10",
        "transcnn_micro.tiny_imagenet",
    }
    assert type(timm.create_model("transcnn_test")) is TransCNN


def test_an_unknown_name_is_named():
    with pytest.raises(ValueError, match="no network is called 'transcnn_huge'; this package has transcnn_tiny, "):
        transcnn.create_model("transcnn_huge")
    assert isinstance(transcnn.create_model("resnet10t", num_classes=2), nn.Module)  # timm's own pass


def test_tag_errors():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for transcnn_test"):
        transcnn.create_model("transcnn_test", pretrained=True)
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        transcnn.create_model("transcnn_test.imagenet", pretrained=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_registered_model_keeps_the_contract(name):
    """Every network once for real: sizes that don't divide, strides, channels, the configuration's keys."""
    cfg = get_pretrained_cfg(name)
    model = transcnn.create_model(name).eval()
    x = images(1, cfg.input_size[0], 97, 75)
    with torch.inference_mode():
        last, features = model.forward_intermediates(x)
        assert model.forward_head(last).shape == (1, cfg.num_classes)
    for info, feature in zip(model.feature_info, features, strict=True):
        stride = info["reduction"]
        assert feature.shape == (1, info["num_chs"], -(-97 // stride), -(-75 // stride))
        assert feature.isfinite().all()
        assert model.get_submodule(info["module"]) is not None
    assert last.shape[1] == model.num_features
    assert f"{cfg.first_conv}.weight" in model.state_dict()
    assert f"{cfg.classifier}.weight" in model.state_dict()
    assert (cfg.num_classes, cfg.input_size[0]) == (model.num_classes, model.in_chans)
    assert bool(cfg.has_weights) == (name != "transcnn_test")


def test_initial_weights():
    model = transcnn.create_model("transcnn_nano")
    weights = torch.cat([p.flatten() for n, p in model.named_parameters() if p.ndim > 1])
    assert abs(weights.std().item() - 0.02) < 1e-4
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, value in model.named_parameters():
        if value.ndim == 1:
            layer, kind = name.rsplit(".", 1)
            assert value.unique().tolist() == [float(layer in norms and kind == "weight")], name


# --- classes, channels, pooling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_global_pool(pool):
    model = make(global_pool=pool, num_classes=7)
    x = images(2, 3, 64, 64)
    features = model.forward_features(x)
    mean, largest = features.mean((2, 3)), features.amax((2, 3))
    expected = dict(avg=mean, max=largest, avgmax=(mean + largest) / 2, catavgmax=torch.cat([mean, largest], 1))[pool]
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, expected)
    assert model.head_hidden_size == expected.shape[1] == model.get_classifier().in_features
    torch.testing.assert_close(model(x), model.get_classifier()(expected))


def test_without_head_or_pooling():
    x = images(2, 3, 64, 64)
    assert make(num_classes=0)(x).shape == (2, 32)
    unpooled = make(num_classes=0, global_pool="")
    assert torch.equal(unpooled(x), unpooled.forward_features(x))
    for wrong in (lambda: make(global_pool=""), lambda: make().reset_classifier(5, "")):
        with pytest.raises(ValueError, match="num_classes must be 0, got"):
            wrong()


def test_reset_classifier():
    model = make()
    features = model(images(2, 3, 64, 64))
    assert features.shape == (2, 10)
    model.reset_classifier(3)
    assert (model.num_classes, model(images(2, 3, 64, 64)).shape) == (3, (2, 3))
    model.reset_classifier(4, "catavgmax")
    assert (model.get_classifier().in_features, model.head_hidden_size) == (64, 64)
    assert model(images(2, 3, 64, 64)).shape == (2, 4)
    model.reset_classifier(0, "")
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images(2, 3, 64, 64)).shape == (2, 32, 2, 2)
    model.reset_classifier(0, "avg")
    assert model(images(2, 3, 64, 64)).shape == (2, 32)


@pytest.mark.parametrize("in_chans", range(1, 13))
def test_any_number_of_channels(in_chans):
    model = make(in_chans=in_chans)
    assert model.in_chans == in_chans
    assert model(images(1, in_chans, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("in_chans", [1, 6])
def test_pretrained_weights_adapt_to_channels_and_classes(weights_file, in_chans):
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(weights_file)))
    original, adapted = (
        make(),
        transcnn.create_model("transcnn_test", in_chans=in_chans, num_classes=4, **options).eval(),
    )
    x = images(2, 1, 64, 64)
    # A grey image in every channel gives the features that it gives in three.
    assert adapted(x.expand(-1, in_chans, -1, -1)).shape == (2, 4)
    torch.testing.assert_close(
        adapted.forward_features(x.expand(-1, in_chans, -1, -1)),
        original.forward_features(x.expand(-1, 3, -1, -1)),
        rtol=1e-4,
        atol=1e-5,
    )


# --- features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
def test_every_flavour_of_features_is_equal(design, tmp_path):
    path = tmp_path / "weights.pth"
    whole = make(**DESIGNS[design])
    torch.save(whole.state_dict(), path)
    x = images(2, 3, 97, 131)
    expected = whole.forward_intermediates(x, intermediates_only=True)
    for flavour in ("list", "dict", "hook", "fx", "getter"):
        extractor = transcnn.create_model(
            "transcnn_test",
            features_only=True,
            feature_cls=flavour,
            pretrained=True,
            pretrained_cfg_overlay=dict(file=str(path)),
            **DESIGNS[design],
        ).eval()
        features = extractor(x)
        features = list(features.values()) if isinstance(features, dict) else features
        assert len(features) == 4
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True)), flavour
        assert extractor.feature_info.channels() == [8, 16, 16, 32]
        assert extractor.feature_info.reduction() == [4, 8, 16, 32]


def test_features_of_chosen_stages():
    extractor = make(features_only=True, out_indices=(1, 3))
    assert [f.shape[1:] for f in extractor(images(1, 3, 64, 64))] == [(16, 8, 8), (32, 2, 2)]
    assert extractor.feature_info.channels() == [16, 32]
    extractor.set_grad_checkpointing(True)
    extractor.train()(images(2, 3, 64, 64))[1].sum().backward()


def test_forward_intermediates():
    model, x = make(), images(1, 3, 64, 64)
    last, every = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(last, every[3])

    def same(stages, **kwargs) -> bool:
        features = model.forward_intermediates(x, intermediates_only=True, **kwargs)
        return len(features) == len(stages) and all(
            torch.equal(f, every[i]) for f, i in zip(features, stages, strict=True)
        )

    assert same([0, 1, 2, 3])
    assert same([2, 3], indices=2)
    assert same([0, 2], indices=(0, 2), norm=True)
    assert same([1, 3], indices=[-3, -1])
    stopped, _ = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(stopped, every[1])
    assert torch.equal(model.forward_intermediates(x, indices=[1])[0], last)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")
    for wrong in ([4], [-5], 5, [], 0):
        with pytest.raises(ValueError, match="stages must be within -4 and 3, got indices="):
            model.forward_intermediates(x, indices=wrong)


def test_prune_intermediate_layers():
    model, x = make(), images(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    pruned = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, expected, strict=True))
    assert torch.equal(model(x), expected[1])  # neither head nor pooling are left
    kept = make()
    kept.prune_intermediate_layers(1, prune_head=False)
    assert kept(x).shape == (1, 10)


# --- sizes and levels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("size", [*SIZES, (1, 1), (5, 3)], ids=str)
def test_any_size(design, size):
    model = make(**DESIGNS[design])
    with torch.inference_mode():
        features = model.forward_intermediates(images(2, 3, *size), intermediates_only=True)
        assert model(images(2, 3, *size)).isfinite().all()
    sides = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]
    assert [feature.shape[2:] for feature in features] == sides
    assert model(images(0, 3, 64, 64)).shape == (0, 10)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_stem_stride(stride):
    extractor = make(features_only=True, stem_stride=stride)
    reductions = [stride, 2 * stride, 4 * stride, 8 * stride]
    assert extractor.feature_info.reduction() == reductions
    assert [f.shape[-1] for f in extractor(images(1, 3, 35, 35))] == [-(-35 // r) for r in reductions]


def test_more_levels_are_one_argument_away():
    model = make(grid_sizes=[(4, 2), (4, 2, 2), (2,), None], pool_ratios=[(2, 2), (2, 2, 2), (2,), None])
    assert [len(stage.blocks[0].attn.local) for stage in model.stages] == [2, 3, 1, 0]
    assert model(images(2, 3, 97, 131)).isfinite().all()
    with torch.device("meta"):
        three = transcnn.create_model(
            "transcnn_tiny", grid_sizes=[(8, 8), (8, 4), 8, None], pool_ratios=[(4, 4), (4, 2), 2, None]
        )
        assert three(torch.empty(1, 3, 256, 256)).shape == (1, 1000)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trainable_parameter_gets_a_gradient(design, checkpointing):
    model = make(**DESIGNS[design]).train()
    model.set_grad_checkpointing(checkpointing)
    model(images(2, 3, 64, 70)).square().sum().backward()
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_thawing_leaves_no_parameter_without_a_gradient():
    """As fine-tuning does; DDP would wait for the gradient of a parameter that no forward pass uses."""
    model = make(**HATNET).train().requires_grad_(False).requires_grad_(True)
    model(images(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert any(".proj_norm." in name for name in model.state_dict())  # as in the published files


def test_torchscript_is_refused_at_once():
    with pytest.raises(ValueError, match=r"scriptable must be False, got True: use torch\.export"):
        timm.create_model("transcnn_test", scriptable=True)


@pytest.mark.parametrize("design", DESIGNS)
def test_grad_checkpointing_changes_nothing(design):
    plain = make(drop_path_rate=0.3, drop_rate=0.2, **DESIGNS[design]).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    answers = []
    for model in (plain, saving):
        torch.manual_seed(1)
        answers.append(model(images(2, 3, 64, 64)))
        answers[-1].square().sum().backward()
    assert torch.equal(*answers)
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    saving.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in saving.stages)


def test_dropout_and_stochastic_depth_only_in_training():
    model = make(drop_rate=0.5, drop_path_rate=0.6, depths=(1, 2, 1, 1))
    x = images(4, 3, 64, 64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.modules() if isinstance(block, Block)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, pytest.approx(0.6))
    assert model.head.drop.p == 0.5
    # A block whose two branches are dropped is the identity.
    block = model.stages[3].blocks[0]
    block.drop_path.drop_prob = 1 - 1e-7
    torch.testing.assert_close(block(x := images(2, 32, 4, 4)), x)


def test_groups_for_layer_decay():
    model = transcnn.create_model("transcnn_test", depths=(1, 2, 1, 1))
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    layers = group_parameters(model, model.group_matcher())
    names = [name for name, _ in model.named_parameters()]
    assert sorted(n for group in coarse.values() for n in group) == sorted(names)
    assert sorted(n for group in layers.values() for n in group) == sorted(names)
    layer_of = {name: layer for layer, group in layers.items() for name in group}
    path = [
        "stem.0.weight",
        "stages.0.blocks.0.attn.q.weight",
        "stages.1.downsample.conv.weight",
        "stages.1.blocks.0.attn.q.weight",
        "stages.1.blocks.1.attn.q.weight",
        "stages.2.downsample.conv.weight",
        "head.fc.weight",
    ]
    order = [layer_of[name] for name in path]
    assert order == sorted(order)
    assert order[0] < order[1] < order[3] < order[4] < order[6]
    assert layer_of["stem.3.weight"] == order[0]

    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.head.fc.weight)] == 1.0
    assert scales[id(model.stem[0].weight)] == min(scales.values()) < 0.1
    assert len(scales) == len(names)
    assert model.no_weight_decay() == set()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_autocast_is_finite_and_near(design, dtype, tolerance):
    model, x = make(**DESIGNS[design]), images(2, 3, 64, 70)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype):
            y = model(x)
    assert y.isfinite().all()
    assert ((y.float() - expected).norm() / expected.norm()).item() <= tolerance


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 1), (5, 1), (5, 2), (17, 1), (17, 2)])
def test_bf16_gradients_of_a_map_one_or_two_columns_wide_are_written(height, width, layout):
    """PyTorch leaves those of the kernel's columns that see padding alone as they lay in memory."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 128, 3, stride=2, padding=1).to(memory_format=layout)
    x = images(4, 64, height, width).bfloat16().to(memory_format=layout)
    with torch.no_grad():
        conv.weight.copy_(conv.weight.bfloat16())
    strided(conv, x.float()).square().mean().backward()
    expected = conv.weight.grad.clone()
    for _ in range(20):
        conv.zero_grad()
        junk = torch.full_like(conv.weight, float("nan"), dtype=torch.bfloat16)  # what the kernel may find
        del junk
        with torch.autocast("cpu", torch.bfloat16):
            strided(conv, x).square().mean().backward()
        assert (conv.weight.grad - expected).norm() <= 0.02 * expected.norm()
    with torch.no_grad():
        fixed = strided(conv, x.float())
    torch.testing.assert_close(strided(conv, x.float()), fixed)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("height", [8, 9, 33])
def test_bf16_answers_on_narrow_maps_are_written(height, width, layout):
    """oneDNN's are what lay in memory where one column and five rows or more are left."""
    torch.manual_seed(0)
    norm, act = nn.BatchNorm2d, nn.SiLU
    halving = DualDownsample(64, 128, norm_layer=norm, act_layer=act).eval().to(memory_format=layout)
    x = images(2, 64, height, width).to(memory_format=layout)
    with torch.no_grad():
        expected = halving(x)
        with torch.autocast("cpu", torch.bfloat16):
            usual = halving(x)
        for found in (usual, optimize(halving, "bf16")(x)):
            assert found.shape == expected.shape
            assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, dict(stride=1), dict(dilation=2, padding=2), dict(padding_mode="reflect"), dict(bias=False)]
)
def test_what_is_done_for_narrow_maps_changes_no_value(width, options):
    """Also in a traced network, where another size may come."""
    torch.manual_seed(0)
    down = ConvDownsample(4, 6, norm_layer=nn.BatchNorm2d).eval()
    down.conv = nn.Conv2d(4, 6, 3, **{"stride": 2, "padding": 1, **options})
    traced = torch.fx.symbolic_trace(down)
    x = images(2, 4, 5, width)
    if options.get("padding_mode") == "reflect" and width == 1:
        pytest.skip("a column has nothing to reflect")
    with torch.no_grad():
        expected = down.norm(down.conv(x))
        with torch.autocast("cpu", torch.bfloat16):
            found = [down(x), traced(x)]
        found.append(copy.deepcopy(down).bfloat16()(x.bfloat16()))
        assert torch.equal(down(x), expected)
    for y in found:
        assert y.shape == expected.shape
        torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.03)


def test_channels_last_changes_nothing():
    model, x = make().double(), images(2, 3, 64, 70, dtype=torch.float64)
    expected = model(x)
    y = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


# --- copies, files, libraries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", DESIGNS)
def test_copies(design):
    model, x = make(**DESIGNS[design]), images(1, 3, 64, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    state = model.state_dict()
    assert all(value.is_contiguous() for value in state.values())
    storages = Counter(value.data_ptr() for value in state.values())
    assert storages.most_common(1)[0][1] == 1


def test_local_dir_round_trip(tmp_path):
    model, x = make(num_classes=5), images(2, 3, 64, 64)
    save_for_hf(model, tmp_path, safe_serialization=True, model_config=dict(label_names=list("abcde")))
    name = f"local-dir:{tmp_path}"
    loaded = transcnn.create_model(name, pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    assert loaded.pretrained_cfg["label_names"] == list("abcde")
    other = transcnn.create_model(name, pretrained=True, num_classes=3, in_chans=1).eval()
    assert other(x[:, :1]).shape == (2, 3)
    features = model.forward_intermediates(x, intermediates_only=True)
    for flavour in ("list", "getter"):
        extractor = transcnn.create_model(name, pretrained=True, features_only=True, feature_cls=flavour).eval()
        assert all(torch.equal(a, b) for a, b in zip(extractor(x), features, strict=True))


def test_changed_levels_survive_local_dir(tmp_path):
    changes = dict(grid_sizes=[(4, 2), 4, 2, None], pool_ratios=[(2, 2), 2, 2, None], in_chans=1)
    model, x = make(**changes), images(2, 1, 64, 64)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(transcnn.create_model(f"local-dir:{tmp_path}", pretrained=True, **changes).eval()(x), model(x))


def test_segmentation_models_encoders():
    smp = pytest.importorskip("segmentation_models_pytorch")
    x = images(2, 3, 128, 160)  # PAN takes no smaller ones
    for architecture, options in {
        "FPN": {},
        "Unet": {},
        "DPT": dict(encoder_depth=4, decoder_readout="ignore"),
        "DeepLabV3": {},
        "DeepLabV3Plus": {},
        "PAN": {},
    }.items():
        model = smp.create_model(architecture, "tu-transcnn_test", encoder_weights=None, classes=2, **options).eval()
        assert model(x).shape == (2, 2, 128, 160), architecture


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_output_stride(design, output_stride):
    """Stages are dilated instead of downsampled: their convolutions compute the same at every second position."""
    settings = dict(design=design, norm_layer="batchnorm2d")  # GroupNorm's statistics are those of the whole map
    usual, dilated = make(**settings), make(**settings, output_stride=output_stride)
    x = images(2, 3, 100, 130)
    reductions = [min(reduction, output_stride) for reduction in (4, 8, 16, 32)]
    assert [info["reduction"] for info in dilated.feature_info] == reductions
    maps = dilated.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-100 // r), -(-130 // r)) for r in reductions]  # pyright: ignore
    features = timm.create_model("transcnn_test", features_only=True, output_stride=output_stride)
    assert [tuple(m.shape[2:]) for m in features(x)] == [tuple(m.shape[2:]) for m in maps]  # pyright: ignore

    step = 1  # from positions of the dilated map to those of the usual one
    y = images(2, dilated.feature_info[0]["num_chs"], 25, 33)
    for stage, other, reduction in zip(usual.stages, dilated.stages, (4, 8, 16, 32), strict=True):
        a = stage.downsample(y[..., ::step, ::step])
        b = other.downsample(y)
        step = max(1, reduction // output_stride)
        assert torch.allclose(a, b[..., ::step, ::step], atol=1e-6)
        a, y = stage.blocks[0].irb(a), other.blocks[0].irb(b)
        assert torch.allclose(a, y[..., ::step, ::step], atol=1e-6)


def test_output_stride_when_optimized_and_trained():
    model = make(output_stride=8)
    x = images(1, 3, 64, 97)
    with torch.no_grad():
        assert torch.allclose(optimize(model)(x), model(x), rtol=1e-4, atol=1e-5)
    plain, fast = make(output_stride=8).train(), accelerate_training(make(output_stride=8).train())
    x = images(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    gradients = []
    for network in (plain, fast):
        network = network.to(memory_format=torch.channels_last)  # pyright: ignore
        network(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))  # pyright: ignore
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


def test_img_size_of_training_scripts_is_accepted():
    assert transcnn.create_model("transcnn_test", img_size=97).eval()(images(1, 3, 97, 97)).shape == (1, 10)


def test_a_layer_of_ones_own():
    model = make(norm_layer=lambda channels: nn.GroupNorm(2, channels), act_layer="gelu")
    assert {type(m) for m in model.modules()} >= {nn.GroupNorm}
    assert not any(isinstance(m, nn.BatchNorm2d | nn.SiLU) for m in model.modules())
    assert model(images(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(design="resnet"), r"design must be one of \('transcnn', 'hatnet'\), got 'resnet'"),
        (dict(stem_stride=3), r"stem_stride must be one of \(1, 2, 4\), got 3"),
        (dict(norm_layer="batch"), r"norm_layer must be one of .*'batchnorm2d'.* or a callable, got 'batch'"),
        (dict(act_layer="swosh"), r"act_layer must be timm's name .*, got 'swosh'"),
        (dict(output_stride=4), r"output_stride must be .*8, 16, 32.*, got 4"),
        (dict(depths=(1, 1)), r"depths must have one entry for each of the 4 stages of dims, got \(1, 1\)"),
        (dict(grid_sizes=8), r"grid_sizes must have one entry for each of the 4 stages of dims, got 8"),
        (dict(kernel_sizes=(3, 4, 3, 3)), r"kernel_sizes must be odd, got \(3, 4, 3, 3\)"),
        (dict(head_dim=5), r"head_dim must divide dim=8, got 5"),
        (dict(drop_path_rate=1.0), r"drop_path_rate must be from 0 to below 1, got 1.0"),
        (dict(in_chans=0), r"in_chans must be 1 or more, got 0"),
        (dict(num_classes=-1), r"num_classes must be 0 .* or more, got -1"),
        (dict(global_pool="mean"), r"global_pool must be one of \('avg', .*, got 'mean'"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TransCNN(**{**VARIANTS["transcnn_test"], **kwargs})


def test_importing_is_light(fresh_imports):
    assert fresh_imports["seconds"] < allowed(1)
    ours = fresh_imports["transcnn"] - fresh_imports["torch, timm"]
    assert "transcnn" in ours
    assert ours <= {"transcnn"} | set(sys.stdlib_module_names)


GOLDENS = {  # first four logits of one image
    ("transcnn", 64, 64): [0.625640092164, -0.754762532965, 0.579061556664, -0.175399486548],
    ("transcnn", 97, 45): [0.717970539855, -0.902281271809, 0.696840490719, -0.177422123819],
    ("hatnet", 64, 64): [-0.48139748128, -0.818766705925, 0.415098047521, 0.823492499004],
    ("hatnet", 97, 45): [0.540011191869, -0.574505660731, 0.575276133828, 0.861849588233],
}


@pytest.mark.parametrize(("design", "height", "width"), GOLDENS)
def test_golden_logits(design, height, width):
    """Guards against silent change: what these weights answered when the networks equalled the published ones."""
    model = make(**DESIGNS[design]).double()
    logits = model(images(1, 3, height, width, dtype=torch.float64))[0, :4]
    np.testing.assert_allclose(logits.tolist(), GOLDENS[design, height, width], rtol=1e-9)
