"""The command line: one file per command; heavy modules are imported when a command runs."""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import partial
from inspect import cleandoc
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from starmerge_models import __version__
from starmerge_models.cli import (
    calibrate,
    choose,
    clean,
    demo,
    evaluate,
    finetune,
    inspect,
    merge,
    methods,
    push,
    schema,
    study,
    suite,
    tasks,
    verify,
)
from starmerge_models.cli.commands import Command, Group, WrongCommandLine
from starmerge_models.cli.log import Mode, Reporter
from starmerge_models.errors import Interrupted, StarmergeError, UsageError
from starmerge_models.progress import HEARTBEAT

_EXIT_CODES = (
    "Exit codes: 0 done; 1 an input or the machine failed, or [b]verify[/b] finds a difference; 2 "
    "wrong usage; 128 and its number after a signal: 130 Ctrl-C, 143 SIGTERM. "
)
_OPTIONS_OF_ALL = (
    "Also, before or after the command: --log auto|text|json, --quiet, --heartbeat, --debug; see "
    "starmerge --help."
)


app = typer.Typer(
    cls=Group,
    epilog=_EXIT_CODES,
    help="Merge fine-tuned models of one base into one multi-task model, without data and "
    "without training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _help_of(command: Callable[..., None]) -> str:
    """Return a command's docstring with each paragraph on one line, as typer keeps its breaks."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for _command in (
    merge.merge,
    inspect.inspect,
    calibrate.calibrate,
    evaluate.evaluate,
    choose.choose,
    suite.suite,
    study.study,
    finetune.finetune,
    verify.verify,
    push.push,
    clean.clean,
    methods.methods,
    tasks.tasks,
    schema.schema,
):
    app.command(cls=Command, help=_help_of(_command), epilog=_OPTIONS_OF_ALL)(_command)
app.add_typer(demo.app, name="demo")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    log: Annotated[
        Mode,
        typer.Option(
            help="What is written to standard error. [b]auto[/b]: a progress bar, or in a file a "
            "line each half minute. [b]text[/b]: what happens, in lines with times. [b]json[/b]: "
            "events, each tensor among them, a JSON object a line.",
        ),
    ] = "auto",
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="Write only errors; results go to standard output as always."),
    ] = False,
    heartbeat: Annotated[
        float,
        typer.Option(min=0.1, metavar="SECONDS", help="Time between progress lines."),
    ] = HEARTBEAT,
    debug: Annotated[
        bool, typer.Option("--debug", help="Write debug messages, and tracebacks of errors.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    if context.obj is not None:
        context.obj.start(context.invoked_subcommand)


def main() -> None:
    """Run the command line.

    Exits with 2 for wrong usage, 1 for a failure, and 128 and its number after a signal: 130 after
    Ctrl-C, 143 after SIGTERM.
    """
    _raise_on_signals()
    _open_closed_streams()
    # Idle BLAS threads otherwise spin and starve the others on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_memory()
    # At exit Python would look for garbage among all objects, for 0.4 s where torch is imported.
    atexit.register(gc.freeze)
    # Deprecations between libraries do not concern the user of a command.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # σ and η on a terminal that knows only ASCII
    with closing(Reporter()) as reporter:
        sys.exit(_run(reporter))


def _run(reporter: Reporter) -> int:
    """Run the command of the command line; return its exit code."""
    try:
        result = app(standalone_mode=False, obj=reporter, prog_name="starmerge")
    except WrongCommandLine as error:
        # The message is empty after a command line without words, for which typer prints the help.
        if error.format_message() or not reporter.is_for_people:
            said = _ended(error.format_message() or "No command is given.")
            reporter.fail(f"{said}{_help_for(error.ctx)}", 2)
        return 2
    except typer.Abort:
        reporter.fail("The question was not answered, so nothing was changed.", 1)
        return 1
    except Exception as error:
        exit_code = 2 if isinstance(error, UsageError | ModuleNotFoundError) else 1
        trace = traceback.format_exc() if reporter.debug else None
        reporter.fail(_message_of(error), exit_code, traceback=trace)
        return exit_code
    except Interrupted as interruption:
        for number in (signal.SIGINT, signal.SIGTERM):  # which would hide how this ended
            signal.signal(number, signal.SIG_IGN)
        exit_code = 128 + interruption.signal
        reporter.fail(
            f"Stopped by {_described(interruption)}",
            exit_code,
            signal=interruption.signal.name,
            kept=[str(path) for path in interruption.kept],
        )
        return exit_code
    except SystemExit as ending:
        if not isinstance(ending.__context__, BrokenPipeError):
            raise
        return _unread(reporter)
    exit_code = result if isinstance(result, int) else 0
    reporter.finish(exit_code)
    return exit_code


def _unread(reporter: Reporter) -> int:
    """Log that the reader of standard output has closed it; return the exit code."""
    if not reporter.has_worked:  # as of `starmerge methods | head`
        exit_code = 128 + signal.SIGPIPE
        reporter.finish(exit_code)
        return exit_code
    reporter.fail(
        "The reader of standard output has closed it, so the command ended at its next line of "
        "output. Finished results are kept; run the command again for the rest.",
        1,
    )
    return 1


def _raise_on_signals() -> None:
    """Turn Ctrl-C and SIGTERM into an exception, so that the command can clean up before it ends.

    A signal that is already ignored, as nohup and shells do for background processes, stays
    ignored. Processes that a library forks keep the default handlers.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            os.register_at_fork(
                after_in_child=partial(signal.signal, number, signal.getsignal(number))
            )
            signal.signal(number, interrupt)


def _open_closed_streams() -> None:
    """Open standard streams that the caller has closed on the null device.

    The next files to be opened would otherwise get their descriptors, and messages that a C library
    writes to standard error would end up in an output.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_ERROR:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


_STANDARD_ERROR = 2


def _described(interruption: Interrupted) -> str:
    """Return a line with the signal and the partial outputs that are kept."""
    name = "Ctrl-C" if interruption.signal == signal.SIGINT else interruption.signal.name
    if not interruption.kept:
        return f"{name}. No partial output was left."
    kept = " and ".join(map(str, interruption.kept))
    return (
        f"{name}. The partial output is kept in {kept}: run the same command again to go on with "
        "it, or delete it (starmerge clean deletes outputs with hidden names)."
    )


def _keep_memory() -> None:
    """Reduce page faults.

    Torch gets huge pages for large tensors, and glibc keeps freed memory for the next allocation
    instead of returning it to the system: panels of tensors are allocated and freed all the time.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
            mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?", "!")) else f"{sentence}."


def _help_for(context: Any) -> str:
    """Say where the options of the command are explained."""
    return "" if context is None else f" See `{context.command_path} --help`."


def _message_of(error: Exception) -> str:
    """Return the message for the user."""
    if isinstance(error, StarmergeError | OSError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return (
            f"This needs the package {error.name}, which is not installed. Install the extra "
            "it belongs to (eval, study, gguf, remote, ray or demo), such as "
            "pip install 'starmerge-models[study]'."
        )
    return (
        f"{type(error).__name__}: {error}. This should not happen: run it again as "
        "`starmerge --debug …` and report the traceback."
    )
