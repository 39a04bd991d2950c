"""The run that goes on: its checkpoint, and its settings with those that may be others now."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..arguments import read_settings
from ..checkpoints.bounded import registered
from ..checkpoints.files import remove_stale_temporaries
from ..checkpoints.header import check_header
from ..checkpoints.loading import read_info
from ..data.paths import check_data_exists, is_fetched
from ..distributed.processes import gather, rank, restarts, world
from ..errors import UserError
from ..settings import TrainSettings
from .checkpointing import LAST, PREVIOUS, newest_good, note
from .run_dir import made_by_this_launch

__all__ = ["check_not_moved", "check_seen_by_all", "find_resumed", "find_start", "located", "resumed_settings"]

# What a resumed run may have otherwise than the run it goes on with; all else decides what is learnt.
FREE = {
    "data",
    "resume",
    "accept_changed_data",
    "out",
    "epochs",
    "num_workers",
    "early_stop",
    "save_every",
    "accelerator",
    "quiet",
}
FREE |= {"nonfinite", "max_nonfinite", "cuda_graphs"}
# And of these what the earlier run had says nothing: they are about here and now.
PRESENT = {"resume", "accept_changed_data", "out", "devices", "num_nodes", "strategy", "cuda_graphs"}


def find_start(resume: str | None, out: str | None) -> Path | None:
    """The checkpoint that a run begins from, if there is one.

    It is what ``--resume`` names. Processes that torchrun has restarted go on from what their own run had written.
    """
    if resume:
        return find_resumed(resume)
    if not restarts() or out is None or not made_by_this_launch(Path(out)):
        return None
    return find_resumed(out) if any((Path(out) / name).is_file() for name in (LAST, PREVIOUS)) else None


def find_resumed(resume: str) -> Path:
    """The checkpoint that ``--resume`` means; of a run directory, the newest that is whole."""
    path = Path(resume)
    if path.is_file() and path.suffix == ".safetensors":
        raise UserError(
            f"{path} holds weights alone, not where a run stood: give --resume {path.parent}; to start a new run from "
            "these weights use --init_from"
        )
    if path.is_file() and path.name != "last.ckpt":
        return path
    path, remark = newest_good(path.parent if path.is_file() else path)
    remove_stale_temporaries(path.parent)
    if remark:
        note(path.parent, remark)
        print(f"transcnn: {remark}", file=sys.stderr)
    return path


def check_seen_by_all(checkpoint: Path) -> None:
    """See that every process can read what the run goes on from; all processes call this.

    Raises:
        UserError: Some can't: their machine has another disk.
    """
    found = gather(checkpoint.is_file())
    blind = [str(number) for number, there in enumerate(found) if not there]
    if blind:
        error = UserError(
            f"process {', '.join(blind)} of {world()} can't find {checkpoint}: to go on, every machine must see "
            "the run directory (a shared disk, or a copy at the same path)"
        )
        error.reported = rank() > 0
        raise error


def resumed_settings(given: TrainSettings, checkpoint: Path) -> TrainSettings:
    """The settings of the run that goes on; of the given ones only those of ``FREE`` can change them.

    Given is what ``given.origins`` names, whatever its value. Paths are compared whole, as a run keeps them, and the
    images of a table may have moved, as any data may.

    Raises:
        UserError: The checkpoint isn't one of a run, or another setting is given with another value.
    """
    info = read_info(checkpoint)
    values = info.get("settings")
    if not values:
        raise UserError(f"{checkpoint} was not written by transcnn train; to start from its weights use --init_from")
    check_header(info, checkpoint)
    registered(info.get("model"), info.get("model_args") or {}, checkpoint)
    try:
        saved = read_settings(values)
    except UserError as error:
        raise UserError(f"{checkpoint} is damaged: {error}") from error
    _refuse_to_fetch(given, saved, checkpoint)
    given = located(given)
    moved = {"table.images"} if given.table.images and given.origins.keys() & {"table", "table.images"} else set()
    if moved:
        saved = replace(saved, table=replace(saved.table, images=given.table.images))
    changed = PRESENT | {name for name in given.origins if name in FREE}
    for name in given.origins:
        if name.partition(".")[0] not in changed and (now := given.value_of(name)) != (then := saved.value_of(name)):
            raise UserError(f"a resumed run keeps its settings: {name} is {_short(then)} there, got {_short(now)}")
    origins = {item.name: str(checkpoint) for item in fields(saved)}
    origins |= {name: given.origin_of(name) for name in changed | moved}
    return replace(saved, origins=origins, **{name: getattr(given, name) for name in changed})


def _refuse_to_fetch(given: TrainSettings, saved: TrainSettings, checkpoint: Path) -> None:
    """A run may be anybody's: what it names is fetched from elsewhere only if the user names it, too."""
    for name, value in (("data", saved.data), ("distill.distill_from", saved.distill.distill_from)):
        if value and is_fetched(value) and name not in given.origins:
            raise UserError(
                f"{checkpoint} names {name} from elsewhere, {value!r}; if that may be fetched, give it again: "
                f"transcnn train --resume {checkpoint.parent} --{name} {value}"
            )


def check_not_moved(s: TrainSettings, checkpoint: Path) -> None:
    """Raise UserError where the data is what the run names, and isn't there any more."""
    try:
        check_data_exists(s.data if s.origin_of("data") == str(checkpoint) else None)
    except UserError:
        where = f"the run's data was {s.data!r}, which isn't there"
        error = UserError(f"{where}: say where it is, transcnn train DATA --resume {checkpoint.parent}")
        error.reported = rank() > 0
        raise error from None


def located(s: TrainSettings) -> TrainSettings:
    """The settings with whole paths, so that what a run was given is found from every working folder."""
    distill = replace(s.distill, distill_from=_whole(s.distill.distill_from))
    table = replace(s.table, images=_whole(s.table.images))
    return replace(s, data=_whole(s.data), init_from=_whole(s.init_from), distill=distill, table=table)


def _whole(name: str | None) -> str | None:
    """The whole path of a file or folder that is there, also in ``wds/PATH`` and ``torch/NAME:PATH``; else ``name``."""
    if name is None or "://" in name:
        return name
    if os.path.exists(name):
        return os.path.abspath(name)
    start = "wds/" if name.startswith("wds/") else name.partition(":")[0] + ":" if name.startswith("torch/") else ""
    path = name[len(start) :]
    return start + os.path.abspath(path) if start and path and os.path.isdir(os.path.dirname(path) or ".") else name


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 100 else f"{text[:100]}..."
