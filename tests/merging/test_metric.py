"""Merges with a metric, from files: what is written, what is told, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import starmerge_models as sm
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.hashing import blake3_of
from starmerge_models.checkpoints.metric import Metric
from starmerge_models.checkpoints.models import open_model
from starmerge_models.checkpoints.source import resolve
from starmerge_models.checkpoints.tensors import Checkpoint
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.fold import fold
from starmerge_models.merging.plan import Plan, make_plan
from starmerge_models.recipe import make_recipe
from starmerge_models.recipe_file import load_recipe
from starmerge_models.spectral.metric import Inputs
from tests.calibration.tiny import store
from tests.conftest import MakeAdapter, MakeFinetune, MakeMetric
from tests.merge_one import merge_one
from tests.oracles import samples

_Q = "model.layers.0.self_attn.q_proj.weight"
_V = "model.layers.1.self_attn.v_proj.weight"
_WHITENED = ["star", "tsv_m", "iso_c", "shares", "covariance+own_response", "star+ties", "star+emr"]


@pytest.fixture
def adapters(make_adapter: MakeAdapter) -> dict[str, Path]:
    """Return two adapters of different ranks and targets."""
    return {
        "one": make_adapter("one", seed=1),
        "two": make_adapter("two", seed=2, r=2, target_modules=["v_proj", "down_proj"]),
    }


def _inputs(metric: Metric, name: str, tasks: list[str]) -> Inputs:
    return Inputs(metric.side(name), lambda t: metric.moment(name, None if t is None else tasks[t]))


@pytest.mark.parametrize("method", ["star", "tsv_m", "regmean", "star+regmean"])
def test_files_and_memory_agree(
    method: str,
    tiny_base: Path,
    adapters: dict[str, Path],
    make_finetune: MakeFinetune,
    make_metric: MakeMetric,
    tmp_path: Path,
) -> None:
    models = adapters | {"full": make_finetune("full", seed=3)}
    tasks, weights = list(models), [1.0, 2.0, 0.5]
    file = make_metric(tasks=tasks)
    result = sm.merge(
        tiny_base, models, method, output=tmp_path / "out", weights=weights, metric=file
    )
    merged = load_file(result.path / "model.safetensors")
    base, metric = open_base(resolve(tiny_base)), sm.open_metric(file)
    opened = [open_model(key, resolve(path), base) for key, path in models.items()]
    for name in base.checkpoint:
        weight = base.checkpoint.read(name)
        # Those that change the tensor first, as merge_one wants it.
        order = sorted(range(3), key=lambda t: name not in opened[t].tensors)
        deltas = [opened[t].delta(name, weight) for t in order if name in opened[t].tensors]
        known = metric.has(name)
        if method.endswith("regmean") and not known:
            expected = merge_one("average", deltas, weights=[weights[t] for t in order], tasks=3)
        else:
            expected = merge_one(
                method,
                deltas,
                tasks=3,
                weights=[weights[t] for t in order],
                shape=tuple(weight.shape),
                base=weight,
                is_embedding=base.is_embedding(name),
                inputs=_inputs(metric, name, [tasks[t] for t in order]) if known else None,
            )
        folded = fold(weight, expected.delta, torch.float32).weight
        difference = float((merged[name] - folded).abs().max())
        assert difference <= 1e-5 * float(weight.abs().max()), name
    plain = sm.merge(tiny_base, models, "average", output=tmp_path / "plain", weights=weights)
    assert not torch.equal(load_file(plain.path / "model.safetensors")[_Q], merged[_Q])


@pytest.mark.parametrize("method", [*_WHITENED[:-1], "regmean", "star+regmean"])
def test_task_vectors_and_threads_give_the_same_bytes(
    method: str,
    tiny_base: Path,
    adapters: dict[str, Path],
    make_metric: MakeMetric,
    tmp_path: Path,
) -> None:
    file = make_metric(tasks=list(adapters))
    vectors = sm.load_task_vectors(tiny_base, adapters)
    weights = load_file(tiny_base / "model.safetensors")
    written = [
        sm.merge(tiny_base, adapters, method, output=tmp_path / str(n), metric=file, threads=n)
        for n in (1, 3)
    ]
    first, second = ((done.path / "model.safetensors").read_bytes() for done in written)
    assert first == second
    merged = load_file(written[0].path / "model.safetensors")
    for metric in (file, str(file), sm.open_metric(file)):
        update = vectors.merge(method, metric=metric)
        for name, delta in update.items():
            assert torch.equal(fold(weights[name], delta, torch.float32).weight, merged[name])
    plain = vectors.merge("star" if "regmean" in method else method)
    assert any(not torch.equal(update[n].to_dense(), plain[n].to_dense()) for n in update)


def test_a_weight_stored_the_other_way_round_is_merged_as_its_transpose(tmp_path: Path) -> None:
    """GPT-2 stores its matrices as (in, out)."""
    base = store("gpt2", tmp_path / "base")
    models = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=3,
            target_modules=["c_attn", "c_fc"],
            fan_in_fan_out=True,
            init_lora_weights=False,
        )
        model = AutoModelForCausalLM.from_pretrained(base)
        get_peft_model(model, config).save_pretrained(tmp_path / name, save_embedding_layers=False)
        models[name] = tmp_path / name
    texts = tmp_path / "texts.txt"
    texts.write_text("w5 w6 w7 w8 w9\nw9 w8 w7 w20 w30 w40\nw11 w12\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"input": f"w{n} w{n + 7} w{3 * n}"}) + "\n" for n in (5, 9))
    )
    file = tmp_path / "metric.safetensors"
    sm.calibrate(base, file, texts=texts, prompts={"one": rows, "two": texts_rows(tmp_path)})
    metric, opened = sm.open_metric(file), open_base(resolve(base))
    for method in ("tsv_m", "regmean", "star"):
        result = sm.merge(
            base, models, method, output=tmp_path / method, metric=file, any_base=True
        )
        merged = load_file(result.path / "model.safetensors")
        tuned = [open_model(k, resolve(p), opened, any_base=True) for k, p in models.items()]
        names = sorted(tuned[0].tensors)
        assert names
        for name in names:
            assert metric.side(name) == "rows"
            weight = opened.checkpoint.read(name)
            deltas = [model.delta(name, weight) for model in tuned]
            turned = [
                sm.LowRank(d.A.T, d.B.T, d.scale) for d in deltas if isinstance(d, sm.LowRank)
            ]
            read = _inputs(metric, name, list(models)).read
            expected = merge_one(method, turned, inputs=Inputs("columns", read)).delta.to_dense().T
            update = merged[name].double() - weight.double()
            atol = 1e-6 * float(weight.abs().max() + expected.abs().max())
            np.testing.assert_allclose(update.numpy(), expected.numpy(), rtol=0, atol=atol)


def texts_rows(folder: Path) -> Path:
    """Return a file of prompts."""
    file = folder / "others.jsonl"
    file.write_text("".join(json.dumps({"input": f"w{n} w{n + 1}"}) + "\n" for n in (30, 44, 60)))
    return file


def test_report_card_and_recipe_tell_of_the_metric(
    tiny_base: Path, adapters: dict[str, Path], make_metric: MakeMetric, tmp_path: Path
) -> None:
    file = make_metric(tasks=[*adapters, "three"])
    result = sm.merge(tiny_base, adapters, "tsv_m", output=tmp_path / "out", metric=file)
    assert "; merged in whitened inputs (metric.safetensors)" in result.report.summary()
    content = json.loads((result.path / "merge_report.json").read_text())
    assert content["recipe"]["metric"] == str(file)
    assert content["metric"] == {
        "file": "metric.safetensors",
        "use": "whitened inputs",
        "made_from": {"kind": "texts"},
        "unused_prompts": [],
    }
    assert content["inputs"][-1] == {
        "name": "metric.safetensors",
        "kind": "metric",
        "reference": str(file),
        "hub_id": None,
        "revision": None,
        "blake3": {"metric.safetensors": blake3_of(file)},
        "tensors": {},
    }
    card = (result.path / "README.md").read_text()
    assert "made by starmerge with the moments of inputs in `metric.safetensors`" in card
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(card.partition("```yaml\n")[2].partition("```")[0])
    again = make_plan(load_recipe(recipe), tmp_path / "again")
    assert again.metric is not None
    assert again.metric.file == file

    summary = sm.merge(
        tiny_base, adapters, "regmean", output=tmp_path / "regmean", metric=file
    ).report.summary()
    assert "; merged in the tasks' own inputs (metric.safetensors)" in summary
    assert "The metric's prompts of three are of no model that is merged" in summary

    plain = sm.merge(tiny_base, adapters, "tsv_m", output=tmp_path / "plain").report
    assert plain.content["metric"] is None
    assert "metric" not in plain.summary()
    assert "without data and without training" in (tmp_path / "plain" / "README.md").read_text()


def test_a_recipes_metric_lies_beside_it(
    tiny_base: Path, adapters: dict[str, Path], make_metric: MakeMetric, tmp_path: Path
) -> None:
    make_metric()
    recipe = tmp_path / "recipe.yaml"
    models = [str(path) for path in adapters.values()]
    content = {"base": str(tiny_base), "models": models, "metric": "metric.safetensors"}
    recipe.write_text(yaml.safe_dump(content))
    assert load_recipe(recipe).metric == str(tmp_path / "metric.safetensors")


@pytest.mark.parametrize("method", _WHITENED)
def test_every_chain_with_a_method_that_uses_it_takes_a_metric(
    method: str, tiny_base: Path, adapters: dict[str, Path], make_metric: MakeMetric, tmp_path: Path
) -> None:
    plan = _plan(tiny_base, adapters, tmp_path / "out", method, make_metric())
    measured = {tensor.source.name for tensor in plan.tensors if tensor.metric}
    assert measured == {tensor.source.name for tensor in plan.merged}
    plain = _plan(tiny_base, adapters, tmp_path / "out", method, None)
    assert plan.memory(1, 1) >= plain.memory(1, 1) + 24 * 32**2


def _plan(
    base: Path, models: dict[str, Path], output: Path, method: str, metric: Path | None
) -> Plan:
    content: dict[str, Any] = {"base": str(base), "method": method}
    content["models"] = [{"name": name, "path": str(path)} for name, path in models.items()]
    if metric is not None:
        content["metric"] = str(metric)
    return make_plan(make_recipe(content), output)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no tensor be read."""

    def forbidden(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "read", forbidden)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("method", ["average", "ties", "dare+task_arithmetic", "ace", "denoise"])
def test_a_metric_that_no_method_uses_is_refused(
    method: str, tiny_base: Path, adapters: dict[str, Path], make_metric: MakeMetric, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"has no use for a metric.*iso_c.*regmean.*star.*tsv_m"):
        _plan(tiny_base, adapters, tmp_path / "out", method, make_metric())


@pytest.mark.usefixtures("unread")
def test_a_metric_without_a_merged_matrix_is_refused(
    tiny_base: Path, adapters: dict[str, Path], make_metric: MakeMetric, tmp_path: Path
) -> None:
    lacking = make_metric(without=[_V])
    with pytest.raises(UsageError, match=rf"no moment of the inputs of {_V}, which.*calibrate"):
        _plan(tiny_base, adapters, tmp_path / "out", "tsv_m", lacking)
    several = make_metric(
        without=[
            n.source.name for n in _plan(tiny_base, adapters, tmp_path / "out", "star", None).merged
        ]
    )
    with pytest.raises(UsageError, match=r"no moment of .*q_proj.* and 3 more, which"):
        _plan(tiny_base, adapters, tmp_path / "out", "star", several)
    # A tensor that no model changes needs none.
    _plan(tiny_base, adapters, tmp_path / "out", "star", make_metric(without=["lm_head.weight"]))


def test_embeddings_of_full_finetunes_need_a_moment_only_where_they_are_merged(
    tiny_base: Path, make_finetune: MakeFinetune, make_metric: MakeMetric, tmp_path: Path
) -> None:
    models, metric = {"full": make_finetune("full")}, make_metric()
    plan = _plan(tiny_base, models, tmp_path / "out", "star+tsv_m", metric)
    plain = {t.source.name for t in plan.merged if t.metric is None}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= plain
    recipe = {
        "base": str(tiny_base),
        "models": [str(models["full"])],
        "method": "tsv_m",
        "parameters": {"embeddings": "merge"},
        "metric": str(metric),
    }
    with pytest.raises(UsageError, match=r"inputs of model.embed_tokens.weight"):
        make_plan(make_recipe(recipe), tmp_path / "out")


@pytest.mark.usefixtures("unread")
def test_an_adapter_on_embeddings_needs_their_moment_which_no_metric_has(
    tiny_base: Path, make_adapter: MakeAdapter, make_metric: MakeMetric, tmp_path: Path
) -> None:
    models = {"one": make_adapter("one", target_modules=["q_proj", "embed_tokens"])}
    for method in ("star", "tsv_m"):
        with pytest.raises(UsageError, match=r"inputs of model.embed_tokens.weight"):
            _plan(tiny_base, models, tmp_path / "out", method, make_metric())


@pytest.mark.parametrize("full", [False, True])
def test_auto_goes_by_the_prompts_of_the_metric(
    full: bool,
    tiny_base: Path,
    adapters: dict[str, Path],
    make_finetune: MakeFinetune,
    make_metric: MakeMetric,
    tmp_path: Path,
) -> None:
    models = {**adapters, **({"full": make_finetune("full", seed=3)} if full else {})}
    whitened = "denoise+tsv_m+own_response" if full else "tsv_m+own_response"
    for tasks, chain, why in (
        ([], whitened, "there is a metric of the inputs."),
        (["two"], whitened, f"without prompts of one{', full' if full else ''}."),
        ([*models], "regmean", "there are prompts of every task."),
    ):
        metric = make_metric(tasks=tasks, name=f"{len(tasks)}.safetensors")
        plan = _plan(tiny_base, models, tmp_path / "out", "auto", metric)
        assert plan.pipeline.name == chain
        assert plan.reason is not None
        assert plan.reason.endswith(why)
        vectors = sm.load_task_vectors(tiny_base, models)
        merged = vectors.merge("auto", metric=metric)
        for name, delta in vectors.merge(chain, metric=metric).items():
            np.testing.assert_array_equal(samples.exact(merged[name]), samples.exact(delta))


@pytest.mark.usefixtures("unread")
def test_regmean_without_what_it_needs_is_refused(
    tiny_base: Path, adapters: dict[str, Path], make_metric: MakeMetric, tmp_path: Path
) -> None:
    for metric, message in (
        (None, r"regmean: it needs the moments of each task.*--prompts"),
        (make_metric(), r"regmean needs.*without prompts of tasks: there are none for one, two"),
        (
            make_metric(tasks=["one", "three"], name="others.safetensors"),
            r"has prompts of one, three alone: there are none for two\. Name the models",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            _plan(tiny_base, adapters, tmp_path / "out", "regmean", metric)
    lacking = make_metric(tasks=["one", "two"], without=[_V])
    with pytest.raises(UsageError, match=rf"inputs in the prompts of one of {_V}"):
        _plan(tiny_base, adapters, tmp_path / "out", "regmean", lacking)
    plan = _plan(
        tiny_base, adapters, tmp_path / "out", "regmean", make_metric(tasks=["two", "x", "one"])
    )
    assert plan.unused_prompts == ["x"]


def test_a_metric_of_another_base_or_of_none_is_refused(
    tiny_base: Path,
    adapters: dict[str, Path],
    make_finetune: MakeFinetune,
    make_metric: MakeMetric,
    tmp_path: Path,
) -> None:
    other = make_metric(base=make_finetune("other"))
    with pytest.raises(UsageError, match="was made from other, and the weights of .* are others"):
        _plan(tiny_base, adapters, tmp_path / "out", "tsv_m", other)
    with pytest.raises(UsageError, match="is no file. A metric is what"):
        _plan(tiny_base, adapters, tmp_path / "out", "tsv_m", tmp_path / "none.safetensors")
    weights = tiny_base / "model.safetensors"
    with pytest.raises(UsageError, match="is no metric file"):
        _plan(tiny_base, adapters, tmp_path / "out", "tsv_m", weights)
    vectors = sm.load_task_vectors(tiny_base, adapters)
    with pytest.raises(UsageError, match="are others"):
        vectors.merge("tsv_m", metric=other)
    with pytest.raises(UsageError, match="has no use for a metric"):
        vectors.merge("ties", metric=make_metric())


@pytest.mark.parametrize("method", ["tsv_m", "regmean"])
def test_a_nan_in_the_metric_ends_the_merge_and_leaves_nothing(
    method: str, tiny_base: Path, adapters: dict[str, Path], make_metric: MakeMetric, tmp_path: Path
) -> None:
    file = make_metric(tasks=list(adapters))
    checkpoint = load_file(file)
    metadata = _metadata(file)
    for tensor in checkpoint.values():
        tensor[0, 0] = float("nan")
    save_file(checkpoint, file, metadata=metadata)
    with pytest.raises(StarmergeError, match=r"metric.safetensors: the moment of .* has a NaN"):
        sm.merge(tiny_base, adapters, method, output=tmp_path / "out", metric=file)
    assert not list(tmp_path.glob("*out*"))


def _metadata(file: Path) -> dict[str, str]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return dict(json.loads(stream.read(size))["__metadata__"])
