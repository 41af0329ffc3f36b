"""Helper of the formats: it consumes the stored tensors of quantised weights one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from starmerge_models.checkpoints.experts import name_in_file, stack_of
from starmerge_models.checkpoints.tensors import Checkpoint, Computation, Derived, TensorInfo
from starmerge_models.errors import StarmergeError, UsageError

SCALES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of scales."""


@dataclass
class Entries:
    """A checkpoint of quantised weights, with a record of the consumed tensors.

    Args:
        checkpoint: The stored tensors.
        settings: ``quantization_config`` of the model's config.
        where: The model, for error messages.
    """

    checkpoint: Checkpoint
    settings: Mapping[str, Any]
    where: str
    _made: dict[str, TensorInfo] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def named(self, suffix: str) -> Iterator[str]:
        """Yield the prefixes of names with a suffix: "a" for "a.qweight" and ".qweight"."""
        for name in self.checkpoint:
            if name.endswith(suffix):
                yield name.removesuffix(suffix)

    def find(self, name: str) -> TensorInfo | None:
        """Consume and return a tensor; None if it does not exist."""
        joined = stack_of(name)
        if name not in self.checkpoint and joined and joined[0] in self.checkpoint:
            # One number, or a row of numbers, for each of the experts.
            self._taken.add(joined[0])
            return self.checkpoint[joined[0]].item(name, joined[1])
        if name not in self.checkpoint:
            return None
        self._taken.add(name)
        return self.checkpoint[name]

    def take(
        self,
        name: str,
        dtypes: Iterable[torch.dtype],
        shape: tuple[int, ...] | None = None,
        *,
        of: str,
    ) -> TensorInfo:
        """Consume and return a required tensor of a weight.

        Args:
            name: The tensor.
            dtypes: Allowed dtypes.
            shape: Required shape.
            of: The weight, for error messages.

        Raises:
            StarmergeError: It is missing, or has another shape or dtype.
        """
        info = self.find(name)
        if info is None:
            self.fail(of, f"the tensor {name}, which belongs to it, is missing")
        if info.dtype not in dtypes:
            self.fail(of, f"{name} is stored in {info.dtype}")
        if shape is not None and info.shape != shape:
            self.fail(of, f"{name} has the shape {list(info.shape)} in place of {list(shape)}")
        return info

    def ignore(self, *suffixes: str) -> None:
        """Consume all tensors with a suffix that no weight depends on."""
        self._taken.update(n for n in self.checkpoint if name_in_file(n).endswith(suffixes))

    def make(
        self,
        first: str,
        name: str,
        shape: tuple[int, ...],
        parts: Iterable[Any],
        computation: Computation,
    ) -> None:
        """Add a computed float32 weight in place of the tensors from which it is computed.

        Args:
            first: The stored tensor whose position in the checkpoint the weight gets.
            name: The weight's name.
            shape: The weight's shape.
            parts: The tensors from which it is computed.
            computation: The function of these tensors.
        """
        if name != first and name in self.checkpoint:
            self.fail(name, f"it is stored twice, as {name} and as {first}")
        own = tuple(parts)
        self._made[first] = Derived(name, torch.float32, shape, own[0].file, own, computation)

    def result(self, *suffixes: str) -> Checkpoint:
        """Return the checkpoint with computed weights in place of the consumed tensors.

        Args:
            suffixes: Suffixes of names that only tensors of quantised weights have.

        Raises:
            StarmergeError: A tensor with such a name was not consumed, or there is no quantised
                weight.
        """
        for name in self.checkpoint:
            if name not in self._taken and name_in_file(name).endswith(suffixes):
                self.fail(name, "it belongs to no quantised weight that is there")
        if not self._made:
            raise StarmergeError(
                f"{self.where}: its config says that it is quantised, and none of its tensors is. "
                "Remove 'quantization_config' from config.json if the weights are plain."
            )
        return self.checkpoint.viewed(
            self._made.get(name) or info
            for name, info in self.checkpoint.items()
            if name in self._made or name not in self._taken
        )

    def setting(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a setting of the format.

        Raises:
            StarmergeError: It is missing and has no default, or has another type.
        """
        value = self.settings.get(key)
        value = default if value is None else value
        if value is None:
            raise StarmergeError(f"{self.where}: quantization_config of its config has no '{key}'.")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise StarmergeError(
                f"{self.where}: {key} of quantization_config is {value!r:.100}, and must be of the "
                f"type {kind.__name__}."
            )
        return value

    def fail(self, weight: str, reason: str) -> NoReturn:
        """Refuse the checkpoint because of one of its weights."""
        raise StarmergeError(
            f"{self.where}: the quantised weight {weight} cannot be read: {reason}. Are its files "
            "complete, and of the format that its config names?"
        )

    def refuse(self, reason: str) -> NoReturn:
        """Refuse the checkpoint because of its format."""
        raise UsageError(f"{self.where} is quantised in a computation that is not read: {reason}.")
