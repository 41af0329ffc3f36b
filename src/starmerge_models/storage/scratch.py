"""Where an output of an object store is made before it is uploaded: a folder of this machine.

``SCRATCH/NAME~HASH~SUFFIX`` is a merge that is whole and not yet uploaded; while it is made it has
a hidden name, as every output of this machine has. HASH is of the URL, SUFFIX of all that decides
the content, so that a later run of the same merge takes it up in either state.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starmerge_models.errors import Interrupted, PiecesLostError, StarmergeError, UsageError
from starmerge_models.events import bytes_in_words
from starmerge_models.storage.leftovers import Leftover, leftovers_in, lock
from starmerge_models.storage.local_folder import LocalFolder
from starmerge_models.storage.places import RemotePlace
from starmerge_models.storage.publishing import check_space, output_folder

VARIABLE = "STARMERGE_SCRATCH"


def scratch_folder() -> Path:
    """Return the folder for outputs that are uploaded: of the environment, or the user's cache."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser().absolute()
    from platformdirs import user_cache_path  # noqa: PLC0415  (of the same extra)

    return user_cache_path("starmerge") / "scratch"


class Scratch:
    """What lies in the scratch folder of one output.

    Args:
        place: The output.
    """

    def __init__(self, place: RemotePlace) -> None:
        self.place = place
        self._folder = scratch_folder()
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", place.name)[:60].lstrip(".")
        digest = hashlib.blake2b(str(place).encode(), digest_size=8).hexdigest()
        self._stem = f"{name}~{digest}"

    def whole(self, suffix: str) -> Path:
        """Return where a merge of this suffix lies when it is whole."""
        return self._folder / f"{self._stem}~{suffix}"

    def leftovers(self) -> list[Leftover]:
        """List what runs of any suffix have left there, whole or not."""
        hidden = [
            own for own in leftovers_in(self._folder) if own.path.name.startswith(f".{self._stem}~")
        ]
        whole = self._folder.glob(f"{self._stem}~*") if self._folder.is_dir() else ()
        return hidden + [Leftover(path, "partial") for path in sorted(whole) if path.is_dir()]

    def has(self, suffix: str) -> bool:
        """Tell whether a run of this suffix has left anything, whole or not."""
        return any(left.path.name.endswith(suffix) for left in self.leftovers())

    def check_not_in_work(self) -> None:
        """Make sure that no process of this machine makes the output.

        Raises:
            UsageError: One does.
        """
        for leftover in self.leftovers():
            if leftover.is_in_work():
                raise UsageError(
                    f"{self.place} is being made by another process, in {leftover.path}. Wait "
                    "until it is done, or choose another output."
                )

    def check_room(self, wanted: int, *, suffix: str | None) -> None:
        """Make sure that the disk has room, with what an interrupted run has left.

        Raises:
            StarmergeError: It has less.
        """
        own = [left.nbytes for left in self.leftovers() if left.path.name.endswith(suffix or "")]
        advice = f"set {VARIABLE} to a folder with more room: outputs are made there first"
        check_space(self._folder / self._stem, wanted - max(own, default=0), advice=advice)

    def remains(self, suffix: str, in_store: int) -> list[str]:
        """Say what runs of other suffixes have left, and what an upload may have.

        Args:
            suffix: Of the run that takes up what has it.
            in_store: Bytes that runs of others have left in the store.
        """
        found = self.leftovers()
        others = [left for left in found if not left.path.name.endswith(suffix)]
        said = []
        if others or in_store:
            size = bytes_in_words(sum(left.nbytes for left in others) + in_store)
            clean = shlex.join(["starmerge", "clean", str(self.place)])
            said.append(f"earlier runs that were killed left {size} for {self.place}; see: {clean}")
        if self.whole(suffix).is_dir():
            said.append(
                f"an earlier upload to {self.place} did not end. The store keeps the parts that it "
                "had sent, where nobody sees them, and bills them; a lifecycle rule of the bucket "
                "for incomplete uploads deletes them."
            )
        return said

    def forget(self, suffix: str) -> None:
        """Delete what a run of this suffix has left.

        Raises:
            UsageError: The run is not over.
        """
        for left in self.leftovers():
            if left.path.name.endswith(suffix):
                left.delete()

    @contextmanager
    def staged(self, suffix: str, upload: Callable[[Path], None]) -> Iterator[LocalFolder]:
        """Yield a folder to fill; when the block ends well, upload it, and delete it.

        The folder is whole already where an earlier run was killed, or failed, in its upload.

        Args:
            suffix: As for :func:`~starmerge_models.storage.publishing.output_folder`.
            upload: Uploads a folder.

        Raises:
            UsageError: Another process makes this output.
            StarmergeError: The disk is full or fails, or the upload does, after which the merge
                stays in the scratch folder.
        """
        whole = self.whole(suffix)
        is_complete = whole.is_dir()
        if not is_complete:
            with output_folder(whole, suffix=suffix, is_final=False) as folder:
                yield folder
        held = lock(whole)
        if held is None:
            raise UsageError(f"{self.place} is being uploaded by another process. Wait for it.")
        try:
            if is_complete:
                yield LocalFolder(whole, is_complete=True)
            try:
                upload(whole)
            except Interrupted as interruption:
                interruption.kept.append(whole)
                raise
            except PiecesLostError:
                raise
            except StarmergeError as error:
                raise StarmergeError(
                    f"{error} The merge itself is whole, in {whole}: run the same command again, "
                    "and only the upload is repeated."
                ) from None
            shutil.rmtree(whole, ignore_errors=True)
        finally:
            os.close(held)
