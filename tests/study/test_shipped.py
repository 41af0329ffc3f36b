"""Every study that comes with the package, run whole on eight tiny models."""

from pathlib import Path

import pytest
import yaml

from starmerge_models.study.averages import Averages
from starmerge_models.study.execute import run_study
from starmerge_models.study.outputs import FIGURES, write_figures, write_tables
from starmerge_models.study.runs import numbers_of
from starmerge_models.study.study_file import find_study, studies
from tests.evaluation.tiny_world import make_world

NAMES = ("continent", "country", "digits", "language", "past", "plural", "pos", "sentiment")
ROWS = 4

pytestmark = pytest.mark.usefixtures("small_fonts")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a suite of eight tasks and models that are two, each four times."""
    folder = tmp_path_factory.mktemp("suite")
    world = make_world(folder / "world")
    pairs = list(zip(world.tasks, world.adapters.values(), strict=True))
    for number, name in enumerate(NAMES):
        task, adapter = pairs[number % 2]
        content = task.model_dump(mode="json", exclude_unset=True) | {"name": name}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        (folder / f"model_{name}").symlink_to(adapter)
    file = folder / "tiny.yaml"
    content = {
        "base": str(world.base),
        "tasks": [f"{name}.yaml" for name in NAMES],
        "models": {name: f"./model_{name}" for name in NAMES},
    }
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("name", sorted(studies()))
def test_a_shipped_study_runs_and_is_drawn(name: str, suite: Path, tmp_path: Path) -> None:
    shipped = find_study(name)
    # One number of models alone: that of the most, where a list has a value for each of them.
    numbers = ("all",) if name == "eta_by_task" else (2,)
    study = shipped.model_copy(
        update={
            "suite": str(suite),
            "rows": ROWS,
            "numbers": numbers,
            "combinations": 1,
            "scorer": "rank",  # what the tiny models write is read in no row
        }
    )
    store = run_study(study, tmp_path / "out")
    assert not store.failures
    assert len(store.records) == store.head["planned"] > 9
    labels = {record.run.label for record in store.records if record.run.kind == "merge"}
    assert {"auto", "shares"} <= labels
    table = write_tables(Averages(store))
    write_figures(Averages(store))
    assert all(f"| {label} " in table or f"| **{label}" in table for label in labels)
    drawn = list((store.folder / FIGURES).glob("*.png"))
    # With one number of models there may be no best value against it, but always the others.
    assert len(drawn) == len(study.figures)


def test_shipped_studies_merge_several_numbers_of_every_pool() -> None:
    for name, study in studies().items():
        assert max(numbers_of(study, 8)) == 8, name
        assert max(numbers_of(study, 20)) == 20, name
