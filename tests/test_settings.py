"""A run's settings: one frozen object, the same from the command line, a recipe, Python and a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from transcnn import cli
from transcnn.arguments import Command, describe_type, read_settings
from transcnn.commands.train import train
from transcnn.errors import UserError
from transcnn.plain import Arguments, dump_plain, load_plain
from transcnn.settings import (
    HELP_GROUPS,
    Augment,
    Distill,
    Optim,
    Segment,
    Table,
    TrainSettings,
    as_plain,
    takes_settings,
)
from transcnn.tasks import TASKS, get_task
from transcnn.tasks.classify import Classify
from transcnn.training.check import check_meant, remarks_on_schedule
from transcnn.training.resume import located, resumed_settings

SAVED = TrainSettings("photos", model="transcnn_test", epochs=7, lr=0.5, optim=Optim(opt="sgd", betas=(0.8, 0.9)))


def settings_of(*argv: str) -> TrainSettings:
    return TrainSettings(**cli.parse("train", train, argv))


def save(path: Path, settings: dict[str, Any]) -> None:
    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic"}
    info = {"model": "transcnn_test", "class_names": ["a", "b"], "data_config": {**config, "crop_pct": 1.0}}
    torch.save({"transcnn": {**info, "settings": settings}}, path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "last.ckpt", as_plain(SAVED))
    return tmp_path / "last.ckpt"


def test_settings_never_change():
    for settings in (SAVED, SAVED.optim, SAVED.augment, SAVED.ema, SAVED.distill, SAVED.segment, SAVED.detect):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, dataclasses.fields(settings)[0].name, 1)


def test_python_gives_settings_as_keywords():
    @takes_settings(TrainSettings)
    def show(settings: TrainSettings) -> TrainSettings:
        return settings

    settings = show(Path("photos"), epochs=50, optim=Optim(clip_grad=2.0), out=Path("a") / "b")  # pyright: ignore
    assert (settings.data, settings.out, settings.optim.clip_grad) == ("photos", "a/b", 2.0)
    assert settings.origins == {"data": "call", "epochs": "call", "optim": "call", "out": "call"}
    assert settings.origin_of("optim.clip_grad") == "call"
    assert settings.origin_of("lr") == "default"
    assert [show(freeze=given).freeze for given in ("all", 2, ["stem"])] == [["all"], ["2"], ["stem"]]  # pyright: ignore
    assert show(optim={"opt": "sgd"}).optim == Optim(opt="sgd")  # pyright: ignore
    assert Table(target="count").target == ["count"]  # pyright: ignore
    assert list(inspect.signature(train).parameters) == [item.name for item in dataclasses.fields(TrainSettings)]
    with pytest.raises(TypeError, match="epoch"):
        show("photos", epoch=3)  # pyright: ignore


def test_where_a_setting_came_from_travels_with_it(tmp_path):
    (tmp_path / "r.yaml").write_text("lr: 0.1\nepochs: 3\noptim: {momentum: 0.7}\n")
    settings = settings_of("photos", "--config", str(tmp_path / "r.yaml"), "--epochs", "50", "--mixup", "0")
    recipe = str(tmp_path / "r.yaml")
    assert settings.origins == {
        "lr": recipe,
        "epochs": "command line",
        "optim.momentum": recipe,
        "augment.mixup": "command line",
        "data": "command line",
    }
    assert settings.epochs == 50
    assert settings_of().origins == {}


def test_what_was_written_is_read_again(tmp_path):
    for settings in (
        SAVED,
        TrainSettings(),
        TrainSettings(model_args={"x": "0", "y": "null", "z": ["1e3", {"a": None}]}),
        TrainSettings(optim=Optim(opt_args={"class_path": "os.system"}), segment=Segment(logit_adjustment=0.5)),
    ):
        assert read_settings(as_plain(settings)) == settings
        (tmp_path / "config.yaml").write_text(dump_plain(as_plain(settings)))
        assert settings_of("--config", str(tmp_path / "config.yaml")) == settings
    for bad in ({"epochs": "many"}, {"optim": 3}, {"optim": {"new": 1}}, {"new": 1}, {"model_args": [1]}, {"lr": [1]}):
        with pytest.raises(UserError) as caught:
            read_settings(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--lr", "1e-3"], "lr is 0.5 there, got 0.001"),  # the default
        (["--opt", "adamw"], "optim.opt is sgd there, got adamw"),
        (["--batch_size", "32"], "batch_size is 64 there, got 32"),
        (["--no-ema"], "ema.ema is True there, got False"),
        (["--model_args", "{x: 1}"], "model_args is None there"),
    ],
)
def test_a_resumed_run_refuses_other_settings_also_the_defaults(checkpoint, argv, problem):
    with pytest.raises(UserError, match=problem):
        resumed_settings(settings_of("--resume", "x", *argv), checkpoint)


def test_a_resumed_run_takes_what_may_be_otherwise_also_the_defaults(checkpoint):
    settings = resumed_settings(settings_of("--resume", "x", "--epochs", "50", "--lr", "0.5", "--opt=sgd"), checkpoint)
    assert (settings.epochs, settings.lr, settings.optim, settings.resume) == (50, 0.5, SAVED.optim, "x")
    assert settings.origin_of("epochs") == "command line"
    assert settings.origin_of("model") == str(checkpoint)
    assert resumed_settings(settings_of("--resume", "x"), checkpoint) == dataclasses.replace(SAVED, resume="x")


def test_a_resumed_run_takes_the_paths_that_it_was_given_also_relative_ones(tmp_path, checkpoint, monkeypatch):
    """The command that began a run, with --resume behind it: the run keeps whole paths."""
    monkeypatch.chdir(tmp_path)
    for name in ("weights.safetensors", "labels.csv"):
        (tmp_path / name).touch()
    for name in ("images", "moved"):
        (tmp_path / name).mkdir()
    flags = ("labels.csv", "--images", "images", "--init_from", "weights.safetensors")
    begun = located(settings_of(*flags))
    save(checkpoint, as_plain(begun))
    assert resumed_settings(settings_of(*flags, "--resume", "x"), checkpoint) == dataclasses.replace(begun, resume="x")
    moved = resumed_settings(settings_of("--images", "moved", "--resume", "x"), checkpoint)
    assert (moved.table.images, moved.origin_of("table.images")) == (str(tmp_path / "moved"), "command line")
    with pytest.raises(UserError, match=r"init_from is .*weights.safetensors there, got .*labels.csv"):
        resumed_settings(settings_of("--init_from", "labels.csv", "--resume", "x"), checkpoint)


def test_a_run_of_an_earlier_version_goes_on(checkpoint):
    values = as_plain(SAVED)
    values["segment"]["weights_back"] = 0.75
    del values["segment"]["logit_adjustment"], values["detect"], values["cuda_graphs"]
    save(checkpoint, values)
    settings = resumed_settings(settings_of("--resume", "x"), checkpoint)
    assert settings.segment.logit_adjustment == 0.75
    values["of_a_later_version"] = 1
    save(checkpoint, values)
    with pytest.raises(UserError, match="of_a_later_version"):
        resumed_settings(settings_of("--resume", "x"), checkpoint)


@pytest.mark.parametrize(
    ("recipe", "name", "value"),
    [
        ("clip_grad: 2", "optim.clip_grad", 2.0),
        ("optim.clip-grad: 2", "optim.clip_grad", 2.0),
        ("batch-size: 8", "batch_size", 8),
        ("ema: false", "ema.ema", False),
        ("loss: focal", "classify.loss", "focal"),
        ("loss: dice\ntask: segment", "segment.loss", "dice"),
        ("optim:\n  # opt: sgd\nepochs: 3", "epochs", 3),
        ("freeze: all", "freeze", ["all"]),
        ("freeze: 2", "freeze", ["2"]),
        ("table: {target: count}", "table.target", ["count"]),
        ("precision: 16", "precision", "16"),
        ("plug: ~/x", "plug", "/home/me/x"),  # as all names
    ],
)
def test_a_recipe_sets_what_a_flag_does(recipe, name, value, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "r.yaml").write_text(recipe + "\n")
    settings = settings_of("--config", str(tmp_path / "r.yaml"))
    assert settings.value_of(name) == value
    assert settings.origins[name] == str(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ("clip_grad: 2\noptim: {clip_grad: 1}", "optim.clip_grad is given twice"),
        ("optim: 3", "optim must be names with values, got 3"),
        ("lrr: 3", "no such argument: lrr; did you mean lr?"),
        ("seed: 010", "YAML reads 010 in base 8 or 60"),
        ("epochs: 1:30", "YAML reads 1:30 in base 8 or 60"),
        ("table: {target: [00, 01]}", "YAML reads 00 in base 8 or 60"),
    ],
)
def test_a_recipe_that_says_nothing_clear_is_refused(recipe, problem, tmp_path):
    (tmp_path / "r.yaml").write_text(recipe + "\n")
    with pytest.raises(UserError, match=re.escape(problem)):
        settings_of("--config", str(tmp_path / "r.yaml"))
    if problem.startswith("YAML"):
        (tmp_path / "r.yaml").write_text("table: {target: ['010', \"1:30\"]}\n")
        assert settings_of("--config", str(tmp_path / "r.yaml")).table.target == ["010", "1:30"]


def test_former_names_are_understood_and_not_shown(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("segment: {weights_back: 0.5}\n")
    assert settings_of("--config", str(tmp_path / "r.yaml")).segment.logit_adjustment == 0.5
    assert settings_of("--weights_back", "0.25").segment.logit_adjustment == 0.25
    assert settings_of("--segment.weights-back", "0.25").segment.logit_adjustment == 0.25
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "weights_back" not in shown
    assert "--segment.logit_adjustment" in shown


def test_help_begins_with_what_most_runs_need(capsys):
    command = Command("train", train)
    listed = [name for names in HELP_GROUPS.values() for name in names]
    assert sorted(listed) == sorted({*(n for n in command.arguments if "." not in n), "config"} - {"data"})
    assert len(next(iter(HELP_GROUPS.values()))) == 10
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    headings = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert "``" not in shown
    for default in ("--no_ema turns it off", "(default: 0.35 1)", "(default: 0.5 2)"):
        assert default in " ".join(shown.split())
    assert headings[:3] == ["arguments:", "what most runs need:", "data:"]
    assert [heading.partition(":")[0] for heading in headings[6:]] == list(command.groups)
    last = {name: name.rpartition(".")[2] for name in command.arguments if name != "data"}
    assert all(f"--{name if inner in command.shared else inner}" in shown for name, inner in last.items())


def test_a_flag_that_several_tasks_have_is_that_of_the_task(tmp_path):
    (tmp_path / "r.yaml").write_text("task: segment\n")
    assert settings_of("--class_weights", "balanced").classify.class_weights == "balanced"
    assert settings_of("--class_weights", "{cat: 2}").classify.class_weights == {"cat": 2}
    for task in (["--task", "segment"], ["--config", str(tmp_path / "r.yaml")]):
        settings = settings_of(*task, "--class_weights=log", "--loss", "dice")
        assert (settings.segment.class_weights, settings.segment.loss) == ("log", "dice")
        assert settings.classify == TrainSettings().classify
        assert settings.origins["segment.loss"] == "command line"


def test_the_help_names_every_metric_that_may_choose_the_epoch():
    told = re.findall(r"\w+", Command("train", train).arguments["eval_metric"].help)
    assert {metric for task in TASKS for metric in get_task(task).eval_metrics} <= set(told)


def test_types_are_told_in_words():
    words = {
        float | None: "a number or null",
        tuple[float, float]: "a list of two numbers",
        list[int] | None: "a list of whole numbers or null",
        bool: "true or false",
        str: "a name",
        Arguments | None: "names with values, such as {stem_stride: 1} or null",
    }
    assert {kind: describe_type(kind) for kind in words} == words
    for name in cli.COMMANDS:
        command = Command(name, cli.load_command(name))
        for argument in command.arguments.values():
            told = describe_type(argument.type)
            assert not any(mark in told for mark in ("<", "typing", "Literal", "Union", "None"))
            assert argument.help, f"{name} --{argument.name} has no help"


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["class_path", "init_args", "dict_kwargs", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@hypothesis_settings(max_examples=40)
@given(VALUES)
def test_whatever_free_arguments_hold_comes_out_as_it_went_in(value):
    settings = TrainSettings(model_args={"x": value}, optim=Optim(opt_args={"y": value}))
    assert read_settings(as_plain(settings)) == settings


@hypothesis_settings(max_examples=40)
@given(st.text(max_size=12), st.sampled_from(["out", "model", "plug", "augment.aa", "distill.distill_from"]))
def test_names_are_taken_as_they_are(text, name):
    assume(not text.startswith("~/"))
    value = None if text == "null" and name != "model" else text
    assert settings_of(f"--{name}={text}").value_of(name) == value


def test_settings_have_no_traceback_for_what_python_gets_wrong():
    assert Distill().distill_from is None
    with pytest.raises(UserError, match="epochs must be 1 or more, got 0"):
        train(epochs=0, quiet=True)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--segment.class_weights", "log"], "class_weights is for the task segment, not for classify"),
        (["--segment.loss", "dice"], "loss is for the task segment, not for classify"),
        (["--class_weights", "log"], "classify.class_weights must be one of none, balanced, sqrt or names with values"),
        (["--task", "detect", "--sampler", "balanced"], "sampler is for the task classify, not for detect"),
        (["--focal_gamma", "1"], "focal_gamma has no effect without loss focal"),
        (["--resize", "99"], "resize is for the task segment, not for classify"),
        (["--min_score", ".9"], "min_score is for the task detect, not for classify"),
        (["--task", "detect", "--decoder", "unet"], "decoder is for the task segment, not for detect"),
        (
            ["--task", "detect", "--img_size", "512"],
            "img_size is for the task classify, multilabel, regress or segment",
        ),
        (["--task", "detect", "--mixup", "0.2"], "mixup is for the task classify or multilabel, not for detect"),
        (["--task", "segment", "--detector", "fasterrcnn"], "detector is for the task detect, not for segment"),
        (["--task", "segment", "--distill_from", "x"], "distill_from is for the task classify, not for segment"),
        (["--distill_alpha", "0.9"], "distill_alpha has no effect without distill_from"),
        (["--no-ema", "--ema_decay", "0.9"], "ema_decay has no effect without ema"),
        (["--mix_prob", "0.5"], "mix_prob has no effect without mixup or cutmix"),
        (["--remode", "const"], "remode has no effect without reprob"),
        (["--task", "detect", "--rois", "64"], "rois has no effect without detector fasterrcnn or maskrcnn"),
        (["--milestones", "3", "6"], "milestones has no effect without sched multistep"),
        (["--decay_rate", "0.3"], "decay_rate has no effect without sched step, multistep or poly"),
        (["--layer_decay", "65"], "layer_decay must be from 0.01 to 1"),
        (["--layer_decay", "0.7", "--sched", "none"], "layer_decay has no effect with sched none"),
        # As an unset variable of the shell gives them: a new run, on digits, was started instead.
        (["--resume", ""], "resume is empty: give a name, or leave it out"),
        (["--init_from", ""], "init_from is empty"),
        (["--distill_from", ""], "distill_from is empty"),
        (["--decay_epochs", "0"], "decay_epochs must be above 0, got 0"),
        (["--sched", "multistep"], "sched multistep needs milestones"),
        (
            ["--sched", "step", "--min_lr", "1e-5"],
            "min_lr has no effect without sched cosine, tanh, poly, wsd or rsqrt",
        ),
        (["--warmup_epochs", "0", "--warmup_lr", "1e-4"], "warmup_lr has no effect without warmup_epochs"),
        (["--warmup_epochs", "5", "--sched", "none"], "warmup_epochs has no effect with sched none"),
        (["--distill_from", "x", "--distill_tau", "2"], "distill_tau has no effect without distill_type soft"),
        (["--task", "detect", "--drop_rate", "0.2"], "drop_rate is for the task classify, multilabel or regress"),
        (["--task", "segment", "--loss", "dice", "--class_weights", "log"], "class_weights has no effect without loss"),
        (["--task", "segment", "--loss", "dice", "--smoothing", "0.2"], "smoothing has no effect without loss ce or"),
        (["--smoothing", "1"], "smoothing must be from 0 to below 1, got 1"),
        (["--zoom", "1"], "zoom must be from 0 to below 1, got 1"),
        (
            ["--scale", "-1", "0.5"],
            "scale must be two numbers above 0 and at most 1, the smaller first, got [-1.0, 0.5]",
        ),
        (["--scale", "1", "0.5"], "scale must be two numbers above 0 and at most 1, the smaller first"),
        (["--ratio", "0", "1"], "ratio must be two numbers above 0, the smaller first, got [0.0, 1.0]"),
        (["--sched", "tanh", "--epochs", "2"], "sched tanh needs a warm-up shorter than the run, got warmup_epochs 2"),
    ],
)
def test_settings_of_another_task_or_without_effect_are_refused(argv, problem, capsys):
    assert cli.main(["train", "nowhere", *argv]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "flags", "problem"),
    [
        ("cifar10", ["--cutmix", "0"], ""),
        ("cifar10", ["--reprob", "0"], ""),
        ("folder_finetune", ["--no-ema"], ""),
        ("camvid", ["--class_weights", "none"], ""),
        ("camvid", ["--loss", "dice"], ""),
        ("coco_retinanet", ["--sched", "cosine"], ""),
        ("imagenet1k", ["--sched", "none"], ""),
        ("shapes_maskrcnn", ["--detector", "retinanet"], ""),
        ("cifar10", ["--cutmix", "0", "--mix_prob", "0.2"], "mix_prob has no effect without mixup or cutmix"),
        ("folder_finetune", ["--task", "segment"], "policy is for the task"),
    ],
)
def test_a_flag_may_switch_off_what_a_recipe_has_settings_for(recipe, flags, problem, root):
    settings = settings_of("--config", str(root / "recipes" / f"{recipe}.yaml"), *flags)
    with pytest.raises(UserError, match=problem) if problem else contextlib.nullcontext():
        check_meant(settings)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"augment": Augment(mix_prob=0.5)}, "mix_prob has no effect without mixup or cutmix"),
        ({"augment": Augment(degrees=5), "task": "segment"}, "degrees is for the task classify, multilabel or regress"),
        ({"optim": Optim(sched="none", warmup_epochs=3)}, "warmup_epochs has no effect with sched none"),
        ({"segment": Segment(flip=True)}, "segment is for the task segment, not for classify"),
        ({"augment": Augment(mixup=0.2, mix_prob=0.5), "optim": Optim(decay_rate=0.5, sched="step")}, ""),
    ],
)
def test_groups_from_python_are_checked_as_flags_are(given, problem):
    settings = TrainSettings(**given, origins=dict.fromkeys(given, "call"))
    with pytest.raises(UserError, match=problem) if problem else contextlib.nullcontext():
        check_meant(settings)


def test_a_list_may_have_one_value():
    settings = settings_of("--sched", "multistep", "--milestones", "6", "--sizes=24", "--size_ends", "0.5")
    assert (settings.optim.milestones, settings.augment.sizes, settings.augment.size_ends) == ([6], [24], [0.5])
    assert settings_of("--milestones", "null").optim.milestones is None
    with pytest.raises(UserError, match="scale must be a list of two numbers"):
        settings_of("--scale", "0.5")


@pytest.mark.parametrize(
    ("epochs", "optim", "remark"),
    [
        (3, Optim(), ""),
        (2, Optim(), "the warm-up of 2 epochs takes all of the run's 2"),
        (50, Optim(sched="step"), "after each 90 epochs, and the run has 50: it never does"),
        (50, Optim(sched="step", decay_epochs=20), ""),
        (9, Optim(sched="multistep", milestones=[9, 12]), r"no milestone of \[9, 12\] is below 9 epochs"),
        (9, Optim(sched="multistep", milestones=[8, 11]), ""),
    ],
)
def test_a_rate_that_never_falls_is_told(epochs, optim, remark):
    found = remarks_on_schedule(TrainSettings(epochs=epochs, optim=optim))
    assert len(found) == bool(remark)
    assert re.search(remark, " ".join(found))


def test_decay_epochs_reach_the_schedule():
    optim = Optim(sched="step", decay_epochs=2, decay_rate=0.5, warmup_epochs=0)
    task = Classify(torch.nn.Linear(1, 2), ["a", "b"], {}, lr=1.0, epochs=6, optim=optim)
    task.updates_per_epoch = 3
    configured = task.configure_optimizers()
    rates = []
    for epoch in range(6):
        configured["lr_scheduler"]["scheduler"].step_update(3 * epoch)
        rates.append(configured["optimizer"].param_groups[0]["lr"])
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("text", ["lr: 1e-3\nepochs: 2\nlr: 1e-4\n", "optim:\n  opt: sgd\n  'opt': lion\n"])
def test_a_recipe_that_gives_a_name_twice_is_refused(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe.yaml: (lr|opt) is given twice"):
        settings_of("--config", str(tmp_path / "recipe.yaml"))
    fine = {"a": {"b": 1, "c": ["b", {"a": "a"}]}, "b": "a", "[1, 2]": 1, "c": {"b": 2}}
    assert load_plain(dump_plain(fine)) == fine


def test_what_a_run_was_asked_for_can_be_asked_for_again(tmp_path, root):
    for recipe in sorted((root / "recipes").glob("*.yaml")):
        settings = settings_of("--config", str(recipe))
        check_meant(settings)
        (tmp_path / "config.yaml").write_text(dump_plain(as_plain(settings)))
        check_meant(settings_of("--config", str(tmp_path / "config.yaml")))
