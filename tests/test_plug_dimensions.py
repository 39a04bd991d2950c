"""H-MHSA, or another attention, in CNNs for sequences, volumes and video; timm's attentions in those for images."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import transcnn
from transcnn.cli import main
from transcnn.errors import UserError
from transcnn.plugging.places import backbone, find
from transcnn.plugging.plug import LAYERS, plugged


class Residual1d(nn.Module):
    """A basic block of a 1-D ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm1d(outputs)
        self.shortcut = nn.Sequential(nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet1d(nn.Module):
    """For ECGs and sensors: a ResNet-10 of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 8, 7, 2, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(3, 2, 1))
        self.layer1 = Residual1d(8, 8, 1)
        self.layer2 = Residual1d(8, 16, 2)
        self.layer3 = Residual1d(16, 32, 2)
        self.layer4 = Residual1d(32, 64, 2)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x))))).mean(2))


class Inception1d(nn.Module):
    """A module of InceptionTime: a bottleneck, three lengths of kernel and a pooling side by side."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(inputs, 8, 1, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(8, 8, k, padding=k // 2, bias=False) for k in (39, 19, 9))
        self.pool = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(inputs, 8, 1, bias=False))
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.bottleneck(x)
        return torch.relu(self.norm(torch.cat([*(conv(narrow) for conv in self.convs), self.pool(x)], 1)))


class InceptionTime(nn.Module):
    """For time series: no strides at all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inception1d(inputs) for inputs in (2, 32, 32))
        self.shortcut = nn.Sequential(nn.Conv1d(2, 32, 1, bias=False), nn.BatchNorm1d(32))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        return self.fc(torch.relu(y + self.shortcut(x)).mean(2))


def m5() -> nn.Module:
    """For raw sound (arXiv 1610.00087): a kernel of 80, and a pooling by 4 after each convolution."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in [(2, 16, 80, 4), (16, 16, 3, 1), (16, 32, 3, 1), (32, 64, 3, 1)]:
        conv = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2)
        layers.append(nn.Sequential(conv, nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 5))


class UNet3d(nn.Module):
    """For medical volumes: two strides down and up again, with skips."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
            return nn.Sequential(nn.Conv3d(inputs, outputs, 3, stride, 1), nn.InstanceNorm3d(outputs), nn.LeakyReLU())

        self.enc1, self.enc2, self.enc3 = block(2, 8), block(8, 16, 2), block(16, 32, 2)
        self.up2, self.dec2 = nn.ConvTranspose3d(32, 16, 2, 2), block(32, 16)
        self.up1, self.dec1 = nn.ConvTranspose3d(16, 8, 2, 2), block(16, 8)
        self.head = nn.Conv3d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1 = self.enc1(x)
        x2 = self.enc2(x1)
        x = self.up2(self.enc3(x2))
        x = self.up1(self.dec2(torch.cat([x, x2], 1)))
        return self.head(self.dec1(torch.cat([x, x1], 1)))


def video(name: str) -> partial:
    return partial(getattr(torchvision.models.video, name), num_classes=5)


def s3d() -> nn.Module:
    model = torchvision.models.video.s3d(num_classes=5)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # instead of one for 224x224
    return model


def monai(name: str, **kwargs: Any) -> nn.Module:
    """A network for medical volumes from MONAI."""
    from monai.networks import nets  # pyright: ignore[reportMissingImports]

    return getattr(nets, name)(spatial_dims=3, in_channels=2, out_channels=3, **kwargs)


# A host, the channels and sizes of its example, and where "auto" plugs.
HOSTS = {
    "ResNet-1d": (ResNet1d, (2, 250), ["layer2", "layer3", "layer4"]),
    "InceptionTime": (InceptionTime, (2, 60), ["blocks.2"]),
    "M5": (m5, (2, 2000), ["1.2", "2.2", "3.2"]),
    "U-Net-3d": (UNet3d, (2, 12, 16, 8), ["enc2", "enc3"]),
    "r3d_18": (video("r3d_18"), (3, 4, 32, 32), ["layer2", "layer3", "layer4"]),
    "mc3_18": (video("mc3_18"), (3, 4, 32, 32), ["layer2", "layer3", "layer4"]),
    "r2plus1d_18": (video("r2plus1d_18"), (3, 4, 32, 32), ["layer2", "layer3", "layer4"]),
    "s3d": (s3d, (3, 16, 32, 32), ["features.6", "features.12", "features.15"]),
}
if importlib.util.find_spec("monai"):
    unet, segresnet = (
        partial(monai, "UNet", channels=(8, 16, 32), strides=(2, 2)),
        partial(monai, "SegResNet", init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
    )
    HOSTS["MONAI's UNet"] = (unet, (2, 12, 16, 8), ["model.0", "model.1.submodule.1"])
    HOSTS["MONAI's SegResNet"] = (segresnet, (2, 12, 16, 8), ["down_layers.1", "down_layers.2"])


def hosts(slow: Collection[str]) -> list[Any]:
    """The hosts' names, some of them marked as slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in HOSTS]


@pytest.mark.parametrize("name", hosts(slow=("mc3_18", "r2plus1d_18")))  # much like r3d_18
def test_host(name: str) -> None:
    """Plugged where it should be, equal at first, trained a step, made again from its spec, and taken out."""
    make, size, expected = HOSTS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, *size)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(x)
    transcnn.plug(model, example=x)
    assert [at for at, _ in plugged(model)] == expected
    with torch.no_grad():
        assert torch.equal(model(x), before)
    spec = json.loads(json.dumps(transcnn.plug_spec(model)))
    if not hasattr(torchvision.models.video, name):  # those take seconds
        for _, branch in plugged(model):
            nn.init.normal_(branch.scale)
        twin = transcnn.plug_like(make(), spec).eval()
        twin.load_state_dict(model.state_dict())
        fast = transcnn.optimize(model)
        with torch.no_grad():
            assert torch.equal(twin(x), model(x))
            torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3)
    transcnn.unplug(model)
    assert model.state_dict().keys() == state.keys()
    with torch.no_grad():
        assert torch.equal(model(x), before)


VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
SLOW = [pytest.param(name, True, marks=pytest.mark.slow) for name in (*VIDEO, "U-Net-3d")]  # up to half a minute each


@pytest.mark.parametrize(("name", "onnx"), [*((n, n == "ResNet-1d") for n in HOSTS if n not in VIDEO), *SLOW])
def test_a_host_learns_and_is_exported(name: str, onnx: bool, tmp_path: Path) -> None:
    """Two steps reach every parameter and change each plugged weight; then optimized and exported outputs are equal."""
    make, size, _ = HOSTS[name]
    torch.manual_seed(0)
    x = torch.randn(2, *size)
    model = transcnn.plug(make(), example=x).train()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(2):  # the first moves the scales away from zero
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    branches = [key for key in before if ".hmhsa." in key and before[key].ndim > 1]
    assert len(branches) >= len(list(plugged(model)))
    assert not any(torch.equal(dict(model.named_parameters())[key], before[key]) for key in branches)

    with torch.no_grad():
        expected = model.eval()(x)
        close = partial(torch.testing.assert_close, expected=expected, rtol=1e-3, atol=1e-4 * float(expected.std()))
        close(transcnn.optimize(model)(x))
        program = torch.export.export(model, (x,))
        close(program.module()(x))
    if onnx:
        ort = pytest.importorskip("onnxruntime")
        path = tmp_path / "host.onnx"
        torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)
        session = ort.InferenceSession(path)
        close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]))


def test_exported_with_free_sizes() -> None:
    x = torch.randn(2, 2, 256)
    model = transcnn.plug(ResNet1d().eval(), ["layer2"], grid_sizes=(8,), pool_ratios=(4,), example=x)
    nn.init.ones_(next(branch.scale for _, branch in plugged(model)))
    dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    graph = torch.export.export(model, (x,), dynamic_shapes=(dims,)).module(check_guards=False)
    with torch.no_grad():
        for other in (torch.randn(1, 2, 131), torch.randn(3, 2, 300)):
            torch.testing.assert_close(graph(other), model(other), rtol=1e-4, atol=1e-5)


def test_replacing_convolutions_of_volumes() -> None:
    model, x = UNet3d().eval(), torch.randn(1, 2, 12, 16, 8)
    before = model(x).detach()
    model.enc3.add_module("3", nn.Conv3d(32, 32, 3, 1, 1))
    changed = model(x).detach()
    with pytest.warns(UserWarning, match="changes the model's outputs"):
        transcnn.plug(model, "enc3", mode="replace", example=x)
    assert type(model.enc3[3].attn) is transcnn.HMHSA3d
    assert model(x).shape == before.shape
    transcnn.unplug(model)
    assert torch.equal(model(x), changed)


# --- another attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_attentions_of_timm_at_the_same_places(layer: str) -> None:
    model, x = timm.create_model("test_resnet", num_classes=3).eval(), torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        before = model(x)
        transcnn.plug(model, ["layer2", "layer3"], layer=layer, example=x)
        assert torch.equal(model(x), before)
        spec = transcnn.plug_spec(model)
        assert [(line["at"], line["layer"]) for line in spec] == [("layer2", layer), ("layer3", layer)]
        for _, branch in plugged(model):
            branch.scale.fill_(0.5)
        twin = transcnn.plug_like(timm.create_model("test_resnet", num_classes=3), spec).eval()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x), model(x))
        assert not torch.equal(model(x), before)
        transcnn.unplug(model)
        assert torch.equal(model(x), before)


def test_a_layer_of_ones_own_in_any_dimension() -> None:
    model, x = ResNet1d().eval(), torch.randn(2, 2, 250)
    before = model(x).detach()
    transcnn.plug(model, layer=lambda channels: nn.Conv1d(channels, channels, 5, padding=2), example=x)
    assert torch.equal(model(x), before)
    assert [type(branch.attn) for _, branch in plugged(model)] == [nn.Conv1d] * 3
    with pytest.raises(UserError, match="only names can be written"):
        transcnn.plug_spec(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layer="sae"), "layer must be one of se, .*, or a callable from channels to a layer; got 'sae'"),
        (dict(layer="se", head_dim=8), "head_dim is an argument of H-MHSA, and layer='se' takes its place"),
        (dict(layer=lambda c: nn.Conv2d(c, 2 * c, 1)), r"Conv2d must keep the shape of a map .*, got \(1, 384, 3, 4\)"),
        (dict(layer=lambda c: nn.Linear(3, 3)), "Linear can't take a map"),
        (dict(layer=lambda c: 3), "layer must make a module"),
        (dict(norm_layer="batchnorm3d"), "norm_layer must be one of batchnorm2d, groupnorm1, batchnorm or a callable"),
    ],
)
def test_errors(arguments: dict, message: str) -> None:
    model = timm.create_model("test_resnet")
    with pytest.raises(UserError, match=message):
        transcnn.plug(model, "layer3", example=torch.zeros(1, 3, 40, 56), **arguments)
    assert not list(plugged(model))


def test_errors_in_other_dimensions() -> None:
    with pytest.raises(
        UserError, match=r"ResNet1d takes \(B, C, L\), .* example=torch.zeros\(1, C, L\), .* --input 3xN"
    ):
        transcnn.plug(ResNet1d())
    with pytest.raises(UserError, match="timm's 'se' is for images; for maps of 1 dimensions layer must be a callable"):
        transcnn.plug(ResNet1d(), layer="se", example=torch.zeros(1, 2, 250))
    with pytest.raises(UserError, match=r"example must hold a \(B, C, D, H, W\) tensor"):
        find(UNet3d(), "auto", torch.zeros(1, 2, 16, 16))
    with pytest.raises(UserError, match=r"the output of fc is not one \(B, C, L\) tensor"):
        transcnn.plug(ResNet1d(), "fc", example=torch.zeros(1, 2, 250))


def test_an_encoder_with_its_decoder_in_one_module_is_looked_into() -> None:
    """As MONAI builds its U-Net: each level holds the next, so that no module outside of the innermost is coarse."""

    class Skip(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, self.inner(x)], 1)

    def level(channels: int, inside: nn.Module, skipped: int, out: int) -> nn.Module:
        down = nn.Conv3d(channels, 2 * channels, 3, 2, 1)
        return nn.Sequential(down, Skip(inside), nn.ConvTranspose3d(skipped, out, 2, 2))

    model = nn.Sequential(level(4, level(8, nn.Conv3d(16, 32, 3, 1, 1), 48, 8), 16, 3))
    places = find(model, "auto", torch.zeros(1, 4, 8, 12, 8))
    assert [(place.name, place.stride, place.channels) for place in places] == [("0.0", 2, 8), ("0.1.inner.1", 4, 48)]


def test_strides_and_sizes_of_places() -> None:
    places = {place.name: place for place in backbone(ResNet1d(), torch.zeros(1, 2, 256))}
    assert [(places[f"layer{i}"].stride, places[f"layer{i}"].size) for i in (1, 4)] == [(4, (64,)), (32, (8,))]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plug", "r3d_18", "--input", "3x16x112x112"]) == 0
    table = capsys.readouterr().out
    assert "8x28x28" in table
    assert [words[0] for words in map(str.split, table.splitlines()) if words[-1:] == ["auto"]] == [
        "layer2",
        "layer3",
        "layer4",
    ]
    assert main(["plug", "transcnn1d_nano", "--input", "1x16000"]) == 0
    assert " 4000 " in capsys.readouterr().out
    assert main(["plug", "r3d_18"]) == 2
    assert "--input 3xNxNxN" in capsys.readouterr().err
    assert main(["plug", "r3d_18", "--input", "3x16x"]) == 2
    assert "input must be channels and one to three sizes, such as 3x16x112x112, got '3x16x'" in capsys.readouterr().err
