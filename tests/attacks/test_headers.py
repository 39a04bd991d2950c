"""Untrusted weights: whatever their headers say, nothing but the file itself is read, and nothing is written."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from refusal import refused
from safetensors.numpy import save
from torch import nn

import fuzz
from transcnn.checkpoints import memory
from transcnn.checkpoints.arguments import ARGUMENTS, check_model_args
from transcnn.checkpoints.loading import data_config_of, load, save_weights
from transcnn.checkpoints.published import load_checkpoint
from transcnn.commands.demo import demo
from transcnn.commands.evaluate import evaluate
from transcnn.commands.explain import explain
from transcnn.commands.export import export
from transcnn.commands.predict import predict
from transcnn.commands.train import train
from transcnn.plugging.build import build_model
from transcnn.plugging.plug import plug, plug_spec
from transcnn.settings import Distill

pytestmark = pytest.mark.usefixtures("sealed")

CONFIG = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
INFO: dict[str, Any] = {"model": "transcnn_test", "class_names": ["a", "b"], "data_config": CONFIG}
DETECT = {"detector": "retinanet", "fpn_channels": 16, "short_side": 64, "long_side": 96, "side_range": [1, 1]}
DETECT |= {"min_score": 0.05, "max_found": 10}


def evil(**info: Any) -> bytes:
    """A file of weights with a header of the attacker's."""
    header = {key: json.dumps(value) for key, value in {**INFO, **info}.items()}
    return save({"x": np.zeros(3, np.float32)}, metadata=header)


LINE = {"at": "layer2", "mode": "add", "dim": 32, "head_dim": 16, "grid_sizes": [4], "pool_ratios": [2]}
LINE |= {"norm_layer": "groupnorm1", "stride": [1, 1], "inside": "", "hooked": False}

# What a header may not say; SECRET is the address of a file beside, HOME a folder to write to.
ATTACKS: dict[str, dict[str, Any]] = {
    "pretrained": {"model": "resnet18", "model_args": {"pretrained": True}},
    "url": {"model_args": {"pretrained": True, "pretrained_cfg": {"url": "http://198.51.100.1/x.pth"}}},
    "file-url": {"model_args": {"pretrained": True, "pretrained_cfg": {"url": "file://SECRET"}}},
    "file": {"model_args": {"pretrained": True, "pretrained_cfg": {"file": "SECRET"}}},
    "file-alone": {"model_args": {"pretrained_cfg": {"file": "SECRET"}}},
    "custom-load": {"model": "test_vit", "model_args": {"pretrained_cfg": {"custom_load": True, "file": "SECRET"}}},
    "overlay": {"model_args": {"pretrained": True, "pretrained_cfg_overlay": {"url": "https://198.51.100.1/x"}}},
    "overlay-hub": {"model_args": {"pretrained": True, "pretrained_cfg_overlay": {"hf_hub_id": "evil/evil"}}},
    "checkpoint-path": {"model_args": {"checkpoint_path": "SECRET"}},
    "cache-dir": {"model_args": {"pretrained": True, "cache_dir": "HOME/written"}},
    "source-args": {"model_args": {"pretrained_model_args": {"cache_dir": "HOME/written"}}},
    "hub": {"model": "hf-hub:evil/evil"},
    "hub-old": {"model": "hf_hub:evil/evil"},
    "hub-capital": {"model": "HF-HUB:evil/evil"},
    "local-dir": {"model": "local-dir:HOME"},
    "slash": {"model": "evil/resnet18"},
    "path": {"model": "../resnet18"},
    "newline": {"model": "resnet18\nevil"},
    "no-name": {"model": ["resnet18"]},
    "dunder": {"model": "__class__"},
    "unknown": {"model": "resnet18x"},
    "features": {"model_args": {"features_only": True}},
    "feature-class": {"model": "resnet18", "model_args": {"features_only": True, "feature_cls": "fx"}},
    "scriptable": {"model_args": {"scriptable": True}},
    "pruned": {"model": "resnet18", "model_args": {"pruned": True}},
    "class-path": {"model_args": {"act_layer": {"class_path": "os.system", "init_args": {"command": "touch HOME/x"}}}},
    "class-path-deep": {"model_args": {"dims": [{"class_path": "os.system"}]}},
    "import-name": {"model_args": {"norm_layer": "os.path"}},
    "device": {"model_args": {"device": "cuda"}},
    "two-heads": {"model_args": {"num_classes": 7}},
    "two-stems": {"model_args": {"in_chans": 1}},
    "plug-extra": {"model": "test_resnet", "model_args": {"plug": [{**LINE, "cache_dir": "HOME/written"}]}},
    "plug-norm": {"model": "test_resnet", "model_args": {"plug": [{**LINE, "norm_layer": {"class_path": "os.getp"}}]}},
    "plug-name": {"model": "test_resnet", "model_args": {"plug": "auto"}},
    "plug-names": {"model": "test_resnet", "model_args": {"plug": ["layer2"]}},
    "plug-huge": {"model": "test_resnet", "model_args": {"plug": [{**LINE, "dim": 10**12}]}},
    "plug-twice": {"model": "test_resnet", "model_args": {"plug": [LINE] * 1000}},
    "plug-where": {"model": "test_resnet", "model_args": {"plug": [{**LINE, "at": "__class__.__init__"}]}},
    "decoder": {"task": "segment", "task_args": {"decoder": "os.system"}},
    "decoder-wide": {"task": "segment", "task_args": {"decoder": "fpn", "decoder_channels": 1 << 40}},
    "decoder-args": {"task": "segment", "task_args": {"decoder": {"class_path": "os.system"}}},
    "no-decoder": {"task": "segment", "task_args": {}},
    "in-task": {"task": "segment", "task_args": {"decoder": "fpn"}, "model_args": {"checkpoint_path": "SECRET"}},
    "detector": {"task": "detect", "task_args": {**DETECT, "detector": "evil"}},
    "detector-wide": {"task": "detect", "task_args": {**DETECT, "fpn_channels": 1 << 30}},
    "detector-side": {"task": "detect", "task_args": {**DETECT, "long_side": 1 << 30}},
    "detector-sides": {"task": "detect", "task_args": {**DETECT, "side_range": [1] * 9}},
    "no-detector": {"task": "detect", "task_args": {}},
    "colours": {"task": "segment", "task_args": {"decoder": "fpn", "colours": [[0, 0, 999], [0, 0, 0]]}},
    "score": {"val_top1": "x"},
    "score-list": {"val_top1": [1]},
    "epoch": {"epoch": {}},
    "data": {"data": ["x"]},
    "wide": {"model_args": {"dims": [16000] * 4}},
    "deep": {"model_args": {"depths": [10000] * 4}},
    "deep-allowed": {"model_args": {"depths": [512] * 4}},
    "deep-resnet": {"model": "resnet18", "model_args": {"layers": [512] * 4}},
    "many-stages": {"model_args": {"dims": [8] * 10**5}},
    "levels": {"model_args": {"grid_sizes": [[4] * 10**4] * 4, "pool_ratios": [[2] * 10**4] * 4}},
    "nothing-wide": {"model_args": {"dims": [0, 0, 0, 0]}},
    "negative": {"model_args": {"dims": [-8, 16, 16, 32]}},
    "no-kernel": {"model_args": {"kernel_sizes": [0, 0, 0, 0]}},
    "not-a-number": {"model_args": {"drop_rate": float("nan")}},
    "text-size": {"model_args": {"dims": "8" * 1000}},
    "big-text": {"model_args": {"act_layer": "a" * 10**6}},
    "many-names": {"class_names": ["x"] * 10**6},
    "long-name": {"class_names": ["x" * 10**6, "b"]},
    "names-in-names": {"class_names": [["a"], ["b"]]},
    "settings": {"settings": {"a": [[0] * 1000] * 1000}},
    "side": {"data_config": {**CONFIG, "input_size": [3, 1 << 20, 1 << 20]}},
    "enlarged": {"data_config": {**CONFIG, "input_size": [3, 4096, 4096], "crop_pct": 0.05}},
    "enlarged-one-way": {"data_config": {**CONFIG, "input_size": [3, 8, 4096], "crop_pct": 0.05}},
    "crop": {"data_config": {**CONFIG, "crop_mode": "evil"}},
}  # fmt: skip


def filled(info: Any, folder: Path) -> Any:
    text = json.dumps(info)
    return json.loads(text.replace("SECRET", str(folder / "secret.pth")).replace("HOME", str(folder / "home")))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_header_does_nothing_but_be_read(sealed, name):
    (sealed / "inside" / "x.safetensors").write_bytes(evil(**filled(ATTACKS[name], sealed)))
    refused(lambda: load("x.safetensors"))


@pytest.mark.parametrize("name", ["file-url", "checkpoint-path", "hub", "plug-extra", "decoder", "deep", "class-path"])
def test_the_same_in_a_lightning_checkpoint(sealed, name):
    info = {**INFO, **filled(ATTACKS[name], sealed)}
    torch.save({"state_dict": {}, "transcnn": info}, "last.ckpt")
    refused(lambda: load("last.ckpt"))
    refused(lambda: load("."))  # as a run's directory


def test_shared_lists_in_a_checkpoint_are_no_bomb(sealed):
    value: Any = [1]
    for _ in range(60):
        value = [value, value]  # 2^60 ones in a kilobyte
    torch.save({"state_dict": {}, "transcnn": {**INFO, "settings": {"a": value}}}, "x.ckpt")
    refused(lambda: load("x.ckpt"), "nested")
    wide: Any = [1] * 100
    for _ in range(10):
        wide = [wide] * 100
    torch.save({"state_dict": {}, "transcnn": {**INFO, "settings": {"a": wide}}}, "y.ckpt")
    refused(lambda: load("y.ckpt"), "more than 200,000 values")


@pytest.mark.parametrize("name", ["pretrained", "file-url", "checkpoint-path", "cache-dir", "hub", "local-dir", "deep"])
@pytest.mark.parametrize("command", ["eval", "predict", "explain", "export", "demo", "init_from", "distill"])
def test_no_command_does_more(sealed, command, name):
    path, data, image = "x.safetensors", "photos", "photos/0/0.png"
    for i in range(16):
        Path(data, str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, i, i)).save(Path(data, str(i % 2), f"{i}.png"))
    Path(path).write_bytes(evil(**filled(ATTACKS[name], sealed)))
    quick: dict[str, Any] = {"model": "transcnn_test", "epochs": 1, "img_size": 32, "quiet": True, "num_workers": 0}
    actions: dict[str, Callable[[], object]] = {
        "eval": lambda: evaluate(path, data, quiet=True),
        "predict": lambda: predict(path, [image], quiet=True),
        "explain": lambda: explain(path, image, out="out.png", quiet=True),
        "export": lambda: export(path, out="out.onnx", quiet=True),
        "demo": lambda: demo(path, quiet=True),
        "init_from": lambda: train(data, init_from=path, out="run", **quick),
        "distill": lambda: train(data, out="run", distill=Distill(distill_from=path), **quick),
    }
    refused(actions[command], seconds=20 if command in ("demo", "init_from", "distill") else 1)


@pytest.mark.parametrize("size", [[3, 8192, 8192], "memory"])
def test_a_size_that_takes_hours_or_all_memory_is_refused_before_it_is_tried(sealed, monkeypatch, size):
    """A small file whose header asks for large images, on a network whose cost grows with the square of the pixels."""
    if size == "memory":
        size = [3, 2048, 2304]
        monkeypatch.setattr(memory, "available_bytes", lambda: 90 << 20)  # the input alone takes 54 MiB, and so on
    args = {"grid_sizes": None, "pool_ratios": None} if size[1] == 8192 else {}
    model = build_model("transcnn_test", num_classes=2, **args).eval()
    path, image = "x.safetensors", "photos/a/0.png"
    save_weights(Path(path), model, {**INFO, "model_args": args, "data_config": {**CONFIG, "input_size": size}})
    for name in ("photos/a", "photos/b"):
        Path(name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(f"{name}/0.png")
    words = f"an image of {size[2]}x{size[1]}, .* multiply-adds" if size[1] == 8192 else "GiB of memory or more"
    refused(lambda: predict(path, [image], quiet=True), words, seconds=4)
    refused(lambda: evaluate(path, "photos", quiet=True), words, seconds=4)
    refused(lambda: explain(path, image, out="out.png", quiet=True), words, seconds=4)
    refused(lambda: export(path, out="out.onnx", quiet=True), words, seconds=4)
    refused(lambda: demo(path, quiet=True), words, seconds=20)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    assert predict(path, [image], img_size=32, quiet=True)[0]["top"]


def test_the_memory_of_a_forward_pass_is_near_what_it_takes():
    """By its shapes alone: of known networks, the tensors that live at the same time."""
    shape = (3, 64, 64)
    relu = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    maps = 8 * 64 * 64 * 4
    assert memory.forward_bytes(relu, shape) == 2 * maps + 3 * 64 * 64 * 4  # the input, and ReLU's two sides
    small, large = (memory.forward_bytes(build_model("transcnn_test"), (3, side, side)) for side in (256, 1024))
    assert 15 < large / small < 17  # fused attention keeps no scores


def test_what_the_package_writes_may_be_read():
    """The constructor's own arguments are allowed, and those that timm's networks are trained with here."""
    import inspect

    from transcnn.backbone import TransCNN

    assert set(inspect.signature(TransCNN).parameters) - {"device", "dtype"} <= set(ARGUMENTS)
    for refused_name in inspect.signature(timm.create_model).parameters:
        assert refused_name not in ARGUMENTS
    model = plug(timm.create_model("test_resnet", num_classes=3), "layer2,layer3", example=torch.zeros(1, 3, 48, 48))
    check_model_args({"plug": plug_spec(model)})
    check_model_args({"grid_sizes": "auto", "pool_ratios": "auto", "img_size": 1024})
    check_model_args({"grid_sizes": [[8, 8], 4, None], "head_dim": [None, 16, 32], "act_layer": "relu"})


def test_a_good_file_is_loaded_sealed(sealed):
    model = build_model("transcnn_test", num_classes=2).eval()
    info = {**INFO, "model_args": {"drop_rate": 0.1}, "data_config": data_config_of(model, 3, 32)}
    save_weights(Path("x.safetensors"), model, copy.deepcopy(info))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load("x.safetensors").model(x), model(x))


def test_networks_of_the_users_own_keep_their_arguments(sealed):
    from timm.models import register_model

    @register_model
    def users_own_network(pretrained: bool = False, variant: str = "a", **kwargs: Any) -> torch.nn.Module:
        assert variant == "b"
        return timm.create_model("transcnn_test", **kwargs)

    model = build_model("users_own_network", num_classes=2, variant="b").eval()
    info = {**INFO, "model": "users_own_network", "model_args": {"variant": "b"}}
    save_weights(Path("x.safetensors"), model, info)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load("x.safetensors").model(x), model(x))
    for args in ({"variant": "/etc/passwd"}, {"checkpoint_path": "x"}, {"pretrained": True}, {"kwargs": {}}):
        save_weights(Path("y.safetensors"), model, {**info, "model_args": args})
        refused(lambda: load("y.safetensors"), "model_args")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "share"), [("weights", 0.7), ("checkpoint", 0.3)])
def test_a_thousand_changed_files_end_in_a_network_or_in_one_line(kind, share):
    fuzz.thousand(kind, share)


# --- files that take more memory than they have bytes ---------------------------------------------------------------


def zipped(path: Path, name: str, content: bytes, *, also: tuple[str, ...] = ()) -> Path:
    """What ``torch.save`` wrote with one part replaced; ``also`` are further names of that part in the directory."""
    torch.save({"x": torch.zeros(1 << 12, dtype=torch.uint8)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    entry = next(entry for entry in parts if entry.endswith(name))
    with zipfile.ZipFile(path, "w") as archive:
        for other, value in {**parts, entry: content or parts[entry]}.items():
            archive.writestr(other, value)
        for other in also:
            alias = copy.copy(archive.getinfo(entry))
            alias.filename = entry.removesuffix(name) + other
            archive.filelist.append(alias)
    return path


BYTES = b"c%s\nbytearray\nJ\x00\x00\x00\x60\x85R"  # of 1.6 GB


@pytest.mark.parametrize("module", [b"builtins", b"__builtin__"])
@pytest.mark.parametrize("form", ["archive", "legacy"])
def test_a_pickle_gets_no_bytes_by_their_number(tmp_path: Path, module: bytes, form: str) -> None:
    path, bomb = tmp_path / "inside" / "x.pth", b"\x80\x02}X\x01\x00\x00\x00a" + BYTES % module + b"s."
    if form == "archive":
        zipped(path, "data.pkl", bomb)
    else:
        torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(b"K\x01s.", BYTES % module + b"s."))
        assert b"bytearray" in path.read_bytes()
    for ask in (lambda: load(path), lambda: load(path, "transcnn_test")):
        refused(ask, "bytearray")
    path.rename(path.with_suffix(".ckpt"))
    refused(lambda: train(resume=str(path.with_suffix(".ckpt"))), "bytearray")


def test_parts_of_an_archive_that_lie_over_each_other(tmp_path: Path) -> None:
    """Each read by itself, they unpack a small file to any size."""
    path = zipped(tmp_path / "inside" / "x.pth", "data/0", b"", also=tuple(f"data/{i}" for i in range(1, 50)))
    assert len(zipfile.ZipFile(path).namelist()) > 50
    refused(lambda: load(path, "transcnn_test"), "parts are larger than the file")


@pytest.mark.parametrize("layer", ["stem.0.weight", "head.fc.weight", "stages.0.blocks.0.irb.1.weight"])
def test_a_tensor_has_no_more_numbers_than_its_file_has_bytes(tmp_path: Path, layer: str) -> None:
    """By strides of 0 one number is as many as one likes: a stem of 10^10 channels would be adapted to three."""
    path = tmp_path / "inside" / "x.pth"
    state = dict(build_model("transcnn_test").state_dict())
    layer = layer if layer in state else next(name for name in state if name.endswith(".weight"))
    shape = list(state[layer].shape)
    shape[0 if layer.startswith("head") else 1 if len(shape) > 1 else 0] = 10**10
    torch.save({**state, layer: torch.zeros(1).expand(shape)}, path)
    refused(lambda: load(path, "transcnn_test"), "numbers")
    refused(lambda: load_checkpoint(build_model("transcnn_test"), path), "numbers")


@pytest.mark.parametrize(("rows", "columns"), [(10**10, 0), (10**5, 1)])
def test_weights_without_a_header_make_no_larger_network_than_they_hold(
    tmp_path: Path, rows: int, columns: int
) -> None:
    path = tmp_path / "inside" / "x.safetensors"
    state = {name: value.numpy() for name, value in build_model("transcnn_test").state_dict().items()}
    path.write_bytes(save({**state, "head.fc.weight": np.zeros((rows, columns), np.float32)}))
    refused(lambda: load(path, "transcnn_test"), "holds no head.fc.weight" if not columns else "network of")


def test_a_file_says_little_of_itself(tmp_path: Path) -> None:
    """Empty lists, of which a hundred megabytes would be gigabytes of Python's."""
    path = tmp_path / "inside" / "x.safetensors"
    header = {key: json.dumps(value) for key, value in INFO.items()}
    lists = "[" + "[]," * (6 << 20) + "[]]"
    path.write_bytes(save({"x": np.zeros(3, np.float32)}, metadata={**header, "task_args": lists}))
    refused(lambda: load(path), "characters of itself")
    archive = zipped(tmp_path / "inside" / "x.ckpt", "data.pkl", b"\x80\x02" + b"]0" * (17 << 20) + b"}.")
    refused(lambda: load(archive), "beside its tensors")
