"""The study of images: the example's models, made small, merged and asked to the end."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import starmerge_models
from starmerge_models.cli import app
from starmerge_models.evaluation.runner import evaluate
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.study.averages import Averages
from starmerge_models.study.store import Record, load_store
from starmerge_models.study.study_file import load_study
from tests.oracles import star as oracle

EXAMPLE = Path(__file__).parents[2] / "examples" / "images"
ROWS = 40

pytestmark = pytest.mark.usefixtures("small_fonts")


def _imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the example makes in little time."""
    folder = tmp_path_factory.mktemp("images") / "made"
    example = _imported(EXAMPLE / "make.py")
    example.RATE = example.BASE_RATE  # in few steps, fine-tunes get far enough at a higher rate
    example.SHAPE["num_hidden_layers"] = 2
    example.BATCH = 64
    moved = example.moved
    example.moved = lambda images: moved(images)[:1]
    example.main([str(folder), "--epochs", "1"])
    return folder


@pytest.fixture
def studied(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the example's study with the command, perhaps changed; return the folder of its runs."""

    def study(**changes: object) -> Path:
        content = yaml.safe_load((folder / "images.yaml").read_text()) | changes
        file = folder / f"{tmp_path.name}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        runs = tmp_path / "runs"
        arguments = ["study", file, "-o", runs, "--rows", ROWS, "--no-cache"]
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return runs

    return study


def test_the_study_runs_and_asks_what_an_evaluation_of_files_asks(
    folder: Path, studied: Callable[..., Path], tmp_path: Path
) -> None:
    store = load_store(studied(numbers=["all"]))
    domains = _imported(EXAMPLE / "make.py").DOMAINS
    assert not store.failures
    merges = {r.run.label: r for r in store.records if len(r.run.models) == len(domains)}
    assert merges.keys() == set(Averages(store).labels)
    assert {"average", "star", "star:eta=60", "ties", "tsv_m", "shares", "auto"} < merges.keys()
    assert len(store.records) == 1 + len(domains) + len(merges)
    # Fine-tunes are better than the base on their own domains.
    base, *tuned = store.records[: 1 + len(domains)]
    gains = []
    for record, name in zip(tuned, domains, strict=True):
        assert record.run.models == (name,)
        own = np.array(record.by_task[name]["seen"]) - np.array(base.by_task[name]["seen"])
        gains.append(own)
    assert sum(own.mean() > 0 for own in gains) >= 4
    gain = np.concatenate(gains)
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
    # transformers renames a ViT's tensors when it loads them; merged files answer alike.
    models = [folder / name for name in domains]
    files = {method: tmp_path / method for method in ("average", "shares")}
    for method, output in files.items():
        starmerge_models.merge(folder / "base", models, method, output=output)
    tasks = [find_task(str(folder / f"{name}.yaml")) for name in domains]
    settings = load_study(folder / "images.yaml").model_copy(update={"rows": ROWS}).settings()
    scores = evaluate(folder / "base", files, tasks, settings).scores
    for method in files:
        for name in domains:
            credits_ = [prediction.credit for prediction in scores[method][name].predictions]
            assert credits_ == _seen(merges[method], name)


def test_the_average_of_copies_answers_as_the_one(studied: Callable[..., Path]) -> None:
    copies = {"one": "rotated", "two": "rotated", "other": "inverted"}
    tasks = {"other": "inverted"}
    pool = {
        name: {"path": path, "task": tasks.get(name, "rotated")} for name, path in copies.items()
    }
    store = load_store(
        studied(models=pool, methods=["average"], numbers=[2], combinations=3, figures=[])
    )
    records = {record.run.models: record for record in store.records}
    assert _seen(records["one", "two"], "rotated") == _seen(records["one",], "rotated")
    assert _seen(records["one", "other"], "rotated") == _seen(records["two", "other"], "rotated")
    assert _seen(records["one", "other"], "rotated") != _seen(records["one",], "rotated")


def test_a_convolution_is_merged_as_a_matrix_and_biases_are_averaged(folder: Path) -> None:
    names = ("rotated", "inverted", "noisy")
    kernel, bias = (
        f"vit.embeddings.patch_embeddings.projection.{part}" for part in ("weight", "bias")
    )
    base, *tuned = (load_file(folder / name / "model.safetensors") for name in ("base", *names))
    assert base[kernel].ndim == 4
    vectors = starmerge_models.load_task_vectors(folder / "base", [folder / name for name in names])
    update = vectors.merge(starmerge_models.Star(eta=60))
    for name in (kernel, bias):
        weight = base[name].double().numpy()
        deltas = [(own[name].double().numpy() - weight).reshape(len(weight), -1) for own in tuned]
        expected = oracle.star(deltas, eta=60) if name == kernel else np.mean(deltas, axis=0)
        found = update[name].to_dense().double().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def _seen(record: Record, task: str) -> list[float]:
    return list(record.by_task[task]["seen"])
