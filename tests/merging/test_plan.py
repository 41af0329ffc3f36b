"""Plans: everything that can be refused is refused before a tensor is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from starmerge_models.checkpoints.tensors import Checkpoint
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.plan import Plan, make_plan
from starmerge_models.recipe import make_recipe
from starmerge_models.storage.local_folder import LocalFolder
from tests.conftest import MakeAdapter, MakeFinetune, edit_json


def _plan(base: Path, models: list[Path], output: Path, **options: Any) -> Plan:
    content = {"base": str(base), "models": [str(model) for model in models]} | options
    return make_plan(make_recipe(content), output)


def test_counts_what_will_be_read_and_written(
    tiny_base: Path, make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    adapter, tuned = make_adapter("adapter"), make_finetune("tuned")
    weights = sum(t.nbytes for t in load_file(tiny_base / "model.safetensors").values())
    factors = sum(t.nbytes for t in load_file(adapter / "adapter_model.safetensors").values())
    beside = (tiny_base / "generation_config.json").stat().st_size

    plan = _plan(tiny_base, [adapter], tmp_path / "out")
    assert (len(plan.tensors), len(plan.merged)) == (21, 4)
    assert plan.bytes_to_read == weights + factors
    assert plan.bytes_to_write == weights + beside

    plan = _plan(tiny_base, [adapter, tuned], tmp_path / "out", dtype="bfloat16")
    assert len(plan.merged) == 21
    assert plan.bytes_to_read == 2 * weights + factors
    assert plan.bytes_to_write == weights // 2 + beside


def test_reads_no_tensor(
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [make_adapter("adapter"), make_finetune("tuned")]

    def forbidden(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "read", forbidden)
    monkeypatch.setattr(Checkpoint, "copy", forbidden)
    assert _plan(tiny_base, models, tmp_path / "out").memory(1, 1) > 0
    assert not (tmp_path / "out").exists()


def test_refuses_to_write_over_an_input(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter("adapter")
    recipe = make_recipe({"base": str(tiny_base), "models": [str(adapter)]})
    for place in (tiny_base, adapter, tmp_path):
        with pytest.raises(UsageError, match="is no merged model and is not overwritten"):
            make_plan(recipe, place, overwrite=True)
    (tmp_path / "merge_report.json").write_text(
        json.dumps({"files": LocalFolder(tmp_path).names()})
    )
    with pytest.raises(UsageError, match="is, holds or lies in the input"):
        make_plan(recipe, tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="not empty.*--overwrite"):
        make_plan(recipe, adapter)


def test_one_of_two_tied_tensors_that_is_changed_alone_is_untied(
    tiny_base: Path, make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    adapter = make_adapter("adapter", target_modules=["lm_head"])
    base, tuned = make_finetune("base", scale=0.0), make_finetune("tuned")
    for folder in (base, tuned):
        edit_json(folder / "config.json", tie_word_embeddings=True)
    plan = _plan(base, [adapter], tmp_path / "out")
    assert [tensor.source.name for tensor in plan.merged] == ["lm_head.weight"]
    assert plan.base.config["tie_word_embeddings"] is False
    assert "lm_head.weight is no longer tied to model.embed_tokens.weight" in plan.notes[0]
    plan = _plan(base, [tuned], tmp_path / "out")
    assert (len(plan.merged), plan.notes) == (21, ())
    assert plan.base.config["tie_word_embeddings"] is True


def test_refuses_places_that_do_not_exist(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such|does not exist"):
        _plan(tiny_base, [tmp_path / "gone"], tmp_path / "out")
    with pytest.raises(UsageError, match="is a file"):
        _plan(tiny_base, [tiny_base / "config.json"], tmp_path / "out")


def test_refuses_a_weight_that_cannot_be_merged(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter("adapter")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((tiny_base / "config.json").read_text())
    tensors = load_file(tiny_base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(StarmergeError, match=r"q_proj\.weight is stored in torch\.float8_e4m3fn"):
        _plan(base, [adapter], tmp_path / "out")


def test_two_adapters_that_save_whole_modules_need_the_base(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    saving = [make_adapter(f"a{seed}", seed=seed, modules_to_save=["lm_head"]) for seed in range(2)]
    plain = make_adapter("plain", seed=3)
    alone = {"models": [str(path) for path in saving], "output": {"kind": "adapter"}}
    with pytest.raises(UsageError, match=r"modules_to_save.*lm_head\.weight.*Give the base"):
        make_plan(make_recipe(alone), tmp_path / "out")
    for models in (saving, [saving[0], plain]):
        recipe = make_recipe({"base": str(tiny_base), "models": [str(path) for path in models]})
        merged = make_plan(recipe, tmp_path / "out").merged
        assert "lm_head.weight" in {tensor.source.name for tensor in merged}


@pytest.mark.parametrize("url", ["https://host/out", "ftp://host/out"])
def test_a_url_becomes_no_folder(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, url: str, monkeypatch: Any
) -> None:
    adapter = make_adapter("a")
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    content = {"base": str(tiny_base), "models": [str(adapter)]}
    with pytest.raises(UsageError, match="is a URL, and this output is written to a folder"):
        make_plan(make_recipe(content), Path(url))
    with pytest.raises(UsageError, match="is a URL, and models are read from"):
        make_plan(make_recipe(content | {"models": [url]}), tmp_path / "out")
    assert set(tmp_path.iterdir()) == before
