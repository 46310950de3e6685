"""A dry run does everything once and keeps nothing."""

import re
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

import cogvideox_image_to_video_lora
import cogvideox_text_to_video_lora
import cogvideox_text_to_video_sft
import prepare_dataset
from args import parse_args
from common.folder_lock import locked_folder
from data.buckets import Bucket
from data.token_budget import BatchSize
from planning.samples import PreparedData
from prepared.index import IndexedFolder, PreparedIndex
from prepared_folders import index_of
from run.dry_run import largest_batch, trial_folder, trial_settings
from run.encoded_inputs import load_conditions
from run.recipe import Recipe
from tiny_runs import SIZE, run_flags


# By a run: checkpoints, the result, videos, and embedded prompts.
WRITTEN = ("checkpoint-*/**/*", "*.safetensors", "validation/*/*.safetensors", "validation/*/*.mp4", "prompt_embeds/*")
PARTS = ("checkpoints", "result", "weights of validations", "videos", "prompt embeddings")
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def rehearse(script, model: Path, data: Path, output: Path, *flags: str) -> None:
    script.main(run_flags(model, data, output, "--train_batch_size", "2", *flags, "--dry_run"))


def test_a_dry_run_trains_saves_loads_samples_and_keeps_nothing(tiny_models, demo_clips, tmp_path, caplog, capfd):
    model = tiny_models("5b-i2v")
    rehearse(cogvideox_image_to_video_lora, model, demo_clips, tmp_path / "out", "--rank", "4", "--max_samples", "4")
    assert list(tmp_path.iterdir()) == []
    told = capfd.readouterr().err
    assert "Reading every sample" in told
    assert "4/4" in told
    assert "peak memory: host" in told
    assert "saving, loading and sampling all work" in told


def test_a_dry_run_ends_with_what_the_real_run_does_and_takes(tiny_models, demo_clips, tmp_path, capfd):
    # 4 batches an epoch in steps of 3 and 1.
    flags = ["--train_batch_size", "2", "--gradient_accumulation_steps", "3", "--num_train_epochs", "3"]
    flags += ["--checkpointing_steps", "4", "--rank", "4", "--validation_epochs", "1", "--num_inference_steps", "2"]
    flags += ["--validation_prompt", "a:::b", "--max_samples", "8"]
    argv = run_flags(tiny_models("5b"), demo_clips, tmp_path / "out", *flags)
    cogvideox_text_to_video_lora.main([*argv, "--dry_run"])
    told = capfd.readouterr().err.split("the run would be:\n")[1]
    lines = dict(line.split(maxsplit=1) for line in told.splitlines()[:5])
    assert lines["steps"] == "1 to 6: 3 epochs, 12 batches on each rank"
    assert re.fullmatch(r"about \d+ s: steps \d+ s, validations \d+ s, checkpoints \d+ s", lines["time"])

    AcceleratorState._reset_state(reset_partial_state=True)
    cogvideox_text_to_video_lora.main(argv)
    checkpoints = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    validations = list((tmp_path / "out" / "validation").glob("step-*"))
    assert lines["checkpoints"] == f"{len(checkpoints)}, {len(checkpoints)} of them kept"
    assert lines["validations"] == f"{len(validations)}, of 2 videos"
    sizes = re.search(": " + ", ".join(rf"{part} (\d+) kB" for part in PARTS) + "; ", lines["disk"])
    written = [[path.stat().st_size for path in (tmp_path / "out").glob(names)] for names in WRITTEN]
    assert [int(size) for size in sizes.groups()] == pytest.approx([sum(one) / 1000 for one in written], rel=0.3)


def test_a_dry_run_does_not_change_an_earlier_run(tiny_models, demo_clips, tmp_path):
    kept = tmp_path / "out" / "transformer" / "weights"
    kept.parent.mkdir(parents=True)
    kept.write_text("precious")
    with locked_folder(tmp_path / "out"):  # as by a run that is not finished
        rehearse(cogvideox_text_to_video_sft, tiny_models("5b"), demo_clips, tmp_path / "out", "--max_samples", "1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_a_dry_run_fails_if_sampling_fails(tiny_models, demo_clips, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "start.png")
    model = Path(shutil.copytree(tiny_models("5b-i2v"), tmp_path / "model"))
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("scaled_linear", "linear").replace('"v_prediction"', '"none"'))
    flags = ("--validation_prompt", "a", "--validation_images", str(tmp_path / "start.png"), "--max_samples", "1")
    with pytest.raises(SystemExit, match="2"):
        rehearse(cogvideox_image_to_video_lora, model, demo_clips, tmp_path / "out", "--rank", "4", *flags)
    assert "--dry_run: the validation failed" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / ".dry-run.out").exists()


def test_a_dry_run_lists_unreadable_samples(tiny_models, demo_clips, tmp_path, capsys):
    prepared, model = tmp_path / "prepared", tiny_models("5b")
    flags = ["--model_id", str(model), "--data_root", str(demo_clips), "--output_dir", str(prepared)]
    flags += ["--max_samples", "4", "--save_latents_and_embeddings", "--layout", "files"]
    prepare_dataset.main([*flags, *SIZE])
    damaged = sorted((prepared / "video_latents").iterdir())[2:]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SystemExit, match="2"):
        rehearse(cogvideox_text_to_video_sft, model, prepared, tmp_path / "out", "--load_tensors")
    told = capsys.readouterr().err
    assert "2 of 4 samples cannot be read" in told
    assert all(file.name in told for file in damaged)


@pytest.mark.parametrize("fps", ["7.5", "29.97", "0.4", "5"])
@pytest.mark.parametrize("task", ["control-to-video", "image-to-video"])
def test_a_trial_writes_as_many_frames_at_any_rate_as_its_video_needs(tiny_models, tmp_path, task, fps):
    model, condition = tiny_models("5b-i2v"), ["--condition_frames", "first:3"]
    if task == "control-to-video":
        model, condition = tiny_models("5b"), ["--skip_frames_start", "3", "--compute_control", "inpaint"]
    argv = run_flags(model, tmp_path, tmp_path, *condition, "--fps", fps)
    settings = trial_settings(parse_args(argv, task=task, method="lora"), tmp_path, Bucket(17, 64, 96))
    (frames,) = load_conditions(Recipe(settings, PreparedData([], [])))
    assert len(frames) == (17 if task == "control-to-video" else 9)


def samples(count: int, *size: int, repeats: float = 1.0) -> IndexedFolder:
    (folder,) = index_of([Bucket(*size)] * count, repeats=[repeats] * count).folders
    return folder


@pytest.mark.parametrize(
    ("small", "large", "batch_size", "num_ranks", "expected"),
    [
        (samples(8, 9, 64, 64), samples(1, 17, 64, 64), 1, 1, (17, 1)),
        (samples(8, 9, 64, 64), samples(1, 17, 64, 64), 4, 1, (9, 4)),
        # Each rank has another batch.
        (samples(16, 9, 64, 64), samples(4, 17, 64, 64), 1, 8, (17, 8)),
        # A sample that is drawn four times in an epoch fills a batch of four.
        (samples(8, 9, 64, 64), samples(1, 17, 64, 64, repeats=4), 4, 1, (17, 4)),
        (samples(64, 9, 64, 64, repeats=0.25), samples(1, 17, 64, 64), 4, 1, (9, 4)),
    ],
)
def test_the_largest_batch_is_the_one_with_most_pixels(small, large, batch_size, num_ranks, expected):
    data, limit = PreparedData(PreparedIndex([small, large]), []), BatchSize(batch_size)
    largest = largest_batch(data, limit, num_ranks, accumulation=1)
    frames, count = expected
    assert [clip.bucket.num_frames for clip in largest.clips] == [frames] * count
    assert [bucket.num_frames for bucket in largest.buckets] == [frames] * count
    assert set(largest.repeats) == {1}
    assert len(largest_batch(data, limit, num_ranks, 2).clips) == 2 * count


@pytest.mark.parametrize("output", ["out", "new/deep/out"])
def test_the_trial_is_on_the_disk_of_the_output(tmp_path, output):
    assert trial_folder(tmp_path / output) == tmp_path / ".dry-run.out"
    (tmp_path / output).mkdir(parents=True)
    assert trial_folder(tmp_path / output) == tmp_path / output / ".dry-run.out"
