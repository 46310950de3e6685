"""prepare_dataset.py end to end on a tiny model: the first run, and a second one.

Every clip gets a bucket of its size, so that nothing is resized and the expected latents follow from its frames.
"""

import csv
import hashlib
import json
import os
import re
import shutil
from base64 import b64decode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from PIL import Image
from safetensors.torch import save_file

import prepare_dataset
from args import parse_prepare_args
from clip_lists import write_table
from common.folder_lock import locked_folder
from data.buckets import Bucket
from data.clips import Clip, ClipSample
from data.sources import DataSource, read_clips
from diffusion.latents import image_noise_scales
from diffusion.randomness import step_generator
from encoded_clips import all_frames
from make_full_size_model import full_size_configs
from models.encoding import encode_noised_images, encode_prompts, encode_videos
from models.source import ModelSource
from planning.plan import plan_raw_clips
from preparation.prepare import name_sample, needs_tiles, tensor_bytes, warn_of_overflow
from preparation.report import REPORT_FILE
from prepared.folder import read_empty_prompt, read_tensor
from prepared.index import PreparedClip
from prepared.read_index import read_index
from prepared_folders import rows_of
from video.probe import VideoInfo, probe_video


FRAMES = 5
SIZES = ["--height_buckets", "96", "128", "144", "192", "--width_buckets", "128", "160", "192", "208"]
FILES = {"videos": ".mp4", "prompts": ".txt", "video_latents": ".pt", "prompt_embeds": ".pt"}
Rows = Sequence[tuple[Path, str]]


@pytest.fixture(scope="module")
def model(tiny_models) -> Path:
    return tiny_models("5b")


@pytest.fixture(scope="module")
def vae(model) -> AutoencoderKLCogVideoX:
    return ModelSource(str(model)).load_vae(torch.float32, slicing=False, tiling=False)


@pytest.fixture(scope="module")
def pipeline(model) -> CogVideoXPipeline:
    return ModelSource(str(model)).load_text_pipeline(torch.float32)


@pytest.fixture(scope="module")
def all_rows(demo_clips) -> list[tuple[Path, str]]:
    captions = (demo_clips / "prompts.txt").read_text().splitlines()
    return list(zip(sorted((demo_clips / "videos").iterdir()), captions, strict=True))


@pytest.fixture(scope="module")
def rows(all_rows) -> list[tuple[Path, str]]:
    """Clips of five sizes and their captions."""
    return all_rows[:5]


@pytest.fixture(scope="module")
def small(all_rows) -> list[tuple[Path, str]]:
    """Two of the smallest clips, 96 x 160, for tests that prepare data."""
    return [all_rows[2], all_rows[7]]


def write_data(folder: Path, rows: Rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "videos.txt").write_text("".join(f"{video}\n" for video, _ in rows))
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for _, caption in rows))
    return folder


def flags_of(model: Path, data: Path, output: Path, *flags: str) -> list[str]:
    """Return the flags; the data sets share clips outside of their folders."""
    places = ["--model_id", str(model), "--data_root", str(data), "--output_dir", str(output), "--allow_outside_paths"]
    frames = ["--frame_buckets", str(FRAMES), "--max_num_frames", str(FRAMES)]
    return [*places, *SIZES, *frames, *flags]


def prepare(model: Path, data: Path, output: Path, *flags: str, tensors: bool = True) -> Path:
    save = ["--save_latents_and_embeddings"] if tensors else []
    prepare_dataset.main(flags_of(model, data, output, *save, *flags))
    return output


def refuse(capsys, *arguments: object) -> str:
    """Run the script with arguments of `prepare` that lead to an error; return what it writes to stderr."""
    with pytest.raises(SystemExit, match=r"^2$"):
        prepare(*arguments)
    return capsys.readouterr().err


def entries_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[Path, bytes]:
    """Return all files but the report, which shows the command."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != REPORT_FILE)
    return {path.relative_to(folder): path.read_bytes() for path in files}


def times_of(folder: Path) -> dict[Path, int]:
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.glob("*/*")}


def tensors_of(clip: PreparedClip) -> tuple[torch.Tensor, torch.Tensor]:
    return read_tensor(clip.video_latents), read_tensor(clip.prompt_embeds)


def test_controls_are_encoded_like_clips_and_have_names_of_their_own(model, small, tmp_path):
    """Listed controls; one of them is the clip itself."""
    data = write_data(tmp_path / "data", small)
    videos = (data / "videos.txt").read_text().splitlines()
    shutil.copy(data / videos[0], data / "control.mp4")
    (data / "controls.txt").write_text(f"control.mp4\n{videos[1]}\n")
    listed = prepare(model, data, tmp_path / "listed", "--save_control_latents")
    clips = read_index(listed)
    assert len(clips) == 2
    for clip in clips:
        assert torch.equal(read_tensor(clip.control_latents), read_tensor(clip.video_latents))
    flags = ("--save_control_latents", "--compute_control", "grey", "--save_latents_and_embeddings")
    computed = read_index(prepare(model, data, tmp_path / "computed", *flags))
    assert not {clip.name for clip in computed} & {clip.name for clip in clips}
    settings = parse_prepare_args(flags_of(model, data, tmp_path / "computed", *flags))
    planned = plan_raw_clips(settings.sources, settings.clips, control=settings.control).clips
    num_bytes = tensor_bytes(settings, ModelSource(str(model)).configs(), planned)["latents"]
    tensors = [read_tensor(one) for clip in computed for one in (clip.video_latents, clip.control_latents)]
    assert num_bytes == sum(tensor.nbytes for tensor in tensors)


def frames_of(clip: Path) -> np.ndarray:
    """Return the frames of the bucket, `[F, H, W, 3]`: spread from first to last, halves rounded up."""
    frames = all_frames(clip)
    return frames[[(2 * i * (len(frames) - 1) + FRAMES - 1) // (2 * (FRAMES - 1)) for i in range(FRAMES)]]


@pytest.fixture(scope="module")
def prepared(model, rows, tmp_path_factory) -> Path:
    """The five clips, prepared with first frames, in shards; read-only."""
    root = tmp_path_factory.mktemp("prepared")
    return prepare(model, write_data(root / "data", rows), root / "out", "--save_image_latents")


@pytest.fixture(scope="module")
def prepared_files(model, small, tmp_path_factory) -> Path:
    """The two small clips, prepared with first frames, one file per tensor; read-only."""
    root = tmp_path_factory.mktemp("files")
    return prepare(model, write_data(root / "data", small), root / "out", "--save_image_latents", "--layout", "files")


@pytest.fixture(scope="module")
def prepared_once(model, small, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("small")
    return prepare(model, write_data(root / "data", small), root / "out")


@pytest.fixture
def prepared_small(small, prepared_once, tmp_path) -> tuple[Path, Path]:
    """(data, output) of the two small clips, which a test may change."""
    return write_data(tmp_path / "data", small), Path(shutil.copytree(prepared_once, tmp_path / "out"))


def test_the_folder_has_the_documented_files(prepared):
    files = {"prepared.json", "index.arrow", "empty_prompt.safetensors", "report.html"}
    assert {path.name for path in prepared.iterdir()} == files | {"latents", "prompt_embeds"}
    # Five clips of five sizes: a shard for each; the captions are in one.
    assert len(list((prepared / "latents").glob("*.safetensors"))) == 5
    assert len(list((prepared / "prompt_embeds").glob("*.safetensors"))) == 1


def test_the_index_lists_the_origin_of_each_sample_in_order(prepared, rows):
    assert [clip.name for clip in read_index(prepared)] == [row["name"] for row in rows_of(prepared)]
    for number, ((video, caption), row) in enumerate(zip(rows, rows_of(prepared), strict=True), 1):
        num_frames, height, width, _ = all_frames(video).shape
        assert row["name"].startswith(f"{video.stem}-")
        assert (row["clip"], row["caption"], row["source"]) == (str(video), caption, f"videos.txt:{number}")
        assert (row["num_frames"], row["height"], row["width"]) == (FRAMES, height, width)
        assert (row["first_frame"], row["last_frame"]) == (0, num_frames - 1)
        assert row["content"] == hashlib.sha256(video.read_bytes()).hexdigest()[:16]


def test_the_latents_are_the_moments_of_the_clips(prepared, vae, rows):
    for number in (2, 4):
        video = torch.from_numpy(frames_of(rows[number][0]).transpose(0, 3, 1, 2).copy())[None]
        moments = read_tensor(read_index(prepared)[number].video_latents)
        assert moments.shape == (32, 2, video.shape[-2] // 8, video.shape[-1] // 8)
        assert torch.equal(moments, encode_videos(vae, video)[0])


def test_captions_and_the_empty_prompt_are_embedded(prepared, prepared_files, pipeline, rows):
    for (_, caption), clip in zip(rows, read_index(prepared), strict=True):
        assert torch.equal(read_tensor(clip.prompt_embeds), encode_prompts(pipeline, [caption])[0])
    empty = encode_prompts(pipeline, [""])[0]
    assert all(torch.equal(read_empty_prompt(folder), empty) for folder in (prepared, prepared_files))


def test_captions_can_be_embedded_by_the_text_encoder_in_8_bits(model, small, tmp_path):
    folder = prepare(model, write_data(tmp_path / "data", small[:1]), tmp_path / "out", "--text_encoder_8bit")
    pipeline = ModelSource(str(model)).load_text_pipeline(torch.float32, in_8bit=True)
    (clip,) = read_index(folder)
    assert torch.equal(read_tensor(clip.prompt_embeds), encode_prompts(pipeline, [small[0][1]])[0])
    assert torch.equal(read_empty_prompt(folder), encode_prompts(pipeline, [""])[0])


def noised_latents(vae: AutoencoderKLCogVideoX, name: str, image: np.ndarray, count: int) -> torch.Tensor:
    """The latents `[count, 2C, 1, h, w]` of an image `[H, W, 3]` under the noise of a sample."""
    generator = step_generator(torch.device("cpu"), 42, name)
    scales = image_noise_scales(count, generator)
    return encode_noised_images(vae, torch.from_numpy(image.transpose(2, 0, 1).copy())[None], scales, generator)


def test_the_first_frame_is_encoded_under_noise_of_several_strengths(prepared, vae, rows):
    clip = read_index(prepared)[2]
    latents = read_tensor(clip.image_latents)
    assert latents.shape == (4, 32, 1, 12, 20)
    first = frames_of(rows[2][0])[0]
    assert torch.equal(latents, noised_latents(vae, clip.name, first, 4))
    # The more noise, the further from the encoding of the clean frame.
    clean = encode_videos(vae, torch.from_numpy(first.transpose(2, 0, 1).copy())[None, None])[0]
    distances = [float((latent - clean)[:16].abs().mean()) for latent in latents]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_an_image_of_the_user_replaces_the_first_frame(model, vae, small, tmp_path):
    video, caption = small[0]
    data = write_data(tmp_path / "data", [(video, caption)])
    image = np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8)
    Image.fromarray(image).save(data / "start.png")
    (data / "images.txt").write_text("start.png\n")
    folder = prepare(model, data, tmp_path / "out", "--save_image_latents", "--num_image_latents", "1")
    (clip,) = read_index(folder)
    assert torch.equal(read_tensor(clip.image_latents), noised_latents(vae, clip.name, image, 1))


def test_flags_set_the_dtype_and_the_length_of_embeddings(model, small, tmp_path):
    data = write_data(tmp_path / "data", small[:1])
    folder = prepare(model, data, tmp_path / "out", "--dtype", "bf16", "--max_sequence_length", "64")
    (clip,) = read_index(folder)
    tensors = [*tensors_of(clip), read_empty_prompt(folder)]
    assert [tensor.dtype for tensor in tensors] == [torch.bfloat16] * 3
    assert [len(embeds) for embeds in tensors[1:]] == [64, 64]


def test_a_table_has_the_same_tensors_as_the_two_lists(model, small, prepared_small, tmp_path):
    """Names depend on the content, so that another format of the list prepares nothing again."""
    data, folder = prepared_small
    rows = [{"video": str(video), "caption": caption} for video, caption in small]
    table = write_table(tmp_path / "metadata.jsonl", rows)
    before = times_of(folder)
    prepare(model, data, folder, "--dataset_file", str(table))
    assert times_of(folder) == before
    assert [row["source"] for row in rows_of(folder)] == ["metadata.jsonl:1", "metadata.jsonl:2"]


def test_identical_captions_are_embedded_once_and_identical_clips_encoded_once(model, small, tmp_path):
    (first, _), (second, _) = small
    rows = [(first, "a circle"), (second, "a circle"), (first, "another caption"), (first, "a circle")]
    folder = prepare(model, write_data(tmp_path / "data", rows), tmp_path / "out", "--batch_size", "7")
    one, two, three, repeated = read_index(folder)
    assert one == repeated  # repeated lines give a clip more weight
    assert one.prompt_embeds == two.prompt_embeds != three.prompt_embeds
    assert one.video_latents == three.video_latents != two.video_latents


def test_clips_of_the_same_name_do_not_collide(model, small, tmp_path):
    rows = []
    for number, (video, caption) in enumerate(small):
        path = tmp_path / f"scene-{number}" / "clip.mp4"
        path.parent.mkdir()
        rows.append((Path(shutil.copy(video, path)), caption))
    first, second = read_index(prepare(model, write_data(tmp_path / "data", rows), tmp_path / "out"))
    assert not torch.equal(read_tensor(first.video_latents), read_tensor(second.video_latents))


def test_the_index_has_the_repeats_of_a_mix(model, small, tmp_path):
    for name, row in zip("ab", small, strict=True):
        write_data(tmp_path / name, [row])
    mix = tmp_path / "mix.json"
    mix.write_text(json.dumps([{"data_root": str(tmp_path / "a"), "repeats": 3}, {"data_root": str(tmp_path / "b")}]))
    flags = flags_of(model, tmp_path, tmp_path / "out", "--dataset_mix", str(mix), "--save_latents_and_embeddings")
    at = flags.index("--data_root")
    prepare_dataset.main(flags[:at] + flags[at + 2 :])
    assert [clip.repeats for clip in read_index(tmp_path / "out")] == [3, 1]


def test_latents_do_not_depend_on_batches_and_workers(model, prepared_small, tmp_path):
    data, one_by_one = prepared_small
    together = prepare(model, data, tmp_path / "together", "--batch_size", "2", "--dataloader_num_workers", "1")
    for ours, theirs in zip(read_index(one_by_one), read_index(together), strict=True):
        assert ours.name == theirs.name
        pair = read_tensor(theirs.video_latents), read_tensor(ours.video_latents)
        torch.testing.assert_close(*pair, atol=2e-3, rtol=0)


def test_a_split_clip_becomes_several_samples(model, vae, small, tmp_path):
    data = write_data(tmp_path / "data", small[:1])
    folder = prepare(model, data, tmp_path / "out", "--long_clips", "split")
    num_frames = len(all_frames(small[0][0]))
    starts = range(0, num_frames - FRAMES + 1, FRAMES)
    assert [[row["first_frame"], row["last_frame"]] for row in rows_of(folder)] == [
        [at, at + FRAMES - 1] for at in starts
    ]
    last = all_frames(small[0][0])[starts[-1] : starts[-1] + FRAMES].transpose(0, 3, 1, 2).copy()
    moments = read_tensor(read_index(folder)[-1].video_latents)
    assert torch.equal(moments, encode_videos(vae, torch.from_numpy(last)[None])[0])


def test_the_report_shows_the_clips_as_the_model_sees_them(prepared, rows):
    page = (prepared / "report.html").read_text(encoding="utf-8")
    assert "5 samples are prepared" in page
    pictures = re.findall(r'src="data:image/jpeg;base64,(.*?)"', page)
    shown = [np.asarray(Image.open(BytesIO(b64decode(picture))), dtype=int) for picture in pictures]
    truth = [frames_of(video)[place] for video, _ in rows for place in (0, FRAMES // 2, FRAMES - 1)]
    assert len(shown) == len(truth)
    for frame in truth:  # in the order of the buckets
        assert min(np.abs(one - frame).mean() for one in shown if one.shape == frame.shape) < 3


def test_layout_files_is_that_of_the_original_script(prepared_files, small):
    names = {path.stem for path in (prepared_files / "videos").iterdir()}
    assert len(names) == 2
    for kind, suffix in {**FILES, "images": ".png", "image_latents": ".pt"}.items():
        assert {path.name for path in (prepared_files / kind).iterdir()} == {name + suffix for name in names}
    lists = {"prepared.json", "data.jsonl", "prompts.txt", "videos.txt", "empty_prompt.safetensors", "report.html"}
    assert {path.name for path in prepared_files.iterdir()} == lists | {*FILES, "images", "image_latents"}
    for (_, caption), entry in zip(small, entries_of(prepared_files), strict=True):
        assert (prepared_files / entry["prompt"]).read_text() == caption
    assert read_tensor(read_index(prepared_files)[0].image_latents).shape == (32, 1, 12, 20)


def test_both_layouts_have_the_same_tensors(prepared_files, prepared_once):
    for one, other in zip(read_index(prepared_files), read_index(prepared_once), strict=True):
        assert all(torch.equal(*pair) for pair in zip(tensors_of(one), tensors_of(other), strict=True))


def test_the_preview_shows_the_frames_of_the_bucket(prepared_files, small):
    entry = entries_of(prepared_files)[0]
    with av.open(prepared_files / entry["video"]) as container:
        assert container.streams.video[0].average_rate == 8
    shown, seen = all_frames(prepared_files / entry["video"]), frames_of(small[0][0])
    assert shown.shape == seen.shape == (FRAMES, 96, 160, 3)
    assert np.abs(shown.astype(int) - seen).mean() < 6  # H.264 is lossy; another frame is far off
    assert np.array_equal(np.asarray(Image.open(prepared_files / entry["image"])), seen[0])


def test_without_tensors_the_folder_is_a_data_set_of_raw_clips(model, small, tmp_path):
    data = write_data(tmp_path / "data", small)
    folder = prepare(model, data, tmp_path / "out", "--target_fps", "12", tensors=False)
    written = {"prepared.json", "prompts.txt", "videos.txt", "videos", "prompts", "report.html"}
    assert {path.name for path in folder.iterdir()} == written
    clips, bad = read_clips(DataSource(folder), tmp_path / "cache")
    assert not bad
    assert [clip.caption for clip in clips] == [caption for _, caption in small]
    assert all(all_frames(clip.video).shape == (FRAMES, 96, 160, 3) for clip in clips)
    with av.open(clips[0].video) as container:
        assert container.streams.video[0].average_rate == 12


def test_a_second_run_writes_nothing_and_loads_no_model_wherever_the_model_is(tiny_models, prepared_small, tmp_path):
    data, folder = prepared_small
    before = times_of(folder)
    elsewhere = Path(shutil.copytree(tiny_models("5b"), tmp_path / "elsewhere"))
    prepare(elsewhere, data, folder)
    everything = contents(folder)
    for weights in elsewhere.glob("*/*.safetensors"):
        weights.unlink()
    prepare(elsewhere, data, folder)
    assert times_of(folder) == before
    assert contents(folder) == everything


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_folder_without_an_empty_prompt_gets_one(model, prepared_small, monkeypatch, order):
    """Folders of older versions have none."""
    data, folder = prepared_small
    before, whole = times_of(folder), contents(folder)
    (folder / "empty_prompt.safetensors").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in order:
        monkeypatch.setenv("RANK", str(rank))
        prepare(model, data, folder)
    assert times_of(folder) == before
    assert contents(folder) == whole


@pytest.mark.parametrize("kind", FILES)
def test_files_that_a_killed_run_did_not_write_are_added(model, prepared_files, small, tmp_path, kind):
    data, folder = write_data(tmp_path / "data", small), Path(shutil.copytree(prepared_files, tmp_path / "out"))
    before, whole = times_of(folder), contents(folder)
    lost, kept = entries_of(folder)
    (folder / kind / f"{Path(lost['video']).stem}{FILES[kind]}").unlink()
    (folder / "data.jsonl").unlink()  # written last, so a killed run has none
    prepare(model, data, folder, "--save_image_latents", "--layout", "files")
    after = times_of(folder)
    assert all(after[Path(kept[role])] == before[Path(kept[role])] for role in ("video", "video_latent", "prompt"))
    assert contents(folder) == whole


def test_flips_and_crops_do_not_depend_on_the_order_of_the_list(model, all_rows, tmp_path):
    flags = ["--random_flip=0.5", "--video_reshape_mode=random", "--height_buckets=64", "--width_buckets=96"]
    rows = all_rows[:4]
    one, other = (
        prepare(model, write_data(tmp_path / name, listed), tmp_path / f"out-{name}", *flags)
        for name, listed in (("forward", rows), ("backward", rows[::-1]))
    )
    theirs = {clip.name: clip for clip in read_index(other)}
    for clip in read_index(one):
        assert torch.equal(read_tensor(clip.video_latents), read_tensor(theirs[clip.name].video_latents))


def test_only_a_changed_caption_is_embedded_again(model, pipeline, small, prepared_small):
    data, folder = prepared_small
    before, (changed, kept) = times_of(folder), read_index(folder)
    write_data(data, [(small[0][0], "another caption"), small[1]])
    prepare(model, data, folder)
    clip, unchanged = read_index(folder)
    assert unchanged == kept
    assert clip.video_latents == changed.video_latents
    assert torch.equal(read_tensor(clip.prompt_embeds), encode_prompts(pipeline, ["another caption"])[0])
    after = times_of(folder)
    assert all(after[path] == time for path, time in before.items())
    assert len(after) == len(before) + 1


def test_a_changed_clip_is_encoded_again(model, all_rows, small, prepared_small, tmp_path):
    data, folder = prepared_small
    path = Path(shutil.copy(small[0][0], tmp_path / "clip.mp4"))
    write_data(data, [(path, small[0][1])])
    prepare(model, data, folder)
    (before,) = read_index(folder)
    shutil.copy(small[1][0], path)
    prepare(model, data, folder)
    (after,) = read_index(folder)
    assert before.name != after.name
    assert not torch.equal(read_tensor(before.video_latents), read_tensor(after.video_latents))


def test_samples_keep_their_names_unless_their_pictures_are_corrected(tmp_path):
    settings = parse_prepare_args(["--model_id", "a/b", "--data_root", str(tmp_path), "--output_dir", "out"])

    def name(**facts):
        info = VideoInfo(9, 64, 64, 8.0, sha256="ab" * 32, **facts)
        clip = Clip(Path("clip.mp4"), "A cat.", "list:1")
        return name_sample(ClipSample(clip, info, Bucket(9, 64, 64), tuple(range(9))), settings).name

    # As versions before corrections named it: their latents are still found.
    assert name() == name(rotation=90, seekable=True) == "clip-5f7242fe5083f3b4"
    assert len({name(), name(corrections=("mirrored",)), name(corrections=("deinterlaced",))}) == 3


def test_samples_with_and_without_a_mask_of_their_own_have_different_names(tmp_path):
    """The first three are the names of earlier versions, whose latents are still found."""
    info = VideoInfo(9, 64, 64, 8.0, sha256="ab" * 32)
    planned = ClipSample(
        Clip(Path("clip.mp4"), "A cat.", "list:1"), info, Bucket(9, 64, 64), tuple(range(9)), mask=info
    )
    places = ["--model_id", "a/b", "--data_root", str(tmp_path), "--output_dir", "out"]
    fills = ["--save_control_latents", "--compute_control", "inpaint"]
    names = []
    for flags in ([], ["--use_masks"], fills, [*fills, "--use_masks"]):
        settings = parse_prepare_args([*places, "--save_latents_and_embeddings", *flags])
        names.append(name_sample(planned, settings).name)
    assert names[:3] == ["clip-58f8c20be23a3565", "clip-56bf4949ed1e2be8", "clip-3c9279ef60ad79c7"]
    assert names[3] not in names[:3]


def test_a_clip_removed_from_the_list_is_removed_from_the_index(model, small, prepared_small):
    data, folder = prepared_small
    _, kept = rows_of(folder)
    write_data(data, small[1:])
    prepare(model, data, folder)
    assert [row["name"] for row in rows_of(folder)] == [kept["name"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "bf16"], "dtype was 'fp32', is now 'bf16'"),
        (["--text_encoder_8bit"], "dtype was 'fp32', is now 'fp32, text encoder in 8 bits'"),
        (["--max_sequence_length", "64"], "max_sequence_length was 226, is now 64"),
        (["--layout", "files"], "layout was 'shards', is now 'files'"),
    ],
)
def test_a_folder_prepared_with_other_settings_is_refused(model, prepared_small, capsys, flags, message):
    data, folder = prepared_small
    before = contents(folder)
    error = refuse(capsys, model, data, folder, *flags).splitlines()[-1]
    assert error.startswith("error: --output_dir: ")
    assert message in error
    assert contents(folder) == before


def test_tiles_are_used_only_if_memory_asks_for_them(tmp_path, caplog):
    def needs(*flags: str, gigabytes: float) -> bool:
        argv = ["--data_root", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--dtype", "bf16", *flags]
        sizes = {Bucket(9, 480, 720), Bucket(49, 480, 720)}
        return needs_tiles(parse_prepare_args(argv), full_size_configs("5b"), sizes, int(gigabytes * 2**30))

    # 6.3 GB for the activations, and a quarter more.
    assert not needs(gigabytes=8)
    assert "49x480x720" not in caplog.text
    with caplog.at_level("INFO"):
        assert needs(gigabytes=7.5)
    assert "encoding 49x480x720 takes 7.84 GB, 7.50 GB are free: the VAE encodes tiles; --no-use_tiling" in caplog.text
    assert needs("--batch_size", "4", gigabytes=24)
    assert not needs("--batch_size", "4", "--use_slicing", gigabytes=24)


def test_a_folder_keeps_its_decision_on_tiles(model, small, tmp_path, capsys):
    data = write_data(tmp_path / "data", small[:1])
    folder = prepare(model, data, tmp_path / "out", "--use_tiling")
    before = contents(folder)
    prepare(model, data, folder)
    assert json.loads(before[Path("prepared.json")])["tiling"] is True
    assert contents(folder) == before
    assert "tiling was True, is now False" in refuse(capsys, model, data, folder, "--no-use_tiling")


def test_another_preparation_into_the_same_folder_is_refused_until_the_first_ends(model, prepared_small, capsys):
    data, output = prepared_small
    before = (output / "index.arrow").read_bytes()
    with locked_folder(output, "other clips"), pytest.raises(SystemExit, match="2"):
        prepare(model, data, output)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(rf"error: --output_dir: process {os.getpid()} on .* is writing to '{output}'; .*", said)
    prepare(model, data, output)
    assert (output / "index.arrow").read_bytes() == before


def test_a_folder_prepared_with_another_vae_is_refused(tiny_models, prepared_small, tmp_path, capsys):
    data, folder = prepared_small
    model = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    (weights,) = (model / "vae").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "(another vae)" in refuse(capsys, model, data, folder)


@pytest.fixture
def with_broken(small, tmp_path) -> tuple[Path, Path]:
    """A data set of two good clips and a clip that can be probed but not decoded; and that clip."""
    broken = tmp_path / "broken.mp4"
    with av.open(str(broken), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"g": "5", "bf": "0", "x264-params": "scenecut=0"})
        stream.width, stream.height = 160, 96
        for shift in range(40):
            picture = np.roll(np.random.default_rng(0).integers(0, 255, (96, 160, 3), np.uint8), shift, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    content = bytearray(broken.read_bytes())
    with av.open(str(broken)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[8:20]:
        content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    broken.write_bytes(content)
    assert probe_video(broken).num_frames == 40
    return write_data(tmp_path / "data", [small[0], (broken, "a broken clip"), small[1]]), broken


def test_broken_clips_are_listed_at_the_end_and_the_others_are_kept(model, with_broken, tmp_path, capsys):
    data, broken = with_broken
    folder = tmp_path / "out"
    error = refuse(capsys, model, data, folder, "--shard_size_mb", "1")
    assert str(broken) in error
    assert "--on_bad_clip skip" in error
    assert not (folder / "index.arrow").exists()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_broken_clips_can_be_skipped_whichever_rank_is_last(model, with_broken, tmp_path, monkeypatch, order):
    data, broken = with_broken
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in order:
        monkeypatch.setenv("RANK", str(rank))
        folder = prepare(model, data, tmp_path / "out", "--on_bad_clip", "skip")
    assert len(read_index(folder)) == 2
    with open(folder / "skipped_clips.csv", newline="", encoding="utf-8") as file:
        _, (clip, source, reason) = csv.reader(file)
    assert (clip, source) == (str(broken), "videos.txt:2")
    assert reason
    assert not (folder / ".staging").exists()


@pytest.mark.parametrize("name", ["broken.mp4", ".hidden\u2603 clip.mp4"])
def test_nothing_is_prepared_if_every_clip_is_broken(model, with_broken, tmp_path, capsys, name):
    _, broken = with_broken
    data = write_data(tmp_path / "broken-data", [(broken.rename(tmp_path / name), "a caption")])
    error = refuse(capsys, model, data, tmp_path / "out", "--on_bad_clip", "skip")
    assert "none of the clips can be used" in error
    assert not (tmp_path / "out" / "index.arrow").exists()


@pytest.mark.parametrize(("stored", "warns"), [(torch.bfloat16, True), (torch.float16, False)])
def test_fp16_causes_a_warning_for_encoders_in_bfloat16(tmp_path, caplog, stored, warns):
    (tmp_path / "text_encoder").mkdir()
    save_file({"weight": torch.zeros(1, dtype=stored)}, tmp_path / "text_encoder" / "model.safetensors")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        warn_of_overflow(dtype, ModelSource(str(tmp_path)))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == warns
    assert all(line.startswith("warning: --dtype fp16: ") and line.endswith("use --dtype bf16") for line in warnings)


@pytest.mark.parametrize(("layout", "done"), [("shards", "prepared"), ("files", "prepared_files")])
def test_the_size_on_disk_is_known_before_anything_is_encoded(model, request, layout, done):
    folder = request.getfixturevalue(done)
    flags = ("--save_latents_and_embeddings", "--save_image_latents", "--layout", layout)
    settings = parse_prepare_args(flags_of(model, folder.parent / "data", folder, *flags))
    data = plan_raw_clips(settings.sources, settings.clips, with_images=True)
    sizes = tensor_bytes(settings, ModelSource(str(model)).configs(), data.clips)
    clips = read_index(folder)
    latents = [read_tensor(stored) for clip in clips for stored in (clip.video_latents, clip.image_latents)]
    captions = [read_tensor(clip.prompt_embeds) for clip in clips] + [read_empty_prompt(folder)]
    assert sizes == {"latents": sum(one.nbytes for one in latents), "captions": sum(one.nbytes for one in captions)}


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ([], "text-to-video training will refuse this: --height_buckets, --width_buckets: this CogVideoX 1.5"),
        (
            ["--save_image_latents"],
            "image-to-video training will refuse this: --pretrained_model_name_or_path: this is a text-to-video model",
        ),
    ],
)
def test_what_training_will_refuse_is_a_warning_in_the_plan(tiny_models, small, tmp_path, capsys, flags, refused):
    prepare(tiny_models("1.5-5b"), write_data(tmp_path / "data", small), tmp_path / "out", "--dry_run", *flags)
    assert f"warning: {refused}" in capsys.readouterr().err


def test_controls_of_as_many_frames_as_no_model_takes_are_not_encoded(model, small, tmp_path, capsys):
    data, flags = write_data(tmp_path / "data", small), ("--save_control_latents", "--compute_control", "grey")
    flags = (*flags, "--frame_buckets", "4")
    refused = "control-to-video training will refuse this: --frame_buckets, --max_num_frames: with a control"
    assert f"error: {refused}" in refuse(capsys, model, data, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
    prepare(model, data, tmp_path / "plan", "--dry_run", *flags)
    assert f"warning: {refused}" in capsys.readouterr().err


def test_clips_are_chosen_by_their_scores_in_a_dry_run_and_in_the_preparation(model, small, tmp_path, capsys):
    data = write_data(tmp_path / "data", small)
    write_table(data / "scores.csv", [{"video": str(video), "motion": str(n)} for n, (video, _) in enumerate(small)])
    chosen = ("--keep", "motion>0")
    prepare(model, data, tmp_path / "plan", "--dry_run", *chosen)
    assert "1 of 2 clips are dropped by --keep" in capsys.readouterr().err
    folder = prepare(model, data, tmp_path / "out", *chosen, tensors=False)
    assert (folder / "prompts.txt").read_text().splitlines() == [small[1][1]]
    for file in (tmp_path / "plan/plan.csv", folder / "skipped_clips.csv"):
        assert f"{small[0][0]}" in file.read_text() and "dropped by --keep: motion is 0" in file.read_text()
    assert json.loads((folder / "prepared.json").read_text())["flags"]["keep"] == "motion>0"
    prepare(model, data, folder, tensors=False)  # now all of them
    assert (folder / "prompts.txt").read_text().splitlines() == [caption for _, caption in small]
    assert not (folder / "skipped_clips.csv").exists()


def test_a_dry_run_writes_only_the_plan(model, rows, tmp_path, capsys):
    data = write_data(tmp_path / "data", [*rows, (tmp_path / "missing.mp4", "not there")])
    assert "missing.mp4" in refuse(capsys, model, data, tmp_path / "out", "--dry_run")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.csv", "contact_sheet.png", "report.html"}
    with open(tmp_path / "out" / "plan.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.width >= 600
    prepare(model, write_data(tmp_path / "data", rows), tmp_path / "out", "--dry_run", "--on_bad_clip", "skip")
    assert "the tensors take " in capsys.readouterr().err
