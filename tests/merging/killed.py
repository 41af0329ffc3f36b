"""Merges that are killed before each of their operations on files, and run again.

Its argument is a JSON object: {"base", "models", "method", "kind", "dtype", "output", "overwrite",
"stride", "moments"}. Each merge runs in a fork of this process, which has everything loaded. It
prints a JSON object: how many operations there are, and what went wrong.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A merge imports these late; each fork would do so again.
import gguf  # noqa: F401
import huggingface_hub.hf_api  # noqa: F401

import starmerge_models as sm
import starmerge_models.merging.engine
from starmerge_models.merging import journal
from tests.forks import tree, watch


def merge(task: dict[str, Any], output: Path) -> int:
    """Merge, with a journal that is flushed after every tensor; return what was taken up."""
    journal._SECONDS = 0.0
    result = sm.merge(
        task["base"],
        task["models"],
        task["method"],
        output=output,
        output_kind=task["kind"],
        dtype=task["dtype"],
        overwrite=task["overwrite"],
        threads=1,
    )
    return result.resumed


def killed_before(n: int) -> Callable[[], None]:
    """Return what ends this process when it is called for the n-th time."""
    left = n

    def step() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def forked(work: Callable[[], int]) -> tuple[int, int]:
    """Run some work in a fork; return the signal that ended it, or 0, and what it returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        code = 1
        try:
            os.write(writer, str(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status), 0
    if status:
        raise SystemExit(f"a merge failed with {status}")
    return 0, int(said)


def kill_and_resume(task: dict[str, Any]) -> dict[str, Any]:  # noqa: PLR0915  (a story)
    """Kill a merge and resume it; return what came out."""
    output = Path(task["output"])
    reference = output.with_name(f"reference{output.suffix}")
    forked(lambda: merge(task | {"overwrite": False}, reference))
    wanted = tree(reference)
    # The card has the folder's name.
    name = {file for file in wanted if file.endswith("README.md")}
    old = output.with_name(f"old{output.suffix}")
    if task["overwrite"]:
        other = task | {"method": "task_arithmetic" if task["kind"] != "unified" else "emr"}
        forked(lambda: merge(other | {"models": task["models"][:2], "overwrite": False}, old))
    before = tree(old) if task["overwrite"] else {}
    wrong: list[str] = []
    resumed = operations = 0

    def start() -> None:
        for left in output.parent.glob(f".{output.name}.*"):
            shutil.rmtree(left)
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        if task["overwrite"]:
            (shutil.copytree if old.is_dir() else shutil.copy)(old, output)

    def check(where: str) -> None:
        nonlocal resumed
        found = tree(output) if output.exists() else {}
        if without(found) not in (without(before), without(wanted)):
            wrong.append(f"{where}: a part of a folder stands under the name")
        again = task
        if without(found) == without(wanted):
            again = task | {"overwrite": True}
        ended, count = forked(lambda: merge(again, output))
        resumed += count
        if ended or without(tree(output)) != without(wanted):
            wrong.append(f"{where}: run again, it is another")
        if left := [str(p) for p in output.parent.glob(f".{output.name}.partial*")]:
            wrong.append(f"{where}: left {left}")

    def without(content: dict[str, bytes]) -> dict[str, bytes]:
        return {file: data for file, data in content.items() if file not in name}

    def killed(n: int) -> int:
        watch(killed_before(n))
        return merge(task, output)

    n = 1
    while True:
        start()
        ended, _ = forked(lambda n=n: killed(n))
        if not ended:
            break
        check(f"before operation {n}")
        operations, n = n, n + task["stride"]
    draw = random.Random(0)
    begun = time.monotonic()
    start()
    forked(lambda: merge(task, output))
    took = time.monotonic() - begun
    for moment in range(task["moments"]):
        start()
        child = os.fork()
        if not child:
            merge(task, output)
            os._exit(0)
        time.sleep(draw.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check(f"at moment {moment}")
    return {"operations": operations, "resumed": resumed, "wrong": wrong}


def main() -> None:
    """Do what the argument says."""
    print(json.dumps(kill_and_resume(json.loads(sys.argv[1]))), flush=True)
