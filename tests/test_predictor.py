"""``transcnn.load(...).predict(...)``: any image in, typed predictions out, the same as the command's."""

from __future__ import annotations

import copy
import http.server
import io
import json
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fuzz
import transcnn
from transcnn.arguments import Command
from transcnn.checkpoints.loading import data_config_of
from transcnn.cli import COMMANDS, load_command
from transcnn.commands.evaluate import evaluate
from transcnn.commands.predict import predict
from transcnn.commands.train import train
from transcnn.data import inputs
from transcnn.data.images import BrokenImage
from transcnn.data.inputs import read_input
from transcnn.dense.build import build_network
from transcnn.errors import UserError
from transcnn.plugging.build import build_model
from transcnn.predictor.network import NetworkPredictor
from transcnn.report.answers import NOT_A_NUMBER, prediction_of
from transcnn.report.overlay import run_lengths
from transcnn.weights import PACKAGED


@pytest.fixture(scope="module")
def classifier() -> Any:
    return transcnn.load(PACKAGED)


@pytest.fixture(scope="module")
def small() -> NetworkPredictor:
    """A small network with random weights, which is soon exported."""
    torch.manual_seed(3)
    network = build_model("transcnn_test", num_classes=3).eval()
    for parameter in network.parameters():  # answers that differ from image to image
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    config = data_config_of(network, 3, 32)
    return NetworkPredictor(network, "classify", ["a", "b", "c"], config, "", {"model": "transcnn_test"})


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory) -> list[Path]:
    """Small exported files: a classifier, a segmenter, a detector."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    for i, content in enumerate(fuzz.onnx_seeds()):
        (folder / f"{i}.onnx").write_bytes(content)
    return sorted(folder.iterdir())


@pytest.fixture
def photo(tmp_path, class_image) -> Path:
    path = tmp_path / "photo.png"
    class_image(1, 1, (40, 32)).save(path)
    return path


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    """Files to close in the end."""
    files: list[Any] = []
    yield files
    for file in files:
        file.close()


def spellings(photo: Path, opened: list[Any]) -> list[Any]:
    """One image in every form that is taken."""
    image = Image.open(photo)
    image.load()
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    content = photo.read_bytes()
    forms = [str(photo), photo, content, bytearray(content), io.BytesIO(content), photo.open("rb"), image]
    forms += [array, array / 255, (array / 255).astype(np.float32), array[:, ::-1][:, ::-1]]
    opened.append(forms[5])
    return [*forms, (array.astype(np.uint16) * 257), tensor, tensor / 255, (tensor / 255).double()]


def test_an_image_may_come_in_any_form(classifier, photo, opened):
    forms = spellings(photo, opened)
    found = classifier.predict(forms)
    wanted = np.asarray(Image.open(photo))
    for form, prediction in zip(forms, found, strict=True):
        assert isinstance(prediction, transcnn.Classification)
        np.testing.assert_array_equal(np.asarray(read_input(form)), wanted)
        assert prediction.label == found[0].label
        assert prediction.score == pytest.approx(found[0].score, abs=1e-6)
    assert [prediction.file for prediction in found[:3]] == [str(photo), str(photo), "image 3"]
    assert found[5].file == str(photo)  # an open file's name
    assert [entry["label"] for entry in found[0].to_dict()["top"]] == [entry.label for entry in found[0].top]
    grey, alpha = np.asarray(Image.open(photo).convert("L")), np.asarray(Image.open(photo).convert("RGBA"))
    for one in (grey, grey[..., None], torch.from_numpy(grey.copy()), alpha, alpha[..., :2]):
        assert classifier.predict(one).error is None


def test_an_image_that_is_nearly_black_for_its_range_is_told_once(small, monkeypatch, caplog):
    monkeypatch.setattr(small, "_told_of_dark", False)
    small.predict([np.full((9, 9), value, np.uint16) for value in (200, 60_000)])
    assert not caplog.text
    small.predict([np.full((9, 9), 4000, np.uint16)] * 3)
    assert caplog.text.count("far below the 65535 of 16 bits, which this network sees as nearly black") == 1
    caplog.clear()
    monkeypatch.setitem(small.preprocessing, "pixel_range", (0, 4095))
    monkeypatch.setattr(small, "_told_of_dark", False)
    small.predict(np.full((9, 9), 4000, np.uint16))
    assert not caplog.text


def test_one_gives_one_and_several_give_a_list(classifier, photo):
    array = np.asarray(Image.open(photo))
    for one in (photo, array, torch.zeros(3, 8, 8)):
        assert isinstance(classifier.predict(one), transcnn.Classification)
    several = (np.stack([array] * 3), [array] * 3, (array for _ in range(3)), torch.zeros(3, 3, 8, 8))
    for many in several:
        assert len(classifier.predict(many, batch_size=2)) == 3
    assert classifier.predict([]) == []
    for wrong in (3, {"a": 1}, None):
        with pytest.raises(UserError, match="expected an image or several, got"):
            classifier.predict(wrong)
    for settings in ({"batch_size": 0}, {"top_k": 0}, {"min_score": 0.5}):
        with pytest.raises(UserError, match=next(iter(settings))):
            classifier.predict(photo, **settings)


def test_a_bad_image_is_an_error_in_its_place(classifier, photo, tmp_path):
    closed = photo.open("rb")
    closed.close()
    bad = {
        "no such file": tmp_path / "none.png",
        "is a folder": tmp_path,
        "empty file": b"",
        "not an image, or of a format": b"text",
        "not an image: int": 3,
        "mode 'rb'": io.StringIO("text"),
        "closed file": closed,
        "got int64": np.zeros((8, 8, 3), np.int64),
        "floats must lie from 0 to 1 and not be normalised, got from 0 to 255": np.full((8, 8), 255.0) * np.eye(8),
        "not a number": np.full((8, 8), np.nan),
        "(H, W, C) with 1 to 4 channels is one, got (8, 8, 7)": np.zeros((8, 8, 7), np.uint8),
        "got (0, 8, 3)": np.zeros((0, 8, 3), np.uint8),
        "a tensor is (C, H, W), got (8, 8, 3)": torch.zeros(8, 8, 3),
    }
    good = np.asarray(Image.open(photo))
    found = classifier.predict([thing for one in bad.values() for thing in (one, good)], batch_size=5)
    for reason, failure, between in zip(bad, found[::2], found[1::2], strict=True):
        assert isinstance(failure, transcnn.Failure)
        assert reason in failure.error
        assert failure.to_dict() == {"file": failure.file, "error": failure.error}
        assert between.label == found[1].label
        with pytest.raises(UserError):
            failure.plot()


def test_the_command_says_the_same(classifier, photo, class_folder):
    files = [str(photo), *map(str, sorted(class_folder.glob("*/*.png"))), "none.png"]
    rows = predict(PACKAGED, files, accelerator="cpu", quiet=True, top_k=3, optimize=False)
    assert rows == [found.to_dict() for found in classifier.predict(files, top_k=3)]
    again = predict(Path(PACKAGED), [Path(file) for file in files], accelerator="cpu", quiet=True, optimize=False)
    assert again[0]["file"] == str(photo)


@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
def test_exported_files_predict(onnx_files, class_folder, tmp_path, task):
    """That they say what their network says is tested where they are written."""
    file = onnx_files[["classify", "segment", "detect"].index(task)]
    exported = transcnn.load(file)
    assert isinstance(exported, transcnn.Predictor)
    assert (exported.task, exported.model) == (task, None)
    files = [*map(str, sorted(class_folder.glob("*/*.png"))[:3]), "none.png"]
    rows = predict(file, files, accelerator="cpu", quiet=True, out=None if task == "classify" else tmp_path)
    rows = [{key: value for key, value in row.items() if key not in ("mask", "overlay")} for row in rows]
    assert rows == [found.to_dict() for found in exported.predict(files)]
    with pytest.raises(UserError, match="model is for a file of weights"):
        transcnn.load(file, "transcnn_tiny")


def test_pixels_that_are_not_numbers_are_no_prediction(photo):
    """Of logits that overflow the largest is the first class."""
    args: dict[str, Any] = {"decoder": "fpn", "decoder_channels": 64, "resize": None, "label_ids": [0, 1]}
    network = build_network("segment", "transcnn_test", args, num_classes=2, in_chans=3).eval()
    config = data_config_of(network, 3, 64)
    predictor = NetworkPredictor(network, "segment", ["a", "b"], config, "", {"task_args": args})
    assert predictor.predict(photo).error is None
    torch.nn.init.constant_(next(p for p in network.parameters() if p.ndim == 4), 3e38)  # its sums are infinite
    for window in (None, 32):
        args["window"] = window
        found = predictor.predict([photo, photo])
        assert [one.error for one in found] == [NOT_A_NUMBER] * 2
        assert found[0].file == str(photo)


def test_classes_of_one_name_stay_apart_in_a_file(onnx_files, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_files[2])
    onnx.helper.set_model_props(
        model,
        {prop.key: prop.value for prop in model.metadata_props} | {"class_names": json.dumps(["c", "c", "d"])},
    )
    onnx.save(model, tmp_path / "same.onnx")
    assert transcnn.load(tmp_path / "same.onnx").class_names == ["c (0)", "c (1)", "d"]


def test_a_damaged_file_that_segments_is_no_prediction(onnx_files, photo, monkeypatch):
    predictor = next(p for p in map(transcnn.load, onnx_files) if p.task == "segment")
    outputs = predictor.network.outputs  # pyright: ignore
    damaged = lambda images: {name: value * np.float32("nan") for name, value in outputs(images).items()}  # noqa: E731
    monkeypatch.setattr(predictor.network, "outputs", damaged)  # pyright: ignore
    assert predictor.predict(photo).error == NOT_A_NUMBER


def test_a_file_computes_as_it_was_exported():
    with pytest.raises(UserError, match="precision is for networks of PyTorch; model"):
        transcnn.load("model.onnx", precision="bf16")


@pytest.mark.parametrize("kind", ["network", "optimized", "onnx"])
def test_threads_may_share_it(small, onnx_files, class_image, kind):
    shared = transcnn.load(onnx_files[0]) if kind == "onnx" else small
    if kind == "optimized":
        shared = NetworkPredictor.of(copy.deepcopy(small), "cpu", "32", optimize=True)
        assert type(shared.model.stem).__name__ == "FastStem"
    images = [class_image(i % 5, i, 32 + i) for i in range(8)]
    alone = [shared.predict(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(shared.predict, images * 2))
    for one, other in zip(alone * 2, together, strict=True):
        assert [entry.label for entry in one.top] == [entry.label for entry in other.top]
        assert [entry.score for entry in one.top] == pytest.approx([entry.score for entry in other.top], abs=1e-6)


def test_what_load_gives_is_still_the_network(classifier, photo):
    assert isinstance(classifier, transcnn.Loaded)
    assert isinstance(classifier.model, torch.nn.Module)
    assert transcnn.attention_maps(classifier, photo, (5, 5))
    copied = pickle.loads(pickle.dumps(classifier))
    assert copied.predict(photo) == classifier.predict(photo)
    half = transcnn.load(PACKAGED, precision="bf16").predict(photo)
    assert half.score == pytest.approx(classifier.predict(photo).score, abs=0.1)
    with pytest.raises(UserError, match="accelerator must be one of"):
        transcnn.load(PACKAGED, accelerator="toaster")


def test_plot_draws_the_prediction(classifier, photo):
    prediction = classifier.predict(photo)
    assert prediction.image is None
    drawn = prediction.plot()
    assert drawn.width >= 240
    assert drawn.height > drawn.width * 32 // 40  # the classes are written below
    assert drawn.tobytes() == prediction.plot(Image.open(photo)).tobytes()
    photo.unlink()
    with pytest.raises(UserError, match=r"photo\.png can't be read again: no such file"):
        prediction.plot()


def dense(task: str, args: dict[str, Any]) -> NetworkPredictor:
    """A network with random weights."""
    network = build_network(task, "transcnn_test", args, num_classes=2, in_chans=3).eval()
    config = data_config_of(network, 3, 64)
    return NetworkPredictor(network, task, ["road", "sky"], config, "made here", {"task_args": args})


def test_segmentation_and_its_mask(photo):
    args = {"decoder": "fpn", "decoder_channels": 64, "resize": None, "label_ids": [3, 7], "colours": None}
    prediction = dense("segment", args).predict(photo)
    assert isinstance(prediction, transcnn.Segmentation)
    assert prediction.mask.shape == (32, 40)
    assert prediction.mask.dtype == np.uint8
    for entry in prediction.classes:
        share = (prediction.mask == prediction.class_names.index(entry.label)).mean()
        assert entry.share == pytest.approx(share, abs=1e-6)
    assert sum(entry["share"] for entry in prediction.to_dict()["classes"]) == pytest.approx(1, abs=1e-5)
    assert prediction.plot().width == 40


def test_detections_with_masks(photo):
    args = {"detector": "maskrcnn", "fpn_channels": 16, "short_side": 64, "long_side": 96, "anchor_size": 16}
    args |= {"min_score": 0.05, "max_found": 5, "side_range": [1.0, 1.0], "label_ids": [1, 2]}
    predictor = dense("detect", args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor.model, "forward", lambda images: [found(images[0].shape[1:])])
        first, second = predictor.predict([photo, photo], min_score=0.5), predictor.predict(photo)
    assert [len(prediction.boxes) for prediction in first] == [1, 1]
    assert [box.label for box in second.boxes] == ["sky", "road"]  # most confident first
    assert second.boxes[0].box == (1.0, 2.0, 20.5, 30.0)
    mask = second.boxes[0].mask
    assert mask.shape == (32, 40)
    assert mask.sum() == 28 * 19
    assert not mask[:2].any()
    assert second.to_dict()["boxes"][1] == {"label": "road", "score": 0.25, "box": [0.0, 0.0, 10.0, 10.0]}
    assert second.plot().size == (40, 32)


def found(size: Any) -> dict[str, torch.Tensor]:
    masks = torch.zeros(2, 1, *size)
    masks[1, :, 2:30, 1:20] = 1
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 2, 20.5, 30]])
    return {"boxes": boxes, "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.25, 0.9]), "masks": masks}


def test_a_box_gives_its_mask_back():
    rng = np.random.default_rng(0)
    for mask in (*(rng.random((7, 5)) < share for share in (0, 0.3, 0.7, 1)), np.eye(4, dtype=bool)):
        box = transcnn.Box("a", 1.0, (0, 0, 1, 1), run_lengths(mask))
        np.testing.assert_array_equal(box.mask, mask)


@pytest.fixture
def server(photo) -> Iterator[str]:
    """A server with a picture, one that points to a file of this machine, and one that never ends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", f"file://{photo}")
                self.end_headers()
                return
            self.send_response(200 if self.path in ("/photo.png", "/long") else 404)
            self.end_headers()
            self.wfile.write(b"x" * 100_000 if self.path == "/long" else photo.read_bytes())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_urls_are_fetched_within_bounds(classifier, photo, server, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_BYTES", 50_000)
    good, *bad = classifier.predict([f"{server}/photo.png", f"{server}/none", f"{server}/away", f"{server}/long"])
    assert good.label == classifier.predict(photo).label
    assert good.file == f"{server}/photo.png"
    assert "404" in bad[0].error
    assert "302" in bad[1].error
    assert "more than" in bad[2].error
    monkeypatch.setattr(inputs, "FETCH_SECONDS", -1.0)
    assert "seconds" in classifier.predict(f"{server}/photo.png").error


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"])
def test_a_server_that_sends_a_byte_now_and_then(monkeypatch, begin):
    """Each byte in time, and neither the head nor the body ever whole."""
    monkeypatch.setattr(inputs, "FETCH_SECONDS", 0.3)
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(begin)
                while not stop.wait(0.05):
                    connection.sendall(b"a")

        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        try:
            with pytest.raises(BrokenImage, match=r"it takes more than 0\.3 seconds"):
                inputs.read_input(f"http://127.0.0.1:{listening.getsockname()[1]}/x.png")
            assert time.monotonic() - began < 5
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_paths_wherever_they_take_names_of_files(command):
    """train's are turned to text by its settings."""
    function = load_command(command)
    places = {"checkpoint", "image", "images", "data", "out", "csv", "examples", "calibrate", "vectors"}
    kinds = {name: str(kind) for name, kind in function.__annotations__.items() if name in places}
    assert all("StrPath" in kind for kind in kinds.values()) or command == "train"
    arguments = Command(command, function).arguments.values()
    assert not [argument.name for argument in arguments if "Path" in str(argument.type)]


def test_train_and_eval_take_paths(split_folder, tmp_path, no_report):
    settings: dict[str, Any] = dict(model="transcnn_test", img_size=32, epochs=1, accelerator="cpu", quiet=True)
    result = train(data=split_folder, out=tmp_path / "run", **settings, num_workers=0)
    metrics = evaluate(result.run_dir, data=split_folder, accelerator="cpu", quiet=True)
    assert metrics["data"] == str(split_folder)
    assert predict(result.run_dir, split_folder / "val", csv=tmp_path / "out.csv", accelerator="cpu", quiet=True)
    assert (tmp_path / "out.csv").is_file()


def test_predictions_of_tasks_about_the_whole_image():
    labels = prediction_of({"labels": ["a"], "top": [{"label": "a", "score": 0.9}, {"label": "b", "score": 0.4}]})
    assert isinstance(labels, transcnn.MultiLabel)
    assert labels.to_dict() == {
        "file": "",
        "labels": ["a"],
        "top": [{"label": "a", "score": 0.9}, {"label": "b", "score": 0.4}],
    }
    numbers = prediction_of({"values": {"price": 12.5, "age": 3.0}})
    assert isinstance(numbers, transcnn.Regression)
    assert numbers.value == 12.5
    assert numbers.to_dict() == {"file": "", "values": {"price": 12.5, "age": 3.0}}
    assert not prediction_of({"values": {"price": float("nan")}}).is_finite
    for prediction in (labels, numbers):
        assert prediction.plot(Image.new("RGB", (32, 32))).height > 240
