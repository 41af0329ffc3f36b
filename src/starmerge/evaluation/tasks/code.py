"""Tasks about programming languages, from the package pygments."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from starmerge.evaluation.task import Example
from starmerge.evaluation.tasks.registry import package, task

_LANGUAGES = ("MySQL", "PHP", "Scheme", "Scilab", "Stan", "Vim")


@task(
    "builtin",
    instruction="Which programming language has this builtin: "
    f"{', '.join(_LANGUAGES[:-1])} or {_LANGUAGES[-1]}?",
    source="pygments",
    labels=_LANGUAGES,
)
def builtin(rng: random.Random) -> Iterator[Example]:
    """The language of a builtin name that only one of six languages has."""
    lexers = package("pygments.lexers").__name__
    php, scheme, scilab, stan, mysql, vim = (
        package(f"{lexers}._{name}_builtins")
        for name in ("php", "scheme", "scilab", "stan", "mysql", "vim")
    )
    every = {
        "MySQL": set(mysql.MYSQL_FUNCTIONS),
        "PHP": set(itertools.chain.from_iterable(php.MODULES.values())),
        "Scheme": set(scheme.scheme_builtins),
        "Scilab": set(scilab.functions_kw),
        "Stan": set(stan.FUNCTIONS),
        "Vim": {full for _, full in vim.option},
    }
    for label, names in every.items():
        others = set[str]().union(*(every[other] for other in every if other != label))
        only = sorted(name for name in names - others if len(name) > 3)
        for name in rng.sample(only, min(400, len(only))):
            yield Example(name, label, _LANGUAGES)
