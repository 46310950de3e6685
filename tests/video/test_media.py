"""Still images are read as displayed, and other files are left to PyAV."""

import av
import numpy as np
import pytest
from PIL import Image

from encoded_clips import encode, numbered_frame
from video.media import decode, open_video, packets_of, read_still_image, video_stream


def noise(height=6, width=10, channels=3, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype).squeeze()


def saved(tmp_path, pixels, mode=None, name="still.png", **options):
    Image.fromarray(pixels, mode).save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("name", ["still.png", "still.bmp", "still.tif", "still.webp"])
def test_every_pixel_of_an_image_is_read(tmp_path, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    image = read_still_image(saved(tmp_path, noise(), name=name, **options))
    assert image.pixels.dtype == np.uint8
    assert (image.pixels == noise()).all()
    assert image.rotation == 0


def test_a_photo_is_read_as_pyav_reads_it(tmp_path):
    path = saved(tmp_path, numbered_frame(7), name="photo.jpg")
    with av.open(str(path)) as container:
        (frame,) = container.decode(video=0)
    difference = read_still_image(path).pixels.astype(int) - frame.to_ndarray(format="rgb24")
    assert np.abs(difference).max() <= 6  # two decoders' ways of rounding


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path, orientation):
    stored = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_still_image(saved(tmp_path, stored, exif=exif))
    mirrored = stored[:, ::-1] if orientation in (2, 4, 5, 7) else stored
    assert (image.pixels == np.rot90(mirrored, image.rotation // 90)).all()
    # Where the stored picture's top left corner is shown, by the Exif standard's table (row 0, column 0).
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert (image.pixels[corner[orientation]] == stored[0, 0]).all()
    assert image.pixels.shape == ((10, 6, 3) if orientation >= 5 else (6, 10, 3))


def test_transparent_parts_are_white(tmp_path):
    pixels = noise(channels=4)
    image = read_still_image(saved(tmp_path, pixels))
    colours, opacity = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    assert np.abs(image.pixels - (colours * opacity + 255 * (1 - opacity))).max() <= 1


def test_palettes_grey_and_print_colours_become_rgb(tmp_path):
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "transparent.png", transparency=1)
    palette.save(tmp_path / "opaque.png", transparency=0)
    Image.new("L", (4, 2), 77).save(tmp_path / "grey.png")
    Image.new("1", (4, 2), 1).save(tmp_path / "bits.png")
    Image.new("CMYK", (4, 2), (255, 0, 0, 0)).save(tmp_path / "print.tif")
    colours = {"palette.png": [40, 50, 60], "opaque.png": [40, 50, 60], "grey.png": [77] * 3}
    colours |= {"print.tif": [0, 255, 255], "transparent.png": [255] * 3, "bits.png": [255] * 3}
    for name, colour in colours.items():
        assert (read_still_image(tmp_path / name).pixels == np.full((2, 4, 3), colour)).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_grey_of_16_bits_keeps_its_upper_8(tmp_path, name):
    stored = noise(channels=1, dtype=np.uint16)
    image = read_still_image(saved(tmp_path, stored, name=name))
    assert (image.pixels == (stored // 256)[..., None]).all()


def test_pixels_without_a_known_range_are_refused(tmp_path):
    for name, pixels in (("float.tif", np.zeros((2, 2), np.float32)), ("long.tif", np.full((2, 2), 70_000, np.int32))):
        with pytest.raises(ValueError, match=r"^not a readable image: .* save it with 8 bits a colour$"):
            read_still_image(saved(tmp_path, pixels, name=name))


def frames_of(path):
    with open_video(path) as container:
        stream = video_stream(container)
        return [frame.to_ndarray(format="rgb24") for frame in decode(packets_of(container, stream), stream)]


def animation(path, num_frames):
    first, *others = [Image.fromarray(numbered_frame(number)) for number in range(num_frames)]
    first.save(path, save_all=True, append_images=others, duration=100)
    return path


@pytest.mark.parametrize("name", ["clip.gif", "clip.png"])
def test_an_animated_picture_is_a_video(tmp_path, name):
    path = animation(tmp_path / name, 5)
    assert read_still_image(path) is None
    assert np.array_equal(frames_of(path), [numbered_frame(number) for number in range(5)])


@pytest.mark.parametrize("name", ["clip.gif", "clip.png", "clip.webp"])
def test_an_animation_of_one_frame_is_an_image(tmp_path, name):
    assert read_still_image(animation(tmp_path / name, 1)).pixels.shape == (48, 80, 3)


def test_an_animated_webp_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(ValueError, match="animated WebP, which FFmpeg does not decode; convert it to mp4"):
        read_still_image(animation(tmp_path / "clip.webp", 3))


def test_the_content_decides_not_the_name(tmp_path):
    image, clip = tmp_path / "image.mp4", tmp_path / "clip.png"
    image.write_bytes(saved(tmp_path, noise()).read_bytes())
    clip.write_bytes(encode(tmp_path / "clip.mp4", frames=5).read_bytes())
    assert (read_still_image(image).pixels == noise()).all()
    assert read_still_image(clip) is None
    assert len(frames_of(clip)) == 5


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.bmp", "cut.tif", "cut.webp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_cut_image_is_refused_by_one_of_the_two_readers(tmp_path, name, share):
    content = saved(tmp_path, noise(60, 100), name=name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises((ValueError, av.FFmpegError)):
        assert read_still_image(tmp_path / name) is None
        open_video(tmp_path / name)


def test_a_picture_too_large_for_memory_is_refused(tmp_path):
    content = bytearray(saved(tmp_path, noise(), name="bomb.bmp").read_bytes())
    content[18:26] = (60_000).to_bytes(4, "little") * 2  # width and height
    (tmp_path / "bomb.bmp").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a readable image: .* exceeds limit"):
        read_still_image(tmp_path / "bomb.bmp")


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_still_image(tmp_path / "nowhere.png")


def test_a_stream_that_begins_in_the_middle_of_a_file_does_not_stop_the_others(tmp_path):
    content = bytearray(encode(tmp_path / "clip.ts", g="12").read_bytes())
    packet_begins = [at for at in range(0, len(content), 188) if content[at + 1] == 0x41 and content[at + 2] == 0]
    content[packet_begins[50] + 2] = 0x33  # a transport packet of frame 50 becomes one of an unknown stream
    (tmp_path / "clip.ts").write_bytes(content)
    with pytest.raises(IndexError), av.open(str(tmp_path / "clip.ts")) as container:
        list(container.demux(video=0))
    assert len(frames_of(tmp_path / "clip.ts")) == 59


def test_files_that_ffmpeg_opens_but_that_are_no_videos_are_refused(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "still.avif")
    (tmp_path / "notes.nfo").write_text("Recorded in May.")
    encode(tmp_path / "private.ts", 4)
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{tmp_path / 'private.ts'}\n#EXT-X-ENDLIST\n"
    )
    for name, what in (("still.avif", "a HEIC or AVIF image"), ("notes.nfo", "text"), ("list.m3u8", "a playlist")):
        with pytest.raises(ValueError, match=f"is {what}"):
            open_video(tmp_path / name)
