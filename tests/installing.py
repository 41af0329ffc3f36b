"""Packages that are installed as an installer leaves them, without an installer or a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    site: Path,
    name: str,
    modules: Mapping[str, str],
    entry_points: Mapping[str, Mapping[str, str]],
    version: str = "1.2.3",
) -> None:
    """Put a package's modules and its metadata into a folder that will be on ``sys.path``.

    Args:
        site: The folder.
        name: The distribution's name.
        modules: The source of each module by its name.
        entry_points: By group, what each name stands for.
        version: The distribution's.
    """
    site.mkdir(exist_ok=True)
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(
        "\n".join(
            f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in offers.items())
            for group, offers in entry_points.items()
        )
    )
