"""One argument of a command: type and help, as signature and docstring say, and how ``--help`` shows it."""

from __future__ import annotations

import argparse
import inspect
import os
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import require
from ..plain import Arguments, load_text, members

__all__ = ["Argument", "HelpFormatter", "docs_of", "types_of"]


@dataclass(frozen=True)
class Argument:
    """One flag: its full name (``group.name`` in a group), type, default and help."""

    name: str
    type: Any
    default: Any
    help: str
    positional: bool = False
    empty: ClassVar[Any] = inspect.Parameter.empty  # the default of what must be given

    @property
    def is_switch(self) -> bool:
        return self.type is bool

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) in (list, tuple) for kind in members(self.type))

    @property
    def _takes_any_number(self) -> bool:
        return any(get_origin(kind) is list for kind in members(self.type))

    def value(self, words: str | list[str]) -> Any:
        """What was typed, as what jsonargparse checks. Names are taken as they are, never parsed."""
        kinds = members(self.type)
        if isinstance(words, list):
            if str in kinds and len(words) == 1 and words != ["null"]:  # a file may be called so
                return words[0]
            if list[str] in kinds:
                return None if words == ["null"] and str not in kinds and type(None) in kinds else words
            values = [load_text(word) for word in words]
            one = len(values) == 1 and (isinstance(values[0], list) or values[0] is None or not self._takes_any_number)
            return values[0] if one else values
        if get_origin(self.type) is Literal:
            return words
        if str in kinds:
            return None if words == "null" and type(None) in kinds else words
        return load_text(words)

    def plain(self, value: Any) -> Any:
        """What a recipe says, as what jsonargparse checks: ``precision: 16``, ``freeze: 2`` and ``freeze: all`` do."""
        kinds = members(self.type)
        if get_origin(self.type) is Literal and type(value) is int:
            return str(value)
        if list[str] not in kinds or (str in kinds and isinstance(value, str)):
            return value
        values = value if isinstance(value, list) else [value]
        return [str(item) for item in values] if all(type(item) in (str, int) for item in values) else value

    def at_home(self, value: Any) -> Any:
        """A value with ``~/`` spelled out, where the shell has left it: ``--out=~/runs``, or in a recipe."""
        if isinstance(value, list) and list[str] in members(self.type):
            return [_at_home(item) for item in value]
        return _at_home(value) if str in members(self.type) else value

    @property
    def usage(self) -> str:
        """How the usage line writes a positional argument."""
        word = self.name.upper() + (" ..." if self.is_list else "")
        return word if self.default is self.empty else f"[{word}]"

    @property
    def metavar(self) -> str:
        """What ``--help`` shows for the value."""
        if self.positional:
            return self.name.upper()
        if self.is_switch:
            return ""
        kinds = [kind for kind in members(self.type) if kind is not type(None)]
        if get_origin(kinds[0]) is Literal:
            return "{" + ",".join(map(str, get_args(kinds[0]))) + "}"
        if not {str, list[str]}.isdisjoint(kinds):
            return "NAME"
        return {float: "X", Arguments: "{NAME: VALUE}"}.get(kinds[0], "N")

    @property
    def help_line(self) -> str:
        """The help, with the default."""
        text = self.help.replace("``", "").replace("%", "%%")
        if self.default in (None, self.empty, ()) or self.default is False:
            return text
        if self.default is True:
            return f"{text} (default: on; --no_{self.name.rpartition('.')[2]} turns it off)"
        several = isinstance(self.default, tuple)
        default = " ".join(f"{number:.4g}" for number in self.default) if several else self.default
        return f"{text} (default: {default})"


def _at_home(value: Any) -> Any:
    is_left = isinstance(value, str) and value.startswith("~/") and not os.path.exists(value)
    return os.path.expanduser(value) if is_left else value


def types_of(source: Any) -> dict[str, Any]:
    """The types of a function's parameters (what it returns may need an import that takes seconds), or of fields."""
    if inspect.isclass(source):
        return get_type_hints(source)
    bare = FunctionType(source.__code__, source.__globals__, closure=source.__closure__)
    bare.__annotations__ = {name: kind for name, kind in source.__annotations__.items() if name != "return"}
    return {name: _as_typed(kind) for name, kind in get_type_hints(bare).items()}


def _as_typed(kind: Any) -> Any:
    """A type without the paths that it allows, which are text on the command line."""
    if get_origin(kind) is list:
        return list[_as_typed(get_args(kind)[0])]
    if len(members(kind)) == 1:
        return kind
    return Union[tuple(_as_typed(member) for member in members(kind) if member != os.PathLike[str])]  # noqa: UP007


def docs_of(source: Any) -> dict[str, str]:
    """What the docstring of a function or a class says of each argument."""
    parse = require("docstring_parser", "train").parse
    return {item.arg_name: " ".join((item.description or "").split()) for item in parse(source.__doc__ or "").params}


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, with paragraphs kept in the description and room for long flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _format_action_invocation(self, action: Any) -> str:
        return action.metavar if getattr(action, "positional", False) else super()._format_action_invocation(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(HelpFormatter, self)._fill_text(part, width, indent) for part in text.split("\n\n"))
