"""Upload of a folder to an object store, so that a partial upload is not mistaken for a merge.

Large files are sent as multipart uploads, whose parts are invisible. When all parts of all files
have been sent, the uploads are completed one after the other, together with the small files, and
``merge_report.json`` last. A folder without this report is not a merge. Files that are stored as
pieces (:mod:`starmerge_models.storage.pieces`) are assembled by several machines before that.
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
"""The file with the run's pieces that lists the objects that an upload may leave at its place."""

_AT_ONCE = 8
"""Number of files that are sent at the same time, the parts of each one after the other."""


def check_replaceable(
    backend: ObjectBackend,
    place: RemotePlace,
    *,
    overwrite: bool,
    is_file: bool,
    suffix: str | None = None,
) -> dict[str, int]:
    """Check that an output may be published at its place.

    Objects that a killed upload has made visible may be replaced by a run of the same suffix.

    Args:
        backend: The store.
        place: The output.
        overwrite: Whether it may replace an existing merge.
        is_file: Whether it is a single file instead of a folder.
        suffix: Suffix of the run; None while it is unknown, which accepts uploads of any run.

    Returns:
        Names and sizes of the objects of a merge that may be replaced.

    Raises:
        UsageError: The place is taken by something that may not be replaced.
    """
    if not place.path:
        raise UsageError(f"{place} is a whole bucket. Give a folder in it: {place}/merged.")
    try:
        backend.stat(place)
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
    """Return the objects below an output that a killed upload has left there.

    They are recognised by the sizes that the upload recorded before it made its first object
    visible, those of its own files and of the files that it was to replace. If the output has a
    report other than the upload's, it is complete, and no object counts as left over.

    Args:
        backend: The store.
        place: The output.
        run: The place of the upload's pieces and of its record.
        sizes: Sizes of the objects below the output, by name.
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
    state = backend.stat(file)
    return bytes(backend.fetch(file, state, 0, min(state.size, MOST_JSON_BYTES)))


def _hash(content: bytes) -> str:
    return blake3(content).hexdigest()


def _listed(backend: ObjectBackend, place: RemotePlace) -> set[str]:
    """Return the files that the report of an existing merge lists."""
    with suppress(FileNotFoundError, ValueError, AttributeError):
        files = parse_json(_content(backend, place / REPORT)).get("files")
        return {name for name in files or () if isinstance(name, str)}
    return set()


class Upload:
    """One upload of a whole output.

    Args:
        backend: The store.
        place: The output.
        folder: The local folder to upload.
        pieces: The place of the pieces of files that are not in the folder.
        overwrite: Replace an existing merge.
        member: The only file of the folder to upload, under the output's own name.
        progress: Show a progress bar.
        distribute: Runs the assembly of pieces on several machines; None uses this machine only.
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
        """Upload the folder.

        After an error, uncompleted multipart uploads are aborted.

        Raises:
            UsageError: The place has been taken meanwhile.
            StarmergeError: The store has objects of other sizes than were sent, or lacks pieces.
            obstore.exceptions.BaseError: The store failed.
        """
        member = self._member
        here = LocalFolder(self._folder).names() if member is None else []
        names = [member] if member is not None else sorted({*here, *self._listed()})
        far = self._files_in_pieces([name for name in names if not (self._folder / name).exists()])
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
                self._write_note(sizes, before)
            if REPORT in before:
                # Delete the old report first, so that a mixture is not mistaken for the old merge.
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

    def _write_note(self, sizes: Mapping[str, int], before: Mapping[str, int]) -> None:
        """Record the objects that this upload may leave, before the first becomes visible.

        Args:
            sizes: Sizes of the upload's files in bytes.
            before: Sizes of the existing objects in bytes.
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

    def _files_in_pieces(self, names: Sequence[str]) -> dict[str, PiecesOfFile]:
        """Return the files that are stored as pieces, by name.

        Raises:
            StarmergeError: A file is incomplete.
        """
        found = files_in(self._pieces) if names else {}
        for name in names:
            found.get(name, PiecesOfFile(name, 1, ())).check()
        return {name: found[name] for name in names}

    def _put_together(self, files: Sequence[PiecesOfFile], advance: Callable[[int], None]) -> None:
        """Assemble the pieces of each file to an object."""

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
        """Check the sizes of the objects against those of the files."""
        place = self._place
        if self._member is not None:
            found = {self._member: self._backend.stat(place).size}
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
