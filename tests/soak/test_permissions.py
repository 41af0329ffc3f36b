"""Permissions that are lost while a user without rights merges, and inputs that are cut off.

PERMISSION_MOMENTS=30 (``make permissions``) takes them away at that many
moments; the suite at a few.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import Forks, copy, hidden, remove, tree
from tests.soak.disks import NOBODY, is_superuser
from tests.soak.outputs import make_merge

MOMENTS = int(os.environ.get("PERMISSION_MOMENTS", "0"))
"""0: a few."""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that other users can reach, which they cannot pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


LOST = ("the output's folder", "an input's folder", "an input")


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("overwrite", [False, True] if MOMENTS else [True])
def test_a_permission_that_is_lost(
    forks: Forks, open_folder: Path, lost: str, overwrite: bool
) -> None:
    user = NOBODY if is_superuser() else os.getuid()
    inputs, place = open_folder / "inputs", open_folder / "outputs"
    inputs.mkdir()
    place.mkdir()
    merge = make_merge("sharded", inputs)
    output, whole, old = place / "out", open_folder / "whole" / "out", open_folder / "old"
    whole.parent.mkdir()
    for target, made in ((whole, merge), (old, merge.other())):
        assert forks.run(made.argv(target), **merge.settings).code == 0
    wanted = tree(whole)
    target, mode = {
        "the output's folder": (place, 0o555),
        "an input's folder": (inputs / "adapter-1", 0o000),
        "an input": (inputs / "adapter-1" / "adapter_model.safetensors", 0o000),
    }[lost]
    settings = {"uid": user, "side_by_side": True, **merge.settings}
    more = ["--overwrite"] if overwrite else []
    counts: Counter[str] = Counter()
    for moment in range(1, 200, 200 // (MOMENTS or 2)):
        remove(output)
        if overwrite:
            copy(old, output)
        for member in [*inputs.rglob("*"), inputs, *place.rglob("*"), place]:
            if member.stat().st_uid != user:
                os.chown(member, user, user)
        before, allowed = tree(output), target.stat().st_mode
        # The user's own process takes the permission away, as another of the same user might.
        ended = forks.run(
            merge.argv(output, *more), change=(moment, "chmod", str(target), mode), **settings
        )
        target.chmod(allowed)
        where = f"before operation {moment}: {ended.code} {ended.err}"
        if ended.code == 0:
            counts["made"] += 1
        else:
            counts["refused"] += 1
            assert ended.code == 1, where
            # Its mode is a part of an input's state, by which a change is seen after the last read.
            reasons = ["Permission denied", *(["was changed while"] if target.is_file() else [])]
            assert any(reason in ended.err for reason in reasons), where
            assert "Traceback" not in ended.err, where
            named = output if target == place else target
            assert str(named) in ended.err, where
            assert tree(output) == before, where
            again = forks.run(merge.argv(output, *more), **settings)
            assert again.code == 0, again.err
            counts["gone on with"] += "tensors were there already" in again.out
        assert tree(output) == wanted, where
        # Of an input whose mode has changed it is not known that its content has not.
        left = [".partial-"] if target.is_file() and ended.code else []
        left = [name for name in hidden(output) if not any(part in name for part in left)]
        assert all(".replaced-" in name for name in left), where
        counts["old folders left"] += len(left)
        assert forks.run(["clean", place, "--delete", "--yes"]).code == 0
        assert hidden(output) == []
    print(f"\n{lost}, {'another there' if overwrite else 'new'}: {dict(counts)}")
    assert counts["refused"]


def test_an_input_that_is_cut_off_while_it_is_merged(forks: Forks, tmp_path: Path) -> None:
    """The system ends a process that looks at a window of a file that is gone; see LocalStorage."""
    merge = make_merge("fine-tunes", tmp_path)
    output, whole = tmp_path / "runs" / "out", tmp_path / "whole" / "out"
    for folder in (output.parent, whole.parent):
        folder.mkdir()
    assert forks.run(merge.argv(whole)).code == 0
    wanted, counts = tree(whole), Counter[int]()
    file = tmp_path / "tuned-1" / "model.safetensors"
    kept = shutil.copy(file, tmp_path / "kept")
    for moment in range(2, 60, 60 // (MOMENTS or 1)):
        change = (moment, "truncate", str(file), file.stat().st_size // 3)
        ended = forks.run(merge.argv(output), change=change, side_by_side=True)
        counts[ended.code] += 1
        assert ended.code in (1, -signal.SIGBUS, -signal.SIGSEGV), ended
        assert ended.code != 1 or str(file) in ended.err, ended
        assert not output.exists()
        shutil.copy(kept, file)
        again = forks.run(merge.argv(output))
        assert again.code == 0, again.err
        assert tree(output) == wanted
        remove(output)
    print(f"\ncut off: ended by {dict(counts)}")
