"""The names of tensors in an adapter's file, and what each of them is.

Source of the layout: github.com/huggingface/peft, ``utils/save_and_load.py`` and
``tuners/lora/layer.py``. A linear layer or a convolution has ``lora_A.weight`` and
``lora_B.weight``, an embedding ``lora_embedding_A`` and ``lora_embedding_B``; DoRA adds
``lora_magnitude_vector``. The name of the adapter may stand behind each of these. Beside the
factors of an embedding or of an output layer PEFT saves a copy of the base's weight,
``base_layer.weight``; modules that were trained whole have their own names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from starmerge.checkpoints.lora.config import AdapterConfig
from starmerge.checkpoints.source import Source
from starmerge.errors import StarmergeError

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.weight)?"
)
_COPY = re.compile(r"(?P<module>.+)\.(?P<part>base_layer)\.weight")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class ModuleKeys:
    """Where the parts of one module's update lie."""

    module: str
    """Its name as PEFT knows it."""
    a: str
    b: str
    is_embedding: bool
    magnitude: str | None
    """DoRA's magnitudes."""
    copy: str | None
    """A copy of the base's weight."""

    @property
    def weight(self) -> str:
        """The name of the weight that is updated."""
        return f"{self.module}.weight"


@dataclass
class AdapterKeys:
    """An adapter's file, sorted."""

    modules: list[ModuleKeys] = field(default_factory=list)
    saved: dict[str, str] = field(default_factory=dict)
    """Tensors of modules that were trained whole: the key by the name of the tensor."""

    @property
    def names(self) -> list[str]:
        """The names of all weights that are updated or replaced, as PEFT knows them."""
        return [*(keys.weight for keys in self.modules), *self.saved]


def sort_keys(source: Source, config: AdapterConfig, keys: Iterable[str]) -> AdapterKeys:
    """Tell what each tensor of an adapter's file is.

    Raises:
        StarmergeError: A tensor is nothing that an adapter of this config has, is there twice or is
            missing; the file holds several adapters.
    """
    sorted_keys = AdapterKeys()
    parts: dict[str, dict[str, str]] = {}
    adapters = set()
    for key in keys:
        name = key.removeprefix(_PREFIX)
        match = _COPY.fullmatch(name) or _PART.fullmatch(name)
        if match is None:
            if not _is_within(name, config.modules_to_save):
                raise StarmergeError(_unconsumed(source, key))
            if name in sorted_keys.saved:
                raise StarmergeError(f"{source} holds {name} twice: {key} is one.")
            sorted_keys.saved[name] = key
            continue
        part = match["part"]
        if part != "base_layer":
            adapters.add(match["adapter"])
        if part in parts.setdefault(match["module"], {}):
            raise StarmergeError(f"{source} holds {part} of {match['module']} twice: {key} is one.")
        parts[match["module"]][part] = key
    if not parts and not sorted_keys.saved:
        raise StarmergeError(f"{source} holds no tensors.")
    if len(adapters) > 1:
        names = ", ".join(sorted(str(name or "one without a name") for name in adapters))
        raise StarmergeError(f"{source} holds several adapters: {names}. Save each of them alone.")
    if config.modules_to_save and not sorted_keys.saved:
        raise StarmergeError(
            f"{config.file}: modules_to_save is {config.modules_to_save}, but the adapter's file "
            "holds no tensor of such a module. Is it complete?"
        )
    sorted_keys.modules.extend(_modules(source, config, parts))
    for module in sorted_keys.modules:
        if module.weight in sorted_keys.saved:
            raise StarmergeError(
                f"{source} holds factors of {module.module} and the whole of it, by "
                "modules_to_save in adapter_config.json. Which of them counts cannot be told; "
                "remove the other."
            )
    return sorted_keys


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
        for part in sorted(keys.keys() - {*wanted, "base_layer"}):
            raise StarmergeError(
                f"{source}: {module} has {part}, which no adapter with use_dora "
                f"{config.use_dora} in adapter_config.json has beside {a}. Is the config that of "
                "another adapter?"
            )
        yield ModuleKeys(
            module,
            keys[a],
            keys[b],
            is_embedding,
            keys.get("lora_magnitude_vector"),
            keys.get("base_layer"),
        )


def _is_within(name: str, modules: list[str]) -> bool:
    """Tell whether a tensor belongs to one of the modules, which are named by their ends."""
    parents = name.split(".")[:-1]
    paths = (".".join(parents[: depth + 1]) for depth in range(len(parents)))
    return any(path.endswith(module) for path in paths for module in modules)


def _unconsumed(source: Source, key: str) -> str:
    return (
        f"{source}: the tensor {key} is no LoRA factor and belongs to no module of modules_to_save "
        "in adapter_config.json, so the adapter is more than it says. If it is an embedding that "
        "was not trained, save the adapter again with save_embedding_layers=False; else fold it "
        "with PEFT's merge_and_unload and give the full model."
    )
