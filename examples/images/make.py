"""A small vision transformer for handwritten digits, and full fine-tunes of it for six domains.

The images are scikit-learn's 1,797 real digits of 8 × 8 pixels. A domain changes all of them in one
way: turned, mirrored, inverted, noisy, thickened or partly covered. The same 597 digits are held
out in every domain, so no model has seen a digit that it is asked, in whatever domain. The base
learns from upright digits and from a few of each domain; each fine-tune goes on from there, all of
its weights free, on the training rows of one domain.

    python examples/images/make.py FOLDER
    starmerge study FOLDER/images.yaml -o FOLDER/runs

FOLDER gets the base, the fine-tunes, an array file and a task file for each domain, and the study.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
"""Grey images, (n, 8, 8), the stroke light on dark."""

HELD_OUT = 597
"""Digits to score, the same in every domain."""

SEED = 0
"""Of the split, the domains' chances and the training."""

SHAPE = {"image_size": 8, "patch_size": 2, "num_channels": 1}
LAYERS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
"""Of the transformer: 16 patches, 136,000 weights."""

BATCH = 64
BASE_EPOCHS, BASE_RATE = 40, 2e-3
EPOCHS, RATE = 15, 5e-4
SHARE = 10
"""The base sees one in so many of the training rows of each domain."""


def noisy(images: Images, chance: np.random.Generator) -> Images:
    """Add noise whose standard deviation is a third of the range."""
    return np.clip(images + chance.normal(0, 85, images.shape), 0, 255).astype(np.uint8)


def thick(images: Images, chance: np.random.Generator) -> Images:
    """Give each pixel the lightest value of itself and its neighbours to the right and below."""
    wide = np.maximum(images, np.roll(images, -1, axis=2))
    return np.maximum(wide, np.roll(wide, -1, axis=1))


def covered(images: Images, chance: np.random.Generator) -> Images:
    """Cover a square of 4 × 4 pixels somewhere with grey."""
    found = images.copy()
    for image, (top, left) in zip(found, chance.integers(0, 5, (len(found), 2)), strict=True):
        image[top : top + 4, left : left + 4] = 128
    return found


DOMAINS: dict[str, tuple[str, Callable[[Images, np.random.Generator], Images]]] = {
    "rotated": ("Digits turned left by 90°.", lambda images, _: np.rot90(images, axes=(1, 2))),
    "mirrored": ("Digits as in a mirror.", lambda images, _: images[:, :, ::-1]),
    "inverted": ("Digits dark on light.", lambda images, _: 255 - images),
    "noisy": ("Digits in noise.", noisy),
    "thick": ("Digits with thick strokes.", thick),
    "covered": ("Digits with a square of 4 by 4 pixels covered.", covered),
}
"""By name: a description, and what makes the domain's images of upright ones."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to; must not be there yet")
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, help=f"of each fine-tune (default {EPOCHS})"
    )
    parser.add_argument(
        "--base-epochs", type=int, default=BASE_EPOCHS, help=f"of the base ({BASE_EPOCHS})"
    )
    given = parser.parse_args(arguments)
    if given.folder.exists():
        parser.error(f"{given.folder} is there already. Give another folder, or delete it.")
    make(given.folder, epochs=given.epochs, base_epochs=given.base_epochs)


def make(folder: Path, *, epochs: int = EPOCHS, base_epochs: int = BASE_EPOCHS) -> None:
    """Make the models, the tasks and the study.

    Args:
        folder: Where to; it appears when all is there.
        epochs: Of each fine-tune.
        base_epochs: Of the base, over its upright rows and its share of the domains.
    """
    from transformers import ViTImageProcessorPil

    from starmerge.progress import progress_bar
    from starmerge.storage.publishing import output_folder

    with output_folder(folder) as made:
        upright, domains = write_tasks(made.path)
        few = {name: (x[::SHARE], y[::SHARE]) for name, (x, y) in domains.items()}
        mixed = [np.concatenate(parts) for parts in zip(upright, *few.values(), strict=True)]
        steps = base_epochs * batches(mixed[1])
        steps += sum(epochs * batches(labels) for _, labels in domains.values())
        with progress_bar("training", steps, show=True) as advance:
            base = new_model()
            train(base, mixed[0], mixed[1], base_epochs, BASE_RATE, SEED, advance)
            base.save_pretrained(made.path / "base")
            ViTImageProcessorPil(
                size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]
            ).save_pretrained(made.path / "base")
            for seed, (name, (images, labels)) in enumerate(domains.items(), SEED + 1):
                tuned = copy.deepcopy(base)
                train(tuned, images, labels, epochs, RATE, seed, advance)
                tuned.save_pretrained(made.path / name)
        shutil.copy(Path(__file__).with_name("images.yaml"), made.path)
    print(f"Made {folder}. Next: starmerge study {folder}/images.yaml -o {folder}/runs")


Rows = tuple[Images, NDArray[np.int64]]
"""Images, and the digits that they show."""


def write_tasks(folder: Path) -> tuple[Rows, dict[str, Rows]]:
    """Write the domains' array and task files; return the rows to train on, upright and by domain.

    The rows of a domain are those of the upright digits, in the same order.
    """
    from sklearn.datasets import load_digits

    from starmerge.evaluation.tasks.files import as_yaml
    from starmerge.evaluation.tasks.images import ImageTask

    data = load_digits()
    digits, labels = np.round(data.images * (255 / 16)).astype(np.uint8), data.target
    order = np.random.default_rng(SEED).permutation(len(digits))
    scored, trained = order[:HELD_OUT], order[HELD_OUT:]
    rows = {}
    for number, (name, (description, changed)) in enumerate(DOMAINS.items()):
        images = np.ascontiguousarray(changed(digits, np.random.default_rng([SEED, number])))
        np.savez_compressed(
            folder / f"{name}.npz",
            images=images[scored],
            labels=labels[scored],
            train_images=images[trained],
            train_labels=labels[trained],
        )
        source = {"array": f"{name}.npz", "train_images": "train_images"}
        task = ImageTask.model_validate(
            {
                "kind": "image-classification",
                "name": name,
                "description": description,
                "source": source | {"train_labels": "train_labels"},
            }
        )
        (folder / f"{name}.yaml").write_text(as_yaml(task), encoding="utf-8")
        rows[name] = images[trained], labels[trained]
    return (digits[trained], labels[trained]), rows


def new_model() -> Any:
    """Return a transformer that has learned nothing yet."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(SEED)
    names = {digit: str(digit) for digit in range(10)}
    return ViTForImageClassification(ViTConfig(**SHAPE, **LAYERS, id2label=names))


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
        images: What it sees, (n, 8, 8).
        labels: What it is to say, (n,).
        epochs: How often it sees every row.
        rate: The learning rate at the beginning.
        seed: Of the order of the rows.
        advance: Called after each batch.
    """
    import torch

    pixels = torch.from_numpy(images)[:, None] / 127.5 - 1  # as the processor prepares them
    answers = torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches(labels))
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(answers), generator=order).split(BATCH):
            model(pixel_values=pixels[rows], labels=answers[rows]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(1)
    model.eval()


if __name__ == "__main__":
    # Small matrices: threads would only wait for each other. Must stand before torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:])
