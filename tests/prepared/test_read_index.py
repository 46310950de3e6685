"""An index is read, converted from older ones, and checked, as `prepared.read_index` documents."""

import json
import math

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from common.text_files import index_lines
from data.buckets import Bucket
from original_folders import write_original_folder
from prepared.folder import PreparedSettings, claim_folder, read_tensor
from prepared.index import IDENTITY, make_table, map_table, write_index
from prepared.read_index import read_index, row_in_shards, sample_in_files, sample_in_shards
from prepared_folders import rows_of, write_prepared


BUCKET = Bucket(9, 64, 96)
SETTINGS = PreparedSettings("files", {}, "fp32", 226, False)
TENSORS = {"video_latents": torch.zeros(32, 3, 8, 12), "prompt_embeds": torch.zeros(226, 64)}
ORIGINAL_IMAGE = {"image_latents": torch.ones(32, 1, 8, 12)}
IMAGES = {"image_latents": torch.ones(2, 32, 1, 8, 12)}
CONTROLS = {"control_latents": torch.ones(32, 3, 8, 12), "mask": torch.ones(3, 8, 12)}


def write_clip(folder, name, **images):
    """Write a clip of `BUCKET` as the original script does, and return its entry."""
    for kind, tensor in (TENSORS | images).items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        torch.save(tensor, folder / kind / f"{name}.pt")
    return sample_in_files(name, BUCKET, with_images=bool(images))


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("images", [{}, IMAGES, IMAGES | CONTROLS])
def test_samples_in_shards_are_read_back(tmp_path, images, older):
    samples = {
        name: {kind: torch.randn(one.shape) for kind, one in (TENSORS | images).items()} for name in ("a", "b.c")
    }
    clips = write_prepared(tmp_path, samples, BUCKET, older=older, repeats=1.5)
    assert [(clip.name, clip.bucket, clip.repeats) for clip in clips] == [("a", BUCKET, 1.5), ("b.c", BUCKET, 1.5)]
    assert (clips[-1].image_latents is not None) == bool(images)
    for kind in CONTROLS:
        assert (getattr(clips[-1], kind) is not None) == (kind in images)
    for kind, tensor in samples["b.c"].items():
        assert torch.equal(read_tensor(getattr(clips[1], kind)), tensor)


def test_an_index_from_before_there_were_controls_masks_and_contents_is_read(tmp_path):
    write_prepared(tmp_path, dict.fromkeys("ab", TENSORS | IMAGES), BUCKET)
    table = pa.ipc.open_file(str(tmp_path / "index.arrow")).read_all().drop_columns([*CONTROLS, "content"])
    with pa.ipc.new_file(str(tmp_path / "index.arrow"), table.schema) as writer:
        writer.write_table(table)
    clips = read_index(tmp_path)
    assert map_table(tmp_path / "index.arrow", IDENTITY)["content"].null_count == 2
    assert clips[1].control_latents is clips[1].mask is None and clips[1].image_latents is not None
    assert [clips.without(kind) for kind in (*CONTROLS, "image_latents")] == [["a", "b"], ["a", "b"], []]


@pytest.mark.parametrize("older", [False, True])
def test_all_missing_tensors_are_listed(tmp_path, older):
    write_prepared(tmp_path, dict.fromkeys("ab", TENSORS), BUCKET, older=older)
    shard = tmp_path / "latents" / "aa.safetensors"
    save_file({"a.video_latents": torch.zeros(1)}, shard)
    with pytest.raises(UserError, match=r"1 files of .* are missing:\n.*aa\.safetensors \(b\.video_latents\)"):
        read_index(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"1 files of .* are missing:\n.*aa\.safetensors$"):
        read_index(tmp_path)


def test_all_missing_files_are_listed(tmp_path):
    (tmp_path / "data.jsonl").write_text(index_lines(sample_in_files(n, BUCKET, with_images=False) for n in "ab"))
    with pytest.raises(UserError, match="4 files") as caught:
        read_index(tmp_path)
    kinds = ("video_latents", "prompt_embeds")
    assert all(f"{kind}/{name}.pt" in str(caught.value) for kind in kinds for name in "ab")


def test_shards_of_the_noted_size_are_not_opened(tmp_path):
    index = write_prepared(tmp_path, {"a": TENSORS}, BUCKET)
    shard = tmp_path / "latents" / "aa.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert list(read_index(tmp_path)) == list(index)
    with pytest.raises(ValueError, match=r"aa\.safetensors cannot be read as a tensor"):
        read_tensor(index[0].video_latents)
    shard.write_bytes(bytes(shard.stat().st_size - 1))
    with pytest.raises(UserError, match=r"aa\.safetensors is damaged"):
        read_index(tmp_path)


def test_lines_of_json_are_converted_again_only_after_a_change(tmp_path):
    write_prepared(
        tmp_path, dict.fromkeys("ab", TENSORS), BUCKET, older=True, caption="a cat", frames=[3, 9], extra={"n": "é"}
    )
    assert [(row["name"], row["caption"], row["first_frame"], row["last_frame"]) for row in rows_of(tmp_path)] == [
        ("a", "a cat", 3, 9),
        ("b", "a cat", 3, 9),
    ]
    assert rows_of(tmp_path)[0]["extra"] == '{"n": "é"}'
    converted, lines = (tmp_path / "index.arrow").stat(), (tmp_path / "index.jsonl").read_text().splitlines()
    assert len(read_index(tmp_path)) == 2
    assert (tmp_path / "index.arrow").stat() == converted
    (tmp_path / "index.jsonl").write_text(lines[1])
    assert [clip.name for clip in read_index(tmp_path)] == ["b"]
    entry = json.loads(lines[0]) | {"name": "c"}
    with pytest.raises(UserError, match=r"\(c\.video_latents\)"):
        (tmp_path / "index.jsonl").write_text(json.dumps(entry))
        read_index(tmp_path)
    shards = [tmp_path / entry[kind] for kind in ("latents", "prompt_embeds")]
    write_index(
        tmp_path, [row_in_shards(sample_in_shards(tmp_path, "a", *shards, "caption of a", BUCKET, with_images=False))]
    )
    assert [clip.name for clip in read_index(tmp_path)] == ["a"]  # a new preparation's index is the only one
    assert not (tmp_path / "index.jsonl").exists()


def test_an_older_folder_that_is_only_for_reading_is_read(tmp_path):
    (tmp_path / "index.arrow").mkdir()  # whoever runs the test may be allowed to write to any folder
    index = write_prepared(tmp_path, dict.fromkeys("ab", TENSORS), BUCKET, older=True, caption="a cat")
    assert [clip.name for clip in index] == ["a", "b"]
    assert index.captions.to_pylist() == ["a cat"]


def test_a_table_that_pandas_wrote_is_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    write_prepared(tmp_path, dict.fromkeys("abc", TENSORS), BUCKET)
    table = pandas.read_feather(tmp_path / "index.arrow")
    table[table.name != "b"].to_feather(tmp_path / "index.arrow")
    index = read_index(tmp_path)
    assert [clip.name for clip in index] == ["a", "c"]
    assert read_tensor(index[1].video_latents).shape == (32, 3, 8, 12)


DAMAGED_ROWS = [
    ({"height": 0}, r"sample 2 \(b\): its size is 9x0x96"),
    ({"width": 2**20}, r"sample 2 \(b\): its size is 9x64x1048576"),
    ({"repeats": 0.0}, r"sample 2 \(b\): .* repeats 0\.0"),
    ({"repeats": math.nan}, r"sample 2 \(b\): .* repeats nan"),
    ({"name": None}, "has no name for some samples"),
    ({"latents": None}, "has no latents for some samples"),
    ({"caption_key": None}, "has no caption_key for some samples"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED_ROWS)
def test_a_damaged_row_of_an_index_is_named(tmp_path, change, message):
    write_prepared(tmp_path, dict.fromkeys("ab", TENSORS), BUCKET)
    first, second = rows_of(tmp_path)
    table = make_table([first, second | change])
    with pa.ipc.new_file(str(tmp_path / "index.arrow"), table.schema) as file:
        file.write_table(table)
    with pytest.raises(UserError, match=rf"index\.arrow:? {message}"):
        read_index(tmp_path)


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: bytes(500)])
def test_a_damaged_index_is_named(tmp_path, damage):
    write_prepared(tmp_path, {"a": TENSORS}, BUCKET)
    (tmp_path / "index.arrow").write_bytes(damage((tmp_path / "index.arrow").read_bytes()))
    with pytest.raises(UserError, match=r"index\.arrow cannot be read as an index \(.*\); remove it and prepare"):
        read_index(tmp_path)


def test_an_index_without_a_column_is_named(tmp_path):
    write_prepared(tmp_path, {"a": TENSORS}, BUCKET)
    table = make_table(rows_of(tmp_path)).drop_columns("width")
    with pa.ipc.new_file(str(tmp_path / "index.arrow"), table.schema) as file:
        file.write_table(table)
    with pytest.raises(UserError, match=r"index\.arrow cannot be read as an index \(.*width"):
        read_index(tmp_path)


def test_a_folder_that_was_never_prepared_or_not_finished_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"--load_tensors: .* has no prepared data .* prepare_dataset\.sh"):
        read_index(tmp_path)
    claim_folder(tmp_path, SETTINGS)
    write_clip(tmp_path, "a")
    with pytest.raises(UserError, match=r"was not finished .* run it again"):
        read_index(tmp_path)


@pytest.mark.parametrize("images", [{}, ORIGINAL_IMAGE])
def test_a_folder_of_the_original_script_is_read_with_and_without_its_index(tmp_path, images):
    entry = write_clip(tmp_path, "0a1b", **images)
    (tmp_path / "data.jsonl").write_text(json.dumps(entry) + "\n")
    (clip,) = read_index(tmp_path)
    assert clip.bucket == BUCKET
    assert (clip.image_latents is not None) == bool(images)
    if images:
        assert read_tensor(clip.image_latents).sum() == 32 * 8 * 12
    (tmp_path / "data.jsonl").unlink()
    assert list(read_index(tmp_path)) == [clip]  # the sizes come from the tensors


@pytest.mark.parametrize("index", ["full", "half", "empty", "none"])
def test_all_samples_of_an_original_folder_are_read_whatever_its_script_wrote_last(tmp_path, caplog, index):
    """It named image latents that it never saved, and its data.jsonl may be incomplete."""
    clips = read_index(write_original_folder(tmp_path, 4, index=index))
    assert [clip.name for clip in clips] == [f"9f3c{number}" for number in range(4)]
    assert {clip.bucket for clip in clips} == {Bucket(17, 64, 96)}
    assert all(clip.image_latents is None for clip in clips)
    missing = {"half": ["lacks 2 of the 4 samples"], "empty": ["lacks 4 of the 4 samples"]}.get(index, [])
    assert [part in record.message for part, record in zip(missing, caplog.records, strict=True)] == [True] * len(
        missing
    )


def test_an_original_folder_has_the_samples_of_its_list_as_in_the_original_training(tmp_path):
    folder = write_original_folder(tmp_path, 4)
    (folder / "videos.txt").write_text("videos/9f3c2.mp4\nvideos/9f3c0.mp4\n")
    assert [clip.name for clip in read_index(folder)] == ["9f3c2", "9f3c0"]
    (folder / "videos.txt").write_text("videos/9f3c2.mp4\nvideos/gone.mp4\n")
    with pytest.raises(UserError, match=r"1 files of .* are missing:\n.*video_latents/gone\.pt"):
        read_index(folder)


def test_an_index_of_an_original_folder_that_leads_outside_is_refused(tmp_path):
    folder = write_original_folder(tmp_path / "prepared", 1)
    entry = json.loads((folder / "data.jsonl").read_text()) | {"prompt_embed": "../secret.pt"}
    (folder / "data.jsonl").write_text(json.dumps(entry))
    with pytest.raises(UserError, match=r"the index of .*prepared names 1 files outside of its folder"):
        read_index(folder)


def test_an_index_that_leads_out_of_its_folder_is_refused_with_its_lines(tmp_path):
    """A folder from a stranger reads only its own files."""
    folder = tmp_path / "prepared"
    claim_folder(folder, SETTINGS)
    good = write_clip(folder, "a")
    write_clip(tmp_path, "secret")
    bad = [{"video_latent": "../video_latents/secret.pt"}, {"prompt_embed": f"{tmp_path}/prompt_embeds/secret.pt"}]
    (folder / "data.jsonl").write_text(index_lines([good, *(good | outside for outside in bad)]))
    with pytest.raises(UserError, match=r"the index of .*prepared names 2 files outside of its folder; .*") as caught:
        read_index(folder)
    _, first, second = str(caught.value).splitlines()
    assert first.strip() == "sample 2 (secret): ../video_latents/secret.pt"
    assert second.strip() == f"sample 3 (a): {tmp_path}/prompt_embeds/secret.pt"
    assert len(read_index(folder, allow_outside_paths=True)) == 3
    with pytest.raises(UserError, match="outside of its folder"):
        read_index(folder)  # its columns have been written


WITHOUT_REPEATS = json.dumps(sample_in_files("a", BUCKET, with_images=False) | {"repeats": 0})
WITHOUT_HEIGHT = json.dumps(sample_in_files("a", Bucket(9, 0, 96), with_images=False))


@pytest.mark.parametrize("line", ['{"name": "\udcff"}', "[]", '{"name": 5}', WITHOUT_REPEATS, WITHOUT_HEIGHT])
@pytest.mark.parametrize("name", ["index.jsonl", "data.jsonl"])
def test_a_damaged_line_of_an_index_is_named(tmp_path, name, line):
    claim_folder(tmp_path, SETTINGS)
    (tmp_path / name).write_text(f"\n{line}\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=rf"{name}:2: not a prepared clip"):
        read_index(tmp_path)


def test_a_line_without_a_value_says_which(tmp_path):
    claim_folder(tmp_path, SETTINGS)
    (tmp_path / "index.jsonl").write_text('{"name": "a"}\n')
    with pytest.raises(UserError, match=r"not a prepared clip \(it has no 'latents'\)"):
        read_index(tmp_path)


def test_without_an_index_a_damaged_tensor_is_named(tmp_path):
    (tmp_path / "video_latents").mkdir()
    torch.save(torch.zeros(3), tmp_path / "video_latents" / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt has no latents of a video"):
        read_index(tmp_path)
