"""The page on data sets matches the code: its files are written, its commands parsed, its clips read."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from data.buckets import Bucket
from data.clips import Clip
from data.sources import read_clips
from doc_pages import PARSERS, flags_of, noted_calls, read_page, script_of
from flags.settings import PreparationSettings
from make_control_clips import draw_controlled_clips
from make_demo_clips import make_demo_clips
from planning.describe import advise, describe_plan
from planning.plan import check_bad_clips, data_sources, plan_raw_clips
from planning.samples import RawData
from prepared.index import make_table, write_table
from prepared.read_index import read_index
from prepared_folders import write_prepared
from repository import ROOT


PAGE = read_page("assets/docs/dataset.md")
# (kind, name, content): the marker of a code block, and the code
EXAMPLES = re.findall(r"<!-- ([a-z]+): ([^>]+?) -->\n```[a-z]*\n(.*?)```", PAGE, flags=re.DOTALL)

RABBIT = "A plump grey rabbit yawns in front of its burrow, both arms stretched out"
STREET = "A cyclist waits at the edge of a busy street, one foot on the kerb"
LISTED = [("my-clips/videos/rabbit.mp4", RABBIT), ("my-clips/videos/street.mp4", STREET)]
READ_BY_LIBRARY = ("A rabbit yawns", "A cyclist waits")
RETOLD = [(video, caption) for (video, _), caption in zip(LISTED, READ_BY_LIBRARY, strict=True)]
# The clips that each command reads; the other commands read clips on the hub, or prepared data.
CLIPS = {
    **dict.fromkeys(("pair", "csv", "tsv", "jsonl", "json", "parquet", "several", "images"), LISTED),
    "folder": [("my-folder/night/street.mp4", STREET), ("my-folder/rabbit.mp4", RABBIT)],
    "local data set": list(zip(("my-dataset/rabbit.mp4", "my-dataset/street.mp4"), READ_BY_LIBRARY, strict=True)),
    **dict.fromkeys(("saved", "with first frames"), RETOLD),
    "mix": [("my-folder/night/street.mp4", f"BURROW {STREET}"), ("my-folder/rabbit.mp4", f"BURROW {RABBIT}"), *LISTED],
    "stills": [
        ("my-folder/night/street.mp4", STREET),
        ("my-folder/poster.png", "A poster of a rabbit on a bicycle"),
        ("my-folder/rabbit.mp4", RABBIT),
    ],
    "captioned": [("my-footage/rabbit.mp4", RABBIT), ("my-footage/street.mp4", STREET)],
}


class Workplace:
    """A folder in which the page is followed from top to bottom; scripts only note their arguments."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.flags: dict[str, list] = {}  # of each command's scripts, parsed
        self.clips: dict[str, list[Clip]] = {}
        make_demo_clips(folder / "try/clips")
        draw_controlled_clips(folder / "try/masked", count=4, seed=0)
        tensors = {"video_latents": torch.zeros(1), "prompt_embeds": torch.zeros(1)}
        write_prepared(folder / "my-prepared", {"rabbit": tensors, "street": tensors}, Bucket(49, 480, 720))
        for name in ("my-clips", "try/model", "disney", "prepared", "try/kept", "my-kept", "my-kept-prepared"):
            (folder / name).mkdir(parents=True)
        (folder / "try/model/model_index.json").touch()

    def follow(self, kind: str, name: str, content: str) -> None:
        if kind == "file":
            write(self.folder / name, content.replace("/data/", f"{self.folder}/"))
        elif kind == "files":
            for line in content.splitlines():
                path, _, text = line.partition(" ")
                write(self.folder / path, text.strip())
        elif kind == "python":
            exec(content, {})
        elif kind == "command":
            self.flags[name] = [flags_of(call) for call in self.calls(content)]
            if name in CLIPS:
                (flags,) = self.flags[name]
                read = [read_clips(source, Path("media")) for source in data_sources(flags.settings.sources)]
                assert not any(bad for _, bad in read)
                self.clips[name] = [clip for clips, _ in read for clip in clips]

    def calls(self, command: str) -> list[list[str]]:
        """Return the calls of our scripts in a command; those that make the demo's clips and model must exist."""
        calls = noted_calls(command, self.folder)
        assert all((ROOT / word).is_file() for call in calls for word in call if word.startswith("assets/scripts/"))
        return [call for call in calls if script_of(call) in PARSERS]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets_cache")
        place = Workplace(folder)
        for example in EXAMPLES:
            place.follow(*example)
    return place


@pytest.mark.parametrize("name", CLIPS)
def test_the_examples_are_read_as_the_clips_that_they_show(workplace, name):
    clips = workplace.clips[name]
    assert [(str(clip.video).removeprefix(f"{workplace.folder}/"), clip.caption) for clip in clips] == CLIPS[name]


def test_every_command_is_parsed_and_every_other_block_with_a_marker_is_understood(workplace):
    assert {kind for kind, _, _ in EXAMPLES} == {"file", "files", "python", "command", "shell", "output"}
    assert workplace.flags.keys() == {name for kind, name, _ in EXAMPLES if kind == "command"}
    assert workplace.clips.keys() == CLIPS.keys()


def test_the_clips_of_the_hub_are_prepared_and_trained(workplace):
    (fetched,) = re.findall(r"--local-dir (\S+)", block("command", "hub clips"))
    prepare, train = workplace.flags["hub clips"]
    assert (prepare.data_root, prepare.caption_column, prepare.id_token) == (fetched, "prompt.txt", "BW_STYLE")
    assert train.data_root == prepare.output_dir
    assert train.validation_prompt.startswith("BW_STYLE ")


def test_images_and_repeats_of_the_examples_are_read(workplace):
    assert [clip.image for clip in workplace.clips["images"]] == [Path("my-clips/first-frames/rabbit.png"), None]
    folder = workplace.folder / "my-first-frames"
    assert {clip.image.parent for clip in workplace.clips["with first frames"]} == {folder}
    assert [clip.repeats for clip in workplace.clips["mix"]] == [2.5, 2.5, 1, 1]


def test_an_index_of_some_samples_is_trained_on(workplace):
    folder = workplace.folder / "my-prepared"
    assert [clip.name for clip in read_index(folder)] == ["rabbit", "street"]
    (workplace.folder / "index.arrow").replace(folder / "index.arrow")
    assert [clip.name for clip in read_index(folder)] == ["rabbit"]


def test_the_row_shown_is_that_of_its_command(tmp_path):
    row = json.loads(block("output", "index"))
    (tmp_path / "try/prepared").mkdir(parents=True)
    write_table(
        make_table([row, row | {"name": "clip-004", "clip": "clip-004.mp4"}]),
        tmp_path / "try/prepared/index.arrow",
        {},
    )
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-c", block("shell", "index")]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert shown == block("output", "index")


# The output of the page, from the demo's clips


@pytest.fixture
def demo(workplace, monkeypatch) -> Callable[..., tuple[RawData, PreparationSettings]]:
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setenv("COGVIDEOX_FACTORY_CACHE", str(workplace.folder / "cache"))
    *_, call = workplace.calls(block("command", "try"))

    def plan(*more: str) -> tuple[RawData, PreparationSettings]:
        settings = flags_of([*call, *more]).settings
        return plan_raw_clips(settings.sources, settings.clips), settings

    return plan


def block(kind: str, name: str) -> str:
    (content,) = [content for its_kind, its_name, content in EXAMPLES if (its_kind, its_name) == (kind, name)]
    return content


TINY = {"sample_frames": 17, "sample_height": 8, "sample_width": 12, "max_text_seq_length": 226}
TINY |= {"patch_size": 2, "patch_size_t": None}


def test_the_plan_shown_is_the_demos(demo):
    model = SimpleNamespace(find_long_captions=lambda *_: (), find_unknown_captions=lambda *_: ())
    table = describe_plan(*demo(), model, SimpleNamespace(transformer=TINY), batch_size=1)
    wrote = "wrote try/prepared/plan.csv and try/prepared/contact_sheet.png\nwrote try/prepared/report.html\n"
    assert block("output", "plan") == f"{table}\n{wrote}"


def test_the_masks_of_the_example_are_read_and_their_plan_is_the_one_shown(workplace, demo):
    (settings,) = (flags.settings for flags in workplace.flags["masks, tried"])
    data = plan_raw_clips(settings.sources, settings.clips, masks=settings.masks)
    assert [planned.mask is not None for planned in data.clips] == [True] * 3 + [False]
    model = SimpleNamespace(find_long_captions=lambda *_: (), find_unknown_captions=lambda *_: ())
    table = describe_plan(data, settings, model, SimpleNamespace(transformer=TINY), batch_size=1)
    assert block("output", "masks") == f"{table}\n"
    prepare, train = workplace.flags["masks"]
    assert (prepare.use_masks, train.use_masks, train.data_root) == (True, True, prepare.output_dir)


def test_the_bad_clips_shown_are_the_demos(demo):
    data, settings = demo("--fps", "8")
    with pytest.raises(UserError) as error:
        check_bad_clips(data, "error", lambda: advise(data, settings, TINY))
    lines = f"error: {error.value}".splitlines()
    assert block("output", "bad").splitlines() == [*lines[:3], "  ...", lines[-1]]


def test_the_sizes_are_those_of_the_tensors():
    """Mean and log-variance of 16 channels, compressed 4 x 8 x 8; 226 x 4096 for a caption; four image latents."""
    captions = 1000 * 2 * 226 * 4096 / 2**30
    for bucket, latent_frames, num_images in (
        (Bucket(49, 480, 720), 13, 0),
        (Bucket(49, 480, 720), 13, 4),
        (Bucket(81, 768, 1360), 21, 0),
    ):
        frame = 1000 * 2 * 2 * 16 * (bucket.height // 8) * (bucket.width // 8) / 2**30
        latents, images = latent_frames * frame, num_images * frame
        name, cell = (f"{bucket}, image-to-video", f"{images:.1f}") if num_images else (bucket, "-")
        assert f"| {name} | {latents:.1f} | {captions:.1f} | {cell} | {latents + captions + images:.1f} |" in PAGE
