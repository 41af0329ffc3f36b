"""Where a model lies: a local folder, a repository of the Hugging Face Hub, or the demo."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from starmerge_models.checkpoints.side_files import KEPT_BACK, PASSED_OVER, WEIGHT_FILES, parts
from starmerge_models.demo_names import demo_folder, is_demo_name, path_text
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.storage import (
    Place,
    RemotePlace,
    exists,
    is_file,
    is_url,
    place_of,
    real,
    storage_of,
    without_secrets,
)
from starmerge_models.storage.hub import pinned
from starmerge_models.storage.places import SCHEMES

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

_CONSOLIDATED = "consolidated*"
"""Weights that some repositories have a second time, under the names of their author's own code."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""What the names of files with weights end in."""


@dataclass(frozen=True)
class Source:
    """Where a model lies and what is known of its name."""

    reference: str
    """What the user wrote."""
    path: Place
    """Its folder; of an adapter that is one file, that file."""
    name: str | None
    """Hub id of the model, as far as it is known."""
    revision: str | None
    """Commit of a Hub repository."""

    def __str__(self) -> str:
        return self.reference


@dataclass(frozen=True)
class LocalSource(Source):
    """A model in a folder of this machine."""

    path: Path


def resolve(reference: str | Place, *, may_be_file: bool = False) -> Source:
    """Find a model by its folder, a URL, or a Hub id ``org/name`` or ``org/name@revision``.

    Or by a name of the demo's, ``demo:base`` or ``demo:digits``.

    A Hub repository is downloaded into the Hub's own cache, or found there: the weights at its top,
    in safetensors if it has them so, and the files that a merged model gets a copy of. Of a URL
    (``s3://``, ``gs://``, ``az://``, ``hf://``) nothing is downloaded: it is read by range.

    Args:
        reference: The folder, URL, Hub id or demo name; or, where it may be, the file of an
            adapter. A path object is a folder or a file, whatever its name.
        may_be_file: Accept a file of weights.

    Raises:
        UsageError: There is no such folder, and it is no Hub id; or the demo has no such model.
        StarmergeError: The Hub has no such repository or revision, or it or a store cannot be
            reached.
    """
    text = reference if isinstance(reference, str) else path_text(reference)
    if not text:
        raise UsageError("A model's path is empty. Give a folder or a Hub id.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{text!a} is not UTF-8, which recipe and report of a merge are. Rename the folder."
        ) from error
    path = place_named(reference)
    name = revision = None
    if isinstance(path, RemotePlace) and path.scheme == "hf":
        path, name, revision = pinned(path)
    if exists(path):
        is_folder = storage_of(path).is_folder(path)
        if not is_folder and not (may_be_file and path.suffix.lower() in WEIGHTS):
            raise UsageError(
                f"{text} is a file. Give the folder that holds the model or adapter. (To a merge, "
                f"an adapter that is one file may be given: {', '.join(WEIGHTS)}.)"
            )
        storage_of(path).check_readable(path)
        if isinstance(path, RemotePlace):
            return Source(text, path, name, revision)
        return Source(text, path, *_cached_name(path))
    if isinstance(path, RemotePlace):
        raise UsageError(f"{path} does not exist: nothing lies there. Check the URL.")
    if is_url(text):
        raise UsageError(
            f"{without_secrets(text)} is a URL, and models are read from folders, from the Hub, "
            f"and from {', '.join(f'{scheme}://' for scheme in SCHEMES)} URLs. Copy it into a "
            "folder, or give a Hub id such as org/name or org/name@revision."
        )
    check_named(text)
    name, _, revision = text.partition("@")
    return Source(text, *_download(name, revision or None))


def check_named(*references: str) -> None:
    """Make sure that references name something, as far as that is known without the network.

    Raises:
        UsageError: One is neither a place on this machine, nor a URL, nor a Hub id, nor a model of
            the demo.
    """
    for text in references:
        is_named = is_hub_id(text) or is_url(text) or exists(place_named(text))
        if not is_named:
            raise UsageError(
                f"{text[:200]} does not exist. Give a folder, or a Hub id such as org/name or "
                "org/name@revision."
            )


def place_named(reference: str | Place) -> Place:
    """Return the place that a reference names: a path, a URL, or a model of the demo.

    Raises:
        UsageError: The demo has no such model, or as :func:`~starmerge_models.storage.place_of`
            says.
    """
    if isinstance(reference, str) and is_demo_name(reference):
        return demo_folder(reference)
    return place_of(reference)


def folder_of(path: Place) -> Place:
    """Return the folder of a model or of another input, which may be one file."""
    return path.parent if is_file(path) else path


def resolve_local(reference: str | Path) -> LocalSource:
    """Find a model as :func:`resolve` does, for libraries that open the files themselves.

    Raises:
        UsageError: As :func:`resolve` says; or it lies in a store.
        StarmergeError: As :func:`resolve` says.
    """
    source = resolve(reference)
    if isinstance(source.path, Path):
        return LocalSource(source.reference, source.path, source.name, source.revision)
    raise UsageError(
        f"{source} lies in a store, where merges and inspections read models. What runs a model "
        "opens it from a folder of this machine: copy it into one, or give its Hub id."
    )


def is_hub_id(name: str) -> bool:
    """Tell whether a name is that of a repository of the Hub, ``org/name``, rather than a path."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".")


def _cached_name(path: Path) -> tuple[str | None, str | None]:
    """Return Hub id and commit of a folder in the Hub's cache; None of any other.

    ``_name_or_path`` in a config is no such name: transformers writes there what the model was
    loaded from before it was trained.
    """
    snapshot = real(path)
    kind, *names = snapshot.parent.parent.name.split("--")
    if snapshot.parent.name != "snapshots" or kind != "models" or not 1 <= len(names) <= 2:
        return None, None
    return "/".join(names), snapshot.name


def _download(name: str, revision: str | None) -> tuple[Path, str, str]:
    """Return folder, id and commit of a Hub repository."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow to import, rarely needed)
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    def fetch(ignored: list[str], wanted: list[str] | None = None) -> Path:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns=[*KEPT_BACK, *ignored]
        )
        return Path(folder)

    def fetch_top(weights: str) -> Path:
        others = [pattern for pattern in WEIGHT_FILES if pattern != weights]
        return fetch(["*/*", _CONSOLIDATED, *others])

    try:
        path = fetch_top("*.safetensors")
        if not any(file.endswith(".safetensors") for file in storage_of(path).names(path)):
            path = fetch_top("*.bin")
        inside = [f"*/{pattern}" for pattern in KEPT_BACK]
        path = fetch([*inside, *(f"{folder}/*" for folder in PASSED_OVER)], parts(path))
    except HFValidationError as error:
        raise UsageError(
            f"{name} does not exist, and is no Hub id: {error} Give a folder, or a Hub id such as "
            "org/name or org/name@revision."
        ) from error
    except LocalEntryNotFoundError as error:
        raise StarmergeError(
            f"{name} is neither a folder here nor in the Hub's cache, and the Hub cannot be "
            f"reached. Check the path, the network, and HF_HUB_OFFLINE. ({error})"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        wanted = f"{name}@{revision}" if revision else name
        raise StarmergeError(
            f"{wanted} is no folder here, and the Hub does not give it: {error}"
        ) from error
    return path, name, path.name
