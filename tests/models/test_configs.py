"""A precision that the model was not trained in is warned about."""

import pytest
import torch

from models.configs import precision_warning


def test_fp16_for_a_bfloat16_model_is_warned_about_with_a_fix():
    warning = precision_warning(torch.float16, torch.bfloat16)
    assert "black videos" in warning
    assert warning.endswith("use --mixed_precision bf16")


@pytest.mark.parametrize(
    ("compute_dtype", "native_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_other_precisions_are_fine(compute_dtype, native_dtype):
    assert precision_warning(compute_dtype, native_dtype) is None
