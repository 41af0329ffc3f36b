"""The vLLM backend of the scorers, for many prompts at once on a GPU.

vLLM makes its own batches, and computes a common prefix of prompts once (prefix caching). In
ranking it cannot use prefix caching: every continuation is read together with its whole prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.models.loading import Dtype, dtype_name
from starmerge_models.evaluation.models.scorers import Advance, Backend
from starmerge_models.reading import read_json

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for ``max_lora_rank``."""


@dataclass(frozen=True)
class VllmModel:
    """A model in vLLM, with or without an adapter; made by :func:`load_vllm`.

    Args:
        engine: A ``vllm.LLM``.
        tokenizer: The model's tokenizer, from transformers.
        adapter: A ``vllm.lora.request.LoRARequest``, or None.
    """

    engine: Any
    tokenizer: Any
    adapter: Any = None

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        longest: int = self.engine.llm_engine.model_config.max_model_len
        return longest - 1  # vLLM always generates at least one token

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts go to an encoder."""
        return False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        is_final: Callable[[str], bool],
        batch_size: int | None,
        advance: Advance,
    ) -> list[str]:
        """Return the greedy continuation of each prompt, without special tokens.

        Args:
            prompts: Token ids.
            max_new_tokens: Most tokens of a response.
            is_final: Returns whether a response may be cut off after a text.
            batch_size: Ignored.
            advance: Called with the number of prompts when all are done.

        Raises:
            StarmergeError: vLLM fails, for example on an unsupported kind of adapter.
        """
        outputs = self._ask(prompts, max_tokens=max_new_tokens)
        advance(len(prompts))
        return [
            text_of(self.tokenizer, answer.outputs[0].token_ids, is_final) for answer in outputs
        ]

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[Sequence[int]]],
        *,
        batch_size: int | None,
        advance: Advance,
    ) -> list[list[float]]:
        """Return the log-probability of each continuation of each prompt.

        Args:
            prompts: Token ids.
            continuations: For each prompt, the token ids of its continuations.
            batch_size: Ignored.
            advance: Called with the number of prompts when all are done.

        Returns:
            In nats, summed over the tokens of a continuation; 0 for an empty continuation.

        Raises:
            StarmergeError: A prompt is empty, vLLM fails, or a log-probability is not finite.
        """
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise StarmergeError(f"Prompt {row} has no tokens. A prompt needs at least one.")
        texts = [
            [*prompt, *tokens]
            for prompt, own in zip(prompts, continuations, strict=True)
            for tokens in own
        ]
        outputs = iter(self._ask(texts, max_tokens=1, prompt_logprobs=1))
        totals = [
            [log_likelihood(next(outputs).prompt_logprobs, len(prompt), tokens) for tokens in own]
            for prompt, own in zip(prompts, continuations, strict=True)
        ]
        for row, own_totals in enumerate(totals):
            if not all(map(math.isfinite, own_totals)):
                raise StarmergeError(
                    f"The model gives log-probabilities that are not finite for prompt {row}. Look "
                    "for NaN in its weights, or load it in a wider dtype."
                )
        advance(len(prompts))
        return totals

    def _ask(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Any]:
        """Return vLLM's ``RequestOutput`` of each prompt."""
        from vllm import SamplingParams, TokensPrompt  # noqa: PLC0415

        try:
            outputs: list[Any] = self.engine.generate(
                [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
                SamplingParams(temperature=0, detokenize=False, **options),
                lora_request=self.adapter,
                use_tqdm=False,
            )
        except Exception as error:  # whatever vLLM, its processes and CUDA raise
            adapter = f" with {self.adapter.lora_path}" if self.adapter else ""
            raise StarmergeError(f"vLLM failed{adapter}: {_reason(error)}") from error
        return outputs


def load_vllm(
    path: Path, adapters: Mapping[str, Path], *, dtype: Dtype = "auto"
) -> dict[str | None, Backend]:
    """Load a causal model into vLLM.

    The context is the model's own, or as long as the memory of the GPU allows. The memory is freed
    when the last reference to the returned models is gone.

    Args:
        path: Folder of a whole model.
        adapters: LoRA adapters by name; they share the model's weights.
        dtype: "auto" is the stored one.

    Returns:
        The model with each adapter by the adapter's name, and without adapter under None.

    Raises:
        UsageError: There is no GPU, vLLM is not installed, or it does not support the model.
    """
    check_vllm()
    from transformers import AutoTokenizer  # noqa: PLC0415  (comes with vllm)
    from vllm import LLM  # noqa: PLC0415
    from vllm.lora.request import LoRARequest  # noqa: PLC0415

    lora = {"enable_lora": True, "max_lora_rank": required_lora_rank(adapters)} if adapters else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        engine = LLM(
            model=str(path),
            dtype=dtype_name(path, dtype, "cuda"),
            max_model_len=-1,  # the model's own, or as much as fits in memory
            enable_prefix_caching=True,
            seed=0,
            **lora,
        )
    except StarmergeError:
        raise
    except Exception as error:  # whatever vLLM, its processes and CUDA raise
        raise UsageError(f"vLLM cannot load {path}: {_reason(error)}") from error
    models: dict[str | None, Backend] = {None: VllmModel(engine, tokenizer)}
    for number, (name, folder) in enumerate(adapters.items(), start=1):
        models[name] = VllmModel(engine, tokenizer, LoRARequest(name, number, str(folder)))
    return models


def check_vllm() -> None:
    """Make sure that vLLM is usable.

    Raises:
        UsageError: There is no GPU, or vLLM is not installed.
    """
    if not torch.cuda.is_available():
        raise UsageError(
            "The backend vllm needs a GPU, and torch finds none. Do without --backend."
        )
    try:
        import vllm  # noqa: F401, PLC0415
    except ImportError as error:
        raise UsageError(
            f"The backend vllm needs the package vllm ({error}). Install it: "
            "pip install 'starmerge-models[vllm]'."
        ) from error


def required_lora_rank(adapters: Mapping[str, Path]) -> int:
    """Return the smallest of :data:`RANKS` that is at least the adapters' rank.

    Raises:
        StarmergeError: A folder has no readable adapter_config.json.
        UsageError: The rank of an adapter is above all of :data:`RANKS`.
    """
    room = RANKS[0]
    for folder in adapters.values():
        config = read_json(folder / "adapter_config.json")
        rank = max(config.get("r", 0), *(config.get("rank_pattern") or {0: 0}).values())
        fits = [most for most in RANKS if rank <= most]
        if not fits:
            raise UsageError(
                f"{folder} has rank {rank}, and vLLM takes {RANKS[-1]} at most. Do without "
                "--backend, or merge the adapter into its base."
            )
        room = max(room, fits[0])
    return room


def text_of(tokenizer: Any, tokens: Sequence[int], is_final: Callable[[str], bool]) -> str:
    """Return the text of a response, cut off where ``is_final`` first returns True.

    Args:
        tokenizer: The model's tokenizer.
        tokens: The token ids of the response.
        is_final: Returns whether a response may be cut off after a text.
    """
    text = ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(
            tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # The decoder returns U+FFFD for the bytes of an incomplete character.
        if not text.endswith("\ufffd") and is_final(text):
            break
    return text


def log_likelihood(
    steps: Sequence[Mapping[int, Any] | None], start: int, tokens: Sequence[int]
) -> float:
    """Return the log-probability of the last tokens of a text, in nats.

    Args:
        steps: vLLM's ``prompt_logprobs``: for each token of the text, ``Logprob`` objects by token
            id, including the token's own; None for the first token.
        start: Index of the first of the last tokens.
        tokens: The ids of the last tokens.
    """
    rest = zip(tokens, steps[start:], strict=True)
    return math.fsum(step[token].logprob for token, step in rest if step is not None)


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
