"""The command line: spellings, one-line errors, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from transcnn import cli
from transcnn.commands.predict import predict
from transcnn.commands.train import train
from transcnn.errors import UserError
from transcnn.training.callbacks import Interrupted


def parse_train(*argv: str) -> dict[str, Any]:
    return cli.parse("train", train, argv)


def test_flags_in_both_spellings_and_in_short():
    arguments = parse_train(
        "my data", "--img-size", "48", "--batch_size=8", "--mixup", "0.8", "--optim.clip_grad", "null"
    )
    assert arguments["data"] == "my data"
    assert arguments["img_size"] == 48
    assert arguments["batch_size"] == 8
    assert arguments["augment"].mixup == 0.8
    assert arguments["augment"].smoothing == 0.1  # the others of the group stay
    assert arguments["optim"].clip_grad is None
    assert parse_train("--model-args", "{stem_stride: 1}")["model_args"] == {"stem_stride": 1}
    assert parse_train("--precision", "32")["precision"] == "32"
    assert parse_train("--seed", "3")["seed"] == 3  # whose default, 0, equals False
    assert parse_train("--hflip", "0", "--betas", "[0.8, 0.9]")["optim"].betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("argv", "value"),
    [(["--quiet"], True), (["--quiet", "true"], True), (["--no-quiet"], False), (["--quiet=false"], False)],
)
def test_switches_need_no_value(argv, value):
    assert parse_train(*argv)["quiet"] is value
    assert parse_train(*argv, "--ema", "--no-channels-last")["channels_last"] is False


@pytest.mark.parametrize("argv", [["--ema", "off"], ["--ema", "0"], ["--pretrained", "yes"], ["--no-ema", "true"]])
def test_switches_take_nothing_else(argv, tmp_path, monkeypatch):
    """The word would be taken for the data."""
    with pytest.raises(UserError, match=r"must be true or false, got|takes no value"):
        parse_train(*argv)
    monkeypatch.chdir(tmp_path)
    (tmp_path / argv[1]).mkdir()
    if argv[1] != "true":
        assert parse_train(*argv)["data"] == argv[1]


def test_numbers_of_any_form():
    for word, value in (("-1e-3", -1e-3), ("-.5", -0.5), ("1_000", 1000.0), (".5", 0.5)):
        assert parse_train("--lr", word)["lr"] == value
    for word in ("-inf", "010", "1:30"):
        with pytest.raises(UserError, match=r"lr must be a number, got -inf|YAML reads"):
            parse_train("--lr", word)
    assert parse_train("--freeze", "null", "--target", "null")["freeze"] is None


def test_a_home_folder_that_the_shell_leaves_is_spelled_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    arguments = parse_train("--data=~/my photos", "--out=~/runs/x", "--images=~/a", "--aa=~")
    assert [arguments["data"], arguments["out"]] == [f"{tmp_path}/me/my photos", f"{tmp_path}/me/runs/x"]
    assert [arguments["table"].images, arguments["augment"].aa] == [f"{tmp_path}/me/a", "~"]
    found = cli.parse("predict", predict, ["run", "~/a.png", "b~/c.png", "--csv=~/d.csv"])
    assert [*found["images"], found["csv"]] == [f"{tmp_path}/me/a.png", "b~/c.png", f"{tmp_path}/me/d.csv"]
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "a.png").touch()
    assert cli.parse("predict", predict, ["run", "~/a.png"])["images"] == "~/a.png"


def test_words_without_a_flag_go_where_they_belong():
    arguments = cli.parse("predict", predict, ["run", "a.png", "--json", "b c.png", "--top-k", "3", "--", "--odd.png"])
    assert arguments["checkpoint"] == "run"
    assert arguments["images"] == ["a.png", "b c.png", "--odd.png"]
    assert arguments["json"] is True
    assert arguments["top_k"] == 3
    with pytest.raises(UserError, match="too many arguments: b"):
        parse_train("a", "b")


def test_config_sets_arguments_and_flags_override_it(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("data: pictures\nlr: 0.5\noptim: {opt: sgd, momentum: 0.8}\n")
    arguments = parse_train("--config", str(config), "--lr", "0.25", "--momentum", "0.7")
    assert arguments["data"] == "pictures"
    assert arguments["lr"] == 0.25
    assert arguments["optim"].opt == "sgd"
    assert arguments["optim"].momentum == 0.7
    assert parse_train("others", "--config", str(config))["data"] == "others"
    assert parse_train("--config", str(config), "others")["data"] == "others"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tran"], "no such command: tran; did you mean train?"),
        (["sing"], "there are: models, train"),
        (["train", "--lrr", "1"], "no such argument: --lrr; did you mean --lr?"),
        (["train", "--lr"], "--lr needs a value"),
        (["train", "--lr", "much"], "lr must be a number, got much"),
        (["train", "--precision", "8"], "precision must be one of auto, 32, bf16, 16, got 8"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--model", "transcn_nano", "--quiet"], "near ones: transcnn_nano"),
        (["train", "nowhere"], "nowhere"),
        (["eval"], "CHECKPOINT is missing"),
        (["eval", "nowhere.ckpt"], "no such file or directory: nowhere.ckpt"),
        (["predict", "nowhere.ckpt"], "images"),
        (["predict", "nowhere.ckpt", "x.png"], "nowhere.ckpt"),
        (["models", "resnet18x"], "no model is named 'resnet18x'"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("transcnn: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.iterdir())  # no run directory is left behind


def test_data_that_can_not_be_learnt_from(capsys, tmp_path, make_class_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for data, message in (("empty", "empty"), (str(make_class_folder(classes=1)), "one class only")):
        assert cli.main(["train", data, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_help_lists_all_commands_and_shows_docstrings(capsys):
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        assert cli.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        summary = (cli.load_command(name).__doc__ or "").splitlines()[0]
        assert " ".join(summary.split())[:40] in " ".join(text.split())
        assert f"usage: transcnn {name}" in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (Interrupted("after update 3", signal.SIGINT), 130),
        (Interrupted("after update 3", signal.SIGTERM), 0),
    ],
)
def test_exit_codes_of_a_stopped_command(monkeypatch, capsys, error, code):
    def stopped(names: list[str] | None = None) -> None:
        """Stop."""
        raise error

    monkeypatch.setattr(cli, "load_command", lambda name: stopped)
    assert cli.main(["models"]) == code
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        ImportError("IMPORTANT: please read this\n\nOriginal error was: libgfortran.so: failed to map segment"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("could not create a primitive"),
        SystemError("error return without exception set"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_no_memory_is_one_line(monkeypatch, capsys, error):
    def starved(names: list[str] | None = None) -> None:
        """Fail."""
        raise error

    monkeypatch.setattr(cli, "load_command", lambda name: starved)
    assert cli.main(["models"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "not enough memory" in told or "allocate memory" in told
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):  # a fault of ours is not hidden
        cli.main(["models"])


def test_the_command_line_loads_nothing_heavy_by_itself(fresh_imports):
    assert {"lightning", "matplotlib", "jsonargparse", "sklearn"}.isdisjoint(fresh_imports["transcnn.cli"])
    assert {"lightning", "torchmetrics", "matplotlib", "scipy"}.isdisjoint(fresh_imports["transcnn.predictor"])


def test_train_eval_predict_end_to_end(class_folder, tmp_path, capsys):
    run = str(tmp_path / "run")
    flags = [
        "--model",
        "transcnn_test",
        "--img-size",
        "32",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--accelerator",
        "cpu",
    ]
    assert cli.main(["train", str(class_folder), "--out", run, *flags]) == 0
    captured = capsys.readouterr()
    assert "top-1" in captured.out
    assert "index.html" in captured.out
    assert "epoch 1/1" in captured.err
    assert cli.main(["train", str(class_folder), "--out", run, *flags]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert cli.main(["eval", run, "--split", "val", "--accelerator", "cpu"]) == 0  # the data it was trained on
    assert "top-1" in capsys.readouterr().out
    assert cli.main(["predict", run, str(class_folder / "class_0"), "--json", "--accelerator", "cpu"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 8


def test_tables_cut_no_name_at_80_columns(monkeypatch, capsys):
    """Tables fit where names are short; where they are long, the terminal breaks lines."""
    monkeypatch.setenv("COLUMNS", "80")
    short, long = ["transcnn_medium", "hatnet_large"], "vit_tiny_patch16_384.augreg_in21k_ft_in1k"
    assert cli.main(["models", *short]) == 0
    table = capsys.readouterr().out.partition("Layers are")[0]
    assert all(f" {name} " in table for name in short)
    assert "multiply-adds" in table
    assert max(len(line) for line in table.splitlines()) <= 80
    assert cli.main(["models", long]) == 0
    assert long in capsys.readouterr().out
    assert cli.main(["plug", "test_resnet", "--img_size", "64"]) == 0
    assert " layer2 " in capsys.readouterr().out


def test_closed_streams_lead_nowhere(tmp_path):
    """A service or ``>&-``: Python's streams are None, and the next file would get what libraries print."""
    code = """
import os, sys
from transcnn import cli
cli.main(["--version"])
with open(sys.argv[1], "w") as file:
    os.write(1, b"noise")
    os.write(2, b"noise")
    print(file.fileno() > 2, sys.stdout.isatty(), sys.stderr.isatty(), sys.stdin.read(), file=file)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=True)
    assert (tmp_path / "out").read_text() == "True False False \n"
