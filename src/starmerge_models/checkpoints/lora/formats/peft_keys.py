"""Interpretation of the names of tensors in PEFT's files.

Source of the layout: github.com/huggingface/peft, ``utils/save_and_load.py`` and
``tuners/lora/layer.py``. A linear layer or a convolution has ``lora_A.weight`` and
``lora_B.weight``, an embedding ``lora_embedding_A`` and ``lora_embedding_B``; DoRA adds
``lora_magnitude_vector``. The name of the adapter may stand behind each of these. Beside the
factors of an embedding or of an output layer PEFT saves a copy of the base's weight,
``base_layer.weight``, and after the vocabulary has grown a copy of every embedding under its own
name; modules that were trained whole have their own names, too, and behind them there may be
``modules_to_save`` and a copy of what they were, ``original_module``. Factors of parameters, such
as those of joined experts, belong to the module that holds the parameter; where several of its
parameters have some, ``base_layer`` stands once more behind its name for each further one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from starmerge_models.checkpoints.lora.config import AdapterConfig
from starmerge_models.checkpoints.names import unwrapped
from starmerge_models.checkpoints.source import Source
from starmerge_models.errors import StarmergeError

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.weight)?"
)
_COPY = re.compile(r"(?P<module>.+)\.(base_layer|original_module)(?:\.default)?\.(?P<leaf>.+)")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.default)?\.(?P<leaf>.+)")
_PREFIX = "base_model.model."
_NESTED = ".base_layer"


@dataclass(frozen=True)
class ModuleKeys:
    """The keys of one module's update."""

    module: str
    """The module's name in PEFT."""
    a: str
    b: str
    is_embedding: bool
    magnitude: str | None
    """DoRA's magnitudes."""

    @property
    def weight(self) -> str:
        """The name of the weight that is updated."""
        return f"{self.module}.weight"


@dataclass
class AdapterKeys:
    """The keys of an adapter's file, by kind."""

    modules: list[ModuleKeys] = field(default_factory=list)
    saved: dict[str, str] = field(default_factory=dict)
    """Tensors of modules that were trained whole: the key by the name of the tensor."""
    parameters: list[ModuleKeys] = field(default_factory=list)
    """Factors of parameters, by the modules that hold them; ``.base_layer`` once more for each
    further parameter of a module."""
    copies: dict[str, str] = field(default_factory=dict)
    """Copies of the base's weights: the key by the name of the weight."""
    undeclared: set[str] = field(default_factory=set)
    """Names of those that only their equality with the base tells to be copies."""
    twice: list[tuple[str, str]] = field(default_factory=list)
    """Keys of whole modules that are to be the same tensor."""


def sort_keys(source: Source, config: AdapterConfig, keys: Iterable[str]) -> AdapterKeys:
    """Sort the keys of an adapter's file by kind.

    Raises:
        StarmergeError: A tensor is unknown for this config, occurs twice or is missing; or the file
            contains several adapters.
    """
    found = AdapterKeys()
    parts: dict[str, dict[str, str]] = {}
    adapters = set()
    for key in keys:
        name = unwrapped(key).removeprefix(_PREFIX)
        if match := _PART.fullmatch(name):
            module, part = match["module"], match["part"]
            adapters.add(match["adapter"])
            if part in parts.setdefault(module, {}):
                raise StarmergeError(f"{source} holds {part} of {module} twice: {key} is one.")
            parts[module][part] = key
        elif not _sort_whole(found, config, key, name):
            raise StarmergeError(unconsumed(source, key))
    if not parts and not found.saved:
        raise StarmergeError(f"{source} holds no {'factors' if found.copies else 'tensors'}.")
    if len(adapters) > 1:
        names = ", ".join(sorted(str(name or "one without a name") for name in adapters))
        raise StarmergeError(f"{source} holds several adapters: {names}. Save each of them alone.")
    if config.modules_to_save and not found.saved:
        raise StarmergeError(
            f"{config.file}: modules_to_save is {config.modules_to_save}, but the adapter's file "
            "holds no tensor of such a module. Is it complete?"
        )
    for module in _modules(source, config, parts):
        is_parameter = config.holds_parameters(module.module.replace(_NESTED, ""))
        (found.parameters if is_parameter else found.modules).append(module)
    if config.target_parameters and not found.parameters:
        raise StarmergeError(
            f"{config.file}: target_parameters is {config.target_parameters}, but the adapter's "
            "file holds no factors of a module's parameters. Is it complete?"
        )
    for module in found.modules:
        if module.weight in found.saved:
            raise StarmergeError(
                f"{source} holds factors of {module.module} and the whole of it, by "
                "modules_to_save in adapter_config.json. Which of them counts cannot be told; "
                "remove the other."
            )
    return found


def _sort_whole(found: AdapterKeys, config: AdapterConfig, key: str, name: str) -> bool:
    """Add a tensor of a whole module or a copy of the base's; return whether it is one of these."""
    if match := _SAVED.fullmatch(name):
        whole = f"{match['module']}.{match['leaf']}"
        if whole in found.saved:
            found.twice.append((key, found.saved[whole]))
        found.saved[whole] = key
    elif match := _COPY.fullmatch(name):
        found.copies[f"{match['module']}.{match['leaf']}"] = key
    elif _is_within(name, config.modules_to_save):
        if name in found.saved:
            found.twice.append((key, found.saved[name]))
        found.saved.setdefault(name, key)
    elif name.endswith(".weight"):
        found.copies[name] = key
        found.undeclared.add(name)
    else:
        return False
    return True


def _modules(
    source: Source, config: AdapterConfig, parts: dict[str, dict[str, str]]
) -> Iterator[ModuleKeys]:
    for module, keys in parts.items():
        is_embedding = any(part.startswith("lora_embedding") for part in keys)
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
        wanted = [a, b, "lora_magnitude_vector"] if config.use_dora else [a, b]
        present = next(iter(keys))
        for part in wanted:
            if part not in keys:
                raise StarmergeError(
                    f"{source}: {module} has {present} but no {part} (use_dora is "
                    f"{config.use_dora} in adapter_config.json). Is the file complete?"
                )
        for part in sorted(keys.keys() - set(wanted)):
            raise StarmergeError(
                f"{source}: {module} has {part}, which no adapter with use_dora "
                f"{config.use_dora} in adapter_config.json has beside {a}. Is the config that of "
                "another adapter?"
            )
        yield ModuleKeys(module, keys[a], keys[b], is_embedding, keys.get("lora_magnitude_vector"))


def _is_within(name: str, modules: list[str]) -> bool:
    """Return whether a tensor belongs to one of the modules, which are given by suffixes."""
    parents = name.split(".")[:-1]
    paths = (".".join(parents[: depth + 1]) for depth in range(len(parents)))
    return any(path.endswith(module) for path in paths for module in modules)


def unconsumed(source: Source, key: str) -> str:
    """Return the error message for an adapter with an unexplained tensor."""
    return (
        f"{source}: the tensor {key} is no LoRA factor and belongs to no module of modules_to_save "
        "in adapter_config.json, and it is not the base's weight, so the adapter is more than it "
        "says, or one of another base. If it was trained, name its module in modules_to_save; if "
        "not, save the adapter again with save_embedding_layers=False."
    )
