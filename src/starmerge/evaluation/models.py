"""Loading what is evaluated: a base, adapters on it by PEFT, whole models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starmerge.errors import UsageError


def load_model(path: Path, **options: Any) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in the dtype it is stored in.

    The model goes to the GPU if there is one. The input of its head is made contiguous: a slice of
    the hidden states otherwise takes a copying path on CPUs that doubles the time of a prefill.

    Raises:
        UsageError: transformers is not installed, or the folder is not a causal language model.
    """
    try:
        from transformers import (  # noqa: PLC0415
            AutoModelForCausalLM,
            AutoTokenizer,
            GenerationConfig,
        )
        from transformers.utils import logging  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            "Evaluating and training need transformers and PEFT: install starmerge with its extra "
            "'eval'."
        ) from error
    logging.disable_progress_bar()
    if (path / "adapter_config.json").is_file():
        raise UsageError(f"{path} is an adapter. The base must be a whole model.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", **options)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path} is not a causal language model: {reason}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    # Greedy means greedy: no beams, penalties or samples that the model's own config asks for.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    model.get_output_embeddings().register_forward_pre_hook(_contiguous_input)
    return model, tokenizer


class AdapterSwitch:
    """A base model with several adapters, one or none of them active at a time.

    PEFT puts the adapters beside the base's weights, which stay as they are and are shared.

    Args:
        model: The base, loaded.
        adapters: Adapter folders by name.

    Raises:
        UsageError: An adapter does not fit the base.
    """

    def __init__(self, model: Any, adapters: Mapping[str, Path]) -> None:
        from peft import PeftModel  # noqa: PLC0415  (comes with transformers)

        self._slots = {name: f"adapter{number}" for number, name in enumerate(adapters)}
        self._model = model
        for name, path in adapters.items():
            slot = self._slots[name]
            try:
                if isinstance(self._model, PeftModel):
                    self._model.load_adapter(path, adapter_name=slot)
                else:
                    self._model = PeftModel.from_pretrained(model, path, adapter_name=slot)
            except Exception as error:  # whatever PEFT, transformers and safetensors raise
                reason = " ".join(str(error).split("\n\t")[:2])
                raise UsageError(f"PEFT cannot apply {path} to the base: {reason}") from error
        self._model.eval()

    @contextmanager
    def active(self, adapter: str | None) -> Iterator[Any]:
        """Yield the model with one adapter switched on, or, for None, the plain base."""
        if not self._slots:
            yield self._model
        elif adapter is None:
            with self._model.disable_adapter():
                yield self._model
        else:
            self._model.set_adapter(self._slots[adapter])
            yield self._model


def _contiguous_input(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
