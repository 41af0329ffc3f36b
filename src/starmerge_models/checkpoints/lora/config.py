"""Strict reader of ``adapter_config.json``.

A key that changes the function of an adapter is either applied or refused. Unknown keys are
refused. Source of the keys and of the scales: github.com/huggingface/peft,
``tuners/lora/config.py`` and ``tuners/lora/layer.py``.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from starmerge_models.checkpoints.base import Base
from starmerge_models.checkpoints.source import is_hub_id
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.reading import read_json
from starmerge_models.storage import Place

_READ = {
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "alpha_pattern",
    "rank_pattern",
    "fan_in_fan_out",
    "init_lora_weights",
    "modules_to_save",
    "task_type",
    "target_modules",
    "target_parameters",
    "ensure_weight_tying",
    "peft_version",
}
"""Keys that the code below reads."""

_HARMLESS = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
"""Keys of training and of bookkeeping, which are ignored. Keys of initialisations only matter with
``init_lora_weights``."""

_FOLD = "Fold the adapter with PEFT's merge_and_unload and give the full model."
_NO_PRODUCT = f"this offspring of LoRA is not s·B·A. {_FOLD}"

_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA works only on the tokens after its invocation, "
    "which no merged weight does. Train a plain LoRA",
    "arrow_config": "a router of adapters cannot be folded into weights. Give the adapters that "
    "it routes to",
    "bias": "trained biases are not merged. Train with bias='none', or fold the adapter with "
    "PEFT's merge_and_unload and give the full model",
    "kasa_config": _NO_PRODUCT,
    "layer_replication": "the adapter replicates layers that the base does not have. Save the "
    "replicated model without the adapter, and give it as the base",
    "lora_bias": "trained biases are not merged. Train with lora_bias=False, or fold the adapter "
    "with PEFT's merge_and_unload and give the full model",
    "monteclora_config": _NO_PRODUCT,
    "trainable_token_indices": f"single trained token rows are not merged. {_FOLD}",
    "use_bdlora": _NO_PRODUCT,
    "use_qalora": _NO_PRODUCT,
    "velora_config": f"the file holds more than the factors. {_FOLD}",
}
"""Keys that must be unset (None, False, empty, 'none'), with the reason and a remedy."""

_NEUTRAL: tuple[object, ...] = (None, False, "none", (), [], {})

_SWITCHES = (
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "lora_bias",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
)
"""Keys with boolean values."""

_PATTERNS = ("rank_pattern", "alpha_pattern")
"""Keys that map patterns of modules' names to numbers."""

_LONGEST_PATTERN = 1000
"""Most characters of a pattern."""

_MATCHING = 10.0
"""Limit in seconds for matching all patterns of a key, because some patterns take exponential
time."""

_PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "mica", "orthogonal")
"""Initialisations that do not change the base's weights."""

_HEADLESS_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""PEFT's task types whose models have no output over the vocabulary, so that nothing is tied."""


@dataclass(frozen=True)
class AdapterConfig:
    """The checked content of ``adapter_config.json``."""

    file: Place
    content: dict[str, Any]

    @property
    def use_dora(self) -> bool:
        """Whether the adapter uses DoRA."""
        return bool(self.content.get("use_dora"))

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the adapted layers store their weights as (in, out)."""
        return bool(self.content.get("fan_in_fan_out"))

    @property
    def modules_to_save(self) -> list[str]:
        """Suffixes of the names of modules that were trained whole."""
        return list(self.content.get("modules_to_save") or [])

    @property
    def ties(self) -> bool:
        """Whether a change of an embedding also changes the output layer that is tied to it."""
        return bool(self.content.get("ensure_weight_tying"))

    @property
    def target_parameters(self) -> list[str]:
        """Suffixes of the names of parameters with factors, such as joined experts."""
        return list(self.content.get("target_parameters") or [])

    @property
    def peft_version(self) -> tuple[int, ...] | None:
        """The version of PEFT that wrote the adapter, if recorded."""
        numbers = re.match(r"\d{1,9}(\.\d{1,9})*", str(self.content.get("peft_version") or ""))
        return tuple(map(int, numbers[0].split("."))) if numbers else None

    def holds_parameters(self, module: str) -> bool:
        """Return whether a module's factors belong to its parameters instead of its weight.

        Args:
            module: The module's name in PEFT.
        """
        if not self.parameters_of(module):
            return False
        targets = self.content.get("target_modules") or []
        if isinstance(targets, str):
            return self._target_pattern.find(module) is None
        return not any(module == end or module.endswith(f".{end}") for end in targets)

    def parameters_of(self, module: str) -> list[str]:
        """Return the names of a module's parameters that may have factors."""
        ends = ((end, end.rpartition(".")[2]) for end in self.target_parameters)
        return [name for end, name in ends if f".{module}.{name}".endswith(f".{end}")]

    @property
    def is_headless(self) -> bool:
        """Whether the adapter was trained on a model without an output over the vocabulary."""
        return self.task_type in _HEADLESS_TASKS

    @property
    def base_name(self) -> str | None:
        """Hub id or path of the model on which the adapter was trained, if recorded."""
        return str(self.content.get("base_model_name_or_path") or "") or None

    @property
    def base_hub_id(self) -> str | None:
        """Hub id of the model on which the adapter was trained; None for a path."""
        return self.base_name if self.base_name and is_hub_id(self.base_name) else None

    @property
    def task_type(self) -> str | None:
        """PEFT's task type."""
        value = self.content.get("task_type")
        return value if isinstance(value, str) else None

    def check_base_name(self, base: Base) -> None:
        """Check that the adapter was trained on this base, if both have Hub ids.

        Raises:
            UsageError: The config names another base.
        """
        # Only Hub ids are compared, because paths do not identify a model.
        trained_on, known = self.base_hub_id, base.source.name
        if known and trained_on and trained_on.lower() != known.lower():
            raise UsageError(
                f"{self.file}: base_model_name_or_path is {trained_on}, but the base is {known}. "
                "If both are the same weights, say so with --any-base."
            )

    def scale(self, module: str, rank: int) -> float:
        """Return s: alpha/r, or alpha/√r with rsLoRA; alpha and r may depend on the module.

        Args:
            module: The module's name in PEFT.
            rank: The rank of its factors.

        Raises:
            StarmergeError: The config gives the module another rank; a pattern is broken.
        """
        declared = self.rank(module)
        if declared != rank:
            raise StarmergeError(
                f"{self.file}: the rank of {module} is {declared} here and {rank} in the tensors, "
                "so the scale of its update is unknown. Is the config that of another adapter?"
            )
        alpha = self._of_module("alpha_pattern", module, self.content["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self.content.get("use_rslora") else rank)

    def rank(self, module: str) -> float:
        """Return the declared rank of a module or a parameter."""
        return self._of_module("rank_pattern", module, self.content["r"])

    def _of_module(self, key: str, module: str, default: float) -> float:
        """Return the number of the first pattern under ``key`` that matches, or the default."""
        value = self._patterns[key].find(module)
        return default if value is None else value

    @cached_property
    def _target_pattern(self) -> _Patterns:
        return _Patterns(self.file, "target_modules", {self.content["target_modules"]: 1.0})

    @cached_property
    def _patterns(self) -> dict[str, _Patterns]:
        return {key: _Patterns(self.file, key, self.content.get(key) or {}) for key in _PATTERNS}


class _Patterns:
    """Patterns of modules' names with a number each, matched in bounded time.

    Args:
        file: The config, for error messages.
        key: Key of the patterns in the config.
        values: The numbers by pattern.

    Raises:
        StarmergeError: A pattern is broken or too long.
    """

    def __init__(self, file: Place, key: str, values: Mapping[str, float]) -> None:
        self._where = f"{file}: {key}"
        self._left = _MATCHING
        self._patterns = [(self._compiled(pattern), values[pattern]) for pattern in values]

    def find(self, module: str) -> float | None:
        """Return the number of the first pattern that matches a module's name; None without one.

        Raises:
            StarmergeError: The patterns take too long.
        """
        started = time.monotonic()
        try:
            for pattern, value in self._patterns:
                if pattern.match(module, timeout=self._left):
                    return value
                if time.monotonic() - started > self._left:
                    raise TimeoutError
        except TimeoutError as error:
            raise StarmergeError(
                f"{self._where} has patterns, such as {pattern.pattern[8:-2]!r:.200}, that take "
                f"more than {_MATCHING:g} s to compare with the modules' names. Write the names "
                "themselves."
            ) from error
        self._left -= time.monotonic() - started
        return None

    def _compiled(self, pattern: str) -> Any:
        # Imported lazily: slow and rarely needed. Unlike re, regex has timeouts.
        import regex  # noqa: PLC0415

        if len(pattern) > _LONGEST_PATTERN:
            raise StarmergeError(
                f"{self._where} has a pattern of {len(pattern)} characters, and {_LONGEST_PATTERN} "
                "are read at most."
            )
        try:
            return regex.compile(rf"(.*\.)?({pattern})$")
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise StarmergeError(
                f"{self._where} has {pattern!r:.200}, which is no pattern: {error}."
            ) from error


def read_adapter_config(file: Place) -> AdapterConfig:
    """Read ``adapter_config.json`` and refuse unsupported keys by name.

    Raises:
        UsageError: The adapter is of an unsupported kind, or an unknown key is set.
        StarmergeError: The file is missing or broken.
    """
    return checked_config(file, read_json(file))


def checked_config(file: Place, content: dict[str, Any]) -> AdapterConfig:
    """Check the content of a config of PEFT; see :func:`read_adapter_config`.

    Args:
        file: The file, for error messages.
        content: Its content.
    """
    kind = content.get("peft_type")
    if kind != "LORA":
        raise UsageError(
            f"{file}: peft_type is {kind!r}; only LORA adapters can be merged. Fold the adapter "
            "with PEFT's merge_and_unload, where it has one, and give the full model."
        )
    for key, reason in _REFUSED.items():
        if content.get(key) not in _NEUTRAL:
            raise UsageError(f"{file}: {key} is {content[key]!r}, and {reason.rstrip('.')}.")
    _check_initialisation(file, content.get("init_lora_weights", True))
    # Ignore unknown keys of a newer PEFT that are unset.
    unknown = {key for key in content if content[key] not in _NEUTRAL}
    unknown -= _READ | _HARMLESS | _REFUSED.keys()
    if unknown:
        key = min(unknown)
        raise UsageError(
            f"{file}: the key {key!r} ({content[key]!r}) is unknown, and may change what the "
            f"adapter computes. {_FOLD}"
        )
    _check_types(file, content)
    for key in ("modules_to_save", "target_parameters"):
        names = content.get(key) or []
        if not isinstance(names, list) or not all(name and isinstance(name, str) for name in names):
            raise StarmergeError(f"{file}: {key} is {names!r:.200}, which is no list of names.")
    targets = content.get("target_modules") or []
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    ):
        raise StarmergeError(
            f"{file}: target_modules is {targets!r:.200}, which is neither names nor a pattern."
        )
    return AdapterConfig(file, content)


def _check_types(file: Place, content: Mapping[str, Any]) -> None:
    for key in ("r", "lora_alpha"):
        if not is_number(content.get(key)):
            raise StarmergeError(f"{file}: {key} is missing or is not a finite number.")
    for key in _SWITCHES:
        if not isinstance(content.get(key), bool | None):
            raise StarmergeError(f"{file}: {key} is {content[key]!r:.200}. Write true or false.")
    for key in ("base_model_name_or_path", "task_type"):
        if not isinstance(content.get(key), str | None):
            raise StarmergeError(f"{file}: {key} is {content[key]!r:.200}, which is no text.")
    for key in _PATTERNS:
        patterns = content.get(key) or {}
        if not isinstance(patterns, dict):
            raise StarmergeError(f"{file}: {key} is no mapping of patterns: {patterns!r:.200}.")
        for pattern, value in patterns.items():
            if not is_number(value):
                raise StarmergeError(
                    f"{file}: {key} gives {pattern!r:.200} the value {value!r:.200}, which is no "
                    "number."
                )


def _check_initialisation(file: Place, start: object) -> None:
    if start in _PLAIN_INITIALISATIONS:
        return
    remedy = (
        "Convert the adapter with PEFT's "
        "save_pretrained(path_initial_model_for_weight_conversion=...)."
    )
    if start == "loftq":
        remedy = "Give the base that LoftQ made, and set init_lora_weights to true."
    raise UsageError(
        f"{file}: init_lora_weights is {start!r}, which changes the base's weights. {remedy}"
    )


def is_number(value: object) -> bool:
    """Return whether a value of a config is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
