"""A run as those who operate it see it: events, heartbeats, exit codes, by real processes."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import load_file

from starmerge_models import cli, events
from starmerge_models.events import Event
from tests.conftest import MakeAdapter
from tests.forks import Forks

Run = Callable[..., subprocess.CompletedProcess[str]]

_PAGE = (Path(__file__).parents[1] / "docs" / "operation.md").read_text(encoding="utf-8")
_KINDS = {
    kind.name: kind
    for kind in vars(events).values()
    if hasattr(kind, "__dataclass_fields__") and kind is not Event
}
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z")

_SLOW = '''
import sys
import time
import warnings
from pathlib import Path
from starmerge_models.deltas import total
from starmerge_models.methods.method import Merge, method

@method("slow")
class Slow(Merge):
    """The sum of the task vectors, with a rest after each."""

    seconds: float = 0.0

    def merge(self, deltas, tensor, survey):
        Path(__file__).with_name("begun").touch()
        warnings.warn(f"{tensor.name} is odd")
        print("one\\rtwo", file=sys.stderr)
        time.sleep(self.seconds)
        return total(deltas)
'''


@pytest.fixture
def arguments(tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> list[object]:
    """Return the arguments of a merge of two adapters, by a method that can be slow."""
    (tmp_path / "slow.py").write_text(_SLOW)
    models = (make_adapter("one", seed=1), make_adapter("two", seed=2))
    method = ("-m", f"{tmp_path}/slow.py:Slow")
    return ["merge", tiny_base, *models, "-o", tmp_path / "out", "--threads", 1, *method]


def parsed(stderr: str) -> list[dict[str, Any]]:
    """Return the events of a command; every line of standard error must be one."""
    found = [json.loads(line) for line in stderr.splitlines()]
    for event in found:
        fields = {field.name for field in dataclasses.fields(_KINDS[event["event"]])}
        assert set(event) == {"time", "level", "event", "command", "run"} | fields
        assert _TIME.fullmatch(event["time"])
    assert len({event["run"] for event in found}) == 1
    return found


def of(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event for event in found if event["event"] == name]


def test_a_merge_tells_all_that_happens_in_json(
    starmerge: Run, arguments: list[object], tmp_path: Path
) -> None:
    finished = starmerge(*arguments, "--log", "json")
    assert finished.returncode == 0, finished.stderr
    found = parsed(finished.stderr)
    assert found[0]["event"] == "start"
    assert found[-1]["event"] == "finish"
    assert {event["command"] for event in found} == {"merge"}
    (plan,) = of(found, "plan")
    out = tmp_path / "out"
    written = load_file(out / "model.safetensors")
    report = json.loads((out / "merge_report.json").read_text())
    assert plan["models"] == ["one", "two"]
    assert plan["method"] == report["recipe"]["method"]
    assert (plan["tensors"], plan["merged"], plan["threads"]) == (len(written), 4, 1)
    assert plan["output"] == str(out)
    assert re.fullmatch(r"[0-9a-f]{32}", plan["fingerprint"])
    merged = [event for event in of(found, "tensor_done") if event["phase"] == "merging"]
    sizes = {event["tensor"]: event["nbytes"] for event in merged}
    assert sizes == {name: tensor.nbytes for name, tensor in written.items()}
    assert [event["count"] for event in merged] == list(range(1, len(written) + 1))
    assert {event["total"] for event in merged} == {len(written)}
    assert all(event["seconds"] > 0 for event in merged)
    (ended,) = (e for e in of(found, "phase_finished") if e["phase"] == "merging")
    assert ended["done"] == sum(sizes.values())
    assert [e["phase"] for e in of(found, "phase_started")] == [
        e["phase"] for e in of(found, "phase_finished")
    ]
    assert [event["path"] for event in of(found, "published")] == [str(out)]
    last = found[-1]
    assert (last["exit_code"], last["outputs"]) == (0, [str(out)])
    assert last["seconds"] > ended["seconds"]


def test_warnings_and_lines_of_other_libraries_are_events_too(
    starmerge: Run, arguments: list[object]
) -> None:
    finished = starmerge("--log=json", *arguments)
    assert finished.returncode == 0, finished.stderr
    found = parsed(finished.stderr)
    warned = of(found, "warning")
    assert len(warned) == 4
    assert all("q_proj" in e["message"] or "v_proj" in e["message"] for e in warned)
    assert {event["category"] for event in warned} == {"UserWarning"}
    assert all("slow.py:" in event["source"] for event in warned)
    lines = [event["message"] for event in of(found, "log") if event["logger"] == "stderr"]
    assert Counter(lines) == {"one": 4, "two": 4}


def test_in_a_file_a_short_run_tells_nothing_and_a_long_one_how_far_it_is(
    starmerge: Run, tiny_base: Path, arguments: list[object], tmp_path: Path
) -> None:
    short = starmerge("merge", tiny_base, tmp_path / "one", tmp_path / "two", "-o", tmp_path / "o")
    assert (short.returncode, short.stderr) == (0, "")
    # Warnings and other libraries' lines stand as they are.
    finished = starmerge(*arguments, "-p", "seconds=0.15", "--heartbeat", 0.1)
    assert finished.returncode == 0, finished.stderr
    beats = [line for line in finished.stderr.splitlines() if _TIME.match(line)]
    assert len(beats) >= 3
    form = r"\S+Z merging: 0\.\d MB of 0\.\d MB, 0\.\d MB/s, (\d+ s left, )?[\d.]+ [MG]B of memory"
    assert all(re.fullmatch(form, line) for line in beats), beats
    others = [line for line in finished.stderr.splitlines() if not _TIME.match(line)]
    assert sum(line.startswith("Warning: model.layers.") for line in others) == 4


def test_as_text_every_line_has_its_time(starmerge: Run, arguments: list[object]) -> None:
    finished = starmerge(*arguments, "--log", "text")
    assert finished.returncode == 0, finished.stderr
    lines = finished.stderr.splitlines()
    assert all(_TIME.match(line) for line in lines)
    told = [line.partition(" ")[2] for line in lines]
    assert told[0].startswith("starmerge ")
    assert any(line.startswith("plan: ") and "4 of " in line for line in told)
    assert any(line.startswith("merging: done, ") for line in told)
    assert told[-1].startswith("finished with exit code 0 after ")
    assert len(told) < 25  # none for each tensor, but for the method's own


@pytest.mark.parametrize("log", ["auto", "json"])
def test_quiet_tells_errors_alone(starmerge: Run, arguments: list[object], log: str) -> None:
    finished = starmerge(
        "--quiet", *arguments, "--log", log, "-p", "seconds=0.05", "--heartbeat", 0.1
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "Model: " in finished.stdout
    again = starmerge(*arguments, "--log", log, "--quiet")  # the output stands there
    assert again.returncode == 2
    (line,) = again.stderr.splitlines()
    assert "out exists" in (json.loads(line)["message"] if log == "json" else line)


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_told_with_what_is_kept(
    arguments: list[object], how: signal.Signals, code: int, loaded: Forks, tmp_path: Path
) -> None:
    command = [*arguments, "-p", "seconds=0.2", "--log", "json"]
    with loaded.running(command) as (process, ending):
        while not (tmp_path / "begun").exists():  # it rests in the first tensor of all
            assert not ending.done(), ending.result()
            time.sleep(0.005)
        os.kill(process, how)
    returned, found = ending.result().code, parsed(ending.result().err)
    last = found[-1]
    assert returned == last["exit_code"] == code
    assert (last["event"], last["signal"]) == ("error", how.name)
    assert not (tmp_path / "out").exists()
    kept = list(tmp_path.glob(".out.partial-*"))
    assert last["kept"] == [str(path) for path in kept]
    assert len(kept) == (how == signal.SIGTERM)
    if kept:
        again = loaded.run(command)
        assert again.code == 0, again.err
        (then,), (now,) = of(found, "plan"), of(parsed(again.err), "plan")
        assert then["fingerprint"] == now["fingerprint"]


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["methods", "star"], 0, None),
        (["merge", "--bogus"], 2, "No such option: --bogus"),
        (["--bogus", "methods"], 2, "No such option: --bogus"),
        (["--heartbeat", "nan", "methods"], 2, "'--heartbeat'"),
        (["methods", "--heartbeat", "soon"], 2, "'--heartbeat'"),
        (["bogus"], 2, "No such command 'bogus'"),
        (["merge", "gone", "gone", "-o", "out"], 2, "gone does not exist"),
        (["verify", "{broken}"], 1, "merge_report.json"),
        (["verify", "{changed}"], 1, None),
    ],
)
def test_exit_codes_and_the_last_event(
    given: list[str],
    code: int,
    message: str | None,
    starmerge: Run,
    tmp_path: Path,
    merged: dict[str, Path],
) -> None:
    finished = starmerge("--log", "json", *(word.format(**merged) for word in given), cwd=tmp_path)
    last = parsed(finished.stderr)[-1]
    assert finished.returncode == last["exit_code"] == code
    assert last["event"] == ("finish" if message is None else "error")
    assert message is None or message in last["message"]


@pytest.fixture(scope="module")
def merged(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of a merge: as it was written, with a byte changed, with a broken report."""
    from starmerge_models import merge

    folder = tmp_path_factory.mktemp("merged")
    paths = {name: folder / name for name in ("merged", "changed", "broken")}
    for path in paths.values():
        merge(tiny_base, {"a": tiny_base, "b": tiny_base}, "average", output=path)
    weights = paths["changed"] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (paths["broken"] / "merge_report.json").write_text("{")
    return paths


def test_debug_tells_the_traceback_in_the_event(starmerge: Run) -> None:
    finished = starmerge("merge", "gone", "gone", "-o", "out", "--log", "json", "--debug")
    (*_, last) = parsed(finished.stderr)
    assert finished.returncode == last["exit_code"] == 2
    assert last["traceback"].startswith("Traceback")
    assert "UsageError: gone does not exist" in last["traceback"]


def test_other_commands_tell_of_their_phases(
    starmerge: Run, tiny_base: Path, make_adapter: MakeAdapter, merged: dict[str, Path]
) -> None:
    models = (make_adapter("one", seed=1), make_adapter("two", seed=2))
    verified = starmerge("verify", merged["merged"], "--json", "--log", "json")
    inspected = starmerge("inspect", tiny_base, *models, "--json", "--log", "json")
    for finished, phase in ((verified, "verifying"), (inspected, "Inspecting")):
        assert finished.returncode == 0, finished.stderr
        assert json.loads(finished.stdout)
        phases = [event["phase"] for event in of(parsed(finished.stderr), "phase_finished")]
        assert phase in phases


def test_a_reader_of_the_log_that_ends_ends_no_merge(
    loaded: Forks, arguments: list[object], tmp_path: Path
) -> None:
    finished = loaded.run([*arguments, "--log", "json"], unread=[2])
    assert (finished.code, finished.err) == (0, "")
    assert (tmp_path / "out" / "config.json").is_file()


_PROGRAM = """
import sys
import logging
import starmerge_models
base, folder = sys.argv[1:]
starmerge_models.merge(base, {"a": base, "b": base}, "average", output=f"{folder}/first")
print("listens", file=sys.stderr)
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
starmerge_models.merge(base, {"a": base, "b": base}, "average", output=f"{folder}/second")
handlers = logging.getLogger("starmerge_models").handlers
assert [type(handler) for handler in handlers] == [logging.NullHandler], handlers
"""


def test_a_program_decides_itself_what_is_logged(tiny_base: Path, tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM, tiny_base, tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    first, *lines = finished.stderr.splitlines()
    assert first == "listens"  # and nothing before
    assert lines[0].startswith("starmerge_models plan: average of a, b into ")
    assert all(line.startswith("starmerge_models ") for line in lines)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--heartbeat", "never"], "--heartbeat"),
        (["--heartbeat=0"], "--heartbeat"),
        (["--heartbeat"], "--heartbeat"),
    ],
)
def test_wrong_common_options_are_told_as_the_right_ones_say(
    starmerge: Run, wrong: list[str], named: str
) -> None:
    for asked in (["--log", "json"], ["--log=json"]):
        finished = starmerge(*asked, "methods", *wrong)
        assert finished.returncode == 2
        (event,) = parsed(finished.stderr)
        assert event["event"] == "error"
        assert event["exit_code"] == 2
        assert named in event["message"]


def test_closed_streams_end_no_merge_and_lead_into_no_file(
    starmerge: Run, loaded: Forks, arguments: list[object], tmp_path: Path
) -> None:
    closed = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "starmerge_models"]
    finished = subprocess.run([*closed, *map(str, arguments), "--debug"], check=False)
    assert finished.returncode == 0
    ended = loaded.run([*arguments, "--overwrite", "--log", "json"], closed=True)
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert starmerge("verify", tmp_path / "out").returncode == 0


def test_a_reader_of_the_results_that_ends_is_told_in_the_last_event(
    loaded: Forks, arguments: list[object], tmp_path: Path
) -> None:
    finished = loaded.run([*arguments, "--log", "json"], unread=[1])
    assert finished.code == 1
    found = parsed(finished.err)
    assert [event["path"] for event in found if event["event"] == "published"]
    assert (found[-1]["event"], found[-1]["exit_code"]) == ("error", 1)
    assert "standard output" in found[-1]["message"]
    assert (tmp_path / "out" / "merge_report.json").is_file()


_LATE = """
import logging, sys, threading
from starmerge_models.cli.log import Reporter
def late():
    logging.getLogger("starmerge_models").warning("late")
    print("late", file=sys.stderr)
def run(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
reporter = Reporter()
reporter.configure("json", quiet=False, heartbeat=30, debug=False)
run(lambda: print("in time", file=sys.stderr))
reporter.fail("It ends.", 1)
run(late)
reporter.close()
run(late)
print("the interpreter", file=sys.stderr)
"""


def test_nothing_that_a_thread_says_late_follows_the_last_event() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", _LATE], capture_output=True, text=True, check=True
    )
    *events, last = finished.stderr.splitlines()
    assert [event["message"] for event in parsed("\n".join(events))] == ["in time", "It ends."]
    assert last == "the interpreter"


@pytest.mark.parametrize("command", [["methods"], ["merge", "--help"]])
def test_a_list_whose_reader_has_seen_enough_ends_in_silence(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    finished = subprocess.run(
        [sys.executable, "-m", "starmerge_models", *command],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (128 + signal.SIGPIPE, "")


def test_no_command_has_an_option_that_is_common_to_all() -> None:
    def options(command: Any) -> set[str]:
        own = {name for parameter in command.params for name in parameter.opts}
        return own.union(*map(options, getattr(command, "commands", {}).values()))

    group: Any = typer.main.get_command(cli.app)
    common = {name for parameter in group.params for name in parameter.opts}
    assert {"--log", "--quiet", "--heartbeat", "--debug"} <= common
    assert not common & set().union(*map(options, group.commands.values()))


def test_values_and_what_follows_two_dashes_stay_where_they_are(starmerge: Run) -> None:
    missing = starmerge("methods", "--log", "json", "--", "--quiet")
    assert missing.returncode == 2
    assert "--quiet" in parsed(missing.stderr)[-1]["message"]
    lacking = starmerge("methods", "--log")
    assert lacking.returncode == 2
    assert "--log" in lacking.stderr


def test_the_page_lists_every_event_with_every_field_and_its_type() -> None:
    section = _PAGE.partition("\n## Events\n")[2].partition("\n## ")[0]
    listed: dict[str, dict[str, str]] = {}
    for row in re.findall(r"^\|(.*)\|$", section, flags=re.MULTILINE):
        name, field, kind = (cell.strip(" `") for cell in row.split("|")[:3])
        if name in _KINDS:
            listed.setdefault(name, {})
            if field:
                listed[name][field] = kind
    words = {
        "str": "string",
        "int": "integer",
        "float": "number",
        "list[str]": "strings",
        "None": "null",
    }
    assert listed == {
        name: {
            field.name: " or ".join(words[part] for part in str(field.type).split(" | "))
            for field in dataclasses.fields(kind)
        }
        for name, kind in _KINDS.items()
    }
