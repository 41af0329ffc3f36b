"""A tiny study, and a store of it that is written by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from starmerge_models.study.runs import runs_of
from starmerge_models.study.store import SCHEMA, Store, open_store
from starmerge_models.study.study_file import Study, make_study, pool_of
from tests.evaluation.tiny_world import World

ROWS = 12


def study_file(world: World, folder: Path, **changes: Any) -> Path:
    """Write a study of a tiny world: two adapters, and one of them again under another name."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for task in world.tasks:
        file = folder / f"{task.name}.yaml"
        content = task.model_dump(mode="json", exclude_unset=True)
        file.write_text(yaml.safe_dump(content))
        names.append(file.name)
    content = {
        "base": str(world.base),
        "models": {
            "one": str(world.adapters["one"]),
            "two": str(world.adapters["two"]),
            "again": {"path": str(world.adapters["one"]), "task": "one"},
        },
        "tasks": names,
        "methods": ["average", {"method": "star", "grid": {"eta": [20, 40]}}],
        "numbers": [2, "all"],
        "combinations": 2,
        "rows": ROWS,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return file


def written_store(folder: Path, seed: int = 0) -> tuple[Study, Store]:
    """Write a store of a study of the demo's tasks, with answers drawn at random."""
    study = make_study(
        {
            "name": "written",
            "base": "org/base",
            "models": {name: f"org/{name}" for name in ("past", "plural", "pos", "digits")},
            "tasks": ["demo/past", "demo/plural", "demo/pos", "demo/digits"],
            "methods": ["average", {"method": "star", "grid": {"eta": [20, 40, 60]}}],
            "numbers": [2, "all"],
            "combinations": 2,
            "figures": [
                {"figure": "number", "title": "By number", "methods": ["average"]},
                {"figure": "parameter", "parameter": "eta"},
                {"figure": "best", "parameter": "eta"},
                {"figure": "one-shot"},
                {"figure": "tasks"},
            ],
        }
    )
    draw = random.Random(seed)
    shares = {"base": 0.3, "fine-tune": 0.9, "merge": 0.7}
    runs = runs_of(study, pool_of(study))
    with open_store(folder, head_of(study)) as store:
        for run in runs:
            lines = []
            for task in run.tasks:
                seen = [int(draw.random() < shares[run.kind]) for _ in range(ROWS)]
                lines.append(
                    {
                        "task": task,
                        "metric": "accuracy",
                        "score": sum(seen) / ROWS,
                        "low": 0.0,
                        "high": 1.0,
                        "rows": ROWS,
                        "unparsed": 0.0,
                        "shortened": 0,
                        "seen": seen,
                        "merging": 0.5,
                        "asking": 2.0,
                        "date": "2026-01-01T00:00:00+00:00",
                    }
                )
            store.add(run, lines)
    return study, store


def head_of(study: Study) -> dict[str, Any]:
    """Return the head of a store."""
    pool = pool_of(study)
    return {
        "schema": SCHEMA,
        "study": study.model_dump(mode="json", exclude={"base", "models", "tasks"}),
        "base": {"name": "org/base", "files": "aa"},
        "models": {n: {"name": p, "task": n, "files": "bb"} for n, p in pool.models.items()},
        "tasks": {name: {"rows": ROWS, "asked": "cc"} for name in pool.tasks},
        "asked": {"scorer": "rank", "matching": "strict", "dtype": "float32"},
        "seed": 0,
        "code": "dd",
        "plugins": {},
        "versions": {"starmerge": "0"},
        "device": "cpu",
        "begun": "2026-01-01T00:00:00+00:00",
    }
