"""LiNeS against its float64 reference, over models with layers, in memory and from files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import starmerge_models as sm
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.in_memory import merge_all, merge_state
from starmerge_models.methods import Deltas, Lines, TensorContext, make_method, make_pipeline
from tests.oracles import bounds, lines, own_response, samples
from tests.products import one_in

LAYERS = {
    "encoder.0.q": (0, 3),
    "encoder.1.q": (1, 3),
    "encoder.2.q": (2, 3),
    "decoder.0.q": (0, 2),
    "decoder.1.bias": (1, 2),
    "pooler.0.q": (0, 1),
}
SHAPES = dict.fromkeys([*LAYERS, "embed"], (12, 9)) | {"decoder.1.bias": (7,), "norm": (9,)}
MERGES = ["task_arithmetic", "ties", "tsv_m"]
WEIGHTS = [1.0, 0.5, 2.0, 0.0]


def models(kind, dtype=torch.float32):
    """Four tasks of a model with two stacks of layers, one of them not in every task's."""
    made = [{} for _ in range(4)]
    for number, (name, shape) in enumerate(SHAPES.items()):
        seed = 100 * number
        if len(shape) == 1:
            deltas = [samples.dense(*shape, seed=seed + t, dtype=dtype) for t in range(4)]
        else:
            deltas = samples.task_deltas(kind, *shape, seed=seed, dtype=dtype)
        for model, delta in zip(made, deltas, strict=True):
            if kind != "low-rank" or len(shape) > 1:
                model[name] = delta
    del made[1]["encoder.1.q"], made[2]["embed"], made[3]["encoder.1.q"]
    return made


def run(deltas, method, parameters=None, weights=None, layers=LAYERS):
    """What a chain makes of models whose layers are known."""
    pipeline = make_pipeline(method, parameters)
    weights = tuple(weights or [1.0] * len(deltas))
    tasks = tuple(map(str, range(len(deltas))))
    names = [name for name in SHAPES if any(name in model for model in deltas)]

    def inputs(name):
        members = {t: model[name] for t, model in enumerate(deltas) if name in model}
        context = TensorContext(name, SHAPES[name], False, tasks, weights, layer=layers.get(name))
        return Deltas.of(members), context

    pipeline.check(tasks, weights, names)
    pipeline.check_tensors([inputs(name)[1] for name in names], [])
    with Threads(1) as workers:
        return merge_all(pipeline, names, inputs, workers)


def exact(model, like):
    """The arrays of a model by name, zeros where it has no delta."""
    return {
        name: samples.exact(model[name]) if name in model else np.zeros(delta.shape)
        for name, delta in like.items()
    }


def slope_error(deltas, weights):
    """Relative error of alpha: entries of Σ w_t τ_t meet T sums, scale, weight and a rounding."""
    found = {}
    for w, model in zip(weights, deltas, strict=True):
        for name, delta in model.items():
            found[name] = found.get(name, 0.0) + abs(w) * bounds.magnitude(delta)
    signed = {}
    for w, model in zip(weights, deltas, strict=True):
        for name, delta in model.items():
            signed[name] = signed.get(name, 0.0) + w * samples.exact(delta)
    return (
        bounds.gamma(len(deltas) + 5, bounds.U32) * lines.one_norm(found) / lines.one_norm(signed)
    )


def assert_is_lines(deltas, merge, parameters, weights=None):
    merged = run(deltas, merge, weights=weights)
    named = {f"lines.{key}": value for key, value in parameters.items()}
    found = run(deltas, f"{merge}+lines", named, weights)
    M, tau = exact(merged, merged), [exact(model, merged) for model in deltas]
    expected = lines.lines(tau, M, LAYERS, weights, **parameters)
    weights = weights or [1.0] * len(deltas)
    # The norm of the stored merge is one of its entries: a rounding each.
    unknown = 0.0 if "alpha" in parameters else slope_error(deltas, weights) + 2 * bounds.U32
    alpha, _ = lines.slope(tau, M, weights, **parameters)
    for name, delta in found.items():
        stored = bounds.gamma(2, bounds.U32) if isinstance(delta, Dense) else 1e-12
        # β is 1 − α where it is not given: both move by α's error.
        error = np.abs(samples.exact(delta) - expected[name])
        assert np.all(error <= stored * np.abs(expected[name]) + alpha * unknown * np.abs(M[name]))


@pytest.mark.parametrize(
    ("kind", "dtype", "weights", "merge", "parameters"),
    one_in(
        3,
        samples.KINDS,
        samples.DTYPES,
        [None, WEIGHTS],
        MERGES,
        [{}, {"beta": 0.4}, {"alpha": 0.3}],
    ),
)
def test_lines_is_the_reference(kind, dtype, weights, merge, parameters):
    assert_is_lines(models(kind, dtype), merge, parameters, weights)


def test_given_factors_are_those_of_the_layers():
    deltas = models("dense")
    merged = run(deltas, "average")
    found = run(deltas, "average+lines", {"alpha": 0.25, "beta": 0.5})
    factors = {
        "encoder.0.q": 0.25,
        "encoder.1.q": 0.5,
        "encoder.2.q": 0.75,
        "decoder.0.q": 0.25,
        "decoder.1.bias": 0.75,
        "pooler.0.q": 0.25,
        "embed": 0.25,
        "norm": 0.25,
    }
    assert found.keys() == factors.keys()
    for name, factor in factors.items():
        np.testing.assert_allclose(
            samples.exact(found[name]), factor * samples.exact(merged[name]), rtol=1e-6
        )


@pytest.mark.parametrize("kind", samples.KINDS)
def test_by_default_the_last_layer_keeps_the_merge_and_the_first_is_as_strong_as_the_average(kind):
    deltas = models(kind)
    merged, mean = run(deltas, "task_arithmetic"), run(deltas, "average")
    found = run(deltas, "task_arithmetic+lines")
    np.testing.assert_allclose(
        samples.exact(found["encoder.2.q"]), samples.exact(merged["encoder.2.q"]), rtol=1e-6
    )
    # α is 1/(0.4 T): the first layers of a sum are those of the average.
    for name in ("encoder.0.q", "decoder.0.q", "embed"):
        np.testing.assert_allclose(
            samples.exact(found[name]), samples.exact(mean[name]), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("kind", samples.KINDS)
def test_after_the_average_nothing_changes(kind):
    deltas = models(kind)
    merged, found = run(deltas, "average"), run(deltas, "average+lines")
    for name, delta in merged.items():
        np.testing.assert_allclose(
            samples.exact(found[name]), samples.exact(delta), rtol=1e-5, atol=1e-6
        )


def test_the_scale_of_the_merge_is_that_of_the_deep_layers_alone():
    deltas = models("low-rank")
    weak = run(deltas, "task_arithmetic+lines", {"task_arithmetic.alpha": 0.5})
    strong = run(deltas, "task_arithmetic+lines", {"task_arithmetic.alpha": 2.0})
    for name, factor in (("encoder.0.q", 1.0), ("embed", 1.0), ("encoder.2.q", 4.0)):
        np.testing.assert_allclose(
            samples.exact(strong[name]), factor * samples.exact(weak[name]), rtol=1e-5, atol=1e-6
        )


def test_a_merge_that_is_weaker_than_the_average_is_not_made_weaker_with_depth():
    found = run(models("dense"), "task_arithmetic+lines", {"task_arithmetic.alpha": 0.05})
    mean = run(models("dense"), "average")
    for name, delta in mean.items():
        np.testing.assert_allclose(
            samples.exact(found[name]), samples.exact(delta), rtol=1e-5, atol=1e-6
        )


def test_what_is_low_rank_stays_so():
    found = run(models("low-rank"), "task_arithmetic+lines")
    assert all(isinstance(delta, LowRank) for delta in found.values())


def test_one_task_is_itself_and_an_alpha_weakens_its_first_layers():
    deltas = models("dense")[:1]
    for name, delta in run(deltas, "average+lines").items():
        np.testing.assert_allclose(samples.exact(delta), samples.exact(deltas[0][name]), rtol=1e-6)
    found = run(deltas, "average+lines", {"alpha": 0.5})
    for name, factor in (("encoder.0.q", 0.5), ("encoder.1.q", 0.75), ("encoder.2.q", 1.0)):
        np.testing.assert_allclose(
            samples.exact(found[name]), factor * samples.exact(deltas[0][name]), rtol=1e-6
        )


@pytest.mark.parametrize(
    "zero", [LowRank(torch.zeros(12, 2), torch.ones(2, 9)), Dense(torch.zeros(12, 9))]
)
def test_zeros_stay_zero(zero):
    found = run([{"encoder.1.q": zero, "embed": zero}] * 2, "average+lines")
    assert not any(samples.exact(delta).any() for delta in found.values())
    # And one task of zeros counts in T.
    deltas = [{"encoder.1.q": samples.low_rank(12, 9, 2)}, {"encoder.1.q": zero}]
    assert_is_lines(deltas, "task_arithmetic", {})


def test_weights_that_sum_to_zero_are_refused():
    deltas = models("low-rank")
    with pytest.raises(UsageError, match="lines: the weights sum to zero.*give alpha"):
        run(deltas, "task_arithmetic+lines", weights=[0.1, 0.2, -0.3, 0.0])
    run(deltas, "task_arithmetic+lines", {"lines.alpha": 0.5}, [0.1, 0.2, -0.3, 0.0])


def test_without_layers_it_is_refused():
    with pytest.raises(
        UsageError, match="lines: no tensor .* belong to a layer.*load_task_vectors"
    ):
        merge_state([{"layers.0.q": samples.low_rank(9, 7, 2)}], "average+lines")
    with pytest.raises(UsageError, match="lines: no tensor"):
        run(models("dense"), "average+lines", layers={})


@pytest.mark.parametrize("parameters", [{"alpha": -0.1}, {"beta": -1}, {"alpha": "auto"}])
def test_parameters_out_of_range_are_refused(parameters):
    with pytest.raises(UsageError, match=next(iter(parameters))):
        make_method("lines", parameters)
    assert make_method("lines") == Lines(alpha=None, beta=None)


def test_files_are_scaled_by_their_layers_and_the_report_has_the_factors(
    tiny_base, make_adapter, make_finetune, tmp_path
):
    chosen = {"a": make_adapter("a", seed=1), "b": make_finetune("b", seed=3)}
    sm.merge(tiny_base, chosen, "task_arithmetic", output=tmp_path / "plain")
    sm.merge(tiny_base, chosen, "task_arithmetic+lines", output=tmp_path / "scaled")
    report = json.loads((tmp_path / "scaled" / "merge_report.json").read_text())
    alpha, beta = (report["findings"]["lines"][key] for key in ("alpha", "beta"))
    # α of 0.4 Σ τ_t is 1/(0.4 · 2), which leaves nothing to add.
    assert alpha == pytest.approx(1.25, rel=1e-6)
    assert beta == 0.0
    chain = make_pipeline("task_arithmetic+lines", {"lines.alpha": 0.5, "lines.beta": 2.0})
    sm.merge(tiny_base, chosen, chain, output=tmp_path / "given")
    base, plain, given = (
        load_file(folder / "model.safetensors")
        for folder in (tiny_base, tmp_path / "plain", tmp_path / "given")
    )
    for name, factor in (
        ("model.layers.0.self_attn.v_proj.weight", 0.5),
        ("model.layers.1.mlp.down_proj.weight", 2.5),
        ("model.embed_tokens.weight", 0.5),
        ("model.norm.weight", 0.5),
    ):
        update = factor * (plain[name].double() - base[name].double())
        np.testing.assert_allclose(given[name].double() - base[name].double(), update, atol=1e-6)


def test_task_vectors_in_memory_have_layers_too(tiny_base, make_adapter):
    chosen = {"a": make_adapter("a", seed=1), "b": make_adapter("b", seed=2)}
    vectors = sm.load_task_vectors(tiny_base, chosen)
    plain = vectors.merge("average")
    found = vectors.merge(make_pipeline("average+lines", {"alpha": 0.5}))
    for name, factor in (
        ("model.layers.0.self_attn.v_proj.weight", 0.5),
        ("model.layers.1.self_attn.v_proj.weight", 1.0),
    ):
        expected = factor * samples.exact(plain[name])
        np.testing.assert_allclose(samples.exact(found[name]), expected, rtol=1e-12, atol=1e-15)


def test_own_response_after_it_sets_the_scale():
    deltas = models("low-rank")
    found = run(deltas, "task_arithmetic+lines+own_response")
    tau, M = [exact(model, found) for model in deltas], exact(found, found)
    mean = own_response.mean_response(tau, M)
    assert mean == pytest.approx(len(deltas) ** (-1 / 8), rel=1e-6)
