"""What all networks that predict have in common: any image in, in order, and an error in the place of a bad one."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from ..checkpoints.arguments import DENSE
from ..checkpoints.available import check_inputs
from ..data.images import BrokenImage
from ..data.inputs import ImageInput, input_name, is_one_image, one_by_one, read_input
from ..data.loading.read_ahead import read_ahead
from ..errors import UserError, check_range
from ..report.answers import NOT_A_NUMBER, Detections, Embedding, Failure, Prediction

__all__ = ["Predictor"]

_log = logging.getLogger(__name__)
DARK = 1 << 13  # of 65535: what instruments of 12 bits and fewer stay below


class Predictor(ABC):
    """A trained network that says what images show; :func:`transcnn.load` makes one.

    Attributes:
        model: The network, in evaluation mode; None of an ONNX file.
        task: ``classify``, ``segment`` or ``detect``.
        class_names: In the order of the outputs.
        preprocessing: How images become the network's input, in timm's words.
        source: Where it was read from.
        info: All that was stored beside the weights.
    """

    model: Any
    task: str
    class_names: list[str]
    preprocessing: dict[str, Any]
    source: str
    info: dict[str, Any]
    _told_of_dark = False

    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = 32,
        top_k: int = 5,
        min_score: float | None = None,
    ) -> Any:
        """What an image shows, or each of several.

        Several threads may call it at once; images are read in threads of its own.

        Args:
            images: One image or any number of them: a path, a URL, the bytes of a file, a binary file object, an image
                of Pillow's, an array (H, W) or (H, W, C), a tensor (H, W) or (C, H, W), or an array or a tensor of
                several. Arrays and tensors are of uint8, of uint16, or of floats from 0 to 1, not normalised. Text that
                strangers wrote doesn't belong here: a path reads this machine's files, a URL this network's.
            batch_size: Images at a time; to segment or detect they go one by one.
            top_k: Most classes to list for each image.
            min_score: To detect: leave out detections of a lower score.

        Returns:
            Of one image a :class:`Prediction` (:class:`Classification`, :class:`MultiLabel`, :class:`Regression`,
            :class:`Segmentation` or :class:`Detections`); of several a list of them, in order. An image that can't be
            read is a :class:`Failure` in its place.

        Raises:
            UserError: A number that can't be meant, or what is neither an image nor several.
        """
        found = [
            replace(prediction, image=None)
            for prediction in self.predict_iter(
                one_by_one(images), batch_size=batch_size, top_k=top_k, min_score=min_score
            )
        ]
        return found[0] if is_one_image(images) else found

    def predict_iter(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int = 32,
        top_k: int = 5,
        min_score: float | None = None,
    ) -> Iterator[Prediction]:
        """The same for many images one after another, with few of them in memory.

        Predictions of segmenters and detectors still hold their image.
        """
        check_range(1, batch_size=batch_size, top_k=top_k)
        self.check_min_score(min_score)
        make_input, predict_inputs = self._steps(top_k)
        for prediction in self._in_batches(images, self._at_once(batch_size), make_input, predict_inputs):
            yield prediction.from_score(min_score) if isinstance(prediction, Detections) else prediction

    def embed(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        layer: str | None = None,
        normalize: bool = False,
        batch_size: int = 32,
    ) -> Any:
        """The features of an image, or of each of several: what is alike has vectors that are.

        Args:
            images: As for :meth:`predict`.
            layer: Whose output is averaged over the image: a module by its dotted name, of an ONNX file a tensor.
                Without it, what a classifier's last layer is given, or the backbone's last map of a network that
                segments or detects.
            normalize: Vectors of length 1, so that a product of two is the cosine of their angle.
            batch_size: Images at a time.

        Returns:
            Of one image an :class:`Embedding`, of several a list; a :class:`Failure` for one that can't be read.

        Raises:
            UserError: No such layer, or what is neither an image nor several.
        """
        found = list(self.embed_iter(one_by_one(images), layer=layer, normalize=normalize, batch_size=batch_size))
        return found[0] if is_one_image(images) else found

    def embed_iter(
        self,
        images: Iterable[ImageInput],
        *,
        layer: str | None = None,
        normalize: bool = False,
        batch_size: int = 32,
    ) -> Iterator[Prediction]:
        """The same for many images one after another, with few of them in memory."""
        check_range(1, batch_size=batch_size)
        make_input, embed_inputs = self._embed_steps(layer)
        for found in self._in_batches(images, self._at_once(batch_size), make_input, embed_inputs):
            yield found.normalized() if normalize and isinstance(found, Embedding) else found

    @abstractmethod
    def resize_input(self, img_size: int | None) -> None:
        """Have images resized to another side than the network was trained at; None leaves it."""

    @abstractmethod
    def _steps(self, top_k: int) -> tuple[Any, Any]:
        """From an image to an input, called from several threads, and from a list of inputs to their predictions."""

    @abstractmethod
    def _embed_steps(self, layer: str | None) -> tuple[Any, Any]:
        """From an image to an input, and from a list of inputs to their embeddings."""

    def check_memory(self, images: int, *, chosen: bool = False) -> None:
        """See, before anything is read, that batches of ``images`` images fit into memory at the size they get.

        Args:
            images: Of a batch; to segment or detect they go one by one.
            chosen: The user gave the size: how long it takes is for them to know.

        Raises:
            UserError: They don't, or a file asks for a size that takes hours.
        """
        check_inputs(self, self._at_once(images))

    def _at_once(self, batch_size: int) -> int:
        """Images of a batch: whole photographs take memory, and go one by one anyway."""
        return 1 if self.task in DENSE else batch_size

    def check_min_score(self, min_score: float | None) -> None:
        """Raise UserError for a least score that isn't for this network, or below what it keeps."""
        if min_score is None:
            return
        if self.task != "detect":
            raise UserError(f"min_score is for detectors; this network is for the task {self.task}")
        kept = float((self.info.get("task_args") or {}).get("min_score", 0.0))
        if not kept <= min_score <= 1:
            raise UserError(
                f"min_score must be from {kept:g}, below which this network keeps nothing, to 1, got {min_score}"
            )

    def _warn_of_dark(self, name: str) -> None:
        """Say once that an image is nearly black to this network."""
        if not self._told_of_dark:
            self._told_of_dark = True
            _log.warning(
                "%s holds values far below the 65535 of 16 bits, which this network sees as nearly black; if less is "
                "white in such images, scale them to 8 bits, or train on them",
                name,
            )

    def _in_batches(
        self, images: Iterable[ImageInput], batch_size: int, make_input: Any, predict_inputs: Any
    ) -> Iterator[Prediction]:
        """One prediction for each image, in order; those that can't be read get their error."""
        pixel_range = self.preprocessing.get("pixel_range")
        inputs: list[Any] = []
        batch: list[tuple[str, Any, BrokenImage | None]] = []

        def predictions() -> Iterator[Prediction]:
            results = iter(predict_inputs(inputs) if inputs else ())
            for file, reread, broken in batch:
                yield _named(next(results), file, reread) if broken is None else Failure(file=file, error=str(broken))

        def read(image: ImageInput) -> Any:
            made = read_input(image, pixel_range)
            if pixel_range is None and _is_dark(made):
                self._warn_of_dark(input_name(image, 0))
            return make_input(made)

        with closing(read_ahead(images, read, 2 * batch_size)) as found:
            for number, (image, made) in enumerate(found, 1):
                broken = made if isinstance(made, BrokenImage) else None
                batch.append((input_name(image, number), partial(read_input, image, pixel_range), broken))
                inputs += [] if broken else [made]
                if len(batch) == batch_size:
                    yield from predictions()
                    inputs, batch = [], []
        yield from predictions()


def _is_dark(image: Any) -> bool:
    """Whether grey values of more than 8 bits were all far below the white of 16 bits."""
    kind, _, most = image.info.get("values") or ("", 0, 0)
    return kind in ("i", "u") and 255 < most < DARK


def _named(prediction: Prediction, file: str, reread: Any) -> Prediction:
    """The prediction with its file, or a failure where its scores are no numbers."""
    if not prediction.is_finite:
        return Failure(file=file, error=NOT_A_NUMBER)
    return replace(prediction, file=file, reread=reread)
