"""Writing words backwards."""

from __future__ import annotations

import random
from collections.abc import Iterator

from starmerge_models.evaluation.tasks.sources import GeneratorSource
from starmerge_models.evaluation.tasks.task import Task


def rows(generator: random.Random) -> Iterator[dict[str, str]]:
    """Yield 500 made-up words of 3 to 6 letters, and each written backwards."""
    for _ in range(500):
        word = "".join(generator.choices("aeioubdklmnrst", k=generator.randint(3, 6)))
        yield {"input": word, "label": word[::-1]}


backwards = Task(
    name="backwards",
    description="How is the word written backwards?",
    source=GeneratorSource(generator=rows),
    prompt="Write the word backwards. Answer with one word.\n{input}",
    match="last_word",
    metric="edit_similarity",
)
