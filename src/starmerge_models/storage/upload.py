"""Uploading a folder to an object store, such that nobody takes a part of it for the whole.

Large files are sent in parts, which the store keeps apart; when all parts of all files are there,
the uploads are completed, one right after the other, between them the small files, and
``merge_report.json`` at the very end. A folder without it is no merge. Files that lie in the store
in pieces (:mod:`starmerge_models.storage.pieces`) are put together in between, by several machines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from blake3 import blake3

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.parsing import MOST_JSON_BYTES, parse_json
from starmerge_models.progress import progress_bar
from starmerge_models.storage.local_folder import LocalFolder
from starmerge_models.storage.parts import Parts, goes_in_parts
from starmerge_models.storage.pieces import (
    PiecesOfFile,
    files_in,
    pieces_left,
    pieces_of,
    suffix_of,
)
from starmerge_models.storage.publishing import REPORT

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from starmerge_models.storage.places import RemotePlace
    from starmerge_models.storage.requests import ObjectBackend
    from starmerge_models.storage.storage import Distribute

BEGUN = "begun.json"
"""The note of an upload among the pieces of its run: what it may have left at its place."""

_AT_ONCE = 8
"""Files that are sent at once, each part after part."""


def check_replaceable(
    backend: ObjectBackend,
    place: RemotePlace,
    *,
    overwrite: bool,
    is_file: bool,
    suffix: str | None = None,
) -> dict[str, int]:
    """Make sure that an output may appear at its place.

    What a killed upload has made visible there is for a run of the same suffix to replace.

    Args:
        backend: The store.
        place: The output.
        overwrite: Whether it may replace a merge that lies there.
        is_file: Whether it is one file, and not a folder.
        suffix: Of the run; None while it is not known: then an upload of any run counts.

    Returns:
        Names and sizes of what lies there, of a merge that may be replaced.

    Raises:
        UsageError: Something lies there that may not be replaced.
    """
    if not place.path:
        raise UsageError(f"{place} is a whole bucket. Give a folder in it: {place}/merged.")
    try:
        backend.look(place)
        is_object = True
    except FileNotFoundError:
        is_object = False
    sizes = backend.tree(place)
    there = set(sizes)
    if is_file:
        if there:
            raise UsageError(f"{place} is a folder. Give the file to write.")
        if is_object and not overwrite:
            raise UsageError(f"{place} exists. Choose another, or replace it with --overwrite.")
        return {}
    if is_object:
        raise UsageError(f"{place} is a file. Choose another output folder.")
    runs = [pieces_of(place, suffix)] if suffix else [left.path for left in pieces_left(place)]
    begun = {name for run in runs for name in _begun(backend, place, run, sizes)}
    if not there - begun:
        return sizes
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
    foreign = sorted(there - begun - _listed(backend, place) - {REPORT})
    if foreign:
        raise UsageError(
            f"{place} holds {foreign[0]}, which is no part of the merged model that was written "
            "there, and is not overwritten. Take it away, or choose another folder."
        )
    return sizes


def _begun(
    backend: ObjectBackend, place: RemotePlace, run: RemotePlace, sizes: Mapping[str, int]
) -> set[str]:
    """Return which of the objects below an output a killed upload has left there.

    Those are of the sizes that it noted before it made the first one visible, of its own files or
    of those that it was to replace. Where a report lies, the output is whole, and none of them is
    left over, unless the report is that of the upload.

    Args:
        backend: The store.
        place: The output.
        run: Where the upload's run has its pieces, and its note.
        sizes: Of the objects below the output, by their names.
    """
    if not sizes:
        return set()
    with suppress(FileNotFoundError, ValueError, LookupError, AttributeError):
        note = parse_json(_content(backend, run / BEGUN))
        if REPORT in sizes and _hash(_content(backend, place / REPORT)) != note["report"]:
            return set()
        return {name for name, size in sizes.items() if size in note["sizes"].get(name, ())}
    return set()


def _content(backend: ObjectBackend, file: RemotePlace) -> bytes:
    """Return the bytes of a small object."""
    state = backend.look(file)
    return bytes(backend.fetch(file, state, 0, min(state.size, MOST_JSON_BYTES)))


def _hash(content: bytes) -> str:
    return blake3(content).hexdigest()


def _listed(backend: ObjectBackend, place: RemotePlace) -> set[str]:
    """Return what the report of the merge that lies there lists as its files."""
    with suppress(FileNotFoundError, ValueError, AttributeError):
        files = parse_json(_content(backend, place / REPORT)).get("files")
        return {name for name in files or () if isinstance(name, str)}
    return set()


class Upload:
    """One upload of a whole output.

    Args:
        backend: The store.
        place: The output.
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
        place: RemotePlace,
        folder: Path,
        pieces: RemotePlace,
        *,
        overwrite: bool,
        member: str | None,
        progress: bool,
        distribute: Distribute | None,
    ) -> None:
        self._backend, self._place, self._folder = backend, place, folder
        self._overwrite, self._member, self._progress = overwrite, member, progress
        self._pieces, self._distribute = pieces, distribute or _one_after_the_other
        self._store: ObjectStore = backend.store(place)

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
            if member is None:
                self._note(sizes, before)
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
                stale = sorted(before.keys() - set(names))
                if stale:
                    obstore.delete(self._store, [self._key(name) for name in stale])
            self._backend.delete(self._pieces, [BEGUN])

    def _note(self, sizes: Mapping[str, int], before: Mapping[str, int]) -> None:
        """Note, before anything is made visible, what this upload may leave at its place.

        Args:
            sizes: Bytes of its own files.
            before: Bytes of what lies there.
        """
        note = {
            "sizes": {
                name: sorted({own[name] for own in (sizes, before) if name in own})
                for name in {*sizes, *before}
            },
            "report": _hash((self._folder / REPORT).read_bytes()),
        }
        self._backend.put(self._pieces / BEGUN, json.dumps(note).encode())

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

        targets = [self._place / file.name for file in files]
        if self._member is not None:
            targets = [self._place for _ in files]
        memory = [file.memory for file in files]
        for file, _ in zip(files, self._distribute(send, memory), strict=True):
            advance(file.size)

    def _check(self) -> dict[str, int]:
        is_file = self._member is not None
        return check_replaceable(
            self._backend,
            self._place,
            overwrite=self._overwrite,
            is_file=is_file,
            suffix=suffix_of(self._pieces),
        )

    def _key(self, name: str) -> str:
        path = self._place.path
        return path if self._member is not None else f"{path}/{name}"

    def _put(self, name: str) -> None:
        content = (self._folder / name).read_bytes()
        obstore.put(self._store, self._key(name), content, use_multipart=False)

    def _check_sizes(self, sent: dict[str, int]) -> None:
        """Compare the sizes of the objects with those of the files."""
        place = self._place
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
