"""The parts of a module's change in files of LoRA and LyCORIS, and the resulting changes.

Sources: github.com/kohya-ss/sd-scripts, ``networks/lora.py``; github.com/KohakuBlueleaf/LyCORIS,
``lycoris/modules/{locon,loha,lokr,full,norms}.py``. The scale is alpha/r, or 1 without an alpha. It
is applied once, as in LyCORIS' forward pass; LyCORIS' own export of LoHa and LoKr into a model's
weights applies it twice, in version 4.1.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from starmerge_models.checkpoints.lora.formats.contents import AdapterFile
from starmerge_models.checkpoints.lora.update import (
    Change,
    Difference,
    FactoredMatrix,
    Hadamard,
    Kronecker,
    Magnitude,
    Product,
    StoredMatrix,
    Tucker,
    Update,
)
from starmerge_models.errors import StarmergeError, UsageError

Scale = Callable[[str, int], float]
"""Returns the scale of a module's change, given its name and the rank."""

PARTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A": "down",
    "lora_B": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    **{f"hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f"lokr_{part}": f"lokr_{part}"
        for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    },
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
}
"""The part of a change, by the suffix of a tensor's key."""

_KINDS = {
    "LoRA": ("down", "up", "mid"),
    "LoHa": tuple(part for part in PARTS.values() if part.startswith("hada_")),
    "LoKr": tuple(part for part in PARTS.values() if part.startswith("lokr_")),
    "difference": ("diff",),
    "difference of a norm": ("w_norm",),
}
"""The parts of each kind of change."""

_SCALED = ("LoRA", "LoHa", "LoKr")
"""Kinds with an alpha, which may also have DoRA's magnitudes."""

_BIASES = ("diff_b", "b_norm")

_FOREIGN = {
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "a1.weight": "GLoRA",
    "on_input": "IA³",
    ".bias": "LoRA with trained biases",
    "string_to_param": "an embedding that was trained along with it",
}
"""Parts of the keys of unsupported adapters."""

_EPSILON = 2.0**-23
"""The ε that LyCORIS adds to norms, in float32."""


def unknown_key(file: AdapterFile, key: str, tool: str) -> StarmergeError:
    """Return the error for an unsupported key.

    Args:
        file: The adapter.
        key: The key.
        tool: A tool that can fold the adapter into its base.
    """
    for part, kind in _FOREIGN.items():
        if part in key:
            return UsageError(
                f"{file.source}: {key} is of {kind}, which is not merged. Fold the adapter into "
                f"its base with {tool}, and give the full model."
            )
    return StarmergeError(
        f"{file.source}: the tensor {key} is no part of a LoRA, LoCon, LoHa, LoKr or difference, "
        f"so the adapter is more than is known. Fold it into its base with {tool}, and give the "
        "full model."
    )


def by_module(file: AdapterFile, keys: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, str]]:
    """Return the keys of each module's parts, by the module and the part.

    Args:
        file: The adapter, for error messages.
        keys: Module and part of each key.

    Raises:
        StarmergeError: A part occurs twice.
    """
    modules: dict[str, dict[str, str]] = {}
    for key, (module, part) in keys.items():
        own = modules.setdefault(module, {})
        if part in own:
            raise StarmergeError(
                f"{file.source} holds {own[part]} and {key}, which say the same of {module}. Which "
                "of them counts cannot be told; remove the other."
            )
        own[part] = key
    return modules


def updates_of(
    file: AdapterFile, module: str, parts: Mapping[str, str], scale: Scale | None = None
) -> Iterator[Update]:
    """Yield the changes of a module's weight and bias.

    Args:
        file: The adapter.
        module: The module's name as the file has it.
        parts: The keys by the part.
        scale: The scales of the header, for modules without an alpha.

    Raises:
        StarmergeError: A part is missing, unexpected, or of the wrong shape.
    """
    kinds = [kind for kind, own in _KINDS.items() if not parts.keys().isdisjoint(own)]
    biases = [part for part in _BIASES if part in parts]
    if len(kinds) > 1 or len(biases) > 1:
        raise StarmergeError(
            f"{file.source} holds several changes of {module}: {' and '.join(kinds or biases)}. "
            "Save each of them as an adapter of its own."
        )
    kind = kinds[0] if kinds else None
    known = {*(_KINDS[kind] if kind else ()), *biases}
    if kind in _SCALED:
        known |= {"alpha", "dora_scale", "magnitude"}
    for part in parts.keys() - known:
        raise _incomplete(file, module, parts[part])
    if kind is not None:
        change = _change(file, module, kind, parts, scale)
        yield Update(module, change, magnitude=_magnitude(file, parts))
    for part in biases:
        yield Update(module, _difference(file, parts[part]), parameter="bias")


def _change(
    file: AdapterFile, module: str, kind: str, parts: Mapping[str, str], scale: Scale | None
) -> Change:
    if kind not in _SCALED:
        return _difference(file, parts["diff" if "diff" in parts else "w_norm"])
    reader = _Reader(file, module, parts, scale)
    return {"LoRA": reader.lora, "LoHa": reader.loha, "LoKr": reader.lokr}[kind]()


def _difference(file: AdapterFile, key: str) -> Difference:
    return Difference(key, file.checkpoint[key].shape)


def _magnitude(file: AdapterFile, parts: Mapping[str, str]) -> Magnitude | None:
    """Return DoRA's magnitudes: PEFT's belong to outputs, others have the shape of the norms.

    Raises:
        StarmergeError: There are two, or one does not have the shape of norms.
    """
    if "magnitude" in parts and "dora_scale" in parts:
        raise StarmergeError(
            f"{file.source} holds {parts['magnitude']} and {parts['dora_scale']}, both DoRA's "
            "magnitudes. Remove one."
        )
    if "magnitude" in parts:
        return Magnitude(parts["magnitude"])
    if "dora_scale" not in parts:
        return None
    key = parts["dora_scale"]
    info = file.checkpoint[key]
    for axis, length in enumerate(info.shape[:2]):
        if length == info.size:
            return Magnitude(key, axis, _EPSILON)
    raise StarmergeError(
        f"{file.source}: {key} has the shape {list(info.shape)}, and norms have [out, 1, …] or "
        "[1, in, …]. Is the file damaged?"
    )


def _incomplete(file: AdapterFile, module: str, key: str) -> StarmergeError:
    return StarmergeError(
        f"{file.source}: {key} stands alone: the parts of {module} that it belongs to are missing. "
        "Is the file complete?"
    )


class _Reader:
    """Reads one module's parts.

    Args:
        file: The adapter.
        module: The module's name.
        parts: The keys by the part.
        scale: The scales of the header.
    """

    def __init__(
        self, file: AdapterFile, module: str, parts: Mapping[str, str], scale: Scale | None
    ) -> None:
        self._file, self._module, self._parts, self._header_scale = file, module, parts, scale

    def lora(self) -> Product | Tucker:
        """LoRA, and LoCon with a core; alpha is divided by the rank of A."""
        up, down = self._shape("up"), self._shape("down")
        fits = len(up) == len(down) > 1 and math.prod(up[2:]) == 1 and up[1] > 0 < down[0]
        if "mid" not in self._parts:
            self._check(fits and up[1] == down[0], "up", "down")
            shape = (up[0], *down[1:])
            a, b = self._parts["down"], self._parts["up"]
            return Product(a, b, self._scale(down[0]), shape, down[0])
        mid = self._shape("mid")
        fits &= len(mid) == len(down) and math.prod(down[2:]) == 1
        self._check(fits and mid[:2] == (up[1], down[0]), "up", "mid", "down")
        b, core, a = (self._parts[part] for part in ("up", "mid", "down"))
        shape = (up[0], down[1], *mid[2:])
        return Tucker(b, core, a, self._scale(down[0]), shape, up[1])

    def loha(self) -> Hadamard:
        """LoHa, with or without cores."""
        has_cores = "hada_t1" in self._parts or "hada_t2" in self._parts
        halves, shapes, ranks = [], [], []
        for number in (1, 2):
            core = f"hada_t{number}" if has_cores else None
            half, shape = self._half(f"hada_w{number}_a", f"hada_w{number}_b", core)
            halves.append(half)
            shapes.append(shape)
            ranks.append(half.rank)
        parts = [f"hada_w{number}_{side}" for number in (1, 2) for side in "ab"]
        self._check(shapes[0] == shapes[1] and ranks[0] == ranks[1], *parts)
        return Hadamard(halves[0], halves[1], self._scale(ranks[0]), shapes[0])

    def lokr(self) -> Kronecker:
        """LoKr; if both matrices are stored whole, alpha has no effect."""
        sides: list[tuple[FactoredMatrix | StoredMatrix, tuple[int, ...]]] = []
        for name in ("lokr_w1", "lokr_w2"):
            a, b = f"{name}_a", f"{name}_b"
            if name in self._parts:
                self._refuse(a, b, *(("lokr_t2",) if name == "lokr_w2" else ()), beside=name)
                whole = self._shape(name)
                self._check(len(whole) > 1 and 0 not in whole, name)
                sides.append((StoredMatrix(self._parts[name]), whole))
            else:
                has_core = name == "lokr_w2" and "lokr_t2" in self._parts
                sides.append(self._half(a, b, "lokr_t2" if has_core else None))
        (first, one), (second, two) = sides
        self._check(len(one) == 2, "lokr_w1" if "lokr_w1" in self._parts else "lokr_w1_a")
        ranks = {part.rank for part in (first, second) if isinstance(part, FactoredMatrix)}
        if len(ranks) > 1:
            self._check(False, "lokr_w1_b", "lokr_w2_b")
        shape = (one[0] * two[0], one[1] * two[1], *two[2:])
        sizes = (one[0], one[1]), (two[0], math.prod(two[1:]))
        scale = self._scale(ranks.pop()) if ranks else 1.0
        return Kronecker(first, second, scale, shape, sizes)

    def _half(self, a: str, b: str, core: str | None) -> tuple[FactoredMatrix, tuple[int, ...]]:
        """Return P·Q and its shape: (out, in·k), or (out, in, …) with a core."""
        p, q = self._shape(a), self._shape(b)
        if core is None:
            self._check(len(p) == len(q) == 2 and p[1] == q[0] > 0, a, b)
            return FactoredMatrix(self._parts[a], self._parts[b], None, p[1]), (p[0], q[1])
        t = self._shape(core)
        fits = len(p) == len(q) == 2 and len(t) > 2 and t[:2] == (p[0], q[0]) and p[0] == q[0] > 0
        self._check(fits, a, core, b)
        return FactoredMatrix(self._parts[a], self._parts[b], self._parts[core], p[0]), (
            p[1],
            q[1],
            *t[2:],
        )

    def _scale(self, rank: int) -> float:
        """Return alpha/r.

        Raises:
            StarmergeError: Alpha is not a number, or zero; or file and header disagree.
        """
        declared = None if self._header_scale is None else self._header_scale(self._module, rank)
        if "alpha" not in self._parts:
            return 1.0 if declared is None else declared
        key = self._parts["alpha"]
        alpha = self._file.number(key)
        if alpha == 0:
            raise StarmergeError(
                f"{self._file.source}: {key} is 0, which kohya's scripts and LyCORIS take for the "
                "rank, and others for no change at all. Write the rank there, or remove the module."
            )
        if declared is not None and not math.isclose(declared, alpha / rank, rel_tol=1e-6):
            raise StarmergeError(
                f"{self._file.source}: {key} makes the scale {alpha / rank:g}, and the header "
                f"{declared:g}. Which of them counts cannot be told; remove one."
            )
        return alpha / rank

    def _shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a part.

        Raises:
            StarmergeError: It is missing.
        """
        if part not in self._parts:
            ending = next(ending for ending, known in PARTS.items() if known == part)
            raise StarmergeError(
                f"{self._file.source}: {self._module} has {next(iter(self._parts.values()))} but "
                f"no {ending}. Is the file complete?"
            )
        return self._file.checkpoint[self._parts[part]].shape

    def _refuse(self, *parts: str, beside: str) -> None:
        for part in parts:
            if part in self._parts:
                raise StarmergeError(
                    f"{self._file.source} holds {self._parts[beside]} and {self._parts[part]}: the "
                    "matrix whole, and a factor of it. Remove one."
                )

    def _check(self, fits: bool, *parts: str) -> None:
        """Refuse parts that do not fit together."""
        if not fits:
            shapes = ", ".join(
                f"{self._parts[part]} {list(self._file.checkpoint[self._parts[part]].shape)}"
                for part in parts
            )
            raise StarmergeError(
                f"{self._file.source}: the factors of {self._module} do not fit together: {shapes}."
            )
