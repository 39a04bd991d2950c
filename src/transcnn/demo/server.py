"""Serve the page of one network, and leave nothing behind."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data.bands import is_per_channel
from ..data.listing import is_image_name
from ..errors import UserError
from .guard import Guard, Limits, Names, WithoutCors, check_address, stored_files
from .loop import in_event_loop

__all__ = ["serve"]

EXAMPLES = 8
GRADIOS_OWN = ("bus.png", "cheetah1.jpg", "lion.jpg", "tower.jpg")  # images that come with gradio


@contextmanager
def serve(
    loaded: Any,
    examples: Sequence[str] | None = None,
    *,
    run_dir: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    allowed_hosts: Sequence[str] = (),
    limits: Limits | None = None,
    accelerator: str = "auto",
    optimize: bool = True,
    open: bool = False,
) -> Iterator[str]:
    """The page of a network, served while the context lasts; gives its address.

    Args:
        loaded: The network.
        examples: Images or folders to choose examples from.
        run_dir: The run's directory on this machine, where the network came from one: its data may give examples.
        host, port: Where to listen.
        allowed_hosts: Further names that the page may be asked for under.
        limits: Bounds of what visitors send and leave behind.
        accelerator: cpu, gpu, or auto.
        optimize: Whether predictions come from the network as ``fast.optimize`` makes it.
        open: Also open it in this machine's browser.

    Raises:
        UserError: An address that this machine can't listen at, or no such example.
    """
    import torch

    check_address(host, port)
    limits, names = limits or Limits(), Names.of(host, allowed_hosts)

    device = "cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu"
    if names.any_address or "localhost" not in names.own:
        run_dir = None  # others can reach the page: they see no data that nobody has named
    with _gradio_folder() as folder:
        from .page import build_page
        from .viewer import Viewer

        shown = find_examples(loaded, examples, folder / "examples", run_dir)
        page = build_page(Viewer(loaded, device, optimize), shown, keep_files=round(limits.keep_seconds))
        kept: set[Path] = set()  # the examples and gradio's copies of them: they stay
        try:
            guard = {"names": names, "limits": limits, "folder": folder, "kept": kept}
            address = _launch(page, host, port, limits, open, guard)
            kept.update(stored_files(folder))
            yield address
        finally:
            page.close(verbose=False)


@contextmanager
def _gradio_folder() -> Iterator[Path]:
    """A temporary folder for all that gradio stores; it asks for it when a component is made."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="transcnn-demo-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradio's own, about its own dependencies
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            yield Path(folder)
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def _launch(page: Any, host: str, port: int | None, limits: Limits, open: bool, guard: dict[str, Any]) -> str:
    """Start gradio's server behind the guard; its address."""
    import gradio as gr
    from starlette.middleware import Middleware

    from .connections import limited_protocol
    from .page import CSS

    fonts = ["system-ui", "sans-serif"]
    in_event_loop(page.queue, max_size=limits.sessions)
    try:
        _, address, _ = in_event_loop(
            page.launch,
            server_name=host,
            server_port=port,
            max_file_size=limits.file_bytes,
            state_session_capacity=limits.sessions,
            theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
            css=CSS,
            footer_links=[],
            inbrowser=open,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            app_kwargs={
                "middleware": [Middleware(Guard, **guard)],
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
            },
        )
    except OSError as error:
        if "port" not in str(error):
            raise
        raise UserError(f"port {port or 7860} is taken at {host}; give another --port") from error
    # gradio puts its own middleware outside of all others, one that lets every other page in.
    page.app.middleware_stack = WithoutCors(page.app.middleware_stack or page.app.build_middleware_stack())
    config = page.server.config  # of uvicorn, which asks it for a protocol at each connection
    config.http_protocol_class = limited_protocol(limits.head_seconds, limits.connections)
    config.ws_protocol_class = None  # the page uses no web sockets
    return address.rstrip("/")


def find_examples(loaded: Any, wanted: Sequence[str] | None, folder: Path, run_dir: Path | None = None) -> list[str]:
    """Up to eight image files to click: those named, else some of the run's own data, else images of gradio's.

    The run's data is used for a run directory alone: what a file of weights says about data may be anybody's word.

    Raises:
        UserError: A path that isn't there, or a folder without images.
    """
    if wanted is not None:
        from ..data.paths import find_images

        files = find_images(wanted)
        missing = [file for file in files if not Path(file).is_file()]
        if missing:
            raise UserError(f"no such file: {missing[0]}")
        return _spread(files)
    if is_per_channel(
        loaded.preprocessing.get("pixel_range")
    ):  # such images browsers don't show, and photographs don't fit
        return []
    own = _own_examples(loaded, folder) if run_dir is not None else []
    if own:
        return own
    try:
        from gradio.media import get_image

        return [get_image(name) for name in GRADIOS_OWN]
    except (ImportError, OSError, ValueError):  # another gradio may bring others
        return []


def _own_examples(loaded: Any, folder: Path) -> list[str]:
    """Images of the data that the network was scored on, where that lies on this machine."""
    from ..tasks import get_task

    settings = loaded.info.get("settings") or {}
    data = settings.get("data")
    if not settings or (data is not None and not Path(data).exists()):
        return []
    if data is not None and Path(data).is_file() and is_image_name(Path(data).name):
        return []
    try:
        split = get_task(loaded.task).open_split(
            data,
            "auto",
            loaded.class_names,
            loaded.info.get("task_args") or {},
            val_fraction=settings["val_fraction"],
            seed=settings["seed"],
            strict=False,
        )
        split.pixel_range = loaded.preprocessing.get("pixel_range")  # as the network was taught to see them
        images = [split.read(i)[0] for i in _spread(range(len(split)))]
    except (ValueError, OSError, KeyError):
        return []  # the data changed since; examples are a nicety
    folder.mkdir()
    files = [folder / f"{number}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return [str(file) for file in files]


def _spread(items: Sequence[Any]) -> list[Any]:
    """Up to ``EXAMPLES`` of them, evenly over all."""
    if len(items) <= EXAMPLES:
        return list(items)
    return [items[i * len(items) // EXAMPLES + len(items) // (2 * EXAMPLES)] for i in range(EXAMPLES)]
