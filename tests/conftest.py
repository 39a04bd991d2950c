"""What every test gets: no network, no window, fixed seeds, few threads; and the fixtures that several files use."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

# matplotlib and the hub read these when they are imported, which nothing above does.
os.environ["MPLBACKEND"] = "Agg"
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# Tests import OpenVINO before transcnn does, which keeps it from this.
sys.modules["openvino_telemetry"] = None  # pyright: ignore

# No power fails while tests run, and to wait for the disk takes milliseconds for each file.
os.fsync = lambda fd: None  # pyright: ignore

ROOT = Path(__file__).resolve().parent.parent

# The same examples on every machine and in every run; look further with: pytest --hypothesis-profile=explore
hypothesis.settings.register_profile("default", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("default")

# KERNELS_FOR=x86-64 pytest tests/test_chains.py: the kernels as they are compiled for other CPUs, with vectors of four
# lanes (x86-64; NEON has them, too), eight (x86-64-v3) or sixteen (x86-64-v4).
if _march := os.environ.get("KERNELS_FOR"):
    from transcnn.fast.cpu import build

    build.FLAGS[build.FLAGS.index("-march=native")] = f"-march={_march}"

# With pytest-xdist each core has a process of its own; OMP_NUM_THREADS, which PyTorch reads, may ask for fewer.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

# Libraries make millions of small objects while they are imported and while they trace a network; to search all of them
# again for garbage took a tenth of the suite's time. Garbage is collected at the end of each file in any case.
gc.set_threshold(20_000, 20, 100)

# Tests that need processes fork them from one server, which has imported what takes seconds.
PRELOAD = "transcnn.cli transcnn.training.run transcnn.training.resume torchvision timm"
PRELOAD += " segmentation_models_pytorch sklearn.datasets torch.utils.tensorboard jsonargparse typeshed_client"
PRELOAD += " transcnn.tasks.detect transcnn.tasks.segment transcnn.data.sets.classify"
PRELOAD += " transcnn.data.sources.opening transcnn.report.classify"
multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD.split())


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return type(value)(map(_encodable, value)) if isinstance(value, list | tuple) else value


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """What a test prints or logs, odd file names among it, may be no UTF-8; pytest-xdist would end the whole run."""
    return _encodable((yield))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need the same slow thing once in a process come first and together: of several, one process runs them.

    Those that fork processes, faults' among them, need a server that has imported everything; others an interpreter.
    And the longest of all comes early, so that in the end no process waits for the one that runs it.
    """

    def place(item: pytest.Item) -> int:
        needs = getattr(item, "fixturenames", ())
        if "forks" in needs or "faults" in item.path.parts:
            return 0
        return 1 if "fresh_imports" in needs or item.path.name == "test_triton.py" else 2

    items.sort(key=place)


@pytest.fixture(scope="session")
def forks() -> None:
    """For tests that fork processes from the server."""


@pytest.fixture(autouse=True, scope="module")
def _few_objects_to_search() -> Iterator[None]:
    """What libraries and fixtures have made by now stays: the garbage collector needn't search it again and again.

    Imports leave half a million objects, which took an eighth of the suite's time.
    """
    gc.freeze()
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test draws the same random numbers, alone or among others."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (third-party code draws from the global generator)
    torch.manual_seed(0)


class Fallbacks(logging.Handler):
    """What the package has said of optimized networks that it gave up for the plain ones, which are far slower."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what tells of such a network."""
        if "runs as it is, for" in (line := record.getMessage()):
            self.lines.append(line)

    def check(self) -> None:
        """Fail the test, whose answers are right all the same, where there was one; forget it."""
        lines, self.lines = self.lines, []
        if lines:
            pytest.fail(
                "an optimized network fell back to the plain one while this test, or a fixture that it uses first, ran:"
                f"\n  {'; '.join(dict.fromkeys(lines))}\nMend what keeps transcnn.optimize from it "
                "(src/transcnn/fast/inference); a test that is about falling back is marked: @pytest.mark.falls_back",
                pytrace=False,
            )


@pytest.fixture(scope="session")
def fallbacks() -> Iterator[Fallbacks]:
    """Hears the package's logger all the time, for the test that runs."""
    handler, logger = Fallbacks(), logging.getLogger("transcnn")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _optimized_stays_optimized(fallbacks: Fallbacks, request: pytest.FixtureRequest) -> Iterator[None]:
    """No test passes by the plain network where it asked for the optimized one."""
    yield
    if request.node.get_closest_marker("falls_back"):
        fallbacks.lines.clear()
    fallbacks.check()


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connections leave this machine in no test; servers of its own on the loopback interface are fine."""

    def guard(connect: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(self: socket.socket, address: Any) -> Any:
            internet = self.family in (socket.AF_INET, socket.AF_INET6)
            if internet and address[0] not in ("127.0.0.1", "::1", "localhost"):
                raise OSError(f"a test tried to reach {address}: tests work without a network")
            return connect(self, address)

        return guarded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
        yield


@pytest.fixture(scope="session")
def fresh_imports() -> dict[str, Any]:
    """Names of the packages that a new interpreter has loaded after each of four imports, one after another.

    Keys are what was imported: "torch, timm", "transcnn", "transcnn.cli" and "transcnn.predictor". Under "seconds"
    stands the CPU time of the second, under "rooms" what is found in the package after it.
    """
    code = """
import json, sys, time
def loaded():
    return sorted({name.partition(".")[0] for name in sys.modules})
import torch, timm
found = {"torch, timm": loaded()}
began = time.process_time()
import transcnn
found["seconds"] = time.process_time() - began
found["transcnn"] = loaded()
found["rooms"] = [transcnn.fast.optimize.__name__, transcnn.explain.attention_maps.__name__]
import transcnn.cli
found["transcnn.cli"] = loaded()
import transcnn.predictor.network
found["transcnn.predictor"] = loaded()
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return {key: set(value) if isinstance(value, list) else value for key, value in json.loads(done.stdout).items()}


@contextmanager
def _drawing_off() -> Iterator[None]:
    from transcnn.tasks import get_task
    from transcnn.training import run

    with pytest.MonkeyPatch.context() as patch:
        for task in ("classify", "multilabel", "regress", "segment", "detect"):
            patch.setattr(get_task(task), "write_report", lambda *_: None)
        patch.setattr(run, "write_samples", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def drawing_off() -> Callable[[], AbstractContextManager[None]]:
    """As ``no_report``, for the runs that several tests look at: ``with drawing_off():``."""
    return _drawing_off


@pytest.fixture
def no_report() -> Iterator[None]:
    """Runs draw no report and no samples, which take half of a small run's time: for tests of what is learnt alone."""
    with _drawing_off():
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of material that isn't part of the repository (data packs, parity files); without it, skip.

    It lies beside the repository or where the environment variable ``TRANSCNN_SHARED`` says.
    """
    path = Path(os.environ.get("TRANSCNN_SHARED") or ROOT.parent / "shared")
    if not path.is_dir():
        pytest.skip("needs the shared folder (set TRANSCNN_SHARED)")
    return path


@pytest.fixture(scope="session")
def class_image() -> Callable[..., Image.Image]:
    """Makes an image whose class is easy to learn: ``class_image(label, index, size=32, mode="RGB")``.

    The class is the angle of its stripes, everything else (phase, colours, noise) varies with ``index``.
    """

    def make(label: int, index: int = 0, size: int | tuple[int, int] = 32, mode: str = "RGB") -> Image.Image:
        width, height = (size, size) if isinstance(size, int) else size
        rng = np.random.default_rng([label, index])
        y, x = np.mgrid[:height, :width]
        angle = label * 0.61
        stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.9 + rng.uniform(0, 6.3))
        colours = rng.uniform(40, 110, 3) * rng.choice((-1, 1))
        values = 128 + stripes[..., None] * colours + rng.normal(0, 8, (height, width, 3))
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert(mode)

    return make


@pytest.fixture
def make_class_folder(tmp_path: Path, class_image: Callable[..., Image.Image]) -> Callable[..., Path]:
    """Writes a folder of class folders: ``make_class_folder(classes=3, per_class=8, splits=(), size=32, ...)``.

    With ``splits`` (for instance ``("train", "val")``) the class folders lie inside folders of those names, and no
    image is in two of them. Returns the folder.
    """

    def make(
        classes: int = 3,
        per_class: int = 8,
        splits: tuple[str, ...] = (),
        size: int | tuple[int, int] = 32,
        mode: str = "RGB",
        name: str = "images",
        suffix: str = ".png",
    ) -> Path:
        folder = tmp_path / name
        for part, split in enumerate(splits or (".",)):
            for label in range(classes):
                target = folder / split / f"class_{label}"
                target.mkdir(parents=True)
                for i in range(per_class):
                    class_image(label, part * per_class + i, size, mode).save(target / f"{i:03}{suffix}")
        return folder

    return make


@pytest.fixture
def class_folder(make_class_folder: Callable[..., Path]) -> Path:
    """A folder of three class folders with eight 32x32 images each, not split."""
    return make_class_folder()


@pytest.fixture
def split_folder(make_class_folder: Callable[..., Path]) -> Path:
    """The same with ``train`` and ``val`` folders, eight images a class in each."""
    return make_class_folder(splits=("train", "val"))


@pytest.fixture
def oddities(make_class_folder: Callable[..., Path], class_image: Callable[..., Image.Image]) -> tuple[Path, set[str]]:
    """Good images among everything that goes wrong, and the names of those that must be reported.

    31 good ones: six of each ordinary class, thirteen odd ones in the first.
    """
    root = make_class_folder(classes=2, per_class=6)
    (root / "CLASS_1").mkdir()  # another than class_1, as the file system has it
    for i in range(6):
        class_image(4, i).save(root / "CLASS_1" / f"{i}.png")
    a = root / "class_0"
    bad = set()

    def put(name: str, data: bytes) -> None:
        (a / name).write_bytes(data)
        bad.add(f"class_0/{name}")

    jpeg, png = (io.BytesIO() for _ in range(2))
    class_image(0, 99, 64).save(jpeg, "JPEG")
    class_image(0, 99, 64).save(png, "PNG")
    put("empty.jpg", b"")
    put("text.jpg", b"no image")
    put("cut.jpg", jpeg.getvalue()[:-300])
    put("cut.png", png.getvalue()[:-300])
    middle = len(png.getvalue()) // 2
    put("crc.png", png.getvalue()[:middle] + bytes([png.getvalue()[middle] ^ 1]) + png.getvalue()[middle + 1 :])
    (a / os.fsdecode(b"\xfe.png")).write_bytes(b"no UTF-8")
    bad.add("class_0/\\xfe.png")
    put("bomb.png", png.getvalue()[:16] + b"\x7f\xff\xff\xff\x7f\xff\xff\xff" + png.getvalue()[24:])
    (a / "nothing.png").symlink_to("nowhere")
    (a / "loop.png").symlink_to("loop.png")
    (a / "folder.jpg").mkdir()
    bad |= {"class_0/nothing.png", "class_0/loop.png", "class_0/folder.jpg"}
    if os.geteuid():  # root may read anything
        put("locked.png", png.getvalue())
        (a / "locked.png").chmod(0)
    # Odd but good, or not looked at at all.
    (root / "notes.txt").write_text("not a class")
    (root / ".cache").mkdir()
    (root / "stray.png").write_bytes(png.getvalue())
    (root / "album.jpg").mkdir()
    (root / "round").symlink_to("round")
    (a / ".hidden.png").write_bytes(b"")
    (a / "Thumbs.db").write_bytes(b"x")
    (a / "up").symlink_to(root, target_is_directory=True)
    for name in ("with space.png", "new\nline.png", "😀.png", "x" * 196 + ".png", os.fsdecode(b"\xff.png")):
        (a / name).write_bytes(png.getvalue())
    Image.new("CMYK", (20, 20)).save(a / "cmyk.jpg")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(a / "sixteen.png")
    palette = class_image(0, 98).quantize(8)
    palette.save(a / "palette.png", transparency=bytes(range(0, 256, 32)))
    Image.new("LA", (9, 9), (90, 60)).save(a / "faint.png")
    Image.new("RGB", (9, 9)).save(a / "UPPER.JPG", "JPEG", exif=b"no exif")
    Image.new("L", (1, 1)).save(a / "one.png")
    Image.new("L", (30000, 1)).save(a / "long.png")
    Image.new("P", (9, 9)).save(a / "moving.gif", save_all=True, append_images=[Image.new("P", (9, 9), 3)])
    return root, bad


@pytest.fixture
def closed_loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the test no event loop that it made is open: one that is collected so fails whoever runs meanwhile."""
    made: list[asyncio.AbstractEventLoop] = []
    new = asyncio.new_event_loop

    def recorded() -> asyncio.AbstractEventLoop:
        made.append(new())
        return made[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", recorded)
    yield
    assert made
    assert [loop for loop in made if not loop.is_closed()] == []
