"""The probe agrees with decoding everything, names what is wrong with a file, and shares its results."""

import hashlib
import os
import random
import stat
from dataclasses import replace
from fractions import Fraction

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoded_clips import (
    ENCODINGS,
    X265_GROUPS,
    all_frames,
    encode,
    ffmpeg,
    numbered_frame,
    remuxed,
    stream_copied_cut,
)
from video.cache import FileCache
from video.io import read_frames
from video.probe import VideoInfo, probe_files, probe_video


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def still_image(path, number=1):
    Image.fromarray(numbered_frame(number)).save(path)
    return path


# Only decoding can count their frames.
NOT_BY_PACKETS = {"transport stream", "MPEG-4 with B-frames", "AVI", "VP8"}


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_probe_agrees_with_decoding_everything(clip_of, name):
    clip = clip_of(name)
    facts = {"fps": 25.0, "seekable": name not in NOT_BY_PACKETS, "sha256": sha256(clip)}
    assert probe_video(clip) == VideoInfo(*all_frames(clip).shape[:3], **facts)


@pytest.mark.parametrize("name", ["closed groups", "single keyframe, B-frames"])
def test_frames_hidden_by_an_edit_list_are_not_counted(clip_of, tmp_path, name):
    cut = stream_copied_cut(clip_of(name), tmp_path / "cut.mp4")
    with av.open(str(cut)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    truth = all_frames(cut)
    assert len(truth) < len(packets)
    assert probe_video(cut).num_frames == len(truth)
    assert not probe_video(cut).seekable


def test_packets_without_a_picture_are_not_counted(clip_of, tmp_path):
    clip = clip_of("AV1")
    with av.open(str(clip)) as container:
        last = max(container.streams.video[0].index_entries, key=lambda entry: entry.pos)
    filling = last.size - 5
    padding = b"\x12\0" + bytes([0x7A, filling & 0x7F | 0x80, filling >> 7]) + bytes(filling)  # valid, and no picture
    content = clip.read_bytes()
    path = tmp_path / "padded.mp4"
    path.write_bytes(content[: last.pos] + padding + content[last.pos + last.size :])
    assert len(all_frames(path)) < 60
    assert probe_video(path).num_frames == len(all_frames(path))


def test_a_still_image_is_one_frame_without_a_rate(tmp_path):
    path = still_image(tmp_path / "still.png")
    assert probe_video(path) == VideoInfo(1, 48, 80, 0.0, is_image=True, sha256=sha256(path))


def test_a_turned_photo_is_probed_as_displayed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(numbered_frame(1)).save(tmp_path / "photo.jpg", exif=exif)
    info = probe_video(tmp_path / "photo.jpg")
    assert (info.height, info.width, info.rotation) == (80, 48, 270)


def test_an_animated_gif_is_a_video(tmp_path):
    pictures = [Image.fromarray(numbered_frame(number)) for number in range(6)]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], duration=100)
    info = probe_video(tmp_path / "clip.gif")
    assert (info.num_frames, info.height, info.width, info.fps, info.is_image) == (6, 48, 80, 10.0, False)


def test_the_rate_is_exact_for_ntsc(tmp_path):
    for suffix in ("mp4", "mkv"):  # Matroska rounds time stamps to milliseconds
        clip = encode(tmp_path / f"ntsc.{suffix}", frames=40, fps=Fraction(30000, 1001))
        assert probe_video(clip).fps == 30000 / 1001
        assert probe_video(clip).frame_times is None


TIMES = [0, 40, 80, 120, 160, 360, 400, 440, 480, 520, 560, 1000, 1020, 1040]  # milliseconds


@pytest.mark.parametrize(("suffix", "delay"), [("mp4", 0), ("mkv", 0), ("ts", 0), ("avi", 0), ("mkv", 300)])
def test_the_times_of_a_variable_rate_are_exact_and_count_from_the_first_frame(tmp_path, suffix, delay):
    codec = {"codec": "mjpeg", "pixels": "yuvj420p"} if suffix == "avi" else {"bf": "2"}
    times = [time + delay for time in TIMES]
    clip = encode(tmp_path / f"variable.{suffix}", frames=len(TIMES), times=times, fps=1000, **codec)
    info = probe_video(clip)
    assert info.frame_times == tuple(1000 * time for time in TIMES)
    assert info.fps == pytest.approx(13 / 1.04)


@pytest.mark.parametrize(("shift", "varies"), [(9, False), (11, True)])
def test_a_rate_varies_from_a_quarter_of_a_frame_on(tmp_path, shift, varies):
    times = [40 * number for number in range(21)]
    times[10] += shift
    info = probe_video(encode(tmp_path / "shaken.mkv", frames=21, times=times))
    assert (info.frame_times is not None) == varies
    assert info.fps == pytest.approx(25)


def test_how_long_the_last_frame_stays_does_not_matter(clip_of, tmp_path):
    def prolong_the_last(packet):
        packet.duration *= 50 if packet.pts == 59 * 512 else 1

    path = remuxed(clip_of("no B-frames"), tmp_path / "stays.mp4", prolong_the_last)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate < 20
    info = probe_video(path)
    assert (info.fps, info.frame_times) == (25.0, None)


def test_equal_time_stamps_are_taken_for_a_constant_rate(clip_of, tmp_path):
    def round_down_to_tens(packet):
        packet.pts = packet.dts = packet.pts // (10 * 512) * (10 * 512)

    info = probe_video(remuxed(clip_of("no B-frames"), tmp_path / "equal.mkv", round_down_to_tens))
    assert (info.num_frames, info.frame_times, info.seekable) == (60, None, False)


def test_the_reason_says_why_a_file_is_unusable(clip_of, tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + random.Random(0).randbytes(5000))
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    content = clip_of("closed groups").read_bytes()
    (tmp_path / "cut before its index.mp4").write_bytes(content[: len(content) // 2])
    sine = ["-f", "lavfi", "-i", "sine=d=0.2"]
    ffmpeg(*sine, tmp_path / "sound.mp4")
    cover = ["-i", still_image(tmp_path / "cover.png"), "-map", "0", "-map", "1", "-disposition:v", "attached_pic"]
    ffmpeg(*sine, *cover, "-c:v", "copy", tmp_path / "song with a cover.m4a")
    os.mkfifo(tmp_path / "pipe.mp4")
    reasons = {
        "empty.mp4": r"^file is empty \(0 bytes\)$",
        "noise.mp4": r"^not a readable video: Invalid data",
        "noise.png": r"^not a readable image",
        "cut before its index.mp4": r"^not a readable video",
        "sound.mp4": r"^has no video stream$",
        "song with a cover.m4a": r"^has no video stream$",
        "nowhere.mp4": r"^does not exist$",
        "empty.mp4/clip.mp4": r"^does not exist$",
        "loop.mp4": r"^cannot be read: Too many levels of symbolic links$",
        "a caption in place of a path" * 20: r"^cannot be read: File name too long$",
        "nowhere\0.mp4": "embedded null",
        "pipe.mp4": r"^is not a file$",
        ".": r"^is not a file$",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            probe_video(tmp_path / name)


def test_a_file_without_permission_is_named_by_reason(tmp_path):
    (tmp_path / "closed").mkdir()
    path, hidden = still_image(tmp_path / "still.png"), still_image(tmp_path / "closed" / "still.png")
    path.chmod(stat.S_IWUSR)
    hidden.parent.chmod(stat.S_IWUSR)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # nobody instead of root, who may read everything
        for file in (path, hidden):
            with pytest.raises(ValueError, match=r"^cannot be read: Permission denied$"):
                probe_video(file)
    finally:
        os.seteuid(user)


def frame_ends(path):
    with av.open(str(path)) as container:
        return sorted(entry.pos + entry.size for entry in container.streams.video[0].index_entries)


def test_a_file_cut_off_after_its_index_is_truncated(clip_of, tmp_path):
    complete = clip_of("index in front")
    content, ends, path = complete.read_bytes(), frame_ends(complete), tmp_path / "cut.mp4"
    zeros = bytes(len(content) * 4 // 10)
    # Cut in a frame, near the end, exactly between two frames; and filled with zeros.
    for rest in (content[: -len(zeros)], content[: ends[-1] - 3], content[: ends[40]], content[: -len(zeros)] + zeros):
        path.write_bytes(rest)
        with pytest.raises(ValueError, match=r"^is truncated or damaged: 60 frames are listed but only \d+ decode"):
            probe_video(path)


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_a_clip_that_changes_its_size_is_refused(tmp_path, suffix):
    parts = [encode(tmp_path / f"{width}.ts", frames=20, width=width) for width in (80, 96)]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    if suffix != "ts":
        ffmpeg("-i", tmp_path / "joined.ts", "-c", "copy", tmp_path / f"joined.{suffix}")
    with pytest.raises(ValueError, match=r"^changes its size from 80x48 to 96x48 at frame 20$"):
        probe_video(tmp_path / f"joined.{suffix}")


@pytest.fixture(scope="module")
def contents(clip_of, tmp_path_factory):
    """Files of many kinds to damage: suffix and bytes."""
    folder = tmp_path_factory.mktemp("images")
    images = [still_image(folder / f"still.{suffix}") for suffix in ("png", "jpg", "webp", "bmp", "tif", "gif")]
    names = ["index in front", "fragmented", "open groups, matroska", "HEVC, open groups", "VP9", "AVI"]
    return [(path.suffix, path.read_bytes()) for path in (*images, *map(clip_of, (*names, "transport stream")))]


edits = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 40), st.binary(max_size=20))


@given(st.integers(0, 12), st.lists(edits, min_size=1, max_size=8), st.floats(0.1, 1.3))
@settings(deadline=None, max_examples=150)
def test_a_damaged_file_has_a_reason_or_can_be_read(contents, tmp_path_factory, number, edits, length):
    suffix, content = contents[number]
    for place, removed, added in edits:
        at = int(place * len(content)) if removed % 2 else int(place * min(len(content), 400))
        content = content[:at] + added + content[at + removed :]
    path = tmp_path_factory.mktemp("damaged") / f"damaged{suffix}"
    path.write_bytes(content[: int(length * len(content))])
    info = probe_files([path])[path]
    if isinstance(info, str):
        assert info
        return
    wanted = sorted({0, info.num_frames // 2, info.num_frames - 1})
    try:
        frames = read_frames(path, wanted, seekable=info.seekable)
    except ValueError as error:  # damage in the middle, which only decoding everything can find
        assert str(error).startswith(f"{path}: ")
    else:
        assert frames.shape == (len(wanted), info.height, info.width, 3)


def test_each_file_has_its_info_or_a_reason(clip_of, tmp_path):
    empty, good, missing = tmp_path / "empty.mp4", clip_of("no B-frames"), tmp_path / "nowhere.mp4"
    empty.touch()
    results = probe_files([empty, good, missing, good])
    assert list(results) == [empty, good, missing]
    assert list(results.values()) == ["file is empty (0 bytes)", probe_video(good), "does not exist"]


def test_a_cached_result_is_used(tmp_path):
    path = tmp_path / "clip.mkv"
    encode(path, frames=len(TIMES), times=TIMES)
    (info,) = probe_files([path], FileCache(tmp_path / "cache")).values()
    state = path.stat()
    path.write_bytes(bytes(state.st_size))  # now only the cache knows the frames
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    (again,) = probe_files([path], FileCache(tmp_path / "cache")).values()
    assert again == info
    assert info.frame_times == tuple(1000 * time for time in TIMES)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_the_command_of_the_plan_makes_a_transport_stream_seekable(tmp_path, codec):
    options = {"x265-params": X265_GROUPS} if codec == "libx265" else {}
    source, target = encode(tmp_path / "clip.ts", codec=codec, **options), tmp_path / "clip-seekable.mp4"
    ffmpeg("-i", source, "-map", "0:v:0", "-c", "copy", target)
    assert not probe_video(source).seekable
    assert probe_video(target).seekable
    assert (all_frames(target) == all_frames(source)).all()


def test_corrections_survive_the_cache_and_change_the_content(tmp_path):
    path, cache = tmp_path / "mirrored.mp4", FileCache(tmp_path)
    ffmpeg("-display_hflip", "-i", encode(tmp_path / "clip.mp4", frames=2), "-c", "copy", path)
    assert probe_files([path], cache)[path] == probe_files([path], cache)[path] == probe_video(path)
    info = probe_video(path)
    assert info.corrections == ("mirrored",)
    assert info.content != replace(info, corrections=()).content == info.sha256


def test_a_repaired_clip_is_probed_again(clip_of, tmp_path):
    path, cache = tmp_path / "clip.mp4", FileCache(tmp_path)
    content = clip_of("no B-frames").read_bytes()
    path.write_bytes(bytes(len(content)))
    state = path.stat()
    assert "not a readable video" in probe_files([path], cache)[path]
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert probe_files([path], cache)[path].num_frames == 60


@pytest.mark.parametrize(("ranks_of_a_machine", "firsts"), [(3, [0, 4, 8]), (2, [0, 6, 3, 9])])
def test_each_rank_begins_at_its_own_part_of_the_list(tmp_path, monkeypatch, ranks_of_a_machine, firsts):
    paths = [still_image(tmp_path / f"{number}.png", number) for number in range(12)]
    looked_up, find = [], FileCache.find
    monkeypatch.setattr(
        FileCache, "find", lambda cache, path, *rest: looked_up.append(path) or find(cache, path, *rest)
    )
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", str(len(firsts)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_of_a_machine))
    for rank, first in enumerate(firsts):
        monkeypatch.setenv("RANK", str(rank))
        cache = FileCache(tmp_path / f"cache of machine {rank // ranks_of_a_machine}")
        looked_up.clear()
        assert list(probe_files(paths, cache)) == paths
        assert looked_up == paths[first:] + paths[:first]


@pytest.mark.parametrize(
    ("rank", "count", "shown"), [(None, 50, True), ("0", 50, True), ("0", 49, False), ("1", 50, False)]
)
def test_many_files_show_their_progress_on_the_main_rank(tmp_path, monkeypatch, capsys, rank, count, shown):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    probe_files([tmp_path / f"{number}.mp4" for number in range(count)])
    assert ("Checking clips" in capsys.readouterr().err) == shown
