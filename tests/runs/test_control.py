"""Runs of control-to-video: from clips to results that plain diffusers and generate.py sample alike."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import CogVideoXDDIMScheduler, CogVideoXFunControlPipeline, DiffusionPipeline
from PIL import Image

import cogvideox_control_to_video_lora
import cogvideox_control_to_video_sft
import generate
import tiny_runs
from args import parse_generate_args
from common.errors import UserError
from data.buckets import Bucket
from models.encoding import encode_videos
from prepared.folder import read_tensor
from results.generation import embed_prompts, sample_all, settle
from results.model_card import CardFacts, example
from run.encoded_inputs import load_conditions
from run.recipe import Recipe
from tiny_runs import SIZE, assert_same_weights, weights_of
from validation.defaults import with_data_defaults
from video.images import load_controls
from video.io import read_frames


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
FAST = ["--learning_rate", "1e-2", "--lr_warmup_steps", "0", "--max_train_steps", "4", "--report_to", "none"]
CUT = ["--fps", "10", "--video_reshape_mode", "none"]
PREPARED = [*SIZE, *CUT, "--skip_frames_start", "3", "--max_samples", "2", "--save_control_latents"]
PREPARED += ["--compute_control", "tile"]
SAMPLED = ["--num_inference_steps", "2", "--prompt", "a red circle"]


def train(script, model: Path, data: Path, output: Path, *flags: str) -> Path:
    return tiny_runs.train(script, model, data, output, *FAST, *flags)


@pytest.fixture(scope="module")
def clip(demo_clips) -> str:
    return str(demo_clips / "videos/clip-000.mp4")


@pytest.fixture(scope="module")
def lora_run(tiny_models, demo_clips, clip, tmp_path_factory) -> Path:
    """A LoRA trained on the edges of raw clips, with a checkpoint after two steps, a video and held-out clips."""
    folder = tmp_path_factory.mktemp("lora")
    with open(demo_clips / "metadata.csv", newline="") as file:
        held_out = list(csv.reader(file))[-2:]
    with open(folder / "held-out.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("video", "prompts.txt"), *((demo_clips / video, text) for video, text in held_out)]
        )
    flags = ["--caption_column", "prompts.txt", "--max_samples", "4", "--compute_control", "canny", "--rank", "4"]
    flags += ["--checkpointing_steps", "2", "--validation_prompt", "a red circle", "--validation_controls", clip]
    flags += ["--validation_dataset_file", str(folder / "held-out.csv"), "--allow_outside_paths"]
    flags += ["--num_inference_steps", "2", "--no-validate_first", *CUT]
    return train(cogvideox_control_to_video_lora, tiny_models("5b"), demo_clips, folder / "run", *flags)


def test_a_result_is_sampled_alike_by_the_printed_code_and_by_generate(tiny_models, lora_run, clip, capfd):
    model = tiny_models("5b")
    result = ["--lora", str(lora_run), "--control", clip]
    generation = settle(parse_generate_args(["--model_path", str(model), *result, *SAMPLED, *SIZE[:4]]))
    ((_, ours),) = sample_all(generation, embed_prompts(generation), tuned=True)
    ((_, base),) = sample_all(generation, embed_prompts(generation), tuned=False)

    names = {"torch": torch, "CogVideoXFunControlPipeline": CogVideoXFunControlPipeline}
    names["CogVideoXDDIMScheduler"] = CogVideoXDDIMScheduler
    settings = generation.settings
    flags = ["--compute_control", "canny", "--validation_prompt", "a", "--validation_controls", clip, *CUT]
    recipe = tiny_runs.recipe_of("control-to-video", model, Path(clip).parents[1], *flags)
    exec(recipe.usage(lora_run).replace("bfloat16", "float32").replace('.to("cuda")', ""), names)
    pipeline = names["pipe"]
    pipeline.set_progress_bar_config(disable=True)
    (control,) = load_conditions(recipe)
    assert control == generation.conditions[0]
    theirs = pipeline(
        prompt="a red circle",
        control_video=control,
        height=64,
        width=96,
        num_inference_steps=2,
        guidance_scale=settings.guidance.guidance_scale,
        generator=torch.Generator().manual_seed(42),
    ).frames[0]
    ours, base, theirs = (np.stack([np.asarray(frame, dtype=int) for frame in one]) for one in (ours, base, theirs))
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - base).mean() > 1


def test_the_summary_and_the_card_name_the_kind_of_control(lora_run):
    assert json.loads((lora_run / "run_facts.json").read_text())["summary"]["controls"] == (
        "canny, computed from the clips"
    )
    settings = {"compute_control": "canny"}
    facts = CardFacts("model", "control-to-video", "LoRA", lambda *_: "", settings, [], Bucket(17, 64, 96), 8, 2)
    assert "as many frames as the video, which show canny of a clip" in example(facts, "model", "me/it")


def test_contact_sheet_and_page_show_the_control_and_the_loss_of_held_out_clips_is_measured(lora_run, clip):
    with Image.open(lora_run / "validation/step-4/contact_sheet.png") as sheet:
        assert sheet.height == 44 + 2 * 172
    page = (lora_run / "report.html").read_text()
    assert page.index("<strong>control</strong>") < page.index("<strong>training clip</strong>")
    shown = read_frames(lora_run / "validation/targets/00-control.mp4", range(17))
    control = np.stack(list(map(np.asarray, load_controls([clip], (17, 64, 96), "canny")[0])))
    assert np.abs(control.astype(int) - shown).mean() < 8 < np.mean(read_frames(clip, [0]))  # it has no edges
    assert "validation_loss" in (lora_run / "metrics.jsonl").read_text()


def test_the_accounting_counts_the_inputs_of_the_control_and_their_adapter(tiny_models, demo_clips, lora_run):
    recipe = tiny_runs.recipe_of(
        "control-to-video", tiny_models("5b"), demo_clips, "--compute_control=blur", "--rank=4"
    )
    counted = sum(parameter.numel for parameter in recipe.model_facts.trainable)
    assert counted == sum(weight.numel() for weight in weights_of(lora_run).values())
    assert (128, 32, 2, 2) in {parameter.shape for parameter in recipe.model_facts.parameters}
    assert (64, 32, 2, 2) in {parameter.shape for parameter in recipe.model_facts.trainable}


def test_a_resumed_run_ends_with_the_same_weights_and_keeps_its_controls(
    tiny_models, demo_clips, lora_run, tmp_path, capsys
):
    model = tiny_models("5b")
    flags = ["--caption_column", "prompts.txt", "--max_samples", "4", "--rank", "4"]
    flags += ["--resume_from_checkpoint", str(lora_run / "checkpoint-2"), *CUT]
    kind = ("--compute_control", "canny")
    resumed = train(cogvideox_control_to_video_lora, model, demo_clips, tmp_path / "run", *flags, *kind)
    assert_same_weights(weights_of(resumed), weights_of(lora_run))
    with pytest.raises(SystemExit):
        other = ("--compute_control", "grey")
        train(cogvideox_control_to_video_lora, model, demo_clips, tmp_path / "other", *flags, *other)
    assert "--compute_control" in capsys.readouterr().err


def test_a_full_result_is_a_control_model_that_is_sampled_and_trained_as_it_is(
    tiny_models, prepared_demo, clip, tmp_path, capsys
):
    prepared = prepared_demo(*PREPARED)
    tensors = ["--load_tensors", "--max_train_steps", "1"]
    run = train(
        cogvideox_control_to_video_sft, tiny_models("5b"), prepared, tmp_path / "sft", *tensors, "--save_pipeline"
    )
    pipeline = DiffusionPipeline.from_pretrained(run / "pipeline")
    assert isinstance(pipeline, CogVideoXFunControlPipeline)
    assert pipeline.transformer.patch_embed.proj.weight[:, 16:].abs().max() > 0

    written = yaml.safe_load((run / "config.yaml").read_text())
    made_with = {"compute_control": "tile", "fps": 10, "long_clips": "first", "skip_frames_start": 3}
    assert made_with.items() <= written.items()
    controls = ["--control", clip, *SAMPLED, *SIZE[:4], "--num_frames", "9"]
    for number, model in enumerate(([run / "pipeline"], [tiny_models("5b"), "--transformer", run])):
        generate.main(["--model_path", *map(str, model), *controls, "--output_file", str(tmp_path / f"{number}.mp4")])
        assert "controls: tile of the clips of --control" in capsys.readouterr().err
    assert (tmp_path / "0.mp4").read_bytes() == (tmp_path / "1.mp4").read_bytes()

    again = train(cogvideox_control_to_video_lora, run / "pipeline", prepared, tmp_path / "lora", *tensors)
    assert not [name for name in weights_of(again) if "patch_embed" in name]
    assert json.loads((again / "run_facts.json").read_text())["flags"]["compute_control"] == "tile"
    for model in ([run / "pipeline"], [tiny_models("5b"), "--transformer", run]):
        with pytest.raises(SystemExit):
            generate.main(["--model_path", *map(str, model), *SAMPLED, "--output_file", str(tmp_path / "x.mp4")])
        assert "was trained with controls; pass a control clip" in capsys.readouterr().err


def test_the_control_of_a_validation_video_is_that_of_the_prepared_clip(tiny_models, prepared_demo, clip):
    flags = ["--load_tensors", "--validation_prompt", "a", "--validation_controls", clip]
    recipe = tiny_runs.recipe_of("control-to-video", tiny_models("5b"), prepared_demo(*PREPARED), *flags)
    recipe = Recipe(with_data_defaults(recipe.settings, recipe.data), recipe.data)
    (control,) = load_conditions(recipe)
    vae = recipe.source.load_vae(torch.float32, slicing=False, tiling=False)
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in control])).permute(0, 3, 1, 2)[None]
    stored = read_tensor(next(one for one in recipe.data.clips if one.name.startswith("clip-000")).control_latents)
    assert (encode_videos(vae, pixels)[0] - stored.float()).abs().max() < 0.1
    assert recipe.video_fps == 10


def test_the_flag_overrides_how_controls_were_computed_in_training(tiny_models, lora_run, clip, caplog):
    argv = ["--model_path", str(tiny_models("5b")), "--lora", str(lora_run), "--control", clip, *SAMPLED, *SIZE[:4]]
    assert settle(parse_generate_args([*argv, "--compute_control", "canny"])).task.kind == "canny"
    assert "was trained with" not in caplog.text
    for passed, kind in (("grey", "grey"), ("none", None)):
        assert settle(parse_generate_args([*argv, "--compute_control", passed])).task.kind == kind
        assert f"--compute_control {passed}: '{lora_run}/pytorch_lora_weights.safetensors' was trained with canny" in (
            caplog.text
        )
    argv[1] = str(tiny_models("5b-i2v"))
    with pytest.raises(UserError, match="--control: this is an image-to-video model, which takes none"):
        settle(parse_generate_args(argv))


def test_data_without_controls_and_models_without_a_control_are_refused(
    tiny_models, prepared_demo, clip, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        prepared = prepared_demo(*SIZE, "--max_samples", "2")
        train(cogvideox_control_to_video_lora, tiny_models("5b"), prepared, tmp_path / "run", "--load_tensors")
    message = capsys.readouterr().err
    assert "2 samples were prepared without control latents" in message and "--save_control_latents" in message
    for result in ([], ["--transformer", str(tiny_models("5b"))]):
        with pytest.raises(SystemExit):
            generate.main(["--model_path", str(tiny_models("5b")), *SAMPLED, "--control", clip, *result])
        assert "--control: nothing here takes a control" in capsys.readouterr().err
