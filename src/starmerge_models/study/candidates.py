"""The candidates of a race: the defaults, and their names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starmerge_models.errors import UsageError
from starmerge_models.merging.in_memory import check_one_update
from starmerge_models.methods.method import Method
from starmerge_models.methods.pipeline import Pipeline, as_pipeline, make_pipeline

_DEFAULTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("auto", {}),
    ("star", {}),
    ("average", {}),
    ("task_arithmetic", {"alpha": 0.2}),
    ("task_arithmetic", {"alpha": 0.3}),
    ("task_arithmetic", {"alpha": 0.5}),
    ("tsv_m", {}),
    ("covariance+own_response", {}),
)
"""The default candidates, in the order of preference for ties. Add new defaults here."""


def default_candidates() -> list[Pipeline]:
    """Return the default candidates of a race."""
    return [make_pipeline(chain, parameters) for chain, parameters in _DEFAULTS]


def candidate_name(pipeline: Pipeline) -> str:
    """Return a candidate's name: its chain and its non-default parameters.

    The name has the syntax of the command line: ``star:eta=60``.
    """
    usual = make_pipeline(pipeline.name).parameters()
    own = {
        key: value if isinstance(value, str) else _as_json(value)
        for key, value in pipeline.parameters().items()
        if value != usual[key]
    }
    settings = ",".join(f"{key}={value}" for key, value in own.items())
    return f"{pipeline.name}:{settings}" if settings else pipeline.name


def _as_json(value: Any) -> str:
    """Return a parameter as JSON, a whole number without ".0"."""
    return json.dumps(_plain(value), default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    is_short = isinstance(value, float) and value.is_integer() and abs(value) < _LONG
    return int(value) if is_short else value


_LONG = 1e15
"""Numbers from here on keep their exponent notation."""


def named_candidates(
    candidates: Sequence[str | Method | Pipeline] | None,
) -> dict[str, Pipeline]:
    """Return candidates by name, in the given order; by default :func:`default_candidates`.

    Raises:
        UsageError: There are fewer than two candidates, two are the same, or one is unknown, makes
            a model for each task or needs a metric.
    """
    if isinstance(candidates, str | Method | Pipeline):
        candidates = [candidates]
    chains = default_candidates() if candidates is None else list(map(as_pipeline, candidates))
    found: dict[str, Pipeline] = {}
    for chain in chains:
        check_one_update(chain)
        name = candidate_name(chain)
        if chain.needs_moments:
            raise UsageError(
                f"The candidate {name} needs a metric of the inputs, and a race has none. "
                "Leave it out, or merge at once with `starmerge merge --metric`."
            )
        if name in found:
            raise UsageError(
                f"The candidate {name} is given twice: a chain with the same parameters. Leave one "
                "out."
            )
        found[name] = chain
    if len(found) < 2:
        raise UsageError(
            f"A race needs at least two candidates, and there is {len(found) or 'none'}"
            f"{''.join(f' ({name})' for name in found)}. Give more, or merge at once with "
            "`starmerge merge`."
        )
    return found
