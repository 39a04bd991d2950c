"""Plain values: what a recipe, a flag or a checkpoint may hold, and YAML of strangers read as nothing else.

Plain are numbers, strings, booleans, None, and lists and dictionaries of these. No name in such a file is ever looked
up as a class or a module, whatever key it stands under.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import types
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import yaml

from .errors import UserError, require

__all__ = [
    "FORMER_NAMES",
    "MAX_CHARACTERS",
    "MAX_DEPTH",
    "READING_ERRORS",
    "Arguments",
    "check_plain",
    "describe_type",
    "describe_value",
    "dump_plain",
    "load_plain",
    "load_recipe",
    "load_text",
    "members",
    "new_parser",
    "one_line",
    "short",
    "with_new_names",
]

# What jsonargparse raises about values that it can't read.
READING_ERRORS = (argparse.ArgumentError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
READING_ERRORS = (*READING_ERRORS, RecursionError, OSError)

# Settings that were renamed: flags, recipes, runs and checkpoints may still use the old name.
FORMER_NAMES = {"weights_back": "logit_adjustment"}

MAX_CHARACTERS = 1 << 18  # of a recipe; ours have less than 3,000
MAX_DEPTH = 20  # of lists and dictionaries inside each other
MAX_VALUES = 200_000  # inside of one; of a file's header, most are names of classes

# Numbers in base 8 and 60 to YAML 1.1, and to nobody who writes them: 010 would be 8, 1:30 would be 90.
_ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)")

_TAGS = {None, "!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))}

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


if TYPE_CHECKING:
    Arguments = dict[str, Any]
else:

    class Arguments(dict):
        """Arguments for something of others, under names of theirs; plain values. To jsonargparse a type of its own."""


def new_parser(**kwargs: Any) -> Any:
    """An empty parser of jsonargparse that reads plain values and nothing else.

    jsonargparse imports and calls what a value names as ``class_path``, be it in a dictionary or in place of a group of
    settings. It has switches for that (for all parsers of the process): here no value can name anything to import.
    """
    jsonargparse = require("jsonargparse", "train")
    jsonargparse.set_parsing_settings(import_path_denylist=["*"], instantiate_subclass_spec_in_any=False)
    register = importlib.import_module("jsonargparse.typing").register_type
    register(Arguments, serializer=dict, deserializer=_read_arguments)
    jsonargparse.set_loader("plain", load_text, (yaml.YAMLError,))
    return jsonargparse.ArgumentParser(parser_mode="plain", exit_on_error=False, **kwargs)


def _read_arguments(value: Any) -> dict[str, Any]:
    """A dictionary, or the text of one."""
    if isinstance(value, str):
        with suppress(yaml.YAMLError):
            value = load_plain(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"expected names with values, such as {{stem_stride: 1}}, got {value!r:.80}")
    check_plain(value, "arguments")
    return value


def one_line(error: Exception) -> str:
    """jsonargparse's message on one line, without the layers of its own parser."""
    if denied := re.search(r"Importing '(.+?)' is not allowed", str(error)):
        return f"settings are plain values, none can name a class: {denied[1]}"
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines).replace('Parser key "', 'argument "').replace("typing.", "")


def load_plain(text: str) -> Any:
    """What a YAML (or JSON) text says, as plain values.

    Raises:
        yaml.YAMLError: It isn't YAML, names a class of Python (a tag), repeats itself by aliases, gives a name two
            values, is nested more than ``MAX_DEPTH`` deep or longer than ``MAX_CHARACTERS``.
    """
    _check_events(text)
    try:
        value = with_new_names(importlib.import_module("jsonargparse").get_loader("yaml")(text))
        check_plain(value, "a value")
    except (ValueError, TypeError, RecursionError, OverflowError) as error:  # of a number or key that Python can't hold
        raise yaml.YAMLError(str(error)) from error
    for string in _strings(value):  # jsonargparse reads a string once more where it expects something else
        if string != text:
            _check_string(string)
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes strings that our reader, unlike YAML 1.1, takes for numbers: 1e3."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9._]+[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def dump_plain(values: dict[str, Any]) -> str:
    """Plain values as YAML that :func:`load_plain` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_recipe(text: str) -> Any:
    """What a text that people write says, as :func:`load_plain` reads it.

    Raises:
        yaml.YAMLError: As there; or it has a number that YAML reads in base 8 or 60.
    """
    value = load_plain(text)
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _ODD_NUMBER.fullmatch(event.value):
            raise yaml.YAMLError(f"YAML reads {event.value} in base 8 or 60: write a plain number, or a name in quotes")
    return value


def load_text(text: str) -> Any:
    """What one value says (``1e-3``, ``true``, ``[1, 2]``, ``null``); text that isn't YAML is text."""
    try:
        value = load_recipe(text)
    except yaml.MarkedYAMLError:
        return text
    except yaml.YAMLError as error:
        raise UserError(f"{text[:40]}{'...' * (len(text) > 40)}: {error}") from error
    return text if value is None and text != "null" else value


def check_plain(value: Any, name: str) -> None:
    """See that a value is plain, and not too large: what stands in many places counts in each of them.

    Raises:
        ValueError: It isn't, is nested more than ``MAX_DEPTH`` deep, or has more than ``MAX_VALUES`` values inside;
            ``name`` says what it is the value of.
    """
    todo, found = [(value, name, 0)], 0
    while todo:
        item, name, depth = todo.pop()
        found += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{name} is nested more than {MAX_DEPTH} deep")
        if isinstance(item, dict | list | tuple):
            if found + len(todo) + len(item) > MAX_VALUES:
                raise ValueError(f"{name} has more than {MAX_VALUES:,} values")
            if isinstance(item, dict):
                if not all(isinstance(key, str | int | float | bool) for key in item):
                    raise ValueError(f"{name} has a key that is neither a name nor a number")
                todo += [(inner, f"{name}.{key}"[:80] if depth < 3 else name, depth + 1) for key, inner in item.items()]
            else:
                todo += [(inner, name, depth + 1) for inner in item]
        elif item is not None and type(item) not in (str, bool, int, float):
            kinds = "a number, a string, true, false, null, or a list or names with values of these"
            raise ValueError(f"{name} must be {kinds}, got a {type(item).__name__}")
        elif isinstance(item, int) and item and math.log10(abs(item)) > 300:
            raise ValueError(f"{name} has too many digits")


@dataclass
class _Open:
    """A list or a mapping of YAML that hasn't ended yet."""

    is_mapping: bool
    key_next: bool = True  # of a mapping: whether a key comes, not its value
    keys: set[str] = field(default_factory=set)


def _check_events(text: str) -> None:
    """Refuse what would take long or much memory, before any value is made of it."""
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"longer than {MAX_CHARACTERS:,} characters")
    inside: list[_Open] = []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and inside and inside[-1].is_mapping:
            around = inside[-1]
            if around.key_next and isinstance(event, yaml.ScalarEvent):
                if event.value in around.keys:
                    raise yaml.YAMLError(f"{short(event.value)} is given twice")
                around.keys.add(event.value)
            around.key_next = not around.key_next
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read: write the value where it is needed")
        if getattr(event, "tag", None) not in _TAGS:
            raise yaml.YAMLError(f"tags are not read: {event.tag[:80]}")
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append(_Open(isinstance(event, yaml.MappingStartEvent)))
        elif isinstance(event, yaml.CollectionEndEvent):
            inside.pop()
        if len(inside) > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep")


def _check_string(text: str) -> None:
    if not any(mark in text for mark in "*[{-?:"):  # neither an alias nor anything nested
        return
    try:
        _check_events(text)
    except yaml.MarkedYAMLError:
        return  # not YAML: it stays a string


def _strings(value: Any) -> list[str]:
    """All strings among plain values; they are nested ``MAX_DEPTH`` deep at most."""
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def with_new_names(values: Any) -> Any:
    """Plain values with the keys of ``FORMER_NAMES`` replaced, in nested dictionaries too."""
    if isinstance(values, dict):
        return {FORMER_NAMES.get(key, key): with_new_names(value) for key, value in values.items()}
    return [with_new_names(value) for value in values] if isinstance(values, list) else values


def describe_type(kind: Any) -> str:
    """A type in words: ``float | None`` is "a number or null"."""
    words = [_describe(member) for member in members(kind)]
    return " or ".join(words)


def describe_value(value: Any) -> str:
    """A value as a person would write it, cut short."""
    if isinstance(value, str):
        return short(value)
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    return short(str(value))


def _describe(kind: Any) -> str:
    names = {str: "a name", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if kind in names:
        return names[kind]
    if kind is Arguments:
        return "names with values, such as {stem_stride: 1}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (list, tuple):
        several = {str: "names", int: "whole numbers", float: "numbers"}
        count = {2: "two "}.get(len(get_args(kind)), "") if get_origin(kind) is tuple else ""
        return f"a list of {count}{several.get(get_args(kind)[0], 'values')}"
    return getattr(kind, "__name__", str(kind))


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of any other, itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:80]}..."
