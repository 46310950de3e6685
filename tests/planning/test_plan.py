"""From flags to a plan: which clips there are, which cannot be used, and what is said about it."""

import csv
import hashlib
import json
import pickle
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import prepare_dataset
from args import parse_args, parse_prepare_args
from cli.schema import replace_flags
from clip_lists import write_table
from common.errors import UserError
from data.buckets import Bucket
from data.clips import BadClip, Clip, ClipSample
from encoded_clips import encode
from flags.data import ControlFlags, MaskFlags
from flags.settings import TrainingSettings
from planning.describe import describe_plan, report_skipped
from planning.plan import (
    check_bad_clips,
    data_sources,
    plan_raw_clips,
    plan_training_data,
    plan_validation_clips,
    validation_data_flags,
)
from planning.report import plan_table
from planning.samples import PreparedData, RawData, caption_dropouts
from preparation.prepare import name_sample
from prepared.folder import content_digest
from prepared_folders import index_of, write_prepared
from video.probe import VideoInfo


@pytest.fixture
def data(demo_clips, tmp_path) -> Path:
    """Three good clips and one of each kind of bad one."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "videos").symlink_to(demo_clips / "videos")
    videos = [f"videos/{path.name}" for path in sorted((demo_clips / "videos").iterdir())[:3]]
    (folder / "zeros.mp4").write_bytes(bytes(1000))
    videos += ["missing.mp4", "zeros.mp4", videos[0]]
    rows = zip(videos, ["one", "two", "three", "four", "five", ""], strict=True)
    write_table(folder / "table.jsonl", [{"video": video, "caption": caption} for video, caption in rows])
    return folder


SIZE = ("--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "17")
COLUMNS = ("--video_column", "file", "--caption_column", "caption")


def plan_flags(output: Path, *flags: object, **options: bool) -> RawData:
    settings = parse_prepare_args(["--model_id", "org/name", "--output_dir", str(output), *SIZE, *map(str, flags)])
    return plan_raw_clips(settings.sources, settings.clips, **options)


def plan(data: Path, *flags: str, table: str = "table.jsonl", **options: bool) -> RawData:
    return plan_flags(data.parent / "out", "--data_root", data, "--dataset_file", data / table, *flags, **options)


def training(output: Path, *flags: object, task: str = "text-to-video") -> TrainingSettings:
    places = ["--pretrained_model_name_or_path", "org/name", "--output_dir", str(output)]
    return parse_args([*places, *map(str, flags)], task=task, method="lora")


def write_mix(folder: Path, *entries: dict) -> Path:
    (folder / "mix.json").write_text(json.dumps(entries))
    return folder / "mix.json"


def test_every_listed_clip_is_planned_or_bad_with_its_reason(data):
    found = plan(data)
    assert found.captions == ["one", "two", "three"]
    assert list(found.buckets) == [Bucket(17, 64, 96)] * 3
    reasons = {clip.source: clip.reason for clip in found.bad}
    assert reasons.keys() == {"table.jsonl:4", "table.jsonl:5", "table.jsonl:6"}
    assert "does not exist" in reasons["table.jsonl:4"]
    assert "caption" in reasons["table.jsonl:6"]


def test_all_bad_clips_are_refused_in_one_list(data):
    found = plan(data)
    with pytest.raises(UserError, match=r"3 of 6 clips cannot be used; .* --on_bad_clip skip") as caught:
        check_bad_clips(found, "error")
    assert all(f"({clip.source})" in str(caught.value) for clip in found.bad)
    check_bad_clips(found, "skip")


def test_a_clip_that_is_split_counts_as_one(data):
    found = plan(data, "--long_clips", "split", "--frame_buckets", "5")
    assert len(found.clips) > 3
    with pytest.raises(UserError, match="3 of 6 clips cannot be used"):
        check_bad_clips(found, "error")


@pytest.fixture
def short_clip(tmp_path, monkeypatch) -> Path:
    """A folder with an upright clip of 3 seconds at 30 frames per second, and in "model" the config of a model."""
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    encode(Path("clips/a.mp4"), frames=90, fps=30, height=96, width=64)
    Path("clips/a.txt").write_text("A clip.")
    Path("model/transformer").mkdir(parents=True)
    Path("model/model_index.json").touch()
    config = {"sample_frames": 49, "sample_height": 8, "sample_width": 12, "patch_size": 2, "max_text_seq_length": 226}
    Path("model/transformer/config.json").write_text(json.dumps(config))
    return Path("clips")


PLACES = ("--model_id", "model", "--data_root", "clips", "--output_dir", "out")
SHORTER = ", add: --fps 8 --frame_buckets 17 --height_buckets 96 --width_buckets 64"


def test_the_plan_ends_with_the_flags_that_keep_more_clips(short_clip):
    configs = SimpleNamespace(transformer=json.loads(Path("model/transformer/config.json").read_text()))
    configs.transformer["patch_size_t"] = None
    model = SimpleNamespace(find_long_captions=lambda *_: (), find_unknown_captions=lambda *_: ())

    def last_line(*flags: str) -> str:
        settings = parse_prepare_args([*PLACES, "--height", "64", "--width", "96", *flags])
        data = plan_raw_clips(settings.sources, settings.clips)
        return describe_plan(data, settings, model, configs, batch_size=1).splitlines()[-1]

    assert last_line() == (
        f"to keep the clip at the model's 8 frames per second, cropped by at most 0%, 0 upscaled{SHORTER}"
    )
    assert last_line(*SHORTER.split()[2:]).startswith("an epoch is")


@pytest.mark.parametrize("on_bad_clip", ["error", "skip"])
def test_clips_that_are_too_short_are_refused_with_the_flags_that_keep_them(short_clip, capsys, on_bad_clip):
    with pytest.raises(SystemExit, match="2"):
        prepare_dataset.main([*PLACES, "--height", "64", "--width", "96", "--fps", "8", "--on_bad_clip", on_bad_clip])
    *_, title, clip, advice = capsys.readouterr().err.splitlines()
    assert title.startswith("error: 1 of 1 clips cannot be used")
    assert "24 usable frames at 8 fps" in clip
    assert advice.startswith("to keep the clip")
    assert advice.endswith(SHORTER.replace(" --fps 8", ""))


def test_training_refuses_short_clips_with_the_same_flags(short_clip):
    settings = training("out", "--data_root", "clips", "--height", 64, "--width", 96, "--fps", 8)
    settings = replace_flags(settings, pretrained_model_name_or_path="model")
    with pytest.raises(UserError, match=r"\nto keep the clip, .*, add: --frame_buckets 17 --height_buckets 96"):
        plan_training_data(settings)
    with pytest.raises(UserError, match=r"too short|usable frames") as error:
        plan_training_data(replace_flags(settings, pretrained_model_name_or_path="org/not-here"))
    assert "to keep" not in str(error.value)


def test_nothing_is_left_to_skip_where_every_clip_is_bad():
    with pytest.raises(UserError, match="1 of 1 clips cannot be used:"):
        check_bad_clips(RawData([], [BadClip("a.mp4", "videos.txt:1", "is empty")]), "skip")


def test_the_fingerprint_changes_where_pictures_are_corrected_and_only_there():
    def fingerprint(**facts):
        info = VideoInfo(9, 64, 64, 8.0, sha256="ab" * 32, **facts)
        clip = Clip(Path("clip.mp4"), "A cat.", "list:1")
        return RawData([ClipSample(clip, info, Bucket(9, 64, 64), tuple(range(9)))]).fingerprint

    assert fingerprint() == "1 samples (6ee14f61d548)"  # as before there were corrections: runs can be resumed
    assert fingerprint(corrections=("mirrored",)) != fingerprint()


def test_where_captions_are_missing_the_script_that_writes_them_is_named():
    def message(reason: str) -> str:
        with pytest.raises(UserError) as caught:
            check_bad_clips(RawData([], [BadClip("a.mp4", "clips", reason)]), "error")
        return str(caught.value)

    assert "python training/caption_dataset.py --data_root" in message("has no caption file a.txt beside it")
    assert "caption_dataset.py" not in message("is empty")


def test_skipped_clips_are_written_to_a_table_and_removed_when_they_are_fixed(tmp_path):
    bad = [BadClip("a, b.mp4", "videos.txt:1", "is empty")]
    report_skipped(bad, tmp_path)
    with open(tmp_path / "skipped_clips.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["clip", "source", "reason"], ["a, b.mp4", "videos.txt:1", "is empty"]]
    report_skipped([], tmp_path)
    assert not (tmp_path / "skipped_clips.csv").exists()


def test_an_image_is_read_only_if_it_is_needed(data):
    video = json.loads((data / "table.jsonl").read_text().splitlines()[0])["video"]
    row = {"video": video, "caption": "one", "image": "no-such.png"}
    (data / "images.jsonl").write_text(json.dumps(row) + "\n")
    assert len(plan(data, table="images.jsonl").clips) == 1
    (bad,) = plan(data, table="images.jsonl", with_images=True).bad
    assert "no-such.png" in bad.reason


def test_clips_without_a_frame_beside_those_that_are_given_are_refused(data):
    encode(data / "short.mp4", frames=10)
    encode(data / "long.mp4", frames=27)  # a part of 17 frames and one of 9
    write_table(data / "given.jsonl", [{"video": f"{name}.mp4", "caption": name} for name in ("short", "long")])

    def planned(*flags: str, **options: object) -> RawData:
        flags = ("--frame_buckets", "9", "17", "--max_num_frames", "17", *flags)
        return plan(data, *flags, table="given.jsonl", condition_frames="first:3", **options)

    found = planned(with_images=True)
    assert found.captions == ["long"]
    assert [one.reason for one in found.bad] == ["gives 9 frames; --condition_frames first:3 needs 13 or more"]
    found = planned("--long_clips", "split", "--skip_frames_end", "1", with_images=True)
    assert [one.clip.video.stem for one in found.clips] == ["long"] and len(found.bad) == 1
    assert len(planned().clips) == 2


def test_the_beginning_of_a_video_cannot_be_an_image_of_the_users_own(data):
    video = json.loads((data / "table.jsonl").read_text().splitlines()[0])["video"]
    Image.new("RGB", (96, 64)).save(data / "own.png")
    write_table(data / "images.jsonl", [{"video": video, "caption": "one", "image": "own.png"}])
    assert plan(data, table="images.jsonl", with_images=True, condition_frames="first,last").clips[0].first_frame
    with pytest.raises(UserError, match=r"(?s)--condition_frames first:2: .* 1 clips have an image.*own\.png"):
        plan(data, table="images.jsonl", with_images=True, condition_frames="first:2")


def test_prepared_data_has_the_condition_frames_of_the_run(tmp_path):
    tensors = {"video_latents": torch.zeros(32, 5, 8, 12), "image_latents": torch.zeros(1, 32, 1, 8, 12)}
    tensors["prompt_embeds"] = torch.zeros(226, 64)
    write_prepared(tmp_path / "a", {"a-1": tensors}, Bucket(17, 64, 96))
    flags = ["--data_root", tmp_path / "a", "--load_tensors"]

    def read(*more: str) -> object:
        return plan_training_data(training(tmp_path / "out", *flags, *more, task="image-to-video"))

    read()  # older folders have first frames
    with pytest.raises(UserError, match=r"--condition_frames: .*a was prepared with first, not first:2; pass --con"):
        read("--condition_frames", "first:2")
    (tmp_path / "a/prepared.json").write_text(json.dumps({"flags": {"condition_frames": "first,last"}}))
    read("--condition_frames", "first,last")
    with pytest.raises(UserError, match=r"was prepared with first,last, not first; .*--save_image_latents"):
        read()


def write_scores(table: Path, *scores: float) -> Path:
    """Write scores of the first clips in data/table.jsonl."""
    videos = [json.loads(line)["video"] for line in (table.parent / "table.jsonl").read_text().splitlines()]
    return write_table(table, [{"video": v, "motion": str(s)} for v, s in zip(videos, scores, strict=False)])


def test_prepared_folders_have_controls_of_one_kind_which_is_the_one_passed(tmp_path):
    for name, kind in (("a", "canny"), ("b", None)):
        write_prepared(tmp_path / name, {name: {"prompt_embeds": torch.ones(1)}}, Bucket(17, 64, 96))
        (tmp_path / name / "prepared.json").write_text(json.dumps({"flags": {"compute_control": kind}}))
    mixes = {"both.json": ["a", "b"], "one.json": ["a"]}
    for name, folders in mixes.items():
        (tmp_path / name).write_text(json.dumps([{"data_root": folder} for folder in folders]))

    def plan(mix: str, *flags: str) -> None:
        argv = ["--pretrained_model_name_or_path", "a/b", "--dataset_mix", str(tmp_path / mix), "--load_tensors"]
        plan_training_data(parse_args([*argv, *flags], task="control-to-video", method="lora"))

    plan("one.json", "--compute_control", "canny")
    for flags, message in (
        (["both.json"], "b was prepared with control clips; prepare it with --compute_control canny, as .*a was"),
        (["one.json", "--regularization_data_root", str(tmp_path / "b")], "b was prepared with control clips"),
        (["one.json", "--compute_control", "grey"], "a was prepared with --compute_control canny; .*or omit the flag"),
    ):
        with pytest.raises(UserError, match=f"--load_tensors: .*{message}"):
            plan(*flags)


def test_dropped_clips_are_counted_and_listed_but_stop_nothing(data, tmp_path):
    write_scores(data / "scores.csv", 0.1, 2, 3)
    found = plan(data, "--keep", "motion > 1", "--on_bad_clip", "skip")
    assert found.captions == ["two", "three"]
    (dropped,) = found.dropped
    assert (dropped.source, dropped.reason) == ("table.jsonl:1", "dropped by --keep: motion is 0.1")
    assert found.num_listed == 6
    check_bad_clips(RawData(found.clips, dropped=found.dropped), "error")
    report_skipped([], tmp_path, found.dropped)
    with open(tmp_path / "skipped_clips.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == [dropped.what, dropped.source, dropped.reason]


def test_if_all_clips_are_dropped_their_scores_are_shown(data):
    write_scores(data / "scores.csv", 0.1, 2, 3)
    found = plan(data, "--keep", "motion > 5", "--max_samples", "3")
    with pytest.raises(UserError, match=r"--keep drops all 3 clips; relax the condition:(\n.*motion is [\d.]+){3}$"):
        check_bad_clips(found, "skip")


def test_a_clip_without_scores_is_a_bad_clip(data):
    write_scores(data / "scores.csv", 0.1, 2)
    found = plan(data, "--keep", "motion < 1")
    assert "has no scores" in {clip.source: clip.reason for clip in found.bad}["table.jsonl:3"]


def test_each_data_set_of_a_mix_may_have_its_own_condition(data, tmp_path):
    write_scores(data / "scores.csv", 0.1, 2, 3)
    write_scores(data / "mine.csv", 5, 0, 0)
    entry = {"dataset_file": "data/table.jsonl", "max_samples": 3}
    mix = write_mix(tmp_path, {**entry, "keep": "motion > 1"}, {**entry, "scores": "data/mine.csv"}, entry)
    found = plan_flags(tmp_path / "out", "--dataset_mix", mix, "--keep", "motion < 1", "--allow_outside_paths")
    assert found.captions == ["two", "three", "two", "three", "one"]


def test_held_out_clips_are_not_chosen_by_scores(data, tmp_path):
    write_scores(data / "scores.csv", 0.1, 2, 3)
    flags = ("--data_root", data, "--dataset_file", data / "table.jsonl", "--keep", "motion > 1")
    settings = training(tmp_path / "out", *flags, "--validation_dataset_file", data / "table.jsonl")
    assert validation_data_flags(settings)[0].keep is None


def test_prepared_data_is_not_filtered_silently(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/prepared.json").write_text(json.dumps({"flags": {"keep": "motion > 1"}}))
    mix = write_mix(tmp_path, {"data_root": "a", "keep": "motion > 2"})
    with pytest.raises(UserError, match=r"a is prepared already; pass --keep to prepare_dataset\.py"):
        plan_training_data(training(tmp_path / "out", "--dataset_mix", mix, "--load_tensors"))


def test_the_data_sets_of_a_mix_are_joined_and_bad_clips_named_with_their_folder(data, demo_clips, tmp_path):
    mix = write_mix(tmp_path, {"data_root": str(demo_clips), "repeats": 2}, {"dataset_file": "data/table.jsonl"})
    found = plan_flags(tmp_path / "out", "--dataset_mix", mix, "--allow_outside_paths")
    assert found.repeats == [2] * 16 + [1] * 3
    assert {clip.source for clip in found.bad} == {f"{data}/table.jsonl:{line}" for line in (4, 5, 6)}


def test_masks_of_regularization_are_read_only_to_compute_controls(data):
    entries = [{"data_root": "."}, {"data_root": ".", "regularization": True}]
    sources = training(data, "--dataset_mix", write_mix(data, *entries), *SIZE).sources
    masks = MaskFlags(use_masks=True)
    fills = ControlFlags(compute_control="inpaint")
    assert [one.mask_column for one in data_sources(sources, masks=masks)] == ["mask", None]
    assert [one.mask_column for one in data_sources(sources, fills, masks)] == ["mask", "mask"]


def test_weights_count_the_samples_that_can_be_used(data, tmp_path):
    (data / "one.jsonl").write_text((data / "table.jsonl").read_text().splitlines()[0] + "\n")
    files = [str(data / name) for name in ("table.jsonl", "one.jsonl")]
    mix = write_mix(tmp_path, *({"dataset_file": file, "weight": 1} for file in files))
    found = plan_flags(tmp_path / "out", "--dataset_mix", mix, "--allow_outside_paths")
    assert found.repeats == [1, 1, 1, 3]  # three rows of the first are bad


def test_repeats_of_a_mix_multiply_those_of_prepared_samples(tmp_path):
    tensors = {"video_latents": torch.zeros(1), "prompt_embeds": torch.zeros(1)}
    for folder, frames in (("a", 17), ("b", 9)):
        write_prepared(
            tmp_path / folder, {f"{folder}-1": tensors, f"{folder}-2": tensors}, Bucket(frames, 64, 96), repeats=2
        )

    def plan_mix(*entries: dict) -> PreparedData:
        mix = write_mix(tmp_path, *entries)
        return plan_training_data(training(tmp_path / "out", "--dataset_mix", mix, "--load_tensors"))

    found = plan_mix({"data_root": "a", "repeats": 3}, {"data_root": "b"})
    assert found.repeats.tolist() == [clip.repeats for clip in found.clips] == [6, 6, 2, 2]
    assert [clip.name for clip in found.clips] == ["a-1", "a-2", "b-1", "b-2"]
    assert [bucket.num_frames for bucket in found.buckets] == [17, 17, 9, 9]
    assert plan_mix({"data_root": "a", "weight": 3}, {"data_root": "b", "weight": 1}).repeats.tolist() == [3, 3, 1, 1]


def test_prepared_data_is_recognized_by_the_digest_of_earlier_versions(tmp_path):
    """A checkpoint has it. It was taken of the `repr` of tuples."""
    buckets = [Bucket(9, 64, 96), Bucket(17, 64, 96), Bucket(9, 64, 96)]
    data = PreparedData(index_of(buckets, name=["a", "it's", "\u2603"], repeats=[1.0, 2.5, 1e-05]), [])
    tuples = [(clip.name, clip.prompt_embeds.key, clip.bucket, clip.repeats) for clip in data.clips]
    digest = hashlib.sha256("\n".join(map(repr, tuples)).encode()).hexdigest()
    assert data.fingerprint == f"3 samples ({digest[:12]})"


def hold_out(table: Path, data_root: Path, *flags: str, with_images: bool = False) -> RawData | None:
    places = ["--data_root", data_root, "--validation_dataset_file", table]
    return plan_validation_clips(training(table.parent / "out", *places, *flags), with_images=with_images)


@pytest.fixture
def held_out(demo_clips, tmp_path) -> Path:
    """A table of two clips that lie beside it."""
    folder = tmp_path / "held-out"
    (folder / "videos").mkdir(parents=True)
    rows = []
    for number, path in enumerate(sorted((demo_clips / "videos").iterdir())[:2]):
        (folder / "videos" / f"{number}.mp4").symlink_to(path)
        rows.append({"file": f"videos/{number}.mp4", "caption": f"clip {number}"})
    return write_table(folder / "table.jsonl", rows)


def test_no_clips_are_held_out_unless_a_table_names_them(demo_clips, tmp_path):
    assert plan_validation_clips(training(tmp_path / "out", "--data_root", demo_clips), with_images=False) is None


def test_paths_of_clips_held_out_start_from_their_table(held_out, demo_clips):
    """Clips of these names are in --data_root, too, which is what is trained on."""
    flags = [*SIZE, *COLUMNS, "--id_token", "TOKEN", "--max_samples", "1"]
    found = hold_out(held_out, demo_clips, *flags)
    assert [planned.clip.video for planned in found.clips] == [held_out.parent / f"videos/{n}.mp4" for n in (0, 1)]
    assert found.captions == ["TOKEN clip 0", "TOKEN clip 1"]
    assert list(found.buckets) == [Bucket(17, 64, 96)] * 2


def test_clips_that_are_trained_on_too_are_not_held_out(held_out, demo_clips):
    rows = [{"file": str(path), "caption": "a"} for path in sorted((demo_clips / "videos").iterdir())[1:]]
    table = write_table(held_out.parent / "all.csv", rows)
    places = ["--data_root", demo_clips, "--validation_dataset_file", held_out]
    settings = training(held_out.parent / "out", *places, "--dataset_file", table, *COLUMNS)
    with pytest.raises(UserError, match="--validation_dataset_file: 1 of its clips are trained on too") as caught:
        plan_training_data(settings)
    assert "1.mp4" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "clip", "frames", "has_content", "is_refused"),
    [
        ("renamed", "held-out/videos/1.mp4", [0, 64], False, True),
        ("renamed", "held-out/videos/1.mp4", [900, 916], False, False),  # another scene of the file
        (None, "moved.mp4", [0, 64], False, True),  # with the same digest in its name
        ("renamed", "moved.mp4", [0, 64], True, True),
        ("renamed", "elsewhere/1.mp4", [0, 64], False, False),
    ],
)
def test_clips_that_prepared_samples_were_made_of_are_not_held_out(
    held_out, monkeypatch, name, clip, frames, has_content, is_refused
):
    monkeypatch.chdir(held_out.parent.parent)
    _, planned = hold_out(held_out, held_out.parent, *SIZE, *COLUMNS).clips
    places = ["--model_id", "org/name", "--data_root", "held-out", "--output_dir", "out"]
    prepare = parse_prepare_args([*places, *SIZE, "--save_latents_and_embeddings"])
    tensors = {"video_latents": torch.zeros(1), "prompt_embeds": torch.zeros(1)}
    names = {name or name_sample(planned, prepare).name: tensors}
    content = {"content": content_digest(planned.info.sha256)} if has_content else {}
    write_prepared(Path("prepared"), names, planned.bucket, clip=clip, frames=frames, **content)
    flags = ["--load_tensors", "--data_root", "prepared", *SIZE, *COLUMNS, "--validation_dataset_file", held_out]
    refusal = pytest.raises(UserError, match=r"1 of its clips are trained on too.*\n  .*1\.mp4$")
    with refusal if is_refused else nullcontext():
        assert len(plan_training_data(training("out", *flags)).held_out.clips) == 2


def test_of_a_clip_that_is_split_the_first_part_is_held_out(held_out, demo_clips):
    found = hold_out(held_out, demo_clips, *SIZE, "--frame_buckets", "5", *COLUMNS, "--long_clips", "split")
    assert [planned.frame_indices for planned in found.clips] == [(0, 1, 2, 3, 4)] * 2


def test_bad_clips_among_those_held_out_are_listed_whatever_becomes_of_others(data):
    with pytest.raises(UserError, match="--validation_dataset_file: 3 of 6 clips cannot be used") as caught:
        hold_out(data / "table.jsonl", data, *SIZE, "--caption_column", "caption", "--on_bad_clip", "skip")
    assert all(f"table.jsonl:{line}" in str(caught.value) for line in (4, 5, 6))


def test_images_of_held_out_clips_are_read_only_if_they_are_needed(held_out, demo_clips):
    rows = [json.loads(line) | {"image": "no-such.png"} for line in held_out.read_text().splitlines()]
    write_table(held_out, rows)
    assert len(hold_out(held_out, demo_clips, *SIZE, *COLUMNS).clips) == 2
    with pytest.raises(UserError, match=r"2 of 2 clips cannot be used(.|\n)*no-such\.png"):
        hold_out(held_out, demo_clips, *SIZE, *COLUMNS, with_images=True)


def write_settings_of(folder: Path, **flags) -> Path:
    """A prepared folder, as far as the flags it was made with."""
    folder.mkdir()
    (folder / "prepared.json").write_text(json.dumps({"flags": flags}))
    return folder


def test_clips_held_out_are_cut_as_the_prepared_ones_were(held_out, tmp_path):
    size = {"frame_buckets": [33], "height_buckets": [96], "width_buckets": [128]}
    folder = write_settings_of(tmp_path / "prepared", id_token="TOKEN", skip_frames_start=2, **size)
    # The launchers pass the length of validation videos as a frame bucket.
    found = hold_out(held_out, folder, "--load_tensors", *COLUMNS, "--frame_buckets", "17")
    assert list(found.buckets) == [Bucket(33, 96, 128)] * 2
    assert {planned.frame_indices[0] for planned in found.clips} == {2}
    assert found.captions == ["TOKEN clip 0", "TOKEN clip 1"]


def test_where_prepared_folders_differ_the_flags_decide(held_out, tmp_path):
    for name, height in (("a", 96), ("b", 112)):
        write_settings_of(tmp_path / name, height_buckets=[height], width_buckets=[128], fps=None)
    flags = ["--dataset_mix", write_mix(tmp_path, {"data_root": "a"}, {"data_root": "b"}), "--load_tensors"]
    flags += ["--validation_dataset_file", held_out, *SIZE]
    _, clips = validation_data_flags(training(tmp_path / "out", *flags))
    assert (clips.height_buckets, clips.width_buckets) == ((64,), (128,))


def test_nothing_about_clips_held_out_is_random(held_out, demo_clips):
    flags = ["--data_root", demo_clips, "--random_flip", "0.5", "--validation_dataset_file", held_out]
    for mode, kept in (("random", "center"), ("center", "center"), ("none", "none")):
        settings = training(held_out.parent / "out", *flags, "--video_reshape_mode", mode)
        _, clips = validation_data_flags(settings)
        assert (clips.video_reshape_mode, clips.random_flip) == (kept, None)


def test_prepared_samples_are_counted_by_bucket():
    clips = index_of([Bucket(frames, 64, 96) for frames in (17, 17, 49)])
    model = SimpleNamespace(transformer={"max_text_seq_length": 226, "patch_size": 2, "patch_size_t": None})
    first, second = describe_plan(PreparedData(clips, []), None, None, model, batch_size=1).splitlines()
    assert first == f"17x64x96: 2 prepared samples of {226 + 5 * 4 * 6} tokens"
    assert second == f"49x64x96: 1 prepared samples of {226 + 13 * 4 * 6} tokens"


@pytest.fixture
def kept(demo_clips, tmp_path) -> Path:
    """A folder of two clips without the id token."""
    (tmp_path / "kept").mkdir()
    for number, path in enumerate(sorted((demo_clips / "videos").iterdir())[-2:]):
        (tmp_path / f"kept/{number}.mp4").symlink_to(path)
        (tmp_path / f"kept/{number}.txt").write_text(f"kept {number}")
    return tmp_path / "kept"


def plan_with_kept(data: Path, kept: Path, *flags: object) -> RawData:
    places = ["--data_root", data, "--dataset_file", data / "table.jsonl", "--regularization_data_root", kept]
    flags = [*places, *SIZE, "--caption_column", "caption", "--on_bad_clip", "skip", "--allow_outside_paths", *flags]
    return plan_training_data(training(data.parent / "out", *flags))


def test_regularization_clips_follow_without_the_id_token_and_are_planned_apart(data, kept):
    found = plan_with_kept(data, kept, "--id_token", "BW")
    assert found.captions == ["BW one", "BW two", "BW three", "kept 0", "kept 1"]
    assert found.regularization.tolist() == [False, False, False, True, True]
    assert found.trained.captions == found.captions[:3]
    rows = table_of(found, id_token="BW")
    assert [row.split()[:2] for row in rows[1:3]] == [["17x64x96", "3"], ["17x64x96", "regularization"]]
    assert rows[3] == "an epoch is 6 samples in 4 batches of up to 2"
    assert rows[4] == "3 samples of an epoch are regularization, from 2, in 2 batches of their own"
    assert not any("for regularization with" in row for row in rows)
    (kept / "1.txt").write_text("BW kept")
    lines = table_of(plan_with_kept(data, kept, "--id_token", "BW"), id_token="BW")
    assert any(line.startswith("1 caption for regularization with BW in it") for line in lines)


def table_of(found: RawData, **options) -> list[str]:
    facts = {"batch_size": 2, "tokens_of": lambda bucket: 300, "model_fps": 8.0}
    return str(plan_table(found.clips, **facts, **options)).splitlines()


def test_a_run_with_regularization_is_another_run(data, kept):
    with_kept = plan_with_kept(data, kept)
    trained = [replace(one, clip=replace(one.clip, regularization=False)) for one in with_kept.clips]
    assert RawData(trained).fingerprint != with_kept.fingerprint == RawData(with_kept.clips).fingerprint


def test_a_kind_of_which_no_clip_can_be_used_is_refused(data, kept, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.mp4").write_bytes(bytes(100))
    (bad / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"no clip for regularization \(--regularization_data_root\) can be used"):
        plan_with_kept(data, bad)
    write_table(data / "table.jsonl", [{"video": "missing.mp4", "caption": "a"}])
    with pytest.raises(UserError, match="no clip to train on can be used"):
        plan_with_kept(data, kept)


def test_errors_on_clips_for_regularization_name_their_flag(data, kept, tmp_path):
    def error(*flags: object) -> str:
        with pytest.raises(UserError) as caught:
            plan_with_kept(data, *flags)
        assert "--regularization_data_root" in str(caught.value)
        assert not re.search("--(data_root|dataset_file|dataset_name|caption_column)", str(caught.value))
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "nothing that can be read as clips" in error(tmp_path / "empty")
    (kept / "videos.txt").write_text("0.mp4")
    assert "prompts.txt does not exist; caption_dataset.py writes captions" in error(kept)
    table = write_table(tmp_path / "table/table.csv", [{"video": "0.mp4", "caption": "a"}])
    assert error(table.parent).endswith(f'list {table} in a --dataset_mix, with "regularization": true')
    write_prepared(
        tmp_path / "a", {"a": {"video_latents": torch.zeros(1), "prompt_embeds": torch.zeros(1)}}, Bucket(17, 64, 96)
    )
    flags = ["--load_tensors", "--data_root", tmp_path / "a", "--regularization_data_root", kept]
    with pytest.raises(UserError, match=r"pass its --output_dir as --regularization_data_root$"):
        plan_training_data(training(tmp_path / "out", *flags))


def test_clips_to_train_on_are_not_for_regularization_too(data, kept, tmp_path):
    both = sorted((data / "videos").iterdir())[1]
    (kept / "2.mp4").symlink_to(both)
    (kept / "2.txt").write_text("again")
    message = r"^1 of the clips for regularization \(--regularization_data_root\) are also those to train on"
    with pytest.raises(UserError, match=rf"{message}(.|\n)*\n  2\.mp4 \(.*2\.txt\)$"):
        plan_with_kept(data, kept)
    tensors = {"video_latents": torch.zeros(1), "prompt_embeds": torch.zeros(1)}
    for folder, names in (("a", ["cat-0123456789abcdef", "dog"]), ("b", ["0-0123456789abcdef", "dog"])):
        write_prepared(tmp_path / folder, dict.fromkeys(names, tensors), Bucket(17, 64, 96))
    write_prepared(tmp_path / "c", {"cat-fedcba9876543210": tensors}, Bucket(17, 64, 96), content="01" * 8)
    write_prepared(tmp_path / "d", {"0-0123456789abcdee": tensors}, Bucket(17, 64, 96), content="01" * 8)
    for root, other, count in (("a", "b", 1), ("a", "a", 2), ("c", "d", 1)):
        flags = ["--data_root", tmp_path / root, "--regularization_data_root", tmp_path / other, "--load_tensors"]
        with pytest.raises(UserError, match=rf"^{count} of the clips(.|\n)*\n  (cat|0)-0123456789abcde"):
            plan_training_data(training(tmp_path / "out", *flags))


def test_prepared_regularization_is_joined_unless_it_has_an_id_token(tmp_path):
    tensors = {"video_latents": torch.zeros(1), "prompt_embeds": torch.zeros(1)}
    for name in ("a", "b"):
        write_prepared(tmp_path / name, {f"{name}-1": tensors, f"{name}-2": tensors}, Bucket(17, 64, 96))
    flags = ["--data_root", tmp_path / "a", "--regularization_data_root", tmp_path / "b", "--load_tensors"]
    settings = training(tmp_path / "out", *flags)
    found = plan_training_data(settings)
    assert found.regularization.tolist() == pickle.loads(pickle.dumps(found.clips)).regularization.tolist()
    assert found.regularization.tolist() == [False, False, True, True]
    assert [clip.name for clip in found.trained.clips] == ["a-1", "a-2"]
    assert found.trained.folders == [tmp_path / "a"]
    apart = [replace(folder, regularization=False) for folder in found.clips.folders]
    assert replace(found, clips=type(found.clips)(apart)).fingerprint != found.fingerprint
    configs = SimpleNamespace(transformer={"max_text_seq_length": 226, "patch_size": 2, "patch_size_t": None})
    plan_text = describe_plan(found, settings, None, configs, batch_size=1)
    assert plan_text.endswith("2 samples of an epoch are regularization, from 2, in 2 batches of their own")
    (tmp_path / "b/prepared.json").write_text(json.dumps({"flags": {"id_token": "BW"}}))
    with pytest.raises(UserError, match=r"--regularization_data_root: .*b was prepared with --id_token BW"):
        plan_training_data(settings)


def test_a_clip_with_several_captions_is_a_sample_for_each_that_come_as_often_as_the_clip(data):
    rows = [json.loads(line) for line in (data / "table.jsonl").read_text().splitlines()[:3]]
    rows[0]["caption"] = ["one", "uno", "eins"]
    (data / "several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = plan(data, table="several.jsonl")
    assert found.captions == ["one", "uno", "eins", "two", "three"]
    assert found.repeats == [1 / 3] * 3 + [1, 1]
    assert found.num_captions.tolist() == [3, 3, 3, 1, 1]
    assert found.num_listed == 3
    lines = table_of(found)
    assert lines[1].split()[:2] == ["17x64x96", "3"]
    assert lines[2] == "an epoch is 3 samples in 2 batches of up to 2"
    assert lines[3] == "1 clip with 3 captions, which take turns from epoch to epoch"
    assert not any("several captions" in line or "times" in line for line in lines)
    split = plan(data, "--long_clips", "split", "--frame_buckets", "5", table="several.jsonl")
    first = [(planned.part, planned.caption_number) for planned in split.clips if planned.clip.captions]
    assert first == [(part, caption) for part in range(len(first) // 3) for caption in range(3)]


def test_tags_to_shuffle_that_a_clip_does_not_have_are_noted(data, tmp_path):
    configs = SimpleNamespace(transformer={"max_text_seq_length": 226, "patch_size": 2, "patch_size_t": None})
    configs.transformer |= {"sample_frames": 49, "sample_height": 8, "sample_width": 12}
    model = SimpleNamespace(find_long_captions=lambda *_: (), find_unknown_captions=lambda *_: ())
    rows = [json.loads(line) for line in (data / "table.jsonl").read_text().splitlines()[:3]]

    def notes(captions: list[str], *more: str) -> list[str]:
        write_table(data / "tags.jsonl", [row | {"caption": text} for row, text in zip(rows, captions, strict=True)])
        flags = ["--data_root", data, "--dataset_file", data / "tags.jsonl", *SIZE, "--caption_column", "caption"]
        settings = training(tmp_path / "out", *flags, "--validation_fraction", "0", *more)
        text = describe_plan(plan_training_data(settings), settings, model, configs, batch_size=1)
        return [line for line in text.splitlines() if "--shuffle_tags" in line]

    without = "--shuffle_tags has no effect on {} of 3 clips, whose captions are not tags with commas"
    assert notes(["one", "two", "three"], "--shuffle_tags", "3") == [without.format(3)]
    assert notes(["red, round", "a,", "x"], "--shuffle_tags", "3") == [without.format(2)]
    assert notes(["a, b", "c, d", "e, f"], "--shuffle_tags", "3") == notes(["one", "two", "three"]) == []


def test_prepared_captions_of_a_clip_are_found_by_its_name():
    buckets = [Bucket(17, 64, 96)] * 6
    index = index_of(buckets, name=[*"aabccc"], repeats=[0.5, 0.5, 1.0, *[1 / 3] * 3])
    assert PreparedData(index, []).num_captions.tolist() == [2, 2, 1, 3, 3, 3]
    assert PreparedData(index_of(buckets, name=[*"aabccc"], repeats=[1.0] * 6), []).num_captions is None


def test_data_sets_of_a_mix_may_drop_captions_more_or_less_often(data, tmp_path):
    tensors = {"video_latents": torch.zeros(1), "prompt_embeds": torch.zeros(1)}
    write_prepared(tmp_path / "a", {"a-1": tensors}, Bucket(17, 64, 96))
    write_prepared(tmp_path / "b", {"b-1": tensors, "b-2": tensors}, Bucket(17, 64, 96))
    entry = {"dataset_file": "data/table.jsonl", "caption_column": "caption", "max_samples": 1}
    configs = SimpleNamespace(transformer={"max_text_seq_length": 226, "patch_size": 2, "patch_size_t": None})
    for flags, entries in (
        (["--load_tensors"], [{"data_root": "a"}, {"data_root": "b", "caption_dropout": 0.5}]),
        ([], [entry, entry | {"caption_dropout": 0.5, "max_samples": 2}]),
    ):
        mix = write_mix(tmp_path, *entries)
        flags = ["--dataset_mix", mix, *SIZE, "--allow_outside_paths", "--caption_dropout", "0.1", *flags]
        settings = training(tmp_path / "out", *flags)
        found = plan_training_data(settings)
        assert caption_dropouts(found, 0.1).tolist() == pytest.approx([0.1, 0.5, 0.5])
        if isinstance(found, PreparedData):
            assert describe_plan(found, settings, None, configs, batch_size=1).endswith(
                "captions are dropped from 0.1 of 1 samples, 0.5 of 2 samples"
            )
    write_mix(tmp_path, entry)
    assert caption_dropouts(plan_training_data(settings), 0.1) is None
