"""Object stores as a storage: files are read by range, and outputs are staged locally."""

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
from starmerge_models.storage.storage import Distribute, OutputFolder, PartialOutput
from starmerge_models.storage.upload import Upload, check_replaceable


class ObjectStorage(Ranges):
    """Object stores as a storage: files are read by range, outputs are staged and uploaded."""

    def __init__(self) -> None:
        self._objects = ObjectBackend()
        super().__init__(self._objects)

    def check_output(self, place: RemotePlace, *, overwrite: bool, is_file: bool = False) -> None:
        """Check that the place is empty, or contains a merge that may be replaced."""
        scratch = Scratch(place)
        scratch.check_not_in_work()
        check_replaceable(self._objects, place, overwrite=overwrite, is_file=is_file)

    def check_free_space(
        self,
        folder: RemotePlace,
        wanted: int,
        *,
        suffix: str | None = None,
        is_shared: bool = False,
    ) -> None:
        """Check that the scratch folder has enough space, if the output is staged there.

        Without a suffix, it is not known yet whether the output is staged.
        """
        if suffix is not None and not is_shared:
            Scratch(folder).check_free_space(wanted, suffix=suffix)

    def describe_leftovers(self, folder: RemotePlace, *, suffix: str) -> list[str]:
        """Return sentences on leftovers in the scratch folder and on pieces in the store."""
        left = [own for own in pieces_left(folder) if not own.path.name.endswith(suffix)]
        return Scratch(folder).describe_leftovers(suffix, sum(own.nbytes for own in left))

    def leftovers(self, output: RemotePlace) -> list[PartialOutput]:
        """List leftovers in the scratch folder and pieces in the store."""
        return [*Scratch(output).leftovers(), *pieces_left(output)]

    def delete_partial(self, folder: RemotePlace, *, suffix: str) -> None:
        """Delete an interrupted run's leftovers in the scratch folder, and its pieces."""
        Scratch(folder).delete_partial(suffix)
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
        """Yield a local folder; upload it when the block ends without an error.

        If several machines write to the folder, their files are stored as pieces in the store.
        Pieces are kept as long as the run's files in the scratch folder, and a later run resumes
        from both.
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
                if isinstance(error, OSError) and error.errno is not None:  # a local error
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
                with suppress(StarmergeError):  # the first error is raised
                    delete_pieces(pieces)
