"""Training: what it learns, what it writes, and that a run which was cut off goes on as if it had not been."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any

import lightning
import pytest
import timm
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from timm.optim import create_optimizer_v2

from transcnn.checkpoints.loading import data_config_of, load, read_info, save_weights
from transcnn.cli import main
from transcnn.commands.train import train
from transcnn.dense.build import build_network
from transcnn.distributed import runtime
from transcnn.errors import UserError
from transcnn.fast.cuda_graphs import CapturedTraining
from transcnn.fast.training.attention import KernelHMHSA
from transcnn.plugging.build import build_model
from transcnn.settings import Augment, Ema, Optim, TrainSettings
from transcnn.tasks import get_task
from transcnn.tasks.classify import Classify
from transcnn.training import callbacks, run
from transcnn.training.building import make_network
from transcnn.training.run import write_samples
from transcnn.training.run_dir import RunLock

pytestmark = pytest.mark.usefixtures("no_report")
WRITE_REPORT = Classify.write_report
QUICK: dict[str, Any] = dict(
    model="transcnn_test", batch_size=4, precision="32", accelerator="cpu", num_workers=0, img_size=32, quiet=True
)
# Everything that draws random numbers or keeps a state of its own.
BUSY: dict[str, Any] = dict(
    QUICK,
    drop_rate=0.2,
    drop_path_rate=0.2,
    augment=Augment(mixup=0.4, cutmix=1.0, reprob=0.5, policy="small"),
    optim=Optim(warmup_epochs=0.5, accumulate=2),
    lr=3e-3,
    epochs=2,
)


@pytest.fixture
def folder(make_class_folder) -> str:
    """Two classes, 12 images each: 22 for training (5 batches an epoch), 2 for validation."""
    return str(make_class_folder(classes=2, per_class=12))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, class_image, drawing_off) -> tuple[str, Path]:
    """The same images, and a run on them that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    for label in range(2):
        (folder / "images" / f"class_{label}").mkdir(parents=True)
        for i in range(12):
            class_image(label, i).save(folder / "images" / f"class_{label}" / f"{i:03}.png")
    with drawing_off():
        return str(folder / "images"), train(str(folder / "images"), **BUSY, out=str(folder / "run")).run_dir


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def steady(run: Path) -> list[dict[str, str]]:
    """The rows without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows_of(run)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.ckpt", weights_only=True)["current_model_state"]


def assert_same_run(a: Path, b: Path) -> None:
    one, two = weights_of(a), weights_of(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    best = [load(run).model.state_dict() for run in (a, b)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    assert steady(a) == steady(b)


def test_a_network_learns_and_the_run_directory_is_complete(make_class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Classify, "write_report", WRITE_REPORT)
    monkeypatch.setattr("transcnn.training.run.write_samples", write_samples)
    data = make_class_folder(classes=3, per_class=30)
    result = train(
        str(data), **dict(QUICK, batch_size=8), epochs=12, lr=5e-3, ema=Ema(ema_decay=0.9), out=str(tmp_path / "run")
    )
    run = result.run_dir
    assert sorted(p.name for p in run.iterdir() if "tfevents" not in p.name) == [
        "best.safetensors",
        "checksums.sha256",
        "config.yaml",
        "data.json",
        "last.ckpt",
        "metrics.csv",
        "metrics.json",
        "previous.ckpt",
        "report",
    ]
    assert len([p for p in run.iterdir() if "tfevents" in p.name]) == 1
    assert {"index.html", "augmented.png"} <= {p.name for p in (run / "report").iterdir()}
    assert yaml.safe_load((run / "config.yaml").read_text())["lr"] == 5e-3

    rows = rows_of(run)
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) - 0.2
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    assert metrics["top1"] > 80  # a third by chance
    assert metrics["split"] == "val"
    assert (
        metrics["val_top1"] == pytest.approx(metrics["top1"]) == pytest.approx(max(float(r["val_top1"]) for r in rows))
    )
    assert set(metrics["class_accuracy"]) == {"class_0", "class_1", "class_2"}
    assert metrics["images"] == 9
    assert "top5" not in metrics  # three classes only

    info = read_info(run / "best.safetensors")
    assert info["model"] == "transcnn_test"
    assert info["epoch"] == metrics["best_epoch"]
    assert info["data_config"]["input_size"] == [3, 32, 32]


@pytest.mark.parametrize("stop_after", [3, 5, 7])  # inside an update, at the end of an epoch, inside the second
def test_a_killed_run_goes_on_exactly(whole, tmp_path, monkeypatch, stop_after):
    folder, undisturbed = whole
    seen = 0
    original = callbacks.StopOnSignal.on_train_batch_end

    def die(self: Any, trainer: Any, *args: Any) -> None:
        nonlocal seen
        original(self, trainer, *args)
        seen += 1
        if seen > stop_after:  # this step is lost: its checkpoint was never written
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.StopOnSignal, "on_train_batch_end", die)
        with pytest.raises(ZeroDivisionError):
            train(folder, **BUSY, save_every=1, out=str(tmp_path / "cut"))
    torch.manual_seed(12345)  # whatever state the process is in
    train(resume=str(tmp_path / "cut"), quiet=True)
    assert_same_run(undisturbed, tmp_path / "cut")
    assert sorted(p.name for p in (tmp_path / "cut").glob("*.ckpt")) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_checkpoint(whole, tmp_path, monkeypatch, signum):
    folder, undisturbed = whole
    original = callbacks.History.on_train_batch_end

    def send(self: Any, trainer: Any, *args: Any) -> None:
        original(self, trainer, *args)
        if trainer.current_epoch == 1 and args[-1] == 2:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.History, "on_train_batch_end", send)
        with pytest.raises(callbacks.Interrupted, match="--resume") as caught:
            train(folder, **BUSY, out=str(tmp_path / "cut"))
    assert caught.value.signum == signum
    assert signal.getsignal(signum) == before
    train(resume=str(tmp_path / "cut" / "last.ckpt"), quiet=True)
    assert_same_run(undisturbed, tmp_path / "cut")


def test_resume_keeps_the_settings_but_can_train_longer(folder, tmp_path):
    settings = dict(QUICK, optim=Optim(warmup_epochs=0))
    run = train(folder, **settings, epochs=1, out=str(tmp_path / "run")).run_dir
    with pytest.raises(UserError, match=r"lr is 0.001 there, got 0.5"):
        train(resume=str(run), lr=0.5)
    train(resume=str(run), epochs=3, quiet=True)
    recipe = yaml.safe_load((run / "config.yaml").read_text())  # for a run of its own: it doesn't go on with this one
    assert [recipe["epochs"], recipe["resume"]] == [3, None]
    assert [row["epoch"] for row in rows_of(run)] == ["1", "2", "3"]
    longer = rows_of(train(folder, **settings, epochs=3, out=str(tmp_path / "longer")).run_dir)
    rates, wanted = ([float(row["lr"]) for row in rows] for rows in (rows_of(run), longer))
    assert rates[0] < wanted[0]
    assert rates[1:] == wanted[1:]  # the schedule is that of all three epochs now
    with pytest.raises(UserError, match="nothing to resume"):
        train(resume=str(tmp_path / "nowhere"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not written by transcnn train"):
        train(resume=str(tmp_path / "other.ckpt"))


def test_a_new_run_never_enters_an_older_ones_directory(folder, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        train(folder, **QUICK, out=str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    runs = [train(folder, **QUICK, epochs=1, limit_batches=1).run_dir for _ in range(2)]
    assert runs[0] != runs[1]
    assert all(run.parent == Path("runs") and "transcnn_test-images" in run.name for run in runs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(optim=Optim(opt_args={"steps": 3})), "opt_args"),
        (dict(ema=Ema(ema_decay=1.0)), "ema_decay must be from 0 to below 1"),
        (dict(strategy="fsdp"), "fsdp shares weights out"),
    ],
)
def test_what_is_refused_leaves_no_directory(folder, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train(folder, **QUICK, **settings, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_weights_alone_are_no_run_to_go_on_with(whole):
    with pytest.raises(
        UserError, match=r"best.safetensors holds weights alone, .*: give --resume .*run; .*--init_from"
    ):
        train(resume=str(whole[1] / "best.safetensors"), quiet=True)


def test_a_run_that_goes_on_elsewhere_takes_its_best_weights_along(whole, tmp_path):
    run = shutil.copytree(whole[1], tmp_path / "run")
    state = torch.load(run / "last.ckpt", weights_only=True)
    info = read_info(run / "best.safetensors")
    save_weights(run / "best.safetensors", load(run).model, {**info, "epoch": 1})  # so that it isn't the last epoch's
    result = train(resume=str(run), out=str(tmp_path / "other"), quiet=True)
    assert state["callbacks"]["KeepWeights"]["best_epoch"] == 2  # what is said is what was scored
    assert result.metrics["best_epoch"] == 1
    assert (result.run_dir / "best.safetensors").read_bytes() == (run / "best.safetensors").read_bytes()
    assert steady(result.run_dir) == steady(run)


def test_a_run_that_goes_back_keeps_its_size_of_images(whole, monkeypatch):
    """It is chosen when the run begins; what the user gave says nothing of it."""
    seen = []
    monkeypatch.setattr(run, "data_config_of", lambda network, in_chans, img_size: seen.append(img_size) or 1 / 0)
    settings = TrainSettings(whole[0], **{**BUSY, "img_size": None})
    with pytest.raises(ZeroDivisionError):
        run.run(settings, whole[1] / "last.ckpt", 0.5, RunLock())
    assert seen == [32]


def test_networks_for_one_size_are_made_for_that_of_the_images():
    def make(**settings: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        arguments = {"depth": 1, "embed_dim": 24, "num_heads": 2, **settings.pop("model_args", {})}
        s = TrainSettings(model="vit_tiny_patch16_224", model_args=arguments, quiet=True, **settings)
        return make_network(s, SimpleNamespace(class_names=["a", "b"], in_chans=3), {})

    for settings in (dict(img_size=32), dict(model_args={"img_size": 32, "num_classes": 2})):
        network, args = make(**settings)
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
        assert args["img_size"] == 32
        assert "num_classes" not in args
    for settings, message in (
        (dict(img_size=64, model_args={"img_size": 32}), "model_args: img_size is 32"),
        (dict(model_args={"num_classes": 5}), "model_args: num_classes is 5, for the data it is 2"),
        (dict(model_args={"in_chans": 1}), "model_args: in_chans is 1, for the data it is 3"),
        (dict(augment=Augment(sizes=[16], size_ends=[0.5])), "vit_tiny_patch16_224 takes images of one size alone"),
    ):
        with pytest.raises(UserError, match=message):
            make(**settings)


def test_weights_of_a_network_made_otherwise_are_told(tmp_path, capsys):
    args = {"stem_stride": 1, "drop_rate": 0.3}
    network = build_model("transcnn_test", num_classes=2, in_chans=3, **args)
    info = {"model": "transcnn_test", "model_args": args, "class_names": ["a", "b"]}
    save_weights(tmp_path / "w.safetensors", network, {**info, "data_config": data_config_of(network, 3, 32)})
    splits = SimpleNamespace(class_names=["a", "b"], in_chans=3)
    start = dict(model="transcnn_test", init_from=str(tmp_path / "w.safetensors"))
    make_network(TrainSettings(**start), splits, {})  # pyright: ignore
    assert "those of a network with {'stem_stride': 1}, which this one is made without" in capsys.readouterr().err
    make_network(TrainSettings(**start, model_args={"stem_stride": 1}), splits, {})  # pyright: ignore
    assert not capsys.readouterr().err


def test_fewer_epochs_than_were_learnt_are_one_clear_line(whole, tmp_path):
    run = shutil.copytree(whole[1], tmp_path / "run")
    with pytest.raises(UserError, match="has learnt for 2 epochs already: epochs must be 2 or more, got 1"):
        train(resume=str(run), epochs=1, quiet=True)


def test_a_run_directory_in_use_is_refused(whole, tmp_path):
    (tmp_path / "new").mkdir()
    run = shutil.copytree(whole[1], tmp_path / "run")
    with RunLock() as lock:
        for path, settings in ((run, dict(resume=str(run))), (tmp_path / "new", dict(out=str(tmp_path / "new")))):
            lock.acquire(path)
            with pytest.raises(UserError, match="another process is training in the run directory"):
                train(whole[0], **QUICK, **settings)  # pyright: ignore
    assert not list((tmp_path / "new").iterdir())


def test_a_run_without_a_finite_score_says_so(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"no epoch had a finite val_top1 and val_loss.* smaller --lr \(it was 1e\+30\)"
    ):
        train(folder, **QUICK, lr=1e30, epochs=1, optim=Optim(warmup_epochs=0), out=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_a_run_says_what_looks_wrong(make_class_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Classify, "_logits", lambda task, images: torch.tensor([[0.0, 1.0, 0.0]]).repeat(len(images), 1)
    )
    data = make_class_folder(classes=3, per_class=6, splits=("train", "val"))
    for path in (data / "val" / "class_2").iterdir():
        path.unlink()
    (data / "train" / "class_0" / "003.png").write_bytes(b"no image")
    settings = dict(QUICK, quiet=False, lr=1e-12, epochs=2, eval_metric="loss", ema=Ema(ema=False))
    run = train(str(data), **settings, out=str(tmp_path / "run")).run_dir
    told = capsys.readouterr().err
    assert told.count("the val split has no images of 'class_2'") == 1
    assert "the train split has no" not in told
    assert told.count("all images are predicted as 'class_1'") == 2  # once after an epoch, once at the end
    assert "1 file could not be read: 'class_0/003.png' (see" in told
    assert "class_0/003.png" in (run / "skipped.csv").read_text()


def test_scores_that_look_wrong_are_told_in_words():
    task = learner()
    fine = {"loss": 1.0, "confusion": torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])}
    assert task.warnings_about(fine) == []
    one_class = torch.tensor([[0, 4, 0], [0, 2, 0], [0, 0, 0]])
    assert task.warnings_about({**fine, "confusion": one_class}) == [
        "all images are predicted as 'b', though there are other classes"
    ]
    assert task.warnings_about({**fine, "confusion": one_class[1:2].repeat(3, 1) * torch.tensor([[0], [1], [0]])}) == []
    assert "the loss is nan" in task.warnings_about({**fine, "loss": math.nan})[0]
    assert task.warnings_about({"map": 0.0}) == []


def test_a_damaged_table_of_epochs_ends_no_run(whole, tmp_path):
    run = shutil.copytree(whole[1], tmp_path / "run")
    rows = (run / "metrics.csv").read_bytes().splitlines(keepends=True)
    (run / "metrics.csv").write_bytes(rows[0] + b"one,\xff\0\n" + rows[1] + b"\n,,\n" + rows[2][:9])
    odd = [rows[1].replace(rows[1].rstrip().rpartition(b",")[2], seconds) for seconds in (b"nan", b"inf", b"-1")]
    with (run / "metrics.csv").open("ab") as file:
        file.write(b"\n" + b"".join(odd))
    train(resume=str(run), epochs=4, quiet=True)
    assert [row["epoch"] for row in rows_of(run)] == ["1", "3", "4"]


def test_any_timm_model_and_other_weights_to_start_from(folder, tmp_path):
    first = train(folder, **dict(QUICK, model="resnet10t"), epochs=1, limit_batches=1, out=str(tmp_path / "a"))
    start = load(first.run_dir).model.state_dict()
    second = train(
        folder,
        **dict(QUICK, model="resnet10t"),
        epochs=1,
        limit_batches=1,
        lr=1e-12,
        init_from=str(first.run_dir),
        ema=Ema(ema=False),
        out=str(tmp_path / "b"),
    )
    after = load(second.run_dir).model.state_dict()
    assert all(torch.allclose(start[n], after[n]) for n in start if "running" not in n and "num_batches" not in n)


@pytest.mark.parametrize("names", ["in another order", "one other", "all others"])
def test_weights_for_other_classes_to_start_from(folder, tmp_path, caplog, names):
    ours = sorted(path.name for path in Path(folder).iterdir())
    theirs = {"in another order": ours[::-1], "one other": [ours[1], "x"], "all others": ["x", "y"]}[names]
    torch.manual_seed(7)  # not the run's
    network = build_model("transcnn_test", num_classes=2)
    info = {"model": "transcnn_test", "class_names": theirs, "data_config": data_config_of(network, 3, 32)}
    save_weights(tmp_path / "start.safetensors", network, info)
    start: dict[str, Any] = {"init_from": str(tmp_path / "start.safetensors"), "ema": Ema(ema=False)}
    run = train(folder, **QUICK, epochs=1, limit_batches=1, lr=1e-12, **start, out=str(tmp_path / "run")).run_dir
    old, new = network.head.fc.weight, load(run).model.head.fc.weight
    for i, name in enumerate(ours):
        taken = [j for j, other in enumerate(theirs) if torch.allclose(old[j], new[i])]
        assert taken == ([theirs.index(name)] if name in theirs else [])
    said = {"in another order": "2 classes are taken by name", "one other": "start anew", "all others": "starts anew"}
    assert said[names] in caplog.text


def test_bf16_channels_last_and_checkpointing_train(folder, tmp_path):
    result = train(
        folder, **dict(QUICK, precision="bf16"), grad_checkpointing=True, epochs=2, out=str(tmp_path / "run")
    )
    assert math.isfinite(result.metrics["loss"])


def test_the_first_epochs_see_smaller_images(folder, tmp_path, monkeypatch, capsys):
    seen: dict[tuple[int, bool], set[int]] = {}
    forward = Classify.forward

    def record(task: Classify, x: torch.Tensor) -> torch.Tensor:
        if task.trainer.state.fn == "fit":
            seen.setdefault((task.current_epoch, task.trainer.training), set()).update(x.shape[2:])
        return forward(task, x)

    monkeypatch.setattr(Classify, "forward", record)
    smaller = Augment(policy="small", cutmix=1.0, sizes=[16, 24], size_ends=[0.25, 0.75])
    chosen = {"quiet": False, "eval_metric": "macro_f1"}
    train(folder, **{**QUICK, **chosen}, epochs=4, augment=smaller, out=str(tmp_path / "run"))
    said = " ".join("".join(capsys.readouterr()).split())
    assert re.search(r"epoch 4/4 val top1 [\d.]+ val macro f1 [\d.]+ val loss", said)
    assert re.findall(r"trained at (\d+)x\d+ so far and evaluated at 32x32", said) == ["16", "24"]
    assert [seen[epoch, True] for epoch in range(4)] == [{16}, {24}, {24}, {32}]
    assert all(seen[epoch, False] == {32} for epoch in range(4))  # evaluated as they are


def test_early_stop(folder, tmp_path):
    result = train(folder, **QUICK, lr=1e-12, epochs=9, early_stop=2, out=str(tmp_path / "run"))
    assert len(rows_of(result.run_dir)) == 3  # one, and two no better


def test_the_epoch_of_the_lowest_loss_can_be_kept_instead(make_class_folder, tmp_path):
    folder = make_class_folder(classes=2, per_class=12, splits=("train", "val"))
    for now, then in (("class_0", "other"), ("class_1", "class_0"), ("other", "class_1")):
        (folder / "val" / now).rename(folder / "val" / then)  # what is learnt is wrong of the images that are scored
    settings: Any = dict(QUICK, lr=3e-3, epochs=3, eval_metric="loss", ema=Ema(ema=False))
    result = train(str(folder), **settings, out=str(tmp_path / "run"))
    losses = [float(row["val_loss"]) for row in rows_of(result.run_dir)]
    assert losses[result.metrics["best_epoch"] - 1] == min(losses) < losses[-1]  # not the last
    assert result.metrics["chosen_by"] == "val_loss"
    for name in ("val_loss", "loss"):
        assert result.metrics[name] == pytest.approx(min(losses), rel=1e-4)
    info = read_info(result.run_dir / "best.safetensors")
    assert info["val_top1"] == pytest.approx(result.metrics["top1"], abs=1e-3)  # the score is told all the same


def test_early_stop_waits_for_a_figure_that_cannot_be_told_yet(tmp_path, monkeypatch):
    """Such as the correlation of predictions that are all the same, after a first epoch."""
    monkeypatch.setattr(run.L, "Trainer", lambda **settings: settings["callbacks"])
    keep: Any = SimpleNamespace(metric="val_spearman", mode="max")
    made = run._trainer(TrainSettings(early_stop=2, quiet=True, accelerator="cpu"), tmp_path, [], keep, "auto")
    [stop] = [callback for callback in made if isinstance(callback, EarlyStopping)]
    # It has counted an epoch before a signal's checkpoint is written; a run that goes on has the patience of now.
    assert made.index(stop) < [type(callback) for callback in made].index(callbacks.StopOnSignal)
    state = lightning.pytorch.callbacks.EarlyStopping("val_spearman", mode="max", patience=9)
    assert stop.state_key == state.state_key
    stop.load_state_dict(state.state_dict())
    assert stop.patience == 2
    figures = [math.nan, 0.1, math.nan, 0.2, 0.2, math.nan]
    assert [stop._evaluate_stopping_criteria(torch.tensor(value))[0] for value in figures] == [False] * 5 + [True]


def test_early_stop_looks_at_what_chooses_the_epoch(folder, tmp_path):
    settings: Any = dict(QUICK, lr=1e-12, epochs=9, early_stop=2, eval_metric="loss", ema=Ema(ema=False))
    assert len(rows_of(train(folder, **settings, out=str(tmp_path / "run")).run_dir)) == 3


def test_a_metric_that_the_task_lacks_is_refused(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"eval_metric of classify must be one of top1, balanced_accuracy, .*, loss, got miou"
    ):
        train(folder, **QUICK, eval_metric="miou", out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def learner(**settings: Any) -> Classify:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    return Classify(network, ["a", "b", "c"], {}, **settings)


def test_schedule_warms_up_and_falls_as_a_cosine():
    task = learner(lr=1.0, epochs=10, optim=Optim(warmup_epochs=2, warmup_lr=0.0, min_lr=0.0, sched="cosine"))
    task.updates_per_epoch = 5
    configured = task.configure_optimizers()
    scheduler, optimizer = configured["lr_scheduler"]["scheduler"], configured["optimizer"]
    rates = []
    for update in range(50):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:10] == pytest.approx([update / 10 for update in range(10)])
    assert rates[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * update / 50)) for update in range(10, 50)])


def test_layer_decay_and_weight_decay_reach_the_optimizer():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    plain = create_optimizer_v2(network, "adamw", lr=1.0, weight_decay=0.05)
    assert sorted(group["weight_decay"] for group in plain.param_groups) == [0.0, 0.05]
    from transcnn.plugging.build import build_model

    task = Classify(build_model("transcnn_test", num_classes=3), list("abc"), {}, lr=1.0, optim=Optim(layer_decay=0.5))
    groups = task.configure_optimizers()["optimizer"].param_groups
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales[-1] == 1.0
    assert scales[-2] == 0.5
    muon = learner(optim=Optim(opt="muon", opt_args={"ns_steps": 3})).configure_optimizers()["optimizer"]
    assert muon.defaults["ns_steps"] == 3
    with pytest.raises(UserError, match=r"opt='adamw', opt_args=\{'steps': 3\}: .*'steps'"):
        learner(optim=Optim(opt_args={"steps": 3})).configure_optimizers()
    with pytest.raises(UserError, match="no optimizer is named 'adamx'"):
        learner(optim=Optim(opt="adamx")).configure_optimizers()
    for opt, why in {"adahessian": "needs second derivatives", "fusedlamb": "", "bnbadamw8bit": ""}.items():
        with pytest.raises(UserError, match=f"opt='{opt}'.*{why}"):
            learner(optim=Optim(opt=opt)).configure_optimizers()
    with pytest.raises(UserError, match="sched='cosinus'"):
        learner(optim=Optim(sched="cosinus")).configure_optimizers()


@pytest.mark.parametrize(
    ("task", "args"),
    [
        ("segment", {"decoder": "fpn"}),
        ("detect", dict(detector="retinanet", fpn_channels=16, short_side=64, long_side=64, side_range=[1, 1])),
    ],
)
def test_layer_decay_below_decoders_and_detectors_is_by_the_backbones_parts(task, args):
    """timm takes each 12 parameters for a layer where it isn't told better: far too many of them."""
    args = {**args, "min_score": 0.1, "max_found": 9}
    network = build_network(task, "resnet18", args, num_classes=2, in_chans=3)
    name = {id(p): n.partition("body.")[2].partition(".")[0] for n, p in network.named_parameters()}
    optimizer = create_optimizer_v2(network, "adamw", lr=1.0, layer_decay=0.5)
    found = {name[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    parts = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", ""]
    assert found == {part: 0.5 ** (6 - i) for i, part in enumerate(parts)}


def test_learning_rate_is_scaled_by_the_images_of_an_update(folder, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "transcnn.training.run._fit",
        lambda trainer, task, *_: seen.update(lr=task.lr, n=task.updates_per_epoch) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        train(folder, **QUICK, lr=0.512, optim=Optim(lr_batch=512, accumulate=2), out=str(tmp_path / "run"))
    assert seen == {"lr": pytest.approx(0.008), "n": 3}  # 4 images, 2 batches an update; 5 batches an epoch


def test_ema_forgets_the_start_and_averages_afterwards():
    source, average = torch.nn.Linear(1, 1), callbacks.Ema(0.9, warmup=10)
    mean = torch.optim.swa_utils.AveragedModel(source, use_buffers=True, **average._kwargs)
    expected = None
    for n in range(30):
        with torch.no_grad():
            source.weight.fill_(float(n))
        mean.update_parameters(source)
        keep = min(0.9, (1 + n) / (10 + n))
        expected = 0.0 if expected is None else keep * expected + (1 - keep) * n
        assert float(mean.module.weight.detach()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="ema_decay"):
        callbacks.Ema(1.0)


def test_precision_words():
    assert runtime.choose_precision("32") == "32-true"
    assert runtime.choose_precision("bf16", "cpu") == "bf16-mixed"
    assert runtime.choose_precision("auto", "cpu") in ("32-true", "bf16-mixed")
    with pytest.raises(UserError, match="needs a GPU"):
        runtime.choose_precision("16", "cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(epochs=0), "epochs must be 1 or more, got 0"),
        (dict(batch_size=-1), "batch_size must be 1 or more"),
        (dict(lr=0.0), "lr must be above 0"),
        (dict(model="transcnn3d_nano"), "transcnn3d_nano takes no images"),
        (dict(model="transcnn_tinny"), "no model is named 'transcnn_tinny'; near ones: transcnn_tiny"),
        (dict(augment=Augment(smoothing=2)), "smoothing must be from 0 to below 1, got 2"),
        (dict(augment=Augment(sizes=[16])), r"size_ends must have one entry for each of sizes, got \[\] for \[16\]"),
        (dict(augment=Augment(sizes=[16, 0], size_ends=[0.1, 1])), r"sizes must be 1 or more, got \[16, 0\]"),
        (
            dict(augment=Augment(sizes=[16, 8], size_ends=[0.5, 0.2])),
            r"size_ends must grow, .*, got \[0.5, 0.2\]",
        ),
        (dict(task="sort"), "task must be one of classify"),
        (dict(model_args={"depth": 3}), "can't make transcnn_test"),
        (dict(init_from="nowhere.pth"), "nowhere.pth"),
        (dict(cuda_graphs=True), "cuda_graphs needs a CUDA GPU, got accelerator cpu"),
        (dict(cuda_graphs=True, grad_checkpointing=True), "cuda_graphs and grad_checkpointing exclude each other"),
    ],
)
def test_wrong_settings_are_named(folder, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train(folder, **{**QUICK, **settings}, out=str(tmp_path / "run"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_networks_train_with_kernels_of_our_own_and_recorded_where_asked(device):
    task = Classify(timm.create_model("transcnn_test"), ["a", "b"], {}, cuda_graphs=device == "cuda")
    task._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))  # pyright: ignore
    task.configure_model()
    assert any(isinstance(module, KernelHMHSA) for module in task.model.modules())
    assert isinstance(task._recorded, CapturedTraining if device == "cuda" else NoneType)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(task.eval()(x), task.model(x))
    assert set(task.state_dict()) == {f"model.{name}" for name in task.model.state_dict()}


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_one_image_is_mixed_with_itself(mixup, cutmix):
    """A process with one image had an empty batch, and a loss that is not a number."""
    task = Classify(torch.nn.Flatten(), ["a", "b", "c"], {}, augment=Augment(mixup=mixup, cutmix=cutmix, smoothing=0.3))
    image, label = torch.rand(1, 3, 1, 1), torch.tensor([1])
    images, target = task.mixed(image, label)
    assert torch.allclose(images, image)
    assert torch.allclose(target, torch.tensor([[0.1, 0.8, 0.1]]))
    loss = task.loss((image, label))
    assert torch.isfinite(loss)
    assert len(task.mixed(torch.rand(5, 3, 4, 4), torch.arange(5) % 3)[0]) == 4


def test_a_batch_of_one_before_a_batchnorm_is_told_in_one_line():
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten())
    task = Classify(network, ["a", "b", "c"], {})
    with pytest.raises(UserError, match="--batch_size 2") as caught:
        task.training_step((torch.rand(1, 3, 1, 1), torch.tensor([1])), 0)
    assert "\n" not in str(caught.value)
    assert torch.isfinite(task.training_step((torch.rand(2, 3, 1, 1), torch.tensor([1, 0])), 0))


def test_wrong_answers_and_scores_add_up():
    task = learner()
    task.trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda x, reduce_op: x))  # pyright: ignore
    task.model = torch.nn.Identity()
    task._trainer = None
    logits = torch.tensor([[5.0, 0, 0], [0, 3, 0], [0, 9, 0], [0, 0, 2]])
    labels = torch.tensor([0, 0, -1, 2])  # one wrong, one broken file
    task.evaluate_batch((logits, labels), 0)
    task.evaluate_batch((logits[:1], torch.tensor([1])), 1)
    assert [row[:3] for row in task._wrong] == [(4, 1, 0), (1, 0, 1)]  # most confident first
    assert task.confusion.compute().tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_tasks_are_found_by_name():
    assert get_task("classify") is Classify
    with pytest.raises(UserError, match="task must be one of"):
        get_task("sing")


def test_a_dry_run_says_what_a_run_would_take_and_where_settings_came_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: transcnn_test\nepochs: 7\noptim:\n  weight_decay: 0.3\n")
    command = ["train", "nowhere", "--config", "recipe.yaml", "--batch_size", "8", "--clip-grad", "2", "--dry-run"]
    assert main([*command, "--accelerator", "cpu"]) == 0
    text = " ".join(capsys.readouterr().out.split())  # the table's cells wrap where their widths fall
    for line in (
        r"nowhere isn't there: taken are 10 classes, as the model has",
        r"parameters 0\.03 M",
        r"multiply-adds 0\.001 G",
        r"memory about \S+ [MG]iB a process",
        r"speed \S+ images/s \(1 process on cpu, \S+, tried with 2 images instead of 8\)",
        r"disk \S+ MiB for checkpoints",
        r"model transcnn_test recipe.yaml",
        r"optim.weight_decay 0\.3 recipe.yaml",
        r"optim.clip_grad 2\.0 command line",
        r"batch_size 8 command line",
        r"seed 0 default",
    ):
        assert re.search(line, text), f"{line} is not in\n{text}"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]  # nothing was written


def test_a_dry_run_needs_data_to_segment(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        train(str(tmp_path / "nowhere"), task="segment", model="transcnn_test", dry_run=True)


def test_a_dry_run_uses_the_data_that_is_there(folder, tmp_path):
    result = train(folder, **QUICK, dry_run=True, limit_batches=2, out=str(tmp_path / "run"))
    assert result.metrics["images_a_step"] == 4
    assert result.metrics["hours"] * 3600 * result.metrics["images_per_second"] == pytest.approx(8 * 50)
    assert result.metrics["parameters"] < 40_000  # three classes, not a thousand
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["transcnn_test", "mobilenetv3_small_050"])
def test_norms_are_synchronised_between_gpus_with_their_activations(monkeypatch, model):
    monkeypatch.setattr("transcnn.training.building.world", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    settings = dict.fromkeys(("model_args", "drop_rate", "init_from", "plug", "img_size"))
    s = SimpleNamespace(**settings, task="classify", model=model, drop_path_rate=0.0, pretrained=False, quiet=True)
    s.grad_checkpointing, s.accelerator = False, "cpu"
    splits = SimpleNamespace(class_names=["a", "b"], in_chans=3)
    plain, _ = make_network(s, splits, {})
    s.accelerator = "gpu"
    synced, _ = make_network(s, splits, {})
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in plain.modules())
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synced.modules())
    synced.load_state_dict(plain.state_dict())  # the names are the same
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(synced.eval()(x), plain.eval()(x))
