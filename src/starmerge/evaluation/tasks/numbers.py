"""Tasks about number words, from the package num2words."""

from __future__ import annotations

import random
from collections.abc import Iterator

from starmerge.evaluation.task import Example
from starmerge.evaluation.tasks.registry import package, task

_LANGUAGES = {
    "English": "en",
    "German": "de",
    "French": "fr",
    "Spanish": "es",
    "Italian": "it",
    "Polish": "pl",
    "Swedish": "sv",
    "Turkish": "tr",
}


@task(
    "digits",
    instruction="Write this number in digits.",
    source="num2words",
    answer=r"\d[\d,]*",
)
def digits(rng: random.Random) -> Iterator[Example]:
    """Number words to digits, 1 to 99,999; the wrong choices have one digit changed."""
    num2words = package("num2words").num2words
    for _ in range(4000):
        label = str(rng.randrange(10 ** rng.randint(1, 5)))
        wrong: set[str] = set()
        while len(wrong) < 3:
            place = rng.randrange(len(label))
            other = label[:place] + rng.choice("123456789") + label[place + 1 :]
            wrong |= {other} - {label}
        yield Example(num2words(int(label)), label, (label, *sorted(wrong)))


@task(
    "language",
    instruction="Which language is this number word written in: "
    + ", ".join(list(_LANGUAGES)[:-1])
    + f" or {list(_LANGUAGES)[-1]}?",
    source="num2words",
    labels=tuple(_LANGUAGES),
)
def language(rng: random.Random) -> Iterator[Example]:
    """The language of a number word between 13 and 9,999, one of eight."""
    num2words = package("num2words").num2words
    for name, code in _LANGUAGES.items():
        for number in rng.sample(range(13, 10_000), 500):
            yield Example(num2words(number, lang=code), name, tuple(_LANGUAGES))
