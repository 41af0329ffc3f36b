"""What is asked: a base with its adapters and updates on one loaded model, and whole models.

Nothing is loaded before it is needed: a model whose answers are all known is never opened.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from starmerge_models.checkpoints.hashing import blake3_of_update
from starmerge_models.checkpoints.source import resolve_local
from starmerge_models.deltas import Delta
from starmerge_models.errors import UsageError
from starmerge_models.evaluation.models.asking import Backend, LocalModel
from starmerge_models.evaluation.models.classification import load_image_model
from starmerge_models.evaluation.models.loading import AdapterSwitch, Dtype, device_of, load_model
from starmerge_models.evaluation.models.vllm import check_vllm, load_vllm
from starmerge_models.merging.apply import apply
from starmerge_models.progress import Progress

BASE = "base"
"""Name of the base in every evaluation."""

TUNED = "fine-tuned"
"""What the tasks' own fine-tunes are called together in tables and charts."""

Update = Mapping[str, Delta]
"""What a merge in memory adds to the base's tensors, by their names."""


class Group(Protocol):
    """Models that share what is loaded."""

    @property
    def names(self) -> list[str]:
        """The models, in the order in which they are to be asked."""

    def folders(self, name: str) -> list[Path]:
        """Return the folders whose content makes a model, that of the loaded model first."""

    def update(self, name: str) -> str | None:
        """Return the hash of what is added to the folders' weights in memory; None: nothing."""

    @contextmanager
    def active(self, name: str, progress: Progress) -> Iterator[Any]:
        """Yield a model, loaded; one at a time. The progress is told of what is loaded."""


Loader = Callable[[Path], tuple[Any, Any]]
"""Returns a model of a folder, and its tokenizer or what prepares its images."""


class _Loaded:
    """A base that is loaded when it is first wanted.

    Args:
        path: Its folder.
        load: Loads it.
    """

    def __init__(self, path: Path, load: Loader) -> None:
        self._path, self._load = path, load
        self._parts: tuple[Any, Any] | None = None

    def get(self, progress: Progress) -> tuple[Any, Any]:
        """Return the model, and its tokenizer or what prepares its images."""
        if self._parts is None:
            progress.waits_for(f"loading {BASE}")
            self._parts = self._load(self._path)
        return self._parts


class OnBase:
    """The base, then updates of it, then adapters on it: the base is loaded once.

    Base and updates may be asked again and again, but not after an adapter, nor may an update
    change while the group is in use.

    Args:
        base: Its folder.
        updates: What is added to its weights and taken back, by name.
        adapters: Folders by name; PEFT puts them beside the weights.
        load: Loads the base.
        wrap: Makes of model and tokenizer what is asked.
    """

    def __init__(
        self,
        base: Path,
        updates: Mapping[str, Update],
        adapters: Mapping[str, Path],
        load: Loader,
        wrap: Callable[[Any, Any], Any],
    ) -> None:
        self._base, self._updates, self._adapters = base, updates, adapters
        self._wrap = wrap
        self._loaded = _Loaded(base, load)
        self._hashes: dict[str, str] = {}
        self._switch: AdapterSwitch | None = None

    def with_updates(self, updates: Mapping[str, Update]) -> OnBase:
        """Return a group of the base and other updates of it, which shares the loaded base."""
        group = copy.copy(self)
        group._updates, group._adapters, group._hashes = updates, {}, {}
        return group

    @property
    def names(self) -> list[str]:
        """The base, the updates, the adapters.

        PEFT renames the modules it adapts, so what adds to weights by their names comes before.
        """
        return [BASE, *self._updates, *self._adapters]

    def folders(self, name: str) -> list[Path]:
        """Return those of the base, and of an adapter."""
        return [self._base, self._adapters[name]] if name in self._adapters else [self._base]

    def update(self, name: str) -> str | None:
        """Return the hash of an update, which is computed once; None for the others."""
        if name in self._updates and name not in self._hashes:
            self._hashes[name] = blake3_of_update(self._updates[name])
        return self._hashes.get(name)

    @contextmanager
    def active(self, name: str, progress: Progress) -> Iterator[Any]:
        """Yield the base as it is, with an update added to its weights, or with an adapter."""
        model, second = self._loaded.get(progress)
        if name in self._adapters:
            if self._switch is None:
                progress.waits_for(f"loading adapters {', '.join(self._adapters)}")
                self._switch = AdapterSwitch(model, self._adapters)
            with self._switch.active(name) as adapted:
                yield self._wrap(adapted, second)
        elif name in self._updates:
            progress.waits_for(f"adding {name} to {BASE}")
            applied = apply(model, self._updates[name])
            try:
                yield self._wrap(model, second)
            finally:
                applied.restore()
        else:
            yield self._wrap(model, second)


class Whole:
    """A model of its own.

    Args:
        name: Its name.
        folders: Its folder, and others that decide what it answers.
        load: Loads it.
        wrap: Makes of model and tokenizer what is asked.
    """

    def __init__(
        self, name: str, folders: list[Path], load: Loader, wrap: Callable[[Any, Any], Any]
    ) -> None:
        self._name, self._folders, self._load, self._wrap = name, folders, load, wrap

    @property
    def names(self) -> list[str]:
        """The one."""
        return [self._name]

    def folders(self, name: str) -> list[Path]:
        """Return those that decide the model's answers."""
        return self._folders

    def update(self, name: str) -> None:
        """Return None: the model is as its files have it."""

    @contextmanager
    def active(self, name: str, progress: Progress) -> Iterator[Any]:
        """Yield the model, loaded."""
        progress.waits_for(f"loading {self._name}")
        yield self._wrap(*self._load(self._folders[0]))


class OnVllm:
    """A model and adapters on it, on vLLM.

    Args:
        name: The model's name.
        path: Its folder.
        adapters: Folders by name.
        dtype: Of the weights.
    """

    def __init__(self, name: str, path: Path, adapters: Mapping[str, Path], dtype: Dtype) -> None:
        self._name, self._path, self._adapters, self._dtype = name, path, adapters, dtype
        self._views: Mapping[str | None, Backend] | None = None

    @property
    def names(self) -> list[str]:
        """The model, then the adapters."""
        return [self._name, *self._adapters]

    def folders(self, name: str) -> list[Path]:
        """Return the model's folder, and that of an adapter."""
        return [self._path, self._adapters[name]] if name in self._adapters else [self._path]

    def update(self, name: str) -> None:
        """Return None: the models are as their files have them."""

    @contextmanager
    def active(self, name: str, progress: Progress) -> Iterator[Any]:
        """Yield the model, or an adapter on it."""
        if self._views is None:
            progress.waits_for(f"loading {', '.join(self.names)}")
            self._views = load_vllm(self._path, self._adapters, dtype=self._dtype)
        yield self._views[name if name in self._adapters else None]


def check_backend(backend: str, device: str | None) -> None:
    """Make sure that models can be asked on a backend and a device.

    Raises:
        UsageError: The device cannot be used, or vLLM has no GPU or is not installed.
    """
    if backend == "vllm":
        check_vllm()
    else:
        device_of(device)


def groups(
    base: str | Path,
    models: Mapping[str, str | Path | Update],
    *,
    kind: str,
    device: str | None,
    dtype: Dtype,
    backend: str,
) -> list[Group]:
    """Find the models, and put those together that share the loaded base.

    Args:
        base: A folder or Hub id.
        models: Folders, Hub ids or updates by name.
        kind: "text" or "image".
        device: Where models go; None: the GPU if there is one.
        dtype: Of their weights, or "auto".
        backend: What computes: transformers or vllm.

    Raises:
        UsageError: A model is called "base" or "fine-tuned", there is none at its path, or the
            backend cannot do what is wanted.
        StarmergeError: A Hub repository cannot be had.
    """
    for bound, owner in ((BASE, "the base's name"), (TUNED, "the name of the tasks' fine-tunes")):
        if bound in models:
            raise UsageError(
                f"A model is called {bound!r}, which is {owner}. Give it another, NAME=PATH."
            )
    if not all(name.strip() for name in models):
        raise UsageError("A model has no name. Give it one: NAME=PATH.")
    updates = {name: model for name, model in models.items() if isinstance(model, Mapping)}
    paths = {
        name: resolve_local(model).path
        for name, model in models.items()
        if not isinstance(model, Mapping)
    }
    adapters = {n: p for n, p in paths.items() if (p / "adapter_config.json").is_file()}
    start = resolve_local(base).path
    own = {name: path for name, path in paths.items() if name not in adapters}
    if backend == "vllm":
        if kind == "image" or updates or device is not None:
            raise UsageError(
                "vLLM asks models of text that lie in folders, on the GPU that it finds. Leave "
                "--backend and --device out."
            )
        return [
            OnVllm(BASE, start, adapters, dtype),
            *(OnVllm(name, path, {}, dtype) for name, path in own.items()),
        ]
    if kind == "image":

        def load_images(path: Path) -> tuple[Any, Any]:
            return load_image_model(path, device=device, dtype=dtype, processor_of=start)

        # What prepares the base's images may prepare a fine-tune's: both decide its answers.
        return [
            OnBase(start, updates, adapters, load_images, _pair),
            *(Whole(name, [path, start], load_images, _pair) for name, path in own.items()),
        ]

    def load(path: Path) -> tuple[Any, Any]:
        return load_model(path, device=device, dtype=dtype)

    return [
        OnBase(start, updates, adapters, load, LocalModel),
        *(Whole(name, [path], load, LocalModel) for name, path in own.items()),
    ]


def _pair(model: Any, processor: Any) -> tuple[Any, Any]:
    return model, processor
