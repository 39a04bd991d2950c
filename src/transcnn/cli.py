"""The command line: a dict from command name to a plain typed function.

:mod:`.arguments` makes flags and help of a function. Modules are imported when their command is called.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from .errors import UserError
from .imports import gc_paused
from .text import printable

__all__ = ["COMMANDS", "ENVIRONMENT", "load_command", "main", "parse"]

COMMANDS = {
    "models": ("transcnn.commands.models:models", "names, parameters, multiply-adds, accuracy of the networks"),
    "train": ("transcnn.commands.train:train", "train a network on images"),
    "data": ("transcnn.commands.data:data", "what a data set is: counts, sizes, faults, duplicates, examples"),
    "eval": ("transcnn.commands.evaluate:evaluate", "score a trained network on a data set"),
    "predict": ("transcnn.commands.predict:predict", "predict what images show"),
    "embed": ("transcnn.commands.embed:embed", "images as vectors: neighbours, near-duplicates, search"),
    "explain": ("transcnn.commands.explain:explain", "plot where a network looks in an image"),
    "compare": ("transcnn.commands.compare:compare", "networks side by side: speed, memory, size"),
    "plug": ("transcnn.commands.plug:plug", "where H-MHSA can go in a CNN, and what it costs there"),
    "export": ("transcnn.commands.export:export", "write a trained network as a file for other engines"),
    "pack": ("transcnn.commands.pack:pack", "write data as shards with a manifest and checksums"),
    "demo": ("transcnn.commands.demo:demo", "a page in the browser: predictions, and where any spot looks"),
}

ENVIRONMENT = {
    # Read by PyTorch at its first large tensor: pages of 2 MiB where the kernel has them, a few per cent of a step.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Read by GNU OpenMP: a thread that waits for others gives its core away after some 0.1 ms instead of 5. Where
    # readers of images or other programs want the core the time is theirs; PyTorch has its next operation sooner.
    "GOMP_SPINCOUNT": "5000",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 or 2 for what the user can mend, 130 after Ctrl-C."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    _replace_closed_streams()
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
        result = function(**arguments)
    except UserError as error:
        return error.code if error.reported else _fail(str(error), error.code)
    except SystemExit as error:  # --help ends so
        return error.code if isinstance(error.code, int) else 0
    except KeyboardInterrupt as error:
        if not getattr(error, "reported", False):
            print(f"transcnn: stopped {error}".strip(), file=sys.stderr)
        signum = getattr(error, "signum", signal.SIGINT)
        return 0 if signum == signal.SIGTERM else 128 + signum
    except BrokenPipeError:  # the reader of our output went away, as head does
        sys.stderr.close()
        return 141
    except OSError as error:  # a path that can't be, a disk that is full
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except (MemoryError, RuntimeError, ImportError, SystemError) as error:
        if (first := _out_of_memory(error)) is None:
            raise
        return _fail(f"not enough memory ({first}); smaller images, batches or networks need less")
    if name == "predict" and all("error" in row for row in result):
        return _fail(f"no file can be read; the first: {result[0]['file']}: {result[0]['error']}")
    return 0


def _replace_closed_streams() -> None:
    """Let output lead nowhere where a stream was closed before (``>&-``, a service), of which Python makes None.

    The descriptors are taken, too: else the next file that is opened gets one, and what libraries print is in it.
    """
    names = ("stdin", "stdout", "stderr")
    for number, name in enumerate(names):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
    for number, name in enumerate(names):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


# Of PyTorch, Python, the C++ library, and of the system's loader, whose libraries are the first to find no room.
NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory", "bad_alloc")
NO_MEMORY += ("failed to map segment", "cannot map zero-fill pages", "can't start new thread", "errno 12]")
# oneDNN's words for it, and those of C code that found no memory for an error.
NO_MEMORY += ("could not create a primitive", "error return without exception set")


def _out_of_memory(error: BaseException | None) -> str | None:
    """What an error, or what it was raised from, says about memory, of the CPU or a GPU, in one line; else None."""
    while error is not None:
        lines = str(error).splitlines()
        if said := [line for line in lines if any(word in line.lower() for word in NO_MEMORY)]:
            return said[0].strip()
        if isinstance(error, MemoryError):
            return lines[0] if lines else "the system gives no more"
        error = error.__cause__ or error.__context__
    return None


def load_command(name: str) -> Callable[..., Any]:
    """The function of a command."""
    module, function = COMMANDS[name][0].split(":")
    try:
        with gc_paused():
            return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("transcnn"):
            raise
        raise UserError(f'{error.name} is not installed; run: pip install "transcnn[train]"') from error


def parse(name: str, function: Callable[..., Any], argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of ``function`` as the command line ``argv`` (without the command's name) gives them."""
    command = make_command(name, function)
    if any(token in ("-h", "--help") for token in (argv[: argv.index("--")] if "--" in argv else argv)):
        command.parser.print_help()
        raise SystemExit(0)
    return command.parse(argv)


@cache
def make_command(name: str, function: Callable[..., Any]) -> Any:
    """The flags and types of a command."""
    from .arguments import Command

    return Command(name, function)


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


def _fail(message: str, code: int = 2) -> int:
    print(f"transcnn: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
