"""Sending what was written on to the disk while more is being written."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from starmerge_models.storage.storage import OutputFile

PIECE = 64 * 2**20
"""Bytes after which a file is flushed."""


class WriteBehind:
    """Flushes open files from a thread of its own.

    Left alone, the system lets gigabytes pile up in memory before it begins to write, and whoever
    asks for them to be on the disk at the end waits for all of them.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "write-behind")
        self._lock = Lock()
        self._written: dict[OutputFile, int] = {}
        self._flush: Future[None] | None = None

    def wrote(self, file: OutputFile, nbytes: int) -> None:
        """Take note of bytes written to a file; any thread may call it.

        Raises:
            OSError: The disk failed to take earlier ones.
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
        """Flush all files written to, and wait for it.

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
        """Let go of the files, flushed or not."""
        self._pool.shutdown(cancel_futures=True)
