"""A folder of clips and captions is read as `data.folder` documents."""

import os
import shlex
from pathlib import Path
from unicodedata import normalize

import av
import pytest
from PIL import Image

from clip_lists import bad, captions, error_of, good, read, touch, write
from data.clips import Clip
from data.folder import describe_folder, describe_frames, find_frames
from data.sources import DataSource, read_clips
from encoded_clips import encode


def test_clips_take_the_caption_of_the_same_name_in_all_folders_below_sorted_by_path(tmp_path):
    touch(tmp_path, "b/x.mp4", "a-1.webm", "a.MOV", "b/deep/still.jpg")
    for name in ("b/x.txt", "a-1.txt", "a.txt", "b/deep/still.txt"):
        write(tmp_path / name, f"\ufeff About\r\n{name}.\r\n")
    assert good(tmp_path) == [
        Clip(tmp_path / "a-1.webm", "About\na-1.txt.", "a-1.txt"),
        Clip(tmp_path / "a.MOV", "About\na.txt.", "a.txt"),
        Clip(tmp_path / "b/deep/still.jpg", "About\nb/deep/still.txt.", "b/deep/still.txt"),
        Clip(tmp_path / "b/x.mp4", "About\nb/x.txt.", "b/x.txt"),
    ]


VIDEOS = ["mp4", "mov", "mkv", "webm", "avi", "m4v", "mpg", "mpeg", "ts", "gif"]
IMAGES = ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff"]


def test_videos_and_images_of_every_kind_are_found(tmp_path):
    names = sorted(f"{suffix}.{suffix}" for suffix in VIDEOS + IMAGES)
    touch(tmp_path, *names)
    for name in names:
        write((tmp_path / name).with_suffix(".txt"), "A cat.")
    assert sorted(clip.video.name for clip in good(tmp_path)) == names


def test_an_image_beside_a_video_is_its_first_frame_not_a_clip(tmp_path):
    touch(tmp_path, "a.mp4", "a.png", "b.png")
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, "A cat.")
    assert {clip.video.name: clip.image for clip in good(tmp_path)} == {"a.mp4": tmp_path / "a.png", "b.png": None}


def test_a_mask_beside_a_clip_is_no_clip_is_read_on_request_and_may_be_missing(tmp_path):
    touch(tmp_path, "a.mp4", "a.mask.png", "a.control.mp4", "b.mp4", "b.mask.mp4", "c.mp4", "d.mp4", "d.mask.mp4")
    touch(tmp_path, "d.mask.png")
    for name in "abcd":
        write(tmp_path / f"{name}.txt", "A cat.")
    assert [clip.mask for clip in read(tmp_path)[0]] == [None] * 3
    clips, _ = read(tmp_path, mask_column="mask")
    assert [clip.mask for clip in clips] == [tmp_path / "a.mask.png", tmp_path / "b.mask.mp4", None]
    assert "has several masks beside it: d.mask.mp4, d.mask.png" in bad(tmp_path)[0]


def test_a_control_beside_a_clip_is_no_clip_and_is_read_on_request(tmp_path):
    touch(tmp_path, "a.mp4", "a.control.mp4", "b.mp4", "b.control.mp4", "b.control.webm", "c.mp4", "d.control.mp4")
    for name in ("a.txt", "b.txt", "c.txt", "d.control.txt"):
        write(tmp_path / name, "A cat.")
    assert {clip.video.name: clip.control for clip in read(tmp_path)[0]} == {
        "a.mp4": None,
        "c.mp4": None,
        "d.control.mp4": None,
    }
    clips, _ = read(tmp_path, control_column="control")
    assert {clip.video.name: clip.control for clip in clips} == {"a.mp4": tmp_path / "a.control.mp4"}
    several, *without = bad(tmp_path, control_column="control")
    assert several.endswith("has several controls beside it: b.control.mp4, b.control.webm")
    assert [line.split(" (")[0] for line in without if line.endswith("has no control clip")] == [
        "c.mp4",
        "d.control.mp4",
    ]


def test_files_that_do_not_fit_together_are_bad_clips(tmp_path):
    touch(tmp_path, "a.mp4", "a.png", "sub/b.mp4", "d.mp4", "e.mp4", "f.mp4", "g.mp4", "g.png", "g.jpg")
    for name, content in (("sub/c", "A dog."), ("d", "A cow."), ("e", " \n"), ("f", b"caf\xe9"), ("g", "A cat.")):
        write(tmp_path / f"{name}.txt", content)
    assert bad(tmp_path) == [
        f"a.mp4 ({tmp_path}): has no caption file a.txt beside it",
        "e.mp4 (e.txt): has no caption",
        f"f.mp4 (f.txt): {tmp_path / 'f.txt'} is not UTF-8 text: byte 3 does not fit; save it as UTF-8",
        f"g.mp4 ({tmp_path}): has several images for its first frame beside it: g.jpg, g.png",
        f"sub/b.mp4 ({tmp_path}): has no caption file b.txt beside it",
        f"sub/c.txt ({tmp_path}): has no clip of the same name beside it",
    ]


def test_any_file_that_pyav_opens_as_a_video_is_a_clip_and_other_files_are_named(tmp_path, caplog):
    for name, options in (("a.3gp", {"codec": "mpeg4"}), ("b.MTS", {}), ("c.flv", {"codec": "flv"}), ("d.nut", {})):
        encode(tmp_path / name.lower(), 4, **options).rename(tmp_path / name)
        write(tmp_path / f"{name[0]}.txt", "A cat.")
    write(tmp_path / "a.srt", "1\n00:00:01,000 --> 00:00:02,000\nMeow.\n")
    write(tmp_path / "notes.nfo", "Recorded in May.")
    touch(tmp_path, "x.heic", "y.heic", "z.heic", "z.bin", "a.json", "README", "Thumbs.db", ".DS_Store")
    assert [clip.video.name for clip in good(tmp_path)] == ["a.3gp", "b.MTS", "c.flv", "d.nut"]
    assert [record.message for record in caplog.records] == [
        f"warning: skipped in {tmp_path}, because neither a readable clip nor a caption: a.srt, notes.nfo, x.heic and "
        "3 more"
    ]


def test_a_caption_of_a_file_that_cannot_be_read_is_a_bad_clip(tmp_path):
    touch(tmp_path, "a.mp4", "a.txt", "b.heic", "b.txt")
    assert bad(tmp_path)[1:] == ["b.heic (b.txt): has a caption, but is not a readable video or image"]


def test_a_folder_without_any_readable_clip_names_its_files(tmp_path):
    touch(tmp_path, "a.heic", "b.heic")
    assert "has nothing that can be read as clips (a.heic, b.heic cannot). Put videos.txt" in error_of(tmp_path)


def test_a_caption_is_found_whichever_way_its_accents_are_written(tmp_path):
    touch(tmp_path, normalize("NFD", "Blüte.mp4"))
    write(tmp_path / normalize("NFC", "Blüte.txt"), "A flower.")
    assert captions(good(tmp_path)) == ["A flower."]


def test_a_folder_of_frames_is_one_bad_clip(tmp_path):
    touch(tmp_path, "a.mp4", "a.txt", *(f"frames/{number:04}.png" for number in range(3, 19)))
    write(tmp_path / "frames.txt", "A cat.")
    frames, _ = bad(tmp_path)
    assert frames.startswith(f"frames/0003.png ({tmp_path}): 16 numbered pictures are not a clip; make one")
    _, listed = read_clips(DataSource(tmp_path), tmp_path, captions_file=tmp_path / "captions.jsonl")
    assert len(listed) == 1  # they may be stills that captions are written for; only frames.txt has no clip


def test_hidden_files_and_notes_at_the_top_level_are_ignored(tmp_path):
    touch(tmp_path, "a.mp4", ".b.mp4", ".cache/c.mp4", "sub/.d.txt")
    for name in ("a.txt", "README.txt", "License.txt"):
        write(tmp_path / name, "A cat.")
    assert [clip.video.name for clip in good(tmp_path)] == ["a.mp4"]
    write(tmp_path / "sub/readme.txt", "A cat.")
    assert bad(tmp_path) == [f"sub/readme.txt ({tmp_path}): has no clip of the same name beside it"]


def test_links_to_folders_are_followed_once_even_in_cycles(tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    touch(elsewhere, "a.mp4")
    write(elsewhere / "a.txt", "A cat.")
    (tmp_path / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path)
    assert [clip.video for clip in good(tmp_path)] == [tmp_path / "linked/a.mp4"]


def test_a_file_name_that_is_not_unicode_is_a_bad_clip(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    for suffix in (b".mp4", b".txt"):
        with open(name + suffix, "w") as file:
            file.write("A cat.")
    (line,) = bad(tmp_path)
    assert line.endswith("has text that is not valid Unicode, which no list can hold")
    assert line.isascii()


def test_a_table_beside_clips_without_captions_is_suggested(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "metadata.csv", "file_name,text\na.mp4,A cat.\n")
    assert error_of(tmp_path).endswith(f"but metadata.csv: pass --dataset_file {tmp_path / 'metadata.csv'}")


@pytest.mark.parametrize("ours", ["prepared.json", "plan.csv"])
def test_prepared_data_among_the_clips_is_ignored(tmp_path, ours):
    touch(tmp_path, "a.mp4", "prepared/contact_sheet.png", f"prepared/{ours}")
    write(tmp_path / "a.txt", "A cat.")
    assert captions(good(tmp_path)) == ["A cat."]


def test_the_message_on_a_folder_without_clips_names_the_formats(tmp_path):
    write(tmp_path / "captions.txt", "A cat.")
    message = error_of(tmp_path)
    assert message.startswith(f"{tmp_path} has nothing that can be read as clips")
    forms = ("videos.txt", "prompts.txt", "--dataset_file", ".csv", ".tsv", ".jsonl", ".parquet", "--dataset_name")
    assert all(form in message for form in forms)


def write_frames(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shade, name in enumerate(names):
        Image.new("L", (16, 16), 10 * shade).save(folder / name)
    return folder


def shades_of(command: str) -> list[int]:
    """Return the grey of each frame that FFmpeg reads with the input options of a command."""
    words = shlex.split(command)
    options = {words[at][1:]: words[at + 1] for at in range(words.index("-framerate"), words.index("-i"), 2)}
    with av.open(words[words.index("-i") + 1], format="image2", options=options) as container:
        return [int(frame.to_ndarray(format="gray")[0, 0]) for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        ([f"{number:04}.png" for number in range(8, 14)], ""),
        ([f"take 1%_{number}.png" for number in range(8, 14)], "take 1%"),
        ([f"{number:03}.png" for number in range(95, 125, 5)], ""),
    ],
)
def test_the_command_reads_all_frames_in_their_order(tmp_path, names, prefix):
    folder = write_frames(tmp_path / "my [clip]", *names)
    reason = describe_folder(folder)
    assert reason.startswith("6 numbered pictures are not a clip; make one")
    command = reason[reason.index("ffmpeg") :]
    assert shades_of(command) == [0, 10, 20, 30, 40, 50]
    clip = folder / f"{prefix}.mp4" if prefix else tmp_path / "my [clip].mp4"
    assert shlex.split(command)[-1] == str(clip)


def test_other_folders_and_files_are_no_frames(tmp_path):
    assert describe_folder(write_frames(tmp_path / "few", "1.png", "2.png")) is None
    assert describe_folder(write_frames(tmp_path / "named", *(f"{letter}.png" for letter in "abcdef"))) is None
    assert describe_folder(tmp_path / "few" / "1.png") is None
    assert find_frames(f"{number}.png" for number in (1, 5, 10, 20, 50, 100)) == []


def test_each_series_of_a_folder_is_found_sorted_by_number():
    files = [f"{name}{number}.jpg" for name in ("a", "sub/b") for number in range(12)]
    series = find_frames(sorted(files))
    assert series == [files[:12], files[12:]]
    assert describe_frames(Path("clips"), series[1]).endswith("clips/sub/b.mp4")
