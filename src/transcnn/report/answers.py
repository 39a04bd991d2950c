"""What a network says about an image: small typed objects, with arrays where pixels are meant."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ..errors import UserError
from .overlay import SHOWN_SCORE, blend, draw_detections, largest, legend, palette, run_lengths, with_lines

__all__ = [
    "NOT_A_NUMBER",
    "Box",
    "Classification",
    "Detections",
    "Embedding",
    "Failure",
    "Label",
    "MultiLabel",
    "Prediction",
    "Regression",
    "Segmentation",
    "Share",
    "prediction_of",
]


NOT_A_NUMBER = "the network's output is not a number (NaN); are its weights damaged?"  # error of a Failure


@dataclass(frozen=True)
class Label:
    """A class and its probability."""

    label: str
    score: float


@dataclass(frozen=True)
class Share:
    """A class and the share of the image's pixels that show it."""

    label: str
    share: float


@dataclass(frozen=True)
class Box:
    """An object: its class, probability, and box (x1, y1, x2, y2) in pixels of the upright image.

    ``lengths`` are COCO's uncompressed run lengths of its mask, where the network gives masks.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    lengths: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def mask(self) -> np.ndarray | None:
        """(H, W) of bool, or None of a network that gives boxes alone."""
        if self.lengths is None:
            return None
        counts = self.lengths["counts"]
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(self.lengths["size"], order="F")


@dataclass(frozen=True, kw_only=True)
class Prediction(ABC):
    """What a network says about one image.

    Attributes:
        file: The image's path or URL; ``image 3`` for the third where it has none.
        image: The image itself, upright, where it is still in memory; ``predict`` leaves it out.
        reread: Reads it again.
        error: None; the reason of a :class:`Failure`.
    """

    file: str = ""
    image: Image.Image | None = field(default=None, repr=False, compare=False)
    reread: Callable[[], Image.Image] | None = field(default=None, repr=False, compare=False)
    error: ClassVar[str | None] = None

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """What ``transcnn predict --json`` prints: text, numbers and lists alone."""

    @abstractmethod
    def _drawn(self, image: Image.Image) -> Image.Image: ...

    def plot(self, image: Image.Image | None = None) -> Image.Image:
        """The image with the prediction drawn in.

        Args:
            image: Upright, as it was predicted; without it, it is read again.

        Raises:
            UserError: It can't be read again, or there is nothing to draw.
        """
        if image is None:
            image = self.image
        if image is None:
            try:
                image = self.reread() if self.reread is not None else None
            except ValueError as error:
                raise UserError(f"{self.file} can't be read again: {error}") from error
        if image is None:
            raise UserError(f"{self.file} isn't in memory any more: give plot the image")
        return self._drawn(image)

    @property
    def is_finite(self) -> bool:
        """Whether all its scores are numbers: JSON has no NaN."""
        return True


@dataclass(frozen=True, kw_only=True)
class Failure(Prediction):
    """In the place of a prediction: why there is none."""

    error: str  # pyright: ignore  (a class variable of the others)

    def to_dict(self) -> dict[str, Any]:
        """``{"file", "error"}``."""
        return {"file": self.file, "error": self.error}

    def plot(self, image: Image.Image | None = None) -> Image.Image:
        """Raises UserError: there is nothing to draw."""
        raise UserError(f"{self.file}: {self.error}")

    def _drawn(self, image: Image.Image) -> Image.Image:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Classification(Prediction):
    """The likeliest classes of an image, most confident first (``top``); ``label`` and ``score`` are the first's."""

    top: tuple[Label, ...]

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.top[0].label

    @property
    def score(self) -> float:
        """Its probability."""
        return self.top[0].score

    def to_dict(self) -> dict[str, Any]:
        """``{"file", "top": [{"label", "score"}, ...]}``."""
        return {"file": self.file, "top": [{"label": entry.label, "score": entry.score} for entry in self.top]}

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(entry.score) for entry in self.top)

    def _drawn(self, image: Image.Image) -> Image.Image:
        return with_lines(image, [f"{entry.label} {entry.score:.1%}" for entry in self.top])


@dataclass(frozen=True, kw_only=True)
class MultiLabel(Classification):
    """The labels that hold of an image (``labels``, perhaps none), and the most probable of all (``top``)."""

    labels: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """``{"file", "labels": [...], "top": [{"label", "score"}, ...]}``."""
        row = super().to_dict()
        return {"file": row["file"], "labels": list(self.labels), "top": row["top"]}

    def _drawn(self, image: Image.Image) -> Image.Image:
        held = set(self.labels)
        return with_lines(
            image, [f"{'+' if entry.label in held else '-'} {entry.label} {entry.score:.1%}" for entry in self.top]
        )


@dataclass(frozen=True, kw_only=True)
class Regression(Prediction):
    """Numbers by their names (``values``), in the data's units; ``value`` is the first."""

    values: Mapping[str, float]

    @property
    def value(self) -> float:
        """The first number, of one there is only."""
        return next(iter(self.values.values()))

    def to_dict(self) -> dict[str, Any]:
        """``{"file", "values": {name: number, ...}}``."""
        return {"file": self.file, "values": dict(self.values)}

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(number) for number in self.values.values())

    def _drawn(self, image: Image.Image) -> Image.Image:
        return with_lines(image, [f"{name} {number:,.6g}" for name, number in self.values.items()])


def prediction_of(row: Mapping[str, Any]) -> Prediction:
    """From what :func:`transcnn.onnx.answers.answers` says about an image as a whole."""
    if "values" in row:
        return Regression(values=row["values"])
    top = tuple(Label(**entry) for entry in row["top"])
    return MultiLabel(top=top, labels=tuple(row["labels"])) if "labels" in row else Classification(top=top)


@dataclass(frozen=True, kw_only=True)
class Embedding(Prediction):
    """What a layer of the network makes of an image: its pooled features (``vector``), (C,) of float32."""

    vector: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """``{"file", "vector": [...]}``."""
        return {"file": self.file, "vector": self.vector.tolist()}

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.vector).all())

    def normalized(self) -> Embedding:
        """The same of length 1."""
        return replace(self, vector=self.vector / max(float(np.linalg.norm(self.vector)), 1e-12))

    def _drawn(self, image: Image.Image) -> Image.Image:
        return image


@dataclass(frozen=True, kw_only=True)
class Segmentation(Prediction):
    """The class of each pixel.

    Attributes:
        mask: (H, W) of uint8 or uint16: indices into ``class_names``, at the image's own size.
        class_names: In the order of the indices.
        classes: The largest areas, ``top_k`` of them at most.
        label_ids: What the data's label maps call the classes.
        colours: Of the classes, (r, g, b) from 0 to 255.
    """

    mask: np.ndarray = field(repr=False, compare=False)
    class_names: Sequence[str] = field(repr=False)
    classes: tuple[Share, ...]
    label_ids: Sequence[int] = field(repr=False)
    colours: Sequence[Sequence[int]] = field(repr=False)

    @classmethod
    def of(cls, labels: np.ndarray, class_names: Sequence[str], args: Mapping[str, Any], top_k: int) -> Segmentation:
        """From the class of each pixel (H, W); ``args`` holds the data's ``label_ids`` and ``colours``, if any."""
        return cls(
            mask=labels.astype(np.uint8 if len(class_names) <= 256 else np.uint16),
            class_names=class_names,
            classes=tuple(Share(**entry) for entry in largest(labels, class_names, top_k)),
            label_ids=args["label_ids"],
            colours=args.get("colours") or palette(len(class_names)),
        )

    def to_dict(self) -> dict[str, Any]:
        """``{"file", "classes": [{"label", "share"}, ...]}``."""
        return {"file": self.file, "classes": [{"label": c.label, "share": c.share} for c in self.classes]}

    def _drawn(self, image: Image.Image) -> Image.Image:
        _check_size(image, self.mask.shape)
        shown: list[int] = np.unique(self.mask).tolist()
        blended = blend(image, self.mask.astype(np.int64), self.colours)
        return legend(blended, [self.class_names[i] for i in shown], [self.colours[i] for i in shown])


@dataclass(frozen=True, kw_only=True)
class Detections(Prediction):
    """The objects in an image.

    Attributes:
        boxes: Most confident first.
        class_names: All that the network knows.
        label_ids: What the data's annotations call these.
        shown_score: Boxes from this score on are drawn.
    """

    boxes: tuple[Box, ...]
    class_names: Sequence[str] = field(repr=False)
    label_ids: Sequence[int] = field(repr=False)
    shown_score: float = field(default=SHOWN_SCORE, repr=False)

    @classmethod
    def of(cls, found: Mapping[str, np.ndarray], class_names: Sequence[str], args: Mapping[str, Any]) -> Detections:
        """From ``boxes`` (N, 4), ``scores``, ``labels`` and perhaps ``masks`` (N, 1, H, W); ``args``: ``label_ids``."""
        boxes = tuple(
            Box(
                class_names[int(found["labels"][i])],
                round(float(found["scores"][i]), 6),
                tuple(round(float(value), 2) for value in found["boxes"][i]),  # pyright: ignore
                run_lengths(found["masks"][i, 0] > 0.5) if "masks" in found else None,
            )
            for i in np.argsort(-found["scores"], kind="stable").tolist()
        )
        ids = args.get("label_ids") or list(range(1, len(class_names) + 1))
        return cls(boxes=boxes, class_names=class_names, label_ids=ids)

    def from_score(self, min_score: float | None) -> Detections:
        """Those of ``min_score`` or more, all of which are drawn; None leaves it as it is."""
        if min_score is None:
            return self
        kept = tuple(box for box in self.boxes if box.score >= min_score)
        return replace(self, boxes=kept, shown_score=min_score)

    def to_dict(self) -> dict[str, Any]:
        """``{"file", "boxes": [{"label", "score", "box": [x1, y1, x2, y2]}, ...]}``."""
        boxes = [{"label": b.label, "score": b.score, "box": list(b.box)} for b in self.boxes]
        return {"file": self.file, "boxes": boxes}

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(box.score) for box in self.boxes)

    def _drawn(self, image: Image.Image) -> Image.Image:
        index = {name: i for i, name in enumerate(self.class_names)}
        found: dict[str, Any] = {
            "boxes": np.array([box.box for box in self.boxes], np.float64).reshape(-1, 4),
            "labels": np.array([index[box.label] for box in self.boxes], np.int64),
            "scores": np.array([box.score for box in self.boxes], np.float64),
        }
        for lengths in (box.lengths for box in self.boxes if box.lengths is not None):
            _check_size(image, lengths["size"])
        if any(box.lengths is not None for box in self.boxes):
            found["masks"] = _Masks(self.boxes)
        return draw_detections(image, found, self.class_names, palette(len(self.class_names)), self.shown_score)


def _check_size(image: Image.Image, shape: Sequence[int]) -> None:
    """Refuse to draw a mask (H, W) on an image of another size."""
    if tuple(shape) != (image.height, image.width):
        raise UserError(
            f"the prediction is of an image of {shape[0]}x{shape[1]}, plot got one of {image.height}x{image.width}"
        )


class _Masks:
    """Masks of boxes, each made when it is drawn: at a photograph's full size a hundred of them are large."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = boxes

    def __getitem__(self, i: int) -> np.ndarray:
        mask = self.boxes[i].mask
        assert mask is not None
        return mask
