"""What a run learnt from, kept as ``data.json`` in its directory; a run that goes on finds out what has changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..checkpoints.files import atomic_write
from ..checkpoints.loading import Loaded
from ..data.sources.source import abbreviate
from ..errors import UserError
from ..text import json_text

__all__ = [
    "RECORD",
    "check_unchanged",
    "held_back",
    "keep_split",
    "names_and_sizes",
    "read_record",
    "record_of",
    "write_record",
]

RECORD = "data.json"
MAX_RECORD = 64 << 20  # bytes of data.json
MAX_NAMED = 200_000  # images of all splits up to which each one's entry is kept; of more, a digest alone


def record_of(splits: Any) -> dict[str, Any]:
    """Class names, and of each split the number of images, a digest, and for each image name, label and size.

    Labels are indices of classes, or a checksum of an image's boxes or of its label map; the size is the image's in
    bytes, -1 where it isn't known without reading it.
    """
    present = {name: part for name in ("train", "val", "test") if (part := getattr(splits, name)) is not None}
    named = sum(map(len, present.values())) <= MAX_NAMED
    record: dict[str, Any] = {"class_names": list(splits.class_names), "splits": {}}
    for split, part in present.items():
        entries = sorted((list(part.entry(i)) for i in range(len(part))), key=lambda entry: entry[0])
        digest = hashlib.sha256("\n".join(map(json.dumps, entries)).encode()).hexdigest()
        record["splits"][split] = {"images": len(part), "sha256": digest, "files": entries if named else None}
    return record


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Keep a record in the run's directory."""
    text = json_text(record) + "\n"
    atomic_write(run_dir / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """The record of a run; None of a run of an earlier version, or where it is damaged."""
    try:
        if (run_dir / RECORD).stat().st_size > MAX_RECORD:
            return None
        record = json.loads((run_dir / RECORD).read_text(encoding="utf-8"))
        return record if _is_record(record) else None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def _is_record(record: Any) -> bool:
    """Whether this is what :func:`record_of` gives."""
    return isinstance(record["class_names"], list) and all(
        isinstance(split["images"], int)
        and isinstance(split["sha256"], str)
        and isinstance(split["files"], list | None)
        and all(isinstance(entry[0], str) and len(entry) == 3 for entry in split["files"] or ())
        for split in record["splits"].values()
    )


def names_and_sizes(run_dir: Path, split: str) -> dict[str, int]:
    """The images that a run had in a split, each with its size in bytes; none where that isn't recorded."""
    record = read_record(run_dir)
    try:
        files = record["splits"][split]["files"] if record else ()
        return {str(name): int(size) for name, _, size in files or ()}
    except (KeyError, TypeError, ValueError, OverflowError):  # a damaged record
        return {}


def held_back(
    loaded: Loaded, data: str | None, val_fraction: float | None = None, seed: int | None = None
) -> dict[str, Any]:
    """What a validation split is held back by: what is given, else what the run had, those very images if known."""
    trained = loaded.info.get("settings") or {}
    found: dict[str, Any] = {
        "val_fraction": trained.get("val_fraction", 0.1) if val_fraction is None else val_fraction,
        "seed": trained.get("seed", 0) if seed is None else seed,
    }
    if val_fraction is None and seed is None and loaded.learnt_from(data):
        found["held"] = names_and_sizes(Path(loaded.source).parent, "val")
    return found


def check_unchanged(kept: dict[str, Any], now: dict[str, Any], accept: bool) -> list[str]:
    """What has changed in the data since a run began, in words.

    Raises:
        UserError: Something has, and that isn't accepted; or the classes have, for which the network isn't made.
    """
    if kept["class_names"] != now["class_names"]:
        raise UserError(
            f"the classes of the data have changed since the run began: they were {abbreviate(kept['class_names'])}, "
            f"now they are {abbreviate(now['class_names'])}; start a new run, with --init_from if you like"
        )
    found = []
    for split in sorted({*kept["splits"], *now["splits"]}):
        before, after = kept["splits"].get(split), now["splits"].get(split)
        if before is None or after is None:
            found.append(f"the {split} split is {'new' if before is None else 'gone'}")
        elif before["sha256"] != after["sha256"]:
            found += _changes(split, before, after)
    if found and not accept:
        raise UserError(
            f"the data has changed since the run began: {'; '.join(found)}. Put it back, or go on all the same with "
            "--accept_changed_data"
        )
    return found


def _changes(split: str, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    if before["files"] is None or after["files"] is None:
        return [f"{split} had {before['images']:,} images and has {after['images']:,}, not all of them the same"]
    old, new = ({entry[0]: entry[1:] for entry in split["files"]} for split in (before, after))
    both = old.keys() & new.keys()
    kinds = {
        "without": old.keys() - new.keys(),
        "with the new": new.keys() - old.keys(),
        "with other labels of": {name for name in both if old[name][0] != new[name][0]},
        "with other content of": {name for name in both if old[name][0] == new[name][0] and old[name] != new[name]},
    }
    return [f"{split} {words} {abbreviate(sorted(names))}" for words, names in kinds.items() if names]


def keep_split(kept: dict[str, Any], splits: Any) -> bool:
    """Have the images that were held back stay so, where the validation split was split off; whether that was done.

    Images that are new are learnt from, unless they are of a group of which images are held back.
    """
    train, val = splits.train, splits.val
    before = kept["splits"].get("val", {}).get("files")
    if not before or not train.shares_source(val):
        return False
    held = {entry[0] for entry in before}
    names = {int(part.indices[i]): part.name(i) for part in (train, val) for i in range(len(part))}
    indices = sorted(names)
    chosen = {True: [], False: []}
    for index in indices:
        chosen[names[index] in held].append(index)
    if (groups := getattr(train.source, "together", None)) is not None:
        kept_back = {groups[i] for i in chosen[True]}
        chosen = {among: [i for i in indices if (groups[i] in kept_back) == among] for among in chosen}
    if not all(chosen.values()):
        return False
    splits.train, splits.val = train.with_indices(chosen[False]), val.with_indices(chosen[True])
    return True
