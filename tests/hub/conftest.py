"""A Hub on this machine, and merges to push to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import starmerge_models as sm
from tests.hub.fake_hub import FakeHub, serving

# It does not look like a token of the Hub, so that nothing knows it by its looks.
TOKEN = "secret_0f3a9c77e1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """Serve an imitation of the Hub, and let the Hub's client of this process talk to it."""
    with serving(FakeHub(TOKEN)) as fake:
        constants = huggingface_hub.constants
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        template = f"{fake.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        yield fake


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process that talks to the imitation."""
    return os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf-home"),
    }


@pytest.fixture
def commands_reach_it(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands of a test talk to the imitation."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def finetunes(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the folders of three versions of the tiny model."""
    folder = tmp_path_factory.mktemp("finetunes")
    for n in range(3):
        tensors = load_file(tiny_base / "model.safetensors")
        (folder / f"task{n}").mkdir()
        random = torch.Generator().manual_seed(n)
        changed = {
            key: tensor + 0.01 * torch.randn(tensor.shape, generator=random)
            for key, tensor in tensors.items()
        }
        save_file(changed, folder / f"task{n}" / "model.safetensors", metadata={"format": "pt"})
        copyfile(tiny_base / "config.json", folder / f"task{n}" / "config.json")
    return sorted(folder.iterdir())


@pytest.fixture
def merged(tiny_base: Path, finetunes: list[Path], tmp_path: Path) -> Path:
    """Return the folder of a merge with one large file."""
    return sm.merge(tiny_base, finetunes, sm.Average(), output=tmp_path / "merged").path


@pytest.fixture
def many(tiny_base: Path, finetunes: list[Path], tmp_path: Path) -> Path:
    """Return the folder of a merge with several large files, some of them in folders."""
    folder = sm.merge(tiny_base, finetunes, sm.Emr(), output=tmp_path / "many").path
    assert len(list(folder.rglob("*.safetensors"))) == 4
    return folder
