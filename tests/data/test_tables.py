"""Text files, CSV, TSV, JSON and Parquet are read as `data.tables` documents, and mistakes in them are named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_lists import bad, captions, error_of, good, read, write, write_lists, write_table
from common.errors import UserError
from data.clips import Clip


def test_a_pair_of_text_files_is_read_line_by_line(tmp_path):
    write_lists(tmp_path, videos="a.mp4\n videos/c d.mp4 \n", prompts="A\u2028cat\x0b.\n  Ein Käfer, 2 m “groß” \n")
    assert good(tmp_path) == [
        Clip(tmp_path / "a.mp4", "A\u2028cat\x0b.", "videos.txt:1"),  # only line ends split lines
        Clip(tmp_path / "videos/c d.mp4", "Ein Käfer, 2 m “groß”", "videos.txt:2"),
    ]


def test_the_columns_name_the_text_files(tmp_path):
    write(tmp_path / "my_videos.txt", "a.mp4")
    write(tmp_path / "captions", "A cat.")
    write(tmp_path / "frames.txt", "a.png")
    assert good(tmp_path, video_column="my_videos.txt", caption_column="captions", image_column="frames.txt") == [
        Clip(tmp_path / "a.mp4", "A cat.", "my_videos.txt:1", tmp_path / "a.png")
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_line_ends_and_blank_last_lines_do_not_matter(tmp_path, mark, end):
    videos, prompts = (mark + end.join(lines) for lines in (["a.mp4", "b.mp4", "", " "], ["A cat.", "A dog.", ""]))
    write_lists(tmp_path, videos=videos, prompts=prompts)
    assert [(clip.video.name, clip.caption) for clip in good(tmp_path)] == [("a.mp4", "A cat."), ("b.mp4", "A dog.")]


@pytest.mark.parametrize(("file", "column"), [("prompts", "caption"), ("clips", "video"), ("frames", "image")])
def test_a_missing_text_file_is_named_with_its_flag(tmp_path, file, column):
    write_lists(tmp_path, videos="a.mp4", **{} if file == "prompts" else {"prompts": "A cat."})
    name = "text" if file == "prompts" else f"{file}.txt"
    message = f"{tmp_path / file}.txt does not exist; --{column}_column names the file"
    assert error_of(tmp_path, **{f"{column}_column": name}).startswith(message)


@pytest.mark.parametrize("kind", ["image", "control", "mask"])
def test_the_usual_file_is_not_read_instead_of_a_missing_one(tmp_path, kind):
    write_lists(tmp_path, videos="a.mp4", prompts="A cat.", **{f"{kind}s": "b.mp4"})
    message = f"{tmp_path / 'depth'} does not exist; --{kind}_column names the file"
    assert error_of(tmp_path, **{f"{kind}_column": "depth"}).startswith(message)
    assert getattr(good(tmp_path, **{f"{kind}_column": kind})[0], kind) == tmp_path / "b.mp4"


def test_blank_lines_in_the_middle_make_bad_clips(tmp_path):
    write_lists(tmp_path, videos="a.mp4\n\nc.mp4\nd.mp4\n", prompts="A cat.\nA dog.\n \nA cow.\n")
    assert bad(tmp_path) == ["unnamed clip (videos.txt:2): has no path", "c.mp4 (videos.txt:3): has no caption"]
    assert captions(read(tmp_path)[0]) == ["A cat.", "A cow."]


@pytest.mark.parametrize(("content", "position"), [(b"a.mp4\nb\xff.mp4", 7), ("a.mp4".encode("utf-16"), 0)])
def test_text_that_is_not_utf8_is_named_with_the_byte(tmp_path, content, position):
    write_lists(tmp_path, videos=content, prompts="A cat.")
    reason = f"is not UTF-8 text: byte {position} does not fit; save it as UTF-8"
    assert error_of(tmp_path) == f"{tmp_path / 'videos.txt'} {reason}"


@pytest.mark.parametrize(
    ("images", "last"), [("a.png\n\nc.png", "c.png"), ("a.png\r\n\r\nc.png\r\n\r\n", "c.png"), ("a.png\n\n", None)]
)
def test_images_txt_names_first_frames_and_an_empty_line_the_videos_own(tmp_path, images, last):
    write_lists(tmp_path, videos="a.mp4\nb.mp4\nc.mp4", prompts="A cat.\nA dog.\nA cow.", images=images)
    assert [clip.image and clip.image.name for clip in good(tmp_path)] == ["a.png", None, last]


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [("prompts", "A cat.\n", 1), ("images", "a.png", 1), ("images", "a.png\nb.png\nc.png\n", 3)],
)
def test_a_list_of_another_length_is_an_error(tmp_path, name, content, count):
    write_lists(tmp_path, **{"videos": "a.mp4\nb.mp4", "prompts": "A cat.\nA dog."} | {name: content})
    message = f"{tmp_path / 'videos.txt'} has 2 lines and {tmp_path / name}.txt has {count};"
    assert error_of(tmp_path).startswith(message)


def test_csv_columns_are_found_by_name_and_the_others_are_metadata(tmp_path):
    file = write(tmp_path / "data.csv", "text,number,note,video\nA cat.,1,,a.mp4\nA dog.,2,good,b.mp4\n")
    assert good(tmp_path, dataset_file=file) == [
        Clip(tmp_path / "a.mp4", "A cat.", "data.csv:2", metadata={"number": "1"}),
        Clip(tmp_path / "b.mp4", "A dog.", "data.csv:3", metadata={"number": "2", "note": "good"}),
    ]


@pytest.mark.parametrize(
    ("field", "caption"),
    [
        ('"""A cat, on a mat."""', "A cat, on a mat."),  # as in the documentation's example
        ('"""A film, ""noisy"" sound."""', '"A film, "noisy" sound."'),
        ('"""Hello"" she said, ""bye"""', '"Hello" she said, "bye"'),
    ],
)
def test_quotes_around_a_field_are_removed_and_those_of_a_caption_stay(tmp_path, field, caption):
    file = write(tmp_path / "data.csv", f'video,text\n"""a.mp4""",{field}\n')
    (clip,) = good(tmp_path, dataset_file=file)
    assert (clip.video, clip.caption) == (tmp_path / "a.mp4", caption)


def test_csv_may_have_commas_newlines_and_spaces_before_quotes_and_a_byte_order_mark(tmp_path):
    file = write(tmp_path / "data.csv", '\ufeffvideo, text\r\n\r\na.mp4, "A cat,\n on a mat."\r\nb.mp4,A dog.\r\n')
    assert good(tmp_path, dataset_file=file) == [
        Clip(tmp_path / "a.mp4", "A cat,\n on a mat.", "data.csv:3"),
        Clip(tmp_path / "b.mp4", "A dog.", "data.csv:5"),
    ]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_header_tells_what_separates_the_fields(tmp_path, suffix, separator):
    rows = [["video", '"text"', "note, by; me"], ["a.mp4", f'"A cat{separator} and ""more"""', "n"]]
    rows[0][2] = f'"{rows[0][2]}"'
    file = write(tmp_path / f"data.{suffix}", "\n".join(map(separator.join, rows)))
    assert good(tmp_path, dataset_file=file) == [
        Clip(tmp_path / "a.mp4", f'A cat{separator} and "more"', f"data.{suffix}:2", metadata={"note, by; me": "n"})
    ]


@pytest.mark.parametrize(
    ("suffix", "separator", "name"), [("csv", ",", "commas"), ("csv", ";", "semicolons"), ("tsv", "\t", "tabs")]
)
def test_rows_of_another_length_are_bad_clips(tmp_path, suffix, separator, name):
    rows = ["video|text", "a.mp4|A cat| on a mat.", 'b.mp4|"A|dog."', "c.mp4"]
    file = write(tmp_path / f"data.{suffix}", "\n".join(rows).replace("|", separator))
    clips, bad_clips = read(tmp_path, dataset_file=file)
    assert captions(clips) == [f"A{separator}dog."]
    assert [str(clip) for clip in bad_clips] == [
        f"a.mp4 (data.{suffix}:2): 3 fields where the header has 2; quote captions that contain {name}",
        f"c.mp4 (data.{suffix}:4): 1 field where the header has 2; quote captions that contain line breaks",
    ]


def test_a_quote_that_is_never_closed_is_an_error_not_a_short_list(tmp_path):
    file = write(tmp_path / "data.csv", 'video,text\na.mp4,"A cat.\nb.mp4,A dog.\n')
    assert error_of(tmp_path, dataset_file=file).startswith(f"{file}:2 is not valid CSV:")


def test_a_table_of_an_unknown_kind_is_refused_with_the_known_kinds(tmp_path):
    file = write(tmp_path / "data.xlsx", b"PK")
    assert error_of(tmp_path, dataset_file=file).endswith("must be one of .csv, .tsv, .jsonl, .json, .parquet")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("data.jsonl", '{"video": "a.mp4", "text": "A cat."}\n{"video": }\n', 2),
        ("data.jsonl", '[\n{"video": "a.mp4", "text": "A cat."},\n{"video": }]', 3),
        ("data.json", '[\n{"video": "a.mp4", "text": "A cat."},\n{"video": }]', 3),
    ],
)
def test_lines_that_are_not_json_are_named(tmp_path, name, content, line):
    file = write(tmp_path / name, content)
    problem = (
        "is not valid JSON: Expecting value at character 11; it must be an array of objects, or one object a line"
    )
    assert error_of(tmp_path, dataset_file=file) == f"{file}:{line} {problem}"


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_json_may_have_one_object_a_line_whatever_the_files_suffix(tmp_path, name):
    rows = ['{"video": "a.mp4", "text": "A cat.\\nOn a mat."}', "", '{"text": "A\u2028dog.", "video": "b.mp4"}']
    assert good(tmp_path, dataset_file=write(tmp_path / name, "\ufeff" + "\r\n".join(rows))) == [
        Clip(tmp_path / "a.mp4", "A cat.\nOn a mat.", f"{name}:1"),
        Clip(tmp_path / "b.mp4", "A\u2028dog.", f"{name}:3"),
    ]


@pytest.mark.parametrize("content", ["[" * 100_000, "[" + "1" * 5000 + "]"])
def test_json_that_cannot_be_parsed_is_one_line(tmp_path, content):
    message = error_of(tmp_path, dataset_file=write(tmp_path / "data.json", content))
    assert "is not valid JSON" in message
    assert "\n" not in message


def readable(text: str) -> str:
    """Invisible characters are no caption, which another test shows."""
    return text if any(map(str.isalnum, text)) else ""


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])).map(readable), min_size=1))
def test_every_caption_comes_back_as_it_was_written(tmp_path_factory, suffix, texts):
    file = tmp_path_factory.getbasetemp() / f"captions{suffix}"
    write_table(file, [{"video": f"{number}.mp4", "text": text} for number, text in enumerate(texts)])
    stripped = [text.strip() for text in texts]
    if suffix in (".csv", ".tsv"):  # where quotes around a field are a spreadsheet's, not the caption's
        stripped = [
            text[1:-1].strip() if text[:1] == text[-1:] == '"' and text.count('"') == 2 else text for text in stripped
        ]
    clips, bad_clips = read(None, dataset_file=file)
    found = {clip.video.name: clip.caption for clip in clips} | {clip.what: "" for clip in bad_clips}
    assert found == {f"{number}.mp4": text for number, text in enumerate(stripped)}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
@settings(deadline=None, max_examples=50)
@given(position=st.floats(0, 1), junk=st.binary(max_size=8), removed=st.integers(0, 20))
def test_a_damaged_table_is_rows_or_one_line_and_never_a_traceback(tmp_path_factory, suffix, position, junk, removed):
    file = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    write_table(file, [{"video": f"{number}.mp4", "text": f'A "cat", {number}.\nIt sits.'} for number in range(4)])
    content = file.read_bytes()
    at = int(position * len(content))
    file.write_bytes(content[:at] + junk + content[at + removed :])
    try:
        clips, bad_clips = read(None, dataset_file=file)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert clips or bad_clips
        assert all(clip.caption and clip.source.startswith(file.name) for clip in clips)
