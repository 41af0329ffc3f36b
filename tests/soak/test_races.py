"""Two merges into one output at the same moment, and `starmerge clean` beside a merge.

RACES=100 (``make races``) has that many of each; the suite a few.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.forks import Ended, Forks, Run, copy, hidden, remove, tree
from tests.soak.outputs import Merge, make_merge

RACES = int(os.environ.get("RACES", "2"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
KILLED = -9


class Racing:
    """Two merges that want one output.

    Args:
        forks: What runs them.
        folder: A folder of their own.
        kind: Of the output.
    """

    def __init__(self, forks: Forks, folder: Path, kind: str) -> None:
        self.forks = forks
        self.merge = make_merge(kind, folder)
        self.output = folder / "runs" / f"out{self.merge.ending}"
        self.merges = [self.merge, self.merge.other()]
        self.wanted = []
        self.old = folder / f"old{self.merge.ending}"
        for number, merge in enumerate(self.merges):
            whole = folder / f"whole-{number}" / self.output.name
            whole.parent.mkdir()
            assert self.done(merge, whole).code == 0
            self.wanted.append(tree(whole))
        third = Merge(kind, self.merge.inputs, "task_arithmetic", self.merge.options)
        assert self.done(third, self.old).code == 0
        self.output.parent.mkdir()

    def done(self, merge: Merge, output: Path, *more: str) -> Ended:
        return self.forks.run(merge.argv(output, *more), **merge.settings)

    def race(self, draw: random.Random, same: bool, overwrite: bool, kill: bool) -> str:
        """Have two merges race; return how it ended."""
        remove(self.output)
        more = ["--overwrite"] if overwrite else []
        if overwrite:
            copy(self.old, self.output)
        before = tree(self.output)
        chosen = [0, 0] if same else [0, 1]
        runs = [
            Run(
                self.merges[n].argv(self.output, *more),
                after=draw.choice([0, 0, draw.uniform(0, 0.1)]),
                side_by_side=draw.random() < 0.5,
                kill_after=draw.uniform(0, 0.4) if kill and draw.random() < 0.6 else None,
                **self.merge.settings,
            )
            for n in chosen
        ]
        ended = self.forks.at_once(runs)
        found = tree(self.output)
        for one in ended:
            assert one.code in (0, KILLED, 1, 2), ended
            assert "Traceback" not in one.err, ended
            assert "should not happen" not in one.err, ended
            if one.code in (1, 2):
                assert str(self.output) in one.err, ended
        made = [n for n, one in zip(chosen, ended, strict=True) if one.code == 0]
        allowed = [self.wanted[n] for n in made]
        if not made:
            killed = [n for n, one in zip(chosen, ended, strict=True) if one.code == KILLED]
            allowed = [before, *(self.wanted[n] for n in killed)]
        assert found in allowed, (ended, sorted(found))
        assert overwrite or len(made) <= 1, ended
        # Whatever happened, either can be made now.
        last = draw.choice([0, 1])
        again = self.done(self.merges[last], self.output, "--overwrite")
        assert again.code == 0, (ended, again)
        assert tree(self.output) == self.wanted[last]
        if not kill:
            assert hidden(self.output) == [], ended
        return " and ".join(
            sorted({0: "made", KILLED: "killed"}.get(one.code, "refused") for one in ended)
        )


@pytest.mark.parametrize("kind", ["sharded", "file"])
def test_of_two_merges_into_one_output_one_is_there_whole(
    forks: Forks, tmp_path: Path, kind: str
) -> None:
    racing, draw = Racing(forks, tmp_path, kind), random.Random(f"{kind} {SEED}")
    counts: Counter[str] = Counter()
    for _ in range(RACES):
        same, overwrite, kill = (draw.random() < 0.5 for _ in range(3))
        counts[racing.race(draw, same, overwrite, kill)] += 1
    print(f"\n{kind}: {dict(counts)}")


def test_clean_beside_a_merge_deletes_only_what_is_left(forks: Forks, tmp_path: Path) -> None:
    racing, draw = Racing(forks, tmp_path, "sharded"), random.Random(SEED)
    counts: Counter[str] = Counter()
    for _ in range(RACES):
        remove(racing.output)
        left = Run(racing.merges[1].argv(racing.output), kill_before=draw.randint(5, 60))
        assert forks.at_once([left])[0].code == KILLED
        clean = ["clean", str(racing.output.parent), "--delete", "--yes"]
        merge, *cleaned = forks.at_once(
            [
                Run(racing.merge.argv(racing.output), side_by_side=True, **racing.merge.settings),
                *(Run(clean, after=draw.uniform(0, 0.4)) for _ in range(3)),
            ]
        )
        for one in cleaned:
            assert one.code in (0, 1, 2), one
            assert "Traceback" not in one.err, one
            assert "should not happen" not in one.err, one
            counts["cleaned" if one.code == 0 else one.err.split(" ")[-1]] += 1
        if merge.code:  # it began while what an earlier one has left was being deleted
            counts["merge refused"] += 1
            assert merge.code == 2, merge
            assert "is being made by another process" in merge.err, merge
            assert not racing.output.exists()
            assert racing.done(racing.merge, racing.output).code == 0
        assert tree(racing.output) == racing.wanted[0]
    print(f"\nclean: {dict(counts)}")
