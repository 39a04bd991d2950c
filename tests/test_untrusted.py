"""Files of strangers: none runs code, writes elsewhere, or takes memory that it has no use for."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save

from fuzz import little_memory
from transcnn import cli
from transcnn.checkpoints.loading import load, read_info
from transcnn.commands.train import train
from transcnn.data.sets.classify import open_set
from transcnn.data.sources.files import open_files
from transcnn.errors import UserError
from transcnn.onnx.predict import OnnxModel

CONFIG = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
INFO = {"model": "transcnn_test", "class_names": ["a", "b"], "data_config": CONFIG}


def weights(**info: Any) -> bytes:
    header = {key: json.dumps(value) for key, value in {**INFO, **info}.items()}
    return save({"x": np.zeros(3, np.float32)}, metadata=header)


def header(length: int, tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", length or len(text)) + text


HUGE = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
ABSURD: list[tuple[str, Callable[[], bytes], str]] = [
    ("header.safetensors", lambda: header(1 << 60, {}), "can't read"),
    ("shape.safetensors", lambda: header(0, {"x": HUGE}), "can't read"),
    ("large.safetensors", lambda: weights(model="transcnn_large"), r"for a network of 79,\d{3},\d{3} weights"),
    ("wide.safetensors", lambda: weights(model_args={"dims": [16000] * 4}), "for a network of"),
    ("wider.safetensors", lambda: weights(model_args={"dims": [10**9] * 4}), "dims must be integers from 0 to 16384"),
    ("deep.safetensors", lambda: weights(model_args=json.loads("[" * 900 + "]" * 900)), "nested more than 20 deep"),
    ("side.safetensors", lambda: weights(data_config={**CONFIG, "input_size": [3, 1 << 30, 9]}), "input_size must"),
    ("names.safetensors", lambda: weights(class_names=7), "class_names must be"),
    ("task.safetensors", lambda: weights(task="dance"), "there is no task 'dance'"),
    ("std.safetensors", lambda: weights(data_config={**CONFIG, "std": [0, 1, 1]}), "std must be above 0"),
    ("nothing.safetensors", lambda: weights(data_config={}), "'input_size' is missing"),
]  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
@pytest.mark.parametrize(("name", "content", "match"), ABSURD, ids=[name for name, _, _ in ABSURD])
def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content())
    load_nothing()
    with little_memory(300), pytest.raises(UserError, match=match) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def load_nothing() -> None:
    """Libraries that are imported when they are first needed take address space, too."""
    from transcnn.plugging.build import build_model

    build_model("transcnn_test")


def test_an_onnx_file_that_says_it_is_huge_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    large = helper.make_tensor("x", TensorProto.FLOAT, [1], [0.0])
    del large.dims[:]
    large.dims.extend([1 << 40])
    outside = helper.make_tensor("x", TensorProto.FLOAT, [1], [0.0])
    outside.ClearField("float_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../secret")
    (tmp_path / "secret").write_bytes(b"1234")
    (tmp_path / "folder").mkdir()
    for name, tensor in (("large", large), ("outside", outside)):
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [out], [tensor])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        path = tmp_path / "folder" / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        with little_memory(2000), pytest.raises(UserError, match="can't read"):
            OnnxModel(path)
    assert onnx


class Evil:
    """A pickle of this runs a command when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_checkpoints_never_run_code(tmp_path, class_folder):
    marker = tmp_path / "ran"
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"state_dict": {}, "transcnn": INFO, "x": Evil(marker)}, run / "last.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"x": Evil(marker)}))
    for attempt in (
        lambda: load(run),
        lambda: read_info(run / "last.ckpt"),
        lambda: load(tmp_path / "plain.ckpt"),
        lambda: train(resume=str(run), quiet=True),
        lambda: train(str(class_folder), init_from=str(run / "last.ckpt"), out=str(tmp_path / "o"), quiet=True),
    ):
        with pytest.raises(UserError):
            attempt()
    assert not marker.exists()


def test_recipes_never_run_code(tmp_path):
    marker = tmp_path / "ran"
    for content in (
        f"model: !!python/object/apply:os.system ['touch {marker}']",
        f"!!python/object/new:os.system [touch {marker}]",
    ):
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(UserError) as caught:
            cli.parse("train", train, ["--config", str(tmp_path / "x.yaml")])
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_archives_are_read_where_they_lie(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    archive, secret = tmp_path / "data" / "x.tar", tmp_path / "secret.png"
    archive.parent.mkdir()
    secret.write_bytes(buffer.getvalue())
    with tarfile.open(archive, "w") as tar:
        for name in ("../evil.png", str(tmp_path / "evil.png"), "a/../../evil2.png", "good.png"):
            for suffix, content in ((".png", buffer.getvalue()), (".cls", b"0")):
                member = tarfile.TarInfo(name.replace(".png", suffix))
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"link{kind!r}.png")
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
    before = sorted(tmp_path.rglob("*"))
    part = open_set(str(archive), "all")
    assert len(part) == 4  # by names alone, from their places in the tar
    assert all(part.read(i)[0].size == (4, 4) for i in range(4))
    files = open_files(archive)
    assert not [name for name in files.names() if "link" in name]
    assert [files.read(name) for name in files.names() if name.endswith("good.png")] == [buffer.getvalue()]
    assert sorted(tmp_path.rglob("*")) == before
