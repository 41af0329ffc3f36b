"""Commands of starmerge in forks of one process that has everything loaded.

A command line starts in seconds, as it imports torch; a fork of a process that has, at once. So
hundreds of commands can be killed, starved of disk space, or raced against each other. The process
is one of pytest's, or a new one that runs this file as a script. It reads a JSON list of
:class:`Run` a line, runs them at the same moment, and writes a JSON list of :class:`Ended`.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]

LIMIT = 60.0
"""Seconds after which a command is taken for hung; none here takes three."""


@dataclass
class Run:
    """One command, and what happens to it."""

    argv: list[str]
    module: str | None = None
    """A module whose ``main`` is called in place of that of starmerge."""
    env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    path: list[str] = field(default_factory=list)
    """Folders of packages that are installed for this command alone."""
    uid: int | None = None
    """Run as this user, who has no rights of the superuser."""
    after: float = 0.0
    """Seconds that the command waits before it begins."""
    kill_after: float | None = None
    """Seconds after which it is killed."""
    kill_before: int | None = None
    """Number of the operation on files before which it is killed."""
    pid: str | None = None
    """A file to write the number of its process to before it begins."""
    shard_bytes: int | None = None
    """Largest shard of the output."""
    part_bytes: int | None = None
    """Largest part that a file is sent to an object store in."""
    unread: list[int] = field(default_factory=list)
    """Of the streams 1 and 2 those whose reader has gone."""
    closed: bool = False
    """Begin without standard streams."""
    own_group: bool = False
    """Run in a group of processes of its own, as in a terminal."""
    side_by_side: bool = False
    """Do not put small tensors together, so that several are worked on at once."""
    fill: tuple[str, str, int] | None = None
    """A file to make, once a name that holds the second text is opened or made, so large that the
    third leaves of its disk this many bytes free."""
    interrupt: tuple[str, int] | None = None
    """The end of a name, and the signal that comes as that name is opened."""
    change: tuple[int, str, str, int] | None = None
    """Before which operation on files to do what to which place: "chmod" it to a mode, or
    "truncate" it to a length."""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    """What it returned; below zero: minus the number of the signal that ended it."""
    out: str
    err: str
    seconds: float


class Forks:
    """What runs commands in forks of a process.

    Args:
        questions: Where to write a JSON list of runs a line.
        answers: Where to read how they ended.
    """

    def __init__(self, questions: TextIO, answers: TextIO) -> None:
        self._questions, self._answers = questions, answers

    def at_once(self, runs: Sequence[Run]) -> list[Ended]:
        """Run commands at the same moment, and wait for all of them."""
        self._questions.write(json.dumps([asdict(run) for run in runs]) + "\n")
        self._questions.flush()
        return [Ended(**ended) for ended in json.loads(self._answers.readline())]

    def run(self, argv: Sequence[object], **options: Any) -> Ended:
        """Run one command; the options are those of :class:`Run`."""
        (ended,) = self.at_once([Run(list(map(str, argv)), **options)])
        return ended

    @contextmanager
    def running(
        self, argv: Sequence[object], **options: Any
    ) -> Iterator[tuple[int, Future[Ended]]]:
        """Run one command beside what the context does; yield its process, and how it will end.

        The context waits at its end until the command has ended.
        """
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
            file = Path(folder) / "pid"
            ending = pool.submit(self.run, argv, pid=str(file), **options)
            while not file.exists():
                assert not ending.done(), ending.result()
                time.sleep(0.005)
            yield int(file.read_text()), ending


@contextmanager
def started(*modules: str, **env: str) -> Iterator[Forks]:
    """Start a process for forks.

    Args:
        modules: What it loads beside that which a merge needs.
        env: Variables for it and all commands, such as ``LD_PRELOAD``.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forks", *modules],
        cwd=ROOT,
        env=os.environ | _own_variables() | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        yield Forks(server.stdin, server.stdout)
        server.stdin.close()


def _own_variables() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *sys.path])
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def begin_to_serve(place: Path, *modules: str) -> Callable[[], None]:
    """Fork a process that lets others run commands in forks of it; return what ends it.

    It costs nothing until it is asked: what it loads beside the modules of this process, it loads
    then.

    Args:
        place: Where to make the Unix socket at which it is asked.
        modules: What it loads beside that which a merge needs.
    """
    reader, writer = os.pipe()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    listener.listen()
    server = os.fork()
    if not server:
        try:
            os.close(writer)
            _be_no_test()
            _serve_at(listener, reader, modules)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(reader)
    listener.close()

    def end() -> None:
        os.close(writer)
        os.waitpid(server, 0)

    return end


@contextmanager
def asking(place: Path) -> Iterator[Forks]:
    """Let a process that serves run commands."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(place))
        with connection.makefile("w") as questions, connection.makefile("r") as answers:
            yield Forks(questions, answers)


def tree(place: Path) -> dict[str, bytes]:
    """Return the content of a folder, or of a file; nothing if it is not there."""
    if place.is_file():
        return {"": place.read_bytes()}
    return {
        file.relative_to(place).as_posix(): file.read_bytes()
        for file in sorted(place.rglob("*"))
        if file.is_file()
    }


def hidden(place: Path) -> list[str]:
    """Return the hidden names beside an output."""
    return sorted(left.name for left in place.parent.glob(f".{place.name}.*"))


def remove(place: Path) -> None:
    """Delete an output, and what is hidden beside it."""
    for left in [*place.parent.glob(f".{place.name}.*"), place]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def copy(source: Path, place: Path) -> None:
    """Copy a folder or a file."""
    (shutil.copytree if source.is_dir() else shutil.copy)(source, place)


# What follows runs in the process that serves, and in its forks.


def watch(step: Callable[[], None]) -> None:
    """Call a function before each operation of this process that changes files."""
    from starmerge_models.storage import publishing

    def watched(module: Any, name: str) -> None:
        original = getattr(module, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            step()
            return original(*args, **kwargs)

        setattr(module, name, wrapper)

    for name in ("pwrite", "write", "fsync", "mkdir", "rename", "replace", "unlink", "ftruncate"):
        watched(os, name)
    watched(shutil, "copyfile")
    watched(shutil, "rmtree")
    watched(Path, "write_bytes")
    watched(publishing, "exchange")


def _before_operations(steps: dict[int, Callable[[], None]]) -> None:
    """Call functions before operations that change files, by their numbers, from 1 on."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count in steps:
            steps[count]()

    watch(step)


def _fill_when_opened(file: str, trigger: str, leave: int) -> None:
    """Eat the space of a disk at the moment when a name is opened or made."""
    is_done = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal is_done
        if is_done or event not in ("open", "os.mkdir") or trigger not in str(args[0]):
            return
        is_done = True
        free = os.statvfs(Path(file).parent)
        size = max(0, free.f_bavail * free.f_frsize - leave)
        stream = os.open(file, os.O_CREAT | os.O_WRONLY)
        if size:
            os.posix_fallocate(stream, 0, size)
        os.close(stream)

    sys.addaudithook(hook)


def _call_in_fork(program: ModuleType, question: list[Any]) -> Any:
    """Let transformers answer in a fork, which has it loaded: isolated as in a new process."""
    from starmerge_models.checkpoints import filling, isolated, renaming

    function = {renaming: renaming.naming, filling: filling.filled}[program]
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if not child:
            try:
                os.dup2(os.open(os.devnull, os.O_RDWR), 2)
                isolated._limit_memory()
                answer.write(json.dumps(function(*json.loads(json.dumps(question)))).encode())
                answer.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        answer.seek(0)
        said = answer.read()
    return json.loads(said) if said else None


def _interrupt_when_opened(ending: str, number: int) -> None:
    """Send this process a signal at the moment when a name is opened, and a child SIGTERM before.

    The child has to end at once.
    """
    is_done = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal is_done
        if is_done or event != "open" or not str(args[0]).endswith(ending):
            return
        is_done = True
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
        os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def _watch_names(run: Run) -> None:
    if run.fill is not None:
        _fill_when_opened(*run.fill)
    if run.interrupt is not None:
        _interrupt_when_opened(*run.interrupt)


def _prepare(run: Run) -> None:
    from starmerge_models.checkpoints.writer import ShardWriter
    from starmerge_models.merging import journal
    from starmerge_models.merging.executors import schedule, threads

    before = dict(os.environ)
    os.environ |= run.env
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None and any(
        name.startswith("HF_") and before.get(name) != value for name, value in run.env.items()
    ):
        importlib.reload(hub)  # which has read its environment as it was loaded
    if run.own_group:
        os.setsid()
    # A process that a shell began in the background ignores SIGINT unless told otherwise.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[:0] = run.path
    if run.cwd is not None:
        os.chdir(run.cwd)
    journal._SECONDS = 0.0  # a line after each tensor
    if "transformers" in sys.modules:
        from starmerge_models.checkpoints import configs, names

        configs.call_isolated = names.call_isolated = _call_in_fork
    if run.part_bytes is not None:
        from starmerge_models.storage import parts

        parts.PART = run.part_bytes
    if run.shard_bytes is not None:
        assert ShardWriter.__init__.__kwdefaults__ is not None
        ShardWriter.__init__.__kwdefaults__["shard_bytes"] = run.shard_bytes
    if run.side_by_side:
        threads._SMALL = 0
        schedule.LEAST = 1
    if run.uid is not None:
        os.setgroups([])
        os.setgid(run.uid)
        os.setuid(run.uid)
    steps: dict[int, Callable[[], None]] = {}
    if run.change is not None:
        number, name, place, value = run.change
        steps[number] = lambda: getattr(os, name)(place, value)
    if run.kill_before is not None:
        steps[run.kill_before] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    if steps:
        _before_operations(steps)
    _watch_names(run)
    if run.pid is not None:
        written = Path(f"{run.pid}.part")
        written.write_text(str(os.getpid()))
        written.rename(run.pid)


def _begin(run: Run, out: Any, err: Any) -> int:
    """Begin a command in a fork; return its process."""
    from starmerge_models import cli

    child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        for stream in run.unread:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, stream)
            name = {1: "stdout", 2: "stderr"}[stream]
            setattr(sys, name, os.fdopen(stream, "w", 1, closefd=False))  # of a pipe
        if run.closed:
            sys.stdin = sys.stdout = sys.stderr = None  # as Python begins then
            os.closerange(0, 3)
        _prepare(run)
        sys.argv = ["starmerge", *run.argv]
        time.sleep(run.after)
        (cli if run.module is None else importlib.import_module(run.module)).main()
        code = 0
    except SystemExit as end:
        code = 0 if end.code is None else end.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError):  # its reader may have gone
                    stream.flush()
        os._exit(code if isinstance(code, int) else 1)


def _limit(run: Run) -> float:
    return LIMIT if run.kill_after is None else run.kill_after


def _all_of(runs: Sequence[Run]) -> list[Ended]:
    begun = time.monotonic()
    with ExitStack() as stack:
        files = [
            tuple(stack.enter_context(tempfile.TemporaryFile()) for _ in ("out", "err"))
            for _ in runs
        ]
        children = {_begin(run, *files[n]): n for n, run in enumerate(runs)}
        found: dict[int, Ended] = {}
        while children:
            pause = min(_limit(runs[n]) for n in children.values()) - time.monotonic() + begun
            signal.sigtimedwait([signal.SIGCHLD], max(pause, 0.001))
            now = time.monotonic() - begun
            for child, n in list(children.items()):
                if now > _limit(runs[n]):
                    os.kill(child, signal.SIGKILL)
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    del children[child]
                    said = [stream.seek(0) or stream.read() for stream in files[n]]
                    texts = [content.decode(errors="replace") for content in said]
                    found[n] = Ended(os.waitstatus_to_exitcode(status), *texts, now)
    return [found[n] for n in range(len(runs))]


def _be_no_test() -> None:
    """Undo in a fork of pytest what it has done to its process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    for known in list(logging._handlerList):
        handler = known()
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)
    sys.unraisablehook = sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    for name in [own for own in sys.modules if own.startswith("starmerge_models_demo")]:
        del sys.modules[name]  # commands may have another in their path
    os.environ |= _own_variables()
    os.chdir(ROOT)


def _load(modules: Sequence[str]) -> None:
    import torch
    import typer.main

    from starmerge_models import cli

    torch.set_num_threads(1)
    loaded = ("merging.engine", "merging.ranks", "recipe_file", "storage.leftovers")
    # Users without rights may not reach the modules of Python itself: rich loads some late.
    own = [*(f"starmerge_models.{name}" for name in loaded), "rich.progress", "rich.pager"]
    for module in [*own, *modules]:
        importlib.import_module(module)
    # Built once, not for each command.
    typer.main.get_command = functools.cache(typer.main.get_command)
    typer.main.get_command(cli.app)
    gc.freeze()  # so that collections in forks copy no pages
    gc.enable()  # as in a new process: pytest's collects none while it loads


def _answer(questions: TextIO, answers: TextIO) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # which tells that a fork has ended
    for line in questions:
        ended = _all_of([Run(**run) for run in json.loads(line)])
        answers.write(json.dumps([asdict(one) for one in ended]) + "\n")
        answers.flush()


def _serve_at(listener: socket.socket, end: int, modules: Sequence[str]) -> None:
    """Serve each that connects in a fork, until the other side of a pipe is closed."""
    is_loaded = False
    while end not in select.select([listener, end], [], [])[0]:
        connection, _ = listener.accept()
        if not is_loaded:
            _load(modules)
            is_loaded = True
        if not os.fork():
            listener.close()
            _answer(connection.makefile("r"), connection.makefile("w"))
            return
        connection.close()


if __name__ == "__main__":
    _load(sys.argv[1:])
    own_answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _answer(sys.stdin, own_answers)
