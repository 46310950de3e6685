"""Out of memory is said in a few lines, with what to change; other errors stay what they are."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.failures import explained_failures, memory_that_ran_out


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3.12 GiB is "
    "free. Process 1 has 75.98 GiB memory in use. Of the allocated memory 70 GiB is allocated by PyTorch."
)


def explained(error: Exception) -> list[str]:
    """The lines that an error becomes."""
    with pytest.raises(UserError) as caught, explained_failures(lambda: ["--offload_checkpoints: 5 GB less"]):
        raise error
    return str(caught.value).splitlines()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_SAYS), RuntimeError("CUDA error: out of memory")])
def test_a_full_gpu_is_told_with_what_to_change(error):
    title, advice = explained(error)
    assert title.startswith(f"out of GPU memory ({type(error).__name__}: CUDA ")
    assert "Of the allocated memory" not in title
    assert advice.strip() == "--offload_checkpoints: 5 GB less"


@pytest.mark.parametrize(
    "allocate", [lambda: np.empty(2**60, np.uint8), lambda: torch.empty(2**55, dtype=torch.uint8)]
)
def test_a_full_host_is_told_with_other_advice(allocate):
    with pytest.raises(UserError) as caught, explained_failures(list):
        allocate()
    (line,) = str(caught.value).splitlines()
    assert line.startswith("out of host memory (")
    assert "--dataloader_num_workers" in line


def test_a_script_with_other_flags_has_advice_of_its_own():
    with pytest.raises(UserError, match=r"; fewer --num_frames$"), explained_failures(list, "fewer --num_frames"):
        np.empty(2**60, np.uint8)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), KeyError("a bug"), UserError("--rank: 0")])
def test_other_errors_stay_what_they_are(error):
    assert memory_that_ran_out(error) is None
    with pytest.raises(type(error)) as caught, explained_failures(list):
        raise error
    assert caught.value is error


@pytest.mark.gpu
def test_a_gpu_that_is_really_full_is_told():
    with pytest.raises(UserError, match=r"^out of GPU memory "), explained_failures(list):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
