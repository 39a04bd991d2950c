"""Scoring and naming with a trained network, through the functions that the commands are."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from transcnn.checkpoints.loading import data_config_of, load, save_weights
from transcnn.commands.embed import embed
from transcnn.commands.evaluate import evaluate
from transcnn.commands.explain import explain
from transcnn.commands.models import models, read_figures
from transcnn.commands.predict import FEW, predict
from transcnn.commands.train import train
from transcnn.data.images import read_image
from transcnn.data.paths import find_images
from transcnn.data.sets.classify import open_splits
from transcnn.dense.build import build_network
from transcnn.errors import UserError
from transcnn.plugging.build import build_model
from transcnn.plugging.cost import describe
from transcnn.tasks import get_task
from transcnn.training.data_record import record_of, write_record
from transcnn.variants import PAPER_TOP1, VARIANTS, create_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with random weights for three classes."""
    torch.manual_seed(3)
    network = build_model("transcnn_test", num_classes=3)
    for parameter in network.parameters():  # answers that differ from image to image
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    folder = tmp_path / "run"
    folder.mkdir()
    names = ["class_0", "class_1", "class_2"]
    config = data_config_of(network, 3, 32)
    save_weights(
        folder / "best.safetensors",
        network,
        {"model": "transcnn_test", "model_args": {}, "class_names": names, "data_config": config, "task": "classify"},
    )
    return folder


def test_eval_counts_as_a_loop_would(run, class_folder, capsys):
    metrics = evaluate(str(run), str(class_folder), precision="32", accelerator="cpu", report=True)
    rows = predict(str(run), [str(class_folder)], accelerator="cpu", quiet=True)
    truths = [Path(row["file"]).parent.name for row in rows]
    right = [row["top"][0]["label"] == truth for row, truth in zip(rows, truths, strict=True)]
    assert len(rows) == metrics["images"] == 24
    assert metrics["top1"] == pytest.approx(100 * sum(right) / 24, abs=1e-3)
    for name, accuracy in metrics["class_accuracy"].items():
        of_class = [hit for hit, truth in zip(right, truths, strict=True) if truth == name]
        assert accuracy == pytest.approx(100 * sum(of_class) / 8, abs=1e-3)
    assert json.loads((run / "eval" / "metrics.json").read_text()) == metrics
    assert (run / "eval" / "report" / "index.html").is_file()
    assert "top-1" in capsys.readouterr().out


def test_eval_averages_an_image_and_its_mirror_image(run, class_folder, tmp_path, capsys):
    settings: dict[str, Any] = dict(precision="32", accelerator="cpu", out=str(tmp_path))
    once = evaluate(str(run), str(class_folder), **settings, quiet=True)
    metrics = evaluate(str(run), str(class_folder), **settings, flip=True)
    assert "each also mirrored" in capsys.readouterr().out
    loaded = load(run)
    transform = get_task("classify").image_transform(loaded.preprocessing)
    losses = []
    for path in sorted(class_folder.glob("*/*.png")):
        x = transform(read_image(path))[None]
        with torch.inference_mode():
            logs = [loaded.model.eval()(view).double().log_softmax(1)[0] for view in (x, x.flip(-1))]
        mean = torch.logaddexp(*logs) - math.log(2)  # of the probabilities
        losses.append(-mean[loaded.class_names.index(path.parent.name)].item())
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["loss"] != once["loss"]
    assert metrics["flip"] is True
    assert "flip" not in once
    with pytest.raises(UserError, match=r"window is for segment alone; .* is for the task classify"):
        evaluate(str(run), str(class_folder), window=64)


def test_eval_leaves_broken_files_out_and_lists_them(run, class_folder):
    (class_folder / "class_1" / "000.png").write_bytes(b"")
    metrics = evaluate(str(run), str(class_folder), accelerator="cpu", quiet=True)
    assert metrics["images"] == 23
    assert metrics["skipped"] == 1
    with (run / "eval" / "skipped.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "reason"]
    assert rows[1][0].endswith("000.png")
    with pytest.raises(UserError, match=r"000\.png"):
        evaluate(str(run), str(class_folder), accelerator="cpu", strict_data=True, quiet=True)


def test_eval_scores_what_the_run_held_back_whatever_the_data_is_now(
    run, class_folder, class_image, tmp_path, capsys, monkeypatch
):
    loaded = load(run)
    settings = {"data": str(class_folder), "val_fraction": 0.25, "seed": 0}
    save_weights(run / "best.safetensors", loaded.model, {**loaded.info, "settings": settings})
    began = open_splits(str(class_folder), val_fraction=0.25)
    write_record(run, record_of(began))
    names = {began.val.name(i) for i in range(len(began.val))}
    for i in range(100, 108):
        class_image(0, i).save(class_folder / "class_0" / f"{i}.png")
    metrics = evaluate(str(run), accelerator="cpu")
    assert (metrics["split"], metrics["images"]) == ("val", len(names))
    assert "learnt from" not in capsys.readouterr().err
    shutil.copytree(class_folder, tmp_path / "moved")
    assert evaluate(str(run), str(tmp_path / "moved"), accelerator="cpu")["images"] == 32
    assert "18 of these 32 images have names and sizes of images that the run learnt from" in capsys.readouterr().err
    monkeypatch.setattr("transcnn.commands.evaluate.load", lambda *_: replace(loaded, source="transcnn_tiny"))
    monkeypatch.chdir(run)  # published weights didn't learn from what lies where the command is run
    evaluate("transcnn_tiny", tmp_path / "moved", accelerator="cpu")
    assert "learnt from" not in capsys.readouterr().err


def test_eval_says_which_part_it_took(run, split_folder):
    assert evaluate(str(run), str(split_folder), accelerator="cpu", quiet=True)["split"] == "val"
    assert json.loads((run / "eval" / "metrics.json").read_text())["split"] == "val"


def test_predict_prints_no_nan(run, class_folder, capsys):
    loaded = load(run)
    torch.nn.init.constant_(next(loaded.model.parameters()), 3e38)  # finite, as weights must be; its sums aren't
    save_weights(run / "best.safetensors", loaded.model, loaded.info)
    predict(str(run), [str(class_folder / "class_0")], json=True, accelerator="cpu")
    rows = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert len(rows) == 8
    assert all("not a number" in row["error"] and "top" not in row for row in rows)
    metrics = evaluate(str(run), str(class_folder), accelerator="cpu")
    assert "the loss is nan" in capsys.readouterr().err
    text = (run / "eval" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["loss"] is None
    assert math.isnan(metrics["loss"])


def test_eval_of_files_of_which_none_can_be_read_is_one_line(run, tmp_path):
    for name in ("class_0", "class_1"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"nothing can be scored on .*broken: no image of the split has a label"):
        evaluate(str(run), tmp_path / "broken", accelerator="cpu", quiet=True)


def test_eval_of_other_classes_is_refused(run, make_class_folder):
    with pytest.raises(UserError, match="does not know"):
        evaluate(str(run), str(make_class_folder(classes=5, per_class=1, name="more")), accelerator="cpu")


def test_predict_json_is_what_the_design_says(run, class_folder, capsys):
    broken = class_folder / "class_0" / "zz broken é.png"
    broken.write_text("not an image")
    good = str(class_folder / "class_0" / "000.png")
    predict(str(run), [str(broken), good, "missing.png"], json=True, top_k=2, accelerator="cpu")
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [row["file"] for row in rows] == [str(broken), good, "missing.png"]
    assert set(rows[0]) == set(rows[2]) == {"file", "error"}
    assert set(rows[1]) == {"file", "top"}
    assert [set(top) for top in rows[1]["top"]] == [{"label", "score"}] * 2
    assert rows[1]["top"][0]["score"] >= rows[1]["top"][1]["score"]


def test_predict_is_the_network_and_batches_do_not_matter(run, class_folder):
    one = predict(str(run), [str(class_folder)], batch_size=1, accelerator="cpu", quiet=True)
    many = predict(str(run), [str(class_folder)], batch_size=7, accelerator="cpu", quiet=True)
    for a, b in zip(one, many, strict=True):
        assert a["file"] == b["file"]
        assert [top["label"] for top in a["top"]] == [top["label"] for top in b["top"]]
        assert [top["score"] for top in a["top"]] == pytest.approx([top["score"] for top in b["top"]], abs=1e-5)
        assert sum(top["score"] for top in a["top"]) == pytest.approx(1, abs=1e-5)  # three classes, all of them told
    loaded = load(run)
    from PIL import Image

    from transcnn.tasks.classify import Classify

    x = Classify.image_transform(loaded.preprocessing)(Image.open(one[0]["file"]), 0)
    best = loaded.model(x[None]).softmax(1).max()
    assert one[0]["top"][0]["score"] == pytest.approx(best.item(), abs=1e-5)


def test_optimized_prediction_is_the_same(run, class_folder, class_image, tmp_path):
    """In order, with what can't be read in its place, whatever the size of batches."""
    for i in range(40):
        class_image(i % 3, i, (30 + i, 50 - i)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "17.png").write_bytes(b"no image")
    plain = predict(str(run), [str(tmp_path)], optimize=False, quiet=True)
    for batch_size in (7, 32):
        fast = predict(str(run), [str(tmp_path)], batch_size=batch_size, quiet=True)
        assert [row["file"] for row in fast] == [row["file"] for row in plain]
        assert fast[17] == plain[17]
        assert "error" in fast[17]
        for a, b in zip(plain, fast, strict=True):
            if "error" not in a:
                assert [x["label"] for x in a["top"]] == [x["label"] for x in b["top"]]
                assert [x["score"] for x in b["top"]] == pytest.approx([x["score"] for x in a["top"]], abs=1e-5)


@pytest.mark.falls_back
def test_what_can_not_be_optimized_runs_as_it_is(run, class_folder, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no such thing")

    monkeypatch.setattr("transcnn.fast.inference.optimize.optimize", fails)
    rows = predict(str(run), [str(class_folder)], quiet=True)
    assert len(rows) >= FEW
    assert all("error" not in row for row in rows)
    assert "can't be optimized: no such thing" in caplog.text


@pytest.mark.parametrize("command", [predict, evaluate, partial(embed, knn=1)])
def test_a_network_for_one_size_says_so(class_folder, tmp_path, command):
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 1}
    network = build_model("vit_tiny_patch16_224", num_classes=3, **args)
    info = {"model": "vit_tiny_patch16_224", "model_args": args, "task": "classify", "class_names": ["a", "b", "c"]}
    save_weights(tmp_path / "vit.safetensors", network, {**info, "data_config": data_config_of(network, 3, 32)})
    with pytest.raises(UserError, match=r"vit\.safetensors takes no images of 48x48: Input height \(48\)"):
        command(tmp_path / "vit.safetensors", class_folder, img_size=48, accelerator="cpu", quiet=True)


def test_predict_table_and_csv(run, class_folder, tmp_path, capsys):
    (class_folder / "class_0" / "000.png").write_bytes(b"")
    target = tmp_path / "out.csv"
    predict(str(run), [str(class_folder / "class_0")], csv=str(target), top_k=1, accelerator="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert sum("can't be read: empty file" in line for line in lines) == 1
    assert sum("%" in line for line in lines) == 7
    with target.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "error", "label_1", "score_1"]
    assert rows[0]["error"] == "empty file"
    assert all(row["label_1"].startswith("class_") and float(row["score_1"]) > 0 for row in rows[1:])


def test_images_by_file_folder_and_pattern(class_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(class_folder)
    assert len(find_images(["class_0", "class_1/00[01].png"])) == 10
    assert find_images(["class_0/000.png", "class_0/000.png"]) == ["class_0/000.png"]  # each once
    assert len(find_images(["**/*.png"])) == 24
    odd = class_folder / "a [1].png"
    odd.touch()
    assert find_images(["a [1].png"]) == ["a [1].png"]  # a name before it is a pattern
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in the folder"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="no file matches"):
        find_images(["nothing*.png"])


@pytest.mark.parametrize(("settings", "message"), [(dict(top_k=0), "top_k"), (dict(batch_size=0), "batch_size")])
def test_predict_refuses_wrong_numbers(run, class_folder, settings: dict[str, Any], message):
    with pytest.raises(UserError, match=message):
        predict(str(run), [str(class_folder)], **settings)


def test_models_are_the_published_ones(tmp_path, capsys):
    paper = {"hatnet_tiny": 2.0, "hatnet_small": 4.3}  # it counts layers, not the products inside attention
    figures = {name: describe(name) for name in ("transcnn_tiny", *paper)}
    assert figures["transcnn_tiny"]["params"] == 13_315_976
    assert figures["hatnet_tiny"]["params"] == 12_655_912 - 5_760  # but for the unused proj_norm
    for name, giga in paper.items():
        assert figures[name]["layer_macs"] / 1e9 == pytest.approx(giga, abs=0.05)
        assert figures[name]["macs"] > figures[name]["layer_macs"]
    models(["transcnn_tiny", "resnet18"], img_size=64, csv=str(tmp_path / "models.csv"))
    out = capsys.readouterr().out
    assert "80.4 %" in out
    assert "paper" in out
    with (tmp_path / "models.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["transcnn_tiny", "resnet18"]
    assert rows[1]["paper_top1"] == ""
    with pytest.raises(UserError, match="img_size"):
        describe("transcnn_test", -1)


def test_figures_of_networks_are_kept_as_they_are_counted():
    hint = "write the file anew: python -m transcnn.commands.models"
    kept = read_figures()
    assert list(kept) == list(VARIANTS), hint
    for name, row in kept.items():
        with torch.device("meta"):
            model = create_model(name)
        assert sum(p.numel() for p in model.parameters()) == row["params"], hint
        assert list(model.pretrained_cfg["input_size"]) == row["input_size"], hint
        assert PAPER_TOP1.get(name) == row["paper_top1"], hint
    for name in ("transcnn_test", "transcnn_nano", "hatnet_tiny"):
        assert describe(name) == kept[name], hint


def test_eval_shows_a_bar_on_terminals_alone(run, class_folder, capfd, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    wanted = {"accelerator": "cpu", "batch_size": 4}
    shown = []
    for terminal, quiet in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("FORCE_COLOR", "1") if terminal else monkeypatch.delenv("FORCE_COLOR")
        evaluate(str(run), str(class_folder), quiet=quiet, **wanted)
        shown.append(capfd.readouterr().err)
    assert "6/6" in shown[0]
    assert "images/s" in shown[0]
    assert shown[1:] == ["", ""]


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Path:
    """Weights of a network, never trained, that tells three classes of pixels apart."""
    args = {"decoder": "fpn", "decoder_channels": 64, "resize": None, "label_ids": [0, 1, 2], "colours": None}
    network = build_network("segment", "transcnn_test", args, num_classes=3, in_chans=3)
    info = {"model": "transcnn_test", "model_args": {}, "class_names": ["a", "b", "c"], "task": "segment"}
    path = tmp_path_factory.mktemp("segmenter") / "weights.safetensors"
    save_weights(path, network, {**info, "task_args": args, "data_config": data_config_of(network, 3, 32)})
    return path


def test_predict_never_writes_over_a_picture_of_the_users(segmenter, class_image, tmp_path):
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    names = ["a.png", "a.jpg", "a_overlay.jpg", "a-2.png", "deeper/a.png", "b.jpg", "B.png", "x" * 240 + ".png"]
    for i, name in enumerate(names):
        class_image(0, i).save(folder / name)
    class_image(1, 99).save(folder / "b_overlay.png")  # not looked at, but the user's all the same
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    for out in (folder, folder / "deeper" / ".."):
        rows = predict(str(segmenter), [str(folder / name) for name in names], out=str(out), quiet=True)
        written = [Path(row[kind]) for row in rows for kind in ("mask", "overlay")]
        assert len({path.resolve() for path in written}) == 2 * len(names)
        assert len({str(path.resolve()).casefold() for path in written}) == 2 * len(names)
        assert all(path.is_file() for path in written)
        assert not {path.resolve() for path in written} & set(before)
        assert {path: path.read_bytes() for path in before} == before
    # What an earlier call wrote is written over; nothing but pictures is left behind.
    assert len(list(folder.iterdir())) == len(before) - 1 + 1 + 2 * len(names)


def test_predict_finds_out_at_once_that_a_file_cannot_be_written(run, segmenter, class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transcnn.predictor.base.Predictor._in_batches", lambda *_: pytest.fail("work was done"))
    image = str(class_folder / "class_0" / "000.png")
    (tmp_path / "file").touch()
    for csv_path, reason in (
        (tmp_path / "nowhere" / "out.csv", "there is no folder"),
        (tmp_path, "it is a folder"),
        (image, "it is one of the inputs"),
        ("/proc/out.csv", "can't write /proc/out.csv"),
    ):
        with pytest.raises(UserError, match=reason):
            predict(str(run), [image], csv=str(csv_path), accelerator="cpu", quiet=True)
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/below"):
        with pytest.raises(UserError, match="can't write to"):
            predict(str(segmenter), [image], out=str(out), accelerator="cpu", quiet=True)
    assert Path(image).stat().st_size > 0


def test_eval_finds_out_at_once_that_its_figures_cannot_be_written(run, class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transcnn.commands.evaluate.measure", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write to"):
        evaluate(str(run), str(class_folder), out=str(tmp_path / "file"), accelerator="cpu", quiet=True)


def test_explain_never_writes_over_its_image(run, class_folder):
    image = class_folder / "class_0" / "000.png"
    before = image.read_bytes()
    with pytest.raises(UserError, match="it is one of the inputs"):
        explain(str(run), str(image), out=str(image), quiet=True)
    assert image.read_bytes() == before


def test_weights_that_cannot_be_written_are_one_clear_line(tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("transcnn.checkpoints.loading.save_file", full)
    with pytest.raises(UserError, match=r"can't write .*weights\.safetensors: I/O error: No space left on device"):
        save_weights(tmp_path / "weights.safetensors", torch.nn.Linear(2, 2), {})
    assert not list(tmp_path.iterdir())


def test_eval_scores_what_a_run_held_back_as_the_run_did(whole_run, tmp_path, monkeypatch, capsys):
    folder, run = whole_run
    metrics = json.loads((run / "metrics.json").read_text())
    settings: dict[str, Any] = dict(accelerator="cpu", quiet=True, out=str(tmp_path))
    assert metrics["precision"] == "bf16-mixed"
    assert metrics["device"] == "cpu"
    monkeypatch.chdir(folder)
    capsys.readouterr()
    for data in (None, str(folder), ".", "../images"):
        again = evaluate(str(run), data, **settings)
        for name in ("split", "images", "top1", "precision", "device", "class_accuracy"):
            assert again[name] == metrics[name], (data, name)
        assert again["loss"] == pytest.approx(metrics["loss"], abs=2e-4)
    assert again["split"] == "val"
    assert again["images"] == 4  # of 24: a fraction of 0.15 of each class, drawn with the run's seed
    assert not capsys.readouterr().err
    learnt = evaluate(str(run), str(folder), split="train", **{**settings, "quiet": False})
    assert learnt["images"] == 20
    assert "the run learnt from these images" in capsys.readouterr().err
    assert evaluate(str(run), precision="32", **settings)["precision"] == "32-true"
    other = shutil.copytree(folder, tmp_path / "other")
    assert evaluate(str(run), str(other), **settings)["split"] == "all"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, class_image, drawing_off) -> tuple[Path, Path]:
    """Images, and a short run on them in bf16, named by a path that is relative to another folder than the tests'."""
    folder = tmp_path_factory.mktemp("held")
    for label in range(2):
        (folder / "images" / f"class_{label}").mkdir(parents=True)
        for i in range(12):
            class_image(label, i).save(folder / "images" / f"class_{label}" / f"{i:03}.png")
    with pytest.MonkeyPatch.context() as patch, drawing_off():
        patch.chdir(folder)
        settings: dict[str, Any] = dict(model="transcnn_test", img_size=32, batch_size=4, epochs=2, precision="bf16")
        settings |= dict(val_fraction=0.15, seed=5, accelerator="cpu", num_workers=0, quiet=True)
        return folder / "images", train("images", **settings, out=str(folder / "run")).run_dir
