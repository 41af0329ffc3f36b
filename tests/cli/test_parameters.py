"""Parameters of several methods at once, and of one in a word."""

import dataclasses
import pickle

import pytest

from starmerge_models import Star, Ties
from starmerge_models.cli.parameters import parameters_of
from starmerge_models.errors import UsageError
from starmerge_models.methods.method import make_method
from starmerge_models.methods.pipeline import as_pipeline, make_pipeline
from starmerge_models.study.candidates import candidate_name


def test_parameters_are_those_of_their_method() -> None:
    given = {"star.eta": 30, "star+ties.star.eta": 60}
    methods = ["star", "star+ties"]
    assert parameters_of("star", given, methods) == {"eta": 30}
    assert parameters_of("star+ties", given, methods) == {"star.eta": 60}
    assert parameters_of("star", {"eta": 30}, ["star"]) == {"eta": 30}
    with pytest.raises(UsageError, match="-p eta: of which method"):
        parameters_of("star", {"eta": 30}, methods)


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("star", {}),
        ("star:eta=60", {"eta": 60}),
        ("star:eta=[20, 60],noise_floor=off", {"eta": [20, 60], "noise_floor": "off"}),
        (
            'star:eta={"a": 20, "b": 60},rescale=false',
            {"eta": {"a": 20, "b": 60}, "rescale": False},
        ),
        ("star+ties:star.eta=60,ties.k=30", {"star.eta": 60, "ties.k": 30}),
    ],
)
def test_a_chain_has_its_parameters_after_a_colon(text: str, parameters: dict[str, object]) -> None:
    made = as_pipeline(text)
    assert made == make_pipeline(text.partition(":")[0], parameters)
    assert as_pipeline(candidate_name(made)) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("star:", "parameters follow the colon"),
        ("star:eta", "given as KEY=VALUE"),
        ("star:eta=20,eta=60", "star: eta is given twice"),
        ("star:alpha=1", "no parameter 'alpha'"),
        ("stra:eta=1", "Did you mean 'star'"),
    ],
)
def test_a_wrong_chain_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        as_pipeline(text)


def test_constructors_refuse_as_texts_do() -> None:
    with pytest.raises(UsageError, match=r"Method 'star': eta.*greater than 0"):
        Star(eta=0)
    with pytest.raises(UsageError, match="Did you mean 'eta'"):
        Star(etaa=3)
    with pytest.raises(UsageError, match="k"):
        dataclasses.replace(Ties(), k=-1)
    assert pickle.loads(pickle.dumps(Star(eta=60))) == make_method("star", {"eta": 60})
