"""The page: what it says about pictures, and the page itself in a real browser."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transcnn.attention import HMHSA
from transcnn.checkpoints.loading import Loaded, data_config_of, load
from transcnn.commands.demo import demo
from transcnn.commands.predict import predict
from transcnn.data.images import read_image
from transcnn.demo.drawing import draw_look, enlarged, mark_spot
from transcnn.demo.loop import in_event_loop
from transcnn.demo.server import EXAMPLES, find_examples
from transcnn.demo.viewer import SHOWN, Viewer, to_other
from transcnn.errors import UserError
from transcnn.explain import attention_maps
from transcnn.explain.figure import MARK
from transcnn.plugging.build import build_model
from transcnn.weights import PACKAGED

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
FLAGS += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera that shows a test picture
MARKED = tuple(int(MARK[i : i + 2], 16) for i in (1, 3, 5))


@pytest.fixture(scope="session")
def viewer() -> Viewer:
    return Viewer(load(PACKAGED))


@pytest.fixture(scope="session")
def photo(class_image: Any) -> Image.Image:
    """A picture that isn't square, with other structure at each side."""
    left, right = class_image(0, 0, (150, 200)), class_image(2, 1, (150, 200))
    image = Image.new("RGB", (300, 200))
    image.paste(left, (0, 0))
    image.paste(right, (150, 0))
    return image


# --- what the page says ---------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_predict(viewer: Viewer, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    wanted = predict(PACKAGED, [str(tmp_path / "photo.png")], accelerator="cpu", quiet=True)[0]["top"]
    assert Viewer(load(PACKAGED), optimize=False).answer(photo)["top"] == wanted
    found = viewer.answer(photo)["top"]  # of the optimized network, up to rounding
    assert viewer.predicting.model is not viewer.model
    assert [row["label"] for row in found] == [row["label"] for row in wanted]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in wanted], abs=1e-5)


def test_stages_and_heads_are_the_networks(viewer: Viewer) -> None:
    assert [stage.number for stage in viewer.stages] == [0, 1, 2]
    assert [stage.local_levels for stage in viewer.stages] == [1, 1, 0]
    for number, stage in enumerate(viewer.model.stages):  # pyright: ignore
        heads = next(module.num_heads for module in stage.modules() if isinstance(module, HMHSA))
        assert viewer.stages[number].heads == heads


def test_a_look_shows_the_attention_maps_of_the_spot(viewer: Viewer, photo: Image.Image) -> None:
    visit = viewer.visit(photo)
    assert visit.input.shape == (1, 3, 32, 48)  # the whole picture, its short side that of the network
    visit.spot = (30, visit.image.width - 20)
    place = to_other(visit.spot, (visit.image.height, visit.image.width), (32, 48))
    for stage in viewer.stages:
        maps = attention_maps(viewer.model, visit.input, place, stage.number)
        wanted = [draw_look(visit.image, m) for m in maps if m.name == maps[-1].name]
        looks = viewer.look(visit, stage.number)
        assert len(looks) == stage.local_levels + 1
        for look, picture in zip(looks, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(look.image), np.asarray(picture))
        assert looks[-1].title == "Far: the whole image"


def test_spots_stages_and_heads_differ(viewer: Viewer, photo: Image.Image) -> None:
    visit = viewer.visit(photo)

    def far(spot: tuple[int, int], stage: int = 1, head: Any = "mean") -> bytes:
        visit.spot = spot
        return viewer.look(visit, stage, head)[-1].image.tobytes()

    first = far((10, 10))
    assert first == far((10, 10))
    assert len({first, far((190, 290)), far((10, 10), stage=2), far((10, 10), head=1)}) == 4


def test_the_spot_is_marked_where_it_is(photo: Image.Image) -> None:
    image = mark_spot(photo, (40, 250))
    where = np.argwhere((np.asarray(image) == MARKED).all(2))
    assert np.abs(where.mean(0) - (40, 250)).max() < 1
    assert not (np.asarray(photo) == MARKED).all(2).any()


def test_the_mark_in_a_map_lies_over_the_spot(viewer: Viewer, photo: Image.Image) -> None:
    visit = viewer.visit(photo)
    visit.spot = (150, 60)
    image = np.asarray(viewer.look(visit, 1)[-1].image)
    assert image.shape[:2] == (visit.image.height, visit.image.width)
    top, left = np.argwhere((image == MARKED).all(2)).min(0)
    bottom, right = np.argwhere((image == MARKED).all(2)).max(0)
    assert top <= 150 <= bottom
    assert left <= 60 <= right


@pytest.mark.parametrize("size", [(4000, 3000), (30, 20), (5000, 40), (1, 1), (SHOWN, 10)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pictures_of_any_size_and_mode(viewer: Viewer, size: tuple[int, int], mode: str) -> None:
    visit = viewer.visit(Image.new(mode, size))
    assert max(visit.image.size) <= SHOWN
    assert visit.input.shape[2] <= 96
    assert visit.input.shape[3] <= 96
    assert len(viewer.look(visit, 0)) == 2


def test_few_pixels_are_enlarged_with_sharp_edges() -> None:
    image = Image.new("L", (3, 2))
    image.putpixel((1, 1), 200)
    large = enlarged(image)
    assert large.size == (360, 240)
    assert set(large.tobytes()) == {0, 200}


def test_a_network_of_others_and_grey_pictures(photo: Image.Image) -> None:
    """No H-MHSA: answers, but nothing to look at. One channel: both."""
    plain = build_model("test_resnet", num_classes=3).eval()
    viewer = Viewer(Loaded(plain, "classify", ["a", "b", "c"], data_config_of(plain, 3, 64), "", {}))
    assert viewer.stages == []
    assert len(viewer.answer(photo)["top"]) == 3
    with pytest.raises(UserError, match="holds no H-MHSA"):
        viewer.look(viewer.visit(photo), 0)
    grey = build_model("transcnn_test", num_classes=2, in_chans=1).eval()
    viewer = Viewer(Loaded(grey, "classify", ["a", "b"], data_config_of(grey, 1, 32), "", {}))
    visit = viewer.visit(photo)
    assert visit.input.shape == (1, 1, 32, 48)
    assert viewer.look(visit, 0)


def test_a_network_that_draws(photo: Image.Image) -> None:
    """Segmentation: what ``predict`` draws, of the whole picture, and where its backbone looks."""
    pytest.importorskip("segmentation_models_pytorch")
    from transcnn.dense.segmenters import build

    args = {"decoder": "fpn", "decoder_channels": 64, "label_ids": [0, 1, 2], "resize": None}
    model = build("transcnn_test", args, num_classes=3).eval()
    config = data_config_of(model, 3, 64)
    viewer = Viewer(Loaded(model, "segment", ["sky", "road", "tree"], config, "", {"task_args": args}))
    answer = viewer.answer(photo)
    assert answer["overlay"].width == photo.width
    assert answer["overlay"].height >= photo.height  # a legend below it
    assert sum(part["share"] for part in answer["classes"]) == pytest.approx(1, abs=1e-4)
    visit = viewer.visit(photo)
    assert all(side % 32 == 0 for side in visit.input.shape[2:])
    assert viewer.look(visit, viewer.stages[0].number)


def coloured(count: int, side: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures (count, 3, side, side) from 0 to 1 with a green square each, its mask and its box."""
    generator = torch.Generator().manual_seed(count)
    images = 0.2 + 0.05 * torch.rand(count, 3, side, side, generator=generator)
    masks, boxes = torch.zeros(count, side, side, dtype=torch.long), torch.zeros(count, 4)
    for i in range(count):
        x, y = torch.randint(2, side - 34, (2,), generator=generator).tolist()
        images[i, 1, y : y + 32, x : x + 32] = 0.9
        masks[i, y : y + 32, x : x + 32] = 1
        boxes[i] = torch.tensor([x, y, x + 32, y + 32])
    return images, masks, boxes


def shown(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy())


def test_a_segmenter_that_has_learnt_colours_the_right_pixels() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    from transcnn.dense.segmenters import build
    from transcnn.report.overlay import palette

    args = {"decoder": "fpn", "decoder_channels": 64, "label_ids": [0, 1], "resize": None}
    model = build("transcnn_test", args, num_classes=2)
    config = {**data_config_of(model, 3, 64), "mean": [0.0] * 3, "std": [1.0] * 3}
    images, masks, _ = coloured(12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        torch.nn.functional.cross_entropy(model(images), masks).backward()
        optimizer.step()
        optimizer.zero_grad()
    viewer = Viewer(Loaded(model.eval(), "segment", ["ground", "square"], config, "", {"task_args": args}))
    images, masks, _ = coloured(3)
    for image, mask in zip(images, masks, strict=True):
        answer = viewer.answer(shown(image))
        assert dict(ground=0.75, square=0.25) == pytest.approx(
            {part["label"]: part["share"] for part in answer["classes"]}, abs=0.08
        )
        picture = np.asarray(answer["overlay"], float)[:64, :64]
        inside = mask.bool().numpy()
        near = np.abs(picture - np.array(palette(2)[1])).sum(-1) < np.abs(picture - np.array(palette(2)[0])).sum(-1)
        assert (near == inside).mean() > 0.9


@pytest.mark.slow
def test_a_detector_that_has_learnt_draws_its_boxes() -> None:
    pytest.importorskip("faster_coco_eval")
    from transcnn.dense.detectors import build
    from transcnn.report.overlay import palette

    args = dict(detector="retinanet", fpn_channels=32, short_side=64, long_side=64, side_range=(1.0, 1.0))
    args |= dict(anchor_size=16, min_score=0.3, max_found=5, label_ids=[1])
    model = build("transcnn_test", args, num_classes=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(120):
        images, _, boxes = coloured(8 + step % 4)
        targets = [{"boxes": box[None], "labels": torch.zeros(1, dtype=torch.long)} for box in boxes]
        torch.stack(list(model.train()(list(images), targets).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    viewer = Viewer(Loaded(model.eval(), "detect", ["square"], data_config_of(model, 3, 64), "", {"task_args": args}))
    images, _, boxes = coloured(3)
    for image, box in zip(images, boxes, strict=True):
        answer = viewer.answer(shown(image))
        best = answer["boxes"][0]
        assert best["label"] == "square"
        assert best["score"] > 0.5
        assert best["box"] == pytest.approx(box.tolist(), abs=4)
        drawn = np.abs(np.asarray(answer["overlay"]).astype(int) - palette(1)[0]).max(-1) < 3
        rows = np.flatnonzero(drawn.any(1))
        columns = np.flatnonzero(drawn[rows[-1] - 8 :].any(0))  # name and score stand higher, at the upper edge
        edges = [columns[0], rows[-1], columns[-1]]
        assert edges == pytest.approx([best["box"][0], best["box"][3] - 1, best["box"][2] - 1], abs=2)
    visit = viewer.visit(shown(images[0]))
    assert viewer.look(visit, viewer.stages[0].number)


def test_visitors_at_once_get_their_own(viewer: Viewer, class_image: Any) -> None:
    pictures = [class_image(label, 0, (90, 60)) for label in range(4)]
    alone = [(viewer.answer(p), viewer.look(viewer.visit(p), 0)[0].image.tobytes()) for p in pictures]
    assert len({maps for _, maps in alone}) == 4
    wrong: list[int] = []

    def visitor(number: int) -> None:
        for _ in range(8):
            p = pictures[number]
            if (viewer.answer(p), viewer.look(viewer.visit(p), 0)[0].image.tobytes()) != alone[number]:
                wrong.append(number)

    threads = [threading.Thread(target=visitor, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- examples and errors --------------------------------------------------------------------------------------------


def test_examples_are_those_named_or_the_runs_own(class_folder: Path, tmp_path: Path) -> None:
    loaded = load(PACKAGED)
    found = find_examples(loaded, [str(class_folder)], tmp_path / "a")
    assert len(found) == EXAMPLES
    assert len({Path(file).parent.name for file in found}) == 3  # spread over the classes
    with pytest.raises(UserError, match=r"no such file: .*missing.png"):
        find_examples(loaded, [str(tmp_path / "missing.png")], tmp_path / "a")

    settings = {"data": str(class_folder), "val_fraction": 0.5, "seed": 0}
    loaded = Loaded(loaded.model, "classify", ["class_0", "class_1", "class_2"], {}, "", {"settings": settings})
    found = find_examples(loaded, None, tmp_path / "own", tmp_path)
    assert len(found) == EXAMPLES
    own = {read_image(file).tobytes() for file in class_folder.rglob("*.png")}
    assert all(read_image(file).tobytes() in own for file in found)
    for i in range(3):  # of 12 bits, which a run sees from 0 to 4095
        (tmp_path / "deep" / f"class_{i}").mkdir(parents=True)
        for j in range(2):
            pixels = np.full((8, 8), 2048, np.uint16)
            Image.fromarray(pixels).save(tmp_path / "deep" / f"class_{i}" / f"{j}.png")
    deep = dataclasses.replace(loaded, preprocessing={"pixel_range": [0, 4095]})
    settings["data"] = str(tmp_path / "deep")
    found = find_examples(deep, None, tmp_path / "deep_own", tmp_path)
    assert {read_image(file).getpixel((0, 0)) for file in found} == {128}
    settings["data"] = str(tmp_path / "moved")
    pytest.importorskip("gradio")
    assert all(Path(file).is_file() for file in find_examples(loaded, None, tmp_path / "b", tmp_path))


@pytest.mark.parametrize(
    ("argument", "words"), [({"max_mb": 0}, "max_mb must be more"), ({"port": 70000}, "port must")]
)
def test_bad_arguments(argument: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        demo(**argument)


def test_images_of_a_page_that_segments_keep_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    loaded = Loaded(torch.nn.Identity(), "segment", ["a"], {}, "run", {})
    monkeypatch.setattr("transcnn.checkpoints.loading.load", lambda *_: loaded)
    with pytest.raises(UserError, match="img_size has no effect on run"):
        demo("run", img_size=64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("closed_loops")
def test_what_the_browser_sends_is_taken_apart(viewer: Viewer) -> None:
    pytest.importorskip("gradio")
    from transcnn.demo.page import _file_of, build_page

    assert _file_of(None) is None
    assert _file_of({"path": "/folder/x.png", "url": None}) == "/folder/x.png"
    assert _file_of({"path": None, "url": "data:image/png;base64,aGVsbG8="}) == b"hello"
    assert _file_of({"path": None, "url": "data:image/png;base64,!"}) == b""
    assert _file_of({"path": None, "url": "http://example.org/x.png"}) is None  # nothing is fetched from elsewhere
    page = build_page(viewer)
    assert {function.api_visibility for function in page.fns.values()} == {"private"}
    assert page.analytics_enabled is False


def test_a_running_event_loop_is_the_one_that_is_used() -> None:
    """As in Jupyter."""

    async def cell() -> bool:
        return in_event_loop(asyncio.get_running_loop) is asyncio.get_running_loop()

    assert asyncio.run(cell())
    assert in_event_loop(asyncio.get_running_loop).is_closed()  # of its own, where none runs


# --- in a browser ---------------------------------------------------------------------------------------------------


class Server:
    """``transcnn demo`` in a process of its own, with a folder of its own for temporary files."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        command = [sys.executable, "-m", "transcnn.cli", "demo", "--max_mb", "1"]
        environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONWARNINGS": "ignore"}
        # A shell that runs the tests in the background has them ignore Ctrl-C, and children inherit that.
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.address = self.line.partition(" ")[0]

    def stop(self, how: int) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason="needs gradio")
    pytest.importorskip("playwright", reason="needs the Python package playwright")
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    server = Server(tmp_path_factory.mktemp("temporary"))
    yield server
    server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def browser(server: Server) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Visitor:
    """One browser window of its own."""

    def __init__(self, browser: Any, address: str, **settings: Any) -> None:
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(40_000)
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("#image input[type=file]", state="attached")

    def give(self, *file: Any) -> None:
        self.page.set_input_files("#image input[type=file]", *file)

    def source(self, place: str) -> str:
        self.page.wait_for_selector(f"{place} img")
        return self.page.get_attribute(f"{place} img", "src")

    def changed(self, place: str, before: str) -> str:
        """The new address of a picture, once there is one."""
        script = (
            "([place, before]) => { const i = document.querySelector(place + ' img'); return i && i.src !== before }"
        )
        self.page.wait_for_function(script, arg=[place, before])
        return self.source(place)

    def picture(self, place: str) -> np.ndarray:
        answer = self.context.request.get(self.source(place))
        assert answer.ok
        return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"))

    def click(self, row: float, column: float) -> None:
        """Click on the picture, at a share of its height and width; it stands in the middle of its box."""
        image = self.page.locator("#image img")
        box = image.bounding_box()
        width, height = image.evaluate("i => [i.naturalWidth, i.naturalHeight]")
        scale = min(box["width"] / width, box["height"] / height, 1)
        x, y = (
            box[n] / 2 + (share - 0.5) * side * scale
            for n, share, side in (("width", column, width), ("height", row, height))
        )
        image.click(position={"x": x, "y": y})

    def snap(self, name: str) -> None:
        """A screenshot for docs/images, where the environment asks for it (make screenshots)."""
        if folder := os.environ.get("TRANSCNN_SCREENSHOTS"):
            self.page.wait_for_timeout(600)
            self.page.screenshot(path=Path(folder) / name, full_page=True)


def file(name: str, image: Image.Image | bytes) -> dict[str, Any]:
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return {"name": name, "mimeType": "image/png", "buffer": image}


def test_upload_click_stage_and_head(server: Server, browser: Any, viewer: Viewer, photo: Image.Image) -> None:
    assert re.match(r"http://127\.0\.0\.1:\d+ shows transcnn_nano.cifar10", server.line)
    visitor = Visitor(browser, server.address, viewport={"width": 1200, "height": 1000})
    visitor.give(file("photo.png", photo))
    far = visitor.source("#far")
    best = viewer.answer(photo)["top"][0]
    visitor.page.wait_for_selector(f"#answer >> text={best['label']}")
    assert f"{best['score']:.0%}" in visitor.page.inner_text("#answer")

    visitor.click(0.2, 0.9)
    far = visitor.changed("#far", far)
    visit = viewer.visit(photo)
    visit.spot = (round(0.2 * visit.image.height), round(0.9 * visit.image.width))
    wanted = np.asarray(viewer.look(visit, 0)[-1].image).astype(int)
    assert np.abs(visitor.picture("#far").astype(int) - wanted).mean() < 4  # lossy on its way to the browser

    visitor.page.click("#stage label:nth-of-type(2)")
    far = visitor.changed("#far", far)
    wanted = np.asarray(viewer.look(visit, 1)[-1].image).astype(int)
    assert np.abs(visitor.picture("#far").astype(int) - wanted).mean() < 4
    visitor.page.click("#head input")
    visitor.page.click(f"text=head 2 of {viewer.stages[1].heads}")
    far = visitor.changed("#far", far)
    wanted = np.asarray(viewer.look(visit, 1, 1)[-1].image).astype(int)
    assert np.abs(visitor.picture("#far").astype(int) - wanted).mean() < 4

    visitor.page.click("#examples button >> nth=2")
    far = visitor.changed("#far", far)
    visitor.click(0.3, 0.4)
    visitor.changed("#far", far)
    visitor.snap("demo.png")
    foreign = [url for url in visitor.asked if not url.startswith((server.address, "data:", "blob:"))]
    assert foreign == []
    assert "default-src 'self'" in visitor.context.request.get(server.address).headers["content-security-policy"]
    visitor.context.close()


def test_broken_huge_and_then_a_good_one(server: Server, browser: Any, photo: Image.Image) -> None:
    visitor = Visitor(browser, server.address, viewport={"width": 1200, "height": 1000})
    for content, words in (
        (b"\x89PNG\r\n\x1a\nnothing more", "not an image"),
        (b"", "empty file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (_bomb(), "pixels"),
    ):
        visitor.give(file("broken.png", content))
        visitor.page.wait_for_selector(f"#message >> text={words}")
        assert "This file can't be shown" in visitor.page.inner_text("#message")
        assert visitor.page.query_selector("#image img") is None
    visitor.snap("demo_broken.png")
    noise = np.random.default_rng(0).bytes(1_500_000)
    visitor.give(file("huge.png", noise))
    visitor.page.wait_for_selector("text=exceed the maximum allowed size")
    visitor.give(file("photo.png", photo))
    visitor.source("#far")
    assert visitor.page.query_selector("#message") is None or not visitor.page.is_visible("#message")
    visitor.context.close()


def _bomb() -> bytes:
    """A small file with more pixels than are read."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_two_visitors_at_once(server: Server, browser: Any, viewer: Viewer, class_image: Any) -> None:
    pictures = [class_image(label, 7, (120, 120)) for label in (0, 3)]
    visitors = [Visitor(browser, server.address) for _ in pictures]
    for visitor, picture in zip(visitors, pictures, strict=True):
        visitor.give(file("own.png", picture))
    before = [visitor.source("#near") for visitor in visitors]
    for visitor in visitors:
        visitor.click(0.1, 0.1)
    for visitor, picture, old in zip(visitors, pictures, before, strict=True):
        visitor.changed("#near", old)
        best = viewer.answer(picture)["top"][0]
        assert best["label"] in visitor.page.inner_text("#answer")
        assert f"{best['score']:.0%}" in visitor.page.inner_text("#answer")
        shown, seen = visitor.picture("#image"), np.asarray(viewer.visit(picture).image)
        assert shown.shape == seen.shape
        assert np.median(np.abs(shown.astype(int) - seen)) <= 8
    for visitor in visitors:
        visitor.context.close()


def test_example_on_a_phone(server: Server, browser: Any) -> None:
    visitor = Visitor(
        browser,
        server.address,
        viewport={"width": 390, "height": 844},
        is_mobile=True,
        has_touch=True,
    )
    visitor.page.tap("#examples button >> nth=2")
    far = visitor.source("#far")
    visitor.click(0.3, 0.7)
    visitor.changed("#far", far)
    width = visitor.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390  # nothing sticks out
    visitor.snap("demo_phone.png")
    visitor.context.close()


def test_a_picture_from_the_camera(server: Server, browser: Any) -> None:
    visitor = Visitor(browser, server.address, permissions=["camera"])
    visitor.page.click("#image [data-testid=source-select] button >> nth=1")
    visitor.page.click("#image [title='grant webcam access'] button")
    visitor.page.wait_for_function("document.querySelector('#image video')?.videoWidth > 0")
    visitor.page.click("#image button[aria-label='capture photo']")
    visitor.source("#far")
    picture = visitor.picture("#image")
    assert picture.std() > 10  # chromium's camera shows a green ground and a moving wedge
    visitor.context.close()


def test_ctrl_c_leaves_nothing_behind(server: Server, browser: Any, photo: Image.Image) -> None:
    """The last one: it stops the server."""
    visitor = Visitor(browser, server.address)
    visitor.give(file("photo.png", photo))
    visitor.source("#far")
    visitor.context.close()
    made = [path.name for path in server.temporary.iterdir() if path.name.startswith("transcnn-demo-")]
    assert len(made) == 1
    assert any(path.is_file() for path in (server.temporary / made[0]).rglob("*"))
    assert server.stop(signal.SIGINT) == 0
    left = [str(path.relative_to(server.temporary)) for path in server.temporary.rglob("*") if path.is_file()]
    assert left == []
