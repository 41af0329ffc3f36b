"""A small vision transformer for handwritten digits, and full fine-tunes of it for six domains.

The images are scikit-learn's 1,797 real digits of 8 × 8 pixels. A domain changes all of them in one
way: turned, mirrored, inverted, noisy, thickened or partly covered. The same 597 digits are held
out in every domain, so no model has seen a digit that it is asked, in whatever domain. The base
learns from upright digits, moved about by a pixel, and from a few of each domain; each fine-tune
goes on from there, all of its weights free, on the training rows of one domain.

    python examples/images/make.py FOLDER
    starmerge study FOLDER/images.yaml -o FOLDER/runs

FOLDER gets the base, the fine-tunes, an array file and a task file for each domain, and the study.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from transformers.utils import logging

from starmerge_models.evaluation.tasks.files import as_yaml
from starmerge_models.evaluation.tasks.images import ImageTask
from starmerge_models.progress import progress_bar
from starmerge_models.storage.publishing import output_folder

Images = NDArray[np.uint8]
"""Grey images, (n, 8, 8), the strokes light on dark."""

Rows = tuple[Images, NDArray[np.int64]]
"""Images, and the digits that they show, (n,)."""

HELD_OUT = 597
"""Digits to score, the same in every domain."""

SEED = 0
"""Of the split, of what is random in a domain, and of the training."""

SIDE = 8
"""Pixels."""

SHAPE = {
    "image_size": SIDE,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
"""Of the transformer, which sees an image as 16 patches."""

BATCH = 128
EPOCHS = 10
"""Of each fine-tune; the base is trained for twice as many."""
BASE_RATE, RATE = 2e-3, 3e-4
"""Learning rates at the beginning."""
SHARE = 10
"""The base sees one in so many of the training rows of each domain."""


def noisy(images: Images, chance: np.random.Generator) -> Images:
    """Add noise whose standard deviation is a quarter of the range."""
    return np.clip(images + chance.normal(0, 64, images.shape), 0, 255).astype(np.uint8)


def thick(images: Images, _: np.random.Generator) -> Images:
    """Give each pixel the lightest value of itself and its neighbours to the right and below."""
    wide = np.maximum(images, np.roll(images, -1, axis=2))
    return np.maximum(wide, np.roll(wide, -1, axis=1))


def covered(images: Images, chance: np.random.Generator) -> Images:
    """Cover a square of 3 × 3 pixels somewhere with grey."""
    found: Images = images.copy()
    places = chance.integers(0, SIDE - 2, (len(found), 2))
    for image, (top, left) in zip(found, places, strict=True):
        image[top : top + 3, left : left + 3] = 128
    return found


DOMAINS: dict[str, tuple[str, Callable[[Images, np.random.Generator], Images]]] = {
    "rotated": ("Digits turned left by 90°.", lambda images, _: np.rot90(images, axes=(1, 2))),
    "mirrored": ("Digits as in a mirror.", lambda images, _: images[:, :, ::-1]),
    "inverted": ("Digits dark on light.", lambda images, _: 255 - images),
    "noisy": ("Digits in noise.", noisy),
    "thick": ("Digits with thick strokes.", thick),
    "covered": ("Digits with a square of 3 by 3 pixels covered.", covered),
}
"""By name: a description, and what makes the domain's images of upright ones."""


def moved(images: Images) -> list[Images]:
    """Return images as they are, and moved by one pixel to each of the four sides."""
    wide = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    places = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    return [wide[:, top : top + SIDE, left : left + SIDE] for top, left in places]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to; must not be there yet")
    parser.add_argument(
        "--epochs",
        type=int,
        default=EPOCHS,
        help=f"of each fine-tune, and half of the base's (default {EPOCHS})",
    )
    given = parser.parse_args(arguments)
    if given.folder.exists():
        parser.error(f"{given.folder} is there already. Give another folder, or delete it.")
    if given.epochs < 1:
        parser.error(f"--epochs is {given.epochs}. Give 1 or more.")
    make(given.folder, given.epochs)
    print(f"Made {given.folder}. Next: starmerge study {given.folder}/images.yaml -o RUNS")


def make(folder: Path, epochs: int = EPOCHS) -> None:
    """Make the models, the tasks and the study.

    Args:
        folder: Where to; it appears when all is there.
        epochs: Of each fine-tune, and half of the base's.
    """
    torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other
    logging.disable_progress_bar()
    with output_folder(folder) as made:
        (upright, digits), domains = write_tasks(made.path)
        seen = [(images, digits) for images in moved(upright)]
        seen += [(images[::SHARE], labels[::SHARE]) for images, labels in domains.values()]
        images, labels = (np.concatenate(parts) for parts in zip(*seen, strict=True))
        steps = 2 * epochs * batches(labels)
        steps += sum(epochs * batches(own) for _, own in domains.values())
        with progress_bar("training", steps, show=True) as advance:
            base = new_model()
            train(base, images, labels, 2 * epochs, BASE_RATE, SEED, advance)
            base.save_pretrained(made.path / "base")
            processor_of(base.config).save_pretrained(made.path / "base")
            for seed, (name, rows) in enumerate(domains.items(), SEED + 1):
                tuned = copy.deepcopy(base)
                train(tuned, *rows, epochs, RATE, seed, advance)
                tuned.save_pretrained(made.path / name)
        shutil.copy(Path(__file__).with_name("images.yaml"), made.path)


def write_tasks(folder: Path) -> tuple[Rows, dict[str, Rows]]:
    """Write the domains' array and task files; return the rows to train on, upright and by domain.

    The rows of a domain are the upright digits, in the same order.
    """
    data = load_digits()
    digits, labels = np.round(data.images * (255 / 16)).astype(np.uint8), data.target
    order = np.random.default_rng(SEED).permutation(len(digits))
    scored, trained = order[:HELD_OUT], order[HELD_OUT:]
    rows = {}
    for number, (name, (description, changed)) in enumerate(DOMAINS.items()):
        images = changed(digits, np.random.default_rng([SEED, number]))
        np.savez_compressed(
            folder / f"{name}.npz",
            images=images[scored],
            labels=labels[scored],
            train_images=images[trained],
            train_labels=labels[trained],
        )
        content = {
            "kind": "image-classification",
            "description": description,
            "source": {
                "array": f"{name}.npz",
                "train_images": "train_images",
                "train_labels": "train_labels",
            },
        }
        task = ImageTask.model_validate({"name": name, **content})
        (folder / f"{name}.yaml").write_text(as_yaml(task), encoding="utf-8")
        rows[name] = images[trained], labels[trained]
    return (digits[trained], labels[trained]), rows


def new_model() -> Any:
    """Return a transformer that has learned nothing yet."""
    torch.manual_seed(SEED)
    names = {digit: str(digit) for digit in range(10)}
    return ViTForImageClassification(ViTConfig(**SHAPE, id2label=names))


def processor_of(config: Any) -> Any:
    """Return what scales images of a model's size to -1 ... 1."""
    size = {"height": config.image_size, "width": config.image_size}
    return ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5])


def batches(rows: NDArray[Any]) -> int:
    """Return the number of batches that rows make."""
    return -(-len(rows) // BATCH)


def train(
    model: Any,
    images: Images,
    labels: NDArray[np.int64],
    epochs: int,
    rate: float,
    seed: int,
    advance: Callable[[int], None],
) -> None:
    """Train all weights of a model with AdamW; the rate falls to zero along a cosine.

    Args:
        model: The model.
        images: What it sees.
        labels: The digits that they show.
        epochs: How often it sees every row.
        rate: The learning rate at the beginning.
        seed: Of the order of the rows.
        advance: Called with the number of batches done.
    """
    # Scaled as the processor does it.
    pixels = torch.from_numpy(np.ascontiguousarray(images))[:, None] / 127.5 - 1
    answers = torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches(labels))
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(answers), generator=order), BATCH):
            model(pixel_values=pixels[rows], labels=answers[rows]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(1)
    model.eval()


if __name__ == "__main__":
    main(sys.argv[1:])
