"""Names of files and classes as text, for each kind of output: they come from strangers and may hold anything.

A name may be no UTF-8 (Python holds such bytes as lone surrogates), hold line breaks, control and escape characters,
marks that turn the direction of writing, or what a terminal table, a spreadsheet, HTML or Markdown takes for its own.
"""

from __future__ import annotations

import html as html_format
import json
import re
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

__all__ = [
    "csv_cell",
    "csv_text",
    "html",
    "json_text",
    "markdown",
    "print_whole",
    "printable",
    "rich_text",
    "stdout_console",
    "without_passwords",
]

JOINERS = "\u200c\u200d"  # within words and emoji


def printable(value: Any) -> str:
    r"""One line: a line break is shown as ``\n``, an escape as ``\x1b``, a byte that is no UTF-8 as ``\xff``."""
    text = str(value)
    return text if text.isprintable() else "".join(_shown(letter) for letter in text)


def rich_text(value: Any, style: str = "") -> Text:
    """For a table on the terminal: no markup is read."""
    from rich.text import Text

    return Text(printable(value), style, overflow="fold")  # in a narrow column it goes on in the next line


def print_whole(table: Table) -> None:
    """Print a table on standard output, as wide as it is: a narrower terminal breaks lines, and no name is cut."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False)
    needed = Measurement.get(console, console.options.update(width=1 << 16), table).maximum
    console.width = max(console.width, needed)
    console.print(table)


def stdout_console() -> Console:
    """Standard output for rich: as wide as the terminal, or lines however long for what else reads them."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def html(value: Any) -> str:
    """For HTML, as text or within quotes."""
    return html_format.escape(printable(value))


def markdown(value: Any) -> str:
    """For Markdown, in a line or a table: no markup, link or HTML."""
    text = re.sub(r"[\\`*\[\]|~$]|(?<=\])\(", r"\\\g<0>", printable(value))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it means nothing
    text = re.sub(r"^(\s*\d*)([-+#=.)])", r"\1\\\2", text)  # no list, heading or rule where a line begins so
    text = re.sub(r"(?<=://)|(?<=www\.)|@", "\u200b\\g<0>", text)  # no link of its own
    return html_format.escape(text, quote=False)


def without_passwords(text: str) -> str:
    """A text whose URLs name neither users nor passwords (``https://me:secret@host/``): it is kept or handed on."""
    return re.sub(r"(?<=://)[^/?#\s]*@", "", text)


def csv_cell(value: Any) -> Any:
    """For a cell of a CSV file: text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text[:1] in tuple("=+-@\t\r＝＋－＠") and not _is_number(text) else text


def csv_text(cell: str) -> str:
    """The text that :func:`csv_cell` made a cell of, but for characters that it wrote as escapes."""
    return cell[1:] if cell[:1] == "'" and csv_cell(cell[1:]) == cell else cell


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON whose strings keep every character, and that a terminal shows: what can't be seen is written as ``\\u…``."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(letter if letter == "\n" or _is_shown(letter) else json.dumps(letter)[1:-1] for letter in text)


def _is_shown(letter: str) -> bool:
    return letter.isprintable() or letter in JOINERS or unicodedata.category(letter) == "Zs"


def _shown(letter: str) -> str:
    if _is_shown(letter):
        return letter
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
