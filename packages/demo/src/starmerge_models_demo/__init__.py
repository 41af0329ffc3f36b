"""Data of starmerge's demo: eight adapters of a small language model, and a table of cities.

Installed by the extra ``demo`` of ``starmerge-models``, in which the adapters are called
``demo:digits`` and so on. Folders and files alone; nothing here computes.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent

ADAPTERS = _FOLDER / "adapters"
"""LoRA adapters in PEFT's layout, a folder for each task, made by ``starmerge finetune``.

Each was trained with a seed of its own on SmolLM2-135M-Instruct, the base that ``starmerge demo
prepare`` fetches. The card in its folder has the command.
"""

CITIES = _FOLDER / "cities.tsv"
"""The cities of over 15,000 people of GeoNames: name, code of the continent, north or south.

Tab-separated UTF-8 with a header, each line once. The hemisphere is empty on the equator.
"""
