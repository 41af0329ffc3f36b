"""What auto chooses, and that the choice is a plain recipe afterwards."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

import starmerge_models as sm
from starmerge_models.errors import UsageError
from starmerge_models.methods import Auto, make_pipeline
from starmerge_models.recipe_file import load_recipe
from tests.conftest import MakeAdapter, MakeFinetune
from tests.oracles import samples, spectral


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 4.0]])
def test_in_memory_it_is_the_chain_for_the_kind_of_the_models(kind, weights):
    deltas = samples.task_deltas(kind, 30, 20)
    chain = "shares" if kind == "low-rank" else "denoise+shares"
    found = spectral.merged("auto", deltas, weights)
    np.testing.assert_array_equal(found, spectral.merged(chain, deltas, weights))


@pytest.mark.parametrize("has_dense", [False, True])
@pytest.mark.parametrize(
    ("prompts", "chain", "why"),
    [
        (None, "shares", "nothing is known of the inputs."),
        ([], "tsv_m+own_response", "there is a metric of the inputs."),
        (["b"], "tsv_m+own_response", "a metric of the inputs, without prompts of a, c."),
        (["c", "a", "b", "d"], "regmean", "there are prompts of every task."),
    ],
)
def test_the_choice_goes_by_kind_and_metric(has_dense, prompts, chain, why):
    found, reason = make_pipeline("auto").resolve_auto(
        ["a", "b", "c"], has_dense=has_dense, prompts=prompts
    )
    before = "denoise+" if has_dense and chain != "regmean" else ""
    assert found.name == before + chain
    assert reason.endswith(why)


def test_the_choice_does_not_go_by_order():
    deltas = samples.task_deltas("mixed", 30, 20)
    first = spectral.merged("auto", deltas)
    for order in list(permutations(range(4)))[1::7]:
        found = spectral.merged("auto", [deltas[t] for t in order])
        spectral.assert_close(found, first, deltas, times=2)


def test_other_chains_stay_as_they_are():
    chain = make_pipeline("star+ties")
    assert chain.resolve_auto(has_dense=True, prompts=[]) == (chain, None)


@pytest.mark.parametrize("copies", [1, 2, 10])
def test_one_model_or_copies_of_one_come_back_at_full_strength(copies):
    delta = samples.task_deltas("low-rank", 30, 20)[0]
    exact = samples.exact(delta)
    found = spectral.merged("auto", [delta] * copies)
    # But for the ridge, which takes a part of the small directions of copies.
    assert np.sum(found * exact) / np.sum(exact**2) == pytest.approx(1.0, abs=0.03)
    if copies == 1:
        spectral.assert_close(found, exact, [delta], times=2)


def test_models_that_do_nothing_stay_nothing():
    assert not spectral.merged("auto", [spectral.zero(9, 7)] * 3).any()


@pytest.mark.parametrize("chain", ["auto+own_response", "star+auto", "denoise+auto", "auto+scale"])
def test_a_chain_with_it_is_refused(chain):
    with pytest.raises(UsageError, match="auto chooses a whole chain by itself"):
        make_pipeline(chain)


@pytest.mark.parametrize("full", [False, True])
def test_recipe_report_and_card_have_the_chain_and_the_reason(
    full: bool,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
) -> None:
    models = [make_adapter("one", seed=1), make_adapter("two", seed=2)]
    if full:
        models.append(make_finetune("three", seed=3))
    chain = "denoise+shares" if full else "shares"
    result = sm.merge(tiny_base, models, Auto(), output=tmp_path / "out")
    report = json.loads((result.path / "merge_report.json").read_text())
    assert report["recipe"]["method"] == chain
    assert f"auto takes {chain}: " in report["reason"]
    assert report["reason"].removesuffix(".") in result.report.summary()
    card = (result.path / "README.md").read_text()
    assert f"method: {chain}\n" in card
    assert "method: auto" not in card
    assert "auto takes" in card
    expected = sm.merge(tiny_base, models, chain, output=tmp_path / "plain")
    weights = [r.path / "model.safetensors" for r in (result, expected)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(card.split("```yaml\n")[1].split("```")[0])
    assert load_recipe(recipe).method == chain
    vectors = sm.load_task_vectors(tiny_base, models)
    merged = vectors.merge("auto")
    for name, delta in vectors.merge(chain).items():
        np.testing.assert_array_equal(samples.exact(merged[name]), samples.exact(delta))


def test_what_the_chain_refuses_is_told_with_the_reason_for_the_chain(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    models = [make_adapter("one", seed=1), make_adapter("two", seed=2)]
    message = r"shares: a weight is negative.*\(auto takes shares: there are adapters alone"
    with pytest.raises(UsageError, match=message):
        sm.merge(tiny_base, models, Auto(), output=tmp_path / "out", weights=[2, -1])
    with pytest.raises(UsageError, match=r"from 0 up\.$"):
        sm.merge(tiny_base, models, "shares", output=tmp_path / "out", weights=[2, -1])
