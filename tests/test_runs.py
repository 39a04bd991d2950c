"""Run directories, files written whole, and models loaded from whatever names one."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from transcnn.checkpoints import loading
from transcnn.checkpoints.files import atomic_write, check_writable, remove_stale_temporaries
from transcnn.checkpoints.published import load_checkpoint
from transcnn.data.sets.classify import open_splits
from transcnn.distributed import runtime
from transcnn.errors import UserError
from transcnn.plugging.build import build_model
from transcnn.training import checkpointing, faults, run_dir

INFO = {"model": "transcnn_test", "model_args": {}, "class_names": ["kiwi", "crème brûlée"], "task": "classify"}


@pytest.fixture
def network():
    return build_model("transcnn_test", num_classes=2, in_chans=1).eval()


@pytest.fixture
def info(network):
    return {**INFO, "data_config": loading.data_config_of(network, 1, 32)}


def test_weights_come_back_with_what_they_need(tmp_path, network, info):
    loading.save_weights(tmp_path / "best.safetensors", network, info)
    x = torch.randn(2, 1, 32, 32)
    for source in (tmp_path, str(tmp_path / "best.safetensors")):  # a run directory, a file
        loaded = loading.load(source)
        assert torch.equal(loaded.model(x), network(x))
        assert loaded.class_names == ["kiwi", "crème brûlée"]
        assert loaded.preprocessing["input_size"] == [1, 32, 32]
        assert loaded.task == "classify"
        assert not loaded.model.training


def test_a_lightning_checkpoint_is_loaded_too(tmp_path, network, info):
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state, "transcnn": info}, tmp_path / "last.ckpt")
    loaded = loading.load(tmp_path)
    assert loaded.source.endswith("last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), loaded.model.parameters(), strict=True))


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def full(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        atomic_write(path, full)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    before = os.umask(0o027)
    try:
        atomic_write(path, lambda temporary: temporary.write_text("new"))
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_stale_temporaries_that_stay_end_nothing(tmp_path):
    (tmp_path / ".a.1.tmp").write_bytes(b"half")
    (tmp_path / ".b.2.tmp").mkdir()  # can't be unlinked, as nothing can in a folder that is read only
    remove_stale_temporaries(tmp_path)
    assert os.listdir(tmp_path) == [".b.2.tmp"]


@pytest.mark.parametrize("linked", [False, True])
def test_pipes_and_devices_keep_their_place(tmp_path, linked):
    """``--csv /dev/stdout`` of root put a file in its place."""
    pipe = path = tmp_path / "pipe"
    os.mkfifo(pipe)
    if linked:
        path = tmp_path / "link"
        path.symlink_to(pipe)
    came = []
    reader = threading.Thread(target=lambda: came.append(pipe.read_text()), daemon=True)
    reader.start()
    check_writable(path)
    atomic_write(path, lambda target: target.write_text("rows"))
    reader.join(10)
    assert came == ["rows"]
    assert pipe.is_fifo()
    assert path.is_symlink() == linked
    assert sorted(os.listdir(tmp_path)) == sorted({pipe.name, path.name})
    with pytest.raises(UserError, match="No space left on device"):
        atomic_write(Path("/dev/full"), lambda target: target.write_text("rows"))


def test_what_went_wrong_is_noted_whatever_names_hold(tmp_path):
    checkpointing.note(tmp_path, "can't read caf\udce9\n2026-01-01 00:00:00  all is well")
    assert (tmp_path / "faults.log").read_text().count("\n") == 1
    assert "caf\\xe9\\n2026" in (tmp_path / "faults.log").read_text()


def test_a_batch_that_is_not_finite_is_listed_whatever_its_names(tmp_path):
    learner: Any = SimpleNamespace(model=nn.Sequential(), loss=lambda batch: None, last_loss=float("nan"))
    loader = SimpleNamespace(names=lambda index: ["caf\udce9.png"])
    trainer: Any = SimpleNamespace(train_dataloader=loader, current_epoch=0, global_step=2, is_global_zero=True)
    trainer.optimizers = [SimpleNamespace(param_groups=[{"lr": 0.1}])]
    faults.SkipNonFinite(tmp_path, SimpleNamespace(hold=False))._report(trainer, learner)  # pyright: ignore
    assert json.loads((tmp_path / "nonfinite.json").read_text(encoding="utf-8"))["files"] == ["caf\udce9.png"]


def test_run_directories_are_fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [run_dir.new_run_dir(None, "a/model", "my data") for _ in range(3)]
    assert len(set(made)) == 3
    assert all(
        path.is_dir() and path.parent == Path("runs") and path.name.split("-", 2)[2].startswith("a-model-my-data")
        for path in made
    )
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't write to the run directory"):
        run_dir.new_run_dir(str(tmp_path / "file" / "run"), "m", "d")
    with pytest.raises(UserError, match="can't write to the run directory"):
        run_dir.new_run_dir(str(tmp_path / "file"), "m", "d")


@pytest.mark.parametrize("out", ["s3://bucket/run", "a::b", "data:run"])
def test_addresses_are_no_run_directories(out, tmp_path, monkeypatch):
    """What writes checkpoints takes these for addresses; a folder named s3: is not what anybody means."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the run directory is a folder of this machine"):
        run_dir.new_run_dir(out, "m", "d")
    with pytest.raises(UserError, match="the run directory's name must be UTF-8"):
        run_dir.new_run_dir(os.fsdecode(b"runs \xff"), "m", "d")
    assert not list(tmp_path.iterdir())
    assert run_dir.new_run_dir("läufe #1 [x]", "m", "d").is_dir()


def test_runs_inside_of_a_data_set_are_no_class(tmp_path, class_image):
    """As those of ``transcnn train .`` in the data's folder: the same run could not go on, and the next learnt them."""
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/old/2.png", "runs/one/report/map.png", "mine/samples.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        class_image(0, 0).save(tmp_path / name)
    for run in ("runs/one", "mine"):
        for name in ("config.yaml", "data.json", "left.out"):
            (tmp_path / run / name).touch()
    splits = open_splits(str(tmp_path), val_fraction=0.5)
    assert splits.class_names == ["cat", "dog"]
    assert len(splits.train) + len(splits.val) == 4
    assert not splits.broken


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or directory"),
        (lambda path: path.write_bytes(b""), "can't read"),
        (lambda path: path.write_bytes(b"\xff" * 64), "can't read"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "doesn't say which model"),
    ],
)
def test_files_that_are_no_weights_of_ours(tmp_path, make, message):
    path = tmp_path / "weights.safetensors"
    make(path)
    with pytest.raises(UserError, match=message):
        loading.load(path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    torch.save({"state_dict": {}, "transcnn": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"can't read .*last.ckpt: reading it would run code \(\w+.mkdir\)"):
        loading.load(tmp_path)
    assert not marker.exists()


def test_names_and_folders_that_are_nothing(tmp_path):
    with pytest.raises(UserError, match=r"is no run directory: it holds neither best.safetensors nor last.ckpt$"):
        loading.load(tmp_path)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.safetensors").touch()
    os.utime(tmp_path / "old", (0, 0))
    with pytest.raises(UserError, match=r"is no run directory: .*; did you mean .*/new\?$"):
        loading.load(tmp_path)
    with pytest.raises(UserError, match=r"nothing to resume: .*; did you mean .*/new\?$"):
        checkpointing.newest_good(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint file at .*/new, which is a folder: give .*/best.safetensors$"):
        load_checkpoint(torch.nn.Identity(), tmp_path / "new")
    (tmp_path / "config.yaml").write_text("model: transcnn_nano")
    with pytest.raises(UserError, match=r"can't read .*config.yaml: torch.save did not write it$"):
        loading.load(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"no file or folder transcnn_tini, and no model .* near .*: transcnn_tiny"):
        loading.load("transcnn_tini")
    with pytest.raises(UserError, match="can't make transcnn_test"):  # there are no published weights of it
        loading.load("transcnn_test")


def test_how_images_become_input(network):
    config = loading.data_config_of(network, 4, 48)
    assert config["input_size"] == [4, 48, 48]
    assert len(config["mean"]) == len(config["std"]) == 4
    assert config["crop_pct"] == 1.0
    big = loading.data_config_of(build_model("resnet10t"), 3, 200)
    assert big["input_size"] == [3, 200, 200]
    assert big["crop_pct"] < 1


def test_runs_that_start_in_the_same_second_have_a_directory_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_dir.time, "strftime", lambda _: "20260101-000000")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: run_dir.new_run_dir(None, "model", "data"), range(24)))
    assert len(set(made)) == 24
    assert run_dir.new_run_dir(None, "m" * 300, "data").is_dir()  # a name that fits


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_a_run_directory_is_locked_until_its_process_ends(tmp_path):
    lock, other = run_dir.RunLock(), run_dir.RunLock()
    lock.acquire(tmp_path)
    lock.acquire(tmp_path)  # again, as a run does that goes back to its last checkpoint
    with pytest.raises(UserError, match="another process is training in the run directory"):
        other.acquire(tmp_path)
    with pytest.raises(UserError, match="another process is training in the run directory"):
        run_dir.new_run_dir(tmp_path, "model", "data", other)
    loader = os.fork()  # has all descriptors of this process
    if not loader:
        time.sleep(60)
        os._exit(0)
    lock.release()
    time.sleep(0.2)
    other.acquire(tmp_path)
    os.kill(loader, signal.SIGKILL)
    os.waitpid(loader, 0)
    other.release()

    reader, writer = os.pipe()
    holder = os.fork()
    if not holder:
        run_dir.RunLock.acquire(kept := run_dir.RunLock(), tmp_path)
        os.write(writer, b"x")
        time.sleep(60)
        kept.release()
        os._exit(0)
    os.read(reader, 1)
    with pytest.raises(UserError, match="another process is training"):
        lock.acquire(tmp_path)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    lock.acquire(tmp_path)
    lock.release()
    assert not list(tmp_path.iterdir())


def test_no_epoch_without_finite_figures_is_the_best(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpointing, "save_weights", lambda path, state, info: saved.append(info["epoch"]))
    keep = checkpointing.KeepWeights(tmp_path, {}, {}, None, "loss")
    network = SimpleNamespace(score="top1", model=torch.nn.Linear(1, 1))
    nan, inf = float("nan"), float("inf")
    for epoch, loss in enumerate((nan, inf, 1.0, nan, 2.0, 0.5, -inf)):
        figures = {"val_loss": torch.tensor(loss), "val_top1": torch.tensor(50.0)}
        trainer = SimpleNamespace(callback_metrics=figures, current_epoch=epoch, callbacks=[], is_global_zero=True)
        keep.on_validation_end(trainer, network)  # pyright: ignore
    assert saved == [3, 6]
    assert keep.figures["val_loss"] == 0.5
    keep = checkpointing.KeepWeights(tmp_path, {}, {}, None, "top1")  # whose own figure says nothing
    figures = {"val_loss": torch.tensor(nan), "val_top1": torch.tensor(50.0)}
    trainer = SimpleNamespace(callback_metrics=figures, current_epoch=0, callbacks=[], is_global_zero=True)
    keep.on_validation_end(trainer, network)  # pyright: ignore
    assert keep.best_epoch == 0


def test_figures_of_weights_that_are_gone_are_no_longer_to_be_beaten(tmp_path):
    keep = checkpointing.KeepWeights(tmp_path, {}, {}, None, "top1")
    keep.load_state_dict({"best_epoch": 3, "figures": {"val_top1": 90.0}})
    (tmp_path / checkpointing.BEST).touch()
    keep.on_train_start(None, None)  # pyright: ignore
    assert keep.best_epoch == 3
    (tmp_path / checkpointing.BEST).unlink()
    keep.on_train_start(None, None)  # pyright: ignore
    assert (keep.best_epoch, keep.figures) == (0, {})


def test_with_a_gradient_scaler_updates_count_that_no_scale_can_help(tmp_path):
    """Overflow is how it finds its scale, but statistics must not keep it; a run without finite numbers ends."""
    norm = torch.nn.BatchNorm1d(2)
    keep: Any = SimpleNamespace(hold=False)
    skip = faults.SkipNonFinite(tmp_path, keep, limit=2, rollback=False)
    skip._report = lambda *_: {"module": "norm"}  # pyright: ignore
    scaler = SimpleNamespace(get_scale=lambda: 64.0)
    plugin = SimpleNamespace(scaler=scaler)
    trainer: Any = SimpleNamespace(
        precision_plugin=plugin, accumulate_grad_batches=1, is_global_zero=True, global_step=0
    )
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)

    def overflow() -> None:
        skip.on_train_batch_start(trainer, norm, None, 0)  # pyright: ignore
        norm(torch.tensor([[1.0, 2.0], [math.inf, 1.0]])).sum().backward()
        assert not norm.running_mean.isfinite().all()  # pyright: ignore
        skip.on_before_optimizer_step(trainer, norm, optimizer)  # pyright: ignore

    for _ in range(3):
        overflow()
        assert norm.running_mean.isfinite().all()  # pyright: ignore
        assert (skip.in_a_row, keep.hold) == (0, False)
    scaler.get_scale = lambda: 0.5
    overflow()
    assert (skip.in_a_row, keep.hold) == (1, True)
    with pytest.raises(UserError, match="2 updates in a row"):
        overflow()


def test_output_that_cannot_be_written_is_dropped(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    for target in (os.fdopen(writer, "w"), Path("/dev/full").open("w")):  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", target)
        monkeypatch.setattr(sys, "stderr", target)
        with runtime.lasting_output():
            for _ in range(3):
                print("x" * 100_000, flush=True)
                Console(stderr=True).print("y\n" * 5_000)
        assert sys.stdout is target
        target.close()  # nothing is left that could fail
