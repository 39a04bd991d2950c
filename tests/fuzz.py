"""Damaged and hostile files for every reader that is ours: each must end in a result or in an error of one line.

    python tests/fuzz.py --minutes 10          # what fails is kept in tests/corpus/, which test_fuzz.py replays
    python tests/fuzz.py --only coco,manifest

A small mutation fuzzer without coverage: good files (made below), of which bits, numbers, pieces and nodes are changed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from transcnn.data.images import BrokenImage, read_ids, read_image
from transcnn.errors import UserError

CORPUS = Path(__file__).resolve().parent / "corpus"
CASES = int(os.environ.get("TRANSCNN_FUZZ_CASES", "1000"))  # of each kind; make faults asks for more
SLOW = 20.0  # seconds of the CPU that no input of some kilobytes may take (first imports are in it)


def image(fmt: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """A small picture as a file."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, fmt, **options)
    return buffer.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    """A tar with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as target:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


# --- what is read: each takes the file's bytes and an empty folder ----------------------------------------------------


def read_picture(content: bytes, folder: Path) -> None:
    read_image(content)


def read_label_map(content: bytes, folder: Path) -> None:
    read_ids(content)


def read_tar(content: bytes, folder: Path) -> None:
    from transcnn.data.sources.files import open_files
    from transcnn.data.sources.opening import open_source

    (folder / "x.tar").write_bytes(content)
    before = sorted(folder.rglob("*"))
    for attempt in (lambda: open_source(str(folder / "x.tar")).train, lambda: open_files(folder / "x.tar")):
        with suppress(UserError, BrokenImage):
            found: Any = attempt()
            for i in range(min(9, len(getattr(found, "labels", ())))):
                found.load(i)
            for name in found.names() if hasattr(found, "names") else ():
                found.read(name)
    assert sorted(folder.rglob("*")) == before, "something was unpacked"


def read_packed(manifest: bytes, index: bytes | None, folder: Path) -> None:
    from transcnn.commands.pack import pack
    from transcnn.data.sources.packed import open_packed

    source = Path(tempfile.gettempdir()) / "transcnn-fuzz-packed"
    if not (source / "manifest.json").exists():
        pack(None, out=str(source), decode=False, quiet=True)
    for path in source.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(manifest)
    if index is not None:
        (folder / "train.index").unlink()
        (folder / "train.index").write_bytes(index)
    train = open_packed(str(folder)).train
    for i in (0, -1) if train is not None and len(train) else ():
        train.load(i % len(train))  # pyright: ignore


def read_manifest(content: bytes, folder: Path) -> None:
    read_packed(content, None, folder)


def read_index(content: bytes, folder: Path) -> None:
    manifest = json.loads(manifest_seed())
    entry = manifest["parts"]["train"]["index"]
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    read_packed(json.dumps(manifest).encode(), content, folder)


def manifest_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder, suppress(UserError):
        read_packed(b"", None, Path(folder))
    return (Path(tempfile.gettempdir()) / "transcnn-fuzz-packed" / "manifest.json").read_bytes()


def index_seed() -> bytes:
    manifest_seed()
    return (Path(tempfile.gettempdir()) / "transcnn-fuzz-packed" / "train.index").read_bytes()


def read_coco(content: bytes, folder: Path) -> None:
    (folder / "annotations").mkdir()
    (folder / "annotations" / "train.json").write_bytes(content)
    read_detection(folder)


def read_voc(content: bytes, folder: Path) -> None:
    (folder / "Annotations").mkdir()
    for i in range(4):
        (folder / "Annotations" / f"{i}.xml").write_bytes(content if i < 2 else VOC)
    read_detection(folder)


def read_yolo(content: bytes, folder: Path) -> None:
    """The YAML file, or of a text without one the labels of two images."""
    (folder / "labels").mkdir()
    names = b"train: images\nval: images\nnames: [a, b]\n"
    is_yaml = b"names" in content or b"train" in content
    (folder / "data.yaml").write_bytes(content if is_yaml else names)
    for i in range(4):
        (folder / "labels" / f"{i}.txt").write_bytes(b"0 .5 .5 .2 .2\n" if is_yaml or i > 1 else content)
    read_detection(folder)


def read_vectors_file(content: bytes, folder: Path) -> None:
    from transcnn.vectors.file import read_vectors

    (folder / "x.parquet").write_bytes(content)
    (folder / "x.npy").write_bytes(content)
    (folder / "x.csv").write_text("file\na\nb\n")
    read_vectors(folder / ("x.npy" if b"NUMPY" in content[:16] else "x.parquet"))


def vectors_seeds() -> list[bytes]:
    from transcnn.vectors.file import Vectors, write_vectors

    with tempfile.TemporaryDirectory() as folder:
        names = ["a.png", "b.png"]
        for file in ("x.parquet", "x.npy"):
            write_vectors(Path(folder) / file, Vectors(np.ones((2, 3), np.float32), names, names, ["", ""], {"a": 1}))
        return [(Path(folder) / file).read_bytes() for file in ("x.parquet", "x.npy")]


def read_detection(folder: Path) -> None:
    from transcnn.data.sets.detect import open_splits

    (folder / "images").mkdir()
    for i in range(4):
        (folder / "images" / f"{i}.png").write_bytes(image())
    splits = open_splits(str(folder))
    for part in (splits.train, splits.val):
        for i in range(len(part)):
            with suppress(BrokenImage):
                for mask in part.read(i)[1]["masks"]:
                    mask()


def read_config(content: bytes, folder: Path) -> None:
    from transcnn import cli
    from transcnn.commands.train import train

    (folder / "x.yaml").write_bytes(content)
    cli.parse("train", train, ["--config", str(folder / "x.yaml")])


def read_weights(content: bytes, folder: Path) -> None:
    from transcnn.checkpoints.loading import load

    (folder / "x.safetensors").write_bytes(content)
    load(folder / "x.safetensors")


def read_checkpoint(content: bytes, folder: Path) -> None:
    from transcnn.checkpoints.loading import load

    (folder / "x.ckpt").write_bytes(content)
    load(folder / "x.ckpt")


def read_onnx(content: bytes, folder: Path) -> None:
    from transcnn.onnx.answers import answers
    from transcnn.onnx.dense import class_map, detections
    from transcnn.onnx.predict import OnnxModel, to_input

    (folder / "x.onnx").write_bytes(content)
    model = OnnxModel(folder / "x.onnx", accelerator="cpu", threads=1)
    picture = Image.new("RGB", (9, 9))
    if model.task == "classify":
        answers("classify", model(to_input(picture, model.data_config)[None]), model.class_names, {}, 5)
    else:
        (class_map if model.task == "segment" else detections)(model.outputs, picture, model.info)


def read_folder(content: bytes, folder: Path) -> None:
    from transcnn.checkpoints.loading import load

    (folder / "config.json").write_bytes(content)
    (folder / "model.safetensors").write_bytes(weights_seed())
    load(folder)


def read_parquet(content: bytes, folder: Path) -> None:
    from transcnn.data.sources.opening import open_source

    (folder / "x.parquet").write_bytes(content)
    train = open_source(str(folder / "x.parquet")).train
    for i in range(len(train) if train else 0):
        with suppress(BrokenImage):
            train.load(i)  # pyright: ignore
            train.name_of(i)  # pyright: ignore


def read_csv(content: bytes, folder: Path, name: str = "x.csv") -> None:
    from transcnn.data.sources.opening import open_source
    from transcnn.settings import Table

    (folder / name).write_bytes(content)
    (folder / "a.png").write_bytes(image())
    train = open_source(str(folder / name), Table(target=["label"])).train
    for i in range(len(train) if train else 0):
        with suppress(BrokenImage):
            train.load(i)  # pyright: ignore
            train.name_of(i)  # pyright: ignore


def read_json_lines(content: bytes, folder: Path) -> None:
    read_csv(content, folder, "x.jsonl")


def read_classes(content: bytes, folder: Path) -> None:
    from transcnn.data.sets.segment import open_splits

    (folder / "classes.txt").write_bytes(content)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
        for i in range(4):
            (folder / kind / f"{i}.png").write_bytes(image(mode="RGB" if kind == "images" else "L"))
    open_splits(str(folder))


# --- good files to begin with -----------------------------------------------------------------------------------------

YOLO = b"train: images\nval: [images]\ntest: test.txt\nnc: 2\nnames: {0: a, 1: b}\n"
VOC = b"""<annotation><size><width>12</width><height>9</height></size><object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>8</xmax><ymax>7</ymax></bndbox></object></annotation>"""
COCO = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 12, "height": 9} for i in range(4)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0,
         "segmentation": [[1, 1, 6, 1, 6, 6]]},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [1, 1, 5, 5], "iscrowd": 1,
         "segmentation": {"size": [9, 12], "counts": [50, 8, 50]}},
        {"id": 3, "image_id": 2, "category_id": 2, "bbox": [2, 1, 5, 5],
         "segmentation": {"size": [9, 12], "counts": "b18b1"}},
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [2, 1, 5, 5]},
    ],
}  # fmt: skip


CONFIG = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
MICRO = {"dims": [8, 8], "depths": [1, 1], "expansions": [1, 1], "kernel_sizes": [3, 3], "grid_sizes": [4, None]}
MICRO |= {"pool_ratios": [2, None]}


@functools.cache
def weights_seed(suffix: str = ".safetensors") -> bytes:
    import torch

    from transcnn.checkpoints.loading import data_config_of, save_weights
    from transcnn.plugging.build import build_model

    model = build_model("transcnn_test", num_classes=2, **MICRO)
    info = {"model": "transcnn_test", "model_args": MICRO, "class_names": ["a", "b"], "task": "classify"}
    info |= {"data_config": data_config_of(model, 3, 32), "task_args": {}, "data": "x", "epoch": 3, "val_top1": 50.0}
    info |= {"settings": {"data": "x", "seed": 0, "val_fraction": 0.1, "optim": {"opt": "adamw"}}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        if suffix == ".ckpt":
            torch.save({"transcnn": info, "state_dict": model.state_dict()}, path)
        else:
            save_weights(path, model, info)
        return path.read_bytes()


def folder_seed() -> bytes:
    cfg = {**CONFIG, "tag": "x", "fixed_input_size": False, "num_classes": 2, "first_conv": "stem.0"}
    config = {"architecture": "transcnn_test", "num_classes": 2, "model_args": MICRO, "pretrained_cfg": cfg}
    return json.dumps({**config, "num_features": 8, "global_pool": "avg", "label_names": ["a", "b"]}).encode()


def onnx_seeds() -> list[bytes]:
    """A classifier, a segmenter and a detector of a node or two."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def file(task: str, nodes: list[Any], outputs: dict[str, Any], constants: dict[str, Any], **info: Any) -> bytes:
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 3, "h", "w"])
        outs = [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()]
        tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
        graph = helper.make_graph(nodes, "g", [images], outs, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        about = {"class_names": ["a", "b", "c"], "data_config": CONFIG, "task": task, **info}
        onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
        return model.SerializeToString()

    real, whole = TensorProto.FLOAT, TensorProto.INT64
    pool = [helper.make_node("GlobalAveragePool", ["images"], ["x"]), helper.make_node("Flatten", ["x"], ["logits"])]
    same = [helper.make_node("Identity", ["images"], ["logits"])]
    found = {"boxes": (real, [2, 4]), "scores": (real, [2]), "labels": (whole, [2]), "image": (whole, [2])}
    held = {
        "b": np.array([[0, 0, 5, 5], [1, 1, 9, 4]], np.float32),
        "s": np.array([0.9, 0.5], np.float32),
        "l": np.array([0, 2]),
        "i": np.zeros(2, np.int64),
    }
    links = [helper.make_node("Identity", [a], [b]) for a, b in zip(held, found, strict=True)]
    detect = {"short_side": 64, "long_side": 96, "min_score": 0.05, "max_found": 9, "side_range": [1, 1]}
    detect |= {"detector": "retinanet", "fpn_channels": 16}
    segment = {"decoder": "fpn", "window": 8, "flip": True, "resize": 12, "label_ids": [0, 1, 2]}
    return [
        file("classify", pool, {"logits": (real, ["b", 3])}, {}),
        file("segment", same, {"logits": (real, ["b", 3, "h", "w"])}, {}, task_args=segment),
        file("detect", links, found, held, task_args=detect),
    ]


def parquet_seed() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": image(), "path": f"{i}.png"}, "label": i % 2} for i in range(4)]
    features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata), buffer, compression="none")
    return buffer.getvalue()


def pictures_seed() -> list[bytes]:
    kinds = [
        image("PNG"),
        image("PNG", "P"),
        image("PNG", "LA"),
        image("JPEG"),
        image("JPEG", "CMYK"),
        image("GIF", "P"),
    ]
    kinds += [image("BMP"), image("TIFF"), image("WEBP"), image("PPM"), image("TGA"), image("ICO"), image("PCX", "P")]
    return [*kinds, image("TIFF", "F"), image("TIFF", compression="tiff_lzw"), image("JPEG2000"), image("PNG", "I;16")]


TARGETS: dict[str, tuple[Callable[[bytes, Path], None], Callable[[], list[bytes]], float]] = {
    # name: reader, good files, share of the time
    "image": (read_picture, pictures_seed, 1),
    "ids": (read_label_map, lambda: [image(mode="L"), image(mode="P"), image("TIFF", "L")], 0.5),
    "tar": (read_tar, lambda: [tar({"a.png": image(), "a.cls": b"0", "b.jpg": image("JPEG"), "b.cls": b"1"})], 1),
    "manifest": (read_manifest, lambda: [manifest_seed()], 1),
    "index": (read_index, lambda: [index_seed()], 0.5),
    "coco": (read_coco, lambda: [json.dumps(COCO).encode()], 1.5),
    "voc": (read_voc, lambda: [VOC], 1),
    "yolo": (read_yolo, lambda: [YOLO, b"0 .5 .5 .2 .2\n1 .1 .1 .2 .1 .2 .3\n1 .5 .5 .1 .1 .9\n"], 1),
    "vectors": (read_vectors_file, vectors_seeds, 0.5),
    "config": (read_config, lambda: [p.read_bytes() for p in CORPUS.parents[1].glob("recipes/*.yaml")], 1.5),
    "weights": (read_weights, lambda: [weights_seed()], 1),
    "checkpoint": (read_checkpoint, lambda: [weights_seed(".ckpt")], 1),
    "folder": (read_folder, lambda: [folder_seed()], 1),
    "onnx": (read_onnx, onnx_seeds, 0.5),
    "parquet": (read_parquet, lambda: [parquet_seed()], 0.5),
    "csv": (read_csv, lambda: [b"file,label\na.png,cat\n./a.png,dog\n", b"label;path\n1;a.png\n2;C:\\x\\a.png\n"], 0.5),
    "jsonl": (read_json_lines, lambda: [b'{"file": "a.png", "label": "x"}\n{"file": "b.png", "label": ["y"]}\n'], 0.5),
    "classes": (read_classes, lambda: [b"cat\ndog\n", b"0 sky\n7 road\n255 void\n", b"0 0 0 a\n1 1 1 b\n"], 0.3),
}


# --- changing them ----------------------------------------------------------------------------------------------------

NODES = (None, True, 0, -1, 1 << 31, 1 << 63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../../etc/passwd",
         "/", "\0", "\ud800", "a\nb", "\x1b[2J\x9b31m", "\u202e", "[/b]", "<img src=x onerror=alert(1)>", "=1+1",
         "z" * 100_000, [], {}, [[]], [1], {"a": 1}, "9" * 5000, [0] * 300)  # fmt: skip
NUMBERS = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff" * 8, b"9999999999", b"-1", b"NaN")


def mutate(content: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, left out, doubled, moved or replaced; sometimes the file just ends."""
    data = bytearray(content)
    # What is behind the headers of a large file says little: most changes go to its first and last kilobytes.
    reach = lambda: draw.randrange(min(len(data), 4096) if draw.random() < 0.6 else len(data)) if data else 0  # noqa: E731
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = len(data) - 1 - reach() if data and draw.random() < 0.3 else reach()
        how = draw.randrange(6)
        if how == 0 and data:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[at : at + draw.choice((1, 4, 8))] = draw.choice(NUMBERS)
        elif how == 2:
            del data[at : at + draw.choice((1, 3, 30, 300))]
        elif how == 3:
            data[at:at] = data[at : at + draw.choice((1, 10, 200))]
        elif how == 4:
            data[at:at] = draw.randbytes(draw.choice((1, 5, 20)))
        elif draw.random() < 0.3:
            del data[at:]
    return bytes(data)


def mutate_tree(tree: Any, draw: random.Random) -> Any:
    """The same for what JSON and YAML hold: a node replaced, removed or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 2))):
        places: list[tuple[Any, Any]] = []
        todo = [tree]
        while todo:
            node = todo.pop()
            items = (
                list(node.items())
                if isinstance(node, dict)
                else list(enumerate(node))
                if isinstance(node, list)
                else []
            )
            places += [(node, key) for key, _ in items]
            todo += [value for _, value in items]
        if not places:
            return draw.choice(NODES)
        node, key = draw.choice(places)
        how = draw.randrange(8)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, list):
            node.append(node[key])
        elif how == 2 and isinstance(node, dict):
            node[draw.choice(("x", "model", "format", "counts"))] = draw.choice(NODES)
        else:
            node[key] = copy.deepcopy(draw.choice(NODES))
    return tree


def mutate_value(value: Any, draw: random.Random) -> Any:
    """The same, where the whole may be replaced, too."""
    tree = mutate_tree({"": value}, draw)
    return tree.get("") if isinstance(tree, dict) else tree


def change(name: str, content: bytes, draw: random.Random) -> bytes:
    """One hostile file of a kind."""
    if draw.random() < 0.3:
        return mutate(content, draw)
    if name in ("coco", "manifest", "folder"):
        return json.dumps(mutate_tree(json.loads(content), draw)).encode("utf-8", "surrogatepass")
    if name == "config" or (name == "yolo" and b"names" in content and draw.random() < 0.8):
        return yaml.safe_dump(mutate_tree(yaml.safe_load(content), draw)).encode("utf-8", "surrogatepass")
    if name == "weights":  # 8 bytes with the header's length, and the header
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header = dict(sorted(header.items()))  # safetensors writes them in any order
        stored = header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        key = draw.choice([key for key in stored if key != "format"])
        if draw.random() < 0.7:
            stored[key] = json.dumps(mutate_value(json.loads(stored[key]), draw))
        else:
            header = mutate_tree(header, draw)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]
    if name == "onnx":
        import onnx

        if draw.random() < 0.1:  # names and texts that are no UTF-8, of the same length
            old = draw.choice((b"logits", b"images", b"class_names", b"bicubic", b'"c"', b"classify", b"Identity"))
            return content.replace(old, old[:1] + draw.choice((b"\xff", b"\n", b"\x1b", b"\0", b"<")) + old[2:])
        model = onnx.load_from_string(content)
        stored = draw.choice(model.metadata_props)
        if draw.random() < 0.1:
            stored.key = draw.choice([node for node in NODES if isinstance(node, str) and node != "\ud800"])
        stored.value = json.dumps(mutate_value(json.loads(stored.value), draw))
        return model.SerializeToString()
    if name == "checkpoint":
        import torch

        held = torch.load(io.BytesIO(content), weights_only=True)
        held["transcnn"] = mutate_value(held["transcnn"], draw)
        buffer = io.BytesIO()
        torch.save(held, buffer)
        return buffer.getvalue()
    return mutate(content, draw)


def thousand(name: str, share: float = 1.0) -> None:
    """The same thousand files of a kind at each call (or a share of them), more where ``CASES`` says so.

    Raises AssertionError where one fails.
    """
    draw, seeds = random.Random(name), TARGETS[name][1]()
    for content in seeds:
        problem = attempt(name, content)
        assert not problem, f"a good file isn't read: {problem}"
    count, refusals = round(CASES * share), 0
    # One folder for all, as disks take milliseconds to remove one.
    with little_memory(2000), tempfile.TemporaryDirectory() as folder:
        for case in range(count):
            content = change(name, draw.choice(seeds), draw)
            problem, refused = outcome(name, content, Path(folder))
            assert not problem, f"case {case}, {content[:300]!r}: {problem[-2000:]}"
            refusals += refused
    assert count // 20 < refusals < count - count // 20  # both happen, else nothing is tried


@contextmanager
def little_memory(megabytes: int) -> Iterator[None]:
    """No more than this much of address space can be taken (where Linux can say how much is)."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(name: str, content: bytes) -> str:
    """What is wrong with how a reader took this; "" if nothing."""
    with tempfile.TemporaryDirectory() as folder:
        return outcome(name, content, Path(folder))[0]


def outcome(name: str, content: bytes, folder: Path) -> tuple[str, bool]:
    """What is wrong with how a reader took this ("" if nothing), and whether it was refused; the folder is emptied."""
    began = time.process_time()
    refused = False
    try:
        TARGETS[name][0](content, folder)
    except (UserError, BrokenImage) as error:
        refused = True
        if "\n" in str(error).strip():
            return f"an error of several lines: {error!r}", True
        if len(str(error)) > 3000:
            return f"an error of {len(str(error))} characters", True
    except BaseException:
        return traceback.format_exc(), False
    finally:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    seconds = time.process_time() - began
    return f"it took {seconds:.1f} s" if seconds > SLOW else "", refused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=2, help="gigabytes that may be taken; more is a failure")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    names = options.only.split(",") if options.only else list(TARGETS)
    shares = sum(TARGETS[name][2] for name in names)
    failed = 0
    seeds = {name: TARGETS[name][1]() for name in names}
    for name in names:
        for content in seeds[name]:
            assert not (problem := attempt(name, content)), f"{name}: a good file is not read: {problem}"
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(options.memory * 1e9), resource.RLIM_INFINITY))
    for name in names:
        draw, tries, seen = random.Random(f"{options.seed} {name}"), 0, set()
        end = time.monotonic() + 60 * options.minutes * TARGETS[name][2] / shares
        while time.monotonic() < end:
            content = change(name, draw.choice(seeds[name]), draw)
            tries += 1
            (Path(tempfile.gettempdir()) / f"transcnn-fuzz-last-{name}").write_bytes(content)  # should it crash hard
            problem = attempt(name, content)
            if problem:
                where = [row.strip() for row in problem.splitlines() if row.strip().startswith("File")][-1:]
                if str(where) in seen:
                    continue
                seen.add(str(where))
                failed += 1
                (CORPUS / name).mkdir(parents=True, exist_ok=True)
                path = CORPUS / name / hashlib.sha256(content).hexdigest()[:12]
                path.write_bytes(content)
                print(f"--- {name} {path.name}\n{problem[-1500:]}", flush=True)
        print(f"{name}: {tries} files, {len(seen)} kinds of failure", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
