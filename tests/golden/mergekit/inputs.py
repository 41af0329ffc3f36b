"""The tiny Llama and its three fine-tunes that the golden merges were made from.

Nothing is stored: every value is a sum of integers from a Philox counter, scaled by a power of two,
so it is the same on every machine and with every version of NumPy. In float32 the fine-tunes minus
the base are exact. The fine-tunes are made to meet the corners of the methods:

- `model.norm.weight` is frozen in all of them;
- `model.layers.0.self_attn.k_proj.weight` is frozen in `c`;
- the deltas of `model.layers.2.mlp.down_proj.weight` are 32 times smaller than the others', those
  of `model.layers.2.input_layernorm.weight` 1024 times: they vanish in bfloat16;
- in every other matrix, at each seventh entry (in row-major order, from 0) `b` has no delta and `c`
  has the one of `a` with the other sign: equal weights make these sums exactly 0 in float32.
"""

from __future__ import annotations

import numpy as np
import torch

MODELS = ("base", "a", "b", "c")
"""Names of the models' folders in the recipes: the base and its fine-tunes."""

DTYPES = (torch.float32, torch.bfloat16)
"""What the models are stored in."""

LAYERS = 3

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""`config.json` of all four models, without the dtype."""

_BASE_STEP = 2.0**-21
_DELTA_STEP = 2.0**-23
_FROZEN = {
    "model.norm.weight": ("a", "b", "c"),
    "model.layers.0.self_attn.k_proj.weight": ("c",),
}
_SHIFTS = {
    "model.layers.2.mlp.down_proj.weight": 5,
    "model.layers.2.input_layernorm.weight": 10,
}
_STRIDE = 7


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, in the order of the model."""
    hidden, inner, vocab = 16, 24, 32
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        named |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{prefix}.self_attn.v_proj.weight": (hidden // 2, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    return named | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _bell(model: int, tensor: int, count: int) -> np.ndarray:
    """Return `count` int64 sums of four 16-bit numbers, about normal, of mean 0."""
    words = np.random.Philox(key=1000 * model + tensor).random_raw(count)
    return words.view(np.uint16).reshape(count, 4).sum(axis=1, dtype=np.int64) - 2 * 65535


def _base(shape: tuple[int, ...], index: int) -> np.ndarray:
    noise = _bell(0, index, int(np.prod(shape))) * _BASE_STEP
    return noise + (1.0 if len(shape) == 1 else 0.0)


def _delta(model: str, name: str, shape: tuple[int, ...], index: int) -> np.ndarray:
    count = int(np.prod(shape))
    if model in _FROZEN.get(name, ()):
        return np.zeros(count)
    steps = _bell(MODELS.index(model), index, count)
    if model == "b":
        steps >>= 1
    if len(shape) == 2 and name not in _FROZEN:
        if model == "b":
            steps[::_STRIDE] = 0
        if model == "c":
            steps[::_STRIDE] = -_bell(MODELS.index("a"), index, count)[::_STRIDE]
    shift = _SHIFTS.get(name, 0)
    return np.sign(steps) * (np.abs(steps) >> shift) * _DELTA_STEP


def model_tensors(model: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of one of `MODELS`, rounded to the dtype, by name."""
    tensors = {}
    for index, (name, shape) in enumerate(shapes().items()):
        values = _base(shape, index)
        if model != "base":
            values = values + _delta(model, name, shape, index)
        tensors[name] = torch.from_numpy(values.reshape(shape)).to(dtype)
    return tensors
