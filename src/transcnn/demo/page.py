"""The page itself: what stands where, and what happens at each click. What is shown about images is the viewer's."""

from __future__ import annotations

import base64
import binascii
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ..data.images import BrokenImage, read_image
from ..text import markdown, printable
from .loop import in_event_loop
from .viewer import Viewer, Visit

__all__ = ["build_page"]

_log = logging.getLogger(__name__)

CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
#message { border-left: 4px solid #d55e00; padding: 0.2rem 1rem; background: #d55e0018; }
#examples { max-width: calc(100vw - 64px); }
#examples .grid-wrap { max-height: none !important; overflow: visible !important; padding-bottom: 0.5rem; }
#examples, #examples * { min-height: 0 !important; }
#examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
#look .caption { font-size: 0.9em; min-height: 3em; }
"""
FAULT = "Something went wrong with this image. Try another one."
MEAN = "mean of all heads"
MOST_LETTERS = 1000  # of what a visitor chooses or a file is called; images in base64 have more
NO_GRIDS = "No grids in this stage: its map is so small that every position looks at all others at once (see below)."


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of an event; a fault of ours shows the visitor one plain line, and the log all of it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            _log.exception("the page failed")
            raise gr.Error(FAULT, print_exception=False) from error

    return call


def build_page(viewer: Viewer, examples: Sequence[str] = (), keep_files: int = 3600) -> gr.Blocks:
    """The page of one network; ``examples`` are image files to click, ``keep_files`` seconds that uploads live."""
    return in_event_loop(_build_page, viewer, examples, keep_files)


class _Page(gr.Blocks):
    """A page that opens no file but those it was given.

    gradio looks at the path of a file only where a request calls it one of gradio's (``meta``), and fetches a path that
    is an address: a request made by hand would show any image of this machine.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        """A request's values for an event's function; what the page itself would never send is refused."""
        if not _is_meant(inputs, Path(self.GRADIO_CACHE).resolve()):
            raise gr.Error(FAULT, print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def _is_meant(value: Any, uploads: Path, key: str = "") -> bool:
    """Whether all paths in a request's value lie below the folder of uploads, and no other text is long."""
    if isinstance(value, dict):
        return all(_is_meant(inner, uploads, name) for name, inner in value.items())
    if key == "path" and value is not None:
        try:
            return isinstance(value, str) and Path(value).resolve().is_relative_to(uploads)
        except (OSError, ValueError):  # no path at all
            return False
    if isinstance(value, list):
        return all(_is_meant(inner, uploads) for inner in value)
    return not isinstance(value, str) or key == "url" or len(value) <= MOST_LETTERS


def _build_page(viewer: Viewer, examples: Sequence[str], keep_files: int) -> gr.Blocks:
    with _Page(
        title=f"{viewer.name} · transcnn",
        analytics_enabled=False,
        delete_cache=(min(600, keep_files), keep_files),
    ) as page:
        gr.Markdown(_introduction(viewer))
        message = gr.Markdown(visible=False, elem_id="message")
        visit = gr.State(None, time_to_live=keep_files)
        with gr.Row():
            with gr.Column(min_width=320):
                photo = gr.Image(
                    label="Image",
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    placeholder="Drop an image here\n- or -\nclick to choose or take one",
                    buttons=[],
                    height=420,
                    elem_id="image",
                )
            with gr.Column(min_width=320):
                answer = _answer_box(viewer)
                gallery = _gallery(examples)
                upload = _upload_button(viewer)
        look = _Look(viewer, visit) if viewer.stages else None
        if look is not None:
            look.listen(visit, photo)
        files = _Files(viewer, examples, look)
        files.listen([visit, photo, message, answer], photo, upload, gallery)
        gr.Markdown("Your images stay on the machine that serves this page, and are deleted there after an hour.")
    return page


class _Files:
    """What happens when a visitor gives a file, clicks an example, or clears the image."""

    def __init__(self, viewer: Viewer, examples: Sequence[str], look: _Look | None) -> None:
        self.viewer, self.examples, self.look = viewer, examples, look

    def listen(
        self, outputs: list[Any], photo: gr.Image, upload: gr.UploadButton | None, gallery: gr.Gallery | None
    ) -> None:
        """Answer the events of these components; ``outputs`` are the visit, the image, the message and the answer."""
        controls = [self.look.stage, self.look.head] if self.look is not None else []
        outputs = [*outputs, *(self.look.outputs if self.look is not None else ())]
        # Without preprocessing gradio opens no file itself: it would say "Error" of what it can't read.
        photo.input(plainly(self.opened), [photo, *controls], outputs, preprocess=False, **_quiet())
        if upload is not None:
            upload.upload(plainly(self.opened), [upload, *controls], outputs, preprocess=False, **_quiet())
        photo.clear(self.cleared, None, outputs, **_quiet())
        if gallery is not None:
            gallery.select(plainly(self.chosen), controls, outputs, **_quiet())

    def shown(self, file: str | bytes | None, stage: int, head: str) -> list[Any]:
        """Everything on the page for a file just given; a file that can't be read clears it and says why."""
        if file is None:
            return [None, None, gr.skip(), None, *self._no_look()]
        try:
            image = read_image(file, self.viewer.pixel_range)
        except BrokenImage as error:
            words = f"**This file can't be shown:** {markdown(error)}. Try another image."
            return [None, None, gr.Markdown(words, visible=True), None, *self._no_look()]
        seen = self.viewer.visit(image)
        said = self.viewer.answer(image)
        maps = self.look.shown(seen, stage, head) if self.look is not None else []
        return [seen, self.viewer.marked(seen), gr.Markdown(visible=False), _said(said), *maps]

    def opened(self, payload: dict[str, Any] | None, stage: int = 0, head: str = MEAN) -> list[Any]:
        """A file of the visitor's."""
        return self.shown(_file_of(payload), stage, head)

    def chosen(self, event: gr.SelectData, stage: int = 0, head: str = MEAN) -> list[Any]:
        """One of the examples."""
        return self.shown(self.examples[int(event.index)], stage, head)

    def cleared(self) -> list[Any]:
        """No image any more."""
        return [None, gr.skip(), gr.Markdown(visible=False), None, *self._no_look()]

    def _no_look(self) -> list[Any]:
        return self.look.empty() if self.look is not None else []


class _Look:
    """The lower half: where the marked spot looks, with the choice of stage and head."""

    def __init__(self, viewer: Viewer, visit: gr.State) -> None:
        self.viewer = viewer
        self.levels = max(stage.local_levels for stage in viewer.stages) + 1
        gr.Markdown(
            "## Where does it look?\nClick anywhere on the image. Brighter: the marked spot takes more from there."
        )
        with gr.Row():
            first = viewer.stages[0]
            choices = [(f"{stage.number + 1}", stage.number) for stage in viewer.stages]
            self.stage = gr.Radio(
                choices,
                value=first.number,
                label="Stage",
                info="Early stages see fine detail, late ones coarse meaning.",
                elem_id="stage",
            )
            self.head = gr.Dropdown(
                _heads(first.heads),
                value=MEAN,
                label="Attention head",
                info="Each looks in its own way.",
                elem_id="head",
            )
        self.images: list[gr.Image] = []
        self.captions: list[gr.Markdown] = []
        with gr.Row(elem_id="look"):
            for level in range(self.levels):
                far = level == self.levels - 1
                name = "Far: the whole image" if far else "Near: its own grid"
                with gr.Column(min_width=300):
                    image = gr.Image(
                        label=name,
                        interactive=False,
                        buttons=["fullscreen"],
                        height=380,
                        elem_id="far" if far else f"near{level or ''}",
                    )
                    self.images.append(image)
                    self.captions.append(gr.Markdown(elem_classes="caption"))
        self.outputs: list[Any] = [self.head, *self.images, *self.captions]

    def listen(self, visit: gr.State, photo: gr.Image) -> None:
        """Answer another stage or head, and clicks on the image."""
        controls = [visit, self.stage, self.head]
        quiet = _quiet("always_last")
        gr.on([self.stage.change, self.head.change], plainly(self.again), controls, self.outputs, **quiet)
        photo.select(plainly(self.clicked), controls, [visit, photo, *self.outputs], **quiet)

    def shown(self, visit: Visit, stage: int, head: str) -> list[Any]:
        """The maps of a visit, for ``outputs``."""
        chosen = next(s for s in self.viewer.stages if s.number == stage)
        heads = _heads(chosen.heads)
        head = head if head in heads else MEAN
        looks = self.viewer.look(visit, stage, "mean" if head == MEAN else heads.index(head) - 1)
        images: list[Any] = []
        captions: list[Any] = []
        for level in range(self.levels):
            last = level == self.levels - 1
            found = looks[-1] if last else looks[level] if level < len(looks) - 1 else None
            images.append(None if found is None else gr.Image(found.image, label=found.title))
            captions.append(NO_GRIDS if found is None else found.words)
        return [gr.Dropdown(heads, value=head), *images, *captions]

    def empty(self) -> list[Any]:
        """Nothing in ``outputs``."""
        return [gr.skip(), *[None] * self.levels, *[""] * self.levels]

    def again(self, visit: Visit | None, stage: int, head: str) -> list[Any]:
        """Another stage or head of the same spot."""
        return self.empty() if visit is None else self.shown(visit, stage, head)

    def clicked(self, visit: Visit | None, stage: int, head: str, event: gr.SelectData) -> list[Any]:
        """Another spot."""
        if visit is None:
            return [None, gr.skip(), *self.empty()]
        column, row = event.index
        height, width = visit.image.height, visit.image.width
        visit = replace(visit, spot=(min(max(0, int(row)), height - 1), min(max(0, int(column)), width - 1)))
        return [visit, self.viewer.marked(visit), *self.shown(visit, stage, head)]


def _introduction(viewer: Viewer) -> str:
    names = viewer.loaded.class_names
    some = ", ".join(names[:12]) + (f" and {len(names) - 12:,} more" if len(names) > 12 else "")
    knows = {
        "classify": f"distinguishes {len(names):,} things",
        "multilabel": f"knows {len(names):,} labels",
        "regress": "estimates",
        "segment": f"finds the outlines of {len(names):,} things",
        "detect": f"finds {len(names):,} things",
    }[viewer.loaded.task]
    return f"# What does it see?\n{markdown(viewer.name)} {knows}: {markdown(some)}."


def _upload_button(viewer: Viewer) -> gr.UploadButton | None:
    """What opens files that browsers know nothing of, for a network that takes them; with a line on what it takes."""
    if not (words := viewer.takes):
        return None
    gr.Markdown(words)
    return gr.UploadButton("Open a .tif or .npy file", file_types=[".tif", ".tiff", ".npy"], elem_id="open")


def _answer_box(viewer: Viewer) -> Any:
    if viewer.task.whole_image:
        return gr.Label(label="Prediction", num_top_classes=5, elem_id="answer")
    return gr.Image(label="Prediction", interactive=False, buttons=["fullscreen"], height=420, elem_id="answer")


def _said(answer: dict[str, Any]) -> Any:
    """An answer as the component of :func:`_answer_box` takes it."""
    if "top" in answer:
        shares: dict[str, float] = {}
        for number, top in enumerate(answer["top"]):
            label = printable(top["label"])
            name = label if label not in shares else f"{label} ({number + 1})"
            shares[name] = top["score"]
        return shares
    if "values" in answer:
        return ", ".join(f"{printable(name)} {number:,.6g}" for name, number in answer["values"].items())
    return answer["overlay"]


def _gallery(examples: Sequence[str]) -> gr.Gallery | None:
    if not examples:
        return None
    gr.Markdown("Or click one of these:")
    return gr.Gallery(
        [str(Path(file)) for file in examples],
        label="Examples",
        show_label=False,
        columns=4,
        height="auto",
        allow_preview=False,
        interactive=False,
        buttons=[],
        object_fit="cover",
        elem_id="examples",
    )


def _heads(count: int) -> list[str]:
    return [MEAN, *(f"head {i + 1} of {count}" for i in range(count))]


def _quiet(mode: Any = None) -> dict[str, Any]:
    """No endpoint for programs, and a small sign of progress instead of a curtain."""
    return {"api_visibility": "private", "show_progress": "minimal", "trigger_mode": mode}


def _file_of(payload: Any) -> str | bytes | None:
    """What the browser sent: a file in the folder of uploads (gradio has checked that), or a data: address."""
    if not payload:
        return None
    if payload.get("path"):
        return payload["path"]
    head, _, data = (payload.get("url") or "").partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        return None
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        return b""  # read_image says what is wrong
