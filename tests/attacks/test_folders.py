"""Untrusted folders (config.json beside weights), and untrusted runs that are to be resumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from refusal import refused
from safetensors.torch import save_file

import fuzz
import transcnn
from transcnn.checkpoints.hub import save_pretrained
from transcnn.checkpoints.loading import load
from transcnn.commands.evaluate import evaluate
from transcnn.commands.predict import predict
from transcnn.commands.train import train
from transcnn.plugging.plug import plug
from transcnn.settings import TrainSettings
from transcnn.training.resume import resumed_settings

pytestmark = pytest.mark.usefixtures("sealed")


@pytest.fixture
def folder() -> Path:
    """A good folder."""
    return save_pretrained(timm.create_model("transcnn_test", num_classes=2), "folder", class_names=["a", "b"])


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What a config.json may not say; SECRET is a file beside.
CONFIGS: dict[str, dict[str, Any]] = {
    "pretrained": {"model_args": {"pretrained": True}},
    "checkpoint-path": {"model_args": {"checkpoint_path": "SECRET"}},
    "cache-dir": {"model_args": {"cache_dir": "SECRET"}},
    "cfg-in-args": {"model_args": {"pretrained_cfg": {"url": "http://198.51.100.1/x.pth"}}},
    "overlay": {"model_args": {"pretrained_cfg_overlay": {"file": "SECRET", "custom_load": True}}},
    "features": {"model_args": {"features_only": True}},
    "class-path": {"model_args": {"norm_layer": {"class_path": "os.system"}}},
    "hub": {"architecture": "hf-hub:evil/evil"},
    "local-dir": {"architecture": "local-dir:.."},
    "path": {"architecture": "../transcnn_test"},
    "no-name": {"architecture": {"a": 1}},
    "unknown": {"architecture": "transcnn_testx"},
    "wide": {"model_args": {"dims": [16000] * 4}},
    "deep": {"model_args": {"depths": [10000] * 4}},
    "deep-allowed": {"model_args": {"depths": [512] * 4}},
    "large": {"architecture": "transcnn_large"},
    "larger": {"architecture": "vit_giant_patch14_224"},
    "classes": {"num_classes": 1 << 40},
    "classes-false": {"num_classes": True},
    "classes-text": {"num_classes": "2"},
    "names": {"label_names": ["x"] * 10**6},
    "names-long": {"label_names": ["x" * 10**6, "b"]},
    "names-few": {"label_names": ["a"]},
    "names-nested": {"label_names": [["a"], ["b"]]},
    "names-dict": {"label_names": {"0": "a", "1": "b"}},
    "plug": {"plug": "auto"},
    "plug-lines": {"plug": [{"at": "stages.0", "class_path": "os.system"}]},
    "plug-huge": {"plug": [{"dim": 1 << 40}]},
    "cfg": {"pretrained_cfg": "SECRET"},
    "cfg-list": {"pretrained_cfg": ["SECRET"]},
    "size": {"pretrained_cfg": {"input_size": [3, 1 << 30, 1 << 30]}},
    "size-text": {"pretrained_cfg": {"input_size": "3x9x9"}},
    "mean": {"pretrained_cfg": {"mean": ["a", "b", "c"]}},
    "interpolation": {"pretrained_cfg": {"interpolation": "evil"}},
    "fixed": {"pretrained_cfg": {"fixed_input_size": "yes"}},
    "args": {"model_args": ["a"]},
    "deep-json": {"x": json.loads("[" * 500 + "]" * 500)},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_does_nothing_but_be_read(sealed, folder, name):
    change(folder, **json.loads(json.dumps(CONFIGS[name]).replace("SECRET", str(sealed / "secret.pth"))))
    refused(lambda: load(folder))
    Image.new("RGB", (9, 9)).save("x.png")
    refused(lambda: predict(str(folder), ["x.png"], quiet=True))
    refused(lambda: transcnn.from_pretrained(folder))


@pytest.mark.parametrize(
    "cfg",
    [
        {"url": "http://198.51.100.1/x.pth"},
        {"url": "file://SECRET"},
        {"file": "SECRET"},
        {"hf_hub_id": "evil/evil", "source": "hf-hub"},
        {"custom_load": True},
        {"custom_load": "hf", "hf_hub_id": "evil/evil", "hf_hub_filename": "../../x"},
        {"state_dict": {"stem.0.weight": [0]}},
        {"first_conv": "__class__", "classifier": "../../x"},
    ],
    ids=str,
)
def test_where_weights_come_from_is_not_the_files_to_say(sealed, folder, cfg):
    cfg = json.loads(json.dumps(cfg).replace("SECRET", str(sealed / "secret.pth")))
    x = torch.randn(1, 3, 32, 32)
    wanted = load(folder).model(x)
    change(folder, pretrained_cfg={**json.loads((folder / "config.json").read_text())["pretrained_cfg"], **cfg})
    assert torch.equal(load(folder).model(x), wanted)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}" * 9, b"[" * 10**5, b'{"architecture": 1}', b"\0" * 100],
    ids=lambda content: repr(content[:9]),
)
def test_a_config_that_is_none(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(lambda: load(folder))


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", None], ids=repr)
def test_damaged_weights_of_a_folder(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    refused(lambda: load(folder))


def test_weights_of_another_network(folder):
    save_file({"x": torch.zeros(10**6)}, folder / "model.safetensors")
    refused(lambda: load(folder), "does not fit")


def test_changes_that_are_the_callers_are_not_bounded(folder):
    assert transcnn.from_pretrained(folder, num_classes=5000).num_classes == 5000


def test_a_plugged_folder_is_loaded_sealed():
    model = plug(timm.create_model("test_resnet", num_classes=3), "layer2", example=torch.zeros(1, 3, 48, 48)).eval()
    folder = save_pretrained(model, "plugged", class_names=["a", "b", "c"])
    x = torch.randn(1, 3, 48, 48)
    assert torch.equal(load(folder).model(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_a_thousand_changed_folders_end_in_a_network_or_in_one_line():
    fuzz.thousand("folder")


# --- runs that are resumed --------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # changes of the header, changes of the settings
    "pretrained": ({"model_args": {"pretrained": True}}, {"pretrained": True}),
    "checkpoint-path": ({"model_args": {"checkpoint_path": "../secret.pth"}}, {}),
    "hub": ({"model": "hf-hub:evil/evil"}, {"model": "hf-hub:evil/evil"}),
    "hub-in-settings": ({}, {"model": "hf-hub:evil/evil"}),
    "deep": ({"model_args": {"depths": [10000] * 4}}, {}),
    "wide": ({"model_args": {"dims": [16000] * 4}}, {}),
    "task": ({"task": "dance"}, {"task": "dance"}),
    "task-in-settings": ({}, {"task": "os"}),
    "group": ({}, {"optim": ["x"]}),
    "group-unknown": ({}, {"optim": {"class_path": "os.system"}}),
    "unknown": ({}, {"class_path": "os.system"}),
    "text": ({}, {"epochs": "many"}),
    "seed": ({}, {"seed": [0]}),
    "settings": ({}, {"model_args": torch.zeros(3)}),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, drawing_off) -> dict[str, Any]:
    """What a short run's last.ckpt holds, and its data."""
    base = tmp_path_factory.mktemp("run")
    for i in range(16):
        (base / "photos" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (99 * (i % 2), i, i)).save(base / "photos" / str(i % 2) / f"{i}.png")
    quick: dict[str, Any] = {"model": "transcnn_test", "img_size": 32, "num_workers": 0, "limit_batches": 1}
    options: dict[str, Any] = {"epochs": 1, "batch_size": 4, "quiet": True, "accelerator": "cpu", **quick}
    with drawing_off():
        train(str(base / "photos"), out=str(base / "out"), **options)
    return torch.load(base / "out" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_resumed(run, sealed, name):
    header, settings = RUNS[name]
    info = {**run["transcnn"], **header}
    torch.save({**run, "transcnn": {**info, "settings": {**info["settings"], **settings}}}, "x.ckpt")
    refused(lambda: train(resume="x.ckpt", epochs=2, out="again", quiet=True), seconds=5)


STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version": lambda run: run.pop("pytorch-lightning_version"),
    "version-text": lambda run: run.update({"pytorch-lightning_version": "../x"}),
    "loops": lambda run: run.update(loops=3),
    "loops-inside": lambda run: run.update(loops={"fit_loop": {"epoch_progress": {"current": {"processed": "x"}}}}),
    "weights": lambda run: run.pop("state_dict"),
    "average": lambda run: run.update(averaging_state={}),
    "callbacks": lambda run: run.update(callbacks=[1]),
    "scores": lambda run: run["callbacks"]["KeepWeights"].update(figures={"val_top1": "x"}),
    "time": lambda run: run["callbacks"]["KeepWeights"].update(seconds="x"),
    "rate": lambda run: run["callbacks"]["SkipNonFinite"].update(lr_factor="x"),
    "groups": lambda run: run["optimizer_states"][0]["param_groups"].pop(),
    "moments": lambda run: run["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(3)),
}


@pytest.mark.parametrize("name", STATES)
def test_states_of_a_run_that_are_made_up(run, sealed, name):
    """What the trainer, the optimizer and our own callbacks restore."""
    changed = copy.deepcopy(run)
    STATES[name](changed)
    torch.save(changed, "x.ckpt")
    refused(lambda: train(resume="x.ckpt", epochs=2, out="again", quiet=True), "can't go on from x.ckpt", seconds=9)


@pytest.mark.parametrize(
    "name",
    [
        "http://198.51.100.1/photos",
        "HTTPS://198.51.100.1/photos.parquet",
        "s3://evil/photos",
        "hf://datasets/evil/evil",
        "hfds/evil/evil",
        "torch/mnist:/home/victim",
    ],
)
def test_what_a_run_names_elsewhere_is_not_fetched(run, sealed, name):
    """Neither to go on with it nor to score it, unless the command line names it, too."""
    info = run["transcnn"]
    settings = {**info["settings"], "data": name}
    torch.save({**run, "transcnn": {**info, "settings": settings}}, "x.ckpt")
    words = f"names data from elsewhere, {name!r}; if that may be fetched, give it"
    refused(lambda: train(resume="x.ckpt", epochs=2, out="again", quiet=True), words, seconds=5)
    refused(lambda: evaluate("x.ckpt", quiet=True), words, seconds=5)
    given = TrainSettings(data=name, resume="x.ckpt", origins={"data": "the command line"})
    assert resumed_settings(given, Path("x.ckpt")).data == name


@pytest.mark.parametrize("name", ["hf-hub:evil/evil", "https://198.51.100.1/x.safetensors"])
def test_a_teacher_that_a_run_names_elsewhere_is_not_fetched(run, sealed, name):
    info = run["transcnn"]
    settings = {**info["settings"], "distill": {**info["settings"]["distill"], "distill_from": name}}
    torch.save({**run, "transcnn": {**info, "settings": settings}}, "x.ckpt")
    refused(lambda: train(resume="x.ckpt", epochs=2, out="again", quiet=True), "distill_from from elsewhere", seconds=5)


def test_a_run_is_resumed_without_what_it_began_from(run):
    settings = {**run["transcnn"]["settings"], "pretrained": True, "init_from": "/nowhere/best.safetensors"}
    torch.save({**run, "transcnn": {**run["transcnn"], "settings": settings}}, "x.ckpt")
    result = train(resume="x.ckpt", epochs=2, out="again", quiet=True)
    assert result.metrics["epochs"] == 2
