"""The differences of full fine-tunes from their base."""

import pytest
import torch

from starmerge_models.checkpoints.finetuned import difference
from tests.oracles import samples

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("tuned", DTYPES)
@pytest.mark.parametrize("base", DTYPES)
def test_a_difference_is_exact_to_float32(tuned, base):
    W_0 = samples.normal(9, 7, seed=0, dtype=base)
    W_1 = samples.normal(9, 7, seed=1, dtype=tuned)
    expected = W_1.double() - W_0.double()
    found = difference(W_1.clone(), W_0)
    wide = torch.float64 if torch.float64 in (tuned, base) else torch.float32
    assert found.tensor.dtype == wide
    torch.testing.assert_close(
        found.tensor.double(), expected, rtol=torch.finfo(wide).eps, atol=0.0
    )
    assert found.stored == tuned


@pytest.mark.parametrize(
    ("values", "file", "grid"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float32),
    ],
)
def test_what_a_fine_tune_was_rounded_to_is_seen_in_a_wider_file(values, file, grid):
    W_0 = samples.normal(9, 7, seed=0)
    W_1 = samples.normal(9, 7, seed=1, dtype=values).to(file)
    assert difference(W_1.clone(), W_0).stored == grid


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_tensor_of_which_only_the_dtype_changed_has_no_difference(narrow):
    W_0 = samples.normal(9, 7, seed=0)
    assert not difference(W_0.to(narrow), W_0).tensor.any()
    assert difference(W_0.to(narrow) * 2, W_0).tensor.all()
