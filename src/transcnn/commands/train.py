"""``transcnn train``: from images to a run directory with a trained network, on Lightning's Trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.paths import check_data_exists
from ..errors import UserError
from ..imports import gc_paused
from ..settings import TrainSettings, takes_settings
from ..training.check import check_meant, check_named

if TYPE_CHECKING:
    from ..training.run import TrainResult

__all__ = ["train"]


@takes_settings(TrainSettings)
def train(settings: TrainSettings) -> TrainResult:
    """Train a network on images; the run's directory then holds its weights, figures and report.

    The best epoch is chosen on the validation split; the test split, if there is one, is looked at once at the end.

    Args:
        settings: Given as keywords, those of :class:`~transcnn.settings.TrainSettings`; the data may come first:
            ``train("photos", model="transcnn_tiny", optim=Optim(clip_grad=2))``.

    Returns:
        The run's directory and what was measured.

    Raises:
        UserError: Data, model or settings that can't be used, or a run directory that can't be written to.
        KeyboardInterrupt: The run was asked to stop (``callbacks.Interrupted``), after a checkpoint.
    """
    check_named(settings)
    if not settings.resume:
        check_meant(settings)
    elif settings.dry_run:
        raise UserError("dry_run tells what a new run would take: leave out --resume, or --dry_run")
    if not settings.dry_run:
        check_data_exists(settings.data)
    # Importing these takes seconds; what is wrong with the words of a command is said before.
    with gc_paused():
        from ..distributed.processes import first_decides, launch
        from ..distributed.runtime import lasting_output, quiet_libraries
        from ..training.faults import Rollback
        from ..training.resume import (
            check_not_moved,
            check_seen_by_all,
            find_resumed,
            find_start,
            located,
            resumed_settings,
        )
        from ..training.run import run
        from ..training.run_dir import RunLock

    with lasting_output(), quiet_libraries(), RunLock() as lock:
        launch(settings.accelerator, settings.devices, settings.num_nodes)
        if resume := settings.resume:
            first_decides(lambda: lock.acquire(Path(resume).parent if Path(resume).is_file() else Path(resume)))
        resumed = first_decides(lambda: find_start(settings.resume, settings.out))
        if resumed:
            check_seen_by_all(resumed)
            settings = resumed_settings(settings, resumed)
            check_not_moved(settings, resumed)
        settings = located(settings)
        lr_factor = None
        while True:
            try:
                return run(settings, resumed, lr_factor, lock)
            except Rollback as rollback:  # noqa: PERF203  (three times at most)
                lr_factor = rollback.lr_factor
                resumed = first_decides(partial(find_resumed, str(rollback.run_dir)))
