"""A precision that the model was not trained in is warned about."""

from itertools import product

import torch

from models.configs import precision_warning


def test_only_fp16_for_a_bfloat16_model_is_warned_about_with_a_fix():
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    warnings = {pair: precision_warning(*pair) for pair in product(dtypes, dtypes)}
    warning = warnings.pop((torch.float16, torch.bfloat16))
    assert "black videos" in warning
    assert warning.endswith("use --mixed_precision bf16")
    assert set(warnings.values()) == {None}
