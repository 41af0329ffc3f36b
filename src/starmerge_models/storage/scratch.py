"""The scratch folder: the local folder in which outputs of object stores are staged.

``SCRATCH/NAME~HASH~SUFFIX`` is a complete merge that is not uploaded yet; before it is complete, it
has a hidden name, like every local output. HASH is the hash of the URL, SUFFIX that of everything
that determines the content, so that a later run of the same merge resumes it in either state.
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
    """Return the scratch folder: that of the environment variable, or one in the user's cache."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser().absolute()
    from platformdirs import user_cache_path  # noqa: PLC0415  (of the same extra)

    return user_cache_path("starmerge") / "scratch"


class Scratch:
    """The staged files of one output in the scratch folder.

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
        """Return the path of the complete merge of a suffix."""
        return self._folder / f"{self._stem}~{suffix}"

    def leftovers(self) -> list[Leftover]:
        """List the leftovers of runs of all suffixes, complete or partial."""
        hidden = [
            own for own in leftovers_in(self._folder) if own.path.name.startswith(f".{self._stem}~")
        ]
        whole = self._folder.glob(f"{self._stem}~*") if self._folder.is_dir() else ()
        return hidden + [Leftover(path, "partial") for path in sorted(whole) if path.is_dir()]

    def has(self, suffix: str) -> bool:
        """Return whether a run of this suffix has left files, complete or partial."""
        return any(left.path.name.endswith(suffix) for left in self.leftovers())

    def check_not_in_work(self) -> None:
        """Check that no process of this machine is writing the output.

        Raises:
            UsageError: A process is writing it.
        """
        for leftover in self.leftovers():
            if leftover.is_in_work():
                raise UsageError(
                    f"{self.place} is being made by another process, in {leftover.path}. Wait "
                    "until it is done, or choose another output."
                )

    def check_free_space(self, wanted: int, *, suffix: str | None) -> None:
        """Check that the disk has enough space, including the files of an interrupted run.

        Raises:
            StarmergeError: It has less.
        """
        own = [left.nbytes for left in self.leftovers() if left.path.name.endswith(suffix or "")]
        advice = f"set {VARIABLE} to a folder with more room: outputs are made there first"
        check_space(self._folder / self._stem, wanted - max(own, default=0), advice=advice)

    def describe_leftovers(self, suffix: str, in_store: int) -> list[str]:
        """Return sentences on the leftovers of runs of other suffixes and of uploads.

        Args:
            suffix: The suffix of this run, whose own leftovers are resumed.
            in_store: Bytes of other runs' leftovers in the store.
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

    def delete_partial(self, suffix: str) -> None:
        """Delete the leftovers of a run of this suffix.

        Raises:
            UsageError: The run still goes on.
        """
        for left in self.leftovers():
            if left.path.name.endswith(suffix):
                left.delete()

    @contextmanager
    def staged(self, suffix: str, upload: Callable[[Path], None]) -> Iterator[LocalFolder]:
        """Yield a folder to write; after the block, upload it, and delete it.

        The folder is already complete if an earlier run was killed or failed during its upload.

        Args:
            suffix: As for :func:`~starmerge_models.storage.publishing.output_folder`.
            upload: Function that uploads a folder.

        Raises:
            UsageError: Another process is writing this output.
            StarmergeError: The disk is full or fails; or the upload fails, and the merge is kept in
                the scratch folder.
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
