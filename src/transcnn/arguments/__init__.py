"""A command's flags, help and values, made from its function: argparse reads the words, jsonargparse checks the types.

A function's parameters before ``*`` are the command's positional arguments, all others are flags; its docstring is the
help. A parameter that is a dataclass is a group: each of its fields has a flag, with or without the group's name
(``--augment.mixup``, ``--mixup``), and in a recipe stands under the group or by itself. A name that several groups
have, such as ``--class_weights``, means that of the task.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ..errors import UserError
from ..plain import (
    FORMER_NAMES,
    MAX_CHARACTERS,
    READING_ERRORS,
    Arguments,
    check_plain,
    describe_type,
    describe_value,
    load_recipe,
    members,
    new_parser,
    one_line,
    short,
    with_new_names,
)
from ..settings import HELP_GROUPS, TrainSettings
from .argument import Argument, HelpFormatter, docs_of, types_of

__all__ = ["Argument", "Command", "describe_type", "members", "read_settings"]

COMMAND_LINE = "command line"
CONFIG_HELP = "YAML file that sets any flag; flags given beside it count; relative paths are the working folder's"
NEGATIVE = re.compile(r"-(\.?\d|\.?inf|\.?nan)", re.IGNORECASE)
NOT_A_SWITCH = ("yes", "no", "on", "off", "0", "1")  # what people write for true and false


class Command:
    """A command of the command line.

    Args:
        name: What it is called as.
        function: What it calls: a typed function, or one of settings (``settings.takes_settings``).
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function
        self.source: Any = getattr(
            function, "settings_type", inspect.unwrap(function)
        )  # a function, or a dataclass of its arguments
        self.groups: dict[str, Any] = {}  # name of a group: its dataclass
        self.arguments: dict[str, Argument] = {}
        docs = docs_of(self.source)
        hints = types_of(self.source)
        for parameter in inspect.signature(self.source).parameters.values():
            kind, default = hints[parameter.name], parameter.default
            if parameter.name == "origins":  # no setting: where the others came from
                continue
            if is_dataclass(kind):
                self.groups[parameter.name] = kind
                inner_docs, inner_hints = docs_of(kind), get_type_hints(kind)
                for item in fields(kind):
                    full = f"{parameter.name}.{item.name}"
                    value = getattr(default, item.name)
                    self.arguments[full] = Argument(full, inner_hints[item.name], value, inner_docs[item.name])
                continue
            positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            text = docs.get(parameter.name, "")
            self.arguments[parameter.name] = Argument(parameter.name, kind, default, text, positional)

    # --- words ------------------------------------------------------------------------------------------------------

    @cached_property
    def flags(self) -> dict[str, str]:
        """Every spelling of every flag, with underscores, and the argument that it means."""
        found = {f"--{name}": name for name in self.arguments}
        for name in self.arguments:
            short = f"--{name.rpartition('.')[2]}"
            if short not in found or name == f"{short[2:]}.{short[2:]}":  # --ema means ema.ema
                found[short] = name
        found |= {f"--{name.removesuffix('_name')}": name for name in self.arguments if name == "class_name"}
        former = {new: old for old, new in FORMER_NAMES.items()}
        for name in self.arguments:
            group, _, last = name.rpartition(".")
            if last in former and group in ("", "segment"):  # where the former names were
                found |= {f"--{former[last]}": name, f"--{group}.{former[last]}": name}
        return found

    @cached_property
    def shared(self) -> set[str]:
        """Names that arguments of several groups have, such as ``loss``."""
        counts = Counter(name.rpartition(".")[2] for name in self.arguments if "." in name)
        return {name for name, count in counts.items() if count > 1}

    @cached_property
    def parser(self) -> argparse.ArgumentParser:
        """argparse's parser of the words; values stay text."""
        text = inspect.getdoc(self.function) or ""
        positionals = (argument.usage for argument in self.positionals)
        parser = argparse.ArgumentParser(
            prog=f"transcnn {self.name}",
            usage=" ".join(["transcnn", self.name, *positionals, "[--FLAG VALUE ...]"]),
            description=re.split(r"\n(?:Args|Returns|Raises):\n", text)[0].strip(),
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
            argument_default=argparse.SUPPRESS,
        )
        for title, names in self._help_groups().items():
            group = parser.add_argument_group(title)
            for name in names:
                if name == "config":
                    group.add_argument("--config", action="append", metavar="FILE", help=CONFIG_HELP)
                else:
                    self._add(group, self.arguments[name])
        for name in self.shared:
            parser.add_argument(f"--{name}", dest=name, help=argparse.SUPPRESS)
        parser._negative_number_matcher = NEGATIVE  # argparse's takes -1e-3 for a flag
        return parser

    @property
    def positionals(self) -> list[Argument]:
        """The arguments that words without a flag go to, in order."""
        return [argument for argument in self.arguments.values() if argument.positional]

    def _help_groups(self) -> dict[str, list[str]]:
        """The headings of ``--help``, each with its arguments."""
        result = {"arguments": [argument.name for argument in self.positionals]}
        single = [name for name, argument in self.arguments.items() if not argument.positional and "." not in name]
        result |= {title: list(names) for title, names in HELP_GROUPS.items()} if self.groups else {}
        listed = {name for names in result.values() for name in names}
        result["flags"] = [name for name in (*single, "config") if name not in listed]
        for group, kind in self.groups.items():
            summary = (inspect.getdoc(kind) or "").split("\n\n")[0].rstrip(".").replace("``", "")
            title = f"{group}: {summary[:1].lower()}{summary[1:]}"
            result[title] = [name for name in self.arguments if name.startswith(f"{group}.")]
        return {title: names for title, names in result.items() if names}

    def _add(self, group: Any, argument: Argument) -> None:
        last = argument.name.rpartition(".")[2]
        shown = f"--{argument.name if last in self.shared else last}"
        form = {"nargs": "+"} if argument.is_list else {}
        words = {"metavar": argument.metavar, "help": argument.help_line}
        action = group.add_argument(shown, dest=argument.name, **words, **form)
        action.positional = argument.positional
        for flag, name in self.flags.items():  # other spellings are understood, not shown
            if name == argument.name and flag != shown and flag[2:] not in self.shared:
                group._option_string_actions[flag] = group._option_string_actions[shown]

    def read_words(self, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """The recipes that words name, and what they give to arguments, as text; ``shared`` names stand as they are."""
        cut = argv.index("--") if "--" in argv else len(argv)
        try:
            found, words = self.parser.parse_known_args(self._spell_out(argv[:cut]))
        except argparse.ArgumentError as error:
            raise UserError(f"{error.argument_name} needs a value") from error
        given: dict[str, Any] = dict(vars(found))
        words = [*words, *argv[cut + 1 :]]
        for argument in self.positionals:
            if words:
                if argument.name in given:
                    raise UserError(f"{argument.name} is given twice: {given[argument.name]} and {words[0]}")
                given[argument.name] = words if argument.is_list else words[0]
                words = [] if argument.is_list else words[1:]
        if words:
            raise UserError(f"too many arguments: {' '.join(words)}")
        recipes = given.pop("config", [])
        return recipes, given

    def _spell_out(self, argv: Sequence[str]) -> list[str]:
        """Flags as argparse knows them: ``--img-size`` is ``--img_size``, a switch without a value gets one."""
        result, i = [], 0
        while i < len(argv):
            token = argv[i]
            i += 1
            if not token.startswith("--"):
                result.append(token)
                continue
            flag, equals, value = token.partition("=")
            flag, negated = self._find(flag)
            name = self.flags.get(flag)
            following = argv[i].lower() if i < len(argv) else ""
            if negated:
                if equals or following in ("true", "false"):
                    raise UserError(f"{token}: a negated flag takes no value")
                result.append(f"{flag}=false")
            elif equals or name is None or not self.arguments[name].is_switch:
                result.append(flag + equals + value)
            elif following in ("true", "false"):
                result.append(f"{flag}={following}")
                i += 1
            elif following in NOT_A_SWITCH and not os.path.exists(argv[i]):
                raise UserError(f"{token} must be true or false, got {argv[i]}")
            else:
                result.append(f"{flag}=true")
        return result

    def _find(self, flag: str) -> tuple[str, bool]:
        """The parser's spelling of a flag, and whether it was negated with ``--no-``."""
        spelled = "--" + flag[2:].replace("-", "_")
        if spelled in self.flags or spelled == "--config":
            return spelled, False
        positive = "--" + spelled.removeprefix("--no_")
        if positive != spelled and positive in self.flags:
            if not self.arguments[self.flags[positive]].is_switch:
                raise UserError(f"{flag}: {positive} takes a value, it can't be negated")
            return positive, True
        raise UserError(f"no such argument: {flag}{self._hint(spelled[2:], '--')}")

    def _hint(self, name: str, dashes: str = "") -> str:
        near = difflib.get_close_matches(name, [flag[2:] for flag in self.flags], n=1)
        return f"; did you mean {dashes}{near[0]}?" if near else f"; transcnn {self.name} --help lists them"

    # --- values -----------------------------------------------------------------------------------------------------

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The function's arguments, as words and the recipes they name give them; words override recipes.

        Functions of settings get ``origins`` as well: by full name, the recipe or the command line it came from.

        Raises:
            UserError: A word, a recipe or a value that can't be understood.
        """
        recipes, values = self.read_words(argv)
        origins: dict[str, str] = {}
        tree: dict[str, Any] = {}
        read = [(recipe, self._read_recipe(recipe)) for recipe in recipes]
        for _, found in read:
            tree |= {"task": found["task"]} if "task" in found else {}
        task = values.get("task") or tree.get("task")
        for recipe, found in read:
            for name, value in found.items():
                full = self._of_task(name, task)
                _put(tree, full, self.arguments[full].at_home(value))
                origins[full] = recipe
        for name, words in values.items():
            full = self._of_task(name, task)
            argument = self.arguments[full]
            _put(tree, full, argument.at_home(argument.value(words)))
            origins[full] = COMMAND_LINE
        arguments = self.check(tree)
        return {**arguments, "origins": origins} if self.groups else arguments

    def _of_task(self, name: str, task: Any) -> str:
        """The full name of an argument; of one that several groups have, that of the task, else of the first."""
        if name not in self.shared:
            return name
        task = task or self.arguments["task"].default
        found = [full for full in self.arguments if full.rpartition(".")[2] == name]
        return next((full for full in found if full == f"{task}.{name}"), found[0])

    def _read_recipe(self, file: str) -> dict[str, Any]:
        """What a recipe sets, by full names."""
        try:
            with Path(file).open(encoding="utf-8") as stream:
                values = load_recipe(stream.read(MAX_CHARACTERS + 1))
        except OSError as error:
            raise UserError(f"can't read {file}: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeError) as error:
            raise UserError(f"can't read {file}: {one_line(error)}") from error
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise UserError(f"{file} must hold names with values, got {describe_value(values)}")
        return self.flatten(values, file)

    def flatten(self, values: Mapping[Any, Any], source: str) -> dict[str, Any]:
        """Values in groups as values by full names; a name that stands in no group is that of its flag.

        Names that several groups have, such as ``loss``, stay as they are.
        """
        flat: dict[str, Any] = {}
        for name, value in values.items():
            if name not in self.groups or (not isinstance(value, Mapping) and f"{name}.{name}" in self.arguments):
                found = {self._full_name(str(name)): value}  # ema: false is --ema false
            elif isinstance(value, Mapping):
                found = {f"{name}.{inner}": item for inner, item in value.items()}
            elif value is None:  # all that stood there is a comment
                continue
            else:
                raise UserError(f"{source}: {name} must be names with values, got {describe_value(value)}")
            for full, item in found.items():
                if full in flat:
                    raise UserError(f"{source}: {full} is given twice")
                if full not in self.arguments and full not in self.shared:
                    raise UserError(f"{source}: no such argument: {short(full)}{self._hint(full)}")
                flat[full] = item if full in self.shared else self.arguments[full].plain(item)
        return flat

    def _full_name(self, name: str) -> str:
        """The argument that a recipe means by a name outside of groups, as a flag of that name would."""
        if name in self.arguments or name in self.shared:
            return name
        return self.flags.get(f"--{name.replace('-', '_')}", name)

    def check(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Values (in groups) with the right types, and the defaults for what isn't there."""
        for argument in self.arguments.values():
            if argument.default is Argument.empty and argument.name not in tree:
                raise UserError(f"{argument.name.upper()} is missing: {argument.help.splitlines()[0]}")
        for name, argument in self.arguments.items():  # jsonargparse lets null be any type's
            group, _, inner = name.rpartition(".")
            values = tree.get(group, {}) if group else tree
            if inner in values and values[inner] is None and type(None) not in members(argument.type):
                raise UserError(f"{name} must be {describe_type(argument.type)}, got null")
        for name, value in self._numbers(tree):
            if value != value or value in (math.inf, -math.inf):
                raise UserError(f"{name} must be {describe_type(self.arguments[name].type)}, got {value}")
        defaults = {name: argument.default for name, argument in self.arguments.items() if "." not in name}
        try:  # of what is given alone: to check all defaults, too, takes jsonargparse 70 times as long
            given = self._types.instantiate(self._types.parse_object(dict(tree), env=False, defaults=False)).as_dict()
        except READING_ERRORS as error:
            raise UserError(self._explain(error, tree)) from error
        return {**defaults, **given}

    def _numbers(self, tree: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """Names and values of the numbers in a tree, those in lists too; free arguments may hold any."""
        for name, argument in self.arguments.items():
            group, _, inner = name.rpartition(".")
            value = tree.get(group, {}).get(inner) if group else tree.get(name)
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, float) and Arguments not in members(argument.type):
                    yield name, item

    @cached_property
    def _types(self) -> Any:
        """jsonargparse's parser, which checks the types."""
        parser = new_parser()
        if inspect.isclass(self.source):
            parser.add_class_arguments(self.source, skip={"origins"})
        else:  # not by the function itself, for whose name jsonargparse would search the package and import it all
            for argument in self.arguments.values():
                default = None if argument.default is Argument.empty else argument.default
                parser.add_argument(f"--{argument.name}", type=argument.type, default=default)
        return parser

    def _explain(self, error: Exception, tree: Mapping[str, Any]) -> str:
        """What is wrong in words: jsonargparse says it in Python's types."""
        text = one_line(error)
        for name in re.findall(r'"([\w.]+)"', text):
            if argument := self.arguments.get(name):
                group, _, inner = name.rpartition(".")
                value = tree.get(group, {}).get(inner) if group else tree.get(name)
                return f"{name} must be {describe_type(argument.type)}, got {describe_value(value)}"
        return f"the arguments can't be understood: {text}"


def read_settings(values: Mapping[str, Any]) -> TrainSettings:
    """A training run's settings from what ``as_plain`` made of them, with the defaults for what isn't there.

    Raises:
        UserError: A name or a value that can't be one of a setting.
    """
    command = _of_settings()
    try:
        check_plain(values, "settings")
    except ValueError as error:
        raise UserError(str(error)) from error
    tree: dict[str, Any] = {}
    for name, value in command.flatten(with_new_names(dict(values)), "settings").items():
        _put(tree, command._of_task(name, values.get("task")), value)
    return TrainSettings(**command.check(tree))


@cache
def _of_settings() -> Command:
    return Command("train", TrainSettings)


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    group, _, inner = name.rpartition(".")
    (tree.setdefault(group, {}) if group else tree)[inner] = value
