"""Groups of models that share a loaded base: the base, its adapters and updates; whole models.

Models are loaded lazily: a model whose answers are all in the cache is never loaded.
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
from starmerge_models.evaluation.models.classification import load_image_model
from starmerge_models.evaluation.models.loading import AdapterSwitch, Dtype, device_of, load_model
from starmerge_models.evaluation.models.scorers import Backend, LocalModel
from starmerge_models.evaluation.models.vllm import check_vllm, load_vllm
from starmerge_models.merging.apply import apply
from starmerge_models.progress import Progress

BASE = "base"
"""Name of the base in every evaluation."""

TUNED = "fine-tuned"
"""Name of the column of the tasks' own fine-tunes in tables and charts."""

Update = Mapping[str, Delta]
"""The deltas that a merge in memory adds to the base, by tensor name."""


class Group(Protocol):
    """Models that share the loaded weights."""

    @property
    def names(self) -> list[str]:
        """The models, in the order in which the caller must evaluate them."""

    def folders(self, name: str) -> list[Path]:
        """Return the folders whose files determine a model; the loaded model's folder is first."""

    def update(self, name: str) -> str | None:
        """Return the hash of the update added to the weights in memory; None: there is none."""

    @contextmanager
    def active(self, name: str, progress: Progress) -> Iterator[Any]:
        """Load a model and yield it, one at a time; report the loading to ``progress``."""


Loader = Callable[[Path], tuple[Any, Any]]
"""From a model's folder to the model, and its tokenizer or image processor."""


class _LazyBase:
    """A base that is loaded on first use.

    Args:
        path: The base's folder.
        load: Loads the base.
    """

    def __init__(self, path: Path, load: Loader) -> None:
        self._path, self._load = path, load
        self._parts: tuple[Any, Any] | None = None

    def get(self, progress: Progress) -> tuple[Any, Any]:
        """Return the model, and its tokenizer or image processor."""
        if self._parts is None:
            progress.waits_for(f"loading {BASE}")
            self._parts = self._load(self._path)
        return self._parts


class BaseGroup:
    """The base, updates of it and adapters on it: the base is loaded once.

    The caller may activate the base and the updates in any order and repeatedly, but not after
    an adapter, and must not change an update while the group is in use.

    Args:
        base: The base's folder.
        updates: Updates by name, each added to the base's weights and removed again.
        adapters: Adapter folders by name; PEFT adds them as separate modules.
        load: Loads the base.
        wrap: Combines model and tokenizer into the object that a prepared task takes.
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
        self._loaded = _LazyBase(base, load)
        self._hashes: dict[str, str] = {}
        self._switch: AdapterSwitch | None = None

    def with_updates(self, updates: Mapping[str, Update]) -> BaseGroup:
        """Return a group with other updates that shares this group's loaded base."""
        group = copy.copy(self)
        group._updates, group._adapters, group._hashes = updates, {}, {}
        return group

    @property
    def names(self) -> list[str]:
        """The base, the updates, the adapters.

        PEFT renames the modules that it adapts, and an update finds weights by name, so the
        adapters are last.
        """
        return [BASE, *self._updates, *self._adapters]

    def folders(self, name: str) -> list[Path]:
        """Return the base's folder, followed by the adapter's if the model is one."""
        return [self._base, self._adapters[name]] if name in self._adapters else [self._base]

    def update(self, name: str) -> str | None:
        """Return the hash of an update, computed once; None for the base and adapters."""
        if name in self._updates and name not in self._hashes:
            self._hashes[name] = blake3_of_update(self._updates[name])
        return self._hashes.get(name)

    @contextmanager
    def active(self, name: str, progress: Progress) -> Iterator[Any]:
        """Yield the unchanged base, the base with an update added, or with an adapter."""
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


class WholeModel:
    """A whole model, which shares nothing with the base.

    Args:
        name: The model's name.
        folders: The model's folder, and others whose files determine its answers.
        load: Loads the model.
        wrap: Combines model and tokenizer into the object that a prepared task takes.
    """

    def __init__(
        self, name: str, folders: list[Path], load: Loader, wrap: Callable[[Any, Any], Any]
    ) -> None:
        self._name, self._folders, self._load, self._wrap = name, folders, load, wrap

    @property
    def names(self) -> list[str]:
        """The single model."""
        return [self._name]

    def folders(self, name: str) -> list[Path]:
        """Return the folders whose files determine the model's answers."""
        return self._folders

    def update(self, name: str) -> None:
        """Return None: nothing is added to the stored weights."""

    @contextmanager
    def active(self, name: str, progress: Progress) -> Iterator[Any]:
        """Load the model and yield it."""
        progress.waits_for(f"loading {self._name}")
        yield self._wrap(*self._load(self._folders[0]))


class VllmGroup:
    """A model and adapters on it, loaded in vLLM.

    Args:
        name: The model's name.
        path: The model's folder.
        adapters: Adapter folders by name.
        dtype: Dtype of the weights.
    """

    def __init__(self, name: str, path: Path, adapters: Mapping[str, Path], dtype: Dtype) -> None:
        self._name, self._path, self._adapters, self._dtype = name, path, adapters, dtype
        self._views: Mapping[str | None, Backend] | None = None

    @property
    def names(self) -> list[str]:
        """The model, then the adapters."""
        return [self._name, *self._adapters]

    def folders(self, name: str) -> list[Path]:
        """Return the model's folder, followed by the adapter's if the model is one."""
        return [self._path, self._adapters[name]] if name in self._adapters else [self._path]

    def update(self, name: str) -> None:
        """Return None: nothing is added to the stored weights."""

    @contextmanager
    def active(self, name: str, progress: Progress) -> Iterator[Any]:
        """Yield the model, or an adapter on it."""
        if self._views is None:
            progress.waits_for(f"loading {', '.join(self.names)}")
            self._views = load_vllm(self._path, self._adapters, dtype=self._dtype)
        yield self._views[name if name in self._adapters else None]


def check_backend(backend: str, device: str | None) -> None:
    """Make sure that the backend and the device are usable.

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
    """Find the models, and group those that share the loaded base.

    Args:
        base: A folder or Hub id.
        models: Folders, Hub ids or updates by name.
        kind: "text" or "image".
        device: Device to load the models on; None: the GPU if there is one.
        dtype: Dtype of the weights, or "auto".
        backend: The inference library: transformers or vllm.

    Raises:
        UsageError: A model is called "base" or "fine-tuned", its path has no model, or the
            backend does not support the models or the device.
        StarmergeError: A Hub repository cannot be downloaded.
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
                "vLLM runs only text models from folders, on the GPU that it finds. Leave "
                "--backend and --device out."
            )
        return [
            VllmGroup(BASE, start, adapters, dtype),
            *(VllmGroup(name, path, {}, dtype) for name, path in own.items()),
        ]
    if kind == "image":

        def load_images(path: Path) -> tuple[Any, Any]:
            return load_image_model(path, device=device, dtype=dtype, processor_of=start)

        # A fine-tune may use the base's image processor, so both folders determine its answers.
        return [
            BaseGroup(start, updates, adapters, load_images, _pair),
            *(WholeModel(name, [path, start], load_images, _pair) for name, path in own.items()),
        ]

    def load(path: Path) -> tuple[Any, Any]:
        return load_model(path, device=device, dtype=dtype)

    return [
        BaseGroup(start, updates, adapters, load, LocalModel),
        *(WholeModel(name, [path], load, LocalModel) for name, path in own.items()),
    ]


def _pair(model: Any, processor: Any) -> tuple[Any, Any]:
    return model, processor
