"""A study that is killed again and again; run as a script: STUDY.yaml WHOLE KILLED PARTS.

The study runs whole once, which also loads all that is imported. Then it runs in forks of this
process, each of which is killed as soon as its store has another part of the whole one's bytes; the
last one ends. Prints how many were killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from starmerge_models.study.execute import run_study
from starmerge_models.study.store import RUNS
from starmerge_models.study.study_file import load_study


def main(study: Path, whole: Path, folder: Path, parts: int) -> int:
    """Run a study whole and in pieces; return how many attempts were killed."""
    run_study(load_study(study), whole)
    size = (whole / RUNS).stat().st_size
    moments = [size * part // parts for part in range(parts)]
    kills = 0
    for most in [*moments, None]:
        child = os.fork()
        if child == 0:
            run_study(load_study(study), folder)
            os._exit(0)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            store = folder / RUNS
            if most is not None and store.exists() and store.stat().st_size >= most:
                os.kill(child, signal.SIGKILL)
                kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
                # The last line of a process that is killed may be cut off.
                with store.open("r+b") as stream:
                    stream.truncate(max(0, store.stat().st_size - 7))
                break
            time.sleep(0.001)
    return kills


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:4]), int(sys.argv[4])))
