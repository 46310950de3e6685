"""Runs of image-to-video on given frames: from clips to results that the printed code and generate.py sample alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from diffusers.utils import load_video
from PIL import Image

import cogvideox_image_to_video_lora
import cogvideox_image_to_video_sft
import tiny_runs
from args import parse_generate_args
from common.errors import UserError
from data.buckets import Bucket
from prepared.folder import read_tensor
from prepared.read_index import read_index
from results.generation import embed_prompts, sample_all, settle
from results.model_card import CardFacts, example
from results.trained_conditions import TrainedConditions, note_trained_conditions
from run.dry_run import write_given_frames
from tiny_runs import SIZE
from tuned_models import write_lora
from video.frames import Cut
from video.images import load_given_frames


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
FAST = ["--learning_rate", "1e-2", "--lr_warmup_steps", "0", "--max_train_steps", "2", "--report_to", "none"]
SAMPLED = ["--num_inference_steps", "2", "--prompt", "a red circle"]
VALIDATED = ["--validation_prompt", "a red circle", "--num_inference_steps", "2", "--no-validate_first"]


@pytest.fixture(scope="module")
def place(demo_clips, tmp_path_factory) -> Path:
    """A folder with first.png, last.png and clip.mp4."""
    folder = tmp_path_factory.mktemp("given")
    for name, colour in (("first", "red"), ("last", "blue")):
        Image.new("RGB", (96, 64), colour).save(folder / f"{name}.png")
    (folder / "clip.mp4").symlink_to(demo_clips / "videos/clip-000.mp4")
    return folder


@pytest.fixture(scope="module")
def ends_run(tiny_models, demo_clips, place, tmp_path_factory) -> Path:
    """A LoRA trained on raw clips with their last frames, with a checkpoint after one step and a video."""
    flags = ["--caption_column", "prompts.txt", "--max_samples", "2", "--rank", "4", "--checkpointing_steps", "1"]
    flags += ["--condition_frames", "first,last", "--validation_images", f"{place / 'first.png'},{place / 'last.png'}"]
    folder = tmp_path_factory.mktemp("ends")
    model = tiny_models("5b-i2v")
    return tiny_runs.train(cogvideox_image_to_video_lora, model, demo_clips, folder / "run", *FAST, *flags, *VALIDATED)


@pytest.fixture(scope="module")
def context_run(tiny_models, prepared_demo, place, tmp_path_factory) -> Path:
    """A transformer fully tuned on prepared clips to continue videos of two latent frames."""
    frames = ("--condition_frames", "first:2")
    prepared = prepared_demo(*SIZE, "--max_samples", "2", "--save_image_latents", *frames, kind="1.5-5b-i2v")
    flags = [*FAST, "--load_tensors", *frames, *VALIDATED, "--validation_images", str(place / "clip.mp4")]
    model, folder = tiny_models("1.5-5b-i2v"), tmp_path_factory.mktemp("context")
    return tiny_runs.train(cogvideox_image_to_video_sft, model, prepared, folder / "run", *flags)


def sample(model: Path, *flags: object, tuned: bool = True) -> np.ndarray:
    """Return the frames of generate.py, `[F, H, W, 3]`."""
    generation = settle(parse_generate_args(["--model_path", str(model), *SAMPLED, *SIZE[:4], *map(str, flags)]))
    ((_, frames),) = sample_all(generation, embed_prompts(generation), tuned=tuned)
    return np.stack([np.asarray(frame, dtype=int) for frame in frames])


def sampled_by_printed_code(code: str, image: object) -> np.ndarray:
    """Return the frames of the pipeline that the code of a user makes."""
    names = {"torch": torch, "CogVideoXImageToVideoPipeline": CogVideoXImageToVideoPipeline}
    names["CogVideoXTransformer3DModel"] = CogVideoXTransformer3DModel
    exec(code.replace("bfloat16", "float32").replace('.to("cuda")', ""), names)
    names["pipe"].set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 96, "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 6.0}
    frames = names["pipe"](image, "a red circle", generator=torch.Generator().manual_seed(42), **options).frames[0]
    return np.stack([np.asarray(frame, dtype=int) for frame in frames])


def test_a_lora_for_first_and_last_frames_is_sampled_alike_by_the_printed_code_and_by_generate(
    tiny_models, demo_clips, ends_run, place
):
    model = tiny_models("5b-i2v")
    files = [place / "first.png", place / "last.png"]
    images = ["--image", files[0], "--last_image", files[1]]
    ours = sample(model, "--lora", ends_run / "checkpoint-1", *images)
    other = sample(model, "--lora", ends_run / "checkpoint-1", *images[:2], "--last_image", files[0])
    assert np.abs(ours - other).mean() > 1
    recipe = tiny_runs.recipe_of("image-to-video", model, demo_clips, "--condition_frames", "first,last")
    theirs = sampled_by_printed_code(recipe.usage(ends_run / "checkpoint-1"), list(map(Image.open, files)))
    assert np.abs(ours - theirs).max() <= 1


def test_a_tuned_model_continues_the_end_of_a_video_alike_by_the_printed_code_and_by_generate(
    tiny_models, demo_clips, context_run, place
):
    model = tiny_models("1.5-5b-i2v")
    ours = sample(model, "--transformer", context_run, "--video", place / "clip.mp4")
    assert np.abs(ours - sample(model, "--video", place / "clip.mp4", "--condition_frames", "first:2")).mean() > 1
    frames = ("--condition_frames", "first:2")
    code = tiny_runs.recipe_of("image-to-video", model, demo_clips, *frames, method="sft").usage(context_run)
    theirs = sampled_by_printed_code(code, load_video(str(place / "clip.mp4"))[-5:])
    assert np.abs(ours - theirs).max() <= 1


def test_prepared_latents_are_those_of_the_given_frames_alone(prepared_demo):
    frames = ("--condition_frames", "first:2")
    folder = prepared_demo(*SIZE, "--max_samples", "2", "--save_image_latents", *frames, kind="1.5-5b-i2v")
    for clip in read_index(folder):
        image, video = read_tensor(clip.image_latents), read_tensor(clip.video_latents)
        assert image.shape == (4, 32, 2, 8, 12)
        # The tiny VAE keeps mean colours; the noise is weak.
        assert (image[0, :16] - video[:16, :2]).abs().mean() < 0.3 * (video[:16, :2] - video[:16, 3:]).abs().mean()


def test_the_model_card_loads_what_a_result_is_sampled_from():
    def loads(frames: str) -> str:
        settings = {"condition_frames": frames}
        facts = CardFacts("model", "image-to-video", "LoRA", lambda *_: "", settings, [], Bucket(17, 64, 96), 8, 2)
        return example(facts, "model", "me/it")

    assert 'image = [load_image("first-frame.png"), load_image("last-frame.png")]' in loads("first,last")
    assert 'image = load_video("clip.mp4")[-9:]' in loads("first:3")
    assert "import export_to_video, load_video" in loads("first:3")


@pytest.mark.parametrize("run", ["ends_run", "context_run"])
def test_the_contact_sheet_shows_the_first_and_the_last_given_frame(run, request):
    with Image.open(request.getfixturevalue(run) / "validation/step-2/contact_sheet.png") as sheet:
        assert sheet.width == 1200 + 4 * 226  # seven columns of frames
        assert sheet.height == 44 + 172


def test_a_resumed_run_keeps_its_condition_frames(tiny_models, demo_clips, ends_run, tmp_path, capsys):
    flags = ["--caption_column", "prompts.txt", "--max_samples", "2", "--rank", "4"]
    flags += ["--resume_from_checkpoint", str(ends_run / "checkpoint-1")]
    for frames in ([], ["--condition_frames", "first:2"]):
        with pytest.raises(SystemExit):
            tiny_runs.train(
                cogvideox_image_to_video_lora, tiny_models("5b-i2v"), demo_clips, tmp_path / "run", *flags, *frames
            )
        assert "--condition_frames was first,last, is now" in capsys.readouterr().err


def test_a_result_is_sampled_with_what_it_was_trained_with(tiny_models, ends_run, place):
    ends, model = ("--lora", ends_run), tiny_models("5b-i2v")
    image, last, video = (
        (f"--{flag}", place / name)
        for flag, name in (("image", "first.png"), ("last_image", "last.png"), ("video", "clip.mp4"))
    )
    trained = "was trained with --condition_frames first,last; pass a last image"
    for flags, message in (
        ((*ends, *image), f"--last_image: .*{trained}"),
        ((*ends, *image, *last, *video), "--video: .*which needs none"),
        ((*ends, *image, *last, "--condition_frames", "first"), "--last_image: --condition_frames first was passed"),
        (last, "--image: this is an image-to-video model; pass an image"),
        (video, "--video: pass as many of its frames as in training: --condition_frames first:K"),
        ((*video, "--condition_frames", "first:9"), "--num_frames: --condition_frames first:9 needs videos of 37"),
    ):
        with pytest.raises(UserError, match=f"(?s){message}"):
            settle(parse_generate_args(["--model_path", str(model), *SAMPLED, *map(str, flags)]))
    later, flags = tiny_models("1.5-5b-i2v"), (*video, "--num_frames", "97", "--condition_frames", "first:20")
    with pytest.raises(UserError, match=r"(?s)--video: 1 of 1 cannot be continued, .* 77 frames:.*clip\.mp4': has 49"):
        settle(parse_generate_args(["--model_path", str(later), *SAMPLED, *map(str, flags)]))
    with pytest.raises(UserError, match="--video: this is a text-to-video model"):
        settle(parse_generate_args(["--model_path", str(tiny_models("5b")), *SAMPLED, *map(str, video)]))


def test_a_video_is_continued_at_the_rate_that_the_result_was_trained_at(tiny_models, place, tmp_path):
    write_lora(tiny_models("5b-i2v"), tmp_path)
    note_trained_conditions(tmp_path, TrainedConditions("first:2", cut=Cut(fps=4)))
    clip = str(place / "clip.mp4")  # of 8 frames a second
    argv = ["--model_path", str(tiny_models("5b-i2v")), "--lora", str(tmp_path), "--video", clip, *SAMPLED, *SIZE[:4]]
    (frames,) = settle(parse_generate_args(argv)).conditions
    (every,) = load_given_frames([(clip,)], "first:3", 64, 96, flag="--video")
    assert frames == every[::2]


def test_a_dry_run_needs_no_given_frames_for_its_video(tiny_models, demo_clips, tmp_path, capfd):
    flags = ["--caption_column", "prompts.txt", "--max_samples", "2", "--condition_frames", "first:2", "--dry_run"]
    model = tiny_models("5b-i2v")
    tiny_runs.train(cogvideox_image_to_video_lora, model, demo_clips, tmp_path / "out", *FAST, *flags)
    assert list(tmp_path.iterdir()) == []
    assert "saving, loading and sampling all work" in capfd.readouterr().err
    first, last = write_given_frames("first,last", tmp_path, Bucket(17, 64, 96)).split(",")
    assert Image.open(first).size == Image.open(last).size == (96, 64)
