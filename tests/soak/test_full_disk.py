"""Outputs on a disk that fills up while they are made: an error, nothing by halves, and once more.

FULL_MOMENTS=30 (``make full-disk``) fills it at that many moments of each output; the suite at a
few of some.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.evaluation.tiny_world import World, make_world
from tests.forks import Ended, Forks, copy, hidden, remove, started, tree
from tests.soak.disks import small_disk
from tests.soak.outputs import OUTPUTS, make_merge
from tests.study.studies import study_file

MOMENTS = int(os.environ.get("FULL_MOMENTS", "0"))
"""Of each output; 0: a few of some."""

SIZE = 16 * 2**20
SAID = "No space left on device"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", SIZE) as reason:
        if reason is not None:
            pytest.skip(reason)
        yield tmp_path / "disk"


class Filling:
    """A command whose output's disk fills up.

    Args:
        forks: What runs it.
        output: What it makes.
        disk: Its disk.
        argv: The command, without an option that replaces the output.
        trigger: Part of a name that the command opens or makes first on this disk.
        content: What must be the same of two outputs.
    """

    def __init__(
        self,
        forks: Forks,
        output: Path,
        disk: Path,
        argv: list[str],
        *,
        trigger: str = ".partial-",
        content: Callable[[Path], object] = tree,
        **settings: object,
    ) -> None:
        self._forks, self._output, self._disk = forks, output, disk
        self._argv, self._trigger, self._content = argv, trigger, content
        self._settings = settings
        self._filler = disk / "filler"
        self.counts: Counter[str] = Counter()

    def run(self, *more: str, leave: int | None = None) -> Ended:
        """Run the command, on a disk that has some bytes left once it has begun."""
        fill = None if leave is None else (str(self._filler), self._trigger, leave)
        return self._forks.run([*self._argv, *more], fill=fill, **self._settings)

    def at(self, leave: int, wanted: object, *more: str) -> None:
        """Fill the disk, look at what there is, free it, and run the command again."""
        before = tree(self._output)
        ended = self.run(*more, leave=leave)
        where = f"{leave} bytes left: {ended.err}"
        assert self._filler.exists(), where
        self._filler.unlink()
        if ended.code == 0:
            self.counts["had room"] += 1
        else:
            self.counts["refused"] += 1
            assert ended.code == 1, where
            assert SAID in ended.err, where
            assert str(self._output) in ended.err, where
            assert "Traceback" not in ended.err, where
            assert tree(self._output) == before, where
            again = self.run(*more)
            assert again.code == 0, again.err
            if "tensors were there already" in again.out:
                self.counts["gone on with"] += 1
        assert self._content(self._output) == wanted, where
        assert hidden(self._output) == []


def _leaves(size: int, few: int) -> list[int]:
    """Return how many bytes are left at some moments of an output of this size."""
    count = MOMENTS or few
    return [size * n // count for n in range(count)]


@pytest.mark.parametrize(
    ("kind", "overwrite"),
    product(OUTPUTS, (False, True)) if MOMENTS else [("sharded", True), ("file", False)],
)
def test_a_merge_on_a_disk_that_fills_up(
    forks: Forks, disk: Path, tmp_path: Path, kind: str, overwrite: bool
) -> None:
    merge = make_merge(kind, tmp_path)
    output, reference = disk / f"out{merge.ending}", tmp_path / "whole" / f"out{merge.ending}"
    reference.parent.mkdir()
    for place, made in (
        (reference, merge),
        (old := tmp_path / f"old{merge.ending}", merge.other()),
    ):
        ended = forks.run(made.argv(place), **merge.settings)
        assert ended.code == 0, ended.err
    wanted = tree(reference)
    settings = {"side_by_side": True, **merge.settings}  # a line of the journal for each tensor
    filling = Filling(forks, output, disk, merge.argv(output), **settings)
    for leave in _leaves(sum(map(len, wanted.values())), 2):
        remove(output)
        if overwrite:
            copy(old, output)
        filling.at(leave, wanted, *(["--overwrite"] if overwrite else []))
    print(f"\n{kind}, {'another there' if overwrite else 'new'}: {dict(filling.counts)}")
    assert filling.counts["refused"]


MODULES = (
    "starmerge_models.calibration.run",
    "starmerge_models.evaluation.runner",
    "starmerge_models.study.execute",
    "starmerge_models.study.figures.inspection",
    "starmerge_models.study.inspection_files",
    "starmerge_models.study.page.page",
    "matplotlib.pyplot",
    "pandas",
    "peft",
    "pyarrow.parquet",
    "transformers.models.llama.modeling_llama",
)
"""What asking models and drawing load."""

OTHERS = ("evaluate", "inspect", "calibrate", "page")


@pytest.fixture(scope="module")
def asking(loaded: Forks) -> Iterator[Forks]:
    """Return a process that has loaded what asking models and drawing take."""
    if not MOMENTS:  # too few commands to be worth it
        yield loaded
        return
    with started(*MODULES) as served:
        yield served


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def _without_dates(place: Path) -> object:
    """Return the names of an output, and the content of its tables, which have no dates."""
    found = tree(place)
    tables = (".csv", ".parquet", ".safetensors", "table.md")
    return set(found), {name: data for name, data in found.items() if name.endswith(tables)}


@pytest.mark.parametrize(
    ("command", "overwrite"),
    product(OTHERS, (False, True)) if MOMENTS else [("evaluate", True)],
)
def test_another_output_on_a_disk_that_fills_up(
    asking: Forks, world: World, disk: Path, tmp_path: Path, command: str, overwrite: bool
) -> None:
    output, argv = _command(command, world, disk, tmp_path)
    filling = Filling(asking, output, disk, argv, content=_without_dates)
    ended = filling.run()
    assert ended.code == 0, ended.err
    wanted = _without_dates(output)
    size = sum(map(len, tree(output).values()))
    for leave in _leaves(size, 1):
        if not overwrite:
            remove(output)
        filling.at(leave, wanted, *(["--overwrite"] if overwrite else []))
    print(f"\n{command}, {'another there' if overwrite else 'new'}: {dict(filling.counts)}")
    assert filling.counts["refused"]


def _command(command: str, world: World, disk: Path, scratch: Path) -> tuple[Path, list[str]]:
    """Return the output of a command, and the command."""
    base, models = str(world.base), [f"{name}={path}" for name, path in world.adapters.items()]
    study_file(world, scratch)
    tasks = ",".join(str(scratch / f"{name}.yaml") for name in world.adapters)
    asked = ["evaluate", base, *models, "-t", tasks, "--scorer", "rank", "--no-cache"]
    if command == "evaluate":
        return disk / "out", [*asked, "-o", str(disk / "out")]
    if command == "page":
        return disk / "out.html", [*asked, "--report", str(disk / "out.html")]
    if command == "inspect":
        return disk / "out", ["inspect", base, *models, "-m", "average", "-o", str(disk / "out")]
    texts = scratch / "texts.txt"
    texts.write_text("w1 w2 w3 w4 w5\n" * 20)
    file = disk / "out.safetensors"
    return file, ["calibrate", base, "-o", str(file), "--texts", str(texts)]


def _lines(store: Path) -> list[object]:
    """Return the lines of a study's runs, without times."""
    lines = [json.loads(line) for line in (store / "runs.jsonl").read_text().splitlines()]
    times = ("merging", "asking", "date")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def test_the_store_of_a_study_on_a_disk_that_fills_up(
    asking: Forks, world: World, disk: Path, tmp_path: Path
) -> None:
    study, output = study_file(world, tmp_path, methods=["average"]), disk / "out"
    argv = ["study", str(study), "-o", str(output), "--no-cache"]
    filling = Filling(asking, output, disk, argv)
    ended = filling.run()
    assert ended.code == 0, ended.err
    whole, names = _lines(output), set(tree(output))
    counts: Counter[str] = Counter()
    for leave in _leaves(sum(map(len, tree(output).values())), 2)[-1 if not MOMENTS else 0 :]:
        remove(output)
        ended = filling.run(leave=leave)
        (disk / "filler").unlink()
        if ended.code == 0:
            counts["had room"] += 1
        else:
            counts["refused"] += 1
            assert ended.code == 1, ended.err
            assert SAID in ended.err, ended.err
            assert str(output) in ended.err, ended.err
            assert "Traceback" not in ended.err, ended.err
            kept = _lines_there(output)
            assert kept == whole[: len(kept)]
            counts["lines kept"] += len(kept)
            again = filling.run()
            assert again.code == 0, again.err
        assert _lines(output) == whole
        assert set(tree(output)) == names
    print(f"\nstudy: {dict(counts)}")
    assert counts["refused"]


def _lines_there(store: Path) -> list[object]:
    """Return the lines of a study's runs that are complete."""
    file = store / "runs.jsonl"
    if not file.exists():
        return []
    content = file.read_bytes()
    file.write_bytes(content[: content.rfind(b"\n") + 1])
    lines = _lines(store)
    file.write_bytes(content)
    return lines
