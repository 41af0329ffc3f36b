"""Models that are read once and merged in memory, as a merge of their files would."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import starmerge_models as sm
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.mergekit.method import Mergekit
from starmerge_models.merging.fold import fold
from starmerge_models.methods import METHODS, make_pipeline
from starmerge_models.spectral import svd
from tests.conftest import MakeAdapter, MakeFinetune, MakeMetric, edit_json

_METHODS = sorted(METHODS.keys() - {"emr", "mergekit"})
_CHAINS = ["star+ties", "dare+ties", "denoise+tsv_m", "star+task_arithmetic+svc"]
_TASKS = {"slerp": ["full"], "nuslerp": ["full", "one"]}
"""The models that are merged, where a method does not take any number of them."""


@pytest.fixture
def models(make_adapter: MakeAdapter, make_finetune: MakeFinetune) -> dict[str, Path]:
    """Return two adapters of different ranks and targets, and a full fine-tune."""
    return {
        "one": make_adapter("one", seed=1),
        "two": make_adapter("two", seed=2, r=2, target_modules=["v_proj", "down_proj"]),
        "full": make_finetune("full", seed=3),
    }


def _folded(base: Path, update: dict[str, sm.Delta]) -> dict[str, torch.Tensor]:
    weights = load_file(base / "model.safetensors")
    return {
        name: fold(weight, update[name], weight.dtype).weight if name in update else weight
        for name, weight in weights.items()
    }


def _assert_same(found: dict[str, torch.Tensor], folder: Path) -> None:
    written = load_file(folder / "model.safetensors")
    assert found.keys() == written.keys()
    for name, weight in written.items():
        assert torch.equal(found[name], weight), (folder.name, name)


def test_every_method_gives_the_bytes_of_a_merge_of_files(
    tiny_base: Path, models: dict[str, Path], make_metric: MakeMetric, tmp_path: Path
) -> None:
    vectors = sm.load_task_vectors(tiny_base, models)
    file = make_metric(tasks=list(models))
    for name in (*_METHODS, *_CHAINS):
        tasks = _TASKS.get(name, list(models))
        chosen = {task: models[task] for task in tasks}
        metric = file if make_pipeline(name).needs_moments else None
        result = sm.merge(tiny_base, chosen, name, output=tmp_path / name, metric=metric)
        found = vectors.merge(name, models=tasks, metric=metric)
        _assert_same(_folded(tiny_base, found), result.path)


@pytest.mark.parametrize("name", ["linear", "ties", "star", "tsv_m"])
def test_some_of_the_models_merge_as_if_the_others_were_not_there(
    name: str, tiny_base: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    vectors = sm.load_task_vectors(tiny_base, models)
    chosen = {key: models[key] for key in ("full", "one")}
    found = vectors.merge(name, models=list(chosen), weights=[0.5, 2.0])
    result = sm.merge(tiny_base, chosen, name, output=tmp_path / "out", weights=[0.5, 2.0])
    _assert_same(_folded(tiny_base, found), result.path)


def test_the_base_is_known_to_methods_that_need_it_where_all_models_are_adapters(
    tiny_base: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    chosen = {key: models[key] for key in ("one", "two")}
    result = sm.merge(tiny_base, chosen, "karcher", output=tmp_path / "out")
    vectors = sm.load_task_vectors(tiny_base, chosen)
    for _ in range(2):
        _assert_same(_folded(tiny_base, vectors.merge("karcher")), result.path)


def test_the_noise_floor_and_embeddings_are_known(
    tiny_base: Path, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    tuned = load_file(make_finetune("tuned", seed=5, scale=1e-3) / "model.safetensors")
    save_file({key: t.bfloat16() for key, t in tuned.items()}, rounded / "model.safetensors")
    (rounded / "config.json").write_text((tiny_base / "config.json").read_text())
    vectors = sm.load_task_vectors(tiny_base, [rounded])
    with_floor = vectors.merge(sm.Star(eta=100))
    without = vectors.merge(sm.Star(eta=100, noise_floor="off"))
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    for name in with_floor:
        is_matrix = len(tuned[name].shape) == 2
        same = torch.equal(with_floor[name].to_dense(), without[name].to_dense())
        assert same or (is_matrix and name not in embeddings), name
    result = sm.merge(tiny_base, [rounded], sm.Star(eta=100), output=tmp_path / "out")
    _assert_same(_folded(tiny_base, with_floor), result.path)


@settings(
    max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    order=st.permutations(["one", "two", "full"]),
    count=st.integers(1, 3),
    name=st.sampled_from(["star", "average", "ties", "iso_c", "dare"]),
)
def test_what_was_merged_before_changes_nothing(
    shared: sm.TaskVectors, load: Callable[[], sm.TaskVectors], order, count, name
) -> None:
    found = shared.merge(name, models=order[:count])
    expected = load().merge(name, models=order[:count])
    assert found.keys() == expected.keys()
    for tensor, delta in expected.items():
        assert torch.equal(found[tensor].to_dense(), delta.to_dense()), tensor


@pytest.fixture
def load(tiny_base: Path, models: dict[str, Path]) -> Callable[[], sm.TaskVectors]:
    """Return a function that reads the models."""
    return lambda: sm.load_task_vectors(tiny_base, models)


@pytest.fixture
def shared(load: Callable[[], sm.TaskVectors]) -> sm.TaskVectors:
    """Return what one test merges many times."""
    return load()


@pytest.mark.parametrize("name", ["star", "star+ties", "tsv_m", "metagpt"])
def test_threads_change_nothing(name: str, load: Callable[[], sm.TaskVectors]) -> None:
    first, *others = (load().merge(name, threads=threads) for threads in (1, 2, 3))
    for other in others:
        assert list(first) == list(other)
        for tensor, delta in first.items():
            assert torch.equal(delta.to_dense(), other[tensor].to_dense()), tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_s_default_dtype_changes_nothing(
    dtype: torch.dtype,
    load: Callable[[], sm.TaskVectors],
    tiny_base: Path,
    request: pytest.FixtureRequest,
) -> None:
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    named = ["karcher", "model_stock", "nuslerp", "star+ties", "knots"]
    mergekit = Mergekit(settings=[{"parameter": "weight", "value": 0.5}])
    for method in (*named, sm.Linear(normalize=False), mergekit):
        found = []
        for default in (torch.float32, dtype):
            torch.set_default_dtype(default)
            update = load().merge(method, models=["full", "one"])
            found.append(_folded(tiny_base, update))
        for name, weight in found[0].items():
            assert torch.equal(found[1][name], weight), (method, name)


def test_a_sweep_decomposes_each_task_vector_once(tiny_base: Path, models: dict[str, Path]) -> None:
    vectors = sm.load_task_vectors(tiny_base, models)
    vectors.merge(sm.Star(eta=10))
    delta = vectors.deltas["one"]["model.layers.0.self_attn.v_proj.weight"]
    first = svd(delta)
    vectors.merge(sm.Star(eta=60), models=["full", "one"])
    assert svd(delta) is first


def test_paths_name_the_models_as_in_a_merge(tiny_base: Path, models: dict[str, Path]) -> None:
    assert sm.load_task_vectors(tiny_base, models["one"]).names == ("one",)
    assert sm.load_task_vectors(tiny_base, f"a={models['one']}").names == ("a",)
    assert sm.load_task_vectors(tiny_base, [models["two"], models["one"]]).names == ("two", "one")


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["one", "too"], "No model is called 'too'. Did you mean 'two'"),
        (["one", "one"], "Give each model once"),
        ([], "at least one"),
        ("one", "Give a list of names"),
    ],
)
def test_models_that_are_not_there_are_refused(
    chosen: list[str], said: str, tiny_base: Path, models: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match=said):
        sm.load_task_vectors(tiny_base, models).merge(models=chosen)


def test_what_does_not_fit_is_refused_as_in_a_merge(
    tiny_base: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    vectors = sm.load_task_vectors(tiny_base, models)
    with pytest.raises(UsageError, match="emr makes a model for each task"):
        vectors.merge("emr")
    with pytest.raises(UsageError, match="threads is 0"):
        vectors.merge(threads=0)
    with pytest.raises(UsageError, match="2 weights for 3 models"):
        vectors.merge(weights=[1, 2])
    with pytest.raises(UsageError, match="eta has 3 numbers for 2 models"):
        vectors.merge(sm.Star(eta=[1, 2, 3]), models=["one", "two"])
    with pytest.raises(UsageError, match="no merged tensor matches the pattern"):
        vectors.merge(sm.Star(eta={"*.down_proj.*": 10, "*": 20}), models=["one"])
    with pytest.raises(UsageError, match=r"two models are called 'one'.*a mapping \{name: path\}"):
        sm.load_task_vectors(tiny_base, [models["one"], models["one"]])
    with pytest.raises(UsageError, match="does not exist"):
        sm.load_task_vectors(tiny_base, tmp_path / "nothing")
    edit_json(models["one"] / "adapter_config.json", base_model_name_or_path="org/another")
    with pytest.raises(UsageError, match="org/another"):
        sm.load_task_vectors(tiny_base, models)
    assert sm.load_task_vectors(tiny_base, models, any_base=True).names == tuple(models)


def test_whole_modules_of_several_adapters_are_dense_task_vectors(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    saving = [make_adapter(name, seed=t, modules_to_save=["norm"]) for t, name in enumerate("ab")]
    for t, path in enumerate(saving):
        file = path / "adapter_model.safetensors"
        stored = load_file(file)
        (key,) = (key for key in stored if key.endswith("model.norm.weight"))
        save_file(stored | {key: stored[key] + 1 + t}, file)
    vectors = sm.load_task_vectors(tiny_base, saving)
    merged = vectors.merge("average")["model.norm.weight"]
    torch.testing.assert_close(merged.to_dense(), torch.full((32, 1), 1.5))
    result = sm.merge(tiny_base, saving, "average", output=tmp_path / "out")
    norms = [
        load_file(folder / "model.safetensors")["model.norm.weight"]
        for folder in (tiny_base, result.path)
    ]
    torch.testing.assert_close(norms[1], norms[0] + 1.5)


def test_what_is_loaded_needs_no_files(tmp_path: Path) -> None:
    names = ("base", "a", "b")
    for seed, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"{i}.weight": torch.randn(6, 5, generator=generator) for i in range(50)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    # In a process of its own, which may have few files open and which a look at a window of a file
    # that was shortened would end.
    program = """if True:
        import os, resource, sys
        import starmerge_models as sm
        base, *models = sys.argv[1:]
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
        vectors = sm.load_task_vectors(base, models)
        for path in (base, *models):
            os.truncate(f"{path}/model.safetensors", 0)
        for method in ("star", "karcher"):
            assert len(vectors.merge(method)) == 50
    """
    paths = [tmp_path / name for name in names]
    run = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_the_base_is_held_once(tiny_base: Path, make_finetune: MakeFinetune) -> None:
    models = [make_finetune(name, seed=seed) for seed, name in enumerate("ab")]
    first, second = sm.load_task_vectors(tiny_base, models).deltas.values()
    assert all(first[name].base is second[name].base for name in first)


def test_task_vectors_are_shown_by_names_and_number_of_tensors(
    tiny_base: Path, models: dict[str, Path]
) -> None:
    count = len(load_file(tiny_base / "model.safetensors"))
    shown = repr(sm.load_task_vectors(tiny_base, models))
    assert shown == f"<TaskVectors of one, two, full: {count} tensors>"


def test_what_is_no_path_is_refused(tiny_base: Path, models: dict[str, Path]) -> None:
    loaded = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="A Sequential stands where a model's folder or Hub id"):
        sm.load_task_vectors(loaded, models)
    for wrong in (loaded, loaded[0], [loaded], {"a": loaded}, [models["one"], None]):
        with pytest.raises(UsageError, match="stands where a model's folder or Hub id is wanted"):
            sm.load_task_vectors(tiny_base, wrong)


@pytest.mark.parametrize("weights", [{"one": 1.0, "two": 2.0}, "12", ["a", "b"], 2.0, [None, 1]])
def test_weights_that_are_no_list_of_numbers_are_refused(
    weights: object, tiny_base: Path, models: dict[str, Path]
) -> None:
    vectors = sm.load_task_vectors(tiny_base, models)
    with pytest.raises(UsageError, match="Give a list of numbers, one a model"):
        vectors.merge(models=["one", "two"], weights=weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_model_is_refused_when_it_is_loaded(
    value: float, tiny_base: Path, models: dict[str, Path]
) -> None:
    file = models["two"] / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, file)
    with pytest.raises(StarmergeError, match=r"two: the update of tensor .* has a NaN"):
        sm.load_task_vectors(tiny_base, models)
