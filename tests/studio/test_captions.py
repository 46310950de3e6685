"""Captions are changed where the data set has them, and nothing else is."""

import json

import pytest

from common.errors import UserError
from data.rows import DataSource
from studio.captions import read_captions, save_caption


CSV = b'\xef\xbb\xbfvideo;note;caption\r\n a.mp4;"x;y";"first, ""one"""\r\n\r\n'
CSV += b'b.mp4;  z ;"of two\r\nlines"\r\nc.mp4;;third'
TABLES = {
    "table.csv": (CSV, CSV.replace(b'"of two\r\nlines"', b'"new; ""te\nxt"""').replace(b"  z ", b"z ")),
    "table.jsonl": (
        b'{"video": "a.mp4", "caption": "first"}\n'
        b'{ "caption":"second", "video":"b.mp4", "captioned_by":"m", "n":1}\r\n',
        b'{"video": "a.mp4", "caption": "first"}\n'
        b'{"caption": "new; \\"te\\nxt\\"", "video": "b.mp4", "captioned_by": "user", "n": 1}\r\n',
    ),
}


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.mp4").touch()
    return tmp_path


def change(folder, source, text='new; "te\nxt"', number=1):
    clips, bad = read_captions(source, folder / ".cache")
    assert bad == []
    saved = save_caption(clips[number], text, folder)
    assert saved.text == read_captions(source, folder / ".cache")[0][number].text
    return clips[number]


def backups(folder):
    return [file.read_bytes() for file in sorted((folder / ".cogvideox-app/captions").rglob("*.*"))]


@pytest.mark.parametrize("name", TABLES)
def test_one_row_of_a_table_changes(folder, name):
    before, after = TABLES[name]
    (folder / name).write_bytes(before)
    change(folder, DataSource(None, folder / name))
    assert (folder / name).read_bytes() == after
    assert backups(folder) == [before]


def test_one_value_of_a_json_array_changes(folder):
    rows = [{"video": f"{name}.mp4", "caption": name, "tags": [1, None]} for name in "abc"]
    (folder / "table.json").write_text(json.dumps(rows))
    change(folder, DataSource(None, folder / "table.json"), "new")
    rows[1]["caption"] = "new"
    assert json.loads((folder / "table.json").read_text()) == rows


def test_one_line_of_a_list_changes_and_a_line_break_becomes_a_space(folder):
    (folder / "videos.txt").write_text("a.mp4\nb.mp4\nc.mp4\n")
    (folder / "prompts.txt").write_bytes("first\r\nsecond\u2028half\r\nthird".encode())
    change(folder, DataSource(folder), "two\nlines")
    assert (folder / "prompts.txt").read_bytes() == b"first\r\ntwo lines\r\nthird"


def test_a_caption_beside_its_clip_is_written_even_if_there_was_none(folder):
    (folder / "a.txt").write_text("first\n")
    for text in ("one\ntwo", "three"):
        change(folder, DataSource(folder, id_token="TOKEN"), text, number=0)
    change(folder, DataSource(folder), "<b>", number=2)
    assert (folder / "a.txt").read_text() == "three\n"
    assert (folder / "c.txt").read_text() == "<b>"
    assert backups(folder) == [b"first\n", b"one\ntwo\n"]


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl", "table.json"])
def test_a_table_without_the_column_of_captions_says_which_it_has(folder, name):
    row = json.dumps({"video": "a.mp4", "text": "first"})
    (folder / name).write_text({"table.csv": "video,text\na.mp4,first\n", "table.json": f"[{row}]"}.get(name, row))
    with pytest.raises(UserError, match="no column 'caption'; it has video, text: set --caption_column"):
        read_captions(DataSource(None, folder / name), folder / ".cache")
    clips, _ = read_captions(DataSource(None, folder / name, caption_column="text"), folder / ".cache")
    assert [clip.text for clip in clips] == ["first"]


def test_the_control_and_the_mask_of_a_clip_are_beside_it_where_they_are_trained_on(folder):
    for name in ("a.control.mp4", "a.mask.png", "c.control.mp4"):
        (folder / name).touch()
    source = DataSource(folder, control_column="control", mask_column="mask")
    clips, bad = read_captions(source, folder / ".cache")
    assert [clip.beside for clip in clips] == [
        (folder / "a.control.mp4", folder / "a.mask.png"),
        (folder / "c.control.mp4", None),
    ]
    assert [(one.what, one.reason) for one in bad] == [("b.mp4", "has no control clip")]
    assert [clip.beside for clip in read_captions(DataSource(folder), folder / ".cache")[0]] == [(None, None)] * 3


def test_a_data_set_given_by_name_needs_the_column_of_captions_too(folder):
    (folder / "data").mkdir()
    (folder / "data/train.csv").write_text("video,text\n../a.mp4,first\n")
    with pytest.raises(UserError, match="no column 'caption'; it has video, text: set --caption_column"):
        read_captions(DataSource(folder, dataset_name=str(folder / "data")), folder / ".cache")


def test_the_former_file_is_not_kept_behind_a_link(folder):
    (folder / "lists").mkdir()
    (folder / "lists/table.csv").write_text("video,caption\na.mp4,first\n")
    (folder / ".cogvideox-app/captions").mkdir(parents=True)
    (folder / ".cogvideox-app/captions/lists").symlink_to(folder)
    source = DataSource(folder, folder / "lists/table.csv")
    clips, _ = read_captions(source, folder / ".cache")
    with pytest.raises(UserError, match="captions/lists is a link or a file in the way of the app's"):
        save_caption(clips[0], "new", folder)
    assert (folder / "lists/table.csv").read_text().endswith("first\n")


@pytest.mark.parametrize("other", [b"a.mp4,other\n", b"", b"video,caption\nx.mp4,x\na.mp4,first\n"])
def test_a_file_that_changed_since_it_was_read_is_left_alone(folder, other):
    table = folder / "table.csv"
    table.write_bytes(b"video,caption\na.mp4,first\nb.mp4,second\n")
    clips, _ = read_captions(DataSource(None, table), folder / ".cache")
    table.write_bytes(other)
    with pytest.raises(UserError, match="read the clips again"):
        save_caption(clips[1], "new", folder)
    assert table.read_bytes() == other


def test_a_table_behind_a_link_out_of_the_root_and_parquet_are_not_changed(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = folder / "root"
    root.mkdir()
    (folder / "table.csv").write_bytes(b"video,caption\na.mp4,first\n")
    (root / "table.csv").symlink_to(folder / "table.csv")
    pq.write_table(pa.table({"video": ["a.mp4"], "caption": ["first"]}), folder / "table.parquet")
    cases = (root / "table.csv", root, "is not inside"), (folder / "table.parquet", folder, "only")
    for file, within, message in cases:
        source = DataSource(folder, file)
        with pytest.raises(UserError, match=message):
            save_caption(read_captions(source, folder / ".cache")[0][0], "new", within)
    assert backups(folder) == []
