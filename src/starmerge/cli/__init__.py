"""The command line: one file a command; what a command needs is imported when it runs."""

from __future__ import annotations

import ctypes
import io
import os
import sys
import warnings

import typer

from starmerge import __version__
from starmerge.cli import calibrate, choose, demo, evaluate, finetune, merge, methods, suite, tasks
from starmerge.errors import StarmergeError, UsageError

app = typer.Typer(
    help="Merge fine-tuned models of one base into one multi-task model, without data and "
    "without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(merge.merge)
app.command()(calibrate.calibrate)
app.command()(evaluate.evaluate)
app.command()(choose.choose)
app.command()(suite.suite)
app.command()(finetune.finetune)
app.command()(methods.methods)
app.command()(tasks.tasks)
app.add_typer(demo.app, name="demo")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(  # main() looks for it
        False, "--debug", help="Show tracebacks of errors."
    ),
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_print_version
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; exit with 2 for wrong usage and 1 for a failure."""
    # Idle BLAS threads otherwise spin and starve the others on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_memory()
    # What libraries deprecate among themselves is no news to who runs a command.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # σ and η on a terminal that knows only ASCII
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        print(f"Error: {_said(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError | ModuleNotFoundError) else 1)


def _keep_memory() -> None:
    """Make the first touch of memory cheaper, which costs a fault a page.

    Torch gets large pages for large tensors; and glibc keeps some of what is freed, as panels are
    allocated and freed all the time, in place of giving it back to the system.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
            mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""


def _said(error: Exception) -> str:
    """Return what to tell the user of an error."""
    if isinstance(error, StarmergeError | OSError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return (
            f"This needs the package {error.name}, which is not installed. Install starmerge with "
            "the extra it belongs to: eval, train, study or demo."
        )
    return (
        f"{type(error).__name__}: {error}. This should not happen: run it again as "
        "`starmerge --debug …` and report the traceback."
    )
