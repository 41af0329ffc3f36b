"""Files that cannot always be read: the right bytes come out, or an error that names the file.

BAD_READS=300 (``make bad-reads``) makes that many merges in which one read in a hundred fails and
one returns fewer bytes than were asked for; the suite makes a few, in which more do.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import Forks, hidden, remove, started, tree
from tests.soak.outputs import OUTPUTS, make_merge

RUNS = int(os.environ.get("BAD_READS", "0"))
"""In all; 0: a few."""
SEED = int(os.environ.get("SOAK_SEED", "0"))
SHIM = Path(__file__).with_name("bad_reads.c")


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Return a process whose reads can be made to fail."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to build what makes reads fail")
    library = tmp_path_factory.mktemp("shim") / "bad_reads.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM), "-ldl"]
    subprocess.run(command, check=True)
    with started(LD_PRELOAD=str(library)) as served:
        yield served


@pytest.mark.parametrize("kind", OUTPUTS if RUNS else ("sharded",))
def test_reads_that_fail_now_and_then(forks: Forks, kind: str, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    merge = make_merge(kind, inputs)
    output, reference = (tmp_path / name / f"out{merge.ending}" for name in ("runs", "whole"))
    for place in (output, reference):
        place.parent.mkdir()
    assert forks.run(merge.argv(reference), **merge.settings).code == 0
    wanted = tree(reference)
    counts: Counter[str] = Counter()
    draw = random.Random(f"{kind} {SEED}")
    for _ in range(RUNS // len(OUTPUTS) if RUNS else 3):
        remove(output)
        env = {
            "BAD_READS_UNDER": f"{tmp_path}/",
            "BAD_READS_EVERY": draw.choice(["100", "500"]) if RUNS else "40",
            "BAD_READS_SEED": str(draw.randrange(2**32)),
        }
        ended = forks.run(merge.argv(output, threads=2), env=env, **merge.settings)
        where = f"{env}: {ended.code} {ended.err}"
        if ended.code == 0:
            counts["right"] += 1
        else:
            counts["refused"] += 1
            assert ended.code == 1, where
            assert f"{tmp_path}/" in ended.err.replace(str(output), ""), where
            assert "Input/output error" in ended.err, where
            assert not output.exists(), where
            again = forks.run(merge.argv(output), **merge.settings)
            assert again.code == 0, again.err
        assert tree(output) == wanted, where
        assert hidden(output) == []
        if not merge.ending:
            ended = forks.run(["verify", output], env=env)
            assert ended.code == 0 or "Input/output error" in ended.err, ended
            counts["verified" if ended.code == 0 else "not verified"] += 1
    print(f"\n{kind}: {dict(counts)}")
    assert counts["refused"]
