"""Rows about number words, from the package num2words."""

from __future__ import annotations

import random
from collections.abc import Iterator

from starmerge.evaluation.generators.package import package

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


def digits(rng: random.Random) -> Iterator[dict[str, object]]:
    """Number words to digits, 1 to 99,999; the wrong choices have one digit changed."""
    num2words = package("num2words").num2words
    for _ in range(4000):
        label = str(rng.randrange(10 ** rng.randint(1, 5)))
        wrong: set[str] = set()
        while len(wrong) < 3:
            place = rng.randrange(len(label))
            other = label[:place] + rng.choice("123456789") + label[place + 1 :]
            wrong |= {other} - {label}
        yield {
            "input": num2words(int(label)),
            "label": label,
            "choices": [label, *sorted(wrong)],
        }


def language(rng: random.Random) -> Iterator[dict[str, object]]:
    """The language of a number word between 13 and 9,999, one of eight."""
    num2words = package("num2words").num2words
    for name, code in _LANGUAGES.items():
        for number in rng.sample(range(13, 10_000), 500):
            yield {"input": num2words(number, lang=code), "label": name}
