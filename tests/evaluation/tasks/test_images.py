"""Image tasks: small classifiers of scikit-learn's digits, fine-tuned and merged on the spot."""

import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

import starmerge_models
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.models.classification import classify, load_image_model, predicted
from starmerge_models.evaluation.models.loading import AdapterSwitch
from starmerge_models.evaluation.scoring.metrics import score
from starmerge_models.evaluation.tasks.images import ImageTask
from starmerge_models.evaluation.tasks.task import Example
from tests.conftest import edit_json

TASKS = ("plain", "inverted")
KINDS = ("vit", "resnet")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def _ignore(_: int) -> None:
    pass


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 1,797 images (8, 8), uint8, and what they show."""
    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8), data.target


def _new_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "vit":
        size = {"hidden_size": 32, "intermediate_size": 64, "image_size": 8, "patch_size": 4}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
        return ViTForImageClassification(ViTConfig(num_channels=1, num_labels=10, **size, **layers))
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=10, **sizes))


def _trained(
    model: Any, pixels: torch.Tensor, labels: torch.Tensor, steps: int, rate: float
) -> Any:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(pixels), (64,), generator=generator)
        optimizer.zero_grad()
        model(pixel_values=pixels[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageTask]:
    """Return two tasks: digits as they are, and white on black."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = _digits()
    made = {}
    for name, pixels in zip(TASKS, (images, 255 - images), strict=True):
        np.savez(folder / f"{name}.npz", images=pixels, labels=labels)
        source = {"array": folder / f"{name}.npz", "held_out": 0.2}
        made[name] = ImageTask(name=name, source=source)
    return made


@pytest.fixture(scope="module")
def models(
    tasks: dict[str, ImageTask], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Path]]:
    """Return, by kind, the folders of a base that knows a little of both tasks, and fine-tunes.

    The ViT is without a preprocessor_config.json, the ResNet has one.
    """
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for kind, (steps, rate), (more, less) in (
        ("vit", (120, 4e-3), (60, 1e-3)),
        ("resnet", (20, 3e-3), (20, 1e-3)),
    ):
        own = {name: root / kind / name for name in ("base", *TASKS)}
        base = _new_model(kind)
        base.save_pretrained(own["base"])
        if kind == "resnet":
            ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(own["base"])
        processor = load_image_model(own["base"])[1]
        pixels, labels = {}, {}
        for name, task in tasks.items():
            rows = task.examples("train")
            mode = "L" if kind == "vit" else "RGB"
            images = [Image.fromarray(row.fields["image"]).convert(mode) for row in rows]
            pixels[name] = processor(images, return_tensors="pt")["pixel_values"]
            labels[name] = torch.tensor([int(row.label) for row in rows])
        everything = [torch.cat([part[name] for name in TASKS]) for part in (pixels, labels)]
        _trained(base, *everything, steps, rate).save_pretrained(own["base"])
        for name in TASKS:
            tuned = _trained(copy.deepcopy(base), pixels[name], labels[name], more, less)
            tuned.save_pretrained(own[name])
        folders[kind] = own
    return folders


@pytest.fixture(scope="module")
def vit(models: dict[str, dict[str, Path]]) -> tuple[Any, Any]:
    """Return the ViT fine-tuned on plain digits, loaded, and its processor."""
    return load_image_model(models["vit"]["plain"])


def _few(number: int = 40) -> tuple[np.ndarray, np.ndarray]:
    images, labels = _digits()
    return images[:number], labels[:number]


def _arrays(folder: Path, name: str = "rows", **arrays: Any) -> Path:
    np.savez(folder / f"{name}.npz", **arrays)
    return folder / f"{name}.npz"


def _png_folder(folder: Path, images: np.ndarray, labels: Any) -> Path:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{number:04}.png")
    return folder


def yield_digits(_: random.Random) -> Iterator[tuple[np.ndarray, int]]:
    yield from zip(*_few(200), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tunes_beat_the_base_at_their_task_and_merges_at_both(
    kind: str,
    tasks: dict[str, ImageTask],
    models: dict[str, dict[str, Path]],
    tmp_path: Path,
) -> None:
    own = models[kind]

    def accuracy(folder: Path) -> dict[str, float]:
        model, processor = load_image_model(folder, processor_of=own["base"])
        return {
            name: score(
                classify(model, processor, task, task.examples("test"), advance=_ignore),
                task.metric,
            ).value
            for name, task in tasks.items()
        }

    base = accuracy(own["base"])
    tuned = {name: accuracy(own[name])[name] for name in TASKS}
    assert all(0.3 < base[name] < tuned[name] - 0.08 for name in TASKS)
    for method in (starmerge_models.Average(), starmerge_models.Star(eta=80)):
        merged = tmp_path / method.name
        starmerge_models.merge(own["base"], [own[name] for name in TASKS], method, output=merged)
        scores = accuracy(merged)
        assert all(base[name] + 0.02 < scores[name] < tuned[name] for name in TASKS)


def test_a_merge_averages_batch_norm_statistics_and_leaves_counters_alone(
    models: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    own = models["resnet"]
    starmerge_models.merge(
        own["base"], [own[n] for n in TASKS], "average", output=tmp_path / "merged"
    )
    base, *tuned = (load_file(own[n] / "model.safetensors") for n in ("base", *TASKS))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == base.keys()
    kinds = Counter(name.rpartition(".")[2] for name in base)
    assert kinds["running_mean"] == kinds["running_var"] == kinds["num_batches_tracked"] > 2
    for name, tensor in merged.items():
        assert tensor.dtype == base[name].dtype
        if name.endswith("num_batches_tracked"):
            assert tensor == base[name] != tuned[0][name]
        elif "running" in name:
            mean = (tuned[0][name].double() + tuned[1][name].double()) / 2
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


def test_adapters_of_a_vit_are_switched_and_merged(
    models: dict[str, dict[str, Path]],
    tasks: dict[str, ImageTask],
    tmp_path: Path,
) -> None:
    base = models["vit"]["base"]
    rows = tasks["plain"].examples("test", 60)
    for seed, name in enumerate(TASKS):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=["classifier"],
            init_lora_weights=False,
        )
        adapted = get_peft_model(load_image_model(base)[0], config)
        with torch.no_grad():
            adapted.base_model.model.classifier.modules_to_save["default"].bias[seed] += 1
        adapted.save_pretrained(tmp_path / name)
        starmerge_models.merge(
            base, [tmp_path / name], "average", output=tmp_path / f"{name}-merged"
        )
    model, processor = load_image_model(base)
    switch = AdapterSwitch(model, {name: tmp_path / name for name in TASKS})
    answers = {}
    for name in (None, *TASKS):
        with switch.active(name) as active:
            answers[name] = classify(active, processor, tasks["plain"], rows, advance=_ignore)
    folders = [base, *(tmp_path / f"{name}-merged" for name in TASKS)]
    for name, folder in zip((None, *TASKS), folders, strict=True):
        whole = load_image_model(folder)
        assert classify(*whole, tasks["plain"], rows, advance=_ignore) == answers[name]
    assert len({tuple(answer.value for answer in own) for own in answers.values()}) == 3


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is an adapter. The base must be a whole model"):
        load_image_model(tmp_path)


def test_files_arrays_and_generators_give_the_same_predictions(
    vit: tuple[Any, Any], tmp_path: Path
) -> None:
    images, labels = _few()
    names = np.array(WORDS)[labels]
    words = {"labels": {word: word for word in WORDS}}
    sources = {
        "pngs": {"folder": _png_folder(tmp_path / "pngs", images, names)},
        "split": {"folder": _png_folder(tmp_path / "split" / "test", images, names).parent},
        "bytes": {"array": _arrays(tmp_path, "bytes", images=images, labels=names)},
        "floats": {"array": _arrays(tmp_path, "floats", images=images / 255, labels=names)},
        "column": {
            "array": _arrays(tmp_path, "column", x=images[..., None], y=names[:, None]),
            "images": "x",
            "labels": "y",
        },
        "colour": {
            "array": _arrays(
                tmp_path, "colour", images=np.stack([images] * 3, axis=-1), labels=names
            )
        },
    }
    found = {}
    for name, source in sources.items():
        task = ImageTask(name=name, source=source, **words)
        rows = task.examples("test")
        answers = classify(*vit, task, rows, advance=_ignore)
        assert [answer.gold for answer in answers] == [row.label for row in rows]
        # Files stand in the order of their classes, arrays in their own: the number tells.
        found[name] = {int(a.id.split("/")[-1].removesuffix(".png")): a.value for a in answers}
    assert len(found["pngs"]) == len(images)
    assert all(values == found["pngs"] for values in found.values())

    task = ImageTask(name="made", source={"generator": yield_digits}, metric="accuracy")
    made = classify(*vit, task, task.examples("test"), advance=_ignore)
    same = [answer for answer in made if int(answer.id) in found["pngs"]]
    assert same
    assert all(WORDS[int(answer.value)] == found["pngs"][int(answer.id)] for answer in same)


def test_predictions_depend_neither_on_the_batch_nor_on_the_order(
    models: dict[str, dict[str, Path]], tasks: dict[str, ImageTask]
) -> None:
    for kind in KINDS:
        loaded = load_image_model(models[kind]["inverted"])
        rows = tasks["inverted"].examples("test", 50)
        steps: list[int] = []
        together = classify(*loaded, tasks["inverted"], rows, advance=steps.append)
        assert steps == [32, 18]
        turned = classify(*loaded, tasks["inverted"], rows[::-1], batch_size=7, advance=_ignore)
        assert together == turned[::-1]
        alone = [classify(*loaded, tasks["inverted"], [row], advance=_ignore)[0] for row in rows]
        assert together == alone


def test_images_of_many_sizes_go_through_a_net_that_takes_all(
    models: dict[str, dict[str, Path]], tasks: dict[str, ImageTask], tmp_path: Path
) -> None:
    folder = shutil.copytree(models["resnet"]["plain"], tmp_path / "without")
    loaded = load_image_model(folder)  # no image_size in its config: nothing is resized
    rows = [
        Example(row.id, {"image": np.kron(row.fields["image"], np.ones((k, k), np.uint8))}, "1")
        for row, k in zip(tasks["plain"].examples("test", 12), [2, 2, 3, 4] * 3, strict=True)
    ]
    together = classify(*loaded, tasks["plain"], rows, advance=_ignore)
    assert together == [
        classify(*loaded, tasks["plain"], [row], advance=_ignore)[0] for row in rows
    ]


def test_images_are_prepared_as_the_folder_says(
    models: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    plain = load_image_model(models["vit"]["base"])[1]
    values = plain(Image.fromarray(grey), return_tensors="pt")["pixel_values"].numpy()
    np.testing.assert_allclose(values, (grey[None, None] / 255 - 0.5) / 0.5, atol=1e-6)

    folder = shutil.copytree(models["vit"]["base"], tmp_path / "own")
    own = ViTImageProcessorPil(do_resize=False, image_mean=[0.25], image_std=[2.0])
    own.save_pretrained(folder)
    for given in (None, models["vit"]["base"]):
        processor = load_image_model(folder, processor_of=given)[1]
        values = processor(Image.fromarray(grey), return_tensors="pt")["pixel_values"].numpy()
        np.testing.assert_allclose(values, (grey[None, None] / 255 - 0.25) / 2, atol=1e-6)
    borrowed = load_image_model(models["vit"]["base"], processor_of=folder)[1]
    assert borrowed.to_dict() == load_image_model(folder)[1].to_dict()


def test_a_merge_prepares_images_as_its_base_does(
    models: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    own = models["resnet"]
    base = shutil.copytree(own["base"], tmp_path / "base")
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(base)
    starmerge_models.merge(base, [own["plain"]], "average", output=tmp_path / "merged")
    processor = load_image_model(tmp_path / "merged")[1]
    assert processor.size["height"] == 24


def test_an_image_that_does_not_fit_the_model_is_explained(
    models: dict[str, dict[str, Path]], tasks: dict[str, ImageTask], tmp_path: Path
) -> None:
    folder = shutil.copytree(models["vit"]["base"], tmp_path / "wrong")
    own = ViTImageProcessorPil(size={"height": 9, "width": 9}, image_mean=[0.5], image_std=[0.5])
    own.save_pretrained(folder)
    with pytest.raises(UsageError, match=r"wrong and its preprocessor_config.json do not fit.*9"):
        rows = tasks["plain"].examples("test", 2)
        classify(*load_image_model(folder), tasks["plain"], rows, advance=_ignore)


def test_dtype_and_device_are_those_asked_for(
    models: dict[str, dict[str, Path]], tasks: dict[str, ImageTask]
) -> None:
    rows = tasks["plain"].examples("test", 40)
    loaded = load_image_model(models["vit"]["plain"], device="cpu", dtype="bfloat16")
    assert loaded[0].dtype == torch.bfloat16
    narrow = classify(*loaded, tasks["plain"], rows, advance=_ignore)
    wide = classify(
        *load_image_model(models["vit"]["plain"]), tasks["plain"], rows, advance=_ignore
    )
    assert sum(a.value == b.value for a, b in zip(narrow, wide, strict=True)) > 35


def _renamed(vit: tuple[Any, Any], names: list[str]) -> tuple[Any, Any]:
    model = copy.deepcopy(vit[0])
    model.config.id2label = dict(enumerate(names))
    return model, vit[1]


def test_classes_are_found_by_name_by_number_or_in_order(
    vit: tuple[Any, Any], tmp_path: Path
) -> None:
    images, labels = _few()
    numbers = {"array": _arrays(tmp_path, "numbers", images=images, labels=labels)}
    texts = {"array": _arrays(tmp_path, "texts", images=images, labels=np.array(WORDS)[labels])}
    shuffled = dict(
        random.Random(0).sample([(str(k), (w, f"the {w}")) for k, w in enumerate(WORDS)], 10)
    )
    backwards = {str(k): WORDS[k] for k in range(9, -1, -1)}

    def values(loaded: tuple[Any, Any], **task: Any) -> list[str]:
        made = ImageTask(name="t", **task)
        return [a.value for a in classify(*loaded, made, made.examples("test"), advance=_ignore)]

    unnamed = _renamed(vit, [f"LABEL_{k}" for k in range(10)])
    truth = values(unnamed, source=numbers)
    assert set(truth) <= set(map(str, range(10)))
    named = _renamed(vit, WORDS)
    assert values(named, source=numbers) == truth
    spelt = [WORDS[int(value)] for value in truth]
    assert values(named, source=texts) == spelt
    assert values(named, source=numbers, labels=shuffled) == spelt
    assert values(_renamed(vit, [f"the {w}" for w in WORDS]), source=numbers, labels=shuffled) == (
        spelt
    )
    in_order = dict(zip(map(str, range(10)), WORDS, strict=True))
    assert values(unnamed, source=numbers, labels=in_order) == spelt
    # Without names the order is all there is: it is that of the outputs.
    assert values(unnamed, source=numbers, labels=backwards) == [
        WORDS[9 - int(value)] for value in truth
    ]
    assert values(named, source=numbers, labels=backwards) == spelt


def test_only_the_classes_of_the_task_are_answers(vit: tuple[Any, Any], tmp_path: Path) -> None:
    images, labels = _few(200)
    low = labels < 3
    file = _arrays(tmp_path, images=images[low], labels=labels[low])
    named = _renamed(vit, WORDS)
    task = ImageTask(
        name="low", source={"array": file}, labels={str(k): WORDS[k] for k in (2, 0, 1)}
    )
    everything = ImageTask(name="all", source={"array": file})
    rows = task.examples("test")
    few = classify(*named, task, rows, advance=_ignore)
    assert {answer.value for answer in few} <= {"zero", "one", "two"}
    free = classify(*named, everything, everything.examples("test"), advance=_ignore)
    assert {answer.value for answer in free} - {"0", "1", "2"}
    assert score(few, "accuracy").value > score(free, "accuracy").value
    assert rows[0].choices == ("two", "zero", "one")


@pytest.mark.parametrize(
    ("names", "labels", "lacking"),
    [
        ([*WORDS[:9], "ten"], {str(k): WORDS[k] for k in range(10)}, "nine"),
        (WORDS, {"0": "zero", "1": "eins"}, "eins"),
        (["zero", "zero", *WORDS[2:]], {"0": "zero", "2": "two"}, "zero"),
        ([f"LABEL_{k}" for k in range(10)], {"0": "zero", "1": "one"}, "zero"),
    ],
)
def test_a_class_that_the_model_lacks_is_named(
    vit: tuple[Any, Any], names: list[str], labels: dict[str, str], lacking: str, tmp_path: Path
) -> None:
    images, _ = _few(2)
    file = _arrays(tmp_path, images=images, labels=list(labels)[:2])
    task = ImageTask(name="t", source={"array": file}, labels=labels)
    with pytest.raises(
        UsageError, match=f"Task t: .*plain has no class.* called '{lacking}'. Its classes: '"
    ):
        classify(*_renamed(vit, names), task, task.examples("test"), advance=_ignore)


def test_names_are_not_mixed_with_numbers(vit: tuple[Any, Any], tmp_path: Path) -> None:
    images, _ = _few(2)
    task = ImageTask(
        name="t", source={"array": _arrays(tmp_path, images=images, labels=["zero", "1"])}
    )
    with pytest.raises(UsageError, match="called '1'"):
        classify(*_renamed(vit, WORDS), task, task.examples("test"), advance=_ignore)


def test_a_prediction_can_be_made_again_of_its_response(
    vit: tuple[Any, Any], tasks: dict[str, ImageTask]
) -> None:
    rows = tasks["plain"].examples("test", 30)
    answers = classify(*vit, tasks["plain"], rows, advance=_ignore)
    assert answers == [predicted(r, a.response) for r, a in zip(rows, answers, strict=True)]
    assert {answer.credit for answer in answers} == {0.0, 1.0}
    assert all((a.credit == 1) == (a.value == a.gold) for a in answers)


def test_nan_is_refused_and_its_cause_named(
    models: dict[str, dict[str, Path]], tasks: dict[str, ImageTask], tmp_path: Path
) -> None:
    rows = tasks["plain"].examples("test", 3)
    own = models["resnet"]
    starmerge_models.merge(
        own["base"],
        [own[name] for name in TASKS],
        starmerge_models.TaskArithmetic(alpha=4),
        output=tmp_path / "far",
    )
    with pytest.raises(
        StarmergeError, match=r"far gives NaN .*\.running_var has negative variances"
    ):
        classify(*load_image_model(tmp_path / "far"), tasks["plain"], rows, advance=_ignore)
    folder = shutil.copytree(models["vit"]["base"], tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StarmergeError, match=rf"broken gives NaN .* {rows[0].id}\. Its weights"):
        classify(*load_image_model(folder), tasks["plain"], rows, advance=_ignore)


def test_a_folder_that_is_no_image_classifier_is_refused(
    tiny_base: Path, models: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"is not an image classifier: .*LlamaConfig"):
        load_image_model(tiny_base)
    with pytest.raises(UsageError, match="is not an image classifier"):
        load_image_model(tmp_path)
    folder = shutil.copytree(models["vit"]["base"], tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UsageError, match="cut is not an image classifier"):
        load_image_model(folder)
    config = json.loads((models["vit"]["base"] / "config.json").read_text())
    ViTModel(ViTConfig(**config)).save_pretrained(tmp_path / "headless")
    with pytest.raises(UsageError, match=r"headless lacks 'classifier.bias', 'classifier.weight'"):
        load_image_model(tmp_path / "headless")


def test_an_unknown_processor_is_refused(
    models: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    folder = shutil.copytree(models["vit"]["base"], tmp_path / "own")
    ViTImageProcessorPil().save_pretrained(folder)
    edit_json(folder / "preprocessor_config.json", image_processor_type="NoSuchProcessor")
    edit_json(folder / "config.json", model_type="vit")
    with pytest.raises(UsageError, match="own is not an image classifier"):
        load_image_model(folder)


def test_held_out_rows_are_told_by_the_image_alone(tmp_path: Path) -> None:
    images, labels = _few(300)

    def parts(images: np.ndarray, labels: np.ndarray) -> list[set[bytes]]:
        file = _arrays(tmp_path, images=images, labels=labels)
        task = ImageTask(name="t", source={"array": file, "held_out": 0.3})
        return [
            {row.fields["image"].tobytes() for row in task.examples(split)}
            for split in ("train", "test")
        ]

    train, test = parts(images, labels)
    assert not train & test
    assert train | test == {image.tobytes() for image in images}
    assert 0.2 < len(test) / 300 < 0.4
    half_train, half_test = parts(images[::-2], labels[::-2])
    assert half_train < train
    assert half_test < test
    twice = [np.concatenate([part, part]) for part in (images, labels)]
    assert parts(*twice) == [train, test]
    file = _arrays(tmp_path, images=twice[0], labels=twice[1])
    task = ImageTask(name="t", source={"array": file, "held_out": 0.3})
    assert len(task.examples("test")) == len(test)


def test_given_splits_are_kept(tmp_path: Path) -> None:
    images, labels = _few(30)
    file = _arrays(
        tmp_path, images=images[:10], labels=labels[:10], more=images[10:], its=labels[10:]
    )
    source = {"array": file, "train_images": "more", "train_labels": "its"}
    task = ImageTask(name="t", source=source)
    assert {row.id for row in task.examples("test")} == {f"images/{k}" for k in range(10)}
    assert {row.id for row in task.examples("train")} == {f"more/{k}" for k in range(20)}

    root = tmp_path / "files"
    _png_folder(root / "test", images[:10], labels[:10])
    _png_folder(root / "train", images[10:], labels[10:])
    task = ImageTask(name="t", source={"folder": root})
    test, train = task.examples("test"), task.examples("train")
    assert (len(test), len(train)) == (10, 20)
    assert {row.id for row in test} == {f"test/{y}/{k:04}.png" for k, y in enumerate(labels[:10])}
    assert all(row.fields["image"] == root / row.id for row in train)
    with pytest.raises(UsageError, match="is split into train and test. Leave held_out out"):
        ImageTask(name="t", source={"folder": root, "held_out": 0.5}).examples("test")


def test_samples_are_those_of_other_tasks(tasks: dict[str, ImageTask]) -> None:
    plain = tasks["plain"]
    ids = [row.id for row in plain.examples("test")]
    assert [row.id for row in plain.examples("test", 7)] == ids[:7]
    assert ids != sorted(ids, key=lambda place: int(place.split("/")[1]))
    balanced = ImageTask(
        **plain.model_dump(exclude={"sample"}), sample={"kind": "balanced", "n": 5}
    )
    assert Counter(row.label for row in balanced.examples("test")) == {str(k): 5 for k in range(10)}
    assert len(balanced.examples("train")) == len(plain.examples("train"))


def test_a_fingerprint_is_of_what_is_asked(tmp_path: Path) -> None:
    images, labels = _few(10)
    prints = []
    for name, change in (("a", 0), ("b", 0), ("c", 1)):
        changed = images.copy()
        changed[3, 4, 4] ^= change
        folder = _png_folder(tmp_path / name, changed, labels)
        task = ImageTask(name=name, description=name, source={"folder": folder})
        prints.append(task.fingerprint(task.examples("test")))
    assert prints[0] == prints[1] != prints[2]
    task = ImageTask(name="a", source={"array": _arrays(tmp_path, images=images, labels=labels)})
    labelled = task.model_copy(update={"labels": {str(k): (WORDS[k],) for k in range(10)}})
    rows = task.examples("test")
    assert (
        len({task.fingerprint(rows), task.fingerprint(rows[1:]), labelled.fingerprint(rows)}) == 3
    )


def test_a_label_that_the_task_does_not_know_is_named(tmp_path: Path) -> None:
    images, labels = _few(10)
    folder = _png_folder(tmp_path / "files", images, labels)
    task = ImageTask(name="t", source={"folder": folder}, labels={"0": "zero", "1": "one"})
    with pytest.raises(UsageError, match=r"Task t, image 2/0002.png: the label '2' is not one of"):
        task.examples("test")


def test_a_photo_is_turned_the_way_its_file_says(
    vit: tuple[Any, Any], tasks: dict[str, ImageTask], tmp_path: Path
) -> None:
    images, _ = _few(30)
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright: to be shown turned by 90° clockwise
    for number, image in enumerate(images):
        side = Image.fromarray(np.rot90(image).copy())
        side.save(tmp_path / f"{number}.webp", lossless=True, exif=turned)
    straight = [Example(str(k), {"image": image}, "0") for k, image in enumerate(images)]
    files = [Example(str(k), {"image": tmp_path / f"{k}.webp"}, "0") for k in range(30)]
    answers = [classify(*vit, tasks["plain"], rows, advance=_ignore) for rows in (straight, files)]
    assert answers[0] == answers[1]


def test_broken_images_are_named(vit: tuple[Any, Any], tmp_path: Path) -> None:
    images, labels = _few(5)
    folder = _png_folder(tmp_path / "files", images, labels)
    task = ImageTask(name="t", source={"folder": folder})
    broken = folder / "3" / "0003.png"
    for content in (broken.read_bytes()[:60], b"no image", b""):
        broken.write_bytes(content)
        with pytest.raises(StarmergeError, match=r"3/0003.png is not a readable image"):
            classify(*vit, task, task.examples("test"), advance=_ignore)
    Image.fromarray(images[3].astype(np.uint16) * 257).save(broken)
    with pytest.raises(StarmergeError, match=r"3/0003.png has more than 8 bits a channel"):
        classify(*vit, task, task.examples("test"), advance=_ignore)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    task = ImageTask(name="t", source={"folder": tmp_path})
    with pytest.raises(UsageError, match="has no sub-folders"):
        task.examples("test")
    _png_folder(tmp_path, *_few(3))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("none yet")
    with pytest.raises(UsageError, match=r"cat has no images \(.png, .jpg"):
        task.examples("test")
    with pytest.raises(UsageError, match="missing does not exist"):
        ImageTask(name="t", source={"folder": tmp_path / "missing"}).examples("test")
    shutil.rmtree(tmp_path / "cat")
    with pytest.raises(UsageError, match="names no images to train on .held_out in its source"):
        task.examples("train")
    one = ImageTask(name="t", source={"folder": tmp_path, "held_out": 1e-9})
    with pytest.raises(UsageError, match="Task t has no images for testing"):
        one.examples("test")


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"images": np.zeros((4, 8), np.uint8)}, r"have the shape \(4, 8\)"),
        ({"images": np.zeros((5, 8, 8), np.uint8)}, r"\(5, 8, 8\). For 4 labels"),
        ({"images": np.zeros((4, 3, 8, 8), np.uint8)}, r"image 0 has the shape \(3, 8, 8\)"),
        ({"images": np.zeros((4, 0, 8), np.uint8)}, r"image 0 has the shape \(0, 8\)"),
        ({"images": np.zeros((4, 8, 8), np.int64)}, "image 0 is int64. Give uint8, or floats"),
        ({"images": np.full((4, 8, 8), 255.0)}, "from 255 to 255. Scale floats to 0 ... 1"),
        ({"images": np.full((4, 8, 8), np.nan)}, "values from nan to nan"),
        ({"labels": np.zeros(4)}, r"the labels \(labels\) are float64 of shape \(4,\)"),
        ({"labels": np.zeros((4, 2), int)}, r"int64 of shape \(4, 2\)"),
        ({"labels": np.array(["a", 1, 2, 3], object)}, "is not a readable .npz file"),
    ],
)
def test_arrays_that_are_no_images_are_refused(
    arrays: dict[str, np.ndarray], problem: str, tmp_path: Path
) -> None:
    right = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4)}
    task = ImageTask(name="t", source={"array": _arrays(tmp_path, **(right | arrays))})
    with pytest.raises(StarmergeError, match=f"rows.npz.*{problem}"):
        task.examples("test")


def test_array_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    file = _arrays(tmp_path, images=np.zeros((2, 8, 8)), labels=[0, 1])
    task = ImageTask(name="t", source={"array": file, "labels": "answers"})
    with pytest.raises(UsageError, match="no array 'answers'. It has: images, labels"):
        task.examples("test")
    with pytest.raises(UsageError, match="names no images to train on"):
        ImageTask(name="t", source={"array": file}).examples("train")
    for content in (file.read_bytes()[:-20], b"none", b""):
        file.write_bytes(content)
        with pytest.raises(StarmergeError, match=r"rows.npz is not a readable .npz file"):
            task.examples("test")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(StarmergeError, match=r"one.npy is not a readable .npz file"):
        ImageTask(name="t", source={"array": tmp_path / "one.npy"}).examples("test")
    file.unlink()
    with pytest.raises(UsageError, match=r"rows.npz does not exist"):
        task.examples("test")


def test_generators_yield_pairs(tmp_path: Path) -> None:
    def dictionaries(_: random.Random) -> Iterator[dict[str, Any]]:
        yield {"image": 1}

    task = ImageTask(name="t", source={"generator": dictionaries})
    with pytest.raises(UsageError, match="image 0 is no pair of an array and a label"):
        task.examples("test")
    with pytest.raises(UsageError, match="'nowhere:digits' cannot be imported"):
        ImageTask(name="t", source={"generator": "nowhere:digits"}).examples("test")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": "Which?"}, "prompt\n.*Extra inputs"),
        ({"source": {"array": "a.npz", "key": "b"}}, "key\n.*Extra inputs"),
        ({"source": {"array": "a.npz", "train_images": "b"}}, "give both train_images and"),
        ({"metric": "spearman"}, "metric 'spearman' is of numbers"),
        ({"metric": "f1"}, "metric 'f1' needs labels"),
        ({"labels": {"0": "zero"}}, "there must be two at least"),
        ({"labels": {"0": "zero", "1": "zero"}}, "'zero' stands for both '0' and '1'"),
        ({"kind": "text"}, "image-classification"),
    ],
)
def test_a_task_that_does_not_fit_together_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ImageTask(**({"name": "t", "source": {"array": "a.npz"}} | change))


def test_paths_begin_beside_the_task_file(tmp_path: Path) -> None:
    _arrays(tmp_path, images=_few(4)[0], labels=_few(4)[1])
    _png_folder(tmp_path / "files", *_few(4))
    for source in ({"array": "rows.npz"}, {"folder": "files"}):
        task = ImageTask(name="t", source=source).beside(tmp_path)
        assert len(task.examples("test")) == 4
    made = ImageTask(name="t", source={"generator": yield_digits})
    assert made.beside(tmp_path) == made


def test_macro_f1_is_taken_over_the_classes(vit: tuple[Any, Any], tmp_path: Path) -> None:
    from sklearn.metrics import f1_score

    images, labels = _few(200)
    task = ImageTask(
        name="t",
        source={"array": _arrays(tmp_path, images=images, labels=labels)},
        labels={str(k): f"LABEL_{k}" for k in range(10)},
        metric="f1",
    )
    answers = classify(*vit, task, task.examples("test"), advance=_ignore)
    value = score(answers, task.metric, [words[0] for words in task.words]).value
    expected = f1_score([a.gold for a in answers], [a.value for a in answers], average="macro")
    assert value == pytest.approx(expected, abs=1e-12)
    assert 0.3 < value < 1
