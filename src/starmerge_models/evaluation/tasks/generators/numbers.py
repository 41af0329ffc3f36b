"""Rows about numbers, most of them from the package num2words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

from starmerge_models.evaluation.tasks.generators.package import package

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


_ROMAN = {100: "C", 90: "XC", 50: "L", 40: "XL", 10: "X", 9: "IX", 5: "V", 4: "IV", 1: "I"}

_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


def digits(rng: random.Random) -> Iterator[dict[str, object]]:
    """Number words to digits, 1 to 99,999; the wrong choices have one digit changed."""
    for _ in range(4000):
        label = str(rng.randrange(10 ** rng.randint(1, 5)))
        wrong: set[str] = set()
        while len(wrong) < 3:
            place = rng.randrange(len(label))
            other = label[:place] + rng.choice("123456789") + label[place + 1 :]
            wrong |= {other} - {label}
        yield {
            "input": _in_words(int(label)),
            "label": label,
            "choices": [label, *sorted(wrong)],
        }


def language(rng: random.Random) -> Iterator[dict[str, object]]:
    """The language of a number word between 13 and 9,999, one of eight."""
    for name, code in _LANGUAGES.items():
        for number in rng.sample(range(13, 10_000), 500):
            yield {"input": _in_words(number, lang=code), "label": name}


def parity(rng: random.Random) -> Iterator[dict[str, object]]:
    """Whether a number word between 10 and 99,999 is even or odd."""
    for number in rng.sample(range(10, 100_000), 2500):
        yield {"input": _in_words(number), "label": "odd" if number % 2 else "even"}


def larger(rng: random.Random) -> Iterator[dict[str, object]]:
    """Which of two number words below 1,000 is larger, the first or the second."""
    for _ in range(2500):
        first, second = rng.sample(range(1, 1000), 2)
        label = "first" if first > second else "second"
        yield {"input": f"{_in_words(first)}; {_in_words(second)}", "label": label}


def ordinal(rng: random.Random) -> Iterator[dict[str, object]]:
    """Ordinal words to ordinals in digits, 1st to 999th; the wrong choices are of other numbers."""
    for number in range(1, 1000):
        others = {number + step for step in (-10, -1, 1, 10)} - {number}
        label = _in_words(number, to="ordinal_num")
        wrong = sorted(_in_words(other, to="ordinal_num") for other in others if other > 0)
        yield {
            "input": _in_words(number, to="ordinal"),
            "label": label,
            "choices": [label, *wrong],
        }


def roman(rng: random.Random) -> Iterator[dict[str, object]]:
    """Numbers in digits to Roman numerals, 1 to 399; the wrong choices are of other numbers."""
    for number in range(1, 400):
        others = {number + step for step in (-10, -1, 1, 10)} & set(range(1, 400))
        label = _roman(number)
        wrong = sorted(_roman(other) for other in others)
        yield {"input": str(number), "label": label, "choices": [label, *wrong]}


@cache
def _in_words(number: int, *, lang: str = "en", to: str = "cardinal") -> str:
    """Return a number in words; kept, as the rows of a task are made again for each split."""
    words: str = package("num2words").num2words(number, lang=lang, to=to)
    return words


def _roman(number: int) -> str:
    """Write a number below 400 in Roman numerals."""
    text = ""
    for value, sign in _ROMAN.items():
        count, number = divmod(number, value)
        text += sign * count
    return text


def century(rng: random.Random) -> Iterator[dict[str, object]]:
    """The century of a year from 1001 to 2000, one of ten."""
    for year in range(1001, 2001):
        yield {"input": str(year), "label": _in_words((year + 99) // 100, to="ordinal_num")}


def month(rng: random.Random) -> Iterator[dict[str, object]]:
    """The month of a date written as year-month-day."""
    for _ in range(2500):
        place = rng.randrange(12)
        date = f"{rng.randrange(1900, 2100)}-{place + 1:02}-{rng.randrange(1, 29):02}"
        yield {"input": date, "label": _MONTHS[place]}
