"""Without flags, validation videos have prompts and a size from the data; prompts without the id token are named."""

from pathlib import Path

import pytest

from args import parse_args
from common.errors import UserError
from data.buckets import Bucket
from data.clips import Clip, ClipSample
from flags.settings import TrainingSettings
from original_folders import write_original_folder
from planning.samples import PreparedData, RawData
from prepared.folder import PreparedSettings, write_settings
from prepared.read_index import read_index
from prepared_folders import index_of
from validation.defaults import missing_token, with_data_defaults


@pytest.fixture
def parse(tmp_path):
    def parse(*flags: str) -> TrainingSettings:
        argv = ["--pretrained_model_name_or_path", "owner/name", "--data_root", str(tmp_path), *flags]
        return parse_args(argv, task="text-to-video", method="lora")

    return parse


def clips(*samples: tuple[tuple[int, int, int], str]) -> RawData:
    return RawData([ClipSample(Clip(Path("a.mp4"), text, ""), None, Bucket(*size), ()) for size, text in samples])


def prepared(folder: Path, *captions: str, id_token: str | None = None) -> PreparedData:
    flags = {"id_token": id_token}
    write_settings(folder, PreparedSettings("shards", {}, "fp32", 226, False, flags=flags))
    return PreparedData(index_of([Bucket(*WIDE)] * len(captions), folder, caption=captions), [folder])


WIDE, TALL, LONG, STILL = (17, 64, 96), (17, 96, 64), (49, 64, 96), (1, 64, 96)


@pytest.mark.parametrize(
    ("sizes", "flags", "expected"),
    [
        ([WIDE, TALL, TALL], "", TALL),
        ([TALL, WIDE], "", WIDE),  # equally many: the order of the clips does not matter
        ([STILL, STILL, WIDE], "", WIDE),
        ([STILL], "", (49, 480, 720)),
        ([LONG, LONG, WIDE], "--max_num_frames 81", (81, 64, 96)),
        ([WIDE], "--height 480 --width 720", (17, 480, 720)),
        ([WIDE], "--height 480", (17, 480, 96)),
    ],
)
def test_a_video_has_the_size_of_most_videos_unless_the_user_sets_it(parse, sizes, flags, expected):
    data = clips(*((size, "a") for size in sizes))
    size = with_data_defaults(parse("--validation_prompt", "b", *flags.split()), data).clips
    assert (size.max_num_frames, size.height, size.width) == expected


@pytest.mark.parametrize("flags", ["--validation_steps 5", "--validation_epochs 1", "--validate_first"])
def test_prompts_are_the_first_and_the_last_caption_if_a_flag_asks_for_validation(parse, flags):
    data = clips((WIDE, "x one"), (WIDE, "x two"), (WIDE, "x three"), (WIDE, "x one"))
    settings = parse(*flags.split())
    assert settings.validation.validate_first
    assert with_data_defaults(settings, data).validation.prompts == ("x one", "x three")
    assert with_data_defaults(settings, clips((WIDE, "x one"))).validation.prompts == ("x one",)


@pytest.mark.parametrize("flags", ["", "--validation_steps 5 --validation_prompt b"])
def test_captions_are_no_prompts_without_such_a_flag_or_beside_a_prompt(parse, flags):
    settings = parse(*flags.split())
    assert with_data_defaults(settings, clips((WIDE, "a"))).validation.prompts == settings.validation.prompts


def test_held_out_clips_are_measured_without_videos_of_captions(parse, tmp_path):
    (tmp_path / "held-out.csv").touch()
    settings = parse("--validation_steps", "5", "--validation_dataset_file", str(tmp_path / "held-out.csv"))
    assert with_data_defaults(settings, clips((WIDE, "a"))).validation.prompts == ()


def test_the_captions_of_prepared_data_are_those_of_its_index(parse, tmp_path):
    settings = parse("--validation_steps", "5", "--load_tensors")
    for captions in (["one", "two", "three"], ["", "one", "three", "one"]):
        prompts = with_data_defaults(settings, prepared(tmp_path, *captions)).validation.prompts
        assert prompts == ("one", "three")
    original = PreparedData(read_index(write_original_folder(tmp_path / "original", 3)), [tmp_path / "original"])
    assert with_data_defaults(settings, original).validation.prompts == ("clip 0", "clip 2")
    data = PreparedData(index_of([Bucket(*WIDE)]), [tmp_path])
    with pytest.raises(UserError, match=r"^--validation_prompt: the prepared data has no list of its captions"):
        with_data_defaults(settings, data)


def test_prompts_without_the_token_of_the_data_are_a_warning(parse, tmp_path):
    flags = ("--validation_prompt", "BW a cat:::a dog:::a cow in BW style")
    lines = [missing_token(parse(*flags, "--load_tensors"), prepared(tmp_path, "BW a", id_token="BW"))]
    lines.append(missing_token(parse(*flags, "--id_token", "BW"), clips((WIDE, "BW a"))))
    assert [line.startswith("--validation_prompt: 1 of 3 prompts lack BW, the id token") for line in lines] == [
        True
    ] * 2
    assert missing_token(parse(*flags), clips((WIDE, "a"))) is None
    assert missing_token(parse("--id_token", "BW", "--validation_prompt", "BW a"), clips((WIDE, "BW a"))) is None
    assert missing_token(parse("--id_token", "BW"), clips((WIDE, "BW a"))) is None  # nothing is sampled
