"""Untrusted ONNX files: what isn't what it says ends in one line, when it is opened or when it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refusal import refused

import fuzz
from transcnn.checkpoints import available
from transcnn.commands.embed import embed
from transcnn.commands.predict import predict
from transcnn.onnx.predict import OnnxModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("sealed")
CLASSIFY, SEGMENT, DETECT = range(3)


def write(seed: int, **info: Any) -> None:
    """A file of a node or two, with changes of what it says of itself."""
    model = onnx.load_from_string(fuzz.onnx_seeds()[seed])
    stored = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in {**stored, **info}.items()})
    onnx.save(model, "x.onnx")


def look() -> Any:
    Image.new("RGB", (9, 9)).save("x.png")
    return predict("x.onnx", ["x.png"], quiet=True, accelerator="cpu")


CHANGES: list[tuple[int, dict[str, Any]]] = [
    (CLASSIFY, {"class_names": ["a"]}),
    (CLASSIFY, {"class_names": ["x"] * 100_000}),
    (CLASSIFY, {"class_names": 3}),
    (CLASSIFY, {"task": "segment"}),
    (CLASSIFY, {"task": "detect"}),
    (CLASSIFY, {"task": "detect", "task_args": json.loads("[" * 100 + "]" * 100)}),
    (CLASSIFY, {"data_config": {**fuzz.CONFIG, "input_size": [1, 32, 32], "mean": [0.5], "std": [0.2]}}),
    (CLASSIFY, {"data_config": {**fuzz.CONFIG, "input_size": [3, 1 << 30, 1 << 30]}}),
    (CLASSIFY, {"data_config": {**fuzz.CONFIG, "interpolation": "random"}}),
    (CLASSIFY, {"data_config": {**fuzz.CONFIG, "mean": [float("nan")] * 3}}),
    (SEGMENT, {"task": "classify"}),
    (SEGMENT, {"class_names": ["a", "b"]}),
    (SEGMENT, {"task_args": {"decoder": "fpn", "window": 0}}),
    (SEGMENT, {"task_args": {"decoder": "fpn", "resize": -1}}),
    (SEGMENT, {"task_args": {"decoder": "fpn", "label_ids": ["x"]}}),
    (DETECT, {"class_names": ["a"]}),
    (DETECT, {"task": "classify"}),
    (DETECT, {"task_args": {}}),
    (DETECT, {"task_args": {"short_side": 0, "long_side": 0}}),
]


@pytest.mark.parametrize(("seed", "info"), CHANGES, ids=lambda value: str(value)[:40])
def test_a_file_that_is_not_what_it_says(seed, info):
    write(seed, **info)
    refused(look)


def test_images_that_no_memory_holds(monkeypatch):
    """A kilobyte that asks for batches of 8,192 pixels squared."""
    write(CLASSIFY, data_config={**fuzz.CONFIG, "input_size": [3, 8192, 8192]})
    monkeypatch.setattr(available, "available_bytes", lambda: 2 << 30)
    refused(look, "as it asks for, take 2.2 GiB of memory")
    refused(lambda: embed("x.onnx", ["x.png"], out="x.npy", quiet=True), "as it asks for, take 2.2 GiB of memory")


@pytest.mark.parametrize("seed", [CLASSIFY, SEGMENT, DETECT])
def test_a_good_file_is_run_sealed(seed):
    write(seed)
    assert "error" not in look()[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("b", np.full((2, 4), np.nan, np.float32)),
        ("b", np.zeros((2, 5), np.float32)),
        ("b", np.zeros((3, 4), np.float32)),
        ("s", np.zeros(3, np.float32)),
        ("l", np.array([0, 3])),
        ("l", np.array([-1, 0])),
    ],
)
def test_detections_that_cannot_be(name, value):
    model = onnx.load_from_string(fuzz.onnx_seeds()[DETECT])
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    onnx.save(model, "x.onnx")
    refused(look)


@pytest.mark.parametrize("name", [b"logits", b"images", b"class_names", b"GlobalAveragePool", b'"c"'])
def test_texts_that_are_no_utf8(name, capfd):
    content = fuzz.onnx_seeds()[CLASSIFY].replace(name, name[:1] + b"\xff" + name[2:])
    Path("x.onnx").write_bytes(content)
    refused(look)
    assert not capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"no protobuf", b"\x08\x0a" * 1000, None], ids=repr)
def test_what_is_no_onnx_file(content):
    Path("x.onnx").write_bytes(fuzz.onnx_seeds()[0][:-50] if content is None else content)
    refused(lambda: OnnxModel("x.onnx"))


@pytest.mark.filterwarnings("ignore")
def test_a_thousand_changed_files_end_in_a_result_or_in_one_line():
    fuzz.thousand("onnx")
