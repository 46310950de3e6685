"""Validation videos are what the pipeline samples, are shown beside earlier ones, and have no side effects."""

import logging
import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from encoded_clips import all_frames
from forked_ranks import call_on_ranks
from models.prompts import PromptCache
from models.source import ModelSource
from parallel.coordinator import Coordinator
from validation.videos import ValidationSettings, validate


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
RED, BLUE = (220, 10, 10), (10, 10, 220)
OPTIONS = {"num_videos": 1, "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 1, "seed": 3}
OPTIONS |= {"guidance_scale": 6.0, "use_dynamic_cfg": False, "enable_model_cpu_offload": False, "fps": 8}
SETTINGS = ValidationSettings(prompts=["a red circle"], conditions=None, dtype=torch.float32, **OPTIONS)


class Workplace:
    """A model in training, and a run's means to validate it."""

    def __init__(self, model: Path, folder: Path, prompts: list[str], embeddings: Path):
        self.source = ModelSource(str(model))
        self.folder = folder
        self.prompts = PromptCache(embeddings, self.source, torch.float32)
        self.prompts.embed(prompts, torch.device("cpu"))
        self.transformer = self.source.load_transformer(torch.float32)
        self.vae = self.source.load_vae(torch.float32, slicing=False, tiling=False)
        self.pipeline_class = (
            CogVideoXImageToVideoPipeline if self.source.configs().is_image_to_video else CogVideoXPipeline
        )

    def make_pipeline(self):
        return self.pipeline_class(None, None, self.vae, self.transformer, self.source.load_scheduler())

    def validate(self, settings=SETTINGS, step: int = 5, accelerator: Accelerator | None = None, **options):
        rest = (self.make_pipeline, settings, self.prompts, self.folder, step)
        return validate(accelerator or Accelerator(cpu=True), Coordinator(), *rest, **options)

    def record_calls(self) -> list[tuple[dict, list]]:
        """Return a list that gets the options and the frames of each video."""
        calls = []

        class Recorded(self.pipeline_class):
            def __call__(self, **options):
                output = super().__call__(**options)
                calls.append((options, output.frames[0]))
                return output

        self.pipeline_class = Recorded
        return calls

    def videos(self, step: int = 5) -> list[np.ndarray]:
        return [all_frames(file) for file in sorted((self.folder / f"step-{step}").glob("*.mp4"))]


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prompt_embeds")


@pytest.fixture
def workplace(tiny_models, tmp_path, embeddings):
    return lambda kind, *prompts: Workplace(
        tiny_models(kind), tmp_path, [*(prompts or SETTINGS.prompts), ""], embeddings
    )


@pytest.fixture
def warnings_of(caplog):
    ours = ("validation.videos", "validation.trackers")
    return lambda: [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING and record.name in ours
    ]


# What is sampled


@pytest.mark.parametrize("use_dynamic_cfg", [False, True])
def test_videos_are_what_a_user_samples_with_the_same_settings(workplace, use_dynamic_cfg):
    place = workplace("5b")
    calls = place.record_calls()
    settings = replace(SETTINGS, width=64, num_inference_steps=2, guidance_scale=3.0, seed=11)
    assert place.validate(replace(settings, use_dynamic_cfg=use_dynamic_cfg)) == []
    options = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 3.0}
    options |= {"use_dynamic_cfg": use_dynamic_cfg, "generator": torch.Generator().manual_seed(11)}
    expected = CogVideoXPipeline.from_pretrained(place.source.path)("a red circle", **options).frames[0]
    ((_, sampled),) = calls
    assert np.array_equal(np.stack(sampled), np.stack(expected))
    (video,) = place.videos()
    assert video.shape == (9, 32, 64, 3)
    assert np.abs(video.astype(int) - np.stack(expected)).mean() < 12  # but for the compression


LENGTHS = [("2b", 17), ("5b-i2v", 17), ("1.5-5b-i2v", 17), *product(["1.5-5b"], [1, 4, 12, 13, 16, 17])]


@pytest.mark.parametrize(("kind", "num_frames"), LENGTHS)
def test_a_video_has_the_size_and_the_frames_asked_for(workplace, kind, num_frames):
    place = workplace(kind)
    images = [Image.new("RGB", (50, 50), RED)] if kind.endswith("i2v") else None
    settings = replace(SETTINGS, conditions=images, height=64, width=96, num_frames=num_frames, guidance_scale=1.0)
    assert place.validate(settings) == []
    assert [video.shape for video in place.videos()] == [(num_frames, 64, 96, 3)]


def test_unchanged_weights_give_the_same_frames_at_every_validation(workplace):
    place = workplace("5b")
    for step in (5, 9):
        torch.rand(step)  # the state of the global generator must not matter
        place.validate(replace(SETTINGS, num_videos=2), step)
    first, second = place.videos(5), place.videos(9)
    assert len(first) == 2
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    assert not np.array_equal(*first)  # the videos of one prompt have seeds of their own


def test_no_further_video_is_sampled_when_told_to_stop(workplace):
    place = workplace("5b")
    told = iter([False, True])
    assert place.validate(replace(SETTINGS, num_videos=3), is_told_to_stop=lambda: next(told)) == []
    assert len(place.videos()) == 1


def test_without_guidance_the_empty_prompt_is_not_needed(tiny_models, tmp_path):
    place = Workplace(tiny_models("5b"), tmp_path, SETTINGS.prompts, tmp_path / "prompt_embeds")
    assert place.validate(replace(SETTINGS, guidance_scale=1.0)) == []
    (failure,) = place.validate(replace(SETTINGS, guidance_scale=1.1))
    assert "FileNotFoundError" in failure


def test_each_video_begins_with_the_image_of_its_own_prompt(workplace):
    place = workplace("1.5-5b-i2v", "a red circle", "a blue square")
    calls = place.record_calls()
    images = [Image.new("RGB", (96, 64), color) for color in (RED, BLUE)]
    settings = replace(SETTINGS, prompts=["a red circle", "a blue square"], conditions=images, num_videos=2)
    assert place.validate(settings) == []
    assert [options["image"].getpixel((0, 0)) for options, _ in calls] == [RED, RED, BLUE, BLUE]
    for (options, _), prompt in zip(calls, np.repeat(settings.prompts, 2), strict=True):
        assert torch.equal(options["prompt_embeds"][0], place.prompts.load(str(prompt)))


def test_prompts_in_any_script_give_usable_file_names(workplace):
    names = {
        "A red circle, on BLUE_paper!": "-a-red-circle-on-blue-paper",
        "a red circle on blue paper?": "-a-red-circle-on-blue-paper",
        "一只大灰兔。": "-一只大灰兔",
        "Ein Ka\u0308fer naïf": "-ein-käfer-naïf",
        "🐇": "",
        "../../etc/passwd": "-etc-passwd",
        "word " * 100: f"-{'word-' * 7}word",
        "兔" * 500: f"-{'兔' * 40}",
    }
    place = workplace("5b", *names)
    assert place.validate(replace(SETTINGS, prompts=list(names), num_frames=1, guidance_scale=1.0)) == []
    files = sorted(file.name for file in (place.folder / "step-5").glob("*.mp4"))
    assert files == [f"{number:02d}-00{name}.mp4" for number, name in enumerate(names.values())]


def validate_on_rank(model: Path, folder: Path, embeddings: Path) -> list[str]:
    """Sample five videos on all ranks; then again, with a stop signal that only the second rank has received."""
    accelerator = Accelerator(cpu=True)
    place = Workplace(model, folder, ["a", "b", "c", "d", "e", ""], embeddings)
    settings = replace(SETTINGS, prompts=["a", "b", "c", "d", "e"], sampling_cache="pab", num_inference_steps=2)
    failures = place.validate(settings, 5, accelerator)
    stops = accelerator.process_index == 1
    return failures + place.validate(settings, 9, accelerator, is_told_to_stop=lambda: stops)


def test_ranks_share_the_videos_out_which_are_those_of_one_process(tiny_models, tmp_path, embeddings):
    assert validate_on_rank(tiny_models("5b"), tmp_path / "one", embeddings) == []
    arguments = tiny_models("5b"), tmp_path / "two", embeddings
    assert call_on_ranks(validate_on_rank, 2, tmp_path / "ranks", *arguments) == [[], []]
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "step-5").iterdir()} for name in ("one", "two")
    )
    assert one == two and len(one) == 5 + 1
    left = sorted(file.name for file in (tmp_path / "two" / "step-9").glob("*.mp4"))
    assert left == ["00-00-a.mp4", "02-00-c.mp4", "04-00-e.mp4"]


# The contact sheet


def sheet_of(place, step):
    with Image.open(place.folder / f"step-{step}" / "contact_sheet.png") as sheet:
        assert sheet.format == "PNG"
        return np.asarray(sheet).astype(int)


def cell(sheet, row, column):
    top, left = 44 + 12 + row * 172, 20 + column * 226
    return sheet[top : top + 148, left : left + 222]


def test_the_sheet_shows_five_frames_of_every_video(workplace):
    place = workplace("5b", "a", "b")
    place.validate(replace(SETTINGS, prompts=["a", "b"], num_videos=2), step=0)
    sheet = sheet_of(place, 0)
    assert sheet.shape == (44 + 4 * 172, 20 + 5 * 226 + 20 + 462 + 20, 3)
    for row, video in enumerate(place.videos(0)):
        for column, index in enumerate((0, 2, 4, 6, 8)):
            frame = np.asarray(Image.fromarray(video[index]).resize((222, 148), Image.Resampling.LANCZOS))
            assert np.abs(cell(sheet, row, column) - frame).mean() < 12


def test_the_base_models_video_is_above_each_later_one(workplace):
    place = workplace("5b")
    place.validate(step=0)
    torch.manual_seed(0)
    with torch.no_grad():
        place.transformer.proj_out.weight.normal_()  # "training"
    place.validate(step=7)
    before, after = sheet_of(place, 0), sheet_of(place, 7)
    assert after.shape[0] == 44 + 2 * 172
    for column in range(5):
        assert np.abs(cell(after, 0, column) - cell(before, 0, column)).mean() < 12  # but for the compression
        assert np.abs(cell(after, 1, column) - cell(before, 0, column)).mean() > 20


def test_the_start_image_is_left_of_its_video(workplace):
    place = workplace("1.5-5b-i2v", "a", "b")
    images = [Image.new("RGB", (96, 64), RED), Image.new("RGB", (64, 64), BLUE)]
    place.validate(replace(SETTINGS, prompts=["a", "b"], conditions=images))
    sheet = sheet_of(place, 5)
    assert sheet.shape[1] == 20 + 6 * 226 + 20 + 462 + 20
    assert (cell(sheet, 0, 0) == RED).all()
    assert (cell(sheet, 1, 0)[:, 60:160] == BLUE).all()


# What fails


class MeddlingPipeline(CogVideoXPipeline):
    """A pipeline that changes all that it can reach, and may fail afterwards."""

    fails = False

    def decode_latents(self, latents):
        frames = super().decode_latents(latents)
        for module in (self.transformer, self.vae):
            module.train(not module.training).to(torch.float64).requires_grad_(True)
        random.random(), np.random.rand(), torch.rand(1)
        if self.fails:
            raise RuntimeError("no memory left, say")
        return frames


def state_of(module):
    tensors = [*module.named_parameters(), *module.named_buffers()]
    facts = [(name, tensor.dtype, tensor.device, tensor.requires_grad) for name, tensor in tensors]
    values = [tensor.detach().clone() for _, tensor in tensors]
    return facts + [part.training for part in module.modules()], values


@pytest.mark.parametrize("fails", [False, True])
def test_models_and_random_states_are_restored(workplace, monkeypatch, warnings_of, fails):
    place = workplace("5b")
    place.pipeline_class = MeddlingPipeline
    monkeypatch.setattr(MeddlingPipeline, "fails", fails)
    transformer, vae = place.transformer, place.vae
    # As in training: some parts in another mode, most parameters frozen, adapters of another dtype.
    transformer.train().requires_grad_(False)
    transformer.transformer_blocks[0].eval()
    transformer.proj_out.requires_grad_(True)
    transformer.register_parameter("adapter", torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))
    vae.encoder.train()
    parameters = list(transformer.parameters())
    before = [state_of(transformer), state_of(vae)]
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    failures = place.validate()

    for (facts, values), (facts_before, values_before) in zip(map(state_of, (transformer, vae)), before, strict=True):
        assert facts == facts_before
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(values, values_before, strict=True))
    assert all(ours is theirs for ours, theirs in zip(transformer.parameters(), parameters, strict=True))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == generators
    if not fails:
        assert failures == []
        return
    (failure,), (warning,) = failures, warnings_of()
    assert failure.startswith("rank 0: RuntimeError: no memory left, say\n")
    assert "decode_latents" in failure  # where it happened
    assert warning.startswith("warning: validation at step 5 failed, training continues; rank 0: RuntimeError: no mem")


def test_videos_sampled_before_a_failure_are_kept_and_shown(workplace, warnings_of):
    place = workplace("5b", "a")  # the second prompt was never embedded
    assert len(place.validate(replace(SETTINGS, prompts=["a", "never seen"]))) == len(warnings_of()) == 1
    assert len(place.videos()) == 1
    assert sheet_of(place, 5).shape[0] == 44 + 172


def test_a_pipeline_that_cannot_be_made_is_a_warning(workplace, warnings_of):
    place = workplace("5b")
    place.vae = "no VAE"
    (failure,) = place.validate()
    assert failure.startswith("rank 0: ")
    assert len(warnings_of()) == 1
    assert not (place.folder / "step-5").exists()


def test_a_folder_that_cannot_be_written_is_a_warning_without_a_traceback(workplace, warnings_of):
    place = workplace("5b")
    (place.folder / "step-5").write_text("in the way")
    (failure,) = place.validate()
    assert "cannot be written" in failure
    assert "Traceback" not in failure
    assert len(warnings_of()) == 1


def test_a_damaged_video_of_the_base_model_costs_only_the_sheet(workplace, warnings_of):
    place = workplace("5b")
    place.validate(step=0)
    (video,) = (place.folder / "step-0").glob("*.mp4")
    video.write_bytes(b"damaged")
    assert place.validate(step=5) == []
    assert [warning.split(":")[1] for warning in warnings_of()] == [" cannot draw the contact sheet of step 5"]
    assert len(place.videos()) == 1


# The trackers


class Comet:
    name = "comet_ml"

    def __init__(self):
        self.tracker = self
        self.logged = []

    def log_video(self, file, name=None, overwrite=False, format=None, step=None, epoch=None, metadata=None):
        self.logged.append((Path(file).name, name, step, metadata))

    def log_image(self, image_data, name=None, overwrite=False, image_format="png", *, step=None, metadata=None):
        self.logged.append((Path(image_data).name, name, step, metadata))


def test_comet_gets_each_video_with_its_name_and_prompt(workplace, warnings_of):
    place = workplace("5b", "a", "b")
    accelerator, comet = Accelerator(cpu=True), Comet()
    accelerator.trackers = [comet]
    place.validate(replace(SETTINGS, prompts=["a", "b"], num_frames=1), accelerator=accelerator)
    assert comet.logged == [
        ("00-00-a.mp4", "validation/00-00-a", 5, {"prompt": "a"}),
        ("01-00-b.mp4", "validation/01-00-b", 5, {"prompt": "b"}),
        ("contact_sheet.png", "validation/contact_sheet", 5, None),
    ]
    assert warnings_of() == []


def test_tensorboard_gets_frames_and_prompt_though_another_tracker_fails(workplace, tmp_path, warnings_of):
    place = workplace("5b")
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    accelerator.trackers.insert(0, SimpleNamespace(name="comet_ml", tracker=None))
    assert place.validate(accelerator=accelerator) == []
    del accelerator.trackers[0]
    accelerator.end_training()
    (warning,) = warnings_of()
    assert warning.startswith("warning: comet_ml failed to log the validation videos of step 5 (AttributeError: ")

    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (tag,) = events.Tags()["images"]
    (image,) = events.Images(tag)
    assert tag == "validation/00-00-a-red-circle"
    assert (image.step, image.height, image.width) == (5, 32, 5 * 48)
    (text,) = events.Tensors("validation/00-00-a-red-circle/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (5, [b"a red circle"])


def test_wandb_gets_each_video_and_the_sheet(workplace, tmp_path, warnings_of):
    place = workplace("5b")
    accelerator = Accelerator(cpu=True, log_with="wandb")
    accelerator.init_trackers("project", init_kwargs={"wandb": {"dir": str(tmp_path)}})
    assert place.validate(accelerator=accelerator) == []
    accelerator.end_training()
    assert warnings_of() == []
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    (video,) = media.glob("videos/validation_*.mp4")
    assert np.array_equal(all_frames(video), place.videos()[0])
    assert len(list(media.glob("images/validation_contact_sheet_*.png"))) == 1
