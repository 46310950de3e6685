"""Preparation is killed anywhere, run again, and ends with the same bytes as one that was never interrupted."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest


CONTEXT = multiprocessing.get_context("forkserver")
# Imported once, in the server that all processes are forked from: an import takes longer than the whole preparation.
CONTEXT.set_forkserver_preload(["diffusers.pipelines.cogvideo.pipeline_cogvideox", "diffusers.training_utils"])
NUM_KILLS = 10


def run_rank(argv: list[str], rank: int, num_ranks: int, log: Path) -> None:
    """One process of a launch, as torchrun starts it; what it prints goes into a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    import prepare_dataset

    prepare_dataset.main(argv)


def start(argv: list[str], num_ranks: int, log: Path) -> list[multiprocessing.Process]:
    ranks = [CONTEXT.Process(target=run_rank, args=(argv, rank, num_ranks, log)) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    return ranks


def finish(argv: list[str], num_ranks: int, log: Path) -> float:
    """Run to the end; returns the seconds that took."""
    begin = time.monotonic()
    for process in start(argv, num_ranks, log):
        process.join()
        assert process.exitcode == 0, log.read_text()
    return time.monotonic() - begin


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def flags(tiny_models, demo_clips) -> list[str]:
    """Sixteen clips in batches of two, three samples to a shard."""
    flags = ["--model_id", str(tiny_models("5b")), "--data_root", str(demo_clips), "--save_latents_and_embeddings"]
    flags += ["--height_buckets", "96", "--width_buckets", "160", "--frame_buckets", "17", "--max_num_frames", "17"]
    # 3 samples of 2 * 16 channels x 5 frames x 12 x 20 in float32 fill about half a megabyte.
    return [*flags, "--batch_size", "2", "--shard_size_mb", "1", "--save_image_latents", "--num_image_latents", "2"]


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_ten_times_it_ends_with_the_bytes_of_an_uninterrupted_run(flags, tmp_path, num_ranks):
    log = tmp_path / "log.txt"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    duration = finish([*flags, "--output_dir", str(whole)], 1, log)
    argv = [*flags, "--output_dir", str(killed)]
    chance = random.Random(num_ranks)
    unfinished = 0
    for number in range(NUM_KILLS):
        ranks = start(argv, num_ranks, log)
        for process in ranks:
            # The first is early for sure, so that something is left to do.
            process.join(timeout=chance.uniform(0, duration / (8 if number == 0 else 2 * num_ranks)))
        for process in ranks:
            process.kill()
            process.join()
        unfinished += not (killed / "index.jsonl").exists()
    assert unfinished > 0
    finish(argv, num_ranks, log)
    assert contents(killed) == contents(whole)
