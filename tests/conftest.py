"""Models that the tests merge: tiny ones made on the spot, and the demo's real one."""

# ruff: noqa: E402  (what comes before the imports concerns them)

from __future__ import annotations

import gc
import os

# Nearly all that is made while modules are loaded and tests are collected stays: the collector
# would only walk through it, again and again.
gc.disable()

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No test fetches anything from the Hub; where there is no network, its client would try for long.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from starmerge_models.checkpoints import configs, filling, isolated, names, renaming
from starmerge_models.checkpoints.hashing import blake3_of
from starmerge_models.checkpoints.metric import MetricWriter
from starmerge_models.demo_names import prepared_base
from starmerge_models.events import LOG
from starmerge_models.spectral.moment import Side
from starmerge_models_demo import ADAPTERS
from tests.evaluation.tiny_world import World, make_world
from tests.forks import Forks, asking, begin_to_serve
from tests.small_demo import LAYERS, first_layers, write_small_demo

# How long an example takes depends on the machine, not on the code. The examples are others each
# time, so that few of them find in time what many would at once.
settings.register_profile("starmerge", deadline=None, max_examples=50)
settings.load_profile("starmerge")

MakeAdapter = Callable[..., Path]
MakeFinetune = Callable[..., Path]
MakeMetric = Callable[..., Path]

_LONG = (
    *("merging/executors/test_ray", "test_first_hour", "storage/test_objects"),
    *("study/page/test_browser", "merging/test_engine", "merging/test_resume", "test_real_model"),
    *("test_manual", "methods/kinds/test_spectral", "test_release", "cli/test_cli"),
    *("evaluation/models/test_generation", "merging/test_task_vectors", "test_operation"),
    *("study/test_shipped", "evaluation/tasks/test_lm_eval", "test_notebook"),
    *("checkpoints/test_bad_input", "evaluation/models/test_scorers", "test_device"),
    *("methods/test_memory", "methods/kinds/test_entrywise", "mergekit/test_recipe"),
    *("calibration/test_run", "merging/test_methods", "study/test_images_study"),
    *("soak/test_full_disk", "training/test_finetuning"),
)
"""Files that take longer than others, in the order in which they begin."""


_SOCKET = "STARMERGE_TEST_FORKS"
"""Variable that names the socket of the process whose forks run commands."""


def pytest_configure(config: pytest.Config) -> None:
    """Begin to serve forks, once for all processes that run tests."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        place = Path(folder.name) / "forks"
        config.add_cleanup(begin_to_serve(place, "tests.loaded"))
        os.environ[_SOCKET] = str(place)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let files that take long begin first, so that none keeps one process waiting at the end."""
    folder = Path(__file__).parent
    places = {folder / f"{name}.py": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage from now on, without a look at the millions of objects made until now."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Take back what a test does to the package's log, as commands in this process do."""
    handlers, level, propagates = list(LOG.handlers), LOG.level, LOG.propagate
    yield
    if (LOG.handlers, LOG.level, LOG.propagate) != (handlers, level, propagates):
        LOG.handlers[:] = handlers
        LOG.setLevel(level)
        LOG.propagate = propagates


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random Llama of two layers, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("tiny") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made_adapters() -> dict[str, Path]:
    """Return where adapters of the tiny model lie that were made before, by their settings."""
    return {}


@pytest.fixture
def make_adapter(
    tiny_base: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    made_adapters: dict[str, Path],
) -> MakeAdapter:
    """Return a function that makes a random adapter of the tiny model with PEFT."""

    def make(name: str, *, seed: int = 0, base: Path = tiny_base, **options: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options
        settings.setdefault("init_lora_weights", False)
        asked = repr((seed, sorted(settings.items())))
        made = made_adapters.get(asked) if base == tiny_base else None
        if made is None:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_pretrained(base)
            model.name_or_path = "tests/tiny"
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
            made = tmp_path_factory.mktemp("adapter")
            adapted.save_pretrained(made, save_embedding_layers=False)
            if base == tiny_base:
                made_adapters[asked] = made
        torch.manual_seed(seed)  # as far as before, whether it was made or copied
        return Path(shutil.copytree(made, tmp_path / name, dirs_exist_ok=True))

    return make


@pytest.fixture
def make_finetune(tiny_base: Path, tmp_path: Path) -> MakeFinetune:
    """Return a function that makes a full fine-tune of the tiny model: the base plus noise."""

    def make(name: str, *, seed: int = 0, scale: float = 0.01) -> Path:
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: tensor + scale * torch.randn(tensor.shape, generator=generator)
            for key, tensor in load_file(tiny_base / "model.safetensors").items()
        }
        folder = tmp_path / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((tiny_base / "config.json").read_text())
        return folder

    return make


@pytest.fixture
def make_metric(tiny_base: Path, tmp_path: Path) -> MakeMetric:
    """Return a function that writes random moments of the inputs of a base's linear layers."""

    def make(
        *,
        base: Path = tiny_base,
        tasks: Sequence[str] = (),
        without: Sequence[str] = (),
        rows: Collection[str] = (),
        name: str = "metric.safetensors",
    ) -> Path:
        weights = base / "model.safetensors"
        tensors = {
            key: tensor.shape[key not in rows]
            for key, tensor in load_file(weights).items()
            if tensor.ndim == 2 and "emb" not in key and "wte" not in key and "wpe" not in key
        }
        generator = torch.Generator().manual_seed(0)
        with MetricWriter(
            tmp_path / name,
            base=(base.name, {weights.name: blake3_of(weights)}),
            made_from={"kind": "texts"},
            tensors=list(tensors),
            tasks=tasks,
        ) as writer:
            for task in (None, *tasks):
                for key, n in tensors.items():
                    if key in without:
                        continue
                    root = torch.randn(n if task is None else 3, n, generator=generator)
                    root[0] *= 10
                    side: Side = "rows" if key in rows else "columns"
                    writer.add(root, [key], side=side, task=task, tokens=100)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of the demo's base; ``starmerge demo prepare`` puts it there."""
    return prepared_base()


@pytest.fixture(scope="session")
def cut_demo(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the demo's models, cut; see :func:`small_demo`."""
    folder = tmp_path_factory.mktemp("demo")
    write_small_demo(smollm2, folder)
    return folder


@pytest.fixture
def small_demo(cut_demo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``demo:base`` and so on be models that are cut to two layers, here and in new processes.

    Commands in forks need the folder that it returns as their ``site``.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(cut_demo))
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(cut_demo), path])))
    adapters = cut_demo / "starmerge_models_demo" / "adapters"
    monkeypatch.setattr("starmerge_models_demo.ADAPTERS", adapters)
    return cut_demo


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return a tiny model with adapters, and tasks that these answer, for tests that only read."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def shallow(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo's base without all but its first layers, for tests that read no sense.

    Its tokenizer, its template and its sizes are the real ones; it takes a tenth of the time.
    """
    folder = tmp_path_factory.mktemp("shallow") / "base"
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((smollm2 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    weights = first_layers(smollm2 / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def shallow_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the demo's adapters, by name, of the layers that the shallow base has."""
    folder = tmp_path_factory.mktemp("shallow")
    made = {}
    for adapter in sorted(path for path in ADAPTERS.iterdir() if path.is_dir()):
        made[adapter.name] = folder / adapter.name
        shutil.copytree(adapter, folder / adapter.name)
        weights = "adapter_model.safetensors"
        save_file(first_layers(adapter / weights), made[adapter.name] / weights)
    return made


@pytest.fixture(scope="session")
def loaded() -> Iterator[Forks]:
    """Return a process that runs commands in forks of itself, without importing anything again."""
    with asking(Path(os.environ[_SOCKET])) as served:
        yield served


@pytest.fixture
def starmerge(loaded: Forks) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the command line in a process of its own.

    It is a fork of one that has imported everything; with ``env`` or ``input`` a new one, for what
    is read as Python starts or from standard input. ``site`` is a folder of installed packages.
    """

    def run(
        *arguments: object, cwd: Path | None = None, site: Path | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "starmerge_models", *map(str, arguments)]
        if options:
            assert site is None
            return subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=cwd, **options
            )
        path = [] if site is None else [str(site)]
        ended = loaded.run(arguments, env=dict(os.environ), cwd=str(cwd or Path.cwd()), path=path)
        return subprocess.CompletedProcess(command, ended.code, ended.out, ended.err)

    return run


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session", autouse=True)
def _transformers_answers_here() -> Iterator[None]:
    """Let transformers answer in this process, which has imported it, for all tests.

    The process that asks it for users takes seconds to start; tests/checkpoints/test_bad_input.py
    compares its answers with these, and commands in processes of their own start it.
    """

    def ask(program: ModuleType, question: list[Any]) -> Any:
        if isolated.find_spec("transformers") is None:
            return None
        function = {renaming: renaming.naming, filling: filling.filled}[program]
        try:
            return json.loads(json.dumps(function(*json.loads(json.dumps(question)))))
        except Exception:  # the process would have ended
            return None

    with pytest.MonkeyPatch.context() as patch:
        for room in (names, configs):
            patch.setattr(room, "call_isolated", ask)
        yield
