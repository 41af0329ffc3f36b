"""Syncing of written data to the disk in the background."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from starmerge_models.storage.storage import OutputFile

PIECE = 64 * 2**20
"""Number of written bytes after which a file is synced."""


class WriteBehind:
    """Syncs open files from a background thread.

    Otherwise the system may buffer gigabytes in memory before it writes them, and the final sync
    has to wait for all of them.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "write-behind")
        self._lock = Lock()
        self._written: dict[OutputFile, int] = {}
        self._flush: Future[None] | None = None

    def wrote(self, file: OutputFile, nbytes: int) -> None:
        """Record bytes that were written to a file; thread-safe.

        Raises:
            OSError: An earlier sync failed.
        """
        with self._lock:
            self._written[file] = self._written.get(file, 0) + nbytes
            if self._written[file] < PIECE or not (self._flush is None or self._flush.done()):
                return
            if self._flush is not None:
                self._flush.result()
            self._written[file] = 0
            self._flush = self._pool.submit(file.sync)

    def finish(self) -> None:
        """Sync all written files, and wait for the end.

        Raises:
            OSError: The disk failed.
        """
        try:
            if self._flush is not None:
                self._flush.result()
            for file in self._written:
                file.sync()
        finally:
            self._pool.shutdown()

    def abandon(self) -> None:
        """Stop without syncing the remaining files."""
        self._pool.shutdown(cancel_futures=True)
