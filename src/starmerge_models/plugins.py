"""Plug-ins: methods, tasks, metrics and matchers by name, from starmerge, other packages and files.

Each kind has a :class:`Registry`. A registry finds an object by its name, from three sources:

- starmerge itself, by a plain name: ``star``;
- an installed package, by an entry point of the registry's group, with a plain name too. Entry
  points are read when a requested name is not built in, or when all names are listed;
- a file, by ``path/to/file.py:NAME``. Loading a file executes it, so only files that the user names
  are loaded.

A name that two sources define is refused, and the error names both origins.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from blake3 import blake3

from starmerge_models.errors import StarmergeError, UsageError, near, nearest
from starmerge_models.versions import PathState, path_state

_Thing = TypeVar("_Thing")

_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Origin:
    """Origin of a plug-in: a package, a file, or a module of the running program."""

    package: str | None = None
    """Name of the distribution that defines the entry point."""
    version: str | None = None
    """The distribution's version."""
    module: str | None = None
    """Name of a module of the running program that was not loaded by starmerge."""
    file: Path | None = None
    """The file that defines the plug-in; None for packages, and without a file (a notebook)."""
    blake3: str | None = None
    """BLAKE3 of the file."""

    def __str__(self) -> str:
        if self.package is not None:
            return f"the package {self.package} {self.version}"
        if self.module is not None:
            return f"the module {self.module}"
        return f"the file {self.file}"

    def record(self) -> dict[str, str]:
        """Return the origin as plain data without paths of folders, for recipes and reports."""
        parts = {
            "package": self.package,
            "version": self.version,
            "module": self.module,
            "file": None if self.file is None else self.file.name,
            "blake3": self.blake3,
        }
        return {key: value for key, value in parts.items() if value is not None}


@dataclass(frozen=True)
class Plugin(Generic[_Thing]):
    """An object that an installed package offers, or the reason why it cannot be used."""

    name: str
    origin: Origin
    thing: _Thing | None
    """The object; None if it cannot be used."""
    fault: str | None
    """Reason why it cannot be used; None if it can."""


@dataclass(frozen=True)
class _LazyEntry(Generic[_Thing]):
    """An entry of a registry that is loaded on first use."""

    load: Callable[[], _Thing]


class Registry(Mapping[str, _Thing]):
    """A registry of methods, tasks, metrics or matchers with plain names, and lookup of others.

    As a mapping it contains the objects of starmerge, of loaded packages, and of the running
    program, but not those of files. Entry points of starmerge itself are loaded on first use, so
    that packages above the registry can register entries in it.

    Args:
        word: Kind of the objects, for error messages: "method".
        group: Group of the entry points of other packages.
        fault: Returns the reason why an object cannot be used, such as "it is not decorated"; None
            for a usable object.
        built_in: Returns a loader by name for built-in objects that :meth:`add` does not register.
            Called on the first lookup.
        unknown: Error message for unknown names, with the field ``name``.
        listing: The command that lists all names, if these are too many for an error message.
    """

    def __init__(
        self,
        word: str,
        group: str,
        *,
        fault: Callable[[Any], str | None],
        built_in: Callable[[], Mapping[str, Callable[[], _Thing]]] | None = None,
        unknown: str | None = None,
        listing: str | None = None,
    ) -> None:
        self.word, self.group = word, group
        self._fault, self._list_built_in = fault, built_in
        self._listing = listing
        self._unknown = unknown or f"No {word} is called {{name!r}}."
        self._is_listed = False
        self._entered: dict[str, _Thing | _LazyEntry[_Thing]] = {}
        self._others: dict[str, _Thing] = {}

    def __getitem__(self, name: str) -> _Thing:
        found = self._ours.get(name)
        if found is None:
            return self._others[name]
        if isinstance(found, _LazyEntry):
            found = self._ours[name] = found.load()
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self._ours
        yield from self._others

    def __len__(self) -> int:
        return len(self._ours) + len(self._others)

    @property
    def built_in(self) -> Mapping[str, _Thing]:
        """The built-in objects by name, all loaded."""
        return {name: self[name] for name in self._ours}

    @property
    def _ours(self) -> dict[str, _Thing | _LazyEntry[_Thing]]:
        """The built-in objects by name, or their lazy entries."""
        if not self._is_listed:
            self._is_listed = True
            listed = {} if self._list_built_in is None else self._list_built_in()
            offered = {offer.name: offer.load for offer in self._entry_points(ours=True)}
            for name, load in {**listed, **offered}.items():
                self._entered.setdefault(name, _LazyEntry(load))
        return self._entered

    def add(self, name: str, thing: _Thing) -> None:
        """Register an object that is being defined; objects of loaded files are not registered.

        Defining the same object again, as by running a notebook's cell twice, replaces it.

        Raises:
            UsageError: Another object has the name.
        """
        if _module_of(thing) in _FILES:
            return  # objects of files are only found by path
        if _is_ours(thing) and isinstance(self._ours.get(name), _LazyEntry):
            self._ours[name] = thing  # the lazy entry's module is being imported
            return
        other = self.get(name)
        if other is not None and _place_of(other) != _place_of(thing):
            raise UsageError(
                f"{_place_of(thing)} calls itself {name!r}, and so does the {self.word} "
                f"{_place_of(other)}. Give it another name."
            )
        if _is_ours(thing):
            self._ours[name] = thing
        else:
            self._others[name] = thing

    def find(self, reference: str) -> _Thing:
        """Return the object of a plain name, or of ``path/to/file.py:NAME``.

        Raises:
            UsageError: The name or file does not exist, the object is of another kind, or two
                sources define the name.
            StarmergeError: The package or the file cannot be loaded.
        """
        named = _FILE.fullmatch(reference)
        if named is not None:
            return self._of_file(Path(named["file"]), named["name"], reference)
        if reference in self:
            return self[reference]
        offered = self._offered()
        if reference in offered:
            return self._of_package(reference, offered[reference])
        message = self._unknown.format(name=reference)
        if reference.endswith(".py"):
            raise UsageError(f"{message} Of a file say which: {reference}:NAME.")
        known = {*self, *self._short(), *offered}
        if self._listing is not None and not near(reference, known):
            raise UsageError(f"{message} `{self._listing}` lists the {len(known)} that there are.")
        raise UsageError(f"{message}{nearest(reference, known)}")

    def plugins(self) -> list[Plugin[_Thing]]:
        """Load and return all objects of installed packages, including unusable ones."""
        found: list[Plugin[_Thing]] = []
        for name, offers in sorted(self._offered().items()):
            thing: _Thing | None = None
            fault = None
            try:
                thing = self._of_package(name, offers)
            except StarmergeError as error:
                fault = str(error)
            found.extend(Plugin(name, _origin_of(offer), thing, fault) for offer in offers)
        return found

    def offers(self, name: str) -> bool:
        """Return whether an installed package defines a name, without loading the package."""
        return name in self._offered()

    def origin(self, thing: Any) -> Origin | None:
        """Return the origin of a registered object; None for a built-in one."""
        if _is_ours(thing):
            return None
        module = _module_of(thing)
        if module in _FILES:
            return _FILES[module]
        for offer in self._offered().get(thing.name, ()):
            with suppress(Exception):
                if offer.load() is thing:
                    return _origin_of(offer)
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is None or not Path(file).is_file():
            return Origin(module=module)
        path = Path(file)
        return Origin(module=module, file=path, blake3=blake3(path.read_bytes()).hexdigest())

    def reference(self, thing: Any) -> str:
        """Return the name by which :meth:`find` finds an object.

        Paths of files are relative to the current folder if inside of it, else absolute.
        """
        origin = _FILES.get(_module_of(thing))
        if origin is None or origin.file is None:
            return str(thing.name)
        place, here = origin.file, Path.cwd()
        shown = place.relative_to(here) if place.is_relative_to(here) else place
        return f"{shown}:{thing.__qualname__}"

    def _short(self) -> list[str]:
        """Return the part after the slash of names with a slash: ``past`` of ``demo/past``."""
        return [name.partition("/")[2] for name in self if "/" in name]

    def _offered(self) -> dict[str, list[EntryPoint]]:
        offered: dict[str, list[EntryPoint]] = {}
        for offer in self._entry_points(ours=False):
            offered.setdefault(offer.name, []).append(offer)
        return offered

    def _entry_points(self, *, ours: bool) -> list[EntryPoint]:
        """Return the entry points of starmerge itself, or those of other packages."""
        return [
            offer
            for offer in _installed(self.group, path_state())
            if (offer.module.partition(".")[0] == "starmerge_models") == ours
        ]

    def _holders(self, name: str, offers: list[EntryPoint]) -> list[str]:
        """Return descriptions of all sources that define a name: starmerge and packages."""
        ours = name in self._ours or name in self._short()
        return [*(["starmerge"] if ours else []), *sorted(str(_origin_of(o)) for o in offers)]

    def _of_package(self, name: str, offers: list[EntryPoint]) -> _Thing:
        """Load the object of an entry point.

        Raises:
            UsageError: Another source defines the name too.
            StarmergeError: The object cannot be loaded, is of another kind, or has another name.
        """
        holders = self._holders(name, offers)
        if len(holders) > 1:
            raise UsageError(
                f"The {self.word} {name!r} is refused: {' and '.join(holders)} have one of that "
                "name. Uninstall or rename one."
            )
        where = f"The {self.word} {name!r} of {holders[0]}"
        offer = offers[0]
        try:
            thing: Any = offer.load()
        except (Exception, SystemExit) as error:  # the package's code may raise anything
            raise StarmergeError(
                f"{where} cannot be loaded from {offer.value}: {_reason(error)}. Mend the package "
                "or uninstall it."
            ) from error
        fault = self._fault(thing)
        if fault is None and thing.name != name:
            fault = f"it calls itself {thing.name!r}, and its entry point must have that name"
        if fault is not None:
            raise StarmergeError(f"{where} cannot be used: {offer.value}: {fault}.")
        return thing  # type: ignore[no-any-return]

    def _of_file(self, path: Path, name: str, reference: str) -> _Thing:
        """Load an object that a file defines.

        Raises:
            UsageError: The file or the name does not exist, the object is of another kind, or its
                own name is already taken.
            StarmergeError: The file cannot be executed.
        """
        module = load_file(path)
        if not hasattr(module, name):
            known = [key for key, value in vars(module).items() if self._fault(value) is None]
            hint = nearest(name, known) if known else f" It has no {self.word}."
            raise UsageError(f"{path} has no {name!r}.{hint}")
        thing = getattr(module, name)
        fault = self._fault(thing)
        if fault is not None:
            raise UsageError(f"{reference} is no {self.word}: {fault}.")
        if self.get(thing.name) is not thing:
            holders = self._holders(thing.name, self._offered().get(thing.name, []))
            if holders:
                raise UsageError(
                    f"{reference} calls itself {thing.name!r}, and so does the {self.word} of "
                    f"{holders[0]}. Give it another name."
                )
        return thing  # type: ignore[no-any-return]


@lru_cache(maxsize=32)
def _installed(group: str, path: PathState) -> EntryPoints:
    """Return the entry points of installed packages; to read them opens a file of each package.

    Args:
        group: The group of the entry points.
        path: The state of Python's path.
    """
    return importlib.metadata.entry_points(group=group)


def is_file_reference(reference: str) -> bool:
    """Return whether a name refers to a file: ``path/to/file.py:NAME``."""
    return _FILE.fullmatch(reference) is not None


def absolute_reference(reference: str, folder: Path) -> str:
    """Resolve the path in a file reference relative to a folder; plain names are unchanged."""
    named = _FILE.fullmatch(reference)
    if named is None:
        return reference
    return f"{folder / Path(named['file']).expanduser()}:{named['name']}"


def relative_reference(reference: str, folder: Path) -> str:
    """Make the path in a file reference relative to a folder: inverts :func:`absolute_reference`.

    Paths outside of the folder become absolute.
    """
    named = _FILE.fullmatch(reference)
    if named is None:
        return reference
    path = Path(named["file"]).expanduser().absolute()
    shown = path.relative_to(folder) if path.is_relative_to(folder) else path
    return f"{shown}:{named['name']}"


def load_file(path: Path) -> ModuleType:
    """Execute a Python file, unless it was executed with the same content; return its module.

    The file cannot import other modules of its folder.

    Raises:
        UsageError: There is no such file.
        StarmergeError: It cannot be read or executed; the message names the line.
    """
    path = path.expanduser()
    try:
        source = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UsageError(f"There is no file {path}.") from error
    except OSError as error:
        raise StarmergeError(f"{path} cannot be read: {error.strerror}.") from error
    place, digest = path.resolve(), blake3(source).hexdigest()
    name = f"_file_{place.stem}_{blake3(f'{place}{digest}'.encode()).hexdigest()[:16]}"
    if name in _FILES:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(place)
    # Decorators and dataclasses look up the module of a class in both.
    sys.modules[name], _FILES[name] = module, Origin(file=place, blake3=digest)
    try:
        exec(compile(source, str(place), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        del sys.modules[name], _FILES[name]
        raise StarmergeError(f"{path} cannot be loaded: {_reason(error, place)}.") from error
    return module


def loaded_files() -> list[Path]:
    """Return the loaded files, which another process must load before it unpickles objects."""
    return [origin.file for origin in _FILES.values() if origin.file is not None]


_FILES: dict[str, Origin] = {}
"""The loaded files, by the names of their modules."""


def _reason(error: BaseException, file: Path | None = None) -> str:
    """Return the text of an error, with the line of the file that raised it."""
    text = " ".join(str(error).split()).rstrip(".")
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if file is not None and frame.filename == str(file)
    ]
    return f"line {lines[-1]}: {said}" if lines else said


def _module_of(thing: Any) -> str:
    return str(getattr(thing, "__module__", ""))


def _place_of(thing: Any) -> str:
    return f"{_module_of(thing)}.{getattr(thing, '__qualname__', '')}"


def _is_ours(thing: Any) -> bool:
    return _module_of(thing).partition(".")[0] == "starmerge_models"


def _origin_of(offer: EntryPoint) -> Origin:
    # Entry points from importlib.metadata always have a distribution.
    return Origin(package=offer.dist.name, version=offer.dist.version)  # type: ignore[union-attr]
