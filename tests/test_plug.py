"""H-MHSA plugged into other people's networks: what must hold, on each host and in each way of using it."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import pickle
from functools import partial

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from timm.models import FeatureGraphNet, FeatureHookNet, FeatureListNet
from torch import nn

from transcnn import HMHSA
from transcnn.checkpoints.memory import forward_bytes
from transcnn.errors import UserError
from transcnn.plugging.places import backbone, default_levels, find
from transcnn.plugging.plug import (
    ConvReplacement,
    load_host,
    plug,
    plug_like,
    plug_spec,
    plugged,
    plugged_parameters,
    unplug,
)


class LeNet5(nn.Module):
    """LeCun et al. 1998, for 28x28 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.s2 = nn.Conv2d(1, 6, 5, padding=2), nn.AvgPool2d(2)
        self.c3, self.s4 = nn.Conv2d(6, 16, 5), nn.AvgPool2d(2)
        self.c5, self.f6, self.output = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.s2(self.c1(x).tanh())
        x = self.s4(self.c3(x).tanh())
        return self.output(self.f6(self.c5(x.flatten(1)).tanh()).tanh())


def tv(name: str, **kwargs: object) -> partial:
    return partial(torchvision.models.get_model, name, weights=None, num_classes=10, **kwargs)


def vgg16() -> nn.Module:
    model = torchvision.models.vgg16(num_classes=10, init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 10)  # its own takes 120 M parameters, and isn't what is tested
    return model


def alexnet() -> nn.Module:
    model = torchvision.models.alexnet(num_classes=10)
    model.classifier = nn.Linear(256 * 6 * 6, 10)  # as above
    return model


# How to make each, what "auto" finds there, the side of a test image, and whether its export takes long.
no_init = {"init_weights": False, "aux_logits": False}
few = {"layers": (1, 1, 1, 1)}
HOSTS = {
    "alexnet": (alexnet, "features.4 features.11 features.12", 64, False),
    "vgg16": (vgg16, "features.22 features.29 features.30", 64, True),
    "googlenet": (tv("googlenet", **no_init), "inception3b inception4e inception5b", 64, True),
    "inception_v3": (tv("inception_v3", **no_init), "Mixed_5d Mixed_6e Mixed_7c", 96, True),
    "inception_v4": (partial(timm.create_model, "inception_v4"), "features.9 features.17 features.21", 96, True),
    "resnet18": (tv("resnet18"), "layer2 layer3 layer4", 64, False),
    "resnet50": (partial(timm.create_model, "resnet50", **few), "layer2 layer3 layer4", 64, True),
    "resnext50": (tv("resnext50_32x4d"), "layer2 layer3 layer4", 64, True),
    "seresnet50": (partial(timm.create_model, "seresnet50", **few), "layer2 layer3 layer4", 64, True),
    "sknet18": (partial(timm.create_model, "skresnet18"), "layer2 layer3 layer4", 64, True),
    "resnest14": (partial(timm.create_model, "resnest14d"), "layer2 layer3 layer4", 64, True),
    "regnety": (partial(timm.create_model, "regnety_002"), "s2 s3 s4", 64, True),
    "densenet121": (
        partial(timm.create_model, "densenet121", block_config=(2, 2, 2, 2)),
        "features.denseblock2 features.denseblock3 features.norm5",
        64,
        True,
    ),
    "mobilenet_v1": (partial(timm.create_model, "mobilenetv1_100"), "blocks.2 blocks.3 blocks.4", 64, True),
    "mobilenet_v2": (tv("mobilenet_v2"), "features.6 features.13 features.17", 64, True),
    "mnasnet": (tv("mnasnet0_5"), "layers.9 layers.11 layers.13", 64, True),
    "efficientnet_b0": (partial(timm.create_model, "efficientnet_b0"), "blocks.2 blocks.4 blocks.6", 64, True),
    "shufflenet_v2": (tv("shufflenet_v2_x0_5"), "stage2 stage3 stage4", 64, True),
    "convnext_tiny": (
        partial(timm.create_model, "convnext_tiny", depths=few["layers"]),
        "stages.1 stages.2 stages.3",
        64,
        True,
    ),
    "lenet5": (LeNet5, "c3 s4", 28, False),
    "unet": (
        partial(smp.Unet, "resnet18", encoder_weights=None),
        "encoder.layer2 encoder.layer3 encoder.layer4",
        64,
        True,
    ),
    "deeplabv3": (
        partial(torchvision.models.segmentation.deeplabv3_resnet50, weights=None, weights_backbone=None),
        "backbone.layer4",
        64,
        True,
    ),
}
EXPORTS = [pytest.param(name, marks=[pytest.mark.slow] * HOSTS[name][3]) for name in HOSTS]


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, size = HOSTS[name][0]().eval(), HOSTS[name][2]
    return model, torch.randn(2, 1 if name == "lenet5" else 3, size, size)


def example_of(name: str) -> torch.Tensor | None:
    return torch.zeros(1, 1, 28, 28) if name == "lenet5" else None


def tensor_of(output: object) -> torch.Tensor:
    return output["out"] if isinstance(output, dict) else output  # pyright: ignore


def tree(model: nn.Module) -> list[tuple[str, int, type, list[int]]]:
    """Every module's name, identity and class, and its hooks."""
    return [(name, id(m), type(m), list(m._forward_hooks)) for name, m in model.named_modules()]


def wake(model: nn.Module) -> None:
    """Scales as training would leave them, so that the branches count."""
    for _, branch in plugged(model):
        nn.init.normal_(branch.scale, std=0.5)


@torch.no_grad()
def outputs(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return tensor_of(model.eval()(image))


@pytest.fixture
def small() -> tuple[nn.Module, torch.Tensor]:
    """A plugged ResNet of half a million parameters, its scales awake, and a batch."""
    torch.manual_seed(0)
    model = plug(timm.create_model("test_resnet", num_classes=5), ["layer2", "layer3.0.act2", "layer4"])
    wake(model)
    return model.eval(), torch.randn(2, 3, 96, 64)


# --- hosts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTS)
def test_host(name: str) -> None:
    model, image = make(name)
    untrained = copy.deepcopy(model.state_dict())
    before, names, modules = outputs(model, image), list(model.state_dict()), tree(model)
    plug(model, example=example_of(name))
    assert " ".join(place for place, _ in plugged(model)) == HOSTS[name][1]
    assert [key for key in model.state_dict() if ".hmhsa." not in key] == names
    assert torch.equal(outputs(model, image), before)

    model.train()
    loss = tensor_of(model(image)).square().mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    for place, branch in plugged(model):
        assert branch.scale.abs().max() > 0, place

    unplug(model)
    assert tree(model) == modules
    assert list(model.state_dict()) == names
    model.load_state_dict(untrained)
    assert torch.equal(outputs(model, image), before)


@pytest.mark.parametrize("name", EXPORTS)
def test_host_exports_with_dynamic_sizes(name: str) -> None:
    model, image = make(name)
    places = HOSTS[name][1].split()
    wake(plug(model, list(dict.fromkeys((places[0], places[-1]))), example=example_of(name)))
    dims: dict[int, object] = {0: torch.export.Dim("batch"), 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    # Not too small an example: where a map is one grid or merges into one token, the exporter takes that for a rule.
    example, other = torch.randn(2, 3, 224, 288), torch.randn(3, 3, 160, 256)
    if name == "lenet5":  # its linear layers take one size
        dims, example, other = {0: dims[0]}, image, image.repeat(2, 1, 1, 1)[:3]
    if name.startswith("inception"):  # the exporter can't solve what even sides make of its unpadded convolutions
        example = torch.randn(2, 3, 257, 323)  # sides such as transcnn export takes
    if name == "unet":  # smp wants multiples of 32
        dims |= {2: 32 * torch.export.Dim("h"), 3: 32 * torch.export.Dim("w")}
    # The exporter's guards on sizes (whether a map is one grid, and whether sizes divide, as the example's do) come
    # from questions about memory layout; the graph is right without them, which is what is compared here.
    program = torch.export.export(model, (example,), dynamic_shapes=(dims,)).module(check_guards=False)
    with torch.no_grad():
        torch.testing.assert_close(tensor_of(program(other)), tensor_of(model(other)), rtol=1e-4, atol=1e-4)


# --- training -------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_scale_first_and_everything_then() -> None:
    model = plug(timm.create_model("test_resnet", num_classes=5), ["layer2", "layer4"])
    image, optimizer = torch.randn(2, 3, 64, 64), torch.optim.SGD(model.parameters(), 0.1)
    for step in (1, 2):
        optimizer.zero_grad()
        model(image).square().mean().backward()
        for place, branch in plugged(model):
            assert branch.scale.grad.abs().max() > 0, place
            reached = [p.grad.abs().max() > 0 for p in branch.attn.parameters()]
            assert all(reached) if step == 2 else not any(reached), place
        optimizer.step()


def test_frozen_host_trains_the_plugged_parts_alone() -> None:
    model = plug(timm.create_model("test_resnet", num_classes=5), "layer2,layer3").eval()
    host = {key: value.clone() for key, value in model.state_dict().items() if ".hmhsa." not in key}
    model.requires_grad_(False)
    parameters = list(plugged_parameters(model))
    assert {id(p) for p in parameters} == {id(p) for name, p in model.named_parameters() if ".hmhsa." in name}
    optimizer = torch.optim.SGD([p.requires_grad_() for p in parameters], 0.1)
    image, losses = torch.randn(1, 3, 64, 64), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(image) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in host.items())


def test_grad_checkpointing_changes_nothing(small: tuple[nn.Module, torch.Tensor]) -> None:
    model, image = small
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        output = model.train()(image)
        output.sum().backward()
        results.append((output, {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, msg=name)


def _ddp_process(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = plug(timm.create_model("test_resnet", num_classes=5), ["layer2", "layer3.0.act2"])
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    torch.manual_seed(rank)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    total = sum(p.detach().double().sum() for p in plugged_parameters(model))
    totals = [torch.zeros_like(total) for _ in range(2)]
    torch.distributed.all_gather(totals, total)
    assert totals[0] == totals[1]
    assert all(branch.scale.abs().max() > 0 for _, branch in plugged(model))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("forks")
def test_ddp_with_two_processes(tmp_path: object) -> None:
    torch.multiprocessing.start_processes(  # pyright: ignore
        _ddp_process, (f"{tmp_path}/store",), nprocs=2, start_method="forkserver"
    )


# --- copies, formats, precision -------------------------------------------------------------------------------------


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("host", ["test_resnet", "densenet"])
def test_copies_stand_alone(duplicate: object, host: str) -> None:
    torch.manual_seed(0)
    model = small_densenet() if host == "densenet" else timm.create_model(host, num_classes=5)
    image, bare = torch.randn(2, 3, 64, 64), outputs(model, torch.zeros(1, 3, 64, 64))
    wake(plug(model))
    expected = outputs(model, image)
    twin = duplicate(model)  # pyright: ignore
    for p in plugged_parameters(model):
        nn.init.zeros_(p)
    assert torch.equal(outputs(twin, image), expected)
    assert torch.equal(outputs(unplug(twin), torch.zeros(1, 3, 64, 64)), bare)
    assert len(list(plugged(model))) == 3


def test_networks_pickled_when_all_was_in_one_module_still_load(small: tuple[nn.Module, torch.Tensor]) -> None:
    model, image = small
    pickled = pickle.dumps(model, 0).replace(b"ctranscnn.plugging.branches\n", b"ctranscnn.plugging.plug\n")
    assert b"ctranscnn.plugging.plug\nHMHSABranch\n" in pickled
    assert b"plugging.branches" not in pickled
    assert torch.equal(outputs(pickle.loads(pickled), image), outputs(model, image))


def small_densenet(blocks: tuple[int, ...] = (2, 2, 2, 2)) -> nn.Module:
    return timm.models.DenseNet(growth_rate=8, block_config=blocks, num_classes=5)


def test_state_dict_round_trip(small: tuple[nn.Module, torch.Tensor]) -> None:
    model, image = small
    spec = plug_spec(model)
    twin = plug_like(timm.create_model("test_resnet", num_classes=5), spec)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(outputs(twin, image), outputs(model, image))
    assert plug_spec(twin) == spec


def test_host_checkpoint_loads_into_the_plugged_model(
    small: tuple[nn.Module, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model, image = small
    host = timm.create_model("test_resnet", num_classes=5)
    for _, branch in plugged(model):
        nn.init.zeros_(branch.scale)
    ours = [key for key in model.state_dict() if ".hmhsa." in key]
    assert model.load_state_dict(host.state_dict(), strict=False) == (ours, [])
    with caplog.at_level(logging.WARNING):
        assert load_host(model, host.state_dict()) == ours
    assert f"only the {len(ours)} H-MHSA tensors" in caplog.text
    assert torch.equal(outputs(model, image), outputs(host, image))
    assert load_host(model, model.state_dict()) == []
    broken = {key: value for key, value in host.state_dict().items() if key != "fc.weight"}
    broken.update({"stem": torch.zeros(1), "fc.bias": torch.zeros(1)})
    with pytest.raises(UserError, match=r"1 missing: fc\.weight; 1 unexpected: stem; 1 of another shape: fc\.bias"):
        load_host(model, broken)


def test_bf16_autocast_and_bf16_models(small: tuple[nn.Module, torch.Tensor]) -> None:
    model, image = small
    expected = outputs(model, image)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs(model, image)
    assert cast.dtype == torch.bfloat16
    assert (cast - expected).norm() < 0.03 * expected.norm()
    host = timm.create_model("test_resnet", num_classes=5).bfloat16()
    before = outputs(host, image.bfloat16())
    assert torch.equal(outputs(plug(host), image.bfloat16()), before)
    assert {p.dtype for p in plugged_parameters(host)} == {torch.bfloat16}
    host = timm.create_model("test_resnet", num_classes=5)
    with torch.autocast("cpu", torch.bfloat16):  # the host's own precision is kept too
        before = outputs(host, image)
        assert torch.equal(outputs(plug(host), image), before)


def test_channels_last(small: tuple[nn.Module, torch.Tensor]) -> None:
    model, image = small
    expected = outputs(model, image)
    model, image = model.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    torch.testing.assert_close(outputs(model, image), expected, rtol=1e-4, atol=1e-4)
    branch = next(branch for _, branch in plugged(model))
    x = torch.randn(2, branch.plug.dim, 8, 8).to(memory_format=torch.channels_last)
    assert branch(x).is_contiguous(memory_format=torch.channels_last)


# --- compile, export, features --------------------------------------------------------------------------------------


def test_compiles_into_one_graph(small: tuple[nn.Module, torch.Tensor]) -> None:
    model, image = small
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, image), outputs(model, image), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_with_inductor(small: tuple[nn.Module, torch.Tensor]) -> None:
    model, image = small
    torch.testing.assert_close(outputs(torch.compile(model), image), outputs(model, image), rtol=1e-3, atol=1e-4)


class ThreeWays(nn.Module):
    """A host for a branch that a Sequential runs, one that a hook runs, and one that a dense block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.plain = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.stage = timm.create_model("test_convnext", depths=(1, 1, 1, 1), dims=(16, 32, 32, 32)).stages[1]
        self.dense = timm.models.DenseNet(growth_rate=16, block_config=(2,)).features.denseblock1
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dense(self.stage(self.plain(self.stem(x)))).mean((2, 3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporter's own code
def test_onnx_with_dynamic_sizes() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = ThreeWays().eval()
    # Grids in one of them alone, as they take the exporter longest; tests/test_attention.py has more.
    plug(model, ["plain"], grid_sizes=(4,), pool_ratios=(2,))
    wake(plug(model, ["stage", "dense"], grid_sizes=(), pool_ratios=()))
    ways = [(branch.plug.hooked, bool(branch.plug.inside)) for _, branch in plugged(model)]
    assert ways == [(False, False), (True, False), (True, True)]
    shapes = ({0: "batch", 2: "height", 3: "width"},)
    program = torch.onnx.export(
        model, (torch.randn(2, 3, 96, 64),), dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for size in ((3, 3, 64, 64), (1, 3, 97, 131)):
        image = torch.randn(size)
        (answer,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        torch.testing.assert_close(torch.from_numpy(answer), outputs(model, image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("net", [FeatureListNet, FeatureHookNet, FeatureGraphNet])
def test_features_of_a_plugged_model(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    image = torch.randn(2, 3, 96, 64)
    bare = net(copy.deepcopy(model), out_indices=(2, 3)).eval()(image)
    wake(plug(model, ["layer2", "layer3"]))
    _, features = model.eval().forward_intermediates(image, indices=[2, 3])
    found = net(model, out_indices=(2, 3)).eval()(image)
    assert [tuple(f.shape) for f in found] == [tuple(f.shape) for f in bare]
    for each, expected, without in zip(found, features, bare, strict=True):
        assert torch.equal(each, expected)
        assert not torch.equal(each, without)


@pytest.mark.parametrize("host", ["test_resnet", "test_convnext", "test_efficientnet", "test_byobnet"])
def test_plugging_a_features_only_model(host: str) -> None:
    model = timm.create_model(host, features_only=True).eval()
    image, modules = torch.randn(2, 3, 64, 64), tree(model)
    with torch.no_grad():
        before = model(image)
        plug(model)
        assert all(map(torch.equal, model(image), before))
        assert len(list(plugged(model))) == 3
        wake(model)
        after = model(image)
    assert not any(map(torch.equal, after[-3:], before[-3:]))
    assert all(p.shape for p in plugged_parameters(model))
    assert tree(unplug(model)) == modules


# --- other doors ----------------------------------------------------------------------------------------------------


def resnet50(**kwargs: object) -> nn.Module:
    """timm's, with fewer and narrower blocks: the last stage has two, the first of them with a stride of 2."""
    return timm.create_model("resnet50", layers=(1, 1, 1, 2), channels=(16, 32, 32, 64), num_classes=5, **kwargs)


def test_timm_takes_it_as_its_own_attention_layers() -> None:
    model = resnet50(block_args=dict(attn_layer=HMHSA))
    assert sum(isinstance(m, HMHSA) for m in model.modules()) == 5
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("at", ["auto", ["layer4"], ["layer4.*.conv2"]])
def test_replacing_3x3_convolutions(at: str | list[str]) -> None:
    torch.manual_seed(0)
    model = resnet50()
    image = torch.randn(2, 3, 96, 64)
    before, modules = outputs(model, image), tree(model)
    host = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="changes the model's outputs"):
        plug(model, at, mode="replace")
    assert [name for name, _ in plugged(model)] == ["layer4.0.conv2", "layer4.1.conv2"]
    assert all(isinstance(module, ConvReplacement) for _, module in plugged(model))
    assert outputs(model, image).shape == before.shape
    model.train()(image).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert load_host(model, host) == [key for key in model.state_dict() if ".attn." in key]
    again = plug_like(resnet50(), plug_spec(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again, image), outputs(model, image))
    unplug(model)
    model.load_state_dict(host)
    assert tree(model) == modules
    assert torch.equal(outputs(model, image), before)


def test_options_reach_the_layers() -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    options = dict(head_dim=4, grid_sizes=(4, 2), pool_ratios=(2, 2), norm_layer="batchnorm2d")
    image, before = torch.randn(2, 3, 64, 64), None
    before = outputs(model, image)
    plug(model, "layer2", **options)
    assert torch.equal(outputs(model, image), before)
    ((_, branch),) = plugged(model)
    assert (branch.attn.head_dim, branch.attn.grid_sizes, branch.attn.pool_ratios) == (4, (4, 2), (2, 2))
    assert isinstance(branch.attn.ds_norm, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("side", "levels"),
    [(64, ((8,), (8,))), (32, ((8,), (4,))), (16, ((8,), (2,))), (8, ((), ())), (56, ((8,), (8,))), (28, ((7,), (4,)))],
)
def test_default_levels_are_the_papers(side: int, levels: tuple) -> None:
    assert default_levels(side, side) == levels


def test_trunk_lists_stages_not_their_insides() -> None:
    places = backbone(timm.create_model("test_resnet"), torch.zeros(1, 3, 224, 224))
    assert [place.name for place in places][-4:] == ["layer1", "layer2", "layer3", "layer4"]
    assert [place.stride for place in places][-4:] == [4, 8, 16, 32]
    assert places[-1].size == (7, 7)


# --- errors ---------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Hands out everything that H-MHSA can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.idle, self.pair, self.fc = nn.Conv2d(8, 8, 1), Pair(), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.conv(x)))
        return self.fc(self.pair(x)[0].mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("layer3", "no module is called 'layer3'; near: "),
        ("con", "no module is called 'con'; near: conv"),
        ("conv,fcs.*", r"no module is called 'fcs\.\*'"),
        ("fc", r"the output of fc is not one \(B, C, H, W\) tensor"),
        ("pair", r"the output of pair is not one"),
        ("twice", "twice runs 2 times"),
        ("idle", "idle doesn't run"),
    ],
)
def test_errors_leave_the_model_alone(at: str, message: str) -> None:
    model = Odd()
    modules = tree(model)
    with pytest.raises(UserError, match=message):
        plug(model, at)
    assert tree(model) == modules


def test_more_errors() -> None:
    model = plug(timm.create_model("test_resnet"), "layer2")
    with pytest.raises(UserError, match="layer2 is plugged already"):
        plug(model, ["layer3", "layer2"])
    assert len(list(plugged(model))) == 1
    with pytest.raises(UserError, match="name one module or more; got none"):
        plug(model, [])
    with pytest.raises(UserError, match="mode must be 'add' or 'replace', got 'swap'"):
        plug(model, "layer3", mode="swap")
    with pytest.raises(UserError, match="give both of grid_sizes and pool_ratios"):
        plug(model, "layer3", grid_sizes=(8,))
    with pytest.raises(UserError, match=r"can't be run on an example of shape \(1, 2, 64, 64\)"):
        plug(model, "layer3", example=torch.zeros(1, 2, 64, 64))
    with pytest.raises(ValueError, match="head_dim must divide dim"):
        plug(model, ["layer1", "layer3"], head_dim=24)  # fits the first
    with pytest.raises(UserError, match="has no module 'layer9'"):
        plug_like(model, [{**plug_spec(model)[0], "at": "layer9"}])
    with pytest.raises(UserError, match=r"conv1\.0 can't be replaced"):
        plug(model, "conv1.0", mode="replace")
    with pytest.raises(UserError, match=r"\(B, H, W, C\)"):
        plug(timm.create_model("swin_tiny_patch4_window7_224"))
    with pytest.raises(UserError, match="holds no convolution"):
        plug(nn.Sequential(nn.Linear(2, 2)))
    assert len(list(itertools.chain(plugged(model)))) == 1


class DenseLayer(nn.Module):
    """Takes all maps before it, as a layer of a dense block does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self.conv(torch.cat(maps, 1))


class DenseBlock(nn.ModuleDict):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [x]
        for layer in self.values():
            maps.append(layer(maps))
        return torch.cat(maps, 1)


@pytest.fixture
def dense() -> nn.Module:
    block = DenseBlock({"a": DenseLayer(8), "b": DenseLayer(16)})
    return nn.ModuleDict({"net": nn.Sequential(nn.Conv2d(3, 8, 1), block)})["net"].eval()


@pytest.mark.parametrize("order", [[["1", "1.a", "1.b"]], [["1.b"], ["1"]], [["1"], ["1.a"]]])
def test_no_branch_takes_the_place_of_another(dense: nn.Module, order: list[list[str]]) -> None:
    """A dense block's branch lives in one of its layers; each layer may be plugged itself, before, after or with it."""
    before, x = tree(dense), torch.randn(1, 3, 8, 8)
    expected = outputs(dense, x)
    assert plug_like(dense, plug_spec(dense)) is dense
    for at in order:
        plug(dense, at, example=x)
    branches = dict(plugged(dense))
    assert sorted(branches) == sorted(name for at in order for name in at)
    torch.testing.assert_close(outputs(dense, x), expected, rtol=0, atol=0)
    wake(dense)
    all_of_them = outputs(dense, x)
    for branch in branches.values():  # each counts
        with torch.no_grad():
            branch.scale.zero_()
        assert (outputs(dense, x) - all_of_them).abs().max() > 1e-4
        wake(dense)
    again = plug_like(unplug(copy.deepcopy(dense)), plug_spec(dense))
    again.load_state_dict(dense.state_dict())
    torch.testing.assert_close(outputs(again, x), outputs(dense, x), rtol=0, atol=0)
    assert tree(unplug(dense)) == before


def test_a_block_without_room_and_a_spec_that_names_a_place_twice(dense: nn.Module) -> None:
    before, x = tree(dense), torch.randn(1, 3, 8, 8)
    with pytest.raises(UserError, match="nothing inside of 1 can hold one more H-MHSA"):
        plug(dense, ["1", "1.a", "1.b", "1.a.conv", "1.b.conv"], example=x)
    assert tree(dense) == before
    spec = plug_spec(plug(dense, "1", example=x))
    with pytest.raises(UserError, match="would hold two H-MHSA"):
        plug_like(unplug(dense), [*spec, *spec])
    assert tree(dense) == before


class TwoNames(nn.Module):
    """Runs its convolution by the second of its names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.body = nn.Sequential(self.stem, self.conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.mark.filterwarnings("ignore:mode='replace'")
def test_a_convolution_of_two_names_is_replaced_under_both() -> None:
    model, x = TwoNames().eval(), torch.randn(1, 3, 8, 8)
    conv, expected = model.conv, outputs(model, x)
    plug(model, "conv", mode="replace", example=x)
    assert model.body[1] is model.conv
    assert (outputs(model, x) - expected).abs().max() > 1e-3
    assert unplug(model).body[1] is model.conv is conv


def test_a_compiled_network_is_refused() -> None:
    """Its code was made before, or leaves hooks out: nothing would be trained, without a word."""
    model, x = TwoNames(), torch.zeros(1, 3, 8, 8)
    spec = plug_spec(plug(copy.deepcopy(model), "stem", example=x))
    with pytest.raises(UserError, match="the network is compiled already"):
        plug(torch.compile(model, backend="eager"), "_orig_mod.stem", example=x)  # pyright: ignore
    model.body.compile(backend="eager")
    for what in ("stem", spec):
        with pytest.raises(UserError, match="body of the network is compiled already"):
            plug_like(model, what)


def test_maps_with_channels_last_are_refused_by_name_too() -> None:
    """torchvision's Swin keeps maps as (B, H, W, C), and says so nowhere."""
    with torch.device("meta"):
        model = torchvision.models.SwinTransformer([4, 4], 32, [1, 1], [1, 1], [7, 7])
        x = torch.zeros(1, 3, 64, 96)
    for at in ("features.1", "features.3.0", "features.2"):
        with pytest.raises(UserError, match=r"makes maps \(B, H, W, C\), of shape \(1, "):
            plug(model, at, example=x)
    assert [place.name for place in find(model, "features.0.0", x)] == ["features.0.0"]


def test_weights_of_modules_with_two_names_stay_where_they_are() -> None:
    """Finding places runs networks on the meta device: such modules' weights were left there."""
    model, x = TwoNames().eval(), torch.randn(1, 3, 8, 8)
    model.tied = nn.Conv2d(3, 8, 1)
    model.tied.weight = model.stem.weight  # another module with the same tensor, and one that has a tensor twice
    model.register_buffer("mean", torch.zeros(1))
    model.register_buffer("same", model.mean)
    expected, tensors = outputs(model, x), {name: id(p) for name, p in model.state_dict(keep_vars=True).items()}
    assert [place.channels for place in find(model, "conv", x)] == [8]
    assert forward_bytes(model, (3, 8, 8)) > 0
    plug(model, "stem", example=x)
    unplug(model)
    assert {name: id(p) for name, p in model.state_dict(keep_vars=True).items()} == tensors
    assert not any(p.is_meta for p in model.state_dict().values())
    torch.testing.assert_close(outputs(model, x), expected, rtol=0, atol=0)


def test_a_network_made_on_the_meta_device_starts_as_its_host() -> None:
    """As sharded training makes networks: memory without values, then each module's own reset_parameters."""
    torch.manual_seed(0)
    host, x = TwoNames().eval(), torch.randn(1, 3, 8, 8)
    with torch.device("meta"):
        model = plug(TwoNames().eval(), "stem")
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    load_host(model, host.state_dict())
    torch.testing.assert_close(outputs(model, x), outputs(host, x), rtol=0, atol=0)


class Remembers(nn.Module):
    """Keeps tensors for its next call, as torchvision's detectors keep their anchors, and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 8, 1), 0
        self.anchors, self.made = [torch.ones(8, 1, 1)], {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x
        self.anchors = [anchor.to(x) for anchor in self.anchors]
        return self.conv(x) * self.anchors[0] + self.made.setdefault(x.shape, torch.zeros_like(x)).mean()


def test_what_a_network_keeps_for_its_next_call_is_not_emptied() -> None:
    model, x = Remembers().eval(), torch.randn(1, 3, 8, 8)
    assert forward_bytes(model, (3, 8, 8)) > 0
    for warm in (False, True):
        plug(model, "conv", example=torch.zeros(1, 3, 8, 8))
        assert not any(anchor.is_meta for anchor in model.anchors)
        assert model.calls == int(warm)
        if not warm:
            assert not hasattr(model, "last")
            assert not model.made
        expected = outputs(unplug(model), x)
        torch.testing.assert_close(outputs(model, x), expected, rtol=0, atol=0)
        model.calls = 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_networks_that_cannot_be_watched() -> None:
    with pytest.raises(UserError, match="holds lazy modules"):
        plug(nn.Sequential(nn.LazyConv2d(8, 3)), "0", example=torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"is compiled by torch\.jit\.script"):
        plug(torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 1))), "0", example=torch.zeros(1, 3, 8, 8))  # pyright: ignore
