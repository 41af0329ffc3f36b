"""Image classification: loads a classifier and predicts the classes of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.models.loading import Dtype, device_of, dtype_name
from starmerge_models.evaluation.scoring.metrics import Prediction
from starmerge_models.evaluation.tasks.images import ImageTask, Pixels, list_names
from starmerge_models.evaluation.tasks.task import Example

BATCH_SIZE = 32
"""Default batch size, in images."""


def load_image_model(
    path: Path,
    *,
    device: str | None = None,
    dtype: Dtype = "auto",
    processor_of: Path | None = None,
) -> tuple[Any, Any]:
    """Load an image classifier and its image processor.

    The processor is transformers' PIL backend with the folder's ``preprocessor_config.json``,
    whether torchvision is installed or not, so that scores do not depend on it. Without this file,
    images are resized to the config's ``image_size`` (if it has one) and scaled to -1 ... 1 (mean
    and standard deviation 0.5).

    Args:
        path: The model's folder.
        device: Device to load the model on; None: the GPU if there is one.
        dtype: Dtype of the weights; "auto" is the stored one, but float32 if the device would only
            emulate it.
        processor_of: Folder whose ``preprocessor_config.json`` is used if the model's own folder
            has none, such as the base's.

    Raises:
        UsageError: A package is not installed, or the folder is not an image classifier.
    """
    try:
        import PIL  # noqa: F401, PLC0415
        from transformers import (  # noqa: PLC0415
            AutoImageProcessor,
            AutoModelForImageClassification,
        )
        from transformers.utils import logging  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            "Image tasks need transformers and Pillow. Install them: "
            "pip install 'starmerge-models[eval]'."
        ) from error
    logging.disable_progress_bar()
    place = device_of(device)
    if (path / "adapter_config.json").is_file():
        raise UsageError(f"{path} is an adapter. The base must be a whole model.")
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            path,
            dtype=getattr(torch, dtype_name(path, dtype, place.type)),
            output_loading_info=True,
        )
        processor = None
        for folder in (path, processor_of):
            if folder is not None and (folder / "preprocessor_config.json").is_file():
                processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
                break
    except Exception as error:  # whatever transformers and safetensors raise
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path} is not an image classifier: {reason}") from error
    if report["missing_keys"]:
        raise UsageError(
            f"{path} lacks {list_names(sorted(report['missing_keys']))}. A model without a "
            "classifier cannot classify: save it with one."
        )
    return model.to(place).eval(), processor or _plain_processor(model.config)


@torch.inference_mode()
def classify(
    model: Any,
    processor: Any,
    task: ImageTask,
    examples: Sequence[Example],
    *,
    batch_size: int | None = None,
    advance: Callable[[int], None],
) -> list[Prediction]:
    """Predict the class of each image: the most probable of the task's classes.

    Args:
        model: The loaded classifier, with or without a PEFT adapter.
        processor: The image processor from :func:`load_image_model`.
        task: The task.
        examples: The images.
        batch_size: Images of a batch, by default 32; the result does not depend on it.
        advance: Called with the number of images that were just completed.

    Returns:
        A prediction for each example, in order.

    Raises:
        UsageError: The model lacks a class, or its input and the processor's output do not fit.
        StarmergeError: A file is not an image, or the model computes NaN or an infinity.
    """
    config = model.config
    classes, outputs = _classes(task, config, examples)
    mode = "L" if _channels(config) == 1 else "RGB"
    predictions: list[Prediction] = []
    for rows, pixels in _batches(processor, examples, mode, batch_size or BATCH_SIZE):
        try:
            logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits.float()
        except ValueError as error:
            raise UsageError(
                f"{_name(config)} and its preprocessor_config.json do not fit: {error}"
            ) from error
        broken = (~logits.isfinite()).any(-1).tolist()
        if any(broken):
            raise StarmergeError(_broken(model, rows[broken.index(True)]))
        best = logits[:, outputs].argmax(-1).tolist()
        predictions += [predicted(row, classes[k]) for row, k in zip(rows, best, strict=True)]
        advance(len(rows))
    return predictions


def predicted(example: Example, response: str) -> Prediction:
    """Return the prediction for an example; the response is the task's name of a class."""
    credit = float(response == example.label)
    return Prediction(example.id, response, value=response, gold=example.label, credit=credit)


def _batches(
    processor: Any, examples: Sequence[Example], mode: str, size: int
) -> Iterator[tuple[list[Example], Tensor]]:
    """Yield batches of examples with images of one size: pixels (n, channels, height, width)."""
    rows: list[Example] = []
    pixels: list[Tensor] = []
    for example in examples:
        image = _opened(example.fields["image"], mode)
        values = processor(image, return_tensors="pt")["pixel_values"][0]
        if rows and (len(rows) == size or values.shape != pixels[0].shape):
            yield rows, torch.stack(pixels)
            rows, pixels = [], []
        rows.append(example)
        pixels.append(values)
    if rows:
        yield rows, torch.stack(pixels)


def _opened(image: Path | Pixels, mode: str) -> Any:
    """Return a Pillow image in a mode ("L" or "RGB"), rotated by the file's EXIF orientation.

    Raises:
        StarmergeError: The file is not an image, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps  # noqa: PLC0415  (only where images are seen)

    if not isinstance(image, Path):
        flat = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
        return Image.fromarray(flat).convert(mode)
    try:
        with Image.open(image) as file:
            if file.mode == "F" or file.mode.startswith("I"):
                raise StarmergeError(  # Pillow would cut its values off at 255
                    f"{image} has more than 8 bits a channel ({file.mode}). Scale it to 8 bits."
                )
            return ImageOps.exif_transpose(file).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StarmergeError(
            f"{image} is not a readable image: {error}. Repair it, or take it out."
        ) from error


def _classes(
    task: ImageTask, config: Any, examples: Sequence[Example]
) -> tuple[list[str], list[int]]:
    """Return the classes to choose from, by the task's names, and their indices in the outputs.

    Either all classes are matched by name, or all by number.

    Raises:
        UsageError: The model lacks a class.
    """
    names: dict[int, str] = config.id2label
    wanted = task.words or tuple((label,) for label in sorted({row.label for row in examples}))
    matches = [[output for output, name in names.items() if name in words] for words in wanted]
    lacking = [words[0] for words, found in zip(wanted, matches, strict=True) if len(found) != 1]
    numbered = all(label.isdecimal() and int(label) in names for label in lacking)
    if not lacking:
        outputs = [found[0] for found in matches]
    elif task.labels is None and len(lacking) == len(wanted) and numbered:
        names = {output: str(output) for output in names}
        outputs = [int(label) for label in lacking]
    elif task.labels is not None and len(wanted) == len(names) and _are_unnamed(names):
        outputs = list(range(len(names)))
    else:
        raise UsageError(
            f"Task {task.name}: {_name(config)} has no class, or not just one, called "
            f"{lacking[0]!r}. Its classes: {list_names(names.values())}. Give the task labels with "
            "its names."
        )
    classes = [words[0] for words in wanted]
    if task.labels is None:
        others = [output for output in names if output not in outputs]
        return classes + [names[output] for output in others], outputs + others
    return classes, outputs


def _are_unnamed(names: Mapping[int, str]) -> bool:
    return all(name == f"LABEL_{output}" for output, name in names.items())


def _plain_processor(config: Any) -> Any:
    """Return the image processor of a model without ``preprocessor_config.json``."""
    from transformers import ViTImageProcessorPil  # noqa: PLC0415

    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    height, width = (size, size) if size is None or isinstance(size, int) else size
    half = [0.5] * _channels(config)
    return ViTImageProcessorPil(
        do_resize=size is not None,
        size={"height": height, "width": width} if size is not None else None,
        image_mean=half,
        image_std=half,
    )


def _channels(config: Any) -> int:
    return int(getattr(getattr(config, "vision_config", config), "num_channels", 3))


def _broken(model: Any, row: Example) -> str:
    """Return the error message for logits that are not finite, with the cause if it is found."""
    message = f"{_name(model.config)} gives NaN or an infinity for image {row.id}."
    for name, buffer in model.named_buffers():
        if name.endswith("running_var") and (buffer < 0).any():
            return (
                f"{message} {name} has negative variances: the merged updates are too large for a "
                "batch norm. Use smaller weights, or an average."
            )
    return f"{message} Its weights are broken, or its dtype is too narrow."


def _name(config: Any) -> str:
    return str(config.name_or_path or "The model")
