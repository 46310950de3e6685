"""Clips are held out by their content, with all their samples and copies."""

import json
from pathlib import Path

import numpy as np
import pytest

from args import parse_args
from cli.schema import replace_flags
from data.buckets import Bucket
from flags.settings import TrainingSettings
from planning.describe import report_held_out
from planning.held_out import choose_clips, clips_of_prepared, find_candidates, hold_out, join_copies, rank_contents
from planning.plan import plan_training_data
from planning.samples import PreparedData, RawData
from prepared_folders import index_of
from tiny_runs import SIZE


LONG = ["--max_train_steps", "1000"]


def settings(data: Path, output: Path, *flags: str) -> TrainingSettings:
    places = ["--pretrained_model_name_or_path", "org/name", "--data_root", str(data), "--output_dir", str(output)]
    names = [*SIZE, "--caption_column", "prompts.txt", "--video_column", "videos.txt"]
    return parse_args([*places, *names, *flags], task="text-to-video", method="lora")


def plan(*arguments) -> RawData:
    return plan_training_data(settings(*arguments))


@pytest.fixture
def few(demo_clips, tmp_path):
    """Write lists of some demo clips, each as often as asked; returns their folder."""

    def write(counts: list[int]) -> Path:
        videos = sorted((demo_clips / "videos").iterdir())
        listed = [video for video, count in zip(videos, counts, strict=False) for _ in range(count)]
        folder = tmp_path / f"few-{len(counts)}-{sum(counts)}"
        folder.mkdir()
        for number, video in enumerate(listed):
            (folder / f"{number}.mp4").symlink_to(video)
        (folder / "videos.txt").write_text("\n".join(f"{number}.mp4" for number in range(len(listed))))
        (folder / "prompts.txt").write_text("\n".join(f"clip {number}" for number in range(len(listed))))
        return folder

    return write


def contents(data: RawData) -> set[str]:
    return {planned.info.sha256 for planned in data.clips}


FLAGS = ("--allow_outside_paths", *LONG)


def test_copies_and_parts_of_a_clip_leave_training_together(few, tmp_path):
    arguments = few([2] * 12), tmp_path / "out", *FLAGS, "--long_clips", "split", "--validation_fraction"
    everything, data = (plan(*arguments, fraction) for fraction in ("0", "0.2"))
    assert len(contents(data.held_out)) == len(data.held_out.clips) == 2
    assert all(planned.part == 0 for planned in data.held_out.clips)
    assert not contents(data) & contents(data.held_out)
    assert len(contents(data)) == 10
    left = [planned for planned in everything.clips if planned.info.sha256 not in contents(data)]
    assert len(left) == len(everything.clips) - len(data.clips) > 2 * 2
    names = ", ".join(f"{one.clip.video.name} ({one.clip.source})" for one in data.held_out.clips)
    assert data.held_out_note == f"2 of 12 clips with {len(left)} samples held out for the validation loss: {names}"


def test_the_clips_are_listed_in_the_folder_of_the_run(demo_clips, tmp_path):
    data = plan(demo_clips, tmp_path / "out", *LONG)
    report_held_out(data, tmp_path)
    (clip,) = data.held_out.clips
    assert (tmp_path / "held_out_clips.csv").read_text() == f"clip,source\n{clip.clip.video},{clip.clip.source}\n"


def test_a_new_clip_replaces_few():
    ranks = rank_contents([f"content {number}" for number in range(1000)])
    before, after = (
        {int(rows[0]) for rows in choose_clips(np.arange(count), ranks[:count], np.arange(count), 0.05)}
        for count in (900, 1000)
    )
    assert len(before) == len(after) == 8  # at most
    assert len(before & after) >= 6
    assert max(before) - min(before) > 500  # spread over the data


@pytest.mark.parametrize(
    ("counts", "flags", "held_out", "note"),
    [
        ([1], ("--validation_fraction", "0.5"), 0, "fewer than 2 different clips"),
        ([5], ("--validation_fraction", "0.5"), 0, "fewer than 2 different clips"),  # the same one
        ([1, 1], ("--validation_fraction", "0.01"), 1, "1 of 2 clips held out"),
        ([1] * 9, (), 0, "fewer than 10 different clips (--validation_fraction 0.1 holds out one)"),
        ([1] * 10, (), 1, "1 of 10 clips held out"),
        ([1] * 10, ("--max_train_steps", "24"), 0, "a run of fewer than 100 samples is too short"),
        ([1] * 10, ("--max_train_steps", "25"), 1, "1 of 10 clips held out"),
        ([1] * 10, ("--validation_fraction", "0"), 0, ""),
        ([1] * 10, ("--validation_fraction", "1"), 8, "would be more, but at most 8 are held out, and never all"),
    ],
)
def test_how_many_are_held_out_depends_on_the_data_and_the_run(few, tmp_path, counts, flags, held_out, note):
    data = plan(few(counts), tmp_path / "out", *FLAGS, *flags)
    assert len(data.held_out.clips if data.held_out else ()) == held_out
    assert note in data.held_out_note
    assert bool(data.held_out_note) == bool(note)


@pytest.mark.parametrize(("steps", "held_out"), [("19", 0), ("20", 1)])
def test_a_step_of_a_token_budget_counts_with_all_its_samples(few, tmp_path, tiny_models, steps, held_out):
    budget = ("--max_tokens_per_batch", str(5 * 346), "--max_train_steps", steps)  # five samples in a batch
    arguments = settings(few([1] * 10), tmp_path / "out", "--allow_outside_paths", *budget)
    data = plan_training_data(replace_flags(arguments, pretrained_model_name_or_path=str(tiny_models("5b"))))
    assert len(data.held_out.clips if data.held_out else ()) == held_out


def test_a_table_of_clips_replaces_the_fraction(demo_clips, tmp_path):
    flags = ("--validation_fraction", "0.1", "--validation_dataset_file", str(demo_clips / "metadata.csv"))
    with pytest.raises(SystemExit):
        plan(demo_clips, tmp_path / "out", *LONG, *flags)


@pytest.mark.parametrize(
    ("before", "flags", "held_out"),
    [
        ({}, (), 0),  # of an older version
        ({"--validation_fraction": False}, (), 0),
        ({"--validation_fraction": 0.2}, (), 3),
        ({"--validation_fraction": 0.2}, ("--max_train_steps", "1"), 3),  # however short it is now
        ({}, ("--validation_fraction", "0.1"), 2),  # and is refused, because its data is another
    ],
)
@pytest.mark.parametrize("resume_from", ["latest", "checkpoint-7"])
def test_a_resumed_run_goes_on_as_it_was(demo_clips, tmp_path, before, flags, held_out, resume_from):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "manifest.json").touch()
    (folder / "trainer_state.json").write_text(json.dumps({"settings": before}))
    data = plan(demo_clips, tmp_path, *LONG, "--resume_from_checkpoint", resume_from, *flags)
    assert len(data.held_out.clips if data.held_out else ()) == held_out
    assert data.held_out_fraction == (0 if not held_out else 0.1 if flags[:1] == ("--validation_fraction",) else 0.2)


def test_prepared_samples_of_one_clip_leave_together(demo_clips, tmp_path):
    """Fifteen clips of two parts, and one that is listed again elsewhere."""
    clips = [*(f"{number // 2}.mp4" for number in range(30)), "copy.mp4"]
    digests = [*(f"{number:016x}" for number in range(30)), f"{0:016x}"]
    places = {"source": [f"t:{clip}" for clip in clips], "clip": clips}
    names = [f"stem-{digest}" for digest in digests]
    index = index_of([Bucket(17, 64, 96)] * 31, names=names, **places)
    data = hold_out(PreparedData(index, []), settings(demo_clips, tmp_path, *LONG, "--validation_fraction", "0.9"))
    assert data.held_out_note.startswith("8 of 15 clips with ")
    kept, gone = ({one.name for one in part.clips} for part in (data, data.held_out))
    assert len(gone) == 8
    clip_of = dict(zip(names, clips, strict=True))
    kept_clips, gone_clips = ({clip_of[name] for name in part} for part in (kept, gone))
    assert not kept_clips & gone_clips
    assert len(data.clips) == 31 - 8 * 2 - ("copy.mp4" in gone_clips)  # which has the digest of a part of 0.mp4
    assert data.blocks is None


def test_prepared_samples_of_one_file_leave_together_whatever_else_their_tensors_depend_on():
    """Each clip has two rows, with another control or image."""
    files = [f"{number // 2:016x}" for number in range(6)]
    names = [f"stem-{number:016x}" for number in range(100, 106)]
    places = {"source": [f"t:{number}" for number in range(6)], "clip": ["a.mp4"] * 6}
    clips, ranks = clips_of_prepared(index_of([Bucket(17, 64, 96)] * 6, names=names, **places, content=files))
    older = clips_of_prepared(index_of([Bucket(17, 64, 96)] * 6, names=names, **places))
    assert clips.tolist() == [0, 0, 1, 1, 2, 2] and older[0].tolist() == [*range(6)]
    assert ranks.tolist() == older[1].tolist()  # of the clips that are held out, the first stay the same
    both = index_of([Bucket(17, 64, 96)] * 2, names=[names[0], names[5]], content=[None, files[0]])
    assert clips_of_prepared(both)[0].tolist() == [0, 1]


def test_clips_for_regularization_stay():
    assert find_candidates(np.array([0, 0, 1, 2, 2]), np.array([False, False, False, False, True])).tolist() == [0, 1]
    assert find_candidates(np.array([0, 0, 1]), None).tolist() == [0, 1]


def test_clips_with_any_common_content_are_one():
    assert join_copies(np.array([0, 0, 1, 1, 2, 3]), np.array([0, 1, 1, 2, 3, 2])).tolist() == [0, 0, 0, 0, 1, 0]


def test_samples_without_an_origin_are_clips_of_their_own():
    index = index_of([Bucket(17, 64, 96)] * 4, clip=["a", "a", None, None], source=["t:1", "t:1", None, None])
    clips, ranks = clips_of_prepared(index)
    assert clips.tolist()[0] == clips.tolist()[1]
    assert len(set(clips.tolist())) == 3
    assert len(set(ranks.tolist())) == 4
