"""Lists of clips are read and planned as `clips` promises; what is wrong in them is said in one error."""

from pathlib import Path

import pytest

from buckets import Bucket, make_buckets
from clips import Clip, describe_plan, load_clips, plan_clips
from errors import UserError
from video import VideoInfo


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def load(data_root, dataset_file=None, video="video", caption="text", id_token=None):
    return load_clips(
        data_root, dataset_file=dataset_file, video_column=video, caption_column=caption, id_token=id_token
    )


def error_of(*arguments, **options):
    with pytest.raises(UserError) as raised:
        load(*arguments, **options)
    return str(raised.value)


@pytest.fixture
def folder(tmp_path):
    """A folder with the videos a.mp4, b.mp4 and videos/c d.mp4."""
    touch(tmp_path, "a.mp4", "b.mp4", "videos/c d.mp4")
    return tmp_path


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# A pair of text files


def test_a_pair_of_text_files_is_read_line_by_line(folder):
    write(folder / "videos.txt", "a.mp4\n videos/c d.mp4 \n")
    write(folder / "prompts.txt", "A cat.\n  Ein Käfer, 2 m “groß” \n")
    assert load(folder) == [
        Clip(folder / "a.mp4", "A cat.", "videos.txt:1"),
        Clip(folder / "videos/c d.mp4", "Ein Käfer, 2 m “groß”", "videos.txt:2"),
    ]


def test_the_columns_name_the_text_files(folder):
    write(folder / "my_videos.txt", "a.mp4")
    write(folder / "captions", "A cat.")
    assert load(folder, video="my_videos.txt", caption="captions") == [
        Clip(folder / "a.mp4", "A cat.", "my_videos.txt:1")
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_line_ends_and_blank_last_lines_do_not_matter(folder, mark, end):
    write(folder / "videos.txt", mark + end.join(["a.mp4", "b.mp4", "", " "]))
    write(folder / "prompts.txt", mark + end.join(["A cat.", "A dog.", ""]))
    assert [(clip.video.name, clip.caption) for clip in load(folder)] == [("a.mp4", "A cat."), ("b.mp4", "A dog.")]


def test_only_line_ends_split_lines(folder):
    write(folder / "videos.txt", "a.mp4\n")
    write(folder / "prompts.txt", "A cat\u2028on a mat\x0b.\n")
    assert load(folder)[0].caption == "A cat\u2028on a mat\x0b."


def test_an_absolute_path_stays_as_it_is(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    touch(elsewhere, "z.mp4")
    write(folder / "videos.txt", f"{elsewhere}/z.mp4")
    write(folder / "prompts.txt", "A cat.")
    assert load(folder)[0].video == elsewhere / "z.mp4"


@pytest.mark.parametrize(("token", "caption"), [("BW_STYLE", "BW_STYLE A cat."), (" X ", "X A cat."), ("", "A cat.")])
def test_the_id_token_stands_before_every_caption(folder, token, caption):
    write(folder / "videos.txt", "a.mp4")
    write(folder / "prompts.txt", "A cat.")
    assert load(folder, id_token=token)[0].caption == caption


def test_a_missing_text_file_is_named_with_its_flag(folder):
    assert error_of(folder).startswith(f"{folder / 'videos.txt'} does not exist; --video_column names the file")
    write(folder / "videos.txt", "a.mp4")
    assert error_of(folder).startswith(f"{folder / 'prompts.txt'} does not exist; --caption_column names the file")
    assert error_of(folder, video="clips.txt").startswith(f"{folder / 'clips.txt'} does not exist; --video_column")


def test_differing_line_counts_are_told(folder):
    write(folder / "videos.txt", "a.mp4\nb.mp4\n")
    write(folder / "prompts.txt", "A cat.\n")
    assert f"{folder / 'videos.txt'} has 2 lines and {folder / 'prompts.txt'} has 1;" in error_of(folder)


@pytest.mark.parametrize(("name", "what"), [("prompts.txt", "prompt"), ("videos.txt", "video path")])
def test_blank_lines_in_the_middle_are_all_listed(folder, name, what):
    write(folder / "videos.txt", "a.mp4\n" * 5)
    write(folder / "prompts.txt", "A cat.\n" * 5)
    line = "a.mp4\n" if name == "videos.txt" else "A cat.\n"
    write(folder / name, f"{line}\n{line} \n{line}")
    assert error_of(folder).splitlines() == [
        f"{folder / name} has 2 empty lines where a {what} belongs:",
        f"  {name}:2",
        f"  {name}:4",
    ]


def test_empty_lists_are_an_error(folder):
    write(folder / "videos.txt", "\n")
    write(folder / "prompts.txt", "")
    assert error_of(folder) == f"{folder / 'videos.txt'} is empty"


def test_missing_videos_are_listed_with_their_lines_up_to_twenty(folder):
    write(folder / "videos.txt", "a.mp4\n" + "".join(f"gone{number}.mp4\n" for number in range(23)))
    write(folder / "prompts.txt", "A cat.\n" * 24)
    lines = error_of(folder).splitlines()
    assert lines[0].startswith("23 of 24 listed videos do not exist")
    assert lines[1] == f"  {folder / 'gone0.mp4'} (videos.txt:2)"
    assert lines[20] == f"  {folder / 'gone19.mp4'} (videos.txt:21)"
    assert lines[21:] == ["  ... and 3 more"]


def test_a_caption_where_a_path_belongs_is_a_missing_video(folder):
    write(folder / "videos.txt", "A very long caption. " * 50)
    write(folder / "prompts.txt", "a.mp4")
    assert error_of(folder).startswith("1 of 1 listed videos do not exist")


@pytest.mark.parametrize(("content", "position"), [(b"a.mp4\nb\xff.mp4", 7), ("a.mp4".encode("utf-16"), 0)])
def test_text_that_is_not_utf8_is_located(folder, content, position):
    write(folder / "videos.txt", content)
    write(folder / "prompts.txt", "A cat.")
    assert error_of(folder) == (
        f"{folder / 'videos.txt'} is not UTF-8 text: byte {position} does not fit; save it as UTF-8"
    )


def test_a_missing_data_root_is_named(tmp_path):
    assert error_of(tmp_path / "nowhere") == f"--data_root {tmp_path / 'nowhere'} is not a folder"


# CSV


def test_csv_columns_are_found_by_name(folder):
    file = write(folder / "data.csv", "text,number,video\nA cat.,1,a.mp4\nA dog.,2,b.mp4\n")
    assert load(folder, file) == [
        Clip(folder / "a.mp4", "A cat.", "data.csv:2"),
        Clip(folder / "b.mp4", "A dog.", "data.csv:3"),
    ]


def test_the_example_of_the_documentation_loses_its_three_quotes(folder):
    file = write(folder / "data.csv", 'video,text\n"""a.mp4""","""A black and white film, ""noisy"" sound."""\n')
    file_simple = write(folder / "simple.csv", 'video,text\n"""a.mp4""","""A cat, on a mat."""\n')
    assert load(folder, file)[0].video == folder / "a.mp4"
    assert load(folder, file_simple)[0].caption == "A cat, on a mat."


def test_quotes_that_belong_to_a_caption_stay(folder):
    file = write(folder / "data.csv", 'video,text\na.mp4,"""Hello"" she said, ""bye"""\n')
    assert load(folder, file)[0].caption == '"Hello" she said, "bye"'


def test_csv_captions_may_have_commas_newlines_and_spaces_before_their_quotes(folder):
    file = write(folder / "data.csv", 'video, text\r\n\r\na.mp4, "A cat,\n on a mat."\r\nb.mp4,A dog.\r\n')
    assert load(folder, file) == [
        Clip(folder / "a.mp4", "A cat,\n on a mat.", "data.csv:3"),
        Clip(folder / "b.mp4", "A dog.", "data.csv:5"),
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_column(folder):
    file = write(folder / "data.csv", "\ufeffvideo,text\na.mp4,A cat.\n")
    assert load(folder, file)[0].caption == "A cat."


def test_a_missing_column_is_told_with_those_there_and_the_flag(folder):
    file = write(folder / "data.csv", "path,caption\na.mp4,A cat.\n")
    assert error_of(folder, file) == f"{file} has no column 'video'; it has path, caption: set --video_column"
    assert error_of(folder, file, video="path").endswith(
        "no column 'text'; it has path, caption: set --caption_column"
    )


def test_rows_without_a_value_are_all_listed(folder):
    file = write(folder / "data.csv", "video,text\na.mp4,\nb.mp4,A dog.\n,A cat.\n")
    assert error_of(folder, file).splitlines() == [
        f"2 rows of {file} lack a value:",
        "  data.csv:2: no prompt",
        "  data.csv:4: no video path",
    ]


def test_rows_with_an_unquoted_comma_are_all_listed(folder):
    file = write(folder / "data.csv", "video,text\na.mp4,A cat, on a mat.\nb.mp4,A dog.\nb.mp4\n")
    lines = error_of(folder, file).splitlines()
    assert lines[0].startswith(f"2 rows of {file} do not have the header's 2 fields")
    assert lines[1:] == ["  data.csv:2: 3 fields", "  data.csv:4: 1 fields"]


def test_a_quote_that_is_never_closed_is_an_error_not_a_short_list(folder):
    file = write(folder / "data.csv", 'video,text\na.mp4,"A cat.\nb.mp4,A dog.\n')
    assert error_of(folder, file).startswith(f"{file}:2 is not valid CSV:")


@pytest.mark.parametrize(("content", "message"), [("", "no column 'video'; it has none"), ("video,text\n", "no rows")])
def test_a_csv_without_rows_is_an_error(folder, content, message):
    assert message in error_of(folder, write(folder / "data.csv", content))


def test_a_relative_csv_is_looked_for_here_and_then_in_the_data_root(folder, tmp_path_factory, monkeypatch):
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    name = Path("data.csv")
    assert error_of(folder, name) == f"--dataset_file data.csv does not exist, neither as given nor in {folder}"
    write(folder / name, "video,text\na.mp4,from the data root\n")
    assert load(folder, name)[0].caption == "from the data root"
    write(here / name, "video,text\na.mp4,from here\n")
    assert load(folder, name)[0].caption == "from here"


def test_missing_videos_of_a_csv_are_listed_with_their_lines(folder):
    file = write(folder / "data.csv", "video,text\na.mp4,A cat.\ngone.mp4,A dog.\n")
    assert error_of(folder, file).splitlines()[1:] == [f"  {folder / 'gone.mp4'} (data.csv:3)"]


# The plan

BUCKETS = make_buckets([9, 17], [32, 64], [32, 64], 17)


def plan(infos, buckets=BUCKETS, **options):
    clips = [Clip(Path(f"{number}.mp4"), "A cat.", f"videos.txt:{number + 1}") for number in range(len(infos))]
    return plan_clips(clips, {clip.video: info for clip, info in zip(clips, infos, strict=True)}, buckets, **options)


def test_every_clip_gets_its_bucket_and_frames():
    planned = plan([VideoInfo(33, 90, 90, 25.0), VideoInfo(16, 40, 80, 25.0)])
    assert [clip.bucket for clip in planned] == [Bucket(17, 64, 64), Bucket(9, 32, 64)]
    assert planned[0].frame_indices == tuple(range(0, 33, 2))
    assert planned[1].frame_indices == (0, 2, 4, 6, 8, 9, 11, 13, 15)
    assert planned[0].clip.source == "videos.txt:1"


def test_skipped_ends_and_rate_count_before_the_bucket():
    (planned,) = plan([VideoInfo(60, 64, 64, 30.0)], skip_start=5, skip_end=5, fps=10)
    assert planned.bucket.num_frames == 17
    assert planned.frame_indices == tuple(range(5, 55, 3))
    (planned,) = plan([VideoInfo(60, 64, 64, 30.0)], skip_start=5, skip_end=10, fps=10)
    assert planned.bucket.num_frames == 9


def test_clips_too_short_are_all_listed_with_what_they_have():
    infos = [VideoInfo(8, 64, 64, 25.0), VideoInfo(30, 64, 64, 25.0), VideoInfo(20, 64, 64, 25.0)]
    with pytest.raises(UserError) as raised:
        plan(infos, skip_start=12)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("2 of 3 clips cannot fill the smallest frame bucket of 9 frames")
    assert "--frame_buckets" in lines[0]
    assert lines[1:] == [
        "  0.mp4 (videos.txt:1): 0 usable frames (of 8 at 25 fps)",
        "  2.mp4 (videos.txt:3): 8 usable frames (of 20 at 25 fps)",
    ]


def test_frames_before_and_after_retiming_are_told():
    with pytest.raises(UserError, match=r"8 usable frames at 8 fps \(of 24 at 24 fps\)"):
        plan([VideoInfo(24, 64, 64, 24.0)], fps=8)


def test_a_rate_cannot_be_met_without_the_clips_own():
    with pytest.raises(UserError, match=r"its frame rate is unknown, so --fps cannot be used"):
        plan([VideoInfo(24, 64, 64, 0.0)], fps=8)


def test_the_plan_is_described_bucket_by_bucket():
    infos = [VideoInfo(33, 90, 90, 25.0), VideoInfo(17, 64, 80, 25.0), VideoInfo(19, 64, 64, 25.0)]
    assert describe_plan(plan([*infos, VideoInfo(10, 16, 40, 25.0)])).splitlines() == [
        "bucket    clips  upscaled  off aspect  clip frames",
        "9x32x64       1         1         20%           10",
        "17x64x64      3         0          0%           19",
    ]
