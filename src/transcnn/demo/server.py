"""Serve the page of one network, and leave nothing behind."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data.images import is_image_name
from ..errors import UserError

__all__ = ["serve"]

EXAMPLES = 8
GRADIOS_OWN = ("bus.png", "cheetah1.jpg", "lion.jpg", "tower.jpg")  # pictures that come with gradio
# The browser itself refuses to load anything from elsewhere or to send anything elsewhere.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)


@contextmanager
def serve(
    loaded: Any,
    examples: Sequence[str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_mb: float = 20,
    accelerator: str = "auto",
    open: bool = False,
) -> Iterator[str]:
    """The page of a network, served while the context lasts; gives its address."""
    import torch

    device = "cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu"
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="transcnn-demo-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradio's own, about its own dependencies
        os.environ["GRADIO_TEMP_DIR"] = folder  # gradio asks when a component is made
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        page = None
        try:
            import gradio as gr

            from .page import CSS, build_page
            from .viewer import Viewer

            shown = find_examples(loaded, examples, Path(folder) / "examples")
            page = build_page(Viewer(loaded, device), shown)
            fonts = ["system-ui", "sans-serif"]
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                max_file_size=round(max_mb * 2**20),
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
                app_kwargs={"middleware": [_policy()], "docs_url": None, "redoc_url": None, "openapi_url": None},
            )
            yield address.rstrip("/")
        except OSError as error:
            if "port" not in str(error):
                raise
            raise UserError(f"port {port or 7860} is taken at {host}; give another --port") from error
        finally:
            if page is not None:
                page.close(verbose=False)
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def find_examples(loaded: Any, wanted: Sequence[str] | None, folder: Path) -> list[str]:
    """Up to eight image files to click: those named, else some of the run's own data, else gradio's pictures.

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
    own = _own_examples(loaded, folder)
    if own:
        return own
    try:
        from gradio.media import get_image

        return [get_image(name) for name in GRADIOS_OWN]
    except (ImportError, OSError, ValueError):  # another gradio may bring others
        return []


def _own_examples(loaded: Any, folder: Path) -> list[str]:
    """Pictures of the data that the network was scored on, where that lies on this machine."""
    from ..tasks import get_task

    settings = loaded.info.get("settings") or {}
    data = settings.get("data")
    if not settings or (data is not None and not Path(data).exists()):
        return []
    if data is not None and Path(data).is_file() and is_image_name(Path(data).name):
        return []
    try:
        part = get_task(loaded.task).open_split(
            data,
            "auto",
            loaded.class_names,
            loaded.info.get("task_args") or {},
            val_fraction=settings["val_fraction"],
            seed=settings["seed"],
            strict=False,
        )
        places = _spread(range(len(part)))
        images = [part.read(i)[0] for i in places]
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


def _policy() -> Any:
    from starlette.middleware import Middleware

    return Middleware(_WithPolicy)


class _WithPolicy:
    """Tells the browser with each answer what the page may load: what comes from here."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)
