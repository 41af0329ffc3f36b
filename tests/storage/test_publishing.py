"""Outputs that appear whole or not at all: after kills, under any name, beside other runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import starmerge_models as sm
from starmerge_models.errors import Interrupted, StarmergeError, UsageError
from starmerge_models.storage.exchange import exchange
from starmerge_models.storage.leftovers import Leftover, leftovers, leftovers_in
from starmerge_models.storage.publishing import (
    check_output,
    check_output_file,
    check_space,
    output_file,
    output_folder,
)
from tests.conftest import MakeAdapter
from tests.forks import Forks

Run = Callable[..., subprocess.CompletedProcess[str]]

_OLD = {"merge_report.json": '{"files": ["sub/a"]}', "sub/a": "old"}
_NEW = {"merge_report.json": '{"files": ["sub/a", "b"]}', "sub/a": "new", "b": "new"}


def _write(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _read(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with output_folder(target) as folder:
        folder.put("file", b"x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "merge_report.json").write_text("kept")
    with pytest.raises(ZeroDivisionError), output_folder(target, overwrite=True) as folder:
        folder.put("new", b"x")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "merge_report.json").read_text() == "kept"


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "merge_report.json").write_text("gone")
    with output_folder(target, overwrite=True) as folder:
        folder.put("new", b"x")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_appears_during_a_merge_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(UsageError, match="not empty"), output_folder(target) as folder:
        folder.put("new", b"x")
        target.mkdir()
        (target / "other").write_text("kept")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "other").read_text() == "kept"


def test_an_output_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="--overwrite"):
        check_output(tmp_path, overwrite=False)
    with pytest.raises(UsageError, match="no merged model and is not overwritten"):
        check_output(tmp_path, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="symbolic link"):
        check_output(tmp_path / "link", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=False)


def test_a_disk_that_is_too_small_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(
        StarmergeError, match=r"needs 1000000000\.00 GB, and its disk has [\d.]+ GB"
    ):
        check_space(tmp_path / "not" / "there", 10**18)
    check_space(tmp_path, 1)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "m.safetensors"
    with output_file(file) as partial:
        partial.write_text("whole")
        assert not file.exists()
    assert file.read_text() == "whole"
    with pytest.raises(UsageError, match="exists. Choose another file"), output_file(file):
        raise AssertionError
    with pytest.raises(RuntimeError), output_file(file, overwrite=True) as partial:
        partial.write_text("half")
        raise RuntimeError
    with pytest.raises(StarmergeError, match="not made: full"), output_file(file, overwrite=True):
        raise OSError("full")
    assert file.read_text() == "whole"
    with output_file(file, overwrite=True) as partial:
        partial.write_text("another")
    assert file.read_text() == "another"
    assert [path.name for path in file.parent.iterdir()] == ["m.safetensors"]
    with pytest.raises(UsageError, match="a folder or a link"), output_file(tmp_path):
        raise AssertionError


_KILLED_AT_EACH_STEP = """
import ctypes, json, os, platform, signal, struct, sys
from pathlib import Path
from starmerge_models.storage.publishing import output_folder

overwrite, exchanges, suffix = (json.loads(argument) for argument in sys.argv[1:])
old, new = json.loads(sys.stdin.read())
FILES = ("open", "os.", "shutil.", "tempfile.", "fcntl.", "ctypes.")
left = None

def hook(event, arguments):
    global left
    if left is not None and event.startswith(FILES):
        left -= 1
        if left < 0:
            left = None
            os.kill(os.getpid(), signal.SIGKILL)

def forbid_exchange():
    # A seccomp filter: renameat2 fails with ENOSYS, as on a system that has none.
    number = {"x86_64": 316, "aarch64": 276}[platform.machine()]
    load, compare = (0x20, 0, 0, 0), (0x15, 0, 1, number)
    fail, allow = (0x06, 0, 0, 0x50000 | 38), (0x06, 0, 0, 0x7FFF0000)
    steps = (load, compare, fail, allow)
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
    prctl = ctypes.CDLL(None).prctl
    assert prctl(38, 1, 0, 0, 0) == 0
    assert prctl(22, 2, ctypes.byref(Program(len(steps), code)), 0, 0) == 0

def write(folder, content):
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

sys.addaudithook(hook)
if not exchanges:
    forbid_exchange()
step, status = -1, 1
while status:
    step += 1
    folder = Path(f"{step:03d}")
    folder.mkdir()
    if overwrite:
        write(folder / "out", old)
    child = os.fork()
    if not child:
        left = step
        with output_folder(folder / "out", overwrite=overwrite, suffix=suffix) as partial:
            write(partial.path, new)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
"""


def _kill_at_each_step(
    folder: Path, *, overwrite: bool, exchanges: bool = True, suffix: str | None = None
) -> list[Path]:
    """Kill a process before each of its operations on files; return where each one worked."""
    arguments = [json.dumps(argument) for argument in (overwrite, exchanges, suffix)]
    finished = subprocess.run(
        [sys.executable, "-c", _KILLED_AT_EACH_STEP, *arguments],
        input=json.dumps([_OLD, _NEW]),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return sorted(folder.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_process_killed_at_any_step_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, overwrite: bool
) -> None:
    places = _kill_at_each_step(tmp_path, overwrite=overwrite)
    before = _OLD if overwrite else {}
    seen = [_read(place / "out") for place in places]
    turn = seen.index(_NEW)
    assert 20 < turn < len(seen)
    assert seen == [before] * turn + [_NEW] * (len(seen) - turn)
    if overwrite:
        assert len(seen) - turn > 5  # killed while the old one was being deleted
    for place in places:
        left = leftovers_in(place)
        hidden = {path for path in place.iterdir() if path.name != "out"}
        assert {leftover.path for leftover in left} == hidden
        assert left == leftovers(place / "out")
        for leftover in left:
            assert not leftover.is_in_work()
            assert not leftover.is_only_copy()
            leftover.delete()
        assert not (place.exists() and {path.name for path in place.iterdir()} - {"out"})
        with output_folder(place / "out", overwrite=True) as folder:
            _write(folder.path, _OLD)
        assert _read(place / "out") == _OLD


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux'")
def test_where_nothing_can_be_exchanged_both_folders_outlive_a_kill(tmp_path: Path) -> None:
    places = _kill_at_each_step(tmp_path, overwrite=True, exchanges=False)
    alone = []
    for place in places:
        content = _read(place / "out")
        assert content in (_OLD, _NEW, {})
        if not content:
            left = {leftover.role: leftover for leftover in leftovers_in(place)}
            assert _read(left["partial"].path) == _NEW
            assert _read(left["replaced"].path) == _OLD
            assert left["replaced"].is_only_copy()
            alone.append(place)
    assert len(alone) == 1
    assert _read(places[-1] / "out") == _NEW
    assert [path.name for path in places[-1].iterdir()] == ["out"]


def test_a_killed_run_with_a_given_suffix_is_gone_on_with_and_never_in_the_old_folder(
    tmp_path: Path,
) -> None:
    places = _kill_at_each_step(tmp_path, overwrite=True, suffix="abc")
    found = []
    for place in places:
        with output_folder(place / "out", overwrite=True, suffix="abc") as folder:
            assert folder.path == place / ".out.partial-abc"
            found.append(_read(folder.path))
            _write(folder.path, _NEW)
        assert _read(place / "out") == _NEW
    assert {} in found
    assert _NEW in found
    assert all(set(content.values()) <= {*_NEW.values(), ""} for content in found)


def test_exchanging_changes_both_names_at_once(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "a").write_text("1")
    other.mkdir()
    assert exchange(one, other)
    assert [path.name for path in other.iterdir()] == ["a"]
    assert not any(one.iterdir())
    with pytest.raises(FileNotFoundError, match="absent"):
        exchange(tmp_path / "absent", other)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("notes.txt", "notes.txt"),
        ("sub/notes.txt", "sub/notes.txt"),
        ("checkpoint-10/optimizer.pt", "checkpoint-10"),
        (".git/HEAD", ".git"),
    ],
)
def test_a_folder_that_holds_something_else_is_not_replaced(
    tmp_path: Path, name: str, named: str
) -> None:
    _write(tmp_path / "out", {**_OLD, name: "dear"})
    with pytest.raises(UsageError, match=f"holds {named}, which is no part of the merged model"):
        check_output(tmp_path / "out", overwrite=True)
    with (
        pytest.raises(UsageError, match=f"holds {named}"),
        output_folder(tmp_path / "out", overwrite=True),
    ):
        raise AssertionError
    assert _read(tmp_path / "out") == {**_OLD, name: "dear"}


def test_what_appears_in_the_old_folder_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    _write(tmp_path / "out", _OLD)
    with (
        pytest.raises(UsageError, match="holds notes"),
        output_folder(tmp_path / "out", overwrite=True),
    ):
        (tmp_path / "out" / "notes").write_text("dear")
    assert _read(tmp_path / "out") == {**_OLD, "notes": "dear"}


def test_litter_of_file_managers_and_python_is_no_obstacle(tmp_path: Path) -> None:
    litter = {".DS_Store": "", "sub/.DS_Store": "", "__pycache__/m.cpython-311.pyc": "", "._b": ""}
    _write(tmp_path / "out", {**_OLD, **litter})
    (tmp_path / "out" / "sub" / "a").unlink()
    with output_folder(tmp_path / "out", overwrite=True) as folder:
        _write(folder.path, _NEW)
    assert _read(tmp_path / "out") == _NEW


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"files": 3}', '{"files": [{}]}', "{}"])
def test_a_report_that_lists_nothing_covers_itself_alone(tmp_path: Path, content: str) -> None:
    _write(tmp_path / "out", {"merge_report.json": content})
    check_output(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds config\.json"):
        check_output(tmp_path / "out", overwrite=True)


def test_every_kind_of_merge_lists_its_files_and_can_be_replaced(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = {"one": make_adapter("one", seed=1), "two": make_adapter("two", seed=2)}
    out = tmp_path / "out"
    for method in ("average", "emr", "average"):
        result = sm.merge(tiny_base, adapters, method, output=out, overwrite=True)
        report = json.loads((out / "merge_report.json").read_text())
        files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert set(report["files"]) == files
        assert report["files"] == result.report.content["files"]
    (out / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds mine\.txt"):
        sm.merge(tiny_base, adapters, "average", output=out, overwrite=True)


@pytest.mark.parametrize(
    "name", [b"gr\xf6\xdfer", b"x" * 255, "ü".encode() * 127, b"out[1]*", b"a\nb", b"-o", b"out."]
)
def test_any_name_that_the_system_takes_is_an_output(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, name: bytes
) -> None:
    out = tmp_path / "outputs" / os.fsdecode(name)
    adapter = make_adapter("one")
    sm.merge(tiny_base, [adapter], "average", output=out)
    sm.merge(tiny_base, [adapter], "average", output=out, overwrite=True)
    assert [os.fsencode(path.name) for path in out.parent.iterdir()] == [name]
    with pytest.raises(ZeroDivisionError), output_folder(out, overwrite=True) as folder:
        assert [leftover.path for leftover in leftovers(out)] == [folder.path]
        raise ZeroDivisionError
    with output_file(out.parent / os.fsdecode(name[:-1] + b"f")) as file:
        file.write_text("x")
    assert len(list(out.parent.iterdir())) == 2


def test_long_names_with_one_beginning_have_leftovers_of_their_own(tmp_path: Path) -> None:
    one, other = (tmp_path / ("x" * 250 + end) for end in "ab")
    with output_folder(one) as first, output_folder(other) as second:
        assert [leftover.path for leftover in leftovers(one)] == [first.path]
        assert [leftover.path for leftover in leftovers(other)] == [second.path]
        assert first != second


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    folder.chmod(0o500)
    try:
        yield
    finally:
        folder.chmod(0o700)


def test_places_where_nothing_can_be_made_are_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent" / "folder")
    refused = {
        "x" * 256: "has 256 bytes, and names here have 255 at most",
        "ü" * 128: "has 256 bytes",
        f"{'x' * 300}/out": "has 300 bytes",
        "a\0b": "cannot be an output: .*null",
        "circle": "circle",
        "circle/out": "circle",
        "nowhere": "link",
        "nowhere/out": "nowhere is a link that leads nowhere",
        "file/out": "file is a file",
        "file/deep/out": "file is a file",
    }
    for name, message in refused.items():
        for check in (check_output, check_output_file):
            with pytest.raises(UsageError, match=message):
                check(tmp_path / name, overwrite=True)
    for check in (check_output, check_output_file):
        with pytest.raises(UsageError, match="root of the file system"):
            check(Path("/"), overwrite=True)
    with pytest.raises(UsageError, match="a disk of its own"):
        check_output(Path("/proc"), overwrite=True)
    if os.geteuid():
        with _read_only(tmp_path), pytest.raises(UsageError, match="is not writable"):
            check_output(tmp_path / "out", overwrite=False)


_HOLDS = """
import sys
from pathlib import Path
from starmerge_models.storage.publishing import output_file, output_folder
make, path, suffix = sys.argv[1], Path(sys.argv[2]), sys.argv[3] or None
with output_file(path) if make == "file" else output_folder(path, suffix=suffix):
    print("in work", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _making(place: Path, name: str, make: str = "folder", suffix: str = "") -> Iterator[int]:
    """Have another process make an output while the block runs; yield its id; it is killed then."""
    command = [sys.executable, "-c", _HOLDS, make, name, suffix]
    with subprocess.Popen(
        command, cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in work\n"
        yield process.pid
        process.kill()


def test_two_runs_never_make_one_output_and_clean_spares_the_living(
    starmerge: Run, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter("adapter")
    place = tmp_path / "models [x]"
    place.mkdir()
    out = place / "out"
    with _making(place, "out"):
        hidden = [path.name for path in place.iterdir()]
        refused = starmerge("merge", tiny_base, adapter, "-o", out)
        assert refused.returncode == 2
        assert f"{out} is being made by another process, in {place}/{hidden[0]}" in refused.stderr
        with pytest.raises(UsageError, match="is being made"), output_folder(out, suffix="abc"):
            raise AssertionError
        spared = starmerge("clean", place, "--delete", "--yes")
        assert spared.returncode == 0, spared.stderr
        assert "in work: a process is making it" in spared.stdout
        with pytest.raises(UsageError, match="still runs"):
            leftovers_in(place)[0].delete()
        with output_folder(place / "other"):
            pass
        assert [path.name for path in place.iterdir() if path.name != "other"] == hidden
    merged = starmerge("merge", tiny_base, adapter, "-o", out)
    assert merged.returncode == 0, merged.stderr
    notes = [line for line in merged.stderr.splitlines() if line.startswith("Note: earlier runs")]
    assert len(notes) == 1
    assert f"starmerge clean '{place}'" in notes[0]

    listed = starmerge("clean", place)
    assert listed.returncode == 0, listed.stderr
    assert f"{place}/{hidden[0]}  (left over)" in listed.stdout
    assert "s old" in listed.stdout
    unsure = starmerge("clean", place, "--delete", input="n\n")
    assert "Delete it, 0.0 MB?" in unsure.stdout
    assert (place / hidden[0]).is_dir()
    cleaned = starmerge("clean", "--delete", cwd=place, input="y\n")
    assert cleaned.returncode == 0, cleaned.stderr
    assert {path.name for path in place.iterdir()} == {"out", "other"}
    assert "Nothing is left over" in starmerge("clean", place).stdout
    wrong = starmerge("clean", place / "absent")
    assert (wrong.returncode, "is no folder" in wrong.stderr) == (2, True)


@pytest.mark.parametrize("make", ["file", "folder"])
def test_the_lock_of_a_process_ends_with_it(tmp_path: Path, make: str) -> None:
    with _making(tmp_path, "out", make):
        (left,) = leftovers(tmp_path / "out")
        assert left.is_in_work()
        check = check_output_file if make == "file" else check_output
        with pytest.raises(UsageError, match="is being made by another process"):
            check(tmp_path / "out", overwrite=True)
        check(tmp_path / "out.2", overwrite=True)
    assert leftovers(tmp_path / "out") == [left]
    assert not left.is_in_work()
    left.delete()
    assert not any(tmp_path.iterdir())


def test_one_file_of_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    with output_folder(path, member="weights", suffix="f00") as folder:
        folder.put("weights", b"new")
        folder.put("report", b"gone")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(UsageError, match="exists"), output_folder(path, member="weights"):
        raise AssertionError
    with (
        pytest.raises(ZeroDivisionError),
        output_folder(path, member="weights", overwrite=True) as folder,
    ):
        folder.put("weights", b"newer")
        raise ZeroDivisionError
    assert path.read_bytes() == b"new"
    with output_folder(path, member="weights", overwrite=True) as folder:
        folder.put("weights", b"newer")
    assert path.read_bytes() == b"newer"
    with (
        pytest.raises(Interrupted),
        output_folder(path, member="weights", overwrite=True, suffix="f00") as folder,
    ):
        folder.put("half", b"done")
        raise Interrupted(signal.SIGTERM)
    assert path.read_bytes() == b"newer"
    with output_folder(path, member="weights", overwrite=True, suffix="f00") as folder:
        assert folder.names() == ["half"]
        folder.put("weights", b"newest")
    assert path.read_bytes() == b"newest"
    assert [left.name for left in tmp_path.iterdir()] == [path.name]
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(UsageError, match="a folder or a link"),
        output_folder(tmp_path / "folder", member="weights", overwrite=True),
    ):
        raise AssertionError


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_given_suffix_is_made_by_one_process_and_then_gone_on_with(tmp_path: Path) -> None:
    with _making(tmp_path, "out", suffix="f00"):
        partial = tmp_path / ".out.partial-f00"
        (partial / "done").write_text("half")
        with (
            pytest.raises(UsageError, match="is being made"),
            output_folder(tmp_path / "out", suffix="f00"),
        ):
            raise AssertionError
        assert (partial / "done").read_text() == "half"
    with pytest.raises(Interrupted) as caught, output_folder(tmp_path / "out", suffix="f00"):
        raise Interrupted(signal.SIGTERM)
    assert caught.value.kept == [partial]
    assert _read(partial) == {"done": "half"}
    with output_folder(tmp_path / "out", suffix="f00") as folder:
        assert _read(folder.path) == {"done": "half"}
    assert _read(tmp_path / "out") == {"done": "half"}
    for error in (Interrupted(signal.SIGINT), KeyboardInterrupt()):
        for suffix in (None, "f00"):
            with pytest.raises(type(error)), output_folder(tmp_path / "other", suffix=suffix):
                raise error
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "other", suffix="f00"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="no suffix"), output_folder(tmp_path / "x", suffix="a/b"):
        raise AssertionError


def test_the_only_copy_of_a_folder_is_not_deleted(starmerge: Run, tmp_path: Path) -> None:
    for name in (".a.replaced-x1", ".b.replaced-x1", "b", ".c.partial-x1", ".d.partial", ".e"):
        _write(tmp_path / name, {"file": "x"})
    (tmp_path / ".f.partial-x").symlink_to(tmp_path / "b")
    os.utime(tmp_path / ".b.replaced-x1" / "file", (0, time.time() - 5 * 86400))
    cleaned = starmerge("clean", tmp_path, "--delete", "--yes")
    assert cleaned.returncode == 0, cleaned.stderr
    assert ".a.replaced-x1  (the only copy: its output does not exist" in cleaned.stdout
    assert "Deleted 2" in cleaned.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".a.replaced-x1", "b", ".d.partial", ".e", ".f.partial-x"}


def test_a_leftover_says_its_size_and_age(tmp_path: Path) -> None:
    folder = tmp_path / ".out.partial-abc"
    _write(folder, {"sub/file": "x" * 100_000})
    for path in (folder, folder / "sub"):
        os.utime(path, (0, 1000))
    os.utime(folder / "sub" / "file", (0, 5000))
    (left,) = leftovers(tmp_path / "out")
    assert left == Leftover(folder, "partial")
    assert left.written == 5000
    assert 100_000 <= left.nbytes < 150_000
    shutil.rmtree(folder)
    with pytest.raises(StarmergeError, match="cannot be deleted"):
        left.delete()


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_merge_that_is_asked_to_end_keeps_what_is_done_on_sigterm_alone(
    loaded: Forks,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    number: signal.Signals,
    name: str,
    code: int,
) -> None:
    """The signal comes when the weights are written and the card is about to be."""
    adapter, out = make_adapter("adapter"), tmp_path / "out"
    _write(out, _OLD)
    arguments = ["merge", tiny_base, adapter, "-o", out, "--overwrite"]
    finished = loaded.run(arguments, interrupt=("/README.md", int(number)))
    assert finished.code == code
    (said,) = finished.err.strip().splitlines()
    kept = list(tmp_path.glob(".out.partial-*"))
    assert _read(out) == _OLD
    assert set(tmp_path.iterdir()) == {out, adapter, *kept}
    if number == signal.SIGINT:
        assert said == f"Stopped by {name}. No partial output was left."
        assert not kept
        return
    assert said.startswith(f"Stopped by {name}. The partial output is kept in {kept[0]}: run")
    again = loaded.run(arguments)
    assert again.code == 0, again.err
    assert "21 of 21 tensors were there already" in again.out
    assert not list(tmp_path.glob(".out.partial-*"))
