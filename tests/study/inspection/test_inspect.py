"""Inspecting files of tiny models: tables, findings, merges, the folder, the command."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import starmerge_models as sm
from starmerge_models.cli.inspect import inspect as command
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.study.inspection_files import write_inspection
from tests.conftest import MakeFinetune
from tests.oracles import inspection as oracle
from tests.study.inspection.adapters import scaled, write_adapter, write_adapters


@pytest.fixture
def adapters(tiny_base: Path, tmp_path: Path) -> dict[str, Path]:
    return write_adapters(tmp_path, tiny_base)


def dense(base: Path, models: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    """Return the float64 task vectors by model and tensor."""
    deltas = sm.load_task_vectors(base, models).deltas
    return {
        name: {tensor: delta.to_dense().double().numpy() for tensor, delta in own.items()}
        for name, own in deltas.items()
    }


def topics(found: sm.Inspection) -> list[str]:
    return [finding.topic for finding in found.findings]


def test_tables_of_models_and_pairs_are_those_of_the_whole_task_vectors(
    tiny_base: Path, adapters: dict[str, Path]
) -> None:
    found = sm.inspect(tiny_base, adapters, eta=50)
    taus = dense(tiny_base, adapters)
    base = load_file(tiny_base / "model.safetensors")

    models = found.to_frame("models").set_index("model")
    assert models["tensors"].to_dict() == {"one": 4, "two": 4, "three": 8}
    norms = {name: np.sqrt(sum(np.sum(t**2) for t in own.values())) for name, own in taus.items()}
    for name, own in taus.items():
        row = models.loc[name]
        assert row["norm"] == pytest.approx(norms[name], rel=1e-5)
        weights = np.sqrt(sum(float(base[tensor].double().square().sum()) for tensor in own))
        assert row["relative_norm"] == pytest.approx(norms[name] / weights, rel=1e-5)
        others = [norm for other, norm in norms.items() if other != name]
        assert row["times_others"] == pytest.approx(norms[name] / np.median(others), rel=1e-5)
        kept = [oracle.kept_rank(tau.round(7), 50) for tau in own.values()]
        assert row["kept"] == np.mean(kept)
        nuclear = sum(np.linalg.svd(tau, compute_uv=False).sum() for tau in own.values())
        assert row["nuclear"] == pytest.approx(nuclear, rel=1e-4)
    assert models["rank"].to_dict() == {"one": 3, "two": 4, "three": 2}
    assert models.loc["one", "apart"] == 0
    mlp = sum(np.sum(t**2) for tensor, t in taus["three"].items() if "mlp" in tensor)
    assert models.loc["three", "apart"] == pytest.approx(mlp / norms["three"] ** 2, rel=1e-5)

    conflicts = found.to_frame("conflicts").set_index(["a", "b"])
    assert list(conflicts.index) == [("one", "two"), ("one", "three"), ("two", "three")]
    for a, b in conflicts.index:
        row, shared = conflicts.loc[a, b], taus[a].keys() & taus[b].keys()
        inner = sum(np.sum(taus[a][t] * taus[b][t]) for t in shared)
        assert row["cosine"] == pytest.approx(inner / norms[a] / norms[b], abs=1e-6)
        assert row["tensors"] == len(shared) == 4
        own = sum(oracle.response(tau, tau) for tau in taus[b].values())
        response = sum(oracle.response(taus[a][t], taus[b][t]) for t in shared)
        assert row["a_on_b"] == pytest.approx(np.sqrt(response / own), rel=1e-4)
        along = sum(oracle.along(taus[a][t], taus[b][t]) for t in shared)
        assert row["a_along_b"] == pytest.approx(along / own, abs=1e-5)
        products = np.concatenate([(taus[a][t] * taus[b][t]).ravel() for t in sorted(shared)])
        signs = np.abs(products[products < 0]).sum() / np.abs(products).sum()
        assert row["sign_conflict"] == pytest.approx(signs, abs=1e-5)

    # A third of what a task meets comes of each other one, squared.
    onto = [conflicts.loc[("one", "two"), "b_on_a"], conflicts.loc[("one", "three"), "b_on_a"]]
    assert models.loc["one", "others_on_it"] == pytest.approx(np.hypot(*onto))


def test_tables_of_tensors(tiny_base: Path, adapters: dict[str, Path]) -> None:
    found = sm.inspect(tiny_base, adapters)
    tensors, pairs, layers = map(found.to_frame, ("tensors", "pairs", "layers"))
    assert len(tensors) == 4 + 4 + 8
    assert set(tensors["module"]) == {"q_proj", "v_proj", "up_proj", "down_proj"}
    assert set(tensors["layer"]) == {0, 1}
    assert "spectrum" not in tensors
    assert len(pairs) == 4 * 3  # no pair where one task alone changes a tensor
    assert (pairs["a_reach_on_b"] <= pairs["a_bound_on_b"] * (1 + 1e-9)).all()
    assert len(layers) == 2 * 4
    assert layers["energy_share"].sum() == pytest.approx(1)
    alone = layers[layers["module"] == "up_proj"]
    assert alone["conflict"].isna().all()
    spectra = found.to_frame("spectra")
    last = spectra.groupby(["tensor", "model"])["cumulative"].max()
    np.testing.assert_allclose(last, 1)
    own = tensors.set_index(["tensor", "model"]).sort_index()
    assert (spectra.groupby(["tensor", "model"])["index"].max() == own["rank"]).all()
    # STAR keeps as many as reach η.
    reached = spectra[spectra["cumulative"] >= 0.4].groupby(["tensor", "model"])["index"].min()
    assert (reached == own["kept"]).all()


def test_what_is_found_does_not_depend_on_threads_or_memory(
    tiny_base: Path, adapters: dict[str, Path]
) -> None:
    one = sm.inspect(tiny_base, adapters, methods="star", threads=1)
    two = sm.inspect(tiny_base, adapters, methods="star", threads=2, memory=1)
    assert one.to_json() == two.to_json()
    json.dumps(one.to_json(), allow_nan=False)


def test_merges_in_memory_and_merged_files_keep_the_same(
    tiny_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    chain = sm.Star(eta=60)
    sm.merge(tiny_base, adapters, chain, weights=[1, 2, 1], output=tmp_path / "merged")
    sm.merge(
        None, adapters, chain, weights=[1, 2, 1], output=tmp_path / "lora", output_kind="adapter"
    )
    found = sm.inspect(
        tiny_base,
        adapters,
        methods=[chain, "average"],
        weights=[1, 2, 1],
        merged={"model": tmp_path / "merged", "lora": tmp_path / "lora"},
    )
    kept = found.to_frame("kept").set_index(["merge", "model"])
    columns = ["coefficient", "own", "others", "error", "inside"]
    for merge in ("model", "lora"):
        np.testing.assert_allclose(
            kept.loc[merge, columns], kept.loc["star:eta=60", columns], atol=1e-5
        )
    taus = dense(tiny_base, adapters)
    weights = {"one": 1, "two": 2, "three": 1}
    names = sorted({tensor for own in taus.values() for tensor in own})
    for model, own in taus.items():
        merged = {
            tensor: sum(weights[m] * t[tensor] for m, t in taus.items() if tensor in t) / 4
            for tensor in names
        }
        inner = sum(np.sum(merged[tensor] * tau) for tensor, tau in own.items())
        energy = sum(np.sum(tau**2) for tau in own.values())
        assert kept.loc[("average", model), "coefficient"] == pytest.approx(
            inner / energy, abs=1e-5
        )
    by_tensor = found.to_frame("kept_tensors")
    assert len(by_tensor) == 4 * len(found.tensors)
    assert "| model" in found.report
    assert "star:eta=60" in found.report


def test_a_merge_that_leaves_a_tensor_alone_keeps_nothing_of_it(
    tiny_base: Path, adapters: dict[str, Path]
) -> None:
    found = sm.inspect(tiny_base, [adapters["three"]], merged={"m": adapters["one"]})
    kept = found.to_frame("kept_tensors").set_index("tensor")
    assert (kept.loc[kept.index.str.contains("mlp"), ["own", "others"]] == 0).all(axis=None)


def test_one_model_has_no_pairs(tiny_base: Path, adapters: dict[str, Path]) -> None:
    found = sm.inspect(tiny_base, adapters["one"], methods="average")
    assert found.names == ["one"]
    assert found.conflicts == found.pairs == []
    assert found.models[0]["times_others"] is None
    assert found.kept[0]["own"] == pytest.approx(1)
    assert found.to_frame("pairs").empty
    assert "a on b" not in found.report


def test_full_fine_tunes_beside_adapters(
    tiny_base: Path, adapters: dict[str, Path], make_finetune: MakeFinetune
) -> None:
    models = {"full": make_finetune("full"), "one": adapters["one"]}
    found = sm.inspect(tiny_base, models, methods="star")
    tensors = found.to_frame("tensors").set_index(["model", "module"])
    full = tensors.loc["full"]
    # Tables of tokens and vectors have no spectrum, as spectral methods average them.
    assert full.loc[["embed_tokens", "lm_head", "norm"], "kept"].isna().all()
    assert full.loc["q_proj", "kept"].notna().all()
    assert full["norm"].gt(0).all()
    (pair,) = found.conflicts
    assert pair["tensors"] == 4
    kinds = found.to_frame("models")["kind"].tolist()
    assert kinds[0] != kinds[1]
    assert all(kind in found.report for kind in kinds)
    json.dumps(found.to_json(), allow_nan=False)


def test_findings_name_a_model_that_is_larger_than_the_others(
    tiny_base: Path, adapters: dict[str, Path]
) -> None:
    assert "size" not in topics(sm.inspect(tiny_base, adapters))
    scaled(adapters["one"], 1.95)
    assert "size" not in topics(sm.inspect(tiny_base, adapters))
    scaled(adapters["one"], 2.06 / 1.95)
    found = sm.inspect(tiny_base, adapters)
    (finding,) = (finding for finding in found.findings if finding.topic == "size")
    assert finding.models == ("one",)
    assert "one is 2.1 times as large as the others" in finding.text
    # The weight that is advised makes it as large as the others are.
    weight = float(finding.advice.partition("-w one=")[2].split(",")[0])  # type: ignore[union-attr]
    norms = {record["model"]: record["norm"] for record in found.models}
    assert weight * norms["one"] == pytest.approx(np.median(list(norms.values())), rel=0.02)
    (finding,) = (
        finding
        for finding in sm.inspect(
            tiny_base, [adapters["one"], scaled(adapters["two"], 0.1)]
        ).findings
        if finding.topic == "size"
    )
    assert finding.models == ("one", "two")


def test_findings_name_pairs_that_are_the_same_or_opposed(tiny_base: Path, tmp_path: Path) -> None:
    a, b, c = (write_adapter(tmp_path / name, tiny_base, 4, seed=1) for name in "abc")
    scaled(c, -1.0)
    found = sm.inspect(tiny_base, [a, b, c])
    texts = [finding.text for finding in found.findings if finding.topic == "pair"]
    assert any("a and b are nearly the same model" in text for text in texts)
    assert any("a and c oppose each other (cosine -1.00" in text for text in texts)
    assert any("c on a 1.00" in text or "a on c 1.00" in text for text in texts)
    assert any("share their input directions" in text for text in texts)
    assert not any("No pair clashes" in text for text in texts)


def test_findings_name_tasks_that_change_nothing(
    tiny_base: Path, adapters: dict[str, Path]
) -> None:
    scaled(adapters["two"], 0.0)
    found = sm.inspect(tiny_base, adapters)
    assert found.findings[0].topic == "nothing"
    assert found.findings[0].models == ("two",)
    assert found.conflicts[0]["cosine"] is None
    assert len(found.pairs) == 4
    json.dumps(found.to_json(), allow_nan=False)


def test_findings_tell_what_rounding_eats(
    tiny_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "bfloat16"
    base.mkdir()
    (base / "config.json").write_text((tiny_base / "config.json").read_text())
    tensors = load_file(tiny_base / "model.safetensors")
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    scaled(adapters["one"], 1e-3)
    found = sm.inspect(base, adapters, any_base=True)
    (finding,) = (finding for finding in found.findings if finding.topic == "rounding")
    assert finding.models == ("one",)
    assert "bfloat16" in finding.text
    assert "--dtype float32" in (finding.advice or "")
    assert found.dtype == "bfloat16"
    assert "rounding" not in topics(sm.inspect(tiny_base, adapters))


def test_findings_tell_which_task_a_merge_leaves_behind(
    tiny_base: Path, adapters: dict[str, Path]
) -> None:
    found = sm.inspect(tiny_base, adapters, methods="average", weights=[1, 1, 0.1])
    texts = [finding.text for finding in found.findings if finding.topic == "kept"]
    assert any(
        text.startswith("average: three is weakened more than the others.") for text in texts
    )
    assert not any("one suffers" in text for text in texts)


def test_findings_tell_where_tasks_clash_most(tiny_base: Path, tmp_path: Path) -> None:
    a, b = (write_adapter(tmp_path / name, tiny_base, 4, seed=ord(name)) for name in "ab")
    same = load_file(a / "adapter_model.safetensors")
    other = load_file(b / "adapter_model.safetensors")
    # In one module the two do the same.
    other |= {name: tensor for name, tensor in same.items() if "v_proj" in name}
    save_file(other, b / "adapter_model.safetensors")
    found = sm.inspect(tiny_base, [a, b])
    (finding,) = (finding for finding in found.findings if finding.topic == "layers")
    assert "v_proj" in finding.text
    assert "q_proj" not in finding.text
    layers = found.to_frame("layers").set_index("module")
    assert layers.loc["v_proj", "conflict"].to_numpy() == pytest.approx(1)
    assert layers.loc["v_proj", "overlap_out"].to_numpy() == pytest.approx(1)


def test_repr_and_html_fit_and_escape(tiny_base: Path, adapters: dict[str, Path]) -> None:
    found = sm.inspect(tiny_base, {"<b>one": adapters["one"], "two": adapters["two"]})
    assert repr(found).startswith("<Inspection of <b>one, two: 4 tensors, η = 40>")
    assert len(repr(found).splitlines()) <= 11
    html = found._repr_html_()
    assert "&lt;b&gt;one" in html
    assert "<b>one" not in html
    with pytest.raises(UsageError, match="no table 'tensor'"):
        found.to_frame("tensor")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0}, "eta is 0"),
        ({"eta": 101}, "eta is 101"),
        ({"methods": ["star", sm.Star()]}, "star is given twice"),
        ({"methods": "emr"}, "makes a model for each task"),
        ({"methods": "regmean"}, "needs a metric"),
        ({"methods": "average", "weights": [1]}, "1 weights for 3 models"),
        ({"methods": "average", "merged": {"average": "here"}}, "Two merges are called 'average'"),
        ({"merged": {"one": "here"}}, "two models are called 'one'"),
        ({"memory": "much"}, "memory is 'much'"),
    ],
)
def test_wrong_requests(
    tiny_base: Path, adapters: dict[str, Path], options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sm.inspect(tiny_base, adapters, **options)  # type: ignore[arg-type]


def test_broken_inputs(tiny_base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    scaled(adapters["two"], float("nan"))
    with pytest.raises(StarmergeError, match=r"two.*has a NaN or an infinity"):
        sm.inspect(tiny_base, adapters)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 4] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StarmergeError, match=r"base.*layers\.1\.self_attn\.q_proj.*has a NaN"):
        sm.inspect(base, adapters["one"], any_base=True)


def test_the_command_writes_a_folder_and_prints_json(
    tiny_base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    starmerge: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    folder = tmp_path / "inspected"
    options = ("-m", "star:eta=20", "-w", "two=2", "-o", folder, "--json", "--eta", "30")
    run = starmerge("inspect", tiny_base, *adapters.values(), *options)
    assert run.returncode == 0, run.stderr
    printed = json.loads(run.stdout)
    assert printed == json.loads((folder / "inspection.json").read_text())
    assert printed["eta"] == 30
    expected = sm.inspect(tiny_base, adapters, eta=30, methods=sm.Star(eta=20), weights=[1, 2, 1])
    assert printed["models"] == expected.models
    assert printed["kept"] == expected.kept
    tables = {
        "models",
        "conflicts",
        "layers",
        "tensors",
        "pairs",
        "spectra",
        "kept",
        "kept_tensors",
    }
    images = {
        f"{name}.{end}"
        for name in ("ranks", "spectra", "conflicts", "kept")
        for end in ("png", "pdf")
    }
    assert {file.name for file in folder.iterdir()} == (
        {f"{table}.csv" for table in tables} | images | {"inspection.json", "report.md"}
    )
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "ranks.pdf").read_bytes().startswith(b"%PDF")
    pairs = pd.read_csv(folder / "pairs.csv")
    pd.testing.assert_frame_equal(pairs, expected.to_frame("pairs"), check_dtype=False)
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_inspection(folder, expected)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds mine\.txt"):
        write_inspection(folder, expected, overwrite=True)
    (folder / "mine.txt").unlink()
    one = sm.inspect(tiny_base, adapters["one"])
    write_inspection(folder, one, overwrite=True)
    assert not (folder / "pairs.csv").exists()
    assert (folder / "report.md").read_text() == f"{one.report}\n"


def test_the_command_refuses_what_means_nothing(tiny_base: Path, adapters: dict[str, Path]) -> None:
    one = str(adapters["one"])
    with pytest.raises(UsageError, match="--weight is for the merges of --method"):
        command(str(tiny_base), [one], weight=["one=2"])
    with pytest.raises(UsageError, match="no model is called 'two'"):
        command(str(tiny_base), [one], method=["average"], weight=["two=2"])
    with pytest.raises(UsageError, match="Two models have the same name"):
        command(str(tiny_base), [one, one])
