"""DARE against its float64 reference, its randomness, and the properties that define it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import starmerge_models
from starmerge_models import merge_state
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.errors import UsageError
from starmerge_models.methods import Dare, TensorContext, make_pipeline
from starmerge_models.methods.dare import Draws, kept
from starmerge_models.methods.kinds import entrywise
from tests.oracles import bounds, dare, models, samples
from tests.oracles.ties import ties

CHANCE = 1e-9
"""With which a test of statistics would fail, were its seed not fixed."""


def drop(x, *, p=0.5, seed=0, name="w", tasks=("law",), task=0):
    """What DARE leaves of a task vector."""
    delta = x if isinstance(x, Dense | LowRank) else Dense(torch.as_tensor(x))
    context = TensorContext(name, delta.shape, False, tuple(tasks), (1.0,) * len(tasks))
    return Dare(p=p, seed=seed).apply(delta, task, context, None)[0].to_dense().numpy()


def masks(given, p, seed=0):
    """The reference's masks of models in memory, which are called 0, 1 and so on."""
    return [
        {
            name: dare.kept(p, seed, str(t), name, x.size).reshape(x.shape)
            for name, x in task.items()
        }
        for t, task in enumerate(models.entries(given))
    ]


def dropped(given, p, seed=0):
    """The reference's task vectors after DARE."""
    tasks = zip(models.entries(given), masks(given, p, seed), strict=True)
    return [dare.dare(task, p, keep) for task, keep in tasks]


def test_the_reference_generator_gives_its_authors_numbers():
    """From the known answers of Random123, the library of the paper."""
    assert dare.philox(0, 0) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert dare.philox(2**256 - 1, 2**128 - 1) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 2.0**-32, 1 - 2.0**-32])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 250])
def test_the_mask_is_that_of_the_reference(p, count):
    found = kept(p, 7, "law", "layers.0.weight", count)
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found.numpy(), dare.kept(p, 7, "law", "layers.0.weight", count))


def test_an_entry_stays_if_its_number_is_p_and_not_if_it_is_below():
    for place, number in enumerate(dare.numbers(0, "law", "w", 8)):
        stays = [kept((number + step) / 2**32, 0, "law", "w", 8)[place] for step in (-1, 0, 0.75)]
        assert stays == [True, True, False]


def test_the_first_entries_that_stay_are_these():
    """A changed generator or key would change every merge."""
    bits = np.packbits(kept(0.5, 0, "law", "w", 64).numpy()).tobytes().hex()
    assert bits == "300706ffe7724913"
    found = kept(0.9, 2**70, "Recht & Gesetz, §1", "ebene.0", 64).numpy()
    assert np.packbits(found).tobytes().hex() == "0000328201000408"


@pytest.mark.parametrize("p", [0.5, 0.25, 0.9])
@pytest.mark.parametrize("dtype", samples.DTYPES)
@pytest.mark.parametrize("kind", samples.KINDS)
def test_dare_is_the_reference(kind, dtype, p):
    given = models.models(kind, dtype=dtype)
    for t, expected in enumerate(dropped(given, p)):
        weights = [float(task == t) for task in range(4)]
        parameters = {"p": p, "alpha": 1}
        merged = models.merge(given, "dare+task_arithmetic", parameters, weights)
        for name, want in expected.items():
            # 1 - p is rounded to float32, then the quotient.
            np.testing.assert_allclose(
                merged[name], want, rtol=bounds.gamma(2, bounds.U32), atol=0, err_msg=name
            )


@samples.SEARCH
@given(models.many(max_tasks=3), st.sampled_from([0.5, 0.75]), st.integers(0, 2**40), st.data())
def test_every_shape_dtype_seed_and_weight(given, p, seed, data):
    weights = data.draw(st.tuples(*[st.sampled_from([1.0, 2.0, 0.0, -0.5])] * len(given)))
    parameters = {"p": p, "seed": seed, "alpha": 1}
    merged = models.merge(given, "dare+task_arithmetic", parameters, weights)
    tasks = dropped(given, p, seed)
    expected = {
        name: sum(w * task[name] for w, task in zip(weights, tasks, strict=True))
        for name in tasks[0]
    }
    models.assert_same(merged, expected)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("kind", samples.KINDS)
def test_ties_trims_and_elects_what_is_left(kind, scope):
    given = models.models(kind, entries=samples.integers)
    parameters = {"p": 0.5, "seed": 3, "k": 30, "scope": scope}
    merged = models.merge(given, "dare+ties", parameters, models.WEIGHTS)
    expected = ties(dropped(given, 0.5, 3), 30, scope, weights=models.WEIGHTS)
    models.assert_same(merged, expected)


def test_the_defaults():
    assert Dare().parameters() == {"p": 0.5, "seed": 0}
    x = samples.normal(6, 5, seed=1)
    merged = models.merge([{"w": Dense(x)}], "dare+task_arithmetic", {"alpha": 1})
    np.testing.assert_array_equal(merged["w"], drop(x, p=0.5, seed=0, tasks=("0",)))


@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize("merge", ["task_arithmetic", "ties", "average", "metagpt"])
def test_p_0_drops_nothing_and_changes_nothing(kind, merge):
    given = models.models(kind)
    merged = models.merge(given, f"dare+{merge}", {"p": 0})
    for name, values in models.merge(given, merge).items():
        np.testing.assert_array_equal(merged[name], values)


def test_p_0_leaves_adapters_factored():
    delta = samples.low_rank(6, 5, 2)
    assert isinstance(merge_state([{"w": delta}], make_pipeline("dare", {"p": 0}))["w"], LowRank)


@pytest.mark.parametrize("p", [1 - 2.0**-33, 1 - 2.0**-53])
def test_a_p_next_to_1_drops_nearly_everything(p):
    assert not kept(p, 0, "law", "w", 10**5).any()
    assert not drop(torch.ones(4, 4), p=p).any()


def test_the_mask_is_one_of_entries_not_of_factors():
    delta = samples.low_rank(40, 30, 1, entries=samples.normal)
    left = drop(delta)
    assert np.linalg.matrix_rank(left) == 30
    keep = dare.kept(0.5, 0, "law", "w", 1200).reshape(40, 30)
    np.testing.assert_array_equal(left != 0, keep)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_as_many_entries_stay_as_the_probability_says(p):
    n = 200_000
    for task in ("law", "maths"):
        count = int(kept(p, 0, task, "w", n).sum())
        assert abs(count - (1 - p) * n) <= dare.deviation(np.ones(n), CHANCE)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_sums_of_the_entries_are_expected_to_stay(p):
    tau = samples.normal(300, 200, seed=3)
    left = drop(tau, p=p)
    generator = np.random.default_rng(0)
    for a in (np.ones((300, 200)), generator.standard_normal((300, 200))):
        terms = a * tau.double().numpy()
        # Each entry is rounded twice.
        rounding = bounds.gamma(2, bounds.U32) * np.sum(np.abs(terms)) / (1 - p)
        deviation = dare.deviation(terms / (1 - p), CHANCE)
        assert abs(np.sum(a * left) - np.sum(terms)) <= deviation + rounding


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    "other",
    [("maths", "w", 0), ("law", "v", 0), ("law", "w", 1), ("w", "law", 0)],
    ids=["task", "tensor", "seed", "names exchanged"],
)
def test_masks_of_other_tasks_tensors_and_seeds_are_independent(other, p):
    n = 100_000
    task, tensor, seed = other
    both = kept(p, 0, "law", "w", n) & kept(p, seed, task, tensor, n)
    assert abs(int(both.sum()) - (1 - p) ** 2 * n) <= dare.deviation(np.ones(n), CHANCE)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 64])
def test_entries_of_one_mask_are_independent(distance):
    n = 100_000
    mask = kept(0.5, 0, "law", "w", 2 * n * distance).view(n, 2, distance)
    # Pairs that share no entry, so that they are independent too.
    both = (mask[:, 0] & mask[:, 1]).flatten()
    deviation = dare.deviation(np.ones(len(both)), CHANCE)
    assert abs(int(both.sum()) - len(both) / 4) <= deviation


def test_the_start_of_a_mask_does_not_depend_on_its_length():
    whole = kept(0.5, 0, "law", "w", 1000)
    for count in (1, 2, 3, 501):
        assert torch.equal(kept(0.5, 0, "law", "w", count), whole[:count])


@samples.SEARCH
@given(st.lists(st.integers(0, 9), max_size=12))
def test_entries_may_be_drawn_in_parts(counts):
    draws = Draws(0, "law", "w")
    parts = [draws.kept(0.5, count) for count in counts]
    whole = kept(0.5, 0, "law", "w", sum(counts))
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.bool), *parts]), whole)


def test_names_do_not_run_into_each_other():
    assert not torch.equal(kept(0.5, 1, "1", "w", 64), kept(0.5, 11, "", "w", 64))
    assert not torch.equal(kept(0.5, 0, "a", "bw", 64), kept(0.5, 0, "ab", "w", 64))


def test_a_task_keeps_its_entries_in_any_order_among_any_others():
    x = samples.normal(9, 7, seed=1)
    alone = drop(x, tasks=("law",))
    np.testing.assert_array_equal(drop(x, tasks=("maths", "law"), task=1), alone)
    np.testing.assert_array_equal(drop(x, tasks=("law", "code", "maths"), task=0), alone)
    assert not np.array_equal(drop(x, tasks=("maths", "law"), task=0), alone)


def test_a_task_keeps_its_entries_whatever_the_values_and_the_shape():
    mask = drop(torch.ones(6, 4)) != 0
    np.testing.assert_array_equal(drop(-3 * torch.ones(6, 4)) != 0, mask)
    np.testing.assert_array_equal(drop(torch.ones(24)).ravel() != 0, mask.ravel())
    np.testing.assert_array_equal(drop(torch.ones(2, 3, 2, 2)).ravel() != 0, mask.ravel())


def test_files_in_any_order_merge_to_the_same_bytes(tiny_base, make_finetune, tmp_path):
    folders = {name: make_finetune(name, seed=seed) for seed, name in enumerate(["law", "maths"])}
    written = []
    for order in (["law", "maths"], ["maths", "law"]):
        output = tmp_path / "-".join(order)
        given = {name: folders[name] for name in order}
        starmerge_models.merge(tiny_base, given, "dare+task_arithmetic", output=output)
        [file] = output.glob("*.safetensors")
        written.append(file.read_bytes())
    assert written[0] == written[1]


def digest(threads=1):
    """A digest of all bytes of a merge."""
    torch.set_num_threads(threads)
    given = [
        {
            "full": samples.dense(300, 230, seed=t, dtype=torch.bfloat16),
            "adapter": samples.low_rank(250, 280, 5, seed=t, dtype=torch.bfloat16),
        }
        for t in range(3)
    ]
    merged = merge_state(given, make_pipeline("dare+ties", {"p": 0.7, "seed": 5}))
    found = hashlib.sha256()
    for name in sorted(merged):
        found.update(merged[name].to_dense().numpy().tobytes())
    return found.hexdigest()


def test_threads_and_processes_mean_nothing():
    before = torch.get_num_threads()
    try:
        found = {digest(1), digest(2)}
    finally:
        torch.set_num_threads(before)
    program = (
        "import json; from tests.methods.test_dare import digest; print(json.dumps(digest(2)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "1"},  # here it is another, or a random one
    )
    found.add(json.loads(run.stdout))
    assert len(found) == 1


@pytest.mark.parametrize("entries", [1, 7, 50])
def test_the_size_of_the_panels_means_nothing(entries, monkeypatch):
    given = models.models("mixed", dtype=torch.bfloat16)
    at_once = models.merge(given, "dare+ties")
    monkeypatch.setattr(entrywise, "PANEL_ENTRIES", entries)
    for name, values in models.merge(given, "dare+ties").items():
        np.testing.assert_array_equal(values, at_once[name])


def test_the_global_generators_are_left_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    drop(torch.ones(9, 9))
    after = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(after[0], torch.rand(3))
    np.testing.assert_array_equal(after[1], np.random.rand(3))


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan"), "half", None])
def test_p_is_a_probability_below_1(p):
    with pytest.raises(UsageError, match=r"'dare': p: .*\(got "):
        make_pipeline("dare", {"p": p})


@pytest.mark.parametrize("seed", [-1, 0.5, "x", None])
def test_a_seed_is_an_integer_from_0(seed):
    with pytest.raises(UsageError, match=r"'dare': seed: .*\(got "):
        make_pipeline("dare", {"seed": seed})
