"""Every form of data x train, eval, predict, explain, export, demo and a folder for the hub: one small run a form."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transcnn.checkpoints.hub import save_pretrained
from transcnn.checkpoints.loading import load
from transcnn.commands.evaluate import evaluate
from transcnn.commands.explain import explain
from transcnn.commands.export import export
from transcnn.commands.predict import predict
from transcnn.commands.train import train
from transcnn.data.images import read_image
from transcnn.demo.viewer import Viewer
from transcnn.export.exporting import _describe
from transcnn.settings import Table
from transcnn.tasks.classify import Classify
from transcnn.tasks.multilabel import Multilabel
from transcnn.tasks.regress import Regress

QUICK: dict[str, Any] = dict(model="transcnn_test", img_size=16, batch_size=8, epochs=1, lr=3e-3, precision="32")
QUICK |= dict(accelerator="cpu", num_workers=0, quiet=True)


@dataclass
class Form:
    """A form of data with the run that learnt it."""

    name: str
    task: str
    data: Path
    table: Table
    run: Path
    result: Any


FORMS: dict[str, tuple[str, str, Table]] = {
    "classes in a table": ("classify", "labels.csv", Table(images="images", target=["kind"], group="sheet")),
    "labels in a cell": ("multilabel", "labels.csv", Table(images="images", target=["tags"])),
    "a column a label": ("multilabel", "labels.csv", Table(images="images", target=["red", "green"])),
    "a number": ("regress", "labels.csv", Table(images="images", target=["price"])),
    "several numbers": ("regress", "labels.csv", Table(images="images", target=["price,weight"])),
    "folders named as numbers": ("regress", "folders", Table(target=["folder"])),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of a red and a green square, there or not, and a table that tells of them in every form."""
    folder = tmp_path_factory.mktemp("forms")
    rng = np.random.default_rng(0)
    rows = []
    (folder / "images").mkdir()
    for i in range(40):
        red, green = bool(i % 2), bool(i // 2 % 2)
        pixels = rng.integers(40, 60, (24, 24, 3), np.uint8)
        pixels[2:10, 2:10, 0] = 250 if red else 50
        pixels[12:20, 12:20, 1] = 250 if green else 50
        image = Image.fromarray(pixels)
        image.save(folder / "images" / f"{i}.png")
        kind = "red" if red else "other"
        (folder / "folders" / f"{1.5 + red}").mkdir(parents=True, exist_ok=True)
        image.save(folder / "folders" / f"{1.5 + red}" / f"{i}.png")
        tags = ";".join(name for name, there in (("red", red), ("green", green)) if there)
        price = "" if i == 7 else f"{100 * red + 20 * green + i / 10:.1f}"
        green_cell = "" if i == 5 else int(green)
        rows.append([f"{i}.png", kind, tags, int(red), green_cell, price, i, f"sheet {i // 4}"])
    header = ["file", "kind", "tags", "red", "green", "price", "weight", "sheet"]
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


FEW = ("classes in a table", "labels in a cell", "several numbers")  # one a task; the others are slow


@pytest.fixture(
    scope="module",
    params=[name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in FORMS],
)
def form(request: pytest.FixtureRequest, folder: Path) -> Form:
    """A form of data, learnt for an epoch."""
    task, data, table = FORMS[request.param]
    if table.images:
        table = Table(**{**table.__dict__, "images": str(folder / table.images)})
    run = folder / "runs" / request.param.replace(" ", "-")
    result = train(str(folder / data), **QUICK, task=task, table=table, out=str(run))  # pyright: ignore
    return Form(request.param, task, folder / data, table, run, result)


HEADLINES = {"classify": "top1", "multilabel": "map", "regress": "mae"}
KEYS = {"classify": {"top"}, "multilabel": {"labels", "top"}, "regress": {"values"}}


def test_train_leaves_figures_a_record_and_a_report(form):
    assert HEADLINES[form.task] in form.result.metrics
    assert (form.run / "data.json").is_file()
    page = (form.run / "report" / "index.html").read_text()
    figure = {"classify": "confusion.png", "multilabel": "labels.png", "regress": "scatter.png"}[form.task]
    assert figure in page
    assert (form.run / "report" / figure).stat().st_size > 1000
    assert (form.run / "report" / "augmented.png").is_file()


def test_eval_measures_what_training_did_and_takes_the_table(form, capsys):
    again = evaluate(str(form.run))
    name = HEADLINES[form.task]
    assert again[name] == pytest.approx(form.result.metrics[name], rel=1e-4)
    assert again["images"] == form.result.metrics["images"]
    assert "images/s" in capsys.readouterr().out
    images = form.table.images
    whole = evaluate(str(form.run), str(form.data), split="all", images=images, quiet=True, out=str(form.run / "all"))
    assert whole["images"] == (39 if form.name == "a number" else 40)


def test_predict_answers_in_the_form_that_was_learnt(form, folder, tmp_path):
    table = str(folder / "labels.csv")
    out = tmp_path / "answers.csv"
    rows = predict(str(form.run), [table], image_dir=str(folder / "images"), csv=str(out), quiet=True)
    assert len(rows) == 40
    assert all({"file"} | KEYS[form.task] == set(row) for row in rows)
    with out.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["sheet"] for row in written][::4] == [f"sheet {i}" for i in range(10)]
    if form.task == "regress":
        names = load(form.run).class_names
        column = names[0] if names[0] not in ("price", "weight") else f"predicted_{names[0]}"
        assert float(written[0][column]) == pytest.approx(rows[0]["values"][names[0]], rel=1e-5)
    if form.task == "multilabel":
        assert written[0]["labels"] == ";".join(rows[0]["labels"])


@pytest.mark.slow
def test_an_exported_file_answers_the_same(form, folder, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export(str(form.run), out=str(tmp_path / "model.onnx"), quiet=True)
    files = [str(folder / "images" / f"{i}.png") for i in range(4)]
    alike(predict(str(form.run), files, quiet=True), predict(str(tmp_path / "model.onnx"), files, quiet=True))
    assert str(folder) not in (tmp_path / "model.json").read_text()  # where the data lies is nobody's business


def test_an_onnx_file_is_read_as_the_network(form, folder, tmp_path):
    """The network is exchanged for one that takes a moment to write as ONNX: what is told beside it counts here."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    loaded = load(form.run)
    weight = torch.randn(3, len(loaded.class_names))
    loaded.model = Mean(weight)
    info = _describe(loaded, None)
    assert str(folder) not in json.dumps(info)  # where the data lies is nobody's business
    make, float32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        make.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        make.make_node("Flatten", ["pooled"], ["flat"]),
        make.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    ends = [make.make_tensor_value_info("images", float32, ["b", 3, "h", "w"])]
    ends.append(make.make_tensor_value_info("logits", float32, ["b", len(loaded.class_names)]))
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weight.numpy(), "weight")])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10)
    make.set_model_props(model, {key: json.dumps(value) for key, value in info.items()})
    onnx.save(model, str(tmp_path / "model.onnx"))
    files = [str(folder / "images" / f"{i}.png") for i in range(4)]
    viewer = Viewer(loaded)
    ours = [{"file": file, **viewer.answer(read_image(file))} for file in files]
    alike(ours, predict(str(tmp_path / "model.onnx"), files, quiet=True))
    told = {"classify": "softmax", "multilabel": "task_args.thresholds", "regress": "task_args.std"}
    assert told[form.task] in info["steps"][-1]


class Mean(torch.nn.Module):
    """Channel means times weights, (B, 3, H, W) -> (B, outputs)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) @ self.weight


def alike(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same answers up to rounding."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert mine["file"] == other["file"]
        assert mine.get("labels") == other.get("labels")
        assert [entry["label"] for entry in mine.get("top", ())] == [entry["label"] for entry in other.get("top", ())]
        numbers = [[*(e["score"] for e in x.get("top", ())), *x.get("values", {}).values()] for x in (mine, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-4)


def test_explain_draws_what_the_answer_rests_on(form, folder, tmp_path):
    out = explain(str(form.run), str(folder / "images" / "3.png"), out=str(tmp_path / "x.png"), quiet=True)
    assert Path(out).stat().st_size > 10_000


def test_the_page_answers(form, folder):
    pytest.importorskip("gradio")
    from transcnn.demo.page import _introduction, _said

    viewer = Viewer(load(form.run))
    answer = viewer.answer(read_image(folder / "images" / "3.png"))
    assert set(answer) == KEYS[form.task]
    assert _said(answer)
    assert viewer.loaded.class_names[0] in _introduction(viewer)


def test_a_folder_for_the_hub_answers_the_same(form, folder, tmp_path):
    save_pretrained(form.run, tmp_path / "shared")
    files = [str(folder / "images" / f"{i}.png") for i in range(3)]
    mine, theirs = (predict(str(source), files, quiet=True) for source in (form.run, tmp_path / "shared"))
    assert load(tmp_path / "shared").task == form.task
    alike(mine, theirs)
    assert str(folder) not in (tmp_path / "shared" / "config.json").read_text()


def test_every_task_of_whole_images_is_here():
    assert {task for task, _, _ in FORMS.values()} == {cls.name for cls in (Classify, Multilabel, Regress)}
