"""The prepared data whose growth is measured is read as preparation's own."""

import growth
import torch

from prepared.folder import read_tensor
from prepared.read_index import read_index


def test_samples_in_files_with_holes_are_read(tmp_path):
    growth.write_folder(tmp_path, 120)
    index = read_index(tmp_path)
    assert len(index) == 120
    last = index[-1]
    assert torch.equal(read_tensor(last.video_latents), torch.zeros(32, 3, 8, 12, dtype=torch.bfloat16))
    assert read_tensor(last.prompt_embeds).shape == (226, 64)
    assert len({clip.video_latents.file for clip in index}) == 2
    found = growth.measure(tmp_path)
    assert found.keys() == set(growth.ROWS[1:])
    assert min(found["start, s"], found["samples loaded a second"]) > 0
