"""The loop leaves nothing behind that a process would wait for at its end."""

import multiprocessing

import pytest

from run.loop import train
from tiny_runs import SIZE, set_up_run


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_the_data_workers_end_with_the_last_step(tiny_models, prepared_demo, tmp_path):
    data = prepared_demo(*SIZE, "--max_samples", "2", "--save_image_latents")
    flags = ("--max_train_steps", "1", "--dataloader_num_workers", "1", "--rank", "4")
    run = set_up_run("text-to-video", tiny_models("5b"), data, tmp_path / "out", *flags)
    assert train(run) == 1
    assert [child.name for child in multiprocessing.active_children() if "SpawnPool" not in child.name] == []
