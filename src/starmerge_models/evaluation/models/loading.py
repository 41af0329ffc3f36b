"""Loads models: a base, adapters on it by PEFT, whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from starmerge_models.checkpoints.base import read_config
from starmerge_models.checkpoints.opening import open_checkpoint
from starmerge_models.errors import UsageError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load_model(
    path: Path, *, device: str | None = None, dtype: Dtype = "auto", **options: Any
) -> tuple[Any, Any]:
    """Load a language model, causal or encoder-decoder, and its tokenizer.

    Its generation config is set to greedy decoding. A hook makes the input of the head contiguous:
    with a slice of the hidden states, CPU kernels copy, which doubles the time of a prefill.

    Args:
        path: Folder of a whole model.
        device: "cpu", "cuda", "cuda:1", ...; None: the GPU if there is one.
        dtype: "auto" is the stored one, but float32 if the device would only emulate it.
        options: More arguments of ``from_pretrained``.

    Raises:
        UsageError: transformers is not installed, the folder is not a language model, is broken or
            needs remote code, or there is no such device.
    """
    model, tokenizer = _load(path, _generative, device=device, dtype=dtype, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = _greedy(model, tokenizer)
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_contiguous_input)
    return model, tokenizer


def load_text_model(
    path: Path, *, device: str | None = None, dtype: Dtype = "auto"
) -> tuple[Any, Any]:
    """Load a text model of any kind, and its tokenizer.

    Generative models are loaded by :func:`load_model`; encoders and classifiers with the class
    that their config names.

    Args:
        path: Folder of a whole model.
        device: "cpu", "cuda", "cuda:1", ...; None: the GPU if there is one.
        dtype: "auto" is the stored one, but float32 if the device would only emulate it.

    Raises:
        UsageError: transformers is not installed, the folder is not a text model, is broken or
            needs remote code, or there is no such device.
    """
    config = read_config(path)
    named = (config.get("architectures") or [None])[0]
    if "vocab_size" not in (config.get("text_config") or config) and "image_size" in config:
        raise UsageError(f"{path} ({named}) is a model of images, and a model of text is wanted.")
    if named in _generative_classes() or not hasattr(_transformers(), str(named)):
        return load_model(path, device=device, dtype=dtype)
    return _load(path, lambda _: getattr(_transformers(), named), device=device, dtype=dtype)


def _transformers() -> Any:
    """Import transformers lazily.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import transformers  # noqa: PLC0415  (slow to import)
    except ImportError as error:
        raise UsageError(
            "Evaluating and training need transformers and PEFT. Install them: "
            "pip install 'starmerge-models[eval]'."
        ) from error
    return transformers


def _generative(config: Any) -> Any:
    """Return the class that loads a language model."""
    transformers = _transformers()
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def _generative_classes() -> set[str]:
    """Return the class names of all generative models, as in configs."""
    _transformers()
    from transformers.models.auto import modeling_auto as auto  # noqa: PLC0415

    return {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    }


def _load(
    path: Path,
    class_of: Callable[[Any], Any],
    *,
    device: str | None,
    dtype: Dtype,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a model with the class that ``class_of`` chooses from its config, and its tokenizer.

    Raises:
        UsageError: As :func:`load_model`.
    """
    transformers = _transformers()
    transformers.utils.logging.disable_progress_bar()
    if (path / "adapter_config.json").is_file():
        raise UsageError(f"{path} is an adapter. The base must be a whole model.")
    place = device_of(device)
    try:
        number = getattr(torch, dtype_name(path, dtype, place.type))
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, report = class_of(config).from_pretrained(
            path, dtype=number, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # whatever transformers, tokenizers and safetensors raise
        reason = " ".join(str(error).split()[:60]) or type(error).__name__
        raise UsageError(f"{path} is not a language model, or is broken: {reason}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UsageError(
            f"{path} lacks the tensor {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ". Fetch it again, or save it anew: without them its answers would be random."
        )
    return model.to(place).eval(), tokenizer


def device_kind(device: str | None) -> str:
    """Return the kind of a device, such as "cuda" for "cuda:1"; None is the GPU if there is one."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device.partition(":")[0]


def device_name(device: str | None) -> str:
    """Return the name of a device: "cpu", or the name of the GPU."""
    kind = device_kind(device)
    return torch.cuda.get_device_name(device) if kind == "cuda" else kind


def dtype_name(path: Path, dtype: Dtype, device: str) -> str:
    """Return the dtype that a model is loaded in on a kind of device.

    "auto" is the dtype that its config names, or that of its first tensor; but float32 if the
    device only emulates this dtype.

    Raises:
        StarmergeError: The folder has no config, or neither a dtype in its config nor weights.
    """
    if dtype != "auto":
        return dtype
    config = read_config(path)
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None:
        checkpoint = open_checkpoint(path)
        dtypes = (checkpoint[name].dtype for name in checkpoint)
        named = str(next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32))
    stored = str(named).removeprefix("torch.")
    return stored if _computes_in(stored, device) else "float32"


def context_length(model: Any, tokenizer: Any) -> int | None:
    """Return how many tokens a model can read; None if config and tokenizer have no limit.

    The limit is the number of positions, or the tokenizer's limit if that is lower. A model with
    relative positions (T5) has no limit in its config.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer without a limit has model_max_length = 10³⁰.
    told = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    return min((length for length in (positions, told) if length), default=None)


class AdapterSwitch:
    """A base model with several adapters, at most one of them active at a time.

    PEFT adds the adapters as separate modules, so they share the unchanged weights of the base.

    Args:
        model: The loaded base.
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
            config = self._model.peft_config[slot]
            if config.is_prompt_learning:
                raise UsageError(
                    f"{path} is an adapter of the kind {config.peft_type.value}, which prepends "
                    "virtual tokens to a prompt. Only adapters that change weights are supported."
                )
        self._model.eval()

    @contextmanager
    def active(self, adapter: str | None) -> Iterator[Any]:
        """Activate one adapter, or none for None, and yield the model."""
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


def device_of(name: str | None) -> torch.device:
    """Return a device; None is the GPU if there is one.

    Raises:
        UsageError: There is no such device, or it is unusable.
    """
    try:
        return torch.empty(0, device=name or device_kind(None)).device
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).partition("\n")[0]
        raise UsageError(f"Device {name!r} cannot be used: {reason}") from error


def _computes_in(dtype: str, device: str) -> bool:
    """Return whether a kind of device computes in a dtype natively, without emulation."""
    if device == "cuda":
        return dtype != "bfloat16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu" or dtype not in ("bfloat16", "float16"):
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # torch uses oneDNN for matrix products in these dtypes if this check passes. Otherwise its own
    # kernels are many times slower than those of float32.
    if dtype == "bfloat16":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _greedy(model: Any, tokenizer: Any) -> Any:
    """Return a generation config with a model's special tokens, without beams or sampling."""
    from transformers import GenerationConfig  # noqa: PLC0415

    own, config = model.generation_config, model.config
    greedy = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if config.is_encoder_decoder:
        starts = (own.decoder_start_token_id, getattr(config, "decoder_start_token_id", None))
        start = next((token for token in (*starts, own.bos_token_id) if token is not None), None)
        if start is None:
            raise UsageError(
                f"{config.name_or_path} does not say which token its decoder starts with. Set "
                "decoder_start_token_id in its config.json (T5: 0)."
            )
        greedy.decoder_start_token_id = start
    return greedy
