"""What a quantised base costs the demo's merge: eight adapters by ``auto``, into three bases.

The base as it is, and what transformers and bitsandbytes store of it as LLM.int8 and as NF4. First,
how far each weight matrix moves by the quantisation, and by each adapter, relative to its Frobenius
norm. Then the normalised averages of the three merges, asked the same held-out rows of the demo's
tasks, greedily, and their differences, paired by rows.

Needs bitsandbytes (``pip install bitsandbytes``), and a base that ``starmerge demo prepare`` made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from common import parser_of, print_machine

import starmerge_models
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.source import resolve
from starmerge_models.demo_names import prepared_base
from starmerge_models.evaluation.runner import evaluate
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.table import markdown
from starmerge_models.evaluation.tasks import find_task
from starmerge_models_demo import ADAPTERS

FORMATS = {
    "LLM.int8": {"load_in_8bit": True},
    "NF4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
}


def quantise(base: Path, folder: Path, **options: object) -> Path:
    """Write a base as bitsandbytes stores it."""
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def moved(base: Path, quantised: Path) -> list[float]:
    """Return how far each quantised weight is from the base's, relative to its norm."""
    plain, coded = (open_base(resolve(folder)).checkpoint for folder in (base, quantised))
    names = [name for name, info in coded.items() if not info.is_stored]
    weights = ((plain.read(name).double(), coded.read(name).double()) for name in names)
    return [float((after - before).norm() / before.norm()) for before, after in weights]


def changed(base: Path, adapters: dict[str, Path]) -> list[float]:
    """Return how large the updates of adapters are, relative to the norms of the weights."""
    vectors, plain = starmerge_models.load_task_vectors(base, adapters), open_base(resolve(base))
    return [
        delta.frobenius() / float(plain.checkpoint.read(name).double().norm())
        for deltas in vectors.deltas.values()
        for name, delta in deltas.items()
    ]


def span(shares: list[float]) -> str:
    """Return the least, the median and the most of some shares."""
    least, middle, most = (sorted(shares)[i] for i in (0, len(shares) // 2, -1))
    return f"{least:.2%}, {middle:.2%}, {most:.2%}"


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--rows", type=int, default=100, metavar="N", help="held-out rows a task (default: 100)"
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for 2 GB (default: the system's for temporary files)"
    )
    return parser.parse_args()


def main() -> int:
    """Quantise, merge, score, print."""
    options = parse_options()
    base = prepared_base()
    adapters = {path.name: path for path in sorted(ADAPTERS.iterdir()) if path.is_dir()}
    print_machine()
    print("\nRelative to a matrix, least, median, most:\n")
    print(f"- adapters: {span(changed(base, adapters))}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        merges = {}
        for name, settings in {"plain": {}, **FORMATS}.items():
            own = base
            if settings:
                own = quantise(base, Path(scratch) / f"base-{name}", **settings)
                print(f"- {name}: {span(moved(base, own))}")
            merges[name] = Path(scratch) / name
            starmerge_models.merge(own, adapters, "auto", output=merges[name], dtype="bfloat16")
        tasks = [find_task(name) for name in adapters]
        evaluation = evaluate(base, {**adapters, **merges}, tasks, Settings(rows=options.rows))
    print(f"\n{markdown(evaluation)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
