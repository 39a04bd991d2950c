"""transcnn compare: what it counts, what it refuses, what it writes; levels from the image's size."""

import csv
import dataclasses
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import transcnn
from transcnn.commands.compare import compare
from transcnn.compare import engines, measuring
from transcnn.compare.engines import build, load_reference, prepare, prepare_training
from transcnn.compare.measuring import PAPER
from transcnn.compare.peers import PEERS
from transcnn.errors import UserError, require
from transcnn.levels import auto_levels

QUICK = dict(batch=2, rounds=2, seconds=0.0, memory=False)
# Two stages, one with grids and one without: all there is to trace, in seconds.
TWO_STAGES = (
    "transcnn_test:dims=(8,16):depths=(1,1):expansions=(2,2):kernel_sizes=(3,3)"
    ":grid_sizes=(4,None):pool_ratios=(4,None):stem_stride=2"
)


def test_the_table_and_its_files(tmp_path, capsys):
    rows = compare("transcnn_test,resnet10t", sizes="32,48", engine="eager,optimize", out=str(tmp_path), **QUICK)
    assert [(r["model"], r["engine"], r["size"]) for r in rows[:4]] == [
        ("transcnn_test", "eager", 32),
        ("transcnn_test", "optimize", 32),
        ("resnet10t", "eager", 32),
        ("resnet10t", "optimize", 32),
    ]
    assert len(rows) == 8
    for row in rows:
        model = timm.create_model(row["model"])
        assert row["params"] == sum(p.numel() for p in model.parameters())
        assert row["images_per_s"] > 0
        assert row["ns_per_pixel"] == pytest.approx(1e9 / (row["images_per_s"] * row["size"] ** 2))
        assert (row["difference"] is None) == (row["engine"] == "eager")
        assert row["difference"] is None or row["difference"] <= 1e-5
    # Twice the pixels on each side are four times the work, but for rounding and the head.
    assert rows[4]["macs"] == pytest.approx(rows[0]["macs"] * 48**2 / 32**2, rel=0.3)
    with (tmp_path / "compare.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [line["model"] for line in written] == [row["model"] for row in rows]
    assert written[0]["torch"] == torch.__version__
    assert int(written[0]["threads"]) == torch.get_num_threads()
    assert (tmp_path / "compare.png").stat().st_size > 1000
    assert "resnet10t" in capsys.readouterr().out


def test_medians_of_interleaved_rounds(monkeypatch):
    """One slow round of the machine doesn't move a figure, and rounds go over all cases in turn."""
    order, clock = [], {"transcnn_test": iter([1.0, 9.0, 1.0]), "resnet10t": iter([2.0, 18.0, 2.0])}

    def fake(run, images, seconds):
        order.append(run)
        return next(clock[run])

    def named(case, reference, device, names):
        return case.model, torch.zeros(1)

    monkeypatch.setattr(measuring, "seconds_per_call", fake)
    monkeypatch.setattr("transcnn.commands.compare.prepare_case", named)
    rows = compare("transcnn_test,resnet10t", sizes=[32], engine="eager", batch=4, rounds=3, memory=False)
    assert order == ["transcnn_test", "resnet10t"] * 3
    assert [row["images_per_s"] for row in rows] == [4.0, 2.0]
    assert [row["spread"] for row in rows] == [8.0, 8.0]


def test_a_reference_gets_the_same_weights(root, tmp_path):
    rows = compare("transcnn_tiny", sizes="128", engine="eager", reference=f"{root}/benchmarks/plain.py:plain", **QUICK)
    assert [row["model"] for row in rows] == ["reference", "transcnn_tiny"]
    assert rows[0]["note"] == ""
    assert rows[1]["note"] == "weights of the reference"
    other = tmp_path / "other.py"
    other.write_text("import torch\ndef make():\n    return torch.nn.Conv2d(3, 4, 3)\n")
    assert compare("transcnn_test", sizes="32", engine="eager", reference=f"{other}:make", **QUICK)[0]["note"] == (
        "weights of its own"
    )
    [row] = compare([], sizes="32", engine="eager", reference=f"{other}:make", **QUICK)  # which may stand alone
    assert row["model"] == "reference"


def test_a_reference_may_register_its_networks_and_have_any_name(tmp_path):
    file = tmp_path / "json.py"  # a module of that name is there already, and stays
    file.write_text(
        "from timm.models import create_model, register_model\n\n"
        "@register_model\ndef reference_of_a_test(pretrained=False, **kwargs):\n"
        "    return create_model('test_resnet', **kwargs)\n\n"
        "def make():\n    return create_model('reference_of_a_test')\n"
    )
    before = sys.modules["json"]
    assert load_reference(f"{file}:make").num_classes == 1000
    assert sys.modules["json"] is before


@torch.no_grad()
def test_the_plain_network_equals_ours(root):
    from transcnn.compare.engines import load_reference, same_weights

    plain, ours = load_reference(f"{root}/benchmarks/plain.py:plain"), build("transcnn_tiny", 128)
    assert same_weights(plain, ours)
    x = torch.randn(1, 3, 128, 128)
    expected = plain(x)
    assert float((ours(x) - expected).norm() / expected.norm()) <= 1e-5


def test_one_that_fails_leaves_the_others(capsys):
    rows = compare("transcnn_test", sizes="32", dtype="bf16", engine="onnxruntime,optimize", **QUICK)
    assert rows[0]["images_per_s"] is None
    assert rows[0]["note"] == "ONNX Runtime computes these networks in fp32 only"
    assert rows[1]["images_per_s"] > 0
    assert "fp32 only" in capsys.readouterr().out


def test_training_and_memory():
    """Memory is that of the network, not of whoever asks."""
    held = torch.ones(2**30, dtype=torch.uint8)  # written to: 1 GiB of this process
    (row,) = compare("transcnn_test", sizes="32", dtype="bf16", train=True, batch=2, rounds=1, seconds=0.0)
    assert row["engine"] == "train"
    assert row["images_per_s"] > 0
    assert held.numel() / 2**20 > row["peak_mb"] > row["above_mb"] > 0


def test_the_process_that_takes_memory_runs_nothing_of_the_working_folder(tmp_path):
    (tmp_path / "colorsys.py").write_text("raise SystemExit('run')")
    code = measuring.CHILD.partition("from ")[0] + "import colorsys"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("engine", ["eager", "optimize"])
def test_the_process_that_takes_memory_runs_the_engine(engine, monkeypatch, capsys):
    """Here in this process, whose peak is no smaller than what it holds."""
    case = measuring.Case("transcnn_test", engine, "fp32", "infer", 32, 2)
    what = {**dataclasses.asdict(case), "reference": None, "threads": torch.get_num_threads()}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(what)))
    ran = []
    monkeypatch.setattr(measuring, "prepare", lambda *args: ran.append(args[0]) or prepare(*args))
    measuring._child()
    peak, above = json.loads(capsys.readouterr().out)
    assert peak > above >= 0
    assert ran == [engine]


def test_a_training_step_trains():
    model = build("transcnn_test", 32)
    before = [p.clone() for p in model.parameters()]
    run = prepare_training(model, "fp32")
    images = torch.randn(4, 3, 32, 32)
    losses = [float(run(images)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))  # a copy is trained


def test_only_ours_is_accelerated(monkeypatch):
    """A reference is another implementation of the same network, and may well be made of our modules."""
    seen = []
    monkeypatch.setattr(engines, "accelerate_training", lambda model: seen.append(model) or model)
    reference = f"{Path(__file__).parent.parent / 'benchmarks' / 'plain.py'}:plain"
    rows = compare("transcnn_tiny", sizes="64", train=True, reference=reference, **{**QUICK, "rounds": 1})
    assert [row["model"] for row in rows] == ["reference", "transcnn_tiny"]
    assert len(seen) == 1
    ours = load_reference(reference)
    kinds = {type(m) for m in ours.modules() if isinstance(m, torch.nn.Conv2d)}
    assert kinds == {torch.nn.Conv2d}  # none whose gradient is made otherwise


@pytest.mark.parametrize("name", PAPER)
def test_every_network_of_the_papers_bibliography_can_be_built(name):
    if name in PEERS:
        pytest.importorskip("vit_pytorch", reason='needs the extra "peers"')
    with torch.device("meta"):
        model = build(name, 224)
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 1e8


@pytest.mark.parametrize("name", PEERS)
def test_networks_of_other_libraries_give_logits(name):
    pytest.importorskip("vit_pytorch", reason='needs the extra "peers"')
    shallow = "depths=[1,1,1,1]" if name.startswith("pvt") else "depth=1"
    with torch.no_grad():
        assert build(f"{name}:{shallow}", 64)(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


def test_the_papers_networks_are_named_with_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("transcnn.commands.compare.PAPER", {"transcnn_test": None})
    assert [row["model"] for row in compare("paper", sizes="32", engine="eager", **QUICK)] == ["transcnn_test"]
    assert "no library that is kept has it: CeiT (arXiv 2103.11816)" in capsys.readouterr().out


def test_without_the_extra_its_networks_leave_the_others_their_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vit_pytorch", None)
    monkeypatch.setitem(sys.modules, "vit_pytorch.deepvit", None)
    rows = compare("deepvit_s,transcnn_test", sizes="32", engine="eager", **QUICK)
    assert rows[0]["images_per_s"] is None
    assert 'pip install "transcnn[peers]"' in rows[0]["note"]
    assert rows[1]["images_per_s"] > 0


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_other_engines_agree(engine):
    pytest.importorskip(engine)
    model = build(TWO_STAGES, 32)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x).detach()
    answer = prepare(engine, model, "fp32", x)(x)
    assert float((answer - expected).norm() / expected.norm()) <= 1e-5


def test_openvino_sends_no_usage_statistics(monkeypatch):
    """It would start processes that do, and leave a file in the home folder."""
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    pytest.importorskip("openvino")
    require("openvino", "export")
    with pytest.raises(ImportError):
        importlib.import_module("openvino_telemetry")
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__.endswith("telemetry_stub")


@torch.no_grad()
def test_openvino_computes_in_bf16():
    """Which it refused where one channel is pooled."""
    pytest.importorskip("openvino")
    model, x = build(TWO_STAGES, 32), torch.randn(2, 3, 31, 33)
    expected = model(x)
    answer = prepare("openvino", model, "bf16", x)(x)
    assert float((answer - expected).norm() / expected.norm()) <= 5e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(models="transcnn1d_nano"), "transcnn1d_nano takes no images"),
        (dict(models="resnet10t,nosuch"), "neither transcnn, timm nor torchvision has a network called 'nosuch'"),
        (dict(sizes="0"), "sizes must be whole numbers of 1 or more separated by commas, got '0'"),
        (dict(sizes="big"), "sizes must be whole numbers of 1 or more separated by commas, got 'big'"),
        (dict(engine="magic"), "engine must be of eager, channels_last, optimize, .* got 'magic'"),
        (dict(models=" , "), "models must name a network or more, got none"),
        (dict(engine=[]), "engine must be of eager, .*, got none"),
        (dict(dtype="int8"), "dtype must be of fp32, bf16, fp16, got 'int8'"),
        (dict(batch=0), "batch must be from 1 to 8,192, got 0"),
        (dict(reference="nosuch.py:f"), "reference must be FILE.py:FACTORY with an existing file, got 'nosuch.py:f'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        compare(**{"models": "transcnn_test", "sizes": "32", **arguments, "rounds": 1, "memory": False})


def test_names_and_arguments():
    assert set(PAPER) <= set(timm.list_models()) | set(PEERS) | {"regnety_040"}
    assert all(name in PAPER for name in transcnn.list_models() if not name.endswith(("nano", "micro", "test")))
    assert build("transcnn_test:num_classes=7:act_layer=gelu", 32).num_classes == 7
    model = build("transcnn_test:grid_sizes=auto:pool_ratios=auto", 512)
    assert len(model.stages[0].blocks[0].attn.local) == 2
    assert type(build("vit_tiny_patch16_224", 64)(torch.zeros(1, 3, 64, 64))) is torch.Tensor
    assert build("shufflenet_v2_x0_5", 32)(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)  # only torchvision has it


PUBLISHED = ((8, 8, 8, None), (8, 4, 2, None))


@pytest.mark.parametrize("size", [32, 256, 384, (256, 384)])
def test_small_images_keep_the_published_levels(size):
    assert auto_levels(*PUBLISHED, size) == (((8,), (8,), (8,), ()), ((8,), (4,), (2,), ()))


@pytest.mark.parametrize("size", [385, 512, 1024, 2048, 3000, 4096, 10000])
def test_few_tokens_are_left_at_any_size(size):
    grids, ratios = auto_levels(*PUBLISHED, size)
    for i, (g, r) in enumerate(zip(grids, ratios, strict=True)):
        assert len(g) == len(r)
        side = -(-size // (4 * 2**i))
        for ratio in r:
            assert side > 1
            side = -(-side // ratio)
        assert 2 <= side <= 12


def test_cost_grows_with_the_pixels():
    from transcnn.plugging.cost import count

    per_pixel = []
    for size in (512, 1024, 2048):
        auto = transcnn.create_model("transcnn_tiny", grid_sizes="auto", pool_ratios="auto", img_size=size)
        per_pixel.append(count(auto, torch.empty(1, 3, size, size, device="meta")).macs / size**2)
    assert max(per_pixel) / min(per_pixel) <= 1.1


@pytest.mark.parametrize(
    ("name", "size"),
    [("transcnn_test", (1, 3, 64, 64)), ("transcnn1d_nano", (1, 1, 800)), ("transcnn3d_nano", (1, 1, 16, 16, 16))],
)
def test_a_real_input_costs_what_one_without_numbers_does(name, size):
    """PyTorch's counter knows nothing of its own attention on a CPU."""
    from transcnn.plugging.cost import count

    model = transcnn.create_model(name)
    real, shapes = count(model, torch.zeros(size)), count(model.to("meta"), torch.empty(size, device="meta"))
    assert real == shapes
    q = torch.zeros(2, 3, 5, 8)
    attention = count(Attention(), q)
    assert attention.macs == 2 * q.numel() * 5


class Attention(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_published_weights_have_no_further_levels():
    with pytest.raises(ValueError, match="hold 2-2-2-1 levels a stage, 'auto' for img_size=2048 wants 3"):
        transcnn.create_model("transcnn_tiny", pretrained=True, grid_sizes="auto", pool_ratios="auto", img_size=2048)
    with pytest.raises(ValueError, match="both 'auto' or neither, got 'auto' and"):
        transcnn.create_model("transcnn_tiny", grid_sizes="auto", img_size=2048)
    model = transcnn.create_model("transcnn_test", grid_sizes="auto", pool_ratios="auto", img_size=600)
    assert model(torch.zeros(2, 3, 70, 50)).shape == (2, 10)
