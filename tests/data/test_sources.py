"""Rows of every list become clips as `data.sources` documents."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_files import write_mp4
from clip_lists import bad, captions, error_of, good, read, touch, write, write_lists, write_table
from common.errors import UserError
from common.remote import default_cache_folder, to_path
from common.stores import StoreError
from data.clips import Clip
from data.sources import DataSource, read_clips
from object_store import Bucket
from video.cache import FileCache
from video.probe import probe_files


def test_paths_that_lead_out_of_the_data_root_are_bad_clips_each_with_its_line(tmp_path):
    write_lists(tmp_path, videos=f"/clips/z.mp4\n../y.mp4\n~/x.mp4\n{tmp_path}/a.mp4\nb.mp4", prompts="A cat.\n" * 5)
    clips, unusable = read(tmp_path)
    assert [clip.video.name for clip in clips] == ["a.mp4", "b.mp4"]
    assert [clip.what for clip in unusable] == ["/clips/z.mp4", "../y.mp4", "~/x.mp4"]
    assert [clip.source for clip in unusable] == ["videos.txt:1", "videos.txt:2", "videos.txt:3"]
    told = (f"lies outside of {tmp_path}; ", "--allow_outside_paths")
    assert all(part in clip.reason for clip in unusable for part in told)
    assert good(tmp_path, allow_outside_paths=True)[1].video == tmp_path / "../y.mp4"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_no_table_names_files_elsewhere_neither_as_videos_nor_as_images(tmp_path, suffix):
    listed = [("../a.mp4", ""), ("a.mp4", "/b.png")]
    rows = [{"video": video, "text": "A cat.", "image": image} for video, image in listed]
    file = write_table(tmp_path / f"data{suffix}", rows)
    clips, (video, image) = read(None, dataset_file=file)
    assert clips == []
    assert "../a.mp4" in str(video)
    assert "its image lies outside of" in str(image)


def test_a_table_may_list_files_beside_itself_in_the_data_root_and_in_the_cache(tmp_path):
    """As the table of `make_first_frames.py` does."""
    places = [tmp_path / "clips/a.mp4", tmp_path / "cache/01/01.mp4"]
    rows = [{"video": str(place), "text": "A cat.", "image": str(tmp_path / "frames/a.png")} for place in places]
    file = write_table(tmp_path / "frames/table.jsonl", rows)
    (tmp_path / "clips").mkdir()
    clips = good(tmp_path / "clips", dataset_file=file, cache=tmp_path / "cache")
    assert [(clip.video, clip.image) for clip in clips] == [(place, tmp_path / "frames/a.png") for place in places]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_every_list_may_name_controls_which_are_read_on_request(tmp_path, suffix):
    touch(tmp_path, "a.mp4", "b.mp4", "edges/a.mp4")
    lists, source = {"controls.txt": "edges/a.mp4\n\n"}, {}
    if suffix == ".txt":
        write_lists(tmp_path, videos="a.mp4\nb.mp4", prompts="A cat.\nA dog.")
        write(tmp_path / "controls.txt", lists["controls.txt"])
    else:
        rows = [{"video": f"{name}.mp4", "text": "A cat.", "control": ""} for name in "ab"]
        rows[0]["control"] = "edges/a.mp4"
        source["dataset_file"] = write_table(tmp_path / f"data{suffix}", rows)
    assert [clip.control for clip in good(tmp_path, **source)] == [None, None]
    clips, unusable = read(tmp_path, **source, control_column="control")
    assert [clip.control for clip in clips] == [tmp_path / "edges/a.mp4"]
    assert [clip.reason for clip in unusable] == ["has no control clip"]
    with pytest.raises(UserError, match=r"--control_column.*--compute_control"):
        (tmp_path / "controls.txt").unlink(missing_ok=True)
        read(tmp_path, **source, control_column="edges")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_every_list_may_name_masks_of_some_clips_which_are_read_on_request(tmp_path, suffix):
    touch(tmp_path, "a.mp4", "b.mp4", "cut/a.png")
    source = {}
    if suffix == ".txt":
        write_lists(tmp_path, videos="a.mp4\nb.mp4", prompts="A cat.\nA dog.", masks="cut/a.png\n\n")
    else:
        rows = [
            {"video": f"{name}.mp4", "text": "A cat.", "mask": mask} for name, mask in (("a", "cut/a.png"), ("b", " "))
        ]
        source["dataset_file"] = write_table(tmp_path / f"data{suffix}", rows)
    assert [clip.mask for clip in good(tmp_path, **source)] == [None, None]
    clips = good(tmp_path, **source, mask_column="mask")
    assert [(clip.mask, dict(clip.metadata)) for clip in clips] == [(tmp_path / "cut/a.png", {}), (None, {})]
    with pytest.raises(UserError, match="--mask_column"):
        read(tmp_path, **source, mask_column="cut")


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_list_without_the_usual_masks_has_none_beside_others_that_have_them(tmp_path, suffix):
    write_lists(tmp_path, videos="a.mp4", prompts="A cat.")
    table = tmp_path / f"data{suffix}"
    source = {} if suffix == ".txt" else {"dataset_file": write_table(table, [{"video": "a.mp4", "text": "A cat."}])}
    assert [clip.mask for clip in good(tmp_path, **source, mask_column="mask")] == [None]


def test_a_folder_of_clips_may_hold_links_to_elsewhere(tmp_path):
    """The folder's owner made them; only listed paths are not trusted."""
    touch(tmp_path / "elsewhere", "a.mp4")
    write(tmp_path / "elsewhere/a.txt", "A cat.")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/more").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "table/list.csv", "video,text\nmore/a.mp4,A cat.\n")
    assert [clip.video for clip in good(tmp_path / "data")] == [tmp_path / "data/more/a.mp4"]
    assert len(good(tmp_path / "data", dataset_file=tmp_path / "table/list.csv")) == 1


def test_paths_of_every_list_may_start_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    write_lists(tmp_path, videos="~/clips/z.mp4", prompts="A cat.")
    file = write(tmp_path / "data.csv", "video,text,image\n~/clips/z.mp4,A cat.,~/z.png\n")
    (listed,) = good(tmp_path, allow_outside_paths=True)
    (in_table,) = good(tmp_path, dataset_file=file, allow_outside_paths=True)
    assert listed.video == in_table.video == Path("/home/me/clips/z.mp4")
    assert in_table.image == Path("/home/me/z.png")


@pytest.mark.parametrize(("token", "caption"), [("BW_STYLE", "BW_STYLE A cat."), (" X ", "X A cat."), ("", "A cat.")])
def test_the_id_token_is_added_before_every_caption(tmp_path, token, caption):
    write_lists(tmp_path, videos="a.mp4", prompts="A cat.")
    assert captions(good(tmp_path, id_token=token)) == [caption]


@pytest.mark.parametrize("caption", ["X", "X cat.", "X, a cat.", "X. A cat.", "X-cat."])
def test_the_id_token_is_not_added_to_a_caption_that_begins_with_it(tmp_path, caption):
    write_lists(tmp_path, videos="a.mp4\nb.mp4", prompts=f"{caption}\nXY {caption}")
    assert captions(good(tmp_path, id_token="X")) == [caption, f"X XY {caption}"]


def test_the_folder_of_the_list_is_named_on_request(tmp_path):
    touch(tmp_path / "folder", "a.mp4", "sub/b.mp4")
    write(tmp_path / "folder/sub/b.txt", "A dog.")
    write(tmp_path / "lists/videos.txt", "a.mp4")
    write(tmp_path / "lists/prompts.txt", "A cat.")
    write(tmp_path / "data.csv", "video,text\na.mp4,A cat.\nb.mp4,\n")

    def places(*where: Path | None, **source) -> list[str]:
        found, unusable = read_clips(DataSource(*where, **source), tmp_path, name_folder=True)
        return [clip.source for clip in [*found, *unusable]]

    assert places(tmp_path / "lists") == [f"{tmp_path}/lists/videos.txt:1"]
    assert places(tmp_path / "folder") == [f"{tmp_path}/folder/sub/b.txt", f"{tmp_path}/folder"]
    in_table = [f"{tmp_path}/data.csv:2", f"{tmp_path}/data.csv:3"]
    assert places(tmp_path / "folder", dataset_file=tmp_path / "data.csv", caption_column="text") == in_table


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "there are no clips to read: set --data_root, --dataset_file, --dataset_name"),
        ({"data_root": Path("nowhere")}, "--data_root nowhere is not a folder"),
        ({"dataset_file": Path("a.csv"), "dataset_name": "b"}, "--dataset_file and --dataset_name are both set"),
    ],
)
def test_no_source_a_missing_one_and_two_are_errors(source, message):
    assert error_of(**{"data_root": None} | source).startswith(message)


@pytest.mark.parametrize("kind", ["image", "control", "mask"])
def test_a_column_has_no_meaning_in_a_folder(tmp_path, kind):
    write(tmp_path / "a.txt", "A cat.")
    touch(tmp_path, "a.mp4", "a.png", "a.control.mp4", "a.mask.mp4")
    column = {f"{kind}_column": "depth"}
    assert error_of(tmp_path, **column).startswith(f"--{kind}_column depth names a column or a text file, but")
    assert getattr(good(tmp_path, **{f"{kind}_column": kind})[0], kind) is not None


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.json", "data.parquet"])
def test_a_missing_column_is_named_with_the_existing_ones_and_the_flag(tmp_path, name):
    file = write_table(tmp_path / name, [{"path": "a.mp4", "caption": "A cat."}])
    there = f"{file} has no column 'video'; it has path, caption: set --video_column"
    assert error_of(tmp_path, dataset_file=file) == there
    assert error_of(tmp_path, dataset_file=file, video_column="path").endswith("set --caption_column")
    columns = {"video_column": "path", "caption_column": "caption", "image_column": "image"}
    missing = "no column 'image'; it has path, caption: set --image_column"
    assert error_of(tmp_path, dataset_file=file, **columns).endswith(missing)


def test_a_column_that_comes_twice_is_an_error(tmp_path):
    file = write(tmp_path / "data.csv", "video,text,text\na.mp4,A cat.,A dog.\n")
    assert error_of(tmp_path, dataset_file=file).startswith(f"{file} has several columns 'text'; rename")


CUT = "its caption may be cut: data.csv:{} names no clip; quote captions that contain line breaks"


@pytest.mark.parametrize("rest", ["and a clock", "and a clock, ticking", ", ticking", "and\na clock", "\nclock. Tick"])
def test_half_a_caption_is_never_used_where_a_line_break_has_no_quotes(tmp_path, rest):
    file = write(tmp_path / "data.csv", f"video,text\na.mp4,A cat.\nb.mp4,bars\n{rest}\nc.mp4,A dog.\n")
    clips, unusable = read(tmp_path, dataset_file=file)
    assert "bars" not in captions(clips)
    assert {"A cat.", "A dog."} <= set(captions(clips))
    assert unusable[0].reason.startswith("its caption may be cut: data.csv:")


def test_a_caption_in_the_first_column_loses_its_start_to_a_line_break(tmp_path):
    file = write(tmp_path / "data.csv", "text,video\nA cat.,a.mp4\nbars\nand a clock,b.mp4\n")
    clips, (rest, cut) = read(tmp_path, dataset_file=file)
    assert captions(clips) == ["A cat."]
    assert rest.source == "data.csv:3"
    assert str(cut) == f"b.mp4 (data.csv:4): {CUT.format(3)}"


def test_names_without_a_suffix_are_rows_if_the_files_exist(tmp_path):
    touch(tmp_path, "a", "b")
    file = write(tmp_path / "data.csv", "video,text\na,A cat.\nb,A dog.\n")
    assert captions(good(tmp_path, dataset_file=file)) == ["A cat.", "A dog."]


@pytest.mark.parametrize("caption", ["\u200b", "\ufeff \xa0", "\x07\u2060\xad", "\ufe0f", ""])
def test_invisible_characters_are_no_caption(tmp_path, caption):
    file = write_table(tmp_path / "data.jsonl", [{"video": "a.mp4", "text": caption}])
    assert bad(tmp_path, dataset_file=file, id_token="BW_STYLE") == ["a.mp4 (data.jsonl:1): has no caption"]
    clips, _ = read_clips(DataSource(tmp_path, file, caption_column="text"), tmp_path, captions_file=tmp_path / "c")
    assert captions(clips) == [""]  # so that a model writes it


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_is_found_whichever_way_its_accents_are_written(tmp_path, listed, stored):
    name = "Früh/Blüte.mp4"
    touch(tmp_path, normalize(stored, name))
    write_lists(tmp_path, videos=normalize(listed, name), prompts="A cat.")
    (clip,) = good(tmp_path)
    assert clip.video.is_file()


def test_paths_of_windows_are_read_if_relative_and_explained_if_not(tmp_path):
    touch(tmp_path, "videos/a.mp4")
    videos = "videos\\a.mp4\nC:\\Users\\me\\videos\\b.mp4\nC:/b.mp4\n\\\\nas\\share\\videos\\c.mp4\n..\\d.mp4"
    write_lists(tmp_path, videos=videos, prompts="A cat.\n" * 5)
    clips, unusable = read(tmp_path)
    assert [clip.video for clip in clips] == [tmp_path / "videos/a.mp4"]
    told = "is a path on Windows; write it relative to --data_root and with slashes, like "
    assert [clip.reason for clip in unusable[:3]] == [
        f"{told}{end}" for end in ("videos/b.mp4", "b.mp4", "videos/c.mp4")
    ]
    assert "outside" in unusable[3].reason


def test_rows_without_a_value_or_with_a_url_are_bad_clips(tmp_path):
    file = write(tmp_path / "data.csv", "video,text\na.mp4,\nb.mp4,A dog.\n,A cat.\nhttps://host.example/a.mp4,A.\n")
    assert bad(tmp_path, dataset_file=file) == [
        "a.mp4 (data.csv:2): has no caption",
        f"b.mp4 (data.csv:3): {CUT.format(4)}",
        "unnamed clip (data.csv:4): has no path",
        "https://host.example/a.mp4 (data.csv:5): is a URL; download the file and list its path, or pass the URL of "
        "its folder as --data_root",
    ]


@pytest.mark.parametrize(
    ("name", "content"), [("data.csv", ""), ("data.csv", "video,text\n"), ("data.jsonl", "\n"), ("data.json", "[]")]
)
def test_a_list_without_rows_is_an_error(tmp_path, name, content):
    message = "has no rows" if content.startswith("video") else "no column 'video'; it has none"
    assert message in error_of(tmp_path, dataset_file=write(tmp_path / name, content))
    write_lists(tmp_path, videos="\n", prompts="")
    assert error_of(tmp_path) == f"{tmp_path / 'videos.txt'} has no rows"


def test_a_relative_table_is_searched_here_and_then_in_the_data_root(tmp_path, tmp_path_factory, monkeypatch):
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    name = Path("data.csv")
    missing = f"--dataset_file data.csv does not exist, neither here nor in {tmp_path}"
    assert error_of(tmp_path, dataset_file=name) == missing
    write(tmp_path / name, "video,text\na.mp4,from the data root\n")
    assert captions(good(tmp_path, dataset_file=name)) == ["from the data root"]
    write(here / name, "video,text\na.mp4,from here\n")
    assert captions(good(tmp_path, dataset_file=name)) == ["from here"]


def test_without_a_data_root_paths_start_from_the_folder_of_the_table(tmp_path):
    file = write(tmp_path / "data.csv", "video,text\na.mp4,A cat.\n")
    (clip,) = good(None, dataset_file=file, repeats=2.5)
    assert (clip.video, clip.repeats) == (tmp_path / "a.mp4", 2.5)


@pytest.mark.parametrize("column", ["image", "images"])
def test_an_image_column_is_used_if_it_exists(tmp_path, column):
    file = write(tmp_path / "data.csv", f"video,text,{column}\na.mp4,A cat.,a.png\nb.mp4,A dog.,\n")
    assert [clip.image for clip in good(tmp_path, dataset_file=file)] == [tmp_path / "a.png", None]


def test_an_image_column_that_is_named_wins(tmp_path):
    file = write(tmp_path / "data.csv", "video,text,image,start\na.mp4,A cat.,a.png,b.png\n")
    (clip,) = good(tmp_path, dataset_file=file, image_column="start")
    assert (clip.image, clip.metadata) == (tmp_path / "b.png", {"image": "a.png"})
    (still,) = good(tmp_path, dataset_file=file, video_column="image")
    assert (still.image, still.metadata) == (None, {"video": "a.mp4", "start": "b.png"})


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.json", "data.parquet"])
def test_only_the_first_samples_are_read_on_request(tmp_path, name):
    file = write_table(tmp_path / name, [{"video": f"{number}.mp4", "text": f"Cat {number}."} for number in range(5)])
    assert captions(good(tmp_path, dataset_file=file, max_samples=2)) == ["Cat 0.", "Cat 1."]


def test_values_of_the_wrong_type_are_bad_clips(tmp_path):
    rows = [{"video": "a.mp4", "text": 5}, {"video": {"file": "b.mp4"}, "text": "B"}, {"video": "c.mp4"}, ["d.mp4"]]
    rows += [{"video": "e.mp4", "text": "E", "image": 1.5}, {"video": [5], "text": "F"}]
    file = write(tmp_path / "data.json", json.dumps(rows))
    assert bad(tmp_path, dataset_file=file) == [
        "a.mp4 (data.json:row 1): its caption is int 5, not text",
        "unnamed clip (data.json:row 2): is dict, not a path",
        "c.mp4 (data.json:row 3): has no caption",
        "unnamed clip (data.json:row 4): is list, not an object",
        "e.mp4 (data.json:row 5): its image is float 1.5, not a path",
        "unnamed clip (data.json:row 6): has int 5 among its frames, not an image",
    ]


@pytest.mark.parametrize(
    "change", [{"text": "\ud800"}, {"video": "\ud800.mp4"}, {"video": {"path": "\ud800.mp4"}}, {"note": "\ud800"}]
)
def test_text_that_is_not_valid_unicode_is_a_bad_clip_with_an_ascii_message(tmp_path, change):
    row = {"video": "a.mp4", "text": "A cat."} | change
    (line,) = bad(tmp_path, dataset_file=write(tmp_path / "data.json", json.dumps([row])))
    assert line.isascii()
    assert line.endswith("(data.json:row 1): has text that is not valid Unicode, which no list can hold")


def test_other_columns_with_single_values_of_the_user_are_metadata(tmp_path):
    row = {"video": "a.mp4", "text": "A cat.", "n": 3, "ok": True, "no": None, "empty": "", "tags": ["x"], "": 0}
    bookkeeping = {"__key__": "a", "__url__": "clips.tar", "__index_level_0__": 7}
    file = write(tmp_path / "data.jsonl", json.dumps(row | bookkeeping))
    assert good(tmp_path, dataset_file=file)[0].metadata == {"n": "3", "ok": "True"}


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_start_frame_and_end_frame_are_the_part_of_the_file(tmp_path, name):
    numbers = [("10", "20"), ("", "20"), ("10", ""), ("", "")]
    rows = [{"video": "a.mp4", "text": "A cat.", "start_frame": start, "end_frame": end} for start, end in numbers]
    clips = good(tmp_path, dataset_file=write_table(tmp_path / name, rows))
    assert [(clip.start_frame, clip.end_frame) for clip in clips] == [(10, 20), (0, 20), (10, None), (0, None)]
    assert clips[0].metadata == {"start_frame": "10", "end_frame": "20"}  # for the tables that list them again


def test_frame_numbers_of_tables_with_gaps_are_read(tmp_path):
    table = pa.table({"video": ["a.mp4"] * 3, "text": ["A cat."] * 3, "start_frame": [5.0, float("nan"), None]})
    pq.write_table(table, tmp_path / "list.parquet")
    assert [clip.start_frame for clip in good(tmp_path, dataset_file=tmp_path / "list.parquet")] == [5, 0, 0]


@pytest.mark.parametrize("value", ["-1", "2.5", "ten", "inf"])
def test_what_is_no_frame_number_is_a_bad_clip(tmp_path, value):
    row = {"video": "a.mp4", "text": "A cat.", "start_frame": value}
    (reason,) = bad(tmp_path, dataset_file=write_table(tmp_path / "list.csv", [row]))
    assert f"has '{value}' as its start_frame, which is not a frame number" in reason


def test_reading_lists_imports_nothing_heavy():
    code = "import sys, data.sources; print({'torch', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "set()"


@pytest.fixture
def clips_in_store(bucket, tmp_path) -> Bucket:
    """Two clips with captions beside them, one of them in a subfolder, and an earlier preparation."""
    for name in ("a b", "deep/c"):
        write(tmp_path / "made" / f"{name}.txt", f"caption of {name}")
        write_mp4(tmp_path / "made" / f"{name}.mp4", (np.full((64, 96, 3), 90, np.uint8) for _ in range(5)), 8)
    touch(tmp_path / "made", ".hidden.mp4", "prepared/prepared.json", "prepared/x.mp4", "notes.md")
    bucket.put_folder(tmp_path / "made", "clips")
    return bucket


def test_a_folder_in_a_store_is_read_like_one_on_disk(clips_in_store):
    root = to_path(f"{clips_in_store.url}/clips")
    clips = good(root)
    assert [(str(clip.video), clip.caption) for clip in clips] == [
        (f"{root}/a b.mp4", "caption of a b"),
        (f"{root}/deep/c.mp4", "caption of deep/c"),
    ]
    assert clips_in_store.fetched(".mp4") == []
    infos = probe_files([clip.video for clip in clips], FileCache(default_cache_folder()))
    assert [info.num_frames for info in infos.values()] == [5, 5]
    assert len(clips_in_store.fetched(".mp4")) == 2


def test_clips_of_a_store_are_probed_once_even_if_the_cache_drops_them(clips_in_store):
    (clip, _) = good(to_path(f"{clips_in_store.url}/clips"))
    cache = FileCache(default_cache_folder())
    first = probe_files([clip.video], cache)
    shutil.rmtree(default_cache_folder() / "fetched")
    assert probe_files([clip.video], cache) == first
    assert len(clips_in_store.fetched(".mp4")) == 1


def test_a_store_that_is_down_is_not_a_bad_clip_but_a_missing_file_is(clips_in_store):
    clips = [clip.video for clip in good(to_path(f"{clips_in_store.url}/clips"))]
    clips_in_store.delete("clips/a b.mp4")
    assert probe_files(clips[:1]) == {clips[0]: "does not exist"}
    clips_in_store.store.faults["c.mp4"] = ["503"] * 99
    with pytest.raises(StoreError, match=r"c\.mp4 cannot be fetched after 4 tries"):
        probe_files(clips)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_in_a_store_names_clips_beside_it_by_path_or_url(bucket, tmp_path, suffix):
    names = ["a.mp4", "deep/b.mp4", f"{bucket.url}/data/c.mp4", f"{bucket.url}/other/d.mp4", "s3://other/data/e.mp4"]
    table = write_table(tmp_path / f"list{suffix}", [{"video": name, "text": "A cat."} for name in names])
    bucket.put(f"data/list{suffix}", table)
    clips, bad_clips = read(None, dataset_file=to_path(f"{bucket.url}/data/list{suffix}"))
    assert [str(clip.video) for clip in clips] == [
        f"{bucket.url}/data/{name}" for name in ("a.mp4", "deep/b.mp4", "c.mp4")
    ]
    assert [clip.reason[:8] for clip in bad_clips] == ["is a URL"] * 2
    assert not any("other" in request for request in bucket.store.requests)


def test_a_list_on_disk_cannot_contact_a_server_that_was_not_typed(clips_in_store, tmp_path, monkeypatch):
    url = f"{clips_in_store.url}/clips/a b.mp4"
    listed = [url, url.replace("://", ":/"), f"zip://x::{url}"]
    table = write_table(tmp_path / "list.jsonl", [{"video": name, "text": "A cat."} for name in listed])
    clips_in_store.store.requests.clear()
    monkeypatch.chdir(tmp_path)
    for source in ({}, {"allow_outside_paths": True}):
        clips, _ = read(None, dataset_file=Path("list.jsonl"), **source)
        assert probe_files([clip.video for clip in clips]) == {clip.video: "does not exist" for clip in clips}
    assert clips_in_store.store.requests == []
    assert len(good(to_path(f"{clips_in_store.url}/clips"), dataset_file=table, max_samples=1)) == 1


def test_text_files_in_a_store_list_clips(bucket):
    bucket.put("data/videos.txt", "a.mp4\nb.mp4\n")
    bucket.put("data/prompts.txt", "A cat.\nA dog.\n")
    clips = good(to_path(f"{bucket.url}/data"))
    assert [(clip.video.name, clip.caption) for clip in clips] == [("a.mp4", "A cat."), ("b.mp4", "A dog.")]
    assert "/empty has no files" in error_of(to_path(f"{bucket.url}/empty"))


def all_captions(clip: Clip) -> list[str]:
    return list(clip.captions) or [clip.caption]


def test_a_list_of_captions_or_each_line_is_a_caption_of_its_own(tmp_path):
    rows = [{"video": "a.mp4", "text": ["A cat.", " ", "A cat.", "A pet."]}, {"video": "b.mp4", "text": "One.\nTwo."}]
    for name, write_rows in (("a.json", lambda f: f.write_text(json.dumps(rows))), ("a.jsonl", None)):
        file = tmp_path / name
        (write_rows or (lambda f: f.write_text("".join(json.dumps(row) + "\n" for row in rows))))(file)
        assert list(map(all_captions, good(None, dataset_file=file))) == [["A cat.", "A pet."], ["One.\nTwo."]]
    options = {"dataset_file": tmp_path / "a.jsonl", "caption_per_line": True, "id_token": "X"}
    assert list(map(all_captions, good(None, **options))) == [["X A cat.", "X A pet."], ["X One.", "X Two."]]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    assert list(map(all_captions, good(None, dataset_file=tmp_path / "a.parquet"))) == [["A cat.", "A pet."]]
    touch(tmp_path, "folder/c.mp4")
    write(tmp_path / "folder/c.txt", "One.\n\nTwo.\n")
    assert list(map(all_captions, good(tmp_path / "folder", caption_per_line=True))) == [["One.", "Two."]]


def test_captions_that_a_table_of_captions_cannot_keep_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", json.dumps({"video": "a.mp4", "text": ["A cat.", "A pet."]}))
    source = DataSource(None, tmp_path / "a.jsonl", caption_column="text")
    _, (refused,) = read_clips(source, tmp_path, captions_file=tmp_path / "out.jsonl")
    assert "has several captions" in refused.reason
    write(tmp_path / "b.jsonl", json.dumps({"video": "a.mp4", "text": ["A cat.", 5]}))
    assert "its caption is int 5, not text" in bad(None, dataset_file=tmp_path / "b.jsonl")[0]


def test_tags_come_in_several_orders_behind_the_id_token(tmp_path):
    write_lists(tmp_path, videos="a.mp4\nb.mp4", prompts="red, round, small, fast\nA cat.")
    tagged, plain = good(tmp_path, shuffle_tags=5, id_token="X")
    assert tagged.captions[0] == "X red, round, small, fast"
    assert len(set(tagged.captions)) == 5
    assert {tuple(sorted(caption.removeprefix("X ").split(", "))) for caption in tagged.captions} == {
        ("fast", "red", "round", "small")
    }
    assert (plain.caption, plain.captions) == ("X A cat.", ())
    again, _ = good(tmp_path, shuffle_tags=5, id_token="X")
    assert again.captions == tagged.captions
    write_lists(tmp_path, prompts="X, red, round, small, fast\nA cat.")
    begun, _ = good(tmp_path, shuffle_tags=5, id_token="X")
    assert begun.captions[0] == "X, red, round, small, fast"
    assert all(caption.startswith("X ") and caption.count("X") == 1 for caption in begun.captions[1:])
