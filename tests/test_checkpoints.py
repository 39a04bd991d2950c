"""Weights come in from every kind of file, all of them or none; what is wrong with a file is said in one line."""

from __future__ import annotations

import argparse
import http.server
import importlib.util
import io
import json
import os
import pickle
import re
import struct
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import nn

import reference
import transcnn
from transcnn.checkpoints.loading import data_config_of, load, save_weights
from transcnn.checkpoints.published import Classes, convert_state_dict, load_body
from transcnn.errors import UserError

DESIGNS = {"transcnn": {}, "hatnet": dict(design="hatnet", norm_layer="groupnorm1")}
X = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 64, 64))).float()


def make(**kwargs) -> transcnn.TransCNN:
    return transcnn.create_model("transcnn_test", **kwargs).eval()


def filled(seed: int = 0, **kwargs) -> transcnn.TransCNN:
    model = make(**kwargs)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({n: torch.from_numpy(v) for n, v in reference.weights(shapes, seed).items()})
    return model


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors under the names of the published checkpoints."""
    state = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"^stem\.", "patch_embed.", name)
        name = re.sub(r"^stages\.(\d+)\.downsample\.", lambda m: f"ds{int(m[1]) + 1}.", name)
        name = re.sub(r"^stages\.(\d+)\.blocks\.(\d+)\.", r"blocks.\1.\2.", name)
        name = name.replace(".proj_norm.", ".attn.proj_norm.").replace(".local.0.", ".").replace(".irb.", ".conv.")
        state[re.sub(r"^head\.fc\.", "classifier.1.", name)] = value
    return state


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X)


# --- what can be read ---------------------------------------------------------------------------------------------

WRAPPINGS = {
    "bare": lambda state: state,
    "module.": lambda state: prefixed(state, "module."),
    "_orig_mod.module.": lambda state: prefixed(state, "_orig_mod.module."),
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": prefixed(state, "module."), "arch": "x"},
    "model_ema": lambda state: {"model_ema": prefixed(state, "module."), "optimizer": {"state": {}}},
    "DeiT's": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 1},
    "nested twice": lambda state: {"model": {"state_dict": prefixed(state, "module.")}},
    "Lightning's": lambda state: {
        "state_dict": prefixed(state, "model."),
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{}],
    },
}


@pytest.mark.parametrize("layout", ["published", "ours"])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings(wrapping, design, layout, tmp_path):
    source = filled(**DESIGNS[design])
    state = source.state_dict() if layout == "ours" else published(source)
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "weights.pth")
    model = make(**DESIGNS[design])
    assert transcnn.load_checkpoint(model, tmp_path / "weights.pth") is model
    assert torch.equal(answers(model), answers(source))


def test_published_names_are_the_published_ones(shared):
    """The helper above makes the very names of the published files."""
    layouts = json.loads((shared / "parity" / "layouts.json").read_text())
    for name in ("transcnn_tiny", "hatnet_tiny"):
        with torch.device("meta"):
            state = published(transcnn.create_model(name))
        assert {key: list(value.shape) for key, value in state.items()} == dict(layouts[name])


@pytest.mark.parametrize("layout", ["published", "ours"])
def test_safetensors(layout, tmp_path):
    source = filled()
    state = source.state_dict() if layout == "ours" else published(source)
    save_file(state, tmp_path / "best.safetensors", metadata={"model": "transcnn_test"})
    model = transcnn.load_checkpoint(make(), str(tmp_path / "best.safetensors"))
    assert torch.equal(answers(model), answers(source))


def test_averaged_weights_are_preferred(tmp_path):
    average, raw = filled(1), filled(2)
    contents = [
        {"model": raw.state_dict(), "model_ema": average.state_dict()},
        {"state_dict": raw.state_dict(), "state_dict_ema": prefixed(average.state_dict(), "module.")},
        {"state_dict": prefixed(raw.state_dict(), "model.") | prefixed(average.state_dict(), "ema_model.module.")},
        {"model": raw.state_dict(), "model_ema": None, "only raw": True},
    ]
    for content in contents:
        torch.save(content, tmp_path / "last.ckpt")
        model = transcnn.load_checkpoint(make(), tmp_path / "last.ckpt")
        assert torch.equal(answers(model), answers(raw if "only raw" in content else average))


def test_a_lightning_run_with_averages(tmp_path):
    """Lightning's EMAWeightAveraging keeps the averages under ``state_dict``."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = filled()
            self.save_hyperparameters({"lr": 0.1})

        def training_step(self, batch):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(X, batch_size=2, num_workers=0)

    task = Task()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, save_last=True)],
    )
    with warnings.catch_warnings():  # Lightning warns of few workers and few batches
        warnings.simplefilter("ignore")
        trainer.fit(task)
    model = transcnn.load_checkpoint(make(), tmp_path / "last.ckpt")
    assert torch.equal(answers(model), answers(task.model))  # after fit, the module holds the averages
    assert not torch.equal(answers(model), answers(filled()))


def test_another_head_stays_fresh(tmp_path, caplog):
    source = filled()
    torch.save(published(source), tmp_path / "weights.pth")
    torch.manual_seed(3)
    fresh = make(num_classes=4)
    head = fresh.head.fc.weight.clone()
    model = transcnn.load_checkpoint(fresh, tmp_path / "weights.pth")
    assert torch.equal(model.head.fc.weight, head)
    assert torch.equal(model.forward_features(X), source.forward_features(X))
    assert "another number of classes: head.fc.weight, head.fc.bias stay fresh" in caplog.text
    caplog.clear()
    headless = transcnn.load_checkpoint(make(num_classes=0), tmp_path / "weights.pth")
    assert torch.equal(headless(X), source.forward_head(source.forward_features(X), pre_logits=True))
    assert not caplog.text


@pytest.mark.parametrize("in_chans", [1, 2, 4, 9])
def test_other_channels_adapt_as_timm_does(in_chans, tmp_path):
    torch.save(filled().state_dict(), tmp_path / "weights.pth")
    ours = transcnn.load_checkpoint(make(in_chans=in_chans), tmp_path / "weights.pth")
    theirs = make(in_chans=in_chans, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_features_only_takes_the_same_files(tmp_path):
    source = filled()
    features = source.forward_intermediates(X, intermediates_only=True)
    for state in published(source), {"state_dict": prefixed(source.state_dict(), "model.")}:
        torch.save(state, tmp_path / "weights.pth")
        extractor = transcnn.load_checkpoint(make(features_only=True), tmp_path / "weights.pth")
        assert all(torch.equal(a, b) for a, b in zip(extractor(X), features, strict=True))
        below = make(features_only=True)
        assert load_body(below, tmp_path / "weights.pth") == (len(below.state_dict()), [])
        assert all(torch.equal(a, b) for a, b in zip(below(X), features, strict=True))


def test_other_models_load_their_own_names(tmp_path):
    source = nn.Sequential(transcnn.HMHSA(8), nn.Conv2d(8, 4, 1))
    torch.save({"state_dict": prefixed(source.state_dict(), "model.")}, tmp_path / "weights.pth")
    target = nn.Sequential(transcnn.HMHSA(8), nn.Conv2d(8, 4, 1))
    transcnn.load_checkpoint(target, tmp_path / "weights.pth")
    assert all(
        torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_converting_twice_changes_nothing():
    model = filled(**DESIGNS["hatnet"])
    once = convert_state_dict(published(model), model)
    assert once.keys() == model.state_dict().keys()
    assert convert_state_dict(once, model).keys() == once.keys()


# --- what does not fit --------------------------------------------------------------------------------------------


def test_everything_wrong_is_listed_in_one_error_and_nothing_is_loaded(tmp_path):
    state = published(filled())
    del state["patch_embed.3.bias"], state["blocks.0.0.attn.q.weight"]
    state["blocks.1.0.attn.extra.weight"] = torch.zeros(3)
    state["ds2.conv.weight"] = torch.zeros(16, 9, 3, 3)
    torch.save({"model": prefixed(state, "module.")}, tmp_path / "weights.pth")
    model = make()
    before = answers(model)
    with pytest.raises(UserError) as caught:
        transcnn.load_checkpoint(model, tmp_path / "weights.pth")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'weights.pth'} does not fit this TransCNN: ")
    for expected in (
        ": 2 missing: stem.3.bias, stages.0.blocks.0.attn.q.weight; ",
        "1 unexpected: stages.1.blocks.0.attn.extra.weight",
        "1 of another shape: stages.1.downsample.conv.weight (16, 9, 3, 3) instead of (16, 8, 3, 3)",
    ):
        assert expected in message
    assert "\n" not in message
    assert torch.equal(answers(model), before)


def test_a_checkpoint_of_another_model(tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"does not fit this TransCNN: \d+ missing: stem.0.weight.*unexpected: conv1"):
        transcnn.load_checkpoint(make(), tmp_path / "weights.pth", strict=True)
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="does not fit this TransCNN"):  # nothing at all fits
        transcnn.load_checkpoint(make(), tmp_path / "weights.safetensors", strict=False)


def test_more_levels_than_the_published_two(tmp_path, caplog):
    source = filled()
    torch.save(published(source), tmp_path / "weights.pth")
    levels = dict(grid_sizes=[(4, 2), 4, 2, None], pool_ratios=[(4, 1), 2, 2, None])
    with pytest.raises(UserError, match=r"missing: stages.0.blocks.0.attn.local.1.norm.weight"):
        transcnn.load_checkpoint(make(**levels), tmp_path / "weights.pth")
    model = transcnn.load_checkpoint(make(**levels), tmp_path / "weights.pth", strict=False)
    assert "fits in part, what is missing or of another shape stays fresh" in caplog.text
    assert "stages.0.blocks.0.attn.local.1.qkv.weight" in caplog.text
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# --- files that can't be read -------------------------------------------------------------------------------------


class Attack:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_a_file_that_would_run_code_is_refused(suffix, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"weights{suffix}"
    torch.save({"state_dict": Attack()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"is refused: reading it would run code \((posix|nt)\.system\)") as caught:
        transcnn.load_checkpoint(make(), path)
    assert "\n" not in str(caught.value)
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError):
        transcnn.load_checkpoint(make(), path)
    assert not (tmp_path / "pwned").exists()


def broken_files() -> dict[str, bytes]:
    state = filled().state_dict()
    torch.save(state, buffer := io.BytesIO())
    zipped, safe = buffer.getvalue(), save(state)
    header = json.dumps({"stem.0.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    return {
        "empty.pth": b"",
        "text.pth": b"<html>404 Not Found</html>",
        "truncated.pth": zipped[: len(zipped) // 2],
        "number.pth": pickle.dumps(3),
        "empty.safetensors": b"",
        "text.safetensors": b"version https://git-lfs.github.com/spec/v1\n",
        "truncated.safetensors": safe[: len(safe) // 2],
        "huge_header.safetensors": struct.pack("<Q", 1 << 62) + safe[8:],
        "huge_tensor.safetensors": struct.pack("<Q", len(header)) + header + bytes(64),
        "torch.safetensors": zipped,
        "safetensors.pth": safe,
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_file_is_named_in_one_line(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        transcnn.load_checkpoint(make(), path)
    assert "\n" not in str(caught.value)


def test_no_file_no_dictionary(tmp_path):
    with pytest.raises(UserError, match=f"no checkpoint file at {tmp_path / 'none.pth'}"):
        transcnn.load_checkpoint(make(), tmp_path / "none.pth")
    with pytest.raises(UserError, match="no checkpoint file at"):
        transcnn.load_checkpoint(make(), tmp_path)
    for content, kind in ([torch.zeros(3)], "list"), ({1: torch.zeros(3)}, "dict"), (torch.zeros(2), "Tensor"):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=f"holds no weights by name, but a {kind}"):
            transcnn.load_checkpoint(make(), tmp_path / "weights.pth")
    torch.save({"model": {"stem.0.weight": "text"}, "epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"missing: stem.0.weight, "):
        transcnn.load_checkpoint(make(), tmp_path / "weights.pth")


# --- pretrained=True ----------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """Serves a folder on the loopback interface and counts what is asked of it; gives (folder, address, requests)."""
    folder, requests = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()
        thread.join()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("nest", ["bare", "nested"])
@pytest.mark.parametrize("design", DESIGNS)
def test_pretrained_downloads_once(design, nest, server, hub):
    folder, address, requests = server
    source = filled(**DESIGNS[design])
    state = published(source)
    torch.save(state if nest == "bare" else {"model_ema": prefixed(state, "module.")}, folder / "Test.pth")
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(url=f"{address}/Test.pth"), **DESIGNS[design])
    assert torch.equal(answers(make(**options)), answers(source))
    assert (hub / "Test.pth").is_file()
    assert torch.equal(answers(make(**options)), answers(source))
    assert len(requests) == 1
    extractor = make(features_only=True, **options)
    assert torch.equal(extractor(X)[3], source.forward_features(X))
    assert make(num_classes=2, in_chans=1, **options)(X[:, :1]).shape == (2, 2)


def test_pretrained_with_a_published_layout(server, hub, shared):
    """The whole of transcnn_tiny, by the file that parity/weights.py makes."""
    spec = importlib.util.spec_from_file_location("parity_weights", shared / "parity" / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    folder, address, _ = server
    state = {name: torch.from_numpy(value) for name, value in weights.state_dict("transcnn_tiny").items()}
    torch.save(state, folder / "TransCNN-Tiny.pth")
    overlay = dict(url=f"{address}/TransCNN-Tiny.pth")
    model = transcnn.create_model("transcnn_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.fc.weight, state["classifier.1.weight"])
    assert torch.equal(model.stages[3].blocks[1].attn.qkv.weight, state["blocks.3.1.attn.qkv.weight"])
    assert torch.equal(model.stages[0].blocks[1].attn.local[0].qkv.bias, state["blocks.0.1.attn.qkv.bias"])


def test_pretrained_addresses():
    for name, file in {
        "transcnn_tiny": "v1.0/TransCNN-Tiny.pth",
        "transcnn_large": "v1.0/TransCNN-Large.pth",
        "hatnet_medium": "v2.0/HAT-Net_Medium.pth",
    }.items():
        url = timm.models.get_pretrained_cfg(name).url
        assert url == f"https://github.com/yun-liu/TransCNN/releases/download/{file}"


# --- numbers that are none of a network's ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: (w * 100).to(torch.int8), r"stem.0.weight \(int8 instead of float32\)"),
        (lambda w: w > 0, r"stem.0.weight \(bool instead of float32\)"),
        (lambda w: w.to(torch.complex64), r"stem.0.weight \(complex64 instead of float32\)"),
        (lambda w: torch.full_like(w, torch.nan), r"stem.0.weight \(not finite: NaN or infinity\)"),
        (lambda w: w.clone().fill_(0).index_fill_(0, torch.tensor(0), torch.inf), "not finite"),
        (lambda w: w.to("meta"), "without values"),
    ],
    ids=["int8", "bool", "complex", "nan", "inf", "meta"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_numbers_that_a_network_cannot_have(tmp_path, change, why, strict):
    state = filled().state_dict()
    state["stem.0.weight"] = change(state["stem.0.weight"])
    torch.save(state, tmp_path / "weights.pth")
    model = make()
    before = answers(model)
    with pytest.raises(UserError, match=f"does not fit this TransCNN: 1 not usable: .*{why}"):
        transcnn.load_checkpoint(model, tmp_path / "weights.pth", strict=strict)
    assert torch.equal(answers(model), before)
    body = transcnn.create_model("transcnn_test", features_only=True)
    with pytest.raises(UserError, match="not usable"):
        load_body(body, tmp_path / "weights.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken(tmp_path, dtype):
    source = filled()
    torch.save(source.to(dtype).state_dict(), tmp_path / "weights.pth")
    model = transcnn.load_checkpoint(make(), tmp_path / "weights.pth")
    assert model.stem[0].weight.dtype == torch.float32
    assert torch.equal(answers(model), answers(source.float()))


def test_compressed_archives_are_refused(tmp_path):
    import zipfile

    torch.save({"x": torch.zeros(10**6)}, tmp_path / "weights.pth")
    with (
        zipfile.ZipFile(tmp_path / "weights.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(UserError, match="compressed archive"):
        transcnn.load_checkpoint(make(), tmp_path / "bomb.pth")


# --- classes of other names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "taken", "said"),
    [
        ("abc", "abc", {0: 0, 1: 1, 2: 2}, ""),
        ("abc", "cab", {0: 2, 1: 0, 2: 1}, r"3 classes are taken by name \(c, a, b\)$"),
        ("abc", "xbc", {1: 1, 2: 2}, r"2 classes are taken by name \(b, c\), those of x start anew"),
        ("abc", "xyz", {}, "the last layer starts anew"),
        ("abcde", "eb", {0: 4, 1: 1}, r"2 classes are taken by name \(e, b\)"),
        ("ab", "abcd", {0: 0, 1: 1}, "those of c, d start anew"),
        ("aab", "baa", {0: 2, 1: 0, 2: 1}, "3 classes are taken by name"),  # two of one name stay apart
        ("ab", "aab", {0: 0, 2: 1}, "those of a start anew"),
    ],
)
@pytest.mark.parametrize("name", ["transcnn_test", "resnet10t"])
def test_the_last_layer_is_taken_by_the_classes_names(tmp_path, caplog, theirs, ours, taken, said, name):
    source = timm.create_model(name, num_classes=len(theirs))
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    model = timm.create_model(name, num_classes=len(ours))
    fresh = {key: value.clone() for key, value in model.get_classifier().state_dict().items()}
    transcnn.load_checkpoint(model, tmp_path / "x.safetensors", classes=Classes(list(theirs), list(ours)))
    for key, value in model.get_classifier().state_dict().items():
        old = source.get_classifier().state_dict()[key]
        wanted = [old[taken[i]] if i in taken else fresh[key][i] for i in range(len(ours))]
        assert torch.equal(value, torch.stack(wanted))
    rest = [key for key in source.state_dict() if not key.startswith(("head.fc", "fc."))]
    assert all(torch.equal(model.state_dict()[key], source.state_dict()[key]) for key in rest)
    assert re.search(said, caplog.text.strip()) if said else not caplog.text


def test_a_head_for_other_classes_can_be_an_error(tmp_path):
    save_file(filled().state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"head.fc.weight \(another number of classes\)"):
        transcnn.load_checkpoint(make(num_classes=3), tmp_path / "x.safetensors", new_head=False)


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authors(tmp_path_factory) -> Path:
    """A file as the authors publish theirs: bare tensors under their names."""
    path = tmp_path_factory.mktemp("authors") / "TransCNN-Test.pth"
    torch.save(published(filled(num_classes=3)), path)
    return path


def test_published_files_on_the_command_line(authors, class_folder, tmp_path, monkeypatch):
    from transcnn.commands.demo import demo
    from transcnn.commands.evaluate import evaluate
    from transcnn.commands.explain import explain
    from transcnn.commands.export import export
    from transcnn.commands.predict import predict

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transcnn.export.exporting.export_model", lambda loaded, *_, **__: loaded)
    image = str(next(class_folder.rglob("*.png")))
    name = "transcnn_test"
    loaded = load(authors, name)
    assert torch.equal(answers(loaded.model), answers(filled(num_classes=3)))
    assert loaded.class_names == ["0", "1", "2"]
    rows = predict(str(authors), [image], model=name, quiet=True, accelerator="cpu")
    assert [row["label"] for row in rows[0]["top"]] != []
    names = [path.name for path in class_folder.iterdir()]
    for old, new in zip(sorted(names), "012", strict=True):
        (class_folder / old).rename(class_folder / new)
    assert evaluate(str(authors), str(class_folder), model=name, quiet=True, accelerator="cpu")["images"] == 24
    image = str(next(class_folder.rglob("*.png")))
    assert Path(explain(str(authors), image, model=name, out="x.png", quiet=True)).is_file()
    exported = export(str(authors), model=name, out="x.onnx", quiet=True)  # what comes after has its own tests
    assert torch.equal(answers(exported.model), answers(loaded.model))
    with pytest.raises(UserError, match="give its name"):
        demo(str(authors), quiet=True)


def test_what_model_cannot_mean(authors, tmp_path):
    for call, match in (
        (lambda: load(authors), "give its name, such as --model transcnn_tiny"),
        (lambda: load(authors, "transcnn_tini"), "no model is named 'transcnn_tini'"),
        (lambda: load(authors, "resnet10t"), "it holds no fc.weight"),
        (lambda: load(authors, "transcnn_nano"), "bytes, too few for a network of 1,439,523 weights"),
        (lambda: load(authors, "hf-hub:x/y"), "named as timm lists it"),
        (lambda: load(tmp_path, "transcnn_test"), "model is for a file"),
        (lambda: load("transcnn_nano.cifar10", "transcnn_nano"), "model is for a file"),
    ):
        with pytest.raises(UserError, match=match):
            call()
    model = make(num_classes=2)
    info = {"model": "transcnn_test", "class_names": ["a", "b"], "data_config": data_config_of(model, 3, 32)}
    save_weights(tmp_path / "x.safetensors", model, info)
    assert load(tmp_path / "x.safetensors", "transcnn_test").class_names == ["a", "b"]
    with pytest.raises(UserError, match="is for 'transcnn_test', got model=transcnn_tiny"):
        load(tmp_path / "x.safetensors", "transcnn_tiny")
    save_weights(tmp_path / "y.safetensors", model, {**info, "class_names": ["a", "b", "c"]})
    with pytest.raises(UserError, match="another number of classes"):  # not a random head
        load(tmp_path / "y.safetensors")
    save_weights(tmp_path / "z.safetensors", {k: v * torch.nan for k, v in model.state_dict().items()}, info)
    with pytest.raises(UserError, match="not finite"):
        load(tmp_path / "z.safetensors")
