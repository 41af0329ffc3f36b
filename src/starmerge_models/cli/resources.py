"""Options of long-running commands: threads or a cluster, and the memory they may use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from starmerge_models.errors import UsageError

if TYPE_CHECKING:
    from starmerge_models.merging.executors.ray import RayExecutor
    from starmerge_models.merging.executors.threads import Threads as LocalThreads

    Workers: TypeAlias = LocalThreads | RayExecutor
    """The executors of the work on tensors."""

Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Tensors to work on at once.",
        show_default="OMP_NUM_THREADS, or all processors",
    ),
]
Runs = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="Runs to make at once, with --executor ray; each has the models in memory.",
        show_default="the cluster's processors, or GPUs",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for tensors in work, such as 4GB; one that needs more is merged alone.",
        show_default="a quarter of the machine's",
    ),
]
Kind: TypeAlias = Literal["threads", "ray"]
Executor = Annotated[
    Kind,
    typer.Option(
        help="Threads of this process, or workers of a [b]ray[/b] cluster, all of which must reach "
        "the same files.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="auto|HOST:PORT",
        help="The Ray cluster; auto is the one that this machine belongs to.",
        show_default="one of this machine alone",
    ),
]


def check_address(executor: Kind, address: str | None) -> None:
    """Make sure that a cluster is given only with ``--executor ray``.

    Raises:
        UsageError: A cluster is given without it.
    """
    if address is not None and executor != "ray":
        raise UsageError("--address names a Ray cluster. Add --executor ray.")


def workers_of(
    executor: Kind, address: str | None, threads: int | None, memory: str | None
) -> Workers:
    """Return the executor of the work on tensors.

    Raises:
        UsageError: Ray is not installed, or the options do not fit each other.
    """
    from starmerge_models.merging.executors.ray import RayExecutor
    from starmerge_models.merging.executors.threads import Threads

    check_address(executor, address)
    if executor == "ray":
        return RayExecutor(address, threads=threads, memory=memory)
    return Threads(threads, memory)
