"""Exported files answer as the network does, say what they are, and run where there is no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from transcnn.checkpoints.loading import Loaded, load, save_weights
from transcnn.commands.export import export
from transcnn.commands.predict import predict
from transcnn.data.images import read_image
from transcnn.data.sets.classify import open_splits
from transcnn.data.transforms.classify import eval_transform
from transcnn.errors import UserError
from transcnn.export import export_model, exporting, int8
from transcnn.export.check import Row, _made_image, check, comparisons, refuse_beyond
from transcnn.export.exporting import FORMATS, Exported, Format, _capture
from transcnn.export.int8 import read
from transcnn.onnx.predict import OnnxModel, to_input
from transcnn.plugging.build import build_model
from transcnn.plugging.plug import plug
from transcnn.training.data_record import record_of, write_record

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

NAMES = ["rising", "steep", "falling"]
# Two stages, one with grids and one without: all there is to trace, in seconds.
MICRO = dict(
    dims=(8, 16),
    depths=(1, 1),
    expansions=(2, 2),
    kernel_sizes=(3, 3),
    grid_sizes=(4, None),
    pool_ratios=(4, None),
    stem_stride=2,
)
CONFIG = dict(input_size=[3, 32, 32], mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3], interpolation="bicubic", crop_pct=0.9)


@pytest.fixture(scope="session")
def stripes(class_image, tmp_path_factory):
    """Nine images of three classes, of several sizes and modes, and a broken one."""
    folder = tmp_path_factory.mktemp("stripes")
    sizes = [(32, 32), (61, 40), (40, 75), (300, 20), (33, 33), (64, 48), (32, 32), (20, 400), (90, 91)]
    for i, (size, mode) in enumerate(zip(sizes, ["RGB", "L", "RGBA"] * 3, strict=True)):
        class_image(i % 3, i, size, mode).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing more")
    return folder


@pytest.fixture(scope="session")
def trained(class_image) -> Loaded:
    """A network that has learnt something: of an untrained one all answers are nearly the same."""
    torch.manual_seed(0)
    model = build_model("transcnn_test", num_classes=3, **MICRO)
    images = [class_image(label, index) for index in range(16) for label in range(3)]
    x = torch.from_numpy(np.stack([to_input(image, {**CONFIG, "crop_pct": 1.0}) for image in images]))
    y = torch.arange(3).repeat(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    right = (model.eval()(x).argmax(1) == y).float().mean()
    assert right > 0.9
    return Loaded(model, "classify", NAMES, dict(CONFIG), "", {"model": "transcnn_test", "model_args": MICRO})


@pytest.fixture(scope="session")
def run(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    info = {**trained.info, "class_names": NAMES, "data_config": CONFIG, "task": "classify", "val_top1": 93.5}
    save_weights(folder / "best.safetensors", trained.model, info)
    return folder


@pytest.fixture(scope="session")
def program(trained):
    """One trace for all formats: it takes most of the time."""
    return _capture(trained.model, CONFIG["input_size"], None)


@pytest.fixture(scope="session")
def exported(run, program) -> Exported:
    """The ONNX file of the run, made by the command's function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_capture", lambda *_: program)
        return export(str(run), quiet=True)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def answers_of(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(images)).numpy()


def test_the_comparison_covers_many_sizes_and_is_not_vacuous(exported, trained):
    sizes = [(row.batch, row.height, row.width) for row in exported.rows]
    assert sizes[:4] == [(1, 32, 32), (3, 25, 41), (2, 48, 48), (1, 1, 1)]
    (_, *small), (_, *medium) = sizes[4:]
    assert max(small) <= 32
    assert max(medium) <= 64
    assert all(row.relative <= 1e-5 and row.torch_ms > 0 and row.file_ms > 0 for row in exported.rows)
    batches = comparisons(trained.preprocessing, None, None)
    logits = [answers_of(trained.model, images) for images in batches][1]
    assert logits.std(axis=0).max() > 0.1  # images with different answers, of which 1e-5 is a small part


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (5, 3, 33, 57), (1, 3, 5, 4), (2, 3, 7, 200), (1, 3, 1, 1)])
def test_onnx_answers_at_any_size(exported, trained, shape):
    images = random_images(*shape)
    wanted = answers_of(trained.model, images)
    found = OnnxModel(exported.file, accelerator="cpu", threads=1)(images)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_onnx_is_one_file_with_named_sizes(exported):
    session = ort.InferenceSession(exported.file)
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape) == ("images", ["batch", 3, "height", "width"])
    assert (logits.name, logits.shape) == ("logits", ["batch", 3])
    assert sorted(file.name for file in exported.file.parent.iterdir()) == [
        "best.safetensors",
        "model.json",
        "model.onnx",
    ]


def test_the_file_and_the_json_say_what_they_are(exported):
    stored = OnnxModel(exported.file).info
    beside = json.loads(exported.file.with_suffix(".json").read_text())
    assert stored == beside
    assert beside["class_names"] == NAMES
    assert beside["data_config"] == CONFIG
    assert beside["task"] == "classify"
    assert beside["val_top1"] == 93.5
    assert beside["input"] == {"name": "images", "dtype": "float32", "shape": ["batch", 3, "height", "width"]}
    assert any("25" in step or "35x35" in step for step in beside["steps"])


@pytest.mark.parametrize("img_size", [None, 45])
def test_predict_gives_the_same_from_the_file(exported, run, stripes, img_size):
    wanted = predict(str(run), [str(stripes)], img_size=img_size, accelerator="cpu", quiet=True)
    found = predict(str(exported.file), [str(stripes)], img_size=img_size, accelerator="cpu", quiet=True, batch_size=4)
    assert [row["file"] for row in found] == [row["file"] for row in wanted]
    assert found[-1] == wanted[-1]
    assert "error" in found[-1]  # broken.png
    assert len({row["top"][0]["label"] for row in wanted[:-1]}) > 1
    for ours, theirs in zip(found[:-1], wanted[:-1], strict=True):
        assert [top["label"] for top in ours["top"]] == [top["label"] for top in theirs["top"]]
        assert [top["score"] for top in ours["top"]] == pytest.approx([t["score"] for t in theirs["top"]], abs=2e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation"),
    [
        ((32, 32), 1.0, "bicubic"),
        ((40, 40), 0.9, "bilinear"),
        ((31, 31), 0.875, "lanczos"),
        ((24, 48), 0.9, "bicubic"),
        ((7, 9), 1.0, "nearest"),
    ],
)
def test_preprocessing_is_the_checkpoints(stripes, channels, size, crop_pct, interpolation):
    stats = dict(mean=[0.3, 0.4, 0.5, 0.5][:channels], std=[0.1, 0.2, 0.3, 0.5][:channels])
    transform = eval_transform(size, in_chans=channels, crop_pct=crop_pct, interpolation=interpolation, **stats)
    config = dict(input_size=[channels, *size], crop_pct=crop_pct, interpolation=interpolation, **stats)
    for file in sorted(stripes.glob("[0-9].png")):
        image = read_image(file)
        np.testing.assert_array_equal(to_input(image, config), transform(image, 0).numpy(), err_msg=file.name)


def test_predict_from_the_file_imports_no_torch(exported, stripes):
    code = (
        "import sys; sys.argv[0] = 'transcnn'; from transcnn.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'timm', 'torchvision', 'lightning'} & set(sys.modules); sys.exit(f'{code} {heavy}')"
    )
    command = [sys.executable, "-c", code, "predict", str(exported.file), str(stripes / "0.png"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stderr.strip() == "0 set()"
    assert json.loads(done.stdout)[0]["top"][0]["label"] in NAMES


def test_other_formats(program, trained, tmp_path):
    for name in ("torch", "openvino"):
        if name == "openvino":
            pytest.importorskip("openvino")
        kind = FORMATS[name]
        file = tmp_path / f"model{kind.suffix}"
        kind.write(program, file, {"class_names": NAMES})
        batches = [random_images(1, 3, 32, 32), random_images(3, 3, 45, 33), random_images(2, 3, 64, 96)]
        if name == "openvino":  # which refused to pool maps that are smaller than a patch
            batches += [random_images(1, 3, 1, 1), random_images(1, 3, 4, 5), random_images(2, 3, 2, 70)]
        rows = check(trained.model, kind.open(file), iter(batches))
        assert max(row.relative for row in rows) <= 1e-5, name
    with zipfile.ZipFile(tmp_path / "model.pt2") as file:  # where torch.export.load looks for what extra_files names
        assert json.loads(file.read("archive/extra/transcnn.json")) == {"class_names": NAMES}
    import openvino

    stored = openvino.Core().read_model(tmp_path / "model.xml")
    assert json.loads(stored.get_rt_info(["transcnn", "class_names"]).value) == NAMES
    assert stored.inputs[0].any_name == "images"


def test_static_size_and_a_plugged_cnn(tmp_path, monkeypatch):
    torch.manual_seed(0)
    host = build_model("test_resnet", num_classes=3).eval()
    example = torch.zeros(1, 3, 40, 40)
    plug(host, at="layer2", grid_sizes=(4,), pool_ratios=(2,), example=example)
    nn.init.constant_(host.layer2.get_submodule("hmhsa").scale, 0.5)
    loaded = Loaded(host, "classify", NAMES, {**CONFIG, "input_size": [3, 48, 48]}, "", {"model": "test_resnet"})
    sizes = []  # of the images that would calibrate: the file takes no others
    monkeypatch.setattr(int8, "to_int8", lambda loaded, *_: sizes.append(loaded.preprocessing["input_size"]))
    result = export_model(loaded, tmp_path / "plugged.onnx", static=40, calibrate="images")
    assert sizes == [[3, 40, 40]]
    assert [(row.batch, row.height, row.width) for row in result.rows] == [(1, 40, 40), (2, 40, 40), (3, 40, 40)]
    model = OnnxModel(result.file, accelerator="cpu", threads=1)
    assert model.info["plug"][0]["at"] == "layer2"
    images = random_images(2, 3, 40, 40)
    wanted = answers_of(host, images)
    assert np.abs(model(images) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    host.layer2.get_submodule("hmhsa").scale.data.zero_()
    assert np.abs(answers_of(host, images) - wanted).max() > 1e-3 * np.abs(wanted).max()  # H-MHSA was in the file
    with pytest.raises(UserError, match="exported for images of 40x40 alone, got img_size=64"):
        model.resize_to(64)


@pytest.fixture(scope="session")
def labelled(class_image, tmp_path_factory) -> Path:
    """Images of the three classes, to train on and to test."""
    folder = tmp_path_factory.mktemp("labelled")
    for part, first, count in (("train", 20, 8), ("test", 40, 6)):
        for label, name in enumerate(NAMES):
            (folder / part / name).mkdir(parents=True)
            for i in range(first, first + count):
                class_image(label, i).save(folder / part / name / f"{i}.png")
    return folder


def test_int8_says_what_it_costs_and_is_refused_beyond(exported, run, program, labelled, monkeypatch, tmp_path, capsys):
    # The file before it computes in 8 bits is the one that was exported.
    copied = dataclasses.replace(FORMATS["onnx"], write=lambda _, path, __: shutil.copyfile(exported.file, path))
    monkeypatch.setitem(FORMATS, "onnx", copied)
    monkeypatch.setattr(exporting, "_capture", lambda *_: program)
    out = tmp_path / "small.onnx"
    result = export(str(run), out=str(out), int8=True, calibrate=str(labelled), max_loss=20)
    told = result.info["int8"]
    assert told["test_images"] == 18
    assert told["calibrated_on"] == 21  # of 24, three are held back for validation
    assert told["top1_before"] >= 90
    assert told["top1_after"] >= told["top1_before"] - 20
    assert "8 bits: top-1 from" in capsys.readouterr().out
    small, plain = OnnxModel(out), OnnxModel(exported.file)
    assert small.info["int8"] == told
    assert small.class_names == NAMES
    images = np.stack([to_input(read_image(file), CONFIG) for file in sorted(labelled.glob("test/*/4?.png"))])
    difference = np.abs(small(images) - plain(images)).max() / np.abs(plain(images)).max()
    assert 1e-4 < difference < 0.5  # it computes in 8 bits
    with pytest.raises(UserError, match=r"in 8 bits top-1 is .* of 18 images: more lost than max_loss=-101"):
        export_model(load(run), tmp_path / "b.onnx", calibrate=str(labelled), max_loss=-101)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.json", "small.onnx"]
    for wrong, text in (
        ({"int8": True}, "int8 and calibrate go together"),
        ({"calibrate": "x"}, "int8 and calibrate go together"),
        ({"int8": True, "calibrate": "x", "format": "torch"}, "int8 is for the format onnx"),
    ):
        with pytest.raises(UserError, match=text):
            export(str(run), **wrong)


def test_calibration_reads_the_columns_that_the_run_learnt_from(labelled, tmp_path):
    """Those of its table; its folder of images only of the very same table."""
    table, other = tmp_path / "a.csv", tmp_path / "b.csv"
    rows = [f"{NAMES[i % 3]}/{40 + i // 3}.png,{NAMES[i % 3]},wrong" for i in range(6)]
    for path in (table, other):
        path.write_text("\n".join(["photo,kind,label", *rows]))
    columns = {"target": ["kind"], "file_column": "photo", "images": str(labelled / "test")}
    info = {"task_args": {"table": columns}, "settings": {"data": str(table)}}
    loaded = Loaded(torch.nn.Identity(), "classify", NAMES, CONFIG, "x", info)
    assert sorted(read(str(table), "all", loaded)[1].tolist()) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UserError, match=r"none of the 6 images"):
        read(str(other), "all", loaded)


def test_a_file_that_answers_otherwise_is_not_kept(monkeypatch, trained, tmp_path):
    def write(program, path, info):
        path.write_bytes(b"x")

    for wrong in (lambda x: x * 1.001, lambda x: x * np.nan):
        kind = Format(".onnx", (), write, lambda path, wrong=wrong: lambda x: wrong(answers_of(trained.model, x)))
        monkeypatch.setitem(FORMATS, "onnx", kind)
        monkeypatch.setattr(exporting, "_capture", lambda *_: None)
        (tmp_path / "model.onnx").write_bytes(b"an older one")
        with pytest.raises(
            UserError, match=r"model.onnx is not kept: at \d+x\d+x\d+ it differs .* tolerance is 1.0e-05"
        ):
            export_model(trained, tmp_path / "model.onnx")
        assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
        assert (tmp_path / "model.onnx").read_bytes() == b"an older one"


def test_what_a_format_cannot_hold_ends_in_one_line(monkeypatch, trained, tmp_path):
    def write(program, path, info):
        raise RuntimeError("no such operator\nand a long report")

    monkeypatch.setitem(FORMATS, "onnx", Format(".onnx", (), write, lambda path: lambda x: x))
    monkeypatch.setattr(exporting, "_capture", lambda *_: None)
    with pytest.raises(UserError, match=r"the format onnx can't hold TransCNN: no such operator$"):
        export_model(trained, tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


class Cancelling(nn.Module):
    """Its own answers in float32 are off by some 1e-5 of the largest."""

    def forward(self, x):
        return (x.mean((2, 3)) + 1e3) - 1e3


@pytest.mark.parametrize(("wrong", "kept"), [(0.0, True), (3e-3, False)])
def test_a_file_may_differ_by_the_networks_own_rounding(tmp_path, wrong, kept):
    model = Cancelling()

    def run(images: np.ndarray) -> np.ndarray:
        return (images.astype(np.float64).mean((2, 3)) * (1 + wrong)).astype(np.float32)

    rows = check(model, run, iter([random_images(2, 3, 9, 9)]), 1e-5)
    assert rows[0].relative > 1e-5
    assert rows[0].noise > 1e-5 / 4
    assert check(model, run, iter([random_images(2, 3, 9, 9)]))[0].noise == 0  # only where asked for
    if kept:
        refuse_beyond(rows, 1e-5, tmp_path / "x.onnx")
    else:
        with pytest.raises(UserError, match="is not kept"):
            refuse_beyond(rows, 1e-5, tmp_path / "x.onnx")


def test_what_was_learnt_from_is_not_scored(labelled):
    """Of data without a test split, the part that the run held back."""
    settings = {"data": str(labelled / "train"), "val_fraction": 0.25, "seed": 3}
    loaded = Loaded(torch.nn.Identity(), "classify", NAMES, CONFIG, "x", {"settings": settings})
    for split, count in (("auto", 6), ("train", 18)):
        assert len(read(str(labelled / "train"), split, loaded)[1]) == count


def test_the_images_that_a_run_held_back_are_scored_though_others_came_later(labelled, tmp_path):
    data, run = shutil.copytree(labelled / "train", tmp_path / "data"), tmp_path / "run"
    run.mkdir()
    write_record(run, record_of(open_splits(str(data), val_fraction=0.25)))
    loaded = Loaded(
        torch.nn.Identity(), "classify", NAMES, CONFIG, str(run / "last.ckpt"), {"settings": {"data": str(data)}}
    )
    kept, _ = read(str(data), "auto", loaded)
    for file in [*data.glob("*/*.png")]:
        Image.effect_noise((32, 32), 50).save(file.with_stem(f"a-{file.stem}"))
    assert np.array_equal(read(str(data), "auto", loaded)[0], kept)


def test_calibration_leaves_out_what_cannot_be_read(labelled, trained, tmp_path, caplog):
    folder = shutil.copytree(labelled, tmp_path / "copy")
    for part in ("train", "test"):
        (folder / part / "steep" / "junk.png").write_bytes(b"junk")
    for split, count in (("test", 18), ("train", 21)):
        images, labels = read(str(folder), split, trained)
        assert images.shape == (count, 3, 32, 32)
        assert len(labels) == count
    assert "junk.png (not an image" in caplog.text
    for file in folder.glob("*/*/*.png"):
        file.write_bytes(b"junk")
    with pytest.raises(UserError):
        read(str(folder), "test", trained)


class FixedSize(nn.Module):
    def forward(self, x):
        return (x + torch.zeros(65, 99)).sum((2, 3))


def test_clear_errors(trained, tmp_path, run):
    with pytest.raises(UserError, match=r"a file of format openvino ends in .xml, got .*a.onnx"):
        export_model(trained, tmp_path / "a.onnx", format="openvino")
    with pytest.raises(UserError, match="format must be one of onnx, torch, openvino, got 'tflite'"):
        export(str(run), format="tflite")  # pyright: ignore
    with pytest.raises(UserError, match="static must be 1 or more, got 0"):
        export_model(trained, tmp_path / "a.onnx", static=0)
    with pytest.raises(UserError, match="FixedSize works at a fixed height and width only; give --static SIZE"):
        export_model(Loaded(FixedSize(), "classify", NAMES, dict(CONFIG), ""), tmp_path / "a.onnx")
    with pytest.raises(UserError, match="no such file"):
        OnnxModel(tmp_path / "missing.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
    with pytest.raises(UserError, match=r"can't read .*broken.onnx"):
        OnnxModel(tmp_path / "broken.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_an_onnx_file_of_others_is_refused(exported, tmp_path):
    import onnx

    model = onnx.load(exported.file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="was not written by transcnn export"):
        OnnxModel(tmp_path / "other.onnx")


NODE = """
const fs = require("fs"), ort = require("onnxruntime-node");
const [model, input, output, ...shape] = process.argv.slice(2);
(async () => {
  const session = await ort.InferenceSession.create(model);
  const bytes = fs.readFileSync(input);
  const values = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
  const answer = await session.run({ images: new ort.Tensor("float32", values, shape.map(Number)) });
  fs.writeFileSync(output, Buffer.from(answer.logits.data.buffer));
})();
"""


@pytest.fixture(scope="session")
def node() -> tuple[str, dict[str, str]]:
    """Node.js and an environment in which it finds onnxruntime-node: ``NODE_PATH`` names its node_modules folder."""
    program = shutil.which("node")
    if not program:
        pytest.skip("needs Node.js")
    found = subprocess.run([program, "-e", "require('onnxruntime-node')"], capture_output=True, timeout=60)
    if found.returncode:
        pytest.skip("needs the npm package onnxruntime-node (NODE_PATH says in which node_modules it is)")
    return program, dict(os.environ)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 45, 33)])
def test_node_js_answers_the_same(node, exported, trained, tmp_path, shape):
    program, environment = node
    images = random_images(*shape)
    (tmp_path / "run.js").write_text(NODE)
    images.tofile(tmp_path / "images.bin")
    files = [str(tmp_path / "run.js"), str(exported.file), str(tmp_path / "images.bin"), str(tmp_path / "logits.bin")]
    subprocess.run([program, *files, *map(str, shape)], check=True, timeout=60, env=environment)
    found = np.fromfile(tmp_path / "logits.bin", np.float32).reshape(shape[0], 3)
    wanted = answers_of(trained.model, images)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_made_images_are_images():
    image = _made_image(1)
    assert isinstance(image, Image.Image)
    assert image.size == (256, 256)
    assert np.asarray(image).std() > 20


def test_load_of_the_run_still_works(run, trained):
    images = random_images(1, 3, 40, 40)
    np.testing.assert_array_equal(answers_of(load(run).model, images), answers_of(trained.model, images))


def test_the_network_stays_as_it_is(tmp_path):
    """A caller's network keeps its dtype and its mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double().train()
    loaded = Loaded(model, "classify", NAMES, dict(CONFIG), "")
    result = export_model(loaded, tmp_path / "model.pt2", format="torch")
    assert result.file.exists()
    assert loaded.model is model
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize(("relative", "kept"), [(0.0, True), (1e-9, False), (float("nan"), False)])
def test_a_tolerance_of_zero(tmp_path, relative, kept):
    rows = [Row(1, 8, 8, 0.0, value, 1.0, 1.0) for value in (0.0, relative)]
    if kept:
        refuse_beyond(rows, 0.0, tmp_path / "x.onnx")
    else:
        with pytest.raises(UserError, match=r"is not kept.* tolerance is 0\.0e\+00"):
            refuse_beyond(rows, 0.0, tmp_path / "x.onnx")


class Pair(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        (Pair(), NAMES, r"Pair must give a number for each of 3 names, \(B, 3\), got tuple"),
        (Cancelling(), ["a", "b"], r"for each of 2 names, \(B, 2\), got \(1, 3\)"),
    ],
)
def test_networks_that_give_something_else_than_their_names(tmp_path, model, names, message):
    with pytest.raises(UserError, match=message):
        export_model(Loaded(model, "classify", names, dict(CONFIG), ""), tmp_path / "x.onnx")


def test_what_lies_beside_is_not_written_over(tmp_path):
    loaded = Loaded(Cancelling(), "classify", NAMES, dict(CONFIG), "")
    (tmp_path / "x.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"x.json is there already, and is none that an export wrote"):
        export_model(loaded, tmp_path / "x.onnx")
    (tmp_path / "y.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"y.bin is there already, without y.xml"):
        exporting._check_beside(tmp_path / "y.xml")
    (tmp_path / "z.json").mkdir()
    with pytest.raises(UserError, match=r"z.json is there already"):
        exporting._check_beside(tmp_path / "z.onnx")
    assert (tmp_path / "x.json").read_text() == '{"mine": 1}'


def test_names_that_are_no_utf8_and_images_that_cannot_be_read(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    loaded = Loaded(model, "classify", ["a\udcff", "猫"], dict(CONFIG), "")
    result = export_model(loaded, tmp_path / "x.pt2", format="torch")
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text)["class_names"] == ["a\udcff", "猫"]
    assert "猫" in text
    exporting._check_beside(result.file)  # a second export may replace the first
    with pytest.raises(UserError, match=r"can't read nosuch.png: no such file"):
        list(comparisons(CONFIG, None, ["nosuch.png"]))
    model[3].bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"own answers to images of shape .* aren't all finite"):
        check(model, lambda x: answers_of(model, x), iter([random_images(1, 3, 8, 8)]))
