"""prepare_dataset.py end to end on a tiny model: what it writes, and what a second run does.

Every clip gets a bucket of its own size, so that nothing is resized and the expected latents follow from its frames.
"""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from PIL import Image

import prepare_dataset
from args import parse_prepare_args
from buckets import Bucket
from clips import load_clips
from models import ModelSource, encode_prompts, encode_videos
from plan import plan_raw_clips
from preparation import NamedClip, clip_name, encode_clips
from prepared import read_index, read_tensor


FRAMES = 5
SIZES = ["--height_buckets", "96", "128", "144", "192", "--width_buckets", "128", "160", "192", "208"]
KINDS = {"videos": ".mp4", "prompts": ".txt", "video_latents": ".pt", "prompt_embeds": ".pt"}
Rows = Sequence[tuple[Path, str]]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Each run is a process of its own for its users; accelerate keeps one state per process."""
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def model(tiny_models) -> Path:
    return tiny_models("5b")


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
    """Two of the smallest clips, 96 x 160, for tests that prepare anew."""
    return [all_rows[2], all_rows[7]]


def write_data(folder: Path, rows: Rows) -> Path:
    """A data set that lists the clips."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "videos.txt").write_text("".join(f"{video}\n" for video, _ in rows))
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for _, caption in rows))
    return folder


def flags_of(model: Path, data: Path, output: Path, *flags: str) -> list[str]:
    places = ["--model_id", str(model), "--data_root", str(data), "--output_dir", str(output)]
    frames = ["--frame_buckets", str(FRAMES), "--max_num_frames", str(FRAMES)]
    return [*places, *SIZES, *frames, *flags]


def prepare(model: Path, data: Path, output: Path, *flags: str, tensors: bool = True) -> Path:
    """Run the script in this process, as a new process would."""
    PartialState._reset_state()
    save = ["--save_latents_and_embeddings"] if tensors else []
    prepare_dataset.main(flags_of(model, data, output, *save, *flags))
    return output


def entries_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def names_of(folder: Path, kind: str) -> set[str]:
    return {path.stem for path in (folder / kind).iterdir()}


def times_of(folder: Path) -> dict[Path, int]:
    """When each file of a clip was written."""
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.glob("*/*")}


def decode(path: Path) -> np.ndarray:
    """The truth: every frame, as PyAV decodes them one after another."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def frames_of(clip: Path) -> np.ndarray:
    """The frames that belong into the bucket: spread from first to last, halves rounded up. `[F, H, W, 3]`"""
    frames = decode(clip)
    return frames[[(2 * i * (len(frames) - 1) + FRAMES - 1) // (2 * (FRAMES - 1)) for i in range(FRAMES)]]


@pytest.fixture(scope="module")
def prepared(model, rows, tmp_path_factory) -> Path:
    """The five clips, prepared with first frames; not to be changed."""
    root = tmp_path_factory.mktemp("prepared")
    folder = prepare(model, write_data(root / "data", rows), root / "out", "--save_image_latents")
    PartialState._reset_state()
    return folder


@pytest.fixture(scope="module")
def prepared_once(model, small, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("small")
    folder = prepare(model, write_data(root / "data", small), root / "out")
    PartialState._reset_state()
    return folder


@pytest.fixture
def prepared_small(small, prepared_once, tmp_path) -> tuple[Path, Path]:
    """(data, output) of the two small clips, to be changed at will."""
    return write_data(tmp_path / "data", small), Path(shutil.copytree(prepared_once, tmp_path / "out"))


# What is written


def test_the_folder_holds_what_its_documentation_lists(prepared):
    names = names_of(prepared, "videos")
    assert len(names) == 5
    for kind, suffix in {**KINDS, "images": ".png", "image_latents": ".pt"}.items():
        assert {path.name for path in (prepared / kind).iterdir()} == {name + suffix for name in names}
    lists = {"prepared.json", "data.jsonl", "prompts.txt", "videos.txt"}
    folders = {*KINDS, "images", "image_latents"}
    assert {path.name for path in prepared.iterdir()} == lists | folders


def test_the_index_has_each_clips_files_and_size_in_the_order_of_the_list(prepared, rows):
    for (video, _), entry in zip(rows, entries_of(prepared), strict=True):
        name = Path(entry["video"]).stem
        assert name.startswith(video.stem)
        _, height, width, _ = frames_of(video).shape
        assert entry == {
            "prompt": f"prompts/{name}.txt",
            "prompt_embed": f"prompt_embeds/{name}.pt",
            "video": f"videos/{name}.mp4",
            "video_latent": f"video_latents/{name}.pt",
            "image": f"images/{name}.png",
            "image_latent": f"image_latents/{name}.pt",
            "metadata": {"num_frames": FRAMES, "height": height, "width": width},
        }


def test_the_index_is_read_back_as_the_clips_to_train_on(prepared):
    clips = read_index(prepared)
    assert [clip.video_latents for clip in clips] == [prepared / e["video_latent"] for e in entries_of(prepared)]
    assert clips[0].bucket == Bucket(FRAMES, 128, 192)


def test_the_lists_name_the_same_clips(prepared, rows):
    assert (prepared / "prompts.txt").read_text().splitlines() == [caption for _, caption in rows]
    assert (prepared / "videos.txt").read_text().splitlines() == [entry["video"] for entry in entries_of(prepared)]
    for (_, caption), entry in zip(rows, entries_of(prepared), strict=True):
        assert (prepared / entry["prompt"]).read_text() == caption


def test_the_latents_are_the_moments_of_the_clips_own_frames(prepared, model, rows):
    vae = ModelSource(str(model)).load_vae(torch.float32, slicing=False, tiling=False)
    for number in (2, 4):
        video = torch.from_numpy(frames_of(rows[number][0]).transpose(0, 3, 1, 2).copy())[None]
        moments = read_tensor(prepared / entries_of(prepared)[number]["video_latent"])
        assert moments.shape == (32, 2, video.shape[-2] // 8, video.shape[-1] // 8)
        assert torch.equal(moments, encode_videos(vae, video)[0])


def test_the_embeddings_are_those_of_the_captions(prepared, model, rows):
    pipeline = ModelSource(str(model)).load_text_pipeline(torch.float32)
    for (_, caption), entry in zip(rows, entries_of(prepared), strict=True):
        assert torch.equal(read_tensor(prepared / entry["prompt_embed"]), encode_prompts(pipeline, [caption])[0])


def test_the_image_is_the_first_frame_and_its_latent_has_one_frame(prepared, model, rows):
    vae = ModelSource(str(model)).load_vae(torch.float32, slicing=False, tiling=False)
    first, entry = frames_of(rows[2][0])[:1], entries_of(prepared)[2]
    assert np.array_equal(np.asarray(Image.open(prepared / entry["image"])), first[0])
    latent = read_tensor(prepared / entry["image_latent"])
    assert latent.shape == (32, 1, 12, 20)
    assert torch.equal(latent, encode_videos(vae, torch.from_numpy(first.transpose(0, 3, 1, 2).copy())[None])[0])


def test_the_preview_shows_the_clip_as_the_model_sees_it(prepared, rows):
    with av.open(prepared / entries_of(prepared)[2]["video"]) as container:
        assert container.streams.video[0].average_rate == 8
    shown, seen = decode(prepared / entries_of(prepared)[2]["video"]), frames_of(rows[2][0])
    assert shown.shape == seen.shape == (FRAMES, 96, 160, 3)
    assert np.abs(shown.astype(int) - seen).mean() < 6  # H.264 is lossy; another frame is far off


def test_a_preview_plays_at_the_rate_asked_for(model, small, tmp_path):
    data = write_data(tmp_path / "data", small[:1])
    folder = prepare(model, data, tmp_path / "out", "--target_fps", "12", tensors=False)
    (preview,) = (folder / "videos").iterdir()
    with av.open(preview) as container:
        assert container.streams.video[0].average_rate == 12


def test_the_tensors_have_the_dtype_asked_for(model, small, tmp_path):
    data = write_data(tmp_path / "data", small[:1])
    folder = prepare(model, data, tmp_path / "out", "--dtype", "bf16")
    (entry,) = entries_of(folder)
    assert read_tensor(folder / entry["video_latent"]).dtype == torch.bfloat16
    assert read_tensor(folder / entry["prompt_embed"]).dtype == torch.bfloat16


def test_without_tensors_the_folder_is_a_data_set_of_raw_clips(model, rows, small, tmp_path):
    folder = prepare(model, write_data(tmp_path / "data", small), tmp_path / "out", tensors=False)
    assert {path.name for path in folder.iterdir()} == {
        *("prepared.json", "prompts.txt", "videos.txt"),
        *("videos", "prompts"),
    }
    clips = load_clips(folder, dataset_file=None, video_column="video", caption_column="text", id_token=None)
    assert [clip.caption for clip in clips] == [caption for _, caption in small]
    assert all(decode(clip.video).shape == (FRAMES, 96, 160, 3) for clip in clips)


def test_a_table_gives_the_same_files_as_the_two_lists(model, demo_clips, tmp_path):
    """Names come from content, so that moving from one format to the other prepares nothing again."""
    table = (demo_clips / "metadata.csv").read_text().splitlines()[:4]
    short = tmp_path / "metadata.csv"
    short.write_text("\n".join(table) + "\n")
    rows = [tuple(line.split(",", 1)) for line in table[1:]]
    lists = write_data(tmp_path / "data", [(demo_clips / video, caption) for video, caption in rows])
    from_lists = prepare(model, lists, tmp_path / "lists", tensors=False)
    from_table = prepare(model, demo_clips, tmp_path / "table", "--dataset_file", str(short), tensors=False)
    assert len(names_of(from_lists, "videos")) == 3
    assert (from_table / "videos.txt").read_text() == (from_lists / "videos.txt").read_text()
    assert (from_table / "prompts.txt").read_text() == (from_lists / "prompts.txt").read_text()


def test_identical_captions_have_identical_embeddings(model, small, tmp_path):
    rows = [(video, "a circle") for video, _ in small]
    folder = prepare(model, write_data(tmp_path / "data", rows), tmp_path / "out")
    first, second = (read_tensor(folder / entry["prompt_embed"]) for entry in entries_of(folder))
    assert torch.equal(first, second)


def test_clips_of_one_name_in_two_folders_do_not_collide(model, small, tmp_path):
    rows = []
    for number, (video, caption) in enumerate(small):
        path = tmp_path / f"scene-{number}" / "clip.mp4"
        path.parent.mkdir()
        rows.append((Path(shutil.copy(video, path)), caption))
    folder = prepare(model, write_data(tmp_path / "data", rows), tmp_path / "out")
    first, second = (read_tensor(folder / entry["video_latent"]) for entry in entries_of(folder))
    assert not torch.equal(first, second)


def test_a_clip_that_is_listed_many_times_is_in_the_index_as_often(model, small, tmp_path):
    """Repeating lines is how clips are given more weight."""
    data = write_data(tmp_path / "data", [small[0]] * 6 + [small[1]])
    folder = prepare(model, data, tmp_path / "out", "--batch_size", "7")  # all are written at the same time
    assert len(read_index(folder)) == 7
    assert len(names_of(folder, "video_latents")) == 2


def test_larger_batches_and_workers_give_the_same_latents(model, prepared_small, tmp_path):
    data, one_by_one = prepared_small
    together = prepare(model, data, tmp_path / "together", "--batch_size", "2", "--dataloader_num_workers", "1")
    for ours, theirs in zip(entries_of(one_by_one), entries_of(together), strict=True):
        assert ours == theirs
        torch.testing.assert_close(
            read_tensor(together / theirs["video_latent"]),
            read_tensor(one_by_one / ours["video_latent"]),
            atol=2e-3,
            rtol=0,
        )


# The second run


def test_a_second_run_writes_no_clip_again_and_loads_no_model(tiny_models, small, tmp_path):
    model = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    data = write_data(tmp_path / "data", small)
    folder = prepare(model, data, tmp_path / "out")
    before = times_of(folder)
    for weights in model.glob("*/*.safetensors"):
        weights.unlink()
    prepare(model, data, folder)
    assert times_of(folder) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_run_left_out_is_all_that_is_made(model, prepared_small, kind):
    data, folder = prepared_small
    before = times_of(folder)
    lost, kept = entries_of(folder)
    name = Path(lost["video"]).stem
    whole = {path: (folder / path).read_bytes() for path in before}
    (folder / kind / f"{name}{KINDS[kind]}").unlink()
    (folder / "data.jsonl").unlink()  # written last, so never there after a killed run
    prepare(model, data, folder)
    after = times_of(folder)
    assert after.keys() == before.keys()
    assert all(after[Path(kept[role])] == before[Path(kept[role])] for role in kept if role != "metadata")
    assert entries_of(folder) == [lost, kept]
    assert all((folder / path).read_bytes() == content for path, content in whole.items())


def test_a_killed_run_is_continued_with_the_same_flips_and_crops(model, small, tmp_path):
    flags = (
        "--random_flip",
        "0.5",
        "--video_reshape_mode",
        "random",
        "--height_buckets",
        "64",
        "--width_buckets",
        "96",
    )
    data = write_data(tmp_path / "data", [(small[0][0], f"caption {number}") for number in range(4)])
    folder = prepare(model, data, tmp_path / "out", *flags)
    latents = [folder / entry["video_latent"] for entry in entries_of(folder)]
    whole = [read_tensor(path) for path in latents]
    assert not all(torch.equal(*pair) for pair in pairwise(whole))
    for path in latents[1:4]:
        path.unlink()
    prepare(model, data, folder, *flags)
    assert all(torch.equal(read_tensor(path), moments) for path, moments in zip(latents, whole, strict=True))


def test_a_changed_caption_prepares_only_its_own_clip_anew(model, small, prepared_small):
    data, folder = prepared_small
    before, (changed, kept) = times_of(folder), entries_of(folder)
    write_data(data, [(small[0][0], "another caption"), small[1]])
    prepare(model, data, folder)
    after, (entry, unchanged) = times_of(folder), entries_of(folder)
    assert unchanged == kept
    assert entry["video"] != changed["video"]
    assert (folder / entry["prompt"]).read_text() == "another caption"
    assert all(after[path] == time for path, time in before.items())
    assert len(after) == len(before) + len(KINDS)
    assert [clip.name for clip in read_index(folder)] == [Path(e["video"]).stem for e in (entry, unchanged)]
    assert (folder / "prompts.txt").read_text() == f"another caption\n{small[1][1]}\n"


def test_a_clip_taken_from_the_list_is_taken_from_the_index(model, small, prepared_small):
    data, folder = prepared_small
    _, kept = entries_of(folder)
    write_data(data, small[1:])
    prepare(model, data, folder)
    assert entries_of(folder) == [kept]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "bf16"], "dtype was 'fp32', is now 'bf16'"),
        (["--max_sequence_length", "64"], "max_sequence_length was 226, is now 64"),
    ],
)
def test_a_folder_prepared_with_other_settings_is_refused(model, prepared_small, capsys, flags, message):
    data, folder = prepared_small
    before = times_of(folder)
    with pytest.raises(SystemExit) as caught:
        prepare(model, data, folder, *flags)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --output_dir: ")
    assert message in error
    assert times_of(folder) == before


def test_two_ranks_write_every_clip_even_when_one_is_done_before_the_other_begins(model, rows, tmp_path):
    """Nothing makes the ranks look for what is missing at the same time."""
    data = write_data(tmp_path / "data", rows)
    args = parse_prepare_args(flags_of(model, data, tmp_path / "out"))
    clips = [NamedClip(clip_name(planned, args), planned) for planned in plan_raw_clips(args)]
    counts = []
    for rank in (0, 1):
        ranks = SimpleNamespace(
            process_index=rank, num_processes=2, device=torch.device("cpu"), is_local_main_process=False
        )
        encode_clips(args, ModelSource(str(model)), tmp_path / "out", clips, ranks)
        counts.append(len(names_of(tmp_path / "out", "videos")))
    assert counts == [3, 5]
