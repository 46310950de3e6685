"""A preparation that is killed at any moment and started again ends with the bytes of an uninterrupted one."""

import random
import re
import signal
import time
from pathlib import Path

import pytest

from common.errors import AGAIN
from forked_ranks import Stop, finish, start
from preparation.report import REPORT_FILE


NUM_KILLS = 10
SCRIPT = "prepare_dataset"


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files but the report, which shows the command with its folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != REPORT_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def flags(tiny_models, demo_clips) -> list[str]:
    """Ten clips in batches of two, three samples to a shard."""
    flags = ["--model_id", str(tiny_models("5b")), "--data_root", str(demo_clips), "--save_latents_and_embeddings"]
    flags += ["--height_buckets", "96", "--width_buckets", "160", "--frame_buckets", "17", "--max_num_frames", "17"]
    # 3 samples of 2 * 16 channels x 5 frames x 12 x 20 in float32 fill about half a megabyte.
    flags += ["--max_samples", "10", "--batch_size", "2", "--shard_size_mb", "1"]
    return [*flags, "--save_image_latents", "--num_image_latents", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_ten_times_it_ends_with_the_bytes_of_an_uninterrupted_run(flags, tmp_path, num_ranks):
    log, expected, killed = tmp_path / "log.txt", tmp_path / "expected", tmp_path / "killed"
    begin = time.monotonic()
    finish(SCRIPT, [*flags, "--output_dir", str(expected)], log)
    duration = time.monotonic() - begin
    argv = [*flags, "--output_dir", str(killed)]
    chance = random.Random(num_ranks)
    unfinished = 0
    for number in range(NUM_KILLS):
        # The first kill is early for sure, so that something is left to do.
        ranks = start(SCRIPT, argv, log, num_ranks, stop=None if number else Stop(signal.SIGKILL, 45, 0.0))
        for process in ranks if number else ranks[:1]:
            process.join(timeout=chance.uniform(0, duration / (2 * num_ranks)) if number else None)
        for process in ranks:
            process.kill()
            process.join()
        unfinished += not (killed / "index.arrow").exists()
    assert unfinished > 0
    finish(SCRIPT, argv, log, num_ranks)
    assert contents(killed) == contents(expected)


def test_four_processes_of_which_two_are_killed_end_with_the_bytes_of_one(flags, tmp_path):
    log, expected, shared = tmp_path / "log.txt", tmp_path / "expected", tmp_path / "shared"
    finish(SCRIPT, [*flags, "--output_dir", str(expected)], log)
    assert "\nencoded 10 clips: " in log.read_text()
    # No launch: each counts as the only process of its own. Two are killed where they work on captions and clips.
    stops = [Stop(signal.SIGKILL, 45, 0.0), Stop(signal.SIGKILL, 70, 0.0), None, None]
    log = tmp_path / "log-of-four.txt"
    processes = [start(SCRIPT, [*flags, "--output_dir", str(shared)], log, stop=stop)[0] for stop in stops]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2 + [0, 0], log.read_text()
    assert contents(shared) == contents(expected)
    said = log.read_text()
    assert said.count("prepared 10 samples in") == 1
    assert sum(map(int, re.findall(r"encoded (\d+) clips", said))) <= 10  # none twice, but for those that were killed


def test_ctrl_c_in_the_middle_ends_in_one_line(flags, tmp_path):
    log, flags = tmp_path / "log.txt", [*flags, "--dataloader_num_workers", "1", "--output_dir", str(tmp_path / "out")]
    # The settings, the empty prompt and the captions of some batches are written.
    (process,) = start(SCRIPT, flags, log, stop=Stop(signal.SIGINT, 40, 0.0))
    process.join()
    assert process.exitcode == 128 + signal.SIGINT
    assert (tmp_path / "out" / "prepared.json").exists() and not (tmp_path / "out" / "index.arrow").exists()
    said = log.read_text()
    assert said.endswith(f"\ninterrupted; {AGAIN}\n")
    assert "Traceback" not in said
