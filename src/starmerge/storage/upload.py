"""Uploading a folder to an object store, such that nobody takes a part of it for the whole.

Large files are sent in parts, which the store keeps apart; when all parts of all files are there,
the uploads are completed, one right after the other, between them the small files, and
``merge_report.json`` at the very end. A folder without it is no merge. Files that lie in the store
in pieces (:mod:`starmerge.storage.pieces`) are put together in between, by several machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import obstore

from starmerge.errors import StarmergeError, UsageError
from starmerge.parsing import MOST_JSON_BYTES, parse_json
from starmerge.progress import progress_bar
from starmerge.storage.local_folder import LocalFolder
from starmerge.storage.parts import Parts, goes_in_parts
from starmerge.storage.pieces import PiecesOfFile, files_in
from starmerge.storage.publishing import REPORT
from starmerge.storage.scratch import Scratch

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from starmerge.storage.places import RemotePlace
    from starmerge.storage.requests import ObjectBackend
    from starmerge.storage.storage import Distribute

_AT_ONCE = 8
"""Files that are sent at once, each part after part."""


def check_replaceable(
    backend: ObjectBackend, scratch: Scratch, *, overwrite: bool, is_file: bool
) -> set[str]:
    """Make sure that an output may appear at its place.

    Returns:
        The names that lie there, which are those of a merge that may be replaced.

    Raises:
        UsageError: Something lies there that may not be replaced.
    """
    place = scratch.place
    if not place.path:
        raise UsageError(f"{place} is a whole bucket. Give a folder in it: {place}/merged.")
    try:
        backend.look(place)
        is_object = True
    except FileNotFoundError:
        is_object = False
    there = set(backend.tree(place))
    if is_file:
        if there:
            raise UsageError(f"{place} is a folder. Give the file to write.")
        if is_object and not overwrite:
            raise UsageError(f"{place} exists. Choose another, or replace it with --overwrite.")
        return set()
    if is_object:
        raise UsageError(f"{place} is a file. Choose another output folder.")
    begun = scratch.begun()
    if not there - begun:
        return there
    if not overwrite:
        raise UsageError(
            f"{place} exists and is not empty. Choose another folder, or replace it with "
            "--overwrite."
        )
    if REPORT not in there and not begun:
        raise UsageError(
            f"{place} holds no {REPORT}, so it is no merged model and is not overwritten. Choose "
            "another folder, or delete it yourself."
        )
    foreign = sorted(there - begun - _listed(backend, scratch) - {REPORT})
    if foreign:
        raise UsageError(
            f"{place} holds {foreign[0]}, which is no part of the merged model that was written "
            "there, and is not overwritten. Take it away, or choose another folder."
        )
    return there


def _listed(backend: ObjectBackend, scratch: Scratch) -> set[str]:
    """Return what the report of the merge that lies there lists as its files."""
    file = scratch.place / REPORT
    with suppress(FileNotFoundError, ValueError, AttributeError):
        state = backend.look(file)
        content = backend.fetch(file, state, 0, min(state.size, MOST_JSON_BYTES))
        files = parse_json(bytes(content)).get("files")
        return {name for name in files or () if isinstance(name, str)}
    return set()


class Upload:
    """One upload of a whole output.

    Args:
        backend: The store.
        scratch: Of the output.
        folder: What is uploaded.
        pieces: Where the pieces lie of files that are not in the folder.
        overwrite: Replace the merge that lies there.
        member: The file of the folder that alone is uploaded, under the output's own name.
        progress: Show a progress bar.
        distribute: Has several machines put pieces together; None: this one does.
    """

    def __init__(
        self,
        backend: ObjectBackend,
        scratch: Scratch,
        folder: Path,
        pieces: RemotePlace,
        *,
        overwrite: bool,
        member: str | None,
        progress: bool,
        distribute: Distribute | None,
    ) -> None:
        self._backend, self._scratch, self._folder = backend, scratch, folder
        self._overwrite, self._member, self._progress = overwrite, member, progress
        self._pieces, self._distribute = pieces, distribute or _one_after_the_other
        self._store: ObjectStore = backend.store(scratch.place)

    def run(self) -> None:
        """Upload everything.

        If anything fails, uploads that are not completed are taken back.

        Raises:
            UsageError: Something has appeared at the place meanwhile.
            StarmergeError: The store has other sizes than were sent, or lacks pieces.
            obstore.exceptions.BaseError: The store failed.
        """
        member = self._member
        here = LocalFolder(self._folder).names() if member is None else []
        names = [member] if member is not None else sorted({*here, *self._listed()})
        far = self._far([name for name in names if not (self._folder / name).exists()])
        sizes = {
            name: far[name].size if name in far else (self._folder / name).stat().st_size
            for name in names
        }
        self._check()
        with (
            ExitStack() as stack,
            progress_bar(
                "uploading", sum(sizes.values()), show=self._progress, in_bytes=True
            ) as advance,
        ):
            large = {
                name: stack.enter_context(Parts(self._store, self._key(name), size))
                for name, size in sizes.items()
                if name not in far and goes_in_parts(size)
            }

            def send(name: str) -> None:
                with (self._folder / name).open("rb", buffering=0) as stream:
                    while content := stream.read(large[name].length):
                        large[name].write(content)
                        advance(len(content))

            with ThreadPoolExecutor(_AT_ONCE, "upload") as pool:
                sent = [pool.submit(send, name) for name in large]
                try:
                    for own in sent:
                        own.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            before = self._check()
            self._scratch.begin({*names, *before})
            if REPORT in before:
                # From here to the end, nobody is to take a mixture for the old merge.
                obstore.delete(self._store, self._key(REPORT))
            self._put_together(list(far.values()), advance)
            for name in names:
                if name in large:
                    large[name].complete()
                elif name != REPORT and name not in far:
                    self._put(name)
                    advance(sizes[name])
            self._check_sizes({name: sizes[name] for name in names if name != REPORT})
            if member is None:
                self._put(REPORT)
                advance(sizes[REPORT])
                stale = sorted(before - set(names))
                if stale:
                    obstore.delete(self._store, [self._key(name) for name in stale])
        self._scratch.end()

    def _listed(self) -> list[str]:
        """Return the files that the merge's report lists."""
        files: list[str] = parse_json((self._folder / REPORT).read_bytes())["files"]
        return files

    def _far(self, names: Sequence[str]) -> dict[str, PiecesOfFile]:
        """Return the files that lie in the store in pieces, by their names.

        Raises:
            StarmergeError: Some of them is not whole.
        """
        found = files_in(self._pieces) if names else {}
        for name in names:
            found.get(name, PiecesOfFile(name, 1, ())).check()
        return {name: found[name] for name in names}

    def _put_together(self, files: Sequence[PiecesOfFile], advance: Callable[[int], None]) -> None:
        """Make an object of the pieces of each file."""

        def send(number: int) -> None:
            files[number].send(targets[number])

        targets = [self._scratch.place / file.name for file in files]
        if self._member is not None:
            targets = [self._scratch.place for _ in files]
        memory = [file.memory for file in files]
        for file, _ in zip(files, self._distribute(send, memory), strict=True):
            advance(file.size)

    def _check(self) -> set[str]:
        is_file = self._member is not None
        return check_replaceable(
            self._backend, self._scratch, overwrite=self._overwrite, is_file=is_file
        )

    def _key(self, name: str) -> str:
        path = self._scratch.place.path
        return path if self._member is not None else f"{path}/{name}"

    def _put(self, name: str) -> None:
        content = (self._folder / name).read_bytes()
        obstore.put(self._store, self._key(name), content, use_multipart=False)

    def _check_sizes(self, sent: dict[str, int]) -> None:
        """Compare the sizes of the objects with those of the files."""
        place = self._scratch.place
        if self._member is not None:
            found = {self._member: self._backend.look(place).size}
        else:
            found = self._backend.tree(place)
        for name, size in sent.items():
            if found.get(name) != size:
                raise StarmergeError(
                    f"{place}: {name} has {found.get(name, 0):,} bytes in the store, and {size:,} "
                    "were sent."
                )


def _one_after_the_other(work: Callable[[int], None], memory: Sequence[int]) -> Iterator[None]:
    return map(work, range(len(memory)))
