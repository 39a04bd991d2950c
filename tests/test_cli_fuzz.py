"""Flags and values of every command, wrong ones above all: exit code 0, 1 or 2, one line, no traceback."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from PIL import Image

import fuzz
from transcnn import cli
from transcnn.arguments import Argument, Command, members
from transcnn.errors import UserError
from transcnn.plain import Arguments

NUMBERS = ["-1", "0", "1", "7", "1.5", "-0.5", "1e30", "1e-30", "nan", "-inf", "9" * 30, "x", "", "[1]", "null"]
NAMES = ["", " ", "nowhere", "/nonexistent/x.png", "a\nb", "\U0001f642", "\udcff", "..", "-", "[", "{", "x" * 300, "*"]
LISTS = ["[]", "[1, 2", "x", "-1", "[0.1, 0.2]", "[2, 1]", "[1, 2, 3]", "[nan, .inf]", "{a: 1}", "[[1], [2]]"]
VALUES: dict[Any, list[str]] = {
    int: NUMBERS,
    float: NUMBERS,
    str: NAMES,
    bool: ["true", "false", "maybe", "", "1"],
    Arguments: ["{}", "{x: 1}", "[1]", "x", "{x: {class_path: os.system}}", "{x: [", "{1: 2}", "{act_layer: ''}"],
    type(None): ["null"],
}


def values_of(argument: Argument) -> Iterator[str]:
    """Texts for an argument, good and bad."""
    for kind in members(argument.type):
        if get_origin(kind) is Literal:
            yield from (*map(str, get_args(kind)), "x", "")
        elif get_origin(kind) in (list, tuple):
            yield from LISTS
        else:
            yield from VALUES[kind]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_reads_or_refuses_every_value_in_one_line(name):
    command = Command(name, cli.load_command(name))
    needed = [argument.name for argument in command.positionals if argument.default is argument.empty]
    read = refused = 0
    draw = random.Random(5)
    for argument in command.arguments.values():
        values = list(values_of(argument))
        # train has 120 flags of some ten types.
        for value in draw.sample(values, min(len(values), (2 if command.groups else 10) * fuzz.CASES // 1000)):
            words = [] if argument.name in needed else ["something"] * len(needed)
            words += [f"--{other}=something" for other in needed if argument.name in needed and other != argument.name]
            try:
                cli.parse(name, command.function, [*words, f"--{argument.name}={value}"])
                told = ""
            except UserError as error:
                told = str(error)
            read, refused = read + (not told), refused + bool(told)
            assert not re.search(r"<class|typing\.|Literal\[|Union|NoneType|Traceback|can't be understood", told), told
    assert read
    assert refused or not any(set(members(argument.type)) - {str} for argument in command.arguments.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photos`` (two classes) and ``run``, a network trained on them."""
    folder = tmp_path_factory.mktemp("made")
    for i in range(12):
        path = folder / "photos" / f"class {i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (20 * i, 200 * (i % 2), 99)).save(path)
    assert cli.main(["train", str(folder / "photos"), *QUICK, "--out", str(folder / "run")]) == 0
    return folder


QUICK = ["--model", "transcnn_test", "--img_size", "32", "--epochs", "1", "--batch_size", "4", "--limit_batches", "1"]
QUICK += ["--num_workers", "0", "--accelerator", "cpu", "--precision", "32", "--quiet"]
BASE = {
    "train": ["photos", *QUICK, "--dry_run"],
    "eval": ["run", "photos", "--accelerator", "cpu", "--quiet"],
    "predict": ["run", "photos/class 0/0.png", "--accelerator", "cpu"],
    "explain": ["run", "photos/class 0/0.png", "--quiet"],
    "plug": ["transcnn_test"],
    "models": ["transcnn_test"],
    "pack": ["photos", "--quiet", "--num_workers", "1"],
    "embed": ["run", "photos", "--knn", "1", "--accelerator", "cpu", "--quiet"],
    "compare": ["transcnn_test", "--sizes", "32", "--batch", "1", "--engine", "eager", "--rounds", "1"],
    "export": ["run", "--quiet"],
    "demo": ["run", "--quiet"],
    "data": ["photos", "--quiet"],
}
BASE["compare"] += ["--seconds", "0.01", "--no-memory"]
# What takes long, starts processes, or is there to stop: tried elsewhere, or told by hand below.
NOT_RUN = {"devices", "num_nodes", "resume", "report", "memory", "open", "at"}
ODD = ["-1", "0", "x", "", "nan", "1e30", "nowhere", "\U0001f642", "null"]


def ends_well(argv: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """Run a command in this process; returns its exit code."""
    code = cli.main(argv)
    error = capsys.readouterr().err
    assert code in (0, 1, 2), (argv, code, error)
    assert "Traceback" not in error, (argv, error)
    if code == 2:
        assert error.startswith("transcnn: "), (argv, error)
        assert error.count("\n") == 1, (argv, error)
    return code


def test_every_command_is_tried():
    assert BASE.keys() == cli.COMMANDS.keys()


def stop(*_: Any, **__: Any) -> None:
    raise UserError("stopped by the test")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BASE)
def test_commands_end_with_one_line(name, made, tmp_path, monkeypatch, capsys):
    for entry in ("photos", "run"):
        (tmp_path / entry).symlink_to(made / entry)
    monkeypatch.chdir(tmp_path)
    # What takes long, or serves until it is stopped, comes after all that flags and values are looked at for.
    monkeypatch.setattr("transcnn.export.exporting.export_model", stop)
    monkeypatch.setattr("transcnn.commands.demo.serve", stop)
    command = Command(name, cli.load_command(name))
    draw = random.Random(3)
    cases = [(argument.name, value) for argument in command.arguments.values() for value in ODD]
    cases = [(flag, value) for flag, value in cases if flag not in NOT_RUN]
    for flag, value in draw.sample(cases, min(len(cases), 6 * fuzz.CASES // 1000)):
        ends_well([name, *BASE[name], f"--{flag}={value}"], capsys)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "photos", *QUICK, "--lr", "null"], "lr must be a number, got null"),
        (
            ["train", "photos", *QUICK, "--optim.clip_grad", "null", "--optim.min_lr", "null"],
            "min_lr must be a number, got",
        ),
        (["compare", "transcnn_test", "--seconds", "null"], "seconds must be a number, got null"),
        (["train", "photos", *QUICK, "--seed", "-1"], "seed must be from 0 to 4,294,967,295, got -1"),
        (["train", "photos", *QUICK, "--num_workers", "-1"], "num_workers must be 0 or more, got -1"),
        (["train", "photos", *QUICK, "--lr", "nan"], "lr must be a number, got nan"),
        (["train", "photos", *QUICK, "--hflip", "2"], "hflip must be from 0 to 1, got 2"),
        (["train", "photos", *QUICK, "--img_size", "300000"], "img_size must be from 1 to 8,192, got 300000"),
        (["train", "photos", *QUICK, "--accelerator", "gpu"], "no GPU"),
        (["train", "photos", *QUICK, "--accelerator", "tpu"], "accelerator must be one of auto, cpu, gpu, got tpu"),
        (["train", "photos", *QUICK, "--model_args", "{act_layer: ''}"], "act_layer"),
        (["train", "photos", *QUICK, "--batch_size", "many"], "batch_size must be a whole number, got many"),
        (["train", "photos", *QUICK, "--betas", "1"], "betas must be a list of two numbers or null, got 1"),
        (["eval", "run", "photos", "--batch_size", "0"], "batch_size must be 1 or more, got 0"),
        (["eval", "nowhere"], "there is no file or folder nowhere, and no model of that name"),
        (["eval", "transcnn_nan0", "photos"], "near names of models: transcnn_nano"),
        (["predict", "run", "photos", "--accelerator", "gpu"], "no GPU"),
        (["plug", "transcnn_test", "--head_dim", "7"], "head_dim"),
        (["eval", "run", "photos", "--val_fraction", "2"], "val_fraction must be between 0 and 1, got 2"),
        (["eval", "run/best.safetensors", "photos", "--report"], "run/best.safetensors is no run, which the report"),
        (["predict", "run", "photos", "--out", "drawn"], "out is for networks that segment or detect, this one is to"),
        (
            ["data", "photos", "--task", "segment", "--target", "x"],
            "images and target are for tables of labelled images",
        ),
        (["train", "photos", *QUICK, "--model", "dla46_c", "--grad_checkpointing"], "has no gradient checkpointing"),
        (["train", "--resume", "run", "--dry_run"], "dry_run tells what a new run would take"),
        (["train", "photos", *QUICK, "--init_from", "transcnn_nano"], "weights: --model transcnn_nano --pretrained"),
        (["export", "run", "--static", "0"], "static must be from 1 to 8,192, got 0"),
        (["models", "transcnn_test", "--csv", "x" * 300], "File name too long"),
    ],
    ids=lambda value: " ".join(value[-2:])[:40] if isinstance(value, list) else "",
)
def test_what_ended_with_a_traceback_is_one_line(argv, message, made, tmp_path, monkeypatch, capsys):
    import torch

    if "gpu" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for entry in ("photos", "run"):
        (tmp_path / entry).symlink_to(made / entry)
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "run"]


def test_data_that_has_moved_or_is_packed(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(made / "run")
    (tmp_path / "photos.zip").touch()
    (made / "photos").rename(made / "elsewhere")
    try:
        for argv, told in (
            (["eval", "run", "--accelerator", "cpu"], "isn't here: give the data, transcnn eval run DATA"),
            (["train", "--resume", "run"], "isn't there: say where it is, transcnn train DATA --resume run"),
            (["train", "photos.zip", *QUICK], "photos.zip' is an archive: unpack it, and give the folder"),
        ):
            assert cli.main(argv) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert told in error
    finally:
        (made / "elsewhere").rename(made / "photos")


def test_published_weights_that_can_not_be_fetched(tmp_path, monkeypatch, capsys):
    import timm

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise OSError("we are offline\nand more")

    monkeypatch.setattr(timm, "create_model", no_network)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *QUICK, "--model", "resnet18", "--pretrained"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in ("can't fetch the weights of resnet18 from", "we are offline", "--init_from"):
        assert words in error


@pytest.mark.parametrize(
    ("files", "task"),
    [
        (["images/train/a.png", "annotations/train.json"], "detect"),
        (["JPEGImages/a.png", "Annotations/a.xml"], "detect"),
        (["images/train/a.png", "labels/train/a.png"], "segment"),
    ],
)
def test_data_for_another_task_says_which(files, task, tmp_path, capsys):
    for name in files:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_text("{}")
    assert cli.main(["train", str(tmp_path / "data"), *QUICK]) == 2
    assert f"add --task {task}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["🙂.png", "a b.png", "[x].png", "{x: y}.png", "-x.png", "null", "1e3", "a\nb.png"])
def test_names_of_files_are_taken_as_they_are(name, made, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_bytes((made / "photos" / "class 0" / "0.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", str(made / "run"), name, "--json", "--accelerator", "cpu"]) == 0
    assert [row["file"] for row in json.loads(capsys.readouterr().out)] == [name]


def test_lists_are_written_as_words_or_in_brackets():
    parse = cli.load_command("train")
    for words in (["--milestones", "1", "2"], ["--milestones", "[1, 2]"], ["--milestones=[1,2]"]):
        assert cli.parse("train", parse, ["photos", *words, "--lr", "1"])["optim"].milestones == [1, 2]
    export = cli.load_command("export")
    assert cli.parse("export", export, ["run", "--images", "a.jpg", "b.jpg"])["images"] == ["a.jpg", "b.jpg"]
    assert cli.parse("export", export, ["run", "--images", "a.jpg"])["images"] == ["a.jpg"]


@pytest.mark.parametrize(
    ("files", "flags", "code", "told"),
    [
        (["good.png"], [], 0, ""),
        (["good.png", "bad.png"], [], 0, "1 of 2 files can't be read"),
        (["good.png", "bad.png"], ["--strict"], 1, "1 of 2 files can't be read; the first: bad.png: "),
        (["bad.png", "none.png"], [], 2, "no file can be read; the first: bad.png: "),
        (["bad.png"], ["--strict"], 2, "1 of 1 files can't be read; the first: bad.png: "),
    ],
)
def test_exit_codes_of_files_that_can_not_be_read(files, flags, code, told, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("good.png").write_bytes((made / "photos" / "class 0" / "0.png").read_bytes())
    Path("bad.png").write_bytes(b"nothing")
    assert cli.main(["predict", str(made / "run"), *files, "--json", "--accelerator", "cpu", *flags]) == code
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == len(files)  # what could be done was done
    assert told in captured.err
