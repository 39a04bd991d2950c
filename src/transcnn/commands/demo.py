"""``transcnn demo``: serve the page until Ctrl-C, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data.paths import StrPath
from ..demo.guard import Limits
from ..demo.server import serve
from ..errors import MAX_SIDE, UserError, check_range, require
from ..imports import gc_paused
from ..text import printable
from ..weights import PACKAGED

__all__ = ["demo"]


def demo(
    checkpoint: StrPath = PACKAGED,
    *,
    model: str | None = None,
    examples: list[StrPath] | None = None,
    img_size: int | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    allowed_hosts: list[str] | None = None,
    max_mb: float = 20,
    accelerator: str = "auto",
    optimize: bool = True,
    open: bool = False,
    quiet: bool = False,
) -> None:
    """Serve a page in the browser: give it an image, see what the network predicts and where any spot looks.

    Only this machine can reach it unless --host says otherwise, and nothing leaves it: no analytics, no fonts or
    scripts from elsewhere. Uploads are deleted after an hour, and all when the command ends (Ctrl-C).

    Args:
        checkpoint: A run's directory, a .safetensors or .ckpt of this package, or the name of a published model;
            without it the small network that comes with the package.
        model: The network that a file of weights is for which doesn't say so, such as the authors' .pth files.
        examples: Images or folders to choose examples from; without it, some of the run's data, where the checkpoint is
            a run's directory and the page is for this machine alone.
        img_size: Another size than the network was trained at; not to segment or detect.
        host: Address to listen at; 0.0.0.0 lets the whole network in.
        port: Port to listen at; without it the first free one from 7860 on.
        allowed_hosts: Further names that the page may be asked for under, such as that of a proxy in front of it.
        max_mb: Largest file that may be uploaded, in megabytes; ten times that is kept at most.
        accelerator: cpu, gpu, or auto.
        optimize: Predict by the network as transcnn.optimize makes it: the same answers up to rounding, sooner.
        open: Also open the page in this machine's browser.
        quiet: Print nothing but errors.

    Raises:
        UserError: No such checkpoint or example, or a port that is taken.
    """
    if max_mb <= 0:
        raise UserError(f"max_mb must be more than 0, got {max_mb:g}")
    check_range(1, MAX_SIDE, img_size=img_size)
    if port is not None and not 0 < port < 65536:
        raise UserError(f"port must be from 1 to 65535, got {port}")
    loaded = _network(checkpoint, model, img_size, accelerator)
    largest = round(max_mb * 2**20)
    served = serve(
        loaded,
        [os.fspath(example) for example in examples or ()] or None,
        run_dir=Path(checkpoint) if Path(checkpoint).is_dir() else None,
        host=host,
        port=port,
        allowed_hosts=allowed_hosts or (),
        limits=Limits(file_bytes=largest, stored_bytes=10 * largest),
        accelerator=accelerator,
        optimize=optimize,
        open=open,
    )
    with _until_signal(), served as address:
        if not quiet:
            print(f"{address} shows {printable(loaded.source)}; stop with Ctrl-C", flush=True)
        threading.Event().wait()


def _network(checkpoint: StrPath, model: str | None, img_size: int | None, accelerator: str) -> Any:
    """The network to show; what loading it and showing it need is imported here."""
    with gc_paused():
        require("gradio", "demo")
        from ..checkpoints.available import check_resizable
        from ..checkpoints.loading import load
        from ..checkpoints.memory import check_forward
        from ..distributed.runtime import check_accelerator, quiet_libraries

    check_accelerator(accelerator)
    with quiet_libraries():
        loaded = load(checkpoint, model)
    check_resizable(loaded, img_size)
    loaded.resize_input(img_size)
    check_forward(loaded, chosen=img_size is not None)
    return loaded


@contextmanager
def _until_signal() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end it alike, with what was stored removed."""

    def stop(*_: Any) -> None:
        for number in wanted:  # a second one must not interrupt the removal, which is inside of this
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    wanted = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    former = {number: signal.signal(number, stop) for number in wanted} if main else {}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
