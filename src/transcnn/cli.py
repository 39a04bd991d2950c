"""The command line: a dict from command name to a plain typed function; jsonargparse makes flags and help of it.

A function's parameters before ``*`` are the command's positional arguments, all others are flags; its docstring is
the help, and ``--config FILE.yaml`` sets any of them. Modules are imported when their command is called.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from .errors import UserError
from .plain import FORMER_NAMES
from .text import printable
from .training.origins import note_origins

__all__ = ["COMMANDS", "main", "make_parser", "parse"]

COMMANDS = {
    "models": ("transcnn.commands.models:models", "names, parameters, multiply-adds, accuracy of the networks"),
    "train": ("transcnn.commands.train:train", "train a network on images"),
    "eval": ("transcnn.commands.evaluate:evaluate", "score a trained network on a data set"),
    "predict": ("transcnn.commands.predict:predict", "name what images show"),
    "explain": ("transcnn.commands.explain:explain", "plot where a network looks in an image"),
    "compare": ("transcnn.commands.compare:compare", "networks side by side: speed, memory, size"),
    "plug": ("transcnn.commands.plug:plug", "where H-MHSA can go in a CNN, and what it costs there"),
    "export": ("transcnn.commands.export:export", "write a trained network as a file for other engines"),
    "pack": ("transcnn.commands.pack:pack", "write data as shards with a manifest and checksums"),
    "demo": ("transcnn.commands.demo:demo", "a page in the browser: predictions, and where any spot looks"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    # Read by PyTorch at its first large tensor: pages of 2 MiB where the kernel has them, a few per cent of a step.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that the terminal's encoding lacks ends no command
        sys.stdout.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        from . import __version__

        print(__version__)
        return 0
    try:
        name, arguments = argv[0], argv[1:]
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
            raise UserError(f"no such command: {name}; {hint}")
        function = load_command(name)
        arguments = parse(name, function, arguments)
        function(**arguments)
    except UserError as error:
        return 2 if error.told else _fail(str(error))
    except SystemExit as error:  # --help and --print_config end so
        return error.code if isinstance(error.code, int) else 0
    except KeyboardInterrupt as error:
        if not getattr(error, "told", False):
            print(f"transcnn: stopped {error}".strip(), file=sys.stderr)
        return 0 if getattr(error, "signum", None) == signal.SIGTERM else 130
    except BrokenPipeError:  # the reader of our output went away, as head does
        sys.stderr.close()
        return 141
    return 0


def load_command(name: str) -> Callable[..., Any]:
    """The function of a command."""
    module, function = COMMANDS[name][0].split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("transcnn"):
            raise
        raise UserError(f'{error.name} is not installed; run: pip install "transcnn[train]"') from error


def parse(name: str, function: Callable[..., Any], argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of ``function`` as the command line ``argv`` (without the command's name) gives them."""
    parser = make_parser(name, function)
    try:
        words = _spell_out(parser, function, list(argv))
        config = parser.parse_args(words, env=False)  # JSONARGPARSE_DEFAULT_ENV would let the environment set all
        arguments = parser.instantiate(config).as_dict()
        _check_plain(arguments)
    except UserError:
        raise
    except argparse.ArgumentError as error:
        raise UserError(_one_line(error)) from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, OSError) as error:
        text = _one_line(error)
        reason = "a group of settings must be names with values" if "must be a mapping" in text else text
        raise UserError(f"the arguments can't be understood: {reason}") from error
    arguments.pop("config", None)
    note_origins(words)
    return arguments


def _check_plain(arguments: dict[str, Any]) -> None:
    """See that dictionaries whose keys are free hold plain values alone."""
    from .plain import check_plain

    for name, value in arguments.items():
        inner = vars(value) if is_dataclass(value) else {"": value}
        for key, item in inner.items():
            if isinstance(item, dict):
                check_plain(item, ".".join(filter(None, (name, key))))


@cache
def make_parser(name: str, function: Callable[..., Any]) -> Any:
    """jsonargparse's parser for one command."""
    from .errors import require

    jsonargparse = require("jsonargparse", "train")
    import yaml

    from .plain import load_plain

    # Settings come from strangers' files, too. jsonargparse imports and calls what a value names as class_path, be it
    # in a dictionary or in place of a group; here no value can name anything to import.
    jsonargparse.set_parsing_settings(import_path_denylist=["*"], instantiate_subclass_spec_in_any=False)
    jsonargparse.set_loader("plain", load_plain, (yaml.YAMLError,))
    positionals = _positionals(function)
    usage = " ".join(["transcnn", name, *(_usage(p) for p in positionals), "[--FLAG VALUE ...]"])
    parser = jsonargparse.ArgumentParser(prog=f"transcnn {name}", usage=usage, exit_on_error=False, parser_mode="plain")
    parser.add_argument("--config", action="config", help="YAML file that sets any of the arguments below")
    parser.add_function_arguments(function, as_positional=False, fail_untyped=True)
    return parser


def _positionals(function: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _usage(parameter: inspect.Parameter) -> str:
    word = parameter.name.upper()
    if "list" in str(parameter.annotation):
        word += " ..."
    return word if parameter.default is parameter.empty else f"[{word}]"


def _spell_out(parser: Any, function: Callable[..., Any], argv: list[str]) -> list[str]:
    """What people type as what jsonargparse reads.

    ``--img-size`` becomes ``--img_size``, ``--mixup`` the one flag that ends so (``--augment.mixup``), a switch without
    a value (``--json``, ``--no-json``) gets one, and positional words become flags of their names.
    """
    flags = {flag: action for flag, action in parser._option_string_actions.items() if flag.startswith("--")}
    switches = {flag for flag, action in flags.items() if "{true,false}" in str(action.metavar or "")}
    parameters = inspect.signature(function).parameters.values()
    switches |= {f"--{p.name}" for p in parameters if isinstance(p.default, bool)}
    result, words, i = [], [], 0
    while i < len(argv):
        token = argv[i]
        i += 1
        if token == "--":
            words += argv[i:]
            break
        if not token.startswith("--"):
            (result if token == "-h" else words).append(token)
            continue
        flag, equals, value = token.partition("=")
        flag, negated = _find_flag(flag, flags)
        if flag in ("--help", "--print_config"):
            result.append(token)
        elif equals:
            result.append(f"{flag}={value}")
        elif negated:
            result.append(f"{flag}=false")
        elif flag in switches and (i == len(argv) or argv[i].lower() not in ("true", "false")):
            result.append(f"{flag}=true")
        elif i < len(argv) and not argv[i].startswith("--"):
            result.append(f"{flag}={argv[i]}")
            i += 1
        else:
            raise UserError(f"{token} needs a value")
    # A file's values are what all others override, wherever it is named.
    result.sort(key=lambda token: not token.startswith("--config="))
    files = sum(token.startswith("--config=") for token in result)
    return result[:files] + _name_words(function, words) + result[files:]


def _find_flag(flag: str, flags: dict[str, Any]) -> tuple[str, bool]:
    """The parser's spelling of a flag, and whether it was negated with ``--no-``."""
    spelled = flag.replace("-", "_").replace("__", "--", 1)
    group, dot, last = spelled.rpartition(".") if "." in spelled else ("--", "", spelled[2:])
    spelled = f"{group}{dot}{FORMER_NAMES.get(last, last)}"
    for candidate, negated in ((spelled, False), ("--" + spelled.removeprefix("--no_"), True)):
        own = f"{candidate}.{candidate[2:]}"  # --ema means ema.ema, not the whole group
        if own in flags:
            return own, negated
        if candidate in flags:
            return candidate, negated
        # --class means --class_name: class is no name for a parameter in Python
        ends = [known for known in flags if known.endswith("." + candidate[2:]) or known == f"{candidate}_name"]
        if len(ends) == 1:
            return ends[0], negated
        if not candidate.startswith("--") or (spelled == candidate and not spelled.startswith("--no_")):
            break
    names = {known.rpartition(".")[2].removeprefix("--"): known for known in flags}
    near = difflib.get_close_matches(spelled[2:], names, n=1)
    hint = f"; did you mean --{near[0]}?" if near else "; --help lists them"
    raise UserError(f"no such argument: {flag}{hint}")


def _name_words(function: Callable[..., Any], words: list[str]) -> list[str]:
    """Positional words as flags; a last parameter that is a list takes all that are left."""
    result = []
    for parameter in _positionals(function):
        if not words:
            return result
        if "list" in str(parameter.annotation):
            return [*result, f"--{parameter.name}={json.dumps(words)}"]
        result.append(f"--{parameter.name}={words.pop(0)}")
    if words:
        raise UserError(f"too many arguments: {' '.join(words)}")
    return result


def _overview() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "Hierarchical multi-head self-attention in convolutional networks: train it, score it, use it.",
            "",
            "usage: transcnn COMMAND ...",
            "",
            *lines,
            "",
            "transcnn COMMAND --help says more.",
        ]
    )


def _one_line(error: Exception) -> str:
    """jsonargparse's message on one line, without the layers of its own parser."""
    if denied := re.search(r"Importing '(.+?)' is not allowed", str(error)):
        return f"settings are plain values, none can name a class: {denied[1]}"
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines).replace('Parser key "', 'argument "').replace("typing.", "")


def _fail(message: str) -> int:
    print(f"transcnn: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
