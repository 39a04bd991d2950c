"""Fonts for names in any script: those that are installed, taken where the default font lacks letters."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import ImageFont

__all__ = ["font_families", "image_font"]

_log = logging.getLogger(__name__)
_warned: set[int] = set()  # letters that no font has, each warned of once

PREFERRED = ("NotoSans-", "NotoSansCJK", "SourceHanSans", "wqy", "DroidSansFallback", "NotoSans")


def font_families(texts: Iterable[str]) -> list[str]:
    """Families for matplotlib, the default one first, that have the letters of these texts."""
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    for path in _files_for(frozenset(ord(letter) for text in texts for letter in text if not letter.isspace())):
        font_manager.fontManager.addfont(path)
        families.append(font_manager.FontProperties(fname=path).get_name())
    return families


def image_font(size: int, texts: Iterable[str]) -> Any:
    """A font of Pillow's that has as many letters of these texts as an installed one has."""
    letters = frozenset(ord(letter) for text in texts for letter in text if not letter.isspace())
    if max(letters, default=0) < 0x250:  # Latin: Pillow's own has it
        return ImageFont.load_default(size)
    with suppress(ImportError, OSError):
        found = [_default(), *_files_for(letters)]
        return ImageFont.truetype(max(found, key=lambda path: len(letters & _letters(path))), size)
    return ImageFont.load_default(size)


def _files_for(letters: frozenset[int]) -> list[str]:
    """Files of installed fonts for what the default font lacks; a warning, once, names letters that none has."""
    missing = letters - _letters(_default())
    files = []
    for path in _installed() if missing else ():
        if covered := missing & _letters(path):
            files.append(path)
            missing -= covered
        if not missing:
            break
    if new := missing - _warned:
        some = "".join(map(chr, sorted(new)[:10]))
        _log.warning("no installed font has %s: such letters are drawn as boxes (fonts-noto-cjk may have them)", some)
        _warned.update(new)
    return files


def _default() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _installed() -> tuple[str, ...]:
    """Font files of the system, those for many scripts first."""
    from matplotlib.font_manager import findSystemFonts

    def rank(path: str) -> tuple[int, bool, str]:
        name = Path(path).name
        order = next((i for i, start in enumerate(PREFERRED) if name.startswith(start)), len(PREFERRED))
        return order, "Regular" not in name, path

    return tuple(sorted((path for path in findSystemFonts() if "Emoji" not in path), key=rank))


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """The code points that a font file has; none of one that can't be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError, ValueError):
        return frozenset()
