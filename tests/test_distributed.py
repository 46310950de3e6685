"""Two processes on one machine, over gloo, launched as users launch them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import video
from prepared import read_index


TRAINING = Path(video.__file__).parent


def launch(script: str, *flags: str) -> str:
    """Run a script on two ranks; returns what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(TRAINING / script), *flags],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def prepared_by_two(tiny_models, demo_clips, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("prepared-by-two")
    flags = ["--model_id", str(tiny_models("5b")), "--data_root", str(demo_clips), "--output_dir", str(folder)]
    flags += ["--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "17", "--max_num_frames", "17"]
    return folder, launch("prepare_dataset.py", *flags, "--save_latents_and_embeddings")


def test_two_ranks_share_the_clips_and_prepare_all_of_them(prepared_by_two):
    folder, output = prepared_by_two
    assert "8/8" in output
    assert "16/16" not in output
    assert "prepared 16 samples" in output
    assert len(read_index(folder)) == 16


def test_two_ranks_train_validate_and_save_together(prepared_by_two, tiny_models, tmp_path):
    folder, _ = prepared_by_two
    flags = ["--pretrained_model_name_or_path", str(tiny_models("5b")), "--data_root", str(folder), "--load_tensors"]
    flags += ["--output_dir", str(tmp_path), "--height", "64", "--width", "96", "--frame_buckets", "17"]
    flags += ["--max_num_frames", "17", "--rank", "4", "--train_batch_size", "1", "--max_train_steps", "3"]
    flags += ["--gradient_accumulation_steps", "3", "--checkpointing_steps", "2", "--num_inference_steps", "1"]
    (tmp_path / "validation" / "step-3" / "01-00-b.mp4").mkdir(parents=True)  # in the way of the second rank
    output = launch("cogvideox_text_to_video_lora.py", *flags, "--validation_prompt", "a:::b:::c")
    assert "on 2 x cpu" in output
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    before, after = (tmp_path / "validation" / f"step-{step}" for step in (0, 3))
    names = ["00-00-a.mp4", "01-00-b.mp4", "02-00-c.mp4", "contact_sheet.png"]
    assert sorted(path.name for path in before.iterdir() if path.is_file()) == names
    # A rank that fails keeps no other waiting, nor does it end the run.
    assert sorted(path.name for path in after.iterdir() if path.is_file()) == [names[0], *names[2:]]
    assert "warning: validation at step 3 failed, training goes on; rank 1: " in output
