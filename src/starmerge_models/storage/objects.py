"""Object stores as a storage: what is read by range, and made here before it is uploaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from obstore.exceptions import BaseError

from starmerge_models.errors import StarmergeError
from starmerge_models.events import Published, emit
from starmerge_models.storage.pieces import StagedFolder, delete_pieces, pieces_left, pieces_of
from starmerge_models.storage.places import RemotePlace
from starmerge_models.storage.ranges import Ranges
from starmerge_models.storage.requests import ObjectBackend, in_words
from starmerge_models.storage.scratch import Scratch
from starmerge_models.storage.storage import Distribute, LeftBehind, OutputFolder
from starmerge_models.storage.upload import Upload, check_replaceable


class ObjectStorage(Ranges):
    """Object stores as a storage: ranges are read, outputs staged here and uploaded whole."""

    def __init__(self) -> None:
        self._objects = ObjectBackend()
        super().__init__(self._objects)

    def check_output(self, place: RemotePlace, *, overwrite: bool, is_file: bool = False) -> None:
        """Make sure that nothing lies there, or a merge that may be replaced."""
        scratch = Scratch(place)
        scratch.check_not_in_work()
        check_replaceable(self._objects, place, overwrite=overwrite, is_file=is_file)

    def check_room(
        self,
        folder: RemotePlace,
        wanted: int,
        *,
        suffix: str | None = None,
        is_shared: bool = False,
    ) -> None:
        """Make sure that the scratch folder has room, where the output is made there first.

        Without a suffix, it is not known yet whether it is.
        """
        if suffix is not None and not is_shared:
            Scratch(folder).check_room(wanted, suffix=suffix)

    def remains(self, folder: RemotePlace, *, suffix: str) -> list[str]:
        """Say what killed runs have left in the scratch folder, and in pieces in the store."""
        left = [own for own in pieces_left(folder) if not own.path.name.endswith(suffix)]
        return Scratch(folder).remains(suffix, sum(own.nbytes for own in left))

    def leftovers(self, output: RemotePlace) -> list[LeftBehind]:
        """List what lies in the scratch folder, and pieces in the store."""
        return [*Scratch(output).leftovers(), *pieces_left(output)]

    def forget(self, folder: RemotePlace, *, suffix: str) -> None:
        """Delete what an interrupted run has left in the scratch folder, and its pieces."""
        Scratch(folder).forget(suffix)
        delete_pieces(pieces_of(folder, suffix))

    @contextmanager
    def publish(
        self,
        place: RemotePlace,
        *,
        overwrite: bool,
        suffix: str,
        member: str | None = None,
        progress: bool = False,
        distribute: Distribute | None = None,
    ) -> Iterator[OutputFolder]:
        """Yield a folder of this machine; upload it when the block ends well.

        Shared, it has the files of all machines in the store, in pieces. They stay as long as what
        the scratch folder has of this run: a later one goes on with both.
        """
        scratch = Scratch(place)
        scratch.check_not_in_work()
        is_file = member is not None
        check_replaceable(self._objects, place, overwrite=overwrite, is_file=is_file, suffix=suffix)
        pieces = pieces_of(place, suffix)

        def upload(folder: Path) -> None:
            try:
                Upload(
                    self._objects,
                    place,
                    folder,
                    pieces,
                    overwrite=overwrite,
                    member=member,
                    progress=progress,
                    distribute=distribute,
                ).run()
            except (BaseError, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # of this machine
                    raise StarmergeError(f"{folder} cannot be uploaded: {error}.") from error
                raise in_words(place, error) from None
            finally:
                self.forget_lists()

        try:
            with scratch.staged(suffix, upload) as folder:
                yield StagedFolder(folder.path, is_complete=folder.is_complete, pieces=pieces)
            emit(Published(str(place)))
        finally:
            if not scratch.has(suffix):
                with suppress(StarmergeError):  # what has failed before is said
                    delete_pieces(pieces)
