"""Images as vectors: ``embed`` of networks and files, neighbours, near-duplicates, search."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fuzz
import transcnn
from transcnn.checkpoints.loading import data_config_of
from transcnn.commands.embed import embed
from transcnn.dense.build import build_network
from transcnn.errors import UserError
from transcnn.onnx.features import pooled
from transcnn.predictor.network import NetworkPredictor
from transcnn.tasks.features import map_of
from transcnn.tasks.inference import get_inference
from transcnn.vectors.file import Vectors, read_vectors, write_vectors
from transcnn.vectors.items import find_items
from transcnn.vectors.neighbours import duplicates, knn_accuracy, nearest
from transcnn.weights import PACKAGED

QUIET: dict[str, Any] = dict(accelerator="cpu", quiet=True)


@pytest.fixture(scope="module")
def classifier() -> Any:
    return transcnn.load(PACKAGED)


def test_the_vector_is_what_the_head_is_given(classifier, class_image):
    image = class_image(1, 1)
    found = classifier.embed(image)
    assert isinstance(found, transcnn.Embedding)
    assert found.vector.shape == (classifier.model.num_features,)
    logits = classifier.model.get_classifier()(torch.from_numpy(found.vector)).softmax(0)
    assert classifier.predict(image).score == pytest.approx(logits.max().item(), abs=1e-5)
    unit = classifier.embed([image, b"none"], normalize=True)
    np.testing.assert_allclose(unit[0].vector, found.vector / np.linalg.norm(found.vector), rtol=1e-5)
    assert isinstance(unit[1], transcnn.Failure)
    stage = classifier.embed(image, layer="stages.1").vector
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(classifier.preprocessing[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        maps = classifier.model.forward_intermediates((x - mean) / std, intermediates_only=True)
    np.testing.assert_allclose(stage, maps[1][0].mean((1, 2)).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"no layer 'stages\.9'; near: stages"):
        classifier.embed(image, layer="stages.9")
    assert not any(module._forward_hooks for module in classifier.model.modules())


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_dense_networks_give_their_backbones_last_map(class_image, task):
    args: dict[str, Any] = {"decoder": "fpn", "decoder_channels": 64, "resize": None, "label_ids": [0, 1]}
    if task == "detect":
        args = {"detector": "retinanet", "fpn_channels": 16, "short_side": 64, "long_side": 96, "anchor_size": 16}
        args |= {"min_score": 0.05, "max_found": 5, "side_range": [1.0, 1.0]}
    network = build_network(task, "transcnn_test", args, num_classes=2, in_chans=3).eval()
    predictor = NetworkPredictor(network, task, ["a", "b"], data_config_of(network, 3, 64), "", {"task_args": args})
    found = predictor.embed([class_image(0, 0), class_image(1, 1, (50, 40))])
    assert [one.vector.shape for one in found] == [(32,), (32,)]


def test_maps_with_channels_last_are_averaged_over_their_places(class_image):
    """Swin's layers give (B, H, W, C); windows in a row are no features of images."""
    small: dict[str, Any] = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), img_size=56, num_classes=2)
    network = timm.create_model("swin_tiny_patch4_window7_224", **small).eval()
    predictor = NetworkPredictor(network, "classify", ["a", "b"], data_config_of(network, 3, 56), "", {})
    images = [class_image(i, i) for i in range(2)]
    transform = get_inference("classify").image_transform(predictor.preprocessing)
    with torch.inference_mode():
        pixels = torch.stack([transform(image, 0) for image in images])
        maps = network.layers(network.patch_embed(pixels))  # pyright: ignore
    assert maps.shape == (2, 7, 7, 32)
    found = predictor.embed(images, layer="layers.1")
    np.testing.assert_allclose([one.vector for one in found], maps.mean((1, 2)).numpy(), rtol=1e-4, atol=1e-6)
    assert predictor.embed(images[0], layer="patch_embed.proj").vector.shape == (16,)
    with pytest.raises(UserError, match=r"qkv gives \(8, 49, 48\), not features of 2 images"):
        predictor.embed(images, layer="layers.0.blocks.0.attn.qkv")


@pytest.mark.parametrize(
    ("shape", "images", "places"),
    [
        ((2, 5, 7, 7), (2, 3, 56, 56), (2, 3)),
        ((2, 7, 7, 5), (2, 3, 56, 56), (1, 2)),
        ((2, 7, 7, 5), (2, 3, 56, 40), (2, 3)),  # 7 channels, for all that is known
        ((2, 7, 7, 7), (2, 3, 56, 56), (2, 3)),
        ((2, 9, 5), (2, 3, 56, 56), (1,)),
    ],
)
def test_which_axes_of_a_graphs_tensor_are_places(shape, images, places):
    values = np.random.default_rng(0).random(shape, np.float32)
    np.testing.assert_allclose(pooled(values, images, "x"), values.mean(places), rtol=1e-6)


def test_an_exported_file_gives_the_same(tmp_path, class_image):
    """Of a file with a head: features before it are a tensor of the graph."""
    onnx = pytest.importorskip("onnx")
    weights = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    make = onnx.helper.make_node
    nodes = [
        make("GlobalAveragePool", ["images"], ["pooled"]),
        make("Flatten", ["pooled"], ["flat"]),
        make("Gemm", ["flat", "w"], ["product"]),
        make("Identity", ["product"], ["logits"]),
    ]
    images = onnx.helper.make_tensor_value_info("images", 1, ["n", 3, "h", "w"])
    logits = onnx.helper.make_tensor_value_info("logits", 1, ["n", 2])
    graph = onnx.helper.make_graph(nodes, "g", [images], [logits], [onnx.numpy_helper.from_array(weights, "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    info = {"class_names": ["a", "b"], "data_config": fuzz.CONFIG, "task": "classify"}
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in info.items()})
    onnx.save(model, tmp_path / "model.onnx")
    predictor = transcnn.load(tmp_path / "model.onnx")
    image = class_image(2, 2)
    found, wide = predictor.embed([image, image]), predictor.embed(image, layer="pooled")
    assert found[0].vector.shape == (3,)
    np.testing.assert_allclose(found[0].vector, wide.vector, rtol=1e-5)
    scores = np.exp(found[0].vector @ weights)
    assert predictor.predict(image).score == pytest.approx((scores / scores.sum()).max(), abs=1e-5)
    with pytest.raises(UserError, match="has no tensor 'none'"):
        predictor.embed(image, layer="none")


def test_labels_splits_and_names_are_kept(split_folder, tmp_path):
    (split_folder / "train" / "class_0" / "bad.png").write_bytes(b"no image")
    found = embed(PACKAGED, split_folder, out=tmp_path / "v.parquet", knn=3, **QUIET)
    assert found["images"] == 48
    assert [Path(name).name for name in found["errors"]] == ["bad.png"]
    vectors = read_vectors(tmp_path / "v.parquet")
    assert vectors.values.shape == (48, found["size"])
    assert vectors.files[0] == str(split_folder / "train" / "class_0" / "000.png")
    assert (vectors.labels[0], vectors.splits[0], vectors.splits[-1]) == ("class_0", "train", "val")
    assert vectors.about == {"network": PACKAGED, "layer": None, "normalized": False, "img_size": None}
    assert found["knn"]["split"] == "val"
    assert found["knn"]["images"] == 24
    again = embed(tmp_path / "v.parquet", knn=3, **QUIET)
    assert again["knn"] == found["knn"]
    (tmp_path / "v.csv").write_text("of something else")
    with pytest.raises(UserError, match=r"v\.csv, which is there already"):
        embed(PACKAGED, split_folder / "val", out=tmp_path / "v.npy", **QUIET)
    assert (tmp_path / "v.csv").read_text() == "of something else"
    (tmp_path / "v.csv").unlink()
    embed(PACKAGED, split_folder / "val", out=tmp_path / "v.npy", **QUIET)
    npy = read_vectors(tmp_path / "v.npy")
    np.testing.assert_allclose(npy.values, vectors.values[24:], atol=1e-5)
    assert npy.labels == vectors.labels[24:]


def test_all_images_of_a_folder_are_taken_where_no_labels_are_needed(class_folder):
    shutil.copy(class_folder / "class_0" / "000.png", class_folder / "beside.png")
    for labelled, first in ((True, "000.png"), (False, "beside.png")):
        found = find_items([str(class_folder)], labelled, {})
        assert Path(found[0].name).name == first
        assert {item.label == "" for item in found} == {not labelled}
    rows = "file_name,label\nbeside.png,x\nclass_0/000.png,y\nclass_0/001.png,\n"
    (class_folder / "metadata.csv").write_text(rows)
    errors: dict[str, str] = {}
    assert [item.label for item in find_items([str(class_folder)], False, errors)] == ["x", "y"]
    assert errors == {"class_0/001.png": "row 4 has no label"}


def test_duplicates_between_splits_come_first(split_folder, tmp_path, capsys):
    photo = split_folder / "train" / "class_1" / "001.png"
    shutil.copy(photo, split_folder / "val" / "class_2" / "leak.png")
    Image.open(photo).save(split_folder / "train" / "class_1" / "again.jpg", quality=95)
    found = embed(PACKAGED, split_folder, duplicates=0.97, csv=tmp_path / "pairs.csv", accelerator="cpu")
    pairs = {tuple(sorted(Path(name).name for name in row["files"])): row for row in found["duplicates"]}
    assert pairs["001.png", "leak.png"]["similarity"] == 1
    assert ("001.png", "again.jpg") in pairs, sorted(pairs)
    assert found["duplicates"][0]["splits"] == ["train", "val"]
    assert "of them between splits" in capsys.readouterr().out
    with (tmp_path / "pairs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found["duplicates"])


def test_search_finds_the_image_itself_first(class_folder, tmp_path):
    embed(PACKAGED, class_folder, out=tmp_path / "v.parquet", **QUIET)
    photo = class_folder / "class_1" / "003.png"
    for call in ((tmp_path / "v.parquet",), (PACKAGED, tmp_path / "v.parquet")):
        found = embed(*call, search=photo, top=3, **QUIET)["search"]
        assert found[0]["file"] == str(photo)
        assert found[0]["similarity"] == pytest.approx(1, abs=1e-4)
        assert len(found) == 3
    with pytest.raises(UserError, match=r"can't read .*none\.png"):
        embed(tmp_path / "v.parquet", search="none.png", **QUIET)


def test_a_search_looks_at_its_image_as_the_vectors_were_made(class_folder, tmp_path, capsys):
    """At their size and layer, also where the network is named; another network is told."""
    stored, photo = tmp_path / "v.parquet", class_folder / "class_1" / "003.png"
    embed(PACKAGED, class_folder, out=stored, img_size=48, layer="stages.1", **QUIET)
    found = embed(PACKAGED, stored, search=photo, accelerator="cpu")["search"][0]
    assert (found["file"], found["similarity"]) == (str(photo), pytest.approx(1, abs=1e-4))
    assert not capsys.readouterr().err
    for setting, message in (
        ({"img_size": 32}, "img_size 48, got img_size 32"),
        ({"layer": "stem"}, r"layer stages\.1"),
    ):
        with pytest.raises(UserError, match=message):
            embed(PACKAGED, stored, search=photo, **setting, **QUIET)
    vectors = read_vectors(stored)
    write_vectors(stored, replace(vectors, about={**vectors.about, "network": "runs/other"}))
    embed(PACKAGED, stored, search=photo, accelerator="cpu")
    assert "v.parquet says that its vectors are of runs/other" in capsys.readouterr().err


def test_stored_vectors_become_of_length_1(tmp_path):
    values = np.array([[3, 4], [0, 0], [0, 2]], np.float32)
    write_vectors(tmp_path / "v.parquet", Vectors(values, ["a", "b", "c"], [""] * 3, [""] * 3, {"normalized": False}))
    embed(tmp_path / "v.parquet", out=tmp_path / "n.parquet", normalize=True, **QUIET)
    found = read_vectors(tmp_path / "n.parquet")
    np.testing.assert_allclose(found.values, [[0.6, 0.8], [0, 0], [0, 1]], rtol=1e-6)
    assert found.about == {"normalized": True}


def test_no_list_is_written_over_another(tmp_path):
    """One CSV file holds one list, and isn't that of the names beside a .npy file."""
    write_vectors(tmp_path / "v.parquet", Vectors(np.eye(2, dtype=np.float32), ["a", "b"], [""] * 2, [""] * 2))
    for settings, message in (
        ({"duplicates": 0.5, "search": "a"}, "csv is for one list"),
        ({"knn": 1}, "csv is for one list"),
        ({"duplicates": 0.5, "out": tmp_path / "x.npy"}, "csv would be written over what out writes"),
    ):
        with pytest.raises(UserError, match=message):
            embed(tmp_path / "v.parquet", csv=tmp_path / "x.csv", **settings, **QUIET)
    with pytest.raises(UserError, match="csv would be written over what out writes"):
        embed(tmp_path / "v.parquet", duplicates=0.5, csv=tmp_path / "x.npy", out=tmp_path / "x.npy", **QUIET)
    assert not (tmp_path / "x.csv").exists()


def test_names_come_back_from_a_csv_file_as_they_were(tmp_path):
    names = ["=a.png", "-1", "-b.png", "@c.png", "'d.png", "e,f.png"]
    write_vectors(tmp_path / "v.npy", Vectors(np.eye(6, dtype=np.float32), names, names, [""] * 6))
    assert (tmp_path / "v.csv").read_text().splitlines()[1] == "'=a.png,'=a.png,"  # no formula of a spreadsheet
    found = read_vectors(tmp_path / "v.npy")
    assert found.files == found.labels == names


def test_a_table_without_labels_names_files(class_folder, tmp_path):
    table = class_folder / "files.csv"
    table.write_text("file,depth\nclass_0/000.png,1\nclass_1/000.png,2\n")
    items = find_items([str(table)], False, {})
    assert [item.name for item in items] == [str(class_folder / f"class_{i}" / "000.png") for i in range(2)]
    with pytest.raises(UserError, match="label"):
        find_items([str(table)], True, {})


def test_a_table_in_parquet_is_no_file_of_vectors(class_folder):
    files = [f"class_{i % 2}/00{i}.png" for i in range(6)]
    pq.write_table(pa.table({"file": files, "label": [i % 2 for i in range(6)]}), class_folder / "t.parquet")
    found = embed(PACKAGED, class_folder / "t.parquet", knn=1, **QUIET)
    assert (found["images"], found["knn"]["images"]) == (6, 6)


def test_what_was_not_meant_is_said_in_one_line(class_folder, monkeypatch):
    for settings, message in (
        ({}, "say what for"),
        ({"out": "v.txt"}, r"out must end in \.parquet or \.npy"),
        ({"knn": 0}, "knn must be 1 or more"),
        ({"knn": 24}, "knn must be below the number of labelled images, 24"),
        ({"duplicates": 1.5}, "duplicates must be from -1 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            embed(PACKAGED, class_folder, **settings, **QUIET)
    with pytest.raises(UserError, match="IMAGES is missing"):
        embed(PACKAGED, knn=3, **QUIET)
    with pytest.raises(UserError, match="labels come with one data set"):
        embed(PACKAGED, [class_folder, class_folder], knn=3, **QUIET)
    monkeypatch.setattr("transcnn.vectors.neighbours.MOST_PAIRS", 10)
    with pytest.raises(UserError, match=r"more than 10 pairs"):
        embed(PACKAGED, class_folder, duplicates=-1, **QUIET)


@given(st.integers(0, 1000), st.floats(-1, 1), st.integers(2, 40))
def test_pairs_are_those_of_a_loop(seed, threshold, count):
    vectors = np.random.default_rng(seed).normal(size=(count, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    wanted = {
        (i, j): float(unit[i] @ unit[j])
        for i in range(count)
        for j in range(i + 1, count)
        if abs(unit[i] @ unit[j] - threshold) > 1e-5
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transcnn.vectors.neighbours.BLOCK", 7)
        found = {(pair.first, pair.second): pair.similarity for pair in duplicates(vectors, threshold)}
    for pair, similarity in wanted.items():
        assert (pair in found) == (similarity > threshold)
        assert similarity < threshold or found[pair] == pytest.approx(similarity, abs=1e-5)
    best = nearest(vectors, vectors[0], 1)[0]
    assert best == (0, pytest.approx(1, abs=1e-5))


def test_neighbours_leave_themselves_out():
    """Two clusters; the odd one of each other's label is wrong only because its own label doesn't count."""
    vectors = np.array([[1, 0], [1, 0.1], [1, -0.1], [0, 1], [0.1, 1], [-0.1, 1.0]])
    labels = ["a", "a", "b", "b", "b", "a"]
    assert knn_accuracy(vectors, labels, [""] * 6, 1)["top1"] == pytest.approx(100 * 2 / 6, abs=40)
    assert knn_accuracy(vectors, ["a"] * 3 + ["b"] * 3, [""] * 6, 2)["top1"] == 100
    splits = ["train", "train", "test", "train", "train", "test"]
    found = knn_accuracy(vectors, labels, splits, 2)
    assert (found["split"], found["images"], found["top1"]) == ("test", 2, 0.0)
    with pytest.raises(UserError, match="two or more"):
        knn_accuracy(vectors, ["a"] * 6, [""] * 6, 1)


def test_strangers_files_of_vectors(tmp_path):
    """What they say is looked up on this machine alone; anything else is one line."""
    names = (["x.png"], [""], [""])
    for network in ("hf-hub:somebody/network", "/no/such/run", 7, {"a": 1}):
        write_vectors(tmp_path / "v.parquet", Vectors(np.ones((1, 4), np.float32), *names, {"network": network}))
        with pytest.raises(UserError, match="doesn't say which network on this machine made it"):
            embed(tmp_path / "v.parquet", search="x.png", **QUIET)
    tables = [
        pa.table({"file": ["a"], "label": [""], "split": [""], "vector": pa.array([[1.0]])}),
        pa.table({"file": ["a"], "label": [""], "split": [""], "vector": ["text"]}),
        pa.table({"file": ["a"]}),
    ]
    for table in tables:
        pq.write_table(table, tmp_path / "v.parquet")
        with pytest.raises(UserError, match="vector"):
            embed(tmp_path / "v.parquet", duplicates=0.9, **QUIET)
    write_vectors(tmp_path / "nan.parquet", Vectors(np.full((1, 4), np.nan, np.float32), *names))
    (tmp_path / "v.npy").write_bytes(np.lib.format.magic(1, 0) + b"\x10\x00{'descr': '<f4'")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "objects.csv").write_text("file\na\n")
    for name in ("nan.parquet", "v.npy", "objects.npy", "none.parquet"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            embed(tmp_path / name, duplicates=0.9, **QUIET)


def test_a_map_spreads_what_the_head_is_given(classifier, class_image):
    """By the principal components of NumPy's own decomposition, up to their signs."""
    transform = get_inference("classify").image_transform(classifier.preprocessing)
    images = [(transform(class_image(i % 3, i), 0), i % 3 if i != 4 else -1) for i in range(12)]
    points, labels = map_of(classifier.model, images, 1000.0) or pytest.fail("there is no map")
    assert labels == [i % 3 for i in range(12) if i != 4]
    vectors = np.stack([classifier.embed(class_image(i % 3, i)).vector for i in range(12) if i != 4])
    _, sizes, directions = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    wanted = (vectors - vectors.mean(0)) @ directions[:2].T
    np.testing.assert_allclose(abs(points), abs(wanted), atol=1e-3 * sizes[0])
    neighbours, same = map_of(classifier.model, images, 1000.0, "tsne") or pytest.fail("there is no map")
    assert same == labels
    assert (neighbours.shape, np.isfinite(neighbours).all()) == (points.shape, True)
    np.testing.assert_array_equal(neighbours, map_of(classifier.model, images, 1000.0, "tsne")[0])  # pyright: ignore
    assert map_of(classifier.model, images[:3], 1000.0) is None
    assert map_of(classifier.model, images, 0.5) is None  # of a network that takes seconds for an image
    assert map_of(torch.nn.Linear(1, 1), images, 1000.0) is None
