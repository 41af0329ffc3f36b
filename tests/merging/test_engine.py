"""Merges from files to files: values against the oracles, reports, failures that leave nothing."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from blake3 import blake3
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import starmerge_models as sm
from starmerge_models.recipe_file import load_recipe
from tests.conftest import MakeAdapter, MakeFinetune, edit_json
from tests.oracles import star as oracle

# A process started in the background of a shell ignores SIGINT unless told otherwise.
_RUN = """if True:
    import os, signal, sys
    import starmerge_models as sm
    from starmerge_models.merging import engine

    signal.signal(signal.SIGINT, signal.default_int_handler)
    children = []
    for output in sys.argv[1:]:
        if not (child := os.fork()):
            sm.merge("base", ["adapter"], output=output)
            os._exit(0)
        children.append(child)
    print(*children, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
"""Merges in forks, all at the same moment; prints their processes, and then their exit codes."""


def _weights(folder: Path) -> dict[str, np.ndarray]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def _updates(adapter: Path, scale: float) -> dict[str, np.ndarray]:
    factors = load_file(adapter / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace(".lora_A", ""): scale
        * factors[key.replace("lora_A", "lora_B")].double().numpy()
        @ tensor.double().numpy()
        for key, tensor in factors.items()
        if ".lora_A." in key
    }


def test_star_on_adapters_agrees_with_the_oracle(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    paths = [make_adapter(f"a{seed}", seed=seed, lora_alpha=3 + seed) for seed in range(3)]
    result = sm.merge(tiny_base, paths, sm.Star(eta=60), output=tmp_path / "out")
    base, merged = _weights(tiny_base), _weights(result.path)
    updates = [_updates(path, (3 + seed) / 4) for seed, path in enumerate(paths)]
    for name, weight in base.items():
        expected = weight
        if name in updates[0]:
            expected = weight + oracle.star([update[name] for update in updates], eta=60)
        assert np.allclose(merged[name], expected, rtol=0, atol=3e-6 * np.abs(weight).max()), name


def test_star_on_mixed_models_truncates_matrices_and_averages_vectors_and_embeddings(
    tiny_base: Path, make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    adapter, tuned = make_adapter("adapter"), make_finetune("tuned")
    result = sm.merge(tiny_base, [adapter, tuned], "star", output=tmp_path / "out")
    base, full, merged = _weights(tiny_base), _weights(tuned), _weights(result.path)
    updates = _updates(adapter, 2.0)
    for name, weight in base.items():
        delta = (full[name].astype(np.float32) - weight.astype(np.float32)).astype(np.float64)
        if delta.ndim == 1 or name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected = delta / 2
        elif name in updates:
            expected = oracle.star([updates[name], delta], eta=40)
        else:
            expected = oracle.star([delta], eta=40) / 2
        assert np.allclose(merged[name] - weight, expected, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("method", "factor"), [(sm.Average(), 1 / 2), (sm.TaskArithmetic(alpha=0.7), 0.7)]
)
def test_sums_of_full_fine_tunes(
    tiny_base: Path,
    make_finetune: MakeFinetune,
    tmp_path: Path,
    method: sm.Method,
    factor: float,
) -> None:
    paths = [make_finetune("a", seed=1), make_finetune("b", seed=2)]
    result = sm.merge(tiny_base, paths, method, output=tmp_path / "out")
    base, merged = _weights(tiny_base), _weights(result.path)
    tuned = [_weights(path) for path in paths]
    for name, weight in base.items():
        expected = weight + factor * sum(full[name] - weight for full in tuned)
        assert np.allclose(merged[name], expected, rtol=1e-6, atol=1e-7), name


def test_what_no_model_changes_keeps_its_bytes_and_the_files_beside_it(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    result = sm.merge(tiny_base, [make_adapter("adapter")], output=tmp_path / "out")
    before = load_file(tiny_base / "model.safetensors")
    after = load_file(result.path / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {record["name"] for record in result.report.tensors}
    name = "generation_config.json"
    assert (result.path / name).read_bytes() == (tiny_base / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_chosen_dtype_is_written_and_declared(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    result = sm.merge(
        tiny_base, [make_adapter("adapter")], output=tmp_path / "out", dtype="bfloat16"
    )
    exact = sm.merge(tiny_base, [tmp_path / "adapter"], output=tmp_path / "exact")
    rounded = load_file(result.path / "model.safetensors")
    for name, tensor in load_file(exact.path / "model.safetensors").items():
        assert torch.equal(rounded[name], tensor.bfloat16()), name
    model = AutoModelForCausalLM.from_pretrained(result.path, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_every_tensor_is_aligned_in_its_file(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((tiny_base / "config.json").read_text())
    tensors = load_file(tiny_base / "model.safetensors")
    tensors |= {"a.bytes": torch.ones(3).byte(), "b.odd": torch.ones(5), "z.ids": torch.arange(3)}
    save_file(tensors, base / "model.safetensors")
    result = sm.merge(base, [make_adapter("a")], output=tmp_path / "out", dtype="bfloat16")
    file = result.path / "model.safetensors"
    length = struct.unpack("<Q", file.read_bytes()[:8])[0]
    header = json.loads(file.read_bytes()[8 : 8 + length])
    merged = load_file(file)
    for name, tensor in merged.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0, name
    assert torch.equal(merged["z.ids"], tensors["z.ids"])
    assert torch.equal(merged["a.bytes"], tensors["a.bytes"])
    assert merged["b.odd"].dtype == torch.bfloat16


def test_base_in_shards_or_in_bin_files_gives_the_same_merge(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text((tiny_base / "config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    expected = load_file(
        sm.merge(tiny_base, [adapter], output=tmp_path / "0").path / "model.safetensors"
    )
    for kind in ("sharded", "bin"):
        result = sm.merge(tmp_path / kind, [adapter], output=tmp_path / f"{kind}-out")
        merged = load_file(result.path / "model.safetensors")
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], expected[name]) for name in merged)
        assert not list(result.path.glob("*.index.json"))


def _contents(file: Path) -> str:
    """The hash of a file's tensors, as docs/recipes.md defines it."""
    lines = ""
    for name, tensor in sorted(load_file(file).items()):
        raw = blake3(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        lines += json.dumps([name, str(tensor.dtype), list(tensor.shape), raw]) + "\n"
    return blake3(lines.encode()).hexdigest()


def test_report_says_what_happened(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    paths = {"x": make_adapter("a", seed=1), "y": make_adapter("b", seed=2)}
    result = sm.merge(tiny_base, paths, sm.Star(eta=50), output=tmp_path / "out")
    report = json.loads((result.path / "merge_report.json").read_text())
    assert report == result.report.content
    assert report["recipe"]["parameters"]["eta"] == 50
    assert [entry["name"] for entry in report["inputs"]] == ["base", "x", "y"]
    config = blake3((paths["y"] / "adapter_config.json").read_bytes()).hexdigest()
    assert report["inputs"][2]["blake3"] == {"adapter_config.json": config}
    for given, folder, file in (
        (report["inputs"][0], tiny_base, "model.safetensors"),
        (report["inputs"][2], paths["y"], "adapter_model.safetensors"),
    ):
        assert given["tensors"] == {file: _contents(folder / file)}
    assert len(report["tensors"]) == 4
    updates = _updates(paths["x"], 2.0)
    for record in report["tensors"]:
        assert 0.999 < record["survived"] <= 1
        task = record["tasks"][0]
        sigma = np.linalg.svd(updates[record["name"]], compute_uv=False)
        assert task["model"] == "x"
        assert task["rank"] == oracle.kept_rank(sigma, 50)
        assert task["nuclear_before"] == pytest.approx(sigma.sum(), rel=1e-6)
        assert task["nuclear_after"] == pytest.approx(sigma.sum(), rel=1e-6)
        assert task["factor"] == pytest.approx(sigma.sum() / sigma[: task["rank"]].sum(), rel=1e-6)


def test_card_has_the_recipe_that_repeats_the_merge(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    result = sm.merge(
        tiny_base, [make_adapter("adapter")], sm.Star(rank=2), output=tmp_path / "out"
    )
    card = ModelCard.load(result.path / "README.md")
    assert card.data.tags == ["merge", "starmerge"]
    text = card.text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(text)["parameters"]["rank"] == 2
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    again = sm.merge(
        recipe.base,
        {entry.name: entry.path for entry in recipe.models},
        recipe.make_pipeline(),
        output=tmp_path / "again",
    )
    first, second = (path / "model.safetensors" for path in (result.path, again.path))
    assert first.read_bytes() == second.read_bytes()


def test_name_of_the_base_does_not_stick_to_the_merge(
    tiny_base: Path, make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    base = make_finetune("named", scale=0.0)
    edit_json(base / "config.json", _name_or_path="tests/tiny")
    result = sm.merge(base, [make_adapter("adapter")], output=tmp_path / "out")
    assert "_name_or_path" not in json.loads((result.path / "config.json").read_text())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_the_tensor_with_a_nan_and_leaves_nothing(
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
    value: float,
) -> None:
    def damage(file: Path, name: str) -> None:
        tensors = load_file(file)
        tensors[name].view(-1)[3] = value
        save_file(tensors, file, metadata={"format": "pt"})

    name = "model.layers.1.self_attn.v_proj"
    adapter, tuned, base = make_adapter("adapter"), make_finetune("tuned"), make_finetune("base")
    healthy = make_adapter("healthy")
    damage(adapter / "adapter_model.safetensors", f"base_model.model.{name}.lora_B.weight")
    damage(tuned / "model.safetensors", "model.norm.weight")
    damage(base / "model.safetensors", f"{name}.weight")
    for where, models, words in [
        (tiny_base, [adapter], [str(adapter), f"{name}.weight"]),
        (tiny_base, [tuned], [str(tuned), "model.norm.weight"]),
        (base, [healthy], [str(base), f"{name}.weight"]),
        (base, [make_finetune("healthy-too")], [str(base), f"{name}.weight"]),
    ]:
        with pytest.raises(sm.StarmergeError, match="NaN or an infinity") as error:
            sm.merge(where, models, output=tmp_path / "out")
        assert all(word in str(error.value) for word in words)
        assert not any("out" in path.name for path in tmp_path.iterdir())


def test_overflow_of_the_output_dtype_is_an_error(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter("adapter", lora_alpha=10_000_000)
    with pytest.raises(sm.StarmergeError, match=r"overflows torch\.float16.*--dtype"):
        sm.merge(tiny_base, [adapter], output=tmp_path / "out", dtype="float16")


def test_overflow_of_what_no_model_changes_is_an_error(
    tiny_base: Path, make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    base = make_finetune("base", scale=0.0)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(sm.StarmergeError, match=r"model\.norm\.weight overflows torch\.float16"):
        sm.merge(base, [make_adapter("a")], output=tmp_path / "out", dtype="float16")


def _big_base(folder: Path, *, tensors: int, megabytes: int) -> None:
    """Write a base whose config names no architecture, so that no process asks transformers."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    rows = megabytes * 2**20 // 4 // 1024
    weights = {f"layers.{n}.weight": torch.full((rows, 1024), n / 8) for n in range(tensors)}
    save_file(weights, folder / "model.safetensors")


def _big_adapter(folder: Path, *, tensors: int, megabytes: int) -> None:
    folder.mkdir()
    rows = megabytes * 2**20 // 4 // 1024
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for n in range(tensors):
        prefix = f"base_model.model.layers.{n}.lora"
        factors[f"{prefix}_A.weight"] = torch.randn(4, 1024, generator=generator)
        factors[f"{prefix}_B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["0"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


_PRESSED = """if True:
    import json, os, resource, sys, threading
    import starmerge_models as sm
    from starmerge_models.merging import engine, ranks

    def press(method, models, options, allowance):
        lines = open("/proc/self/status").read().splitlines()
        now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (now + allowance, now + allowance))
        sm.merge("big", models, method, threads=2, memory=15 * 2**20, **options)

    sm.merge("warm", ["warm-adapter"], output="warm-out", threads=2)
    codes = []
    for case in json.load(sys.stdin):
        if not (child := os.fork()):
            try:
                press(*case)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))
"""
"""Merges in forks, each with an allowance of bytes beyond those after a merge of one tensor."""

_MIB = 2**20
_STACKS = 4 * 8 * _MIB
"""Threads have stacks of 8 MiB, which count too."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc of Linux")
def test_merges_stay_within_their_memory_when_the_system_gives_no_more(
    tmp_path: Path,
) -> None:
    """Models of 144 MiB in tensors of 4 MiB: more than any of the allowances."""
    count = 36
    _big_base(tmp_path / "big", tensors=count, megabytes=4)
    _big_base(tmp_path / "warm", tensors=1, megabytes=4)
    _big_adapter(tmp_path / "adapter", tensors=count, megabytes=4)
    _big_adapter(tmp_path / "warm-adapter", tensors=1, megabytes=4)
    full = [f"tuned-{number}" for number in (1, 2)]
    for name in full:
        (tmp_path / name).symlink_to(tmp_path / "big")
    low_rank = {"output_kind": "adapter", "rank": 2}
    cases = [
        ("star", ["adapter"], {"output": "out-0"}, _STACKS + 40 * _MIB),
        ("average", full, {"output": "out-1"}, _STACKS + 75 * _MIB),
        ("ties", full, {"output": "out-2"}, _STACKS + 75 * _MIB),
        ("star", ["adapter"], {"output": "out-3"} | low_rank, _STACKS + 40 * _MIB),
        ("ties", full, {"output": "out-4"} | low_rank | {"rank": 4}, _STACKS + 110 * _MIB),
    ]
    finished = subprocess.run(
        [sys.executable, "-c", _PRESSED],
        cwd=tmp_path,
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
    )
    assert json.loads(finished.stdout) == [0] * len(cases), finished.stderr[-2000:]
    for n, (_, _, options, _) in enumerate(cases):
        written = load_file(next((tmp_path / f"out-{n}").glob("*model.safetensors")))
        assert len(written) == (2 * count if "rank" in options else count)


def test_a_killed_merge_leaves_no_output_folder(tmp_path: Path) -> None:
    _big_base(tmp_path / "base", tensors=40, megabytes=4)
    _big_adapter(tmp_path / "adapter", tensors=40, megabytes=4)
    signals = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT}
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, *(how.name for how in signals)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        children = dict(zip(signals, map(int, process.stdout.readline().split()), strict=True))
        until = time.monotonic() + 60
        while children:
            assert time.monotonic() < until
            for how, child in list(children.items()):
                files = list(tmp_path.glob(f".{how.name}.partial-*/model.safetensors"))
                if files and files[0].stat().st_size > 20 * _MIB:
                    os.kill(child, how)
                    del children[how]
            time.sleep(0.005)
        codes = process.stdout.read().split()
    assert len(codes) == len(signals)
    assert "0" not in codes
    for how in signals:
        assert not (tmp_path / how.name).exists()
        # Only a process that may still act cleans up after itself.
        partial = list(tmp_path.glob(f".{how.name}.partial-*"))
        assert bool(partial) == (how != signal.SIGINT)
