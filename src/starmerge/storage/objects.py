"""Object stores as a storage: what is read by range, and made here before it is uploaded."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from obstore.exceptions import BaseError

from starmerge.storage.local_folder import LocalFolder
from starmerge.storage.places import RemotePlace
from starmerge.storage.ranges import Ranges
from starmerge.storage.requests import ObjectBackend, in_words
from starmerge.storage.scratch import Scratch
from starmerge.storage.upload import Upload, check_replaceable


class ObjectStorage(Ranges):
    """Object stores as a storage: ranges are read, outputs staged here and uploaded whole."""

    def __init__(self) -> None:
        self._objects = ObjectBackend()
        super().__init__(self._objects)

    def check_output(self, place: RemotePlace, *, overwrite: bool, is_file: bool = False) -> None:
        """Make sure that nothing lies there, or a merge that may be replaced."""
        scratch = Scratch(place)
        scratch.check_not_in_work()
        check_replaceable(self._objects, scratch, overwrite=overwrite, is_file=is_file)

    def check_room(self, folder: RemotePlace, wanted: int, *, suffix: str | None = None) -> None:
        """Make sure that the scratch folder has room: the output is made there first."""
        Scratch(folder).check_room(wanted, suffix=suffix)

    def remains(self, folder: RemotePlace, *, suffix: str) -> list[str]:
        """Say what killed runs have left in the scratch folder."""
        return Scratch(folder).remains(suffix)

    def forget(self, folder: RemotePlace, *, suffix: str) -> None:
        """Delete what an interrupted run has left in the scratch folder."""
        Scratch(folder).forget(suffix)

    def publish(
        self,
        place: RemotePlace,
        *,
        overwrite: bool,
        suffix: str,
        member: str | None = None,
        progress: bool = False,
    ) -> AbstractContextManager[LocalFolder]:
        """Yield a folder of this machine; upload it when the block ends well."""
        self.check_output(place, overwrite=overwrite, is_file=member is not None)
        scratch = Scratch(place)

        def upload(folder: Path) -> None:
            try:
                Upload(
                    self._objects,
                    scratch,
                    folder,
                    overwrite=overwrite,
                    member=member,
                    progress=progress,
                ).run()
            except (BaseError, OSError, ValueError) as error:
                raise in_words(place, error) from None
            finally:
                self.forget_lists()

        return scratch.staged(suffix, upload)
