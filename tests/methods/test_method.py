"""The registry of methods and the validation of their parameters."""

import dataclasses
import weakref
from functools import partial

import pytest
import torch

from starmerge_models.deltas import Dense
from starmerge_models.errors import UsageError
from starmerge_models.methods import (
    METHODS,
    Average,
    Dare,
    Deltas,
    Method,
    Star,
    TaskArithmetic,
    TensorContext,
    Trim,
    as_pipeline,
    make_method,
)

nan, inf = float("nan"), float("inf")


def test_the_registry_has_every_method_under_its_name():
    assert {"average": Average, "star": Star, "task_arithmetic": TaskArithmetic}.items() <= (
        METHODS.items()
    )
    for name, method in METHODS.items():
        assert issubclass(method, Method)
        assert method.name == name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_defaults(name):
    method = make_method(name)
    assert isinstance(method, METHODS[name])
    assert make_method(name, method.parameters()) == method


def test_parameters_are_taken_and_given_back():
    given = {
        "eta": 25.0,
        "rank": 3,
        "rescale": False,
        "noise_floor": "off",
        "embeddings": "merge",
    }
    star = make_method("star", given)
    assert star == Star(**given)
    assert star.parameters() == given
    assert make_method("task_arithmetic", {"alpha": -1}).alpha == -1.0
    assert make_method("average", {}).parameters() == {}


def test_defaults():
    assert Star().parameters() == {
        "eta": 40.0,
        "rank": None,
        "rescale": True,
        "noise_floor": "auto",
        "embeddings": "average",
    }
    assert TaskArithmetic().parameters() == {"alpha": 0.4}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("stra", "star"), ("avarage", "average"), ("task-arithmetic", "task_arithmetic")],
)
def test_an_unknown_method_names_the_nearest(name, meant):
    with pytest.raises(UsageError, match=rf"{name}.*Did you mean '{meant}'\?"):
        make_method(name)


def test_an_unknown_method_like_no_other_names_them_all():
    with pytest.raises(UsageError) as caught:
        make_method("xyz")
    for name in METHODS:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("method", "key", "meant"),
    [
        ("star", "etaa", "eta"),
        ("star", "ranks", "rank"),
        ("star", "embedding", "embeddings"),
        ("task_arithmetic", "alhpa", "alpha"),
    ],
)
def test_an_unknown_parameter_names_the_nearest(method, key, meant):
    with pytest.raises(UsageError, match=rf"'{method}'.*'{key}'.*Did you mean '{meant}'\?"):
        make_method(method, {key: 1})


def test_a_parameter_of_a_method_that_has_none():
    with pytest.raises(UsageError, match="'average'.*'alpha'.*none"):
        make_method("average", {"alpha": 0.4})


def test_a_parameter_of_another_method_is_refused():
    with pytest.raises(UsageError, match=r"'task_arithmetic'.*'eta'"):
        make_method("task_arithmetic", {"eta": 40})


@pytest.mark.parametrize("eta", [0, -1, -1e-9, 100.0001, 1000, nan, inf, -inf, "much", None])
def test_eta_is_a_percentage_above_0(eta):
    with pytest.raises(UsageError, match="'star': eta: "):
        make_method("star", {"eta": eta})
    with pytest.raises(UsageError):
        Star(eta=eta)


@pytest.mark.parametrize(
    "make", [lambda: Star(eta=True), lambda: make_method("star", {"eta": True})]
)
def test_a_switch_is_no_number(make):
    with pytest.raises(UsageError, match="'star': eta: True is no number"):
        make()
    assert not make_method("star", {"rescale": False}).rescale


@pytest.mark.parametrize("eta", [1e-9, 1, 40, 100])
def test_eta_up_to_100_is_accepted(eta):
    assert make_method("star", {"eta": eta}).eta == eta


@pytest.mark.parametrize("rank", [0, -1, 1.5, nan, "all"])
def test_a_rank_is_a_positive_integer(rank):
    with pytest.raises(UsageError, match="'star': rank: "):
        make_method("star", {"rank": rank})
    with pytest.raises(UsageError):
        Star(rank=rank)


@pytest.mark.parametrize("alpha", [nan, inf, -inf, "half", None])
def test_alpha_is_a_finite_number(alpha):
    with pytest.raises(UsageError, match="'task_arithmetic': alpha: "):
        make_method("task_arithmetic", {"alpha": alpha})


def test_embeddings_are_averaged_or_merged():
    with pytest.raises(UsageError, match=r"embeddings: .*'average' or 'merge'.*'copy'"):
        make_method("star", {"embeddings": "copy"})


def test_a_message_says_what_was_given():
    with pytest.raises(UsageError, match=r"eta: .*less than or equal to 100.*\(got 140\)"):
        make_method("star", {"eta": 140})


def test_every_wrong_parameter_is_reported_at_once():
    with pytest.raises(UsageError, match=r"eta: .*; rank: "):
        make_method("star", {"eta": -1, "rank": 0})


def test_a_method_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Star().eta = 50


def test_the_constructor_refuses_unknown_parameters():
    with pytest.raises(UsageError):
        Star(theta=40)


def test_the_constructor_takes_names_only():
    with pytest.raises(UsageError):
        Star(40)


@pytest.mark.parametrize(
    "chosen", [Star(), Average(), TaskArithmetic(), Dare(), Trim(scope="local")]
)
def test_dense_deltas_are_let_go_of_one_by_one(chosen):
    seen = []

    def load(seed):
        assert not any(alive() is not None for alive in seen)
        tensor = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        seen.append(weakref.ref(tensor))
        return Dense(tensor)

    deltas = Deltas({t: partial(load, t) for t in range(4)})
    tensor = TensorContext("w", (6, 5), False, tasks=tuple("abcd"), weights=(1.0,) * 4)
    as_pipeline(chosen).prepare(lambda look: iter([])).merge(deltas, tensor)
    assert len(seen) == 4
