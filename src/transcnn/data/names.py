"""Names of classes: compared as text that looks the same, and made unique where two classes share one."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["alike_but_for_case", "case_hint", "distinct_names", "imagenet_names", "match_names", "normalise"]


logger = logging.getLogger(__name__)


def normalise(name: str) -> str:
    """The name in Unicode's form NFC: file systems and tools differ in how they write an accented letter."""
    return unicodedata.normalize("NFC", name)


def distinct_names(names: Iterable[str]) -> list[str]:
    """The names in NFC; those that occur more than once get their index: ``c1, c1, c2`` is ``c1 (0), c1 (1), c2``.

    Whatever is keyed by the name of a class then keeps all classes. Names that are distinct stay as they are.
    """
    names = [normalise(name) for name in names]
    counts = Counter(names)
    distinct: list[str] = []
    for index, name in enumerate(names):
        if counts[name] > 1:
            name = f"{name} ({index})"
            while name in counts or name in distinct:
                name += "'"
        distinct.append(name)
    return distinct


def alike_but_for_case(names: Iterable[str]) -> list[list[str]]:
    """Names that differ only in the case of their letters, together: nobody means two classes by them."""
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(name.casefold(), []).append(name)
    return [same for same in folded.values() if len(same) > 1]


def case_hint(unknown: Iterable[str], known: Iterable[str]) -> str:
    """For the end of a message about names that aren't known: whether they are, but for the case of their letters."""
    folded = {name.casefold() for name in known}
    return " (the case of letters counts)" if all(name.casefold() in folded for name in unknown) else ""


def imagenet_names() -> list[str]:
    """The names of ImageNet's 1,000 classes, in the order of published weights; its two cranes get a number each."""
    info = _imagenet()
    return distinct_names(str(info.index_to_description(i)).split(",")[0] for i in range(1000))


def match_names(names: Sequence[str], model_names: Sequence[str]) -> tuple[list[int], list[str]]:
    """For each class of some data its index among a model's classes; and the names that the model doesn't know.

    By name; WordNet's ids (``n01440764``) stand for ImageNet's names, and numbers for the classes of a model whose own
    names are no numbers.
    """
    names, known = distinct_names(names), {name: i for i, name in enumerate(distinct_names(model_names))}
    if any(name not in known for name in names):
        if all(re.fullmatch(r"n\d{8}", name) for name in names) and list(known) == imagenet_names():
            known = {name: i for i, name in enumerate(_imagenet().label_names())}
        elif all(name.isdecimal() for name in names) and not any(name.isdecimal() for name in known):
            logger.warning(
                "the data's classes are numbers, and are taken for the model's in order: 0 is %r", next(iter(known))
            )
            known = {str(i): i for i in range(len(known))}
    unknown = [name for name in names if name not in known]
    return [known[name] for name in names if name in known], unknown


def _imagenet() -> Any:
    from timm.data import ImageNetInfo  # brings torch, which reading tables needn't wait for

    return ImageNetInfo()
