"""The JSON Schemas of the files that users write: what the readers take, and what they refuse."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from starmerge_models.errors import UsageError
from starmerge_models.evaluation.tasks import files
from starmerge_models.evaluation.tasks.files import make_task
from starmerge_models.evaluation.tasks.suites import FOLDER as SUITES
from starmerge_models.recipe import make_recipe
from starmerge_models.schemas import SCHEMAS, schema_of
from starmerge_models.study.study_file import FOLDER as STUDIES
from starmerge_models.study.study_file import make_study

TASKS = Path(files.__file__).parent / "built_in"
SHIPPED = {
    "suite": sorted(SUITES.glob("*.yaml")),
    "study": sorted(STUDIES.glob("*.yaml")),
    "task": sorted(TASKS.rglob("*.yaml")),
}
MODELS: dict[str, Any] = {"base": "b", "models": ["x", {"path": "y", "weight": 2}]}
TASK: dict[str, Any] = {"source": {"file": "rows.jsonl"}, "prompt": "{input}"}
IMAGES: dict[str, Any] = {"kind": "image-classification", "source": {"folder": "animals"}}
STUDY: dict[str, Any] = {"suite": "demo", "methods": ["star", {"method": "ties"}]}


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(schema_of(name))


def _faults(name: str, content: object) -> list[str]:
    return [fault.message for fault in _validator(name).iter_errors(content)]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one(name: str) -> None:
    Draft202012Validator.check_schema(schema_of(name))


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_fits_its_schema(name: str) -> None:
    assert len(SHIPPED[name]) > 2
    for file in SHIPPED[name]:
        assert _faults(name, yaml.safe_load(file.read_text(encoding="utf-8"))) == [], file


@pytest.mark.parametrize(
    "content",
    [
        MODELS,
        {"models": ["x"], "output": {"kind": "adapter", "rank": 4}},
        MODELS | {"parameters": {"eta": {"*.mlp.*": 30}}, "method": "star+ties", "dtype": "keep"},
    ],
)
def test_a_recipe_that_is_read_fits(content: dict[str, Any]) -> None:
    make_recipe(content)
    assert _faults("recipe", content) == []


@pytest.mark.parametrize(
    "change",
    [
        {"metod": "star"},
        {"models": []},
        {"models": "x"},
        {"models": [{"name": "x"}]},
        {"models": [{"path": "x", "wieght": 1}]},
        {"dtype": "int8"},
        {"output": {"kind": "adapter", "rank": 0}},
        {"common": "perhaps"},
    ],
)
def test_what_a_recipe_may_not_hold_does_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make_recipe(MODELS | change)
    assert _faults("recipe", MODELS | change)


@pytest.mark.parametrize(
    "content",
    [
        TASK | {"labels": ["yes", "no"]},
        TASK | {"labels": {"B": ["billing", "payment"], "T": "technical"}},
        TASK | {"gold": {"field": "answer", "pattern": "#### (.*)"}, "match": "number"},
        IMAGES,
        IMAGES | {"sample": {"kind": "balanced", "n": 5}},
    ],
)
def test_a_task_that_is_read_fits(content: dict[str, Any]) -> None:
    make_task({"name": "it", **content}, where="it")
    assert _faults("task", content) == []


@pytest.mark.parametrize(
    "content",
    [
        TASK | {"promt": "x"},
        {"prompt": "x"},
        TASK | {"source": {"fil": "rows.jsonl"}},
        TASK | {"sample": {"kind": "most"}},
        TASK | {"max_new_tokens": 0},
        IMAGES | {"prompt": "x"},
    ],
)
def test_what_a_task_may_not_hold_does_not_fit(content: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make_task({"name": "it", **content}, where="it")
    assert _faults("task", content)


@pytest.mark.parametrize(
    "change",
    [{"methods": []}, {"numbers": ["most"]}, {"methods": [{"grid": {}}]}, {"figures": [{}]}],
)
def test_what_a_study_may_not_hold_does_not_fit(change: dict[str, Any]) -> None:
    make_study({"name": "it", **STUDY})
    assert _faults("study", STUDY) == []
    with pytest.raises(UsageError):
        make_study({"name": "it", **STUDY, **change})
    assert _faults("study", STUDY | change)


@pytest.mark.parametrize(
    ("name", "key"), [("recipe", "models"), ("suite", "models"), ("study", "numbers")]
)
def test_a_key_says_what_it_is(name: str, key: str) -> None:
    assert len(schema_of(name)["properties"][key]["description"].split()) > 3


def test_an_unknown_schema_is_refused_with_what_is_near() -> None:
    with pytest.raises(UsageError, match="Did you mean 'recipe'"):
        schema_of("recipes")
