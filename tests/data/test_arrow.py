"""Parquet files and data sets of the `datasets` library are read as `data.arrow` documents."""

import io
import re
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clip_lists import bad, captions, error_of, good, read, touch, write
from data.clips import Clip
from encoded_clips import all_frames


ROWS = {"video": ["a.mp4", "sub/b.mp4"], "text": ["A cat.\nOn a mat.", "A dog."], "n": [1, None]}
MEDIA = pa.struct({"bytes": pa.binary(), "path": pa.string()})
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)


def picture():
    """An image file's bytes, 4 pixels high and 6 wide."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(buffer, "PNG")
    return buffer.getvalue()


def nested(kind, depth):
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind


def read_parquet(folder, values, kind=None, **columns):
    """Clips and bad clips of a column of videos."""
    table = {"video": pa.array(values, kind), "text": [f"Cat {number}." for number in range(len(values))]}
    pq.write_table(pa.table(table | columns), folder / "data.parquet")
    return read(None, dataset_file=folder / "data.parquet", cache=folder / "cache")


def test_parquet_rows_are_numbered_and_extra_columns_of_single_values_kept(tmp_path):
    table = {"video": ["a.mp4", None], "text": ["A cat.", "A dog."], "fps": [8.0, None], "raw": [b"x", b"y"]}
    pq.write_table(pa.table(table | {"list": [[1], [2]]}), tmp_path / "data.parquet")
    clips, bad_clips = read(tmp_path, dataset_file=Path("data.parquet"))
    assert clips == [Clip(tmp_path / "a.mp4", "A cat.", "data.parquet:row 1", metadata={"fps": "8.0"})]
    assert [str(clip) for clip in bad_clips] == ["unnamed clip (data.parquet:row 2): has no path"]


def test_parquet_text_that_is_not_utf8_is_a_bad_clip(tmp_path):
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 4], np.int32)), pa.py_buffer(b"caf\xe9"))
    pq.write_table(pa.table({"video": pa.array(["a.mp4"]), "text": broken}), tmp_path / "data.parquet")
    (line,) = bad(tmp_path, dataset_file=tmp_path / "data.parquet")
    assert line.startswith("a.mp4 (data.parquet:row 1): has an unreadable value in column 'text'")


def test_parquet_may_hold_a_files_bytes_with_or_without_its_path(tmp_path):
    ((clip,), _) = read_parquet(tmp_path, [b"content"])
    assert clip.video.read_bytes() == b"content"
    clips, bad_clips = read_parquet(tmp_path, [{"bytes": b"x", "path": "a.MOV"}, {"path": "b.mp4"}, None], MEDIA)
    assert [clip.video.suffix for clip in clips] == [".mov", ".mp4"]
    assert [clip.reason for clip in bad_clips] == ["has no path"]


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int64()])
def test_parquet_may_hold_decoded_videos_of_any_length_and_their_rate(tmp_path, kind):
    videos = [PIXELS, PIXELS[:2]]
    clips, bad_clips = read_parquet(tmp_path, [video.tolist() for video in videos], nested(kind, 4), fps=[None, 12])
    assert bad_clips == []
    assert all(np.array_equal(all_frames(clip.video), video) for clip, video in zip(clips, videos, strict=True))
    with av.open(str(clips[1].video)) as container:
        assert container.streams.video[0].average_rate == 12


TWO_SIZES = [[[[1, 2, 3]]], [[[1, 2, 3]], [[1, 2, 3]]]]


@pytest.mark.parametrize(
    ("video", "reason"), [(TWO_SIZES, "has list among its frames, not an image"), ([], "holds no frames")]
)
def test_decoded_frames_that_make_no_video_are_a_bad_clip(tmp_path, video, reason):
    _, (bad_clip,) = read_parquet(tmp_path, [video], nested(pa.uint8(), 4))
    assert bad_clip.reason == reason


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The library with a temporary cache."""
    import datasets

    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
        yield datasets


@pytest.fixture(params=["csv", "json", "parquet", "saved", "saved splits"])
def local_dataset(request, hub, tmp_path):
    """The same two rows as a folder of every kind that the library reads."""
    data = hub.Dataset.from_dict(ROWS)
    place = tmp_path / "my data"
    if request.param == "saved":
        data.save_to_disk(place)
    elif request.param == "saved splits":
        hub.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(place)
    else:
        place.mkdir()
        getattr(data, f"to_{request.param}")(place / f"train.{request.param}")
    return place


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_data_set_of_any_kind_is_read_silently(local_dataset, hub, streaming, capfd):
    hub.enable_progress_bars()
    hub.logging.set_verbosity_info()
    capfd.readouterr()
    clips = good(None, dataset_name=str(local_dataset), dataset_streaming=streaming)
    assert capfd.readouterr() == ("", "")
    assert [clip.video for clip in clips] == [local_dataset / "a.mp4", local_dataset / "sub/b.mp4"]
    assert captions(clips) == ["A cat.\nOn a mat.", "A dog."]
    assert clips[1].source == f"{local_dataset}:train:row 2"
    assert [float(clip.metadata["n"]) for clip in clips if clip.metadata] == [1]


def test_the_data_root_is_where_paths_of_a_data_set_start(hub, tmp_path):
    hub.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "clips").mkdir()
    assert good(tmp_path / "clips", dataset_name=str(tmp_path / "saved"))[1].video == tmp_path / "clips/sub/b.mp4"


def test_a_split_is_read_when_named_and_an_unknown_one_refused(hub, tmp_path):
    data = hub.Dataset.from_dict(ROWS)
    data.save_to_disk(tmp_path / "one")
    hub.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "both")
    assert captions(good(None, dataset_name=str(tmp_path / "both"), dataset_split="test")) == ["A dog."]
    assert error_of(None, dataset_name=str(tmp_path / "one"), dataset_split="test") == (
        f"--dataset_name {tmp_path / 'one'} has no split 'test'; it has train: set --dataset_split"
    )


def test_an_unknown_split_is_named_with_the_existing_ones(local_dataset):
    message = error_of(None, dataset_name=str(local_dataset), dataset_split="validation")
    assert re.search(r"validation.*train", message)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_column_or_configuration_is_named_with_the_existing_ones(hub, tmp_path, streaming):
    write(tmp_path / "data/train.csv", "path,text\na.mp4,A cat.\n")
    source = {"dataset_name": str(tmp_path / "data"), "dataset_streaming": streaming}
    assert error_of(None, **source).endswith("data has no column 'video'; it has path, text: set --video_column")
    message = error_of(None, **source, dataset_config_name="large")
    assert "'large' not found. Available: ['default']" in message


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.parquet", "PAR1 and nothing more", ""),  # damaged
        ("data.py", "open('ran', 'w')", " cannot be read"),  # code is never run
        (None, "", " cannot be read: Couldn't reach"),  # not on this machine, and there is no network
    ],
)
def test_a_data_set_that_cannot_be_read_is_one_line(hub, tmp_path, monkeypatch, streaming, name, content, reason):
    monkeypatch.chdir(tmp_path)
    dataset = str(write(tmp_path / "data" / name, content).parent) if name else "nobody/nothing"
    message = error_of(None, dataset_name=dataset, dataset_streaming=streaming)
    assert message.startswith(f"--dataset_name {dataset}{reason}")
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_videos_with_metadata_is_read_without_a_video_decoder(hub, tmp_path, streaming):
    touch(tmp_path / "data/train", "a.mp4")
    write(tmp_path / "data/train/metadata.csv", "file_name,text\na.mp4,A cat.\n")
    (clip,) = good(None, dataset_name=str(tmp_path / "data"), dataset_streaming=streaming)
    assert (clip.video, clip.caption) == (tmp_path / "data/train/a.mp4", "A cat.")


@pytest.mark.parametrize("streaming", [False, True])
def test_features_of_media_are_read(hub, tmp_path, streaming):
    decoded, frames = hub.Array4D((None, 4, 6, 3), "uint8"), hub.List(hub.Image())
    features = {"encoded": hub.Video(), "decoded": decoded, "frames": frames}
    features |= {"image": hub.Image(), "text": hub.Value("string")}
    image = {"bytes": picture(), "path": None}
    row = {"encoded": {"bytes": b"content", "path": "a.mp4"}, "decoded": PIXELS.tolist(), "frames": [image, image]}
    rows = {name: [value] for name, value in (row | {"image": image, "text": "A cat."}).items()}
    (tmp_path / "data").mkdir()
    hub.Dataset.from_dict(rows, features=hub.Features(features)).to_parquet(tmp_path / "data/train.parquet")
    options = {"dataset_name": str(tmp_path / "data"), "dataset_streaming": streaming, "cache": tmp_path / "cache"}
    by_column = {column: good(None, **options, video_column=column)[0] for column in row}
    assert by_column["encoded"].video.read_bytes() == b"content"
    assert np.array_equal(all_frames(by_column["decoded"].video), PIXELS)
    assert np.array_equal(all_frames(by_column["frames"].video), PIXELS[[0, 0]])
    assert by_column["encoded"].image.read_bytes() == picture()


def test_streaming_reads_only_the_rows_asked_for_and_does_not_import_torch(hub, tmp_path, monkeypatch):
    class NoTorch:
        @staticmethod
        def find_spec(name, path=None, target=None):
            assert name != "torch"

    monkeypatch.setattr(hub.config, "TORCH_AVAILABLE", True)
    monkeypatch.setattr(sys, "meta_path", [NoTorch, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    table = pa.table({"video": [b"first", b"second", b"third"], "text": ["A cat."] * 3})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data/train-00000.parquet", row_group_size=1)
    options = {"dataset_name": str(tmp_path / "data"), "dataset_streaming": True, "max_samples": 2}
    assert len(good(None, **options, cache=tmp_path / "cache")) == 2
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_web_data_set_is_read(hub, tmp_path, streaming):
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data/train-0.tar", "w") as archive:
        for name, content in (("a.mp4", b"first"), ("a.txt", b"A cat."), ("b.mp4", b"second"), ("b.txt", b"A dog.")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    options = {"dataset_name": str(tmp_path / "data"), "video_column": "mp4", "caption_column": "txt"}
    clips = good(None, **options, dataset_streaming=streaming, cache=tmp_path / "cache")
    assert [(clip.caption, clip.metadata) for clip in clips] == [("A cat.", {}), ("A dog.", {})]
    assert [clip.video.read_bytes() for clip in clips] == [b"first", b"second"]
