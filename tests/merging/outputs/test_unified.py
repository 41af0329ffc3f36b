"""EMR merges from files to files: what is written, each task's model, what is refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import starmerge_models as sm
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.emr_task import pack, unpack
from starmerge_models.checkpoints.models import files_of, open_model
from starmerge_models.checkpoints.source import resolve
from starmerge_models.merging.plan import Plan, make_plan
from starmerge_models.methods import Emr, Pipeline
from starmerge_models.recipe import make_recipe
from starmerge_models.storage.local_folder import LocalFile, LocalFolder
from tests.conftest import MakeAdapter, MakeFinetune, edit_json
from tests.forks import Forks
from tests.oracles import bounds
from tests.oracles import emr as oracle

Arrays = dict[str, np.ndarray]
Run = Callable[..., subprocess.CompletedProcess[str]]

NAME = "model.layers.1.self_attn.v_proj.weight"


def _weights(folder: Path) -> Arrays:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def _task_vector(base: Path, model: Path) -> Arrays:
    """The entries of a task vector, rounded to float32 as the methods see them."""
    file = model / "adapter_model.safetensors"
    if not file.is_file():
        ours, theirs = (load_file(path / "model.safetensors") for path in (base, model))
        return {name: (theirs[name] - ours[name]).double().numpy() for name in ours}
    factors = load_file(file)
    return {
        key.removeprefix("base_model.model.").replace(".lora_A", ""): np.float32(
            2.0 * factors[key.replace("lora_A", "lora_B")].double().numpy() @ A.double().numpy()
        ).astype(np.float64)
        for key, A in factors.items()
        if ".lora_A." in key
    }


def _oracle(base: Path, models: list[Path]) -> tuple[Arrays, list[Arrays], list[float]]:
    taus = [_task_vector(base, model) for model in models]
    zeros = {name: np.zeros_like(tau) for tau_t in taus for name, tau in tau_t.items()}
    return oracle.emr([zeros | tau for tau in taus])


def _models(kind: str, make_adapter: MakeAdapter, make_finetune: MakeFinetune) -> list[Path]:
    other = ["o_proj", "v_proj"]
    return {
        "adapters": lambda: [make_adapter("a"), make_adapter("b", seed=1, target_modules=other)],
        "fine-tunes": lambda: [make_finetune("a"), make_finetune("b", seed=1)],
        "mixed": lambda: [make_adapter("a"), make_finetune("b"), make_finetune("c", seed=1)],
    }[kind]()


def _emr(base: Path, models: list[Path], output: Path, **options: Any) -> sm.MergeResult:
    return sm.merge(base, models, "emr", output=output, **options)


@pytest.fixture
def merged(tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    """Return the folder of an EMR merge of two adapters, a and b."""
    return _emr(tiny_base, [make_adapter("a"), make_adapter("b", seed=1)], tmp_path / "out").path


@pytest.mark.parametrize("kind", ["adapters", "fine-tunes", "mixed"])
def test_each_task_becomes_the_model_of_the_oracle(
    kind: str,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
) -> None:
    models = _models(kind, make_adapter, make_finetune)
    out = _emr(tiny_base, models, tmp_path / "out").path
    expected = _oracle(tiny_base, models)
    unified = _weights(out / "unified")
    assert set(unified) == set(expected[0])
    for name, tau_uni in expected[0].items():
        np.testing.assert_array_equal(unified[name], tau_uni)
    base = _weights(tiny_base)
    for t, model in enumerate(models):
        task = out / model.name
        rescaler = json.loads((task / "emr.json").read_text())["rescaler"]
        assert rescaler == pytest.approx(expected[2][t], rel=1e-11)
        made = _weights(sm.merge(tiny_base, task, "average", output=tmp_path / str(t)).path)
        update = oracle.materialise(expected, t)
        changed = _task_vector(tiny_base, model)
        for name, weight in base.items():
            if name not in changed:
                np.testing.assert_array_equal(made[name], weight)
                continue
            # λ and λ τ_uni are rounded to float32; then the sum.
            delta = update[name]
            allowed = bounds.gamma(3, bounds.U32) * np.abs(delta)
            allowed += bounds.U32 * np.abs(weight + delta) + 1e-30
            assert np.all(np.abs(made[name] - weight - delta) <= allowed), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "0")


def test_one_task_gets_back_its_own_model(
    tiny_base: Path, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    tuned = make_finetune("tuned")
    out = _emr(tiny_base, [tuned], tmp_path / "out").path
    assert json.loads((out / "tuned" / "emr.json").read_text())["rescaler"] == 1.0
    again = sm.merge(tiny_base, out / "tuned", "average", output=tmp_path / "again").path
    expected = sm.merge(tiny_base, tuned, "average", output=tmp_path / "expected").path
    first, second = (folder / "model.safetensors" for folder in (again, expected))
    assert first.read_bytes() == second.read_bytes()


def test_tensors_of_every_shape_and_dtype(tiny_base: Path, tmp_path: Path) -> None:
    """Sizes that no byte of a mask divides, an empty tensor, dtypes side by side."""
    shapes = {
        "scalar": (),
        "vector": (5,),
        "matrix": (3, 7),
        "kernel": (3, 1, 3, 3),
        "none": (0, 4),
    }
    dtypes = {"scalar": torch.bfloat16, "vector": torch.float64, "kernel": torch.float16}
    generator = torch.Generator().manual_seed(0)
    folders = [tmp_path / name for name in ("base", "a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text((tiny_base / "config.json").read_text())
        tensors = {
            name: torch.randn(shape, generator=generator).to(dtypes.get(name, torch.float32))
            for name, shape in shapes.items()
        }
        save_file(tensors | {"ids": torch.arange(3)}, folder / "model.safetensors")
    base, *models = folders
    out = _emr(base, models, tmp_path / "out").path
    before = _weights(base)
    taus = [
        {name: np.float32(after[name] - before[name]).astype(np.float64) for name in shapes}
        for after in map(_weights, models)
    ]
    expected = oracle.emr(taus)
    assert load_file(out / "unified" / "model.safetensors").keys() == shapes.keys()
    opened = open_base(resolve(base))
    for t, model in enumerate(models):
        task = open_model(model.name, resolve(out / model.name), opened)
        update = oracle.materialise(expected, t)
        for name, shape in shapes.items():
            delta = task.delta(name, opened.checkpoint.read(name)).tensor
            assert (delta.shape, delta.dtype) == (shape, torch.float32)
            np.testing.assert_allclose(delta.numpy(), update[name], rtol=2 * bounds.U32, atol=0)
        assert sm.merge(base, out / model.name, "average", output=tmp_path / f"made-{t}")


def test_tasks_merge_with_each_other_and_with_other_models(
    tiny_base: Path, merged: Path, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    tuned = make_finetune("tuned")
    models = [merged / "a", merged / "b", tuned]
    result = sm.merge(tiny_base, models, "task_arithmetic", output=tmp_path / "sum")
    assert [entry["kind"] for entry in result.report.content["inputs"]] == [
        "base", "EMR task", "EMR task", "full fine-tune",
    ]  # fmt: skip
    adapters = [tmp_path / "a", tmp_path / "b"]
    expected = _oracle(tiny_base, adapters)
    updates = [oracle.materialise(expected, t) for t in (0, 1)] + [_task_vector(tiny_base, tuned)]
    found, base = _weights(result.path), _weights(tiny_base)
    for name, weight in base.items():
        update = sum(0.4 * update[name] for update in updates if name in update)
        np.testing.assert_allclose(found[name], weight + update, rtol=1e-6, atol=1e-7)


def test_a_task_opens_as_a_model(tiny_base: Path, merged: Path) -> None:
    task = open_model("a", resolve(merged / "a"), open_base(resolve(tiny_base)))
    tau_uni = load_file(merged / "unified" / "model.safetensors")
    masks = load_file(merged / "a" / "mask.safetensors")
    assert (task.kind, task.name) == ("EMR task", "a")
    assert task.tensors == set(masks) == set(tau_uni)
    assert [file.name for file in files_of(task)] == [
        "emr.json", "mask.safetensors", "model.safetensors",
    ]  # fmt: skip
    assert task.rank(NAME) is None
    read = sum(info.nbytes for info in task.inputs(NAME))
    assert read == tau_uni[NAME].nbytes + masks[NAME].nbytes
    assert masks[NAME].nbytes == tau_uni[NAME].numel() // 8


def test_truncated_task_vectors_are_unified(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Each adapter truncated by itself, by a merge of one; then the oracle."""
    paths = [make_adapter(f"a{seed}", seed=seed) for seed in range(3)]
    chain = Pipeline.of([sm.Star(rank=2), Emr()])
    result = sm.merge(tiny_base, paths, chain, output=tmp_path / "out")
    assert result.report.mean_rank == 2
    tasks = []
    for path in paths:
        factors = load_file(path / "adapter_model.safetensors")
        tasks.append({})
        for key, A in factors.items():
            if ".lora_A." in key:
                delta = sm.LowRank(factors[key.replace("lora_A", "lora_B")], A, 2.0)
                name = key.removeprefix("base_model.model.").replace(".lora_A", "")
                kept = sm.merge_state([{name: delta}], sm.Star(rank=2))[name]
                tasks[-1][name] = kept.entries().double().numpy()
    expected, _, rescalers = oracle.emr(tasks)
    for name, tau_uni in _weights(result.path / "unified").items():
        np.testing.assert_array_equal(tau_uni, expected[name])
    found = result.report.content["findings"]["emr"]["rescalers"]
    assert list(found) == ["a0", "a1", "a2"]
    assert list(found.values()) == pytest.approx(rescalers, rel=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_a_chosen_dtype_the_tasks_keep_their_l1_norms(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, dtype: str
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    out = _emr(tiny_base, models, tmp_path / "out", dtype=dtype).path
    tau_uni = load_file(out / "unified" / "model.safetensors")
    exact, masks, _ = _oracle(tiny_base, models)
    base = open_base(resolve(tiny_base))
    for t, model in enumerate(models):
        task = open_model(model.name, resolve(out / model.name), base)
        whole = 0.0
        for name, tensor in tau_uni.items():
            assert str(tensor.dtype) == f"torch.{dtype}"
            rounded = torch.from_numpy(exact[name]).to(tensor.dtype)
            assert torch.equal(tensor, rounded)
            delta = task.delta(name, base.checkpoint.read(name)).tensor
            assert delta.dtype == torch.float32
            kept = masks[t][name] & (rounded.double().numpy() != 0)
            np.testing.assert_array_equal(delta.numpy() != 0, kept)
            whole += float(delta.double().abs().sum())
        norm = oracle.absolute_sum(_task_vector(tiny_base, model))
        assert whole == pytest.approx(norm, rel=2 * bounds.U32)


def test_says_what_it_wrote(tiny_base: Path, merged: Path, tmp_path: Path) -> None:
    names = {str(path.relative_to(merged)) for path in merged.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "merge_report.json",
        "unified/model.safetensors",
        *(f"{task}/{file}" for task in "ab" for file in ("emr.json", "mask.safetensors")),
    }
    report = json.loads((merged / "merge_report.json").read_text())
    expected, masks, _ = _oracle(tiny_base, [tmp_path / "a", tmp_path / "b"])
    assert (len(report["tensors"]), report["tensors_copied"]) == (4, 0)
    for record in report["tensors"]:
        name = record["name"]
        assert record["dtype"] == "float32"
        assert record["survived"] == 1
        assert record["update_norm"] == pytest.approx(np.linalg.norm(expected[name]))
        shares = {task: float(mask[name].mean()) for task, mask in zip("ab", masks, strict=True)}
        assert record["masks"] == pytest.approx(shares)
    for task in "ab":
        content = json.loads((merged / task / "emr.json").read_text())
        assert content == {
            "format": 1,
            "task": task,
            "base": str(tiny_base),
            "base_hub_id": "tests/tiny",  # as both adapters say
            "rescaler": report["findings"]["emr"]["rescalers"][task],
            "unified": "../unified",
            "untied": None,
        }
    card = ModelCard.load(merged / "README.md")
    assert card.data.library_name == "starmerge"
    assert "starmerge merge BASE out/a -m average -o OUT" in card.text
    umask = os.umask(0)
    os.umask(umask)
    for name in names:
        assert (merged / name).stat().st_mode & 0o777 == 0o666 & ~umask, name


def _plan(base: Path, models: list[Path], output: Path, **options: Any) -> Plan:
    content = {"base": str(base), "models": list(map(str, models)), "method": "emr"} | options
    return make_plan(make_recipe(content), output)


def test_the_plan_counts_the_unified_vector_and_the_masks(
    tiny_base: Path, make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    models = [make_adapter("a"), make_finetune("b")]
    plan = _plan(tiny_base, models, tmp_path / "out")
    weights = load_file(tiny_base / "model.safetensors")
    factors = load_file(models[0] / "adapter_model.safetensors")
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    adapted = _task_vector(tiny_base, models[0])
    bits = sum(-(-size // 8) for size in sizes.values())
    bits += sum(-(-sizes[name] // 8) for name in adapted)
    assert plan.bytes_to_write == 4 * sum(sizes.values()) + bits
    assert plan.bytes_to_read == 8 * sum(sizes.values()) + sum(t.nbytes for t in factors.values())
    assert plan.memory(1, 1) > 4 * 4 * max(sizes.values())
    half = _plan(tiny_base, models, tmp_path / "out", dtype="bfloat16")
    assert half.bytes_to_write == 2 * sum(sizes.values()) + bits

    alone = _plan(tiny_base, models[:1], tmp_path / "out")
    assert {tensor.source.name for tensor in alone.tensors} == set(adapted)
    result = _emr(tiny_base, models[:1], tmp_path / "out")
    stored = [load_file(file) for file in result.path.rglob("*.safetensors")]
    assert alone.bytes_to_write == sum(t.nbytes for file in stored for t in file.values())


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["x/y", "b"], "'x/y' gets a folder of its name, which cannot be one"),
        (["a", ".."], "'..' gets a folder of its name, which cannot be one"),
        (["."], "'.' gets a folder"),
        (["a\\b"], "gets a folder"),
        (["unified"], "'unified' gets a folder of its name, which is taken"),
        (["Unified"], "'Unified' gets a folder of its name, which is taken"),
        (["merge_report.json"], "is taken"),
        (["a", "A"], "'A' gets a folder of its name, which is taken"),
    ],
)
def test_refuses_names_that_cannot_be_folders(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, names: list[str], reason: str
) -> None:
    path = str(make_adapter("adapter"))
    models = [{"name": name, "path": path} for name in names]
    content = {"base": str(tiny_base), "models": models}
    with pytest.raises(sm.UsageError) as error:
        make_plan(make_recipe(content | {"method": "emr"}), tmp_path / "out")
    assert reason in str(error.value)
    assert make_plan(make_recipe(content), tmp_path / "out")


def test_refuses_weights_and_folders_that_are_taken(
    tiny_base: Path, merged: Path, tmp_path: Path
) -> None:
    models = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(sm.UsageError, match="emr: b has the weight 2"):
        _emr(tiny_base, models, tmp_path / "weighted", weights=[1, 2])
    with pytest.raises(sm.UsageError, match="--overwrite"):
        _emr(tiny_base, models, merged)
    before = (merged / "unified" / "model.safetensors").read_bytes()
    _emr(tiny_base, models, merged, overwrite=True)
    assert (merged / "unified" / "model.safetensors").read_bytes() == before
    with pytest.raises(sm.UsageError, match="is, holds or lies in the input"):
        sm.merge(tiny_base, merged / "a", output=merged, overwrite=True)
    with pytest.raises(sm.UsageError, match=r"nor a task of an EMR merge \(no emr\.json\)"):
        sm.merge(tiny_base, merged, output=tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "out"}


def _damage(task: Path, how: str) -> None:
    mask, unified = task / "mask.safetensors", task.parent / "unified"
    masks, tau_uni = load_file(mask), load_file(unified / "model.safetensors")
    if how == "mask missing":
        mask.unlink()
    elif how == "mask cut off":
        mask.write_bytes(mask.read_bytes()[:-1])
    elif how == "mask too short":
        save_file(masks | {NAME: masks[NAME][:-1].clone()}, mask)
    elif how == "mask of another dtype":
        save_file(masks | {NAME: masks[NAME].to(torch.int8)}, mask)
    elif how == "mask of an unknown tensor":
        save_file(masks | {"other.weight": masks[NAME].clone()}, mask)
    elif how == "unified missing":
        shutil.rmtree(unified)
    elif how == "unified cut off":
        file = unified / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "unified of integers":
        file = unified / "model.safetensors"
        save_file(tau_uni | {NAME: tau_uni[NAME].to(torch.int32)}, file)
    elif how == "unified with a NaN":
        tau_uni[NAME].view(-1)[:64] = float("nan")
        save_file(tau_uni, unified / "model.safetensors")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("mask missing", "mask.safetensors is missing"),
        ("mask cut off", "mask.safetensors is not a complete safetensors file"),
        ("mask too short", f"the mask of {NAME} is torch.uint8 [63], and a tensor of 512 entries"),
        ("mask of another dtype", f"the mask of {NAME} is torch.int8"),
        ("mask of an unknown tensor", "masks the tensor other.weight, which the unified vector"),
        ("unified missing", "needs the unified vector of its merge"),
        ("unified cut off", "model.safetensors is not a complete safetensors file"),
        ("unified of integers", f"tensor {NAME} is stored in torch.int32"),
        ("unified with a NaN", f"the update of tensor {NAME} has a NaN"),
    ],
)
def test_broken_files_are_named_and_leave_nothing(
    tiny_base: Path, merged: Path, tmp_path: Path, how: str, words: str
) -> None:
    _damage(merged / "a", how)
    with pytest.raises(sm.StarmergeError) as error:
        sm.merge(tiny_base, merged / "a", "average", output=tmp_path / "made")
    assert words in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "out"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "the format is 2, and this starmerge reads 1"),
        ({"rescaler": float("nan")}, "the rescaler is nan"),
        ({"rescaler": float("inf")}, "the rescaler is inf"),
        ({"rescaler": -1.0}, "the rescaler is -1.0"),
        ({"rescaler": "1"}, "the rescaler is '1'"),
        ({"unified": None}, "does not say where the unified vector lies"),
        ({"unified": "../gone"}, "needs the unified vector of its merge"),
    ],
)
def test_a_broken_config_is_refused(
    tiny_base: Path, merged: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    edit_json(merged / "a" / "emr.json", **changes)
    with pytest.raises(sm.StarmergeError) as error:
        sm.merge(tiny_base, merged / "a", "average", output=tmp_path / "made")
    assert words in str(error.value)
    assert not (tmp_path / "made").exists()


def test_another_base_is_refused(
    tiny_base: Path, make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    # Folders of the Hub's cache have the names of their models.
    base = make_finetune("models--tests--one/snapshots/abc", scale=0.0)
    other = make_finetune("models--tests--other/snapshots/abc", scale=0.0)
    task = _emr(base, [make_adapter("a")], tmp_path / "out", any_base=True).path / "a"
    made = tmp_path / "made"
    with pytest.raises(
        sm.UsageError, match=r"was of tests/one, but the base is tests/other.*--any"
    ):
        sm.merge(other, task, "average", output=made)
    assert sm.merge(other, task, "average", output=made, any_base=True)

    shutil.rmtree(made)
    tensors = load_file(tiny_base / "model.safetensors")
    for changed, words in [
        ({NAME: tensors[NAME].T.contiguous()}, f"tensor {NAME} has the shape [16, 32], in the"),
        ({NAME: None}, f"has the tensor {NAME}, which the base"),
    ]:
        kept = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
        save_file(kept, base / "model.safetensors")
        with pytest.raises(sm.StarmergeError) as error:
            sm.merge(base, task, "average", output=made)
        assert words in str(error.value)
        assert not made.exists()


def test_what_cannot_be_merged_leaves_nothing(
    tiny_base: Path, make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    adapter, healthy = make_adapter("adapter"), make_finetune("healthy", seed=1)
    large = make_adapter("large", lora_alpha=10_000_000)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = f"base_model.model.{NAME.removesuffix('.weight')}.lora_B.weight"
    tensors[key].view(-1)[3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(sm.StarmergeError, match=f"{NAME} has a NaN or an infinity"):
        _emr(tiny_base, [adapter, healthy], tmp_path / "out")
    with pytest.raises(sm.StarmergeError, match=r"unified tensor .* overflows torch\.float16"):
        _emr(tiny_base, [large], tmp_path / "out", dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "healthy", "large"}


def _wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_files_that_cannot_all_be_made_are_closed(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [make_adapter("a"), make_adapter("b", seed=1)]
    opened = LocalFolder.open

    def refuse(folder: LocalFolder, name: str, size: int) -> LocalFile:
        if name.startswith("b/"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(folder, name, size)

    monkeypatch.setattr(LocalFolder, "open", refuse)
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(sm.StarmergeError, match="Too many open files"):
        sm.merge(tiny_base, models, "emr", output=tmp_path / "out")
    assert sorted(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_merge_leaves_no_output_folder(
    loaded: Forks, tiny_base: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Twenty tensors of 4 MB; the process is killed when the third is being written."""
    for name, scale in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tiny_base / "config.json").read_text())
        tensors = {f"layers.{n}.weight": torch.full((1024, 1024), scale) for n in range(20)}
        save_file(tensors, tmp_path / name / "model.safetensors")

    def is_writing() -> bool:
        files = list(tmp_path.glob(".out.partial-*/unified/model.safetensors"))
        return bool(files) and files[0].stat().st_size > 9 * 2**20

    command = ["merge", "base", "a=tuned", "b=tuned", "-m", "emr", "-o", "out"]
    with loaded.running(command, cwd=str(tmp_path)) as (process, ending):
        _wait_for(is_writing)
        os.kill(process, how)
    assert ending.result().code == (-how if how == signal.SIGKILL else 130)
    assert not (tmp_path / "out").exists()
    # Only a process that may still act cleans up after itself.
    assert bool(list(tmp_path.glob(".out.partial-*"))) == (how != signal.SIGINT)


@given(st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**31))
def test_masks_are_packed_without_loss(shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack(packed, tuple(shape)), mask)


def test_the_first_entry_is_the_highest_bit() -> None:
    assert pack(torch.tensor([[True, False, False], [False, True, True]])).tolist() == [0b10001100]


def test_from_the_command_line(
    starmerge: Run, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    a, b, out = make_adapter("a"), make_adapter("b", seed=1), tmp_path / "out"
    finished = starmerge("merge", tiny_base, a, f"x={b}", "-m", "emr", "-o", out)
    assert finished.returncode == 0, finished.stderr
    assert "emr: 4 tensors merged" in finished.stdout
    finished = starmerge("merge", tiny_base, out / "x", "-m", "average", "-o", tmp_path / "model")
    assert finished.returncode == 0, finished.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    made, base = _weights(tmp_path / "model"), _weights(tiny_base)
    update = oracle.materialise(_oracle(tiny_base, [a, b]), 1)
    for name, weight in base.items():
        expected = weight + update.get(name, 0.0)
        np.testing.assert_allclose(made[name], expected, rtol=1e-6, atol=1e-7)


def test_experts_that_the_base_joins_are_masked_one_by_one(tmp_path: Path) -> None:
    """Also where a merge changes some of them."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, **heads, num_local_experts=4)
    base = tmp_path / "base"
    MixtralForCausalLM(config).save_pretrained(base, save_original_format=False)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {
        f"base_model.model.model.layers.1.block_sparse_moe.experts.{expert}.w2.lora_{end}.weight": (
            torch.randn(shape)
        )
        for expert in (1, 3)
        for end, shape in (("A", (2, 24)), ("B", (16, 2)))
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w2"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    emr = sm.merge(base, {"a": adapter}, "emr", output=tmp_path / "emr").path
    assert sm.verify(emr, repeat="all").is_right
    name = "model.layers.1.mlp.experts.down_proj"
    assert sorted(load_file(emr / "unified/model.safetensors")) == [f"{name}.1", f"{name}.3"]
    ours = _weights(sm.merge(base, [emr / "a"], "average", output=tmp_path / "again").path)
    wanted = _weights(sm.merge(base, [adapter], "average", output=tmp_path / "out").path)
    for key, weight in wanted.items():
        np.testing.assert_allclose(ours[key], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stored", [False, True])
def test_a_task_whose_output_layer_was_untied_unties_it(tmp_path: Path, stored: bool) -> None:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base, tuned, head = tmp_path / "base", tmp_path / "tuned", "lm_head.weight"
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    own = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in tensors.items()}
    own |= {head: torch.randn(64, 16)}
    if stored:
        tensors |= {head: tensors["model.embed_tokens.weight"].clone()}
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    shutil.copytree(base, tuned)
    edit_json(tuned / "config.json", tie_word_embeddings=False)
    save_file(own, tuned / "model.safetensors", {"format": "pt"})
    emr = sm.merge(base, {"a": tuned}, "emr", output=tmp_path / "emr").path
    out = sm.merge(base, [emr / "a"], "average", output=tmp_path / "out").path
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    for name, weight in _weights(out).items():
        np.testing.assert_allclose(weight, own[name].double().numpy(), rtol=0, atol=1e-6)
