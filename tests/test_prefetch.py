from dataclasses import replace

import pytest
import torch

from data.buckets import Bucket
from dataset import Batch, DeviceCopies


def make_batch(number: int, channels: int = 32) -> Batch:
    moments = torch.full((1, channels, 13, 60, 90), float(number))
    return Batch([str(number)], Bucket(49, 480, 720), video_moments=moments, prompt_embeds=moments[0, 0])


def test_on_a_cpu_batches_pass_through():
    batch = make_batch(1, channels=2)
    moved = DeviceCopies(torch.device("cpu"))(batch)
    assert replace(moved, video_moments=None, prompt_embeds=None) == replace(
        batch, video_moments=None, prompt_embeds=None
    )
    assert torch.equal(moved.video_moments, batch.video_moments)
    assert torch.equal(moved.prompt_embeds, batch.prompt_embeds)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_no_batch_is_overwritten_while_it_is_used(pinned):
    device = torch.device("cuda")
    copy, load = DeviceCopies(device), torch.randn(4096, 4096, device=device)
    sums = []
    for number in range(30):
        batch = make_batch(number)
        moved = copy(batch.pin_memory() if pinned else batch)
        for _ in range(20):  # the GPU falls behind the CPU
            load = load @ load * 1e-3
        sums.append(moved.video_moments.mean() + moved.prompt_embeds.mean())
        del moved
    assert torch.stack(sums).tolist() == pytest.approx([2.0 * number for number in range(30)])
