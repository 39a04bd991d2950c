"""Settings of strangers (recipes, flags, the environment, checkpoints) are plain values: nothing is imported or called.

Each attack names a module that would leave a mark if it were imported or any of its names called, or a command that
would leave one; and the interpreter itself is asked which processes it started.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml

import fuzz
from timing import allowed
from transcnn import cli
from transcnn.commands.train import train
from transcnn.errors import UserError
from transcnn.plain import MAX_CHARACTERS, MAX_DEPTH, check_plain, load_plain
from transcnn.settings import TrainSettings, as_plain

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # the former is ten times as fast
TRAP = "transcnn_trap"  # a module that leaves a mark when it is imported
STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")


@dataclass
class Watch:
    """What an attack did."""

    folder: Path
    active: bool = True
    events: list[str] = field(default_factory=list)

    def assert_nothing_done(self) -> None:
        """No process started, no module of the attack imported, no file made."""
        assert self.events == []
        assert TRAP not in sys.modules
        assert sorted(path.name for path in self.folder.iterdir()) == ["recipe.yaml", f"{TRAP}.py"]


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """An empty folder with a trap and a recipe to be filled in, which is where the process stands, and what happens."""
    (tmp_path / f"{TRAP}.py").write_text(
        "from pathlib import Path\nPath('imported').touch()\n"
        "def call(*args, **kwargs): Path('called').touch()\n"
        "class Augment:\n    def __init__(self, *args, **kwargs): Path('called').touch()\n"
    )
    (tmp_path / "recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    watch = Watch(tmp_path)

    def hook(event: str, args: tuple[Any, ...]) -> None:  # hooks can't be taken away again
        if watch.active and (event in STARTED or (event == "import" and args[0] == TRAP)):
            watch.events.append(f"{event} {args}")

    sys.addaudithook(hook)
    yield watch
    watch.active = False
    sys.modules.pop(TRAP, None)


SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch called"}}
CALL = {"class_path": f"{TRAP}.call"}
# Whatever shape jsonargparse, or a successor, might take for something to import.
SPECS: list[Any] = [
    SYSTEM,
    CALL,
    {"class_path": f"{TRAP}.call", "dict_kwargs": {"x": 1}},
    {"class_path": f"{TRAP}.Augment", "init_args": {"mixup": 1, "x": CALL}},
    {"class_path": "subprocess.run", "init_args": {"args": ["touch", "called"]}},
    {"class_path": "transcnn.settings.Augment", "init_args": {"aa": CALL}},
    {"class_path": "Augment"},
    {"class_path": TRAP},
    {"class_path": f"{TRAP}.call", "init_args": {}, "__path__": "x"},
    {"_target_": f"{TRAP}.call", "_args_": [1]},
    {"type": f"{TRAP}.call"},
    {"__class__": f"{TRAP}.call", "()": f"{TRAP}.call"},
    f"{TRAP}.call",
    f"{TRAP}:call",
    "os.system('touch called')",
    f"${{oc.env:HOME}}{TRAP}",
]
HOLDERS = [
    lambda spec: {"model_args": spec},
    lambda spec: {"model_args": {"x": spec}},
    lambda spec: {"model_args": {"x": [[spec], {"y": spec}]}},
    lambda spec: {"optim": {"opt_args": spec}},
    lambda spec: {"optim": {"opt_args": {"x": {"y": spec}}}},
    lambda spec: {"optim": {"opt_args": {"init_args": spec, "class_path": "torch.nn.Linear"}}},
]
# Where a value of another type is wanted.
PLACES = [
    *("data", "lr", "seed", "quiet", "task", "epochs", "model", "out", "plug", "config", "num_workers", "type"),
    *("augment", "optim", "ema", "distill", "segment", "detect", "class_path", "init_args", "dict_kwargs", "new"),
    *("augment.policy", "augment.scale", "optim.betas", "optim.milestones", "optim.lr_batch", "ema.ema", "augment.new"),
]


def put(place: str, spec: Any) -> dict[str, Any]:
    """A recipe that has a value at a place."""
    group, _, name = place.rpartition(".")
    return {group: {name: spec}} if group else {name: spec}


def is_plain(value: Any) -> bool:
    try:
        check_plain(value, "value")
    except ValueError:
        return False
    return True


def parse(*argv: str) -> dict[str, Any] | str:
    """The arguments, or the one line that says why not."""
    try:
        return cli.parse("train", train, argv)
    except UserError as error:
        return str(error)


def check(parsed: dict[str, Any] | str) -> None:
    if isinstance(parsed, str):
        assert 0 < len(parsed) < 2000
        assert "Traceback" not in parsed
        return
    groups = [vars(value) if hasattr(value, "__dataclass_fields__") else value for value in parsed.values()]
    assert all(is_plain(group) for group in groups)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: json.dumps(spec)[:60])
def test_a_recipe_that_names_something_to_call_is_read_as_plain_values(watch, spec):
    recipes = [hold(spec) for hold in HOLDERS] + [put(place, spec) for place in PLACES]
    for recipe in recipes:
        (watch.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        check(parse("nowhere", "--config", "recipe.yaml"))
        watch.assert_nothing_done()
    for recipe in recipes[:6]:  # a dictionary is what it says
        (watch.folder / "recipe.yaml").write_text(json.dumps(recipe))
        parsed = parse("nowhere", "--config", "recipe.yaml")
        if isinstance(spec, dict) and "__path__" not in spec:  # a key that jsonargparse keeps for itself
            assert isinstance(parsed, dict)
            held = parsed["model_args"] if "model_args" in recipe else parsed["optim"].opt_args
            assert held == (recipe.get("model_args") or recipe["optim"]["opt_args"])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: json.dumps(spec)[:60])
def test_a_flag_that_names_something_to_call_is_read_as_plain_values(watch, spec):
    text = spec if isinstance(spec, str) else json.dumps(spec)
    flags = [f"--{place}={text}" for place in (*PLACES, "model_args", "model_args.x", "opt_args", "optim.opt_args.x")]
    for path in ("model_args", "model_args.x", "optim.opt_args", "optim", "augment", "lr", "augment.policy", "ema.ema"):
        flags += [f"--{path}.class_path={TRAP}.call", f"--{path}.init_args.x={text}", f"--{path}.help={TRAP}.Augment"]
        flags += [f"--{path}+={text}", f"--{path}.dict_kwargs.x={text}", f"--{path}={TRAP}.Augment"]
    for flag in flags:
        check(parse("nowhere", flag))
        watch.assert_nothing_done()


@pytest.mark.parametrize("recipe", ["x: !!python/object/apply:os.system [touch called]", "!!python/module:{t} ''"])
@pytest.mark.parametrize("place", ["", "model_args: ", "model_args: {x: [", "optim: {opt_args: ", "lr: "])
def test_yaml_tags_name_no_class(watch, recipe, place):
    tags = [recipe, "!!python/name:{t}.call ''", "!!python/object:{t}.Augment {{}}", "!!python/object/new:{t}.call []"]
    tags += ["!{t}.call {{}}", "!<tag:yaml.org,2002:python/module:{t}> ''", "!!binary aGk=", "!!set {{a}}"]
    tags += ["!!timestamp 2020-01-01", "!!python/tuple [1]", "!!omap [a: 1]", "{{? [1, 2] : 3}}"]
    for tag in tags:
        value = tag.format(t=TRAP) if "{t}" in tag or "{{" in tag else tag
        end = "]" * place.count("[") + "}" * place.count("{")
        (watch.folder / "recipe.yaml").write_text(f"{place}{value}{end}\n")
        assert isinstance(parse("nowhere", "--config", "recipe.yaml"), str)
        watch.assert_nothing_done()


def test_the_environment_sets_no_argument(watch, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for prefix in ("TRANSCNN_TRAIN", "TRANSCNN", "TRANSCNN TRAIN", "TRAIN"):
        monkeypatch.setenv(f"{prefix}_MODEL_ARGS", json.dumps({"x": CALL}))
        monkeypatch.setenv(f"{prefix}_OPTIM__OPT_ARGS", json.dumps({"x": SYSTEM}))
        monkeypatch.setenv(f"{prefix}_AUGMENT", f"{TRAP}.Augment")
        monkeypatch.setenv(f"{prefix}_CONFIG", "recipe.yaml")
        monkeypatch.setenv(f"{prefix}_LR", "7")
    (watch.folder / "recipe.yaml").write_text(yaml.safe_dump({"epochs": 3, "model_args": {"x": CALL}}))
    parsed = parse("nowhere")
    assert isinstance(parsed, dict)
    assert (parsed["lr"], parsed["epochs"], parsed["model_args"]) == (1e-3, 50, None)
    watch.assert_nothing_done()


@pytest.mark.parametrize(
    "recipe",
    [
        {"model_args": {"x": SYSTEM}},
        {"model_args": CALL},
        {"optim": {"opt_args": {"x": CALL}}},
        {"optim": {"opt_args": SYSTEM}},
        {"augment": {"class_path": f"{TRAP}.Augment"}},
        {"lr": CALL},
    ],
    ids=json.dumps,
)
def test_such_a_command_ends_with_one_line(watch, recipe, capsys):
    (watch.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    small = ["--model", "transcnn_test", "--img_size", "32", "--accelerator", "cpu", "--precision", "32", "--dry-run"]
    assert cli.main(["train", "nowhere", "--config", "recipe.yaml", *small, "--num_workers", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("transcnn: ")
    assert error.count("\n") == 1
    watch.assert_nothing_done()


def test_settings_in_a_checkpoint_are_plain(watch, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for settings in (
        {"model_args": {"x": torch.zeros(2)}},
        {"optim": {"opt_args": {b"x": 1}}},
        {"seed": torch.float16},
    ):
        torch.save({"state_dict": {}, "transcnn": {"model": "transcnn_test", "settings": settings}}, run / "x.ckpt")
        with pytest.raises(UserError) as caught:
            train(resume=str(run / "x.ckpt"), quiet=True)
        assert "\n" not in str(caught.value)
        watch.assert_nothing_done()


def bomb(width: int, levels: int) -> str:
    """Aliases that stand for width ** levels values."""
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


FLOW_BOMB = "[&a [x, x], &b [*a, *a], &c [*b, *b], *c]"
BOMBS = {
    "aliases": bomb(9, 10),
    "aliases of one value": "model_args: {x: &a [1, 2], y: *a}",
    "an alias of itself": "model_args: &a {x: *a}",
    "merged keys": "model_args: {<<: &a {x: 1}, y: {<<: *a}}",
    "aliases in a string": f"lr: '{FLOW_BOMB}'",
    "aliases in a string in a list": f"optim: {{milestones: ['{FLOW_BOMB}']}}",
    "deep lists": "model_args: " + "[" * 2000 + "]" * 2000,
    "deep names": "model_args: " + "{a: " * 2000 + "1" + "}" * 2000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(400)),
    "a deep string": "lr: '" + "[" * 2000 + "]" * 2000 + "'",
    "a deep list, just too deep": "model_args: {x: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}",
    "long": "x" * (MAX_CHARACTERS + 1),
    "many": "[" + "1," * (MAX_CHARACTERS // 2) + "]",
    "a long number": "epochs: " + "9" * 5000,
    "a long binary number": "epochs: 0b" + "1" * 200_000,
    "a long rate": "lr: " + "9" * 400,
    "a base 60 number": "lr: " + "59:" * 20_000 + "59",
    "a long number among arguments": "model_args: {x: " + "9" * 400 + "}",
    "itself": "config: recipe.yaml",
    "itself as a group": "optim: recipe.yaml",
    "a device": "optim: /dev/zero",
    "two documents": "lr: 1\n--- {lr: 2}",
    "not text": "\0\0",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_once_with_one_line(watch, name):
    (watch.folder / "recipe.yaml").write_text(BOMBS[name])
    began = time.process_time()
    parsed = parse("nowhere", "--config", "recipe.yaml")
    assert time.process_time() - began < allowed(5)
    assert isinstance(parsed, str)
    assert len(parsed) < 2000


def test_what_is_not_too_deep_is_read():
    text = "{x: " + "[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1) + "}"
    assert parse("--model_args", text) == parse("--model_args", text)
    assert load_plain("{a: [1, 2.5, 1e-3, true, null, x, '*.png', 'a: &b *c']}") == {
        "a": [1, 2.5, 1e-3, True, None, "x", "*.png", "a: &b *c"]
    }


def changed(random: Random, value: Any) -> Any:
    """Plain settings with one value or name in them replaced by something else."""
    junk = [*SPECS, None, True, -1, 0, 1e308, float("nan"), 10**40, "", "null", "1e3", "\x1b[2J", "a\nb", "é" * 300]
    junk += [
        [],
        {},
        [[[[]]]],
        {"": 1},
        {"x": {"y": [1, {"z": None}]}},
        [1] * 200,
        "[",
        "{a: *b}",
        "!!python/name:os.system",
    ]
    if isinstance(value, dict) and value and random.random() < 0.85:
        name = random.choice(sorted(value))
        found = {**value, name: changed(random, value[name])}
        if random.random() < 0.15:
            found[random.choice(["new", "class_path", "init_args", "config", "__path__"])] = found.pop(name)
        return found
    return random.choice(junk)


def test_a_thousand_recipes_are_read_or_refused_in_one_line(watch: Watch) -> None:
    random, counts = Random(17), {"read": 0, "refused": 0}
    plain = {"data": "x", **as_plain(TrainSettings())}
    marks = [
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "\t",
        "\0",
        "---\n",
        "%YAML 9\n",
        "? ",
        ": ",
        "[" * 30,
        "\ud7ff",
    ]
    for _ in range(fuzz.CASES):
        text = yaml.dump(changed(random, plain), allow_unicode=True, Dumper=DUMPER)
        if random.random() < 0.4:
            at = random.randrange(len(text))
            text = text[:at] + random.choice(marks) + text[at + random.randrange(3) :]
        Path("recipe.yaml").unlink()  # disks take milliseconds to write over a file
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        refused = ""
        try:
            cli.parse("train", train, ["--config=recipe.yaml"])
        except UserError as error:
            refused = str(error)
        counts["refused" if refused else "read"] += 1
        assert len(refused.splitlines()) <= 1, text
        assert len(refused) < 1000, text
    assert min(counts.values()) >= 50, counts
    watch.assert_nothing_done()
