"""Frozen parts stay as they are, norms and all, in every task."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from transcnn.checkpoints.loading import load
from transcnn.commands.train import train
from transcnn.dense.build import build_network
from transcnn.errors import UserError
from transcnn.training.freezing import freeze

QUICK: dict[str, Any] = dict(model="transcnn_test", img_size=16, batch_size=8, precision="32", accelerator="cpu")
QUICK |= dict(epochs=1, num_workers=0, quiet=True, lr=0.1)


def learnt(model: nn.Module) -> set[str]:
    """The parts that have something to learn."""
    return {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        (["all"], {"head.fc"}),
        (["1"], {"stages.1", "stages.2", "stages.3", "head.fc"}),
        (["4"], {"head.fc"}),
        (["stem", "stages.[23]"], {"stages.0", "stages.1", "head.fc"}),
        (
            ["stages.0.blocks.*.attn", "head.fc.bias"],
            {"stem.0", "stem.1", "stem.3", *(f"stages.{i}" for i in range(4)), "head.fc"},
        ),
    ],
)
def test_what_is_named_is_frozen(spec, left):
    model = timm.create_model("transcnn_test", num_classes=3)
    freeze(model, model, spec)
    assert learnt(model) - {"stem.1"} == left - {"stem.1"}


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_any_network_of_timm_has_stages(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    freeze(model, model, ["2"])
    left = learnt(model)
    assert left
    assert not left & {"conv1.weight", "layer1.0", "layer2.0", "stem.0", "stages.0", "stages.1", "blocks.0", "blocks.1"}


@pytest.mark.parametrize("host", ["transcnn_test", "resnet18"])
def test_decoders_learn_on_a_frozen_backbone(host):
    network: Any = build_network("segment", host, {"decoder": "fpn", "decoder_channels": 64}, num_classes=2, in_chans=3)
    stages = freeze(network, network.body, ["2"])
    assert stages
    names = {name for name, p in network.body.named_parameters() if p.requires_grad}
    last = ("stages_2", "stages_3") if host == "transcnn_test" else ("layer3", "layer4")
    assert {name.split(".")[0] for name in names} == {*last}
    freeze(network, network.body, ["all"])
    assert not any(p.requires_grad for p in network.body.parameters())
    assert any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["9"], "the network has 4 stages, got 9; all but the last layer: --freeze all"),
        (["0"], "the network has 4 stages, got 0"),
        (["layer4"], "nothing is named 'layer4'; the network's parts are 'stem', 'stages'"),
        (["*"], r"freeze \* leaves nothing to learn"),
    ],
)
def test_what_cannot_be_frozen_is_told(spec, message):
    model = timm.create_model("transcnn_test")
    with pytest.raises(UserError, match=message):
        freeze(model, model, spec)


def test_a_run_leaves_frozen_parts_and_their_norms_as_they_were(class_folder, tmp_path, no_report):
    before = {name: tensor.clone() for name, tensor in start(tmp_path, class_folder).items()}
    train(
        str(class_folder),
        **QUICK,
        freeze=["2"],
        init_from=str(tmp_path / "first"),
        out=str(tmp_path / "second"),
        seed=1,
    )
    after = load(tmp_path / "second").model.state_dict()
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    frozen = {name for name in before if name.startswith(("stem", "stages.0", "stages.1"))}
    assert frozen <= same
    assert any("running_mean" in name for name in frozen)
    assert {name for name in before if name.startswith("stages.3") and name.endswith("weight")} - same


def start(folder, data) -> dict[str, torch.Tensor]:
    train(str(data), **QUICK, out=str(folder / "first"))
    return load(folder / "first").model.state_dict()
