"""Tasks of labelled images: image files in a folder for each class, arrays, or a generator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import BadZipFile

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.scoring.metrics import DEFAULT, METRICS, Metric
from starmerge_models.evaluation.tasks.sources import (
    DATA_SEED,
    Data,
    Sample,
    Source,
    Split,
    function_name,
    function_of,
    is_held_out,
)
from starmerge_models.evaluation.tasks.task import (
    Example,
    Labels,
    MetricName,
    check_labels,
    normalise_labels,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Suffixes of the image files in a class folder; other files are ignored."""

Pixels = NDArray[np.uint8]
"""An image, (height, width) or (height, width, channels)."""

Row = tuple[str, Path | Pixels, str]
"""An image's id in its source, its file or its pixels, and its label in the data."""


class FolderSource(Source):
    """Image files in one sub-folder for each class, or the same within ``train`` and ``test``.

    The sub-folders' names are the labels. If there is a sub-folder ``test`` with sub-folders, its
    images are scored, and those of ``train`` are training images.
    """

    folder: Path
    """A relative path is resolved against the task file's folder."""
    held_out: float | None = Field(default=None, gt=0, lt=1)
    """Score this share of the images, chosen by a hash of the files, and train on the rest."""

    def with_all_rows(self) -> Self:
        """Return the source without a held-out share."""
        return self if self.held_out is None else self.model_copy(update={"held_out": None})


class ArraySource(Source):
    """Arrays of a NumPy file (.npz).

    The images are (n, h, w) or (n, h, w, c) with 1, 3 or 4 channels, uint8 or floating-point from
    0 to 1; the labels are n whole numbers or texts.
    """

    array: Path
    """A relative path is resolved against the task file's folder."""
    images: str = "images"
    """Array of the images to score."""
    labels: str = "labels"
    train_images: str | None = None
    """Array of the training images."""
    train_labels: str | None = None
    held_out: float | None = Field(default=None, gt=0, lt=1)
    """Score this share of the images, chosen by a hash of the pixels, and train on the rest."""

    @model_validator(mode="after")
    def _one_way_to_split(self) -> ArraySource:
        if (self.train_images is None) != (self.train_labels is None):
            raise ValueError("give both train_images and train_labels, or neither")
        if self.train_images is not None and self.held_out is not None:
            raise ValueError("give train_images or held_out, not both")
        return self

    def with_all_rows(self) -> Self:
        """Return the source without a held-out share."""
        return self if self.held_out is None else self.model_copy(update={"held_out": None})


class ImageGeneratorSource(Source):
    """Images that a Python function makes: it gets a ``random.Random`` and yields (array, label).

    Each array is one image, with shape and dtype as in :class:`ArraySource`; each label is a whole
    number or a text.
    """

    generator: str | Callable[..., Any]
    """``package.module:function``, ``path/to/file.py:function``, or the function itself."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """Score this share of the images, chosen by a hash of the pixels, and train on the rest."""


IMAGE_SOURCES: dict[str, type[Data]] = {
    "folder": FolderSource,
    "array": ArraySource,
    "generator": ImageGeneratorSource,
}
"""The source classes by their distinguishing key."""


class ImageTask(Data):
    """A task: images of one class each.

    Example:
        .. code-block:: yaml

            kind: image-classification
            description: Which animal is it?
            source: {folder: animals}
            sample: {kind: balanced, n: 50}
            labels: {n02123045: [tabby, "tabby, tabby cat"], n02099601: golden retriever}
    """

    kind: Literal["image-classification"] = "image-classification"
    name: str = Field(min_length=1)
    """The task's name; a fine-tune with the same name is this task's own."""
    description: str = ""
    source: FolderSource | ArraySource | ImageGeneratorSource
    sample: Sample = Sample()
    labels: Annotated[
        dict[str, tuple[str, ...]] | None,
        BeforeValidator(normalise_labels, json_schema_input_type=Labels),
    ] = None
    """The classes to choose from: the label in the data, and the names of the class, one of which
    must be in the model's ``id2label``. If ``id2label`` has only placeholders (LABEL_0, LABEL_1
    ...), the labels are in the order of the outputs. Without labels, the model chooses from all of
    its classes, and the data's labels are their names, or the indices of the outputs."""
    metric: MetricName = DEFAULT

    @model_validator(mode="after")
    def _parts_fit(self) -> ImageTask:
        if self.labels is not None:
            check_labels(self.labels)
        self.scored_by.check(None, closed=self.labels is not None)
        return self

    @cached_property
    def scored_by(self) -> Metric:
        """The metric that ``metric`` names."""
        return METRICS.find(self.metric)

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """The names of each class, in order; empty for tasks without labels."""
        return tuple(self.labels.values()) if self.labels is not None else ()

    @property
    def answers(self) -> str:
        """Short description of the answers, for lists."""
        return f"{len(self.words)} classes" if self.words else "classes"

    def beside(self, folder: Path) -> ImageTask:
        """Return the task with the relative paths of its source resolved against a folder."""
        return self.model_copy(update={"source": self.source.beside(folder)})

    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """Return the images of a split, sampled and shuffled with the sample's seed.

        The field ``image`` of an example is the path of the unopened file, or the pixels.

        Args:
            split: "test": the sample of the images to score; "train": all training images.
            limit: Most images.

        Raises:
            UsageError: There are no images, or an image has an unknown label.
            StarmergeError: The arrays are broken.
        """
        rows = _read(self.source, split, self.name)
        if not rows:
            raise UsageError(f"Task {self.name} has no images for {split}ing. Give more.")
        found = [self._example(*row) for row in rows]
        if split == "train":
            return self.sample.shuffled(found)[:limit]
        return self.sample.take(found, lambda row: row.label, limit)

    def fingerprint(self, examples: Sequence[Example]) -> str:
        """Return a hash of everything that determines the model's input and the scoring."""
        spec = self.model_dump(mode="json", exclude={"name", "description", "source", "sample"})
        rows = [(row.id, _digest(row.fields["image"]), row.label) for row in examples]
        return blake3(json.dumps([spec, rows]).encode()).hexdigest()

    def _example(self, place: str, image: Path | Pixels, label: str) -> Example:
        if self.labels is None:
            return Example(place, {"image": image}, label)
        if label not in self.labels:
            raise UsageError(
                f"Task {self.name}, image {place}: the label {label!r} is not one of the task's: "
                f"{list_names(self.labels)}."
            )
        choices = tuple(words[0] for words in self.words)
        return Example(place, {"image": image}, self.labels[label][0], choices)


def describe_images(source: FolderSource | ArraySource | ImageGeneratorSource) -> str:
    """Return the folder, file or function of a source, for lists and errors."""
    if isinstance(source, FolderSource):
        return str(source.folder)
    if isinstance(source, ArraySource):
        return str(source.array)
    return function_name(source.generator)


def _read(
    source: FolderSource | ArraySource | ImageGeneratorSource, split: Split, task: str
) -> list[Row]:
    """Return the images of a split, in the source's order."""
    if isinstance(source, ImageGeneratorSource):
        return _part(list(_generated(source)), source.held_out, split)
    if isinstance(source, FolderSource):
        parts = {part: source.folder / part for part in ("train", "test")}
        if _is_split(source.folder):
            if source.held_out is not None:
                raise UsageError(
                    f"Task {task}: {source.folder} is split into train and test. Leave held_out "
                    "out."
                )
            return list(_in_folder(parts[split], source.folder))
        rows = list(_in_folder(source.folder, source.folder))
        ways = "held_out in its source, or a folder 'train' beside 'test'"
    else:
        if split == "train" and source.train_images and source.train_labels:
            return _in_arrays(source.array, source.train_images, source.train_labels)
        rows = _in_arrays(source.array, source.images, source.labels)
        if split == "test" and source.train_images:
            return rows
        ways = "held_out, or train_images and train_labels, in its source"
    if source.held_out is not None:
        return _part(rows, source.held_out, split)
    if split == "train":
        raise UsageError(f"Task {task} names no images to train on ({ways}).")
    return rows


def _part(rows: list[Row], share: float, split: Split) -> list[Row]:
    """Return one split of the rows by a hash of the images, without duplicate images."""
    unique = {_digest(image): (place, image, label) for place, image, label in rows}
    return [row for key, row in unique.items() if (split == "test") == is_held_out(key, share)]


def _digest(image: Path | Pixels) -> str:
    if isinstance(image, Path):
        return blake3(image.read_bytes()).hexdigest()
    return blake3(f"{image.shape}".encode() + image.tobytes()).hexdigest()


def _is_split(folder: Path) -> bool:
    test = folder / "test"
    return test.is_dir() and any(part.is_dir() for part in test.iterdir())


def _in_folder(folder: Path, root: Path) -> Iterator[Row]:
    """Yield the image files of a folder with one sub-folder for each class."""
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist, or is no folder.")
    classes = sorted(
        part for part in folder.iterdir() if part.is_dir() and not part.name.startswith(".")
    )
    if not classes:
        raise UsageError(f"{folder} has no sub-folders. Put the images of each class into one.")
    for part in classes:
        files = sorted(file for file in part.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UsageError(f"{part} has no images ({', '.join(IMAGE_SUFFIXES)}).")
        for file in files:
            yield file.relative_to(root).as_posix(), file, part.name


def _in_arrays(file: Path, images: str, labels: str) -> list[Row]:
    try:
        arrays = np.load(file, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it is a single array, of np.save and not of np.savez")
        with arrays:
            missing = [name for name in (images, labels) if name not in arrays.files]
            if missing:
                raise UsageError(
                    f"{file} has no array {missing[0]!r}. It has: {', '.join(arrays.files)}."
                )
            pixels, values = arrays[images], arrays[labels]
    except FileNotFoundError as error:
        raise UsageError(f"{file} does not exist.") from error
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise StarmergeError(f"{file} is not a readable .npz file: {error}") from error
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "iuU":
        raise StarmergeError(
            f"{file}: the labels ({labels}) are {values.dtype} of shape {values.shape}. They must "
            "be (n,), whole numbers or texts."
        )
    if pixels.ndim not in (3, 4) or len(pixels) != len(values):
        raise StarmergeError(
            f"{file}: the images ({images}) have the shape {pixels.shape}. For {len(values)} "
            f"labels it must be ({len(values)}, height, width), or with channels at the end."
        )
    return [
        (f"{images}/{number}", _as_pixels(image, f"{file}, image {number}"), str(label))
        for number, (image, label) in enumerate(zip(pixels, values, strict=True))
    ]


def _generated(source: ImageGeneratorSource) -> Iterator[Row]:
    for number, made in enumerate(function_of(source.generator)(random.Random(DATA_SEED))):
        where = f"Generator {source.generator}, image {number}"
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], np.ndarray)):
            raise UsageError(f"{where} is no pair of an array and a label.")
        yield str(number), _as_pixels(made[0], where), str(made[1])


def _as_pixels(image: NDArray[Any], where: str) -> Pixels:
    """Check an image and convert it to uint8.

    Raises:
        StarmergeError: Its shape, dtype or range is not an image's.
    """
    if (
        not image.size
        or image.ndim not in (2, 3)
        or (image.ndim == 3 and image.shape[2] not in (1, 3, 4))
    ):
        raise StarmergeError(
            f"{where} has the shape {image.shape}. It must be (height, width), or (height, width, "
            "channels) with 1, 3 or 4 channels."
        )
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise StarmergeError(f"{where} is {image.dtype}. Give uint8, or floats from 0 to 1.")
    if not (image.min() >= 0 and image.max() <= 1):
        raise StarmergeError(
            f"{where} has values from {image.min():g} to {image.max():g}. Scale floats to 0 ... 1."
        )
    return np.round(image * 255).astype(np.uint8)


def list_names(names: Iterable[str]) -> str:
    """Return names as text; only the first ten if there are more."""
    names = list(names)
    rest = f" ... ({len(names)} in all)" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + rest
