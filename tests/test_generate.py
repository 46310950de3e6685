"""generate.py samples the videos of the plain pipeline and of validation, bit for bit, and checks its flags early."""

import json
import shutil
from pathlib import Path
from tempfile import NamedTemporaryFile

import av
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    PyramidAttentionBroadcastConfig,
)
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import generate
from clip_lists import write
from common.run_folder import LORA_FILE
from data.sources import DataSource, read_clips
from diffusion.image_to_video import ImageToVideo
from methods.full import FullFinetune
from methods.lora import Lora
from methods.lora_mounting import check_loras
from models.prompts import PromptCache
from models.source import ModelSource
from parallel.coordinator import Coordinator
from validation.videos import ValidationSettings, validate
from video.io import write_video


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SIZE = {"height": 32, "width": 48, "num_frames": 9}
STEPS = {"num_inference_steps": 2, "guidance_scale": 6.0}


@pytest.fixture(scope="module")
def base(tiny_models) -> Path:
    return tiny_models("5b")


@pytest.fixture(scope="module")
def make_lora(tmp_path_factory):
    """Write a LoRA of a model, of strength alpha / rank = 1 / 2, whose lora_B are `scale` times random numbers."""

    def write(model: Path, seed: int = 0, scale: float = 0.3) -> Path:
        transformer = ModelSource(str(model)).load_transformer(torch.float32)
        lora = Lora(rank=4, alpha=2)
        lora.attach(transformer)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in transformer.named_parameters():
                if ".lora_" in name and (scale or ".lora_A" in name):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * (scale or 1))
        folder = tmp_path_factory.mktemp("lora")
        lora.save(transformer, folder, torch.float32)
        return folder

    return write


@pytest.fixture(scope="module")
def lora(base, make_lora) -> Path:
    return make_lora(base)


@pytest.fixture(scope="module")
def lora_video(base, lora, tmp_path_factory) -> bytes:
    return run(base, tmp_path_factory.mktemp("videos") / "lora.mp4", "--lora", lora)


@pytest.fixture(scope="module")
def base_video(base, tmp_path_factory) -> bytes:
    """The video of the base model from plain diffusers."""
    pipeline = CogVideoXPipeline.from_pretrained(base)
    return sampled(pipeline, tmp_path_factory.mktemp("videos"), prompt="a red circle")


def run(model: Path, output: Path, *flags: object, prompt: str = "a red circle", sized: bool = True) -> bytes:
    """Sample one video in two steps, small unless `sized` is false; return the content of its file."""
    size = [f"--{name}={value}" for name, value in SIZE.items()] if sized else []
    argv = ["--model_path", model, "--prompt", prompt, "--output_file", output, "--num_inference_steps", 2]
    generate.main([str(word) for word in (*argv, *size, *flags)])
    return output.read_bytes()


def encoded(frames: list[Image.Image], tmp_path: Path, fps: int = 8) -> bytes:
    """Return the content of the file with these frames."""
    write_video(tmp_path / "expected.mp4", frames, fps)
    return (tmp_path / "expected.mp4").read_bytes()


def sampled(pipeline, tmp_path: Path, *, seed: int = 42, size=SIZE, fps: int = 8, **options: object) -> bytes:
    """Sample with plain diffusers."""
    generator = torch.Generator().manual_seed(seed)
    return encoded(pipeline(**options, **size, **STEPS, generator=generator).frames[0], tmp_path, fps)


def read_video(file: Path) -> np.ndarray:
    """Return all frames, uint8 [F, H, W, 3]."""
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def same(file: bytes, other: bytes) -> bool:
    """Return whether two files have the same frames, apart from what rounding changes, which coding amplifies."""
    with NamedTemporaryFile() as one, NamedTemporaryFile() as two:
        one.write(file), two.write(other), one.flush(), two.flush()
        frames, others = (read_video(Path(written.name)).astype(int) for written in (one, two))
    return frames.shape == others.shape and np.abs(frames - others).mean() < 1


def error_of(capsys, *arguments, **options) -> str:
    with pytest.raises(SystemExit, match=r"^2$"):
        run(*arguments, **options)
    return capsys.readouterr().err.splitlines()[-1]


def test_loras_with_scales_sample_the_video_of_plain_diffusers(base, make_lora, lora, tmp_path):
    loras = [lora, make_lora(base, seed=1)]
    flags = ("--lora", *loras, "--lora_scale", 0.5, -2, "--seed", 7, "--negative_prompt", "blue", "--use_dynamic_cfg")
    ours = run(base, tmp_path / "ours.mp4", *flags)
    pipeline = CogVideoXPipeline.from_pretrained(base)
    for number, folder in enumerate(loras):
        pipeline.load_lora_weights(folder, adapter_name=f"adapter_{number}")
    pipeline.set_adapters(["adapter_0", "adapter_1"], [0.5, -2.0])
    options = {"prompt": "a red circle", "negative_prompt": "blue", "use_dynamic_cfg": True}
    assert same(ours, sampled(pipeline, tmp_path, seed=7, **options))


def test_a_lora_samples_the_video_of_the_validation(base, lora, lora_video, tmp_path):
    source = ModelSource(str(base))
    transformer = source.load_transformer(torch.float32)
    method = Lora(rank=4, alpha=2)
    method.attach(transformer)
    method.load(transformer, lora)
    prompts = PromptCache(tmp_path / "prompt_embeds", source, torch.float32)
    prompts.embed(["a red circle", ""], torch.device("cpu"))
    vae = source.load_vae(torch.float32, slicing=False, tiling=False)
    settings = ValidationSettings(
        **{
            "prompts": ["a red circle"],
            "conditions": None,
            "dtype": torch.float32,
            "num_videos": 1,
            "seed": 42,
            "fps": 8,
        },
        **SIZE | STEPS | {"use_dynamic_cfg": False, "enable_model_cpu_offload": False},
    )

    def pipeline() -> CogVideoXPipeline:
        return CogVideoXPipeline(None, None, vae, transformer, source.load_scheduler())

    validate(Accelerator(cpu=True), Coordinator(), pipeline, settings, prompts, tmp_path, 5)
    assert same((tmp_path / "step-5" / "00-00-a-red-circle.mp4").read_bytes(), lora_video)


def test_another_scheduler_and_a_cache_sample_the_video_of_plain_diffusers(base, lora, lora_video, tmp_path):
    flags = ("--lora", lora, "--sampling_scheduler", "DDIM", "--sampling_cache", "pab")
    ours = run(base, tmp_path / "ours.mp4", *flags)
    pipeline = CogVideoXPipeline.from_pretrained(base)
    pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(lora)
    exact = sampled(pipeline, tmp_path, prompt="a red circle")
    timestep = {"current_timestep_callback": lambda: pipeline.current_timestep}
    pipeline.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **timestep)
    )
    assert same(ours, sampled(pipeline, tmp_path, prompt="a red circle"))
    assert not same(ours, exact) and not same(exact, lora_video)


def test_compare_writes_the_base_video_and_both_side_by_side(base, lora, lora_video, base_video, tmp_path):
    files = tmp_path / "videos"
    assert same(run(base, files / "rabbit.mp4", "--lora", lora, "--compare"), lora_video)
    assert same((files / "rabbit-base.mp4").read_bytes(), base_video) and not same(base_video, lora_video)
    both = read_video(files / "rabbit-compare.mp4")
    assert both.shape == (9, 32, 96, 3)
    left, right = read_video(files / "rabbit-base.mp4"), read_video(files / "rabbit.mp4")
    assert np.abs(both - np.concatenate([left, right], axis=2).astype(int)).mean() < 12  # apart from the compression
    with Image.open(files / "rabbit-compare.png") as sheet:
        assert sheet.height == 44 + 2 * 172
    assert len(list(files.iterdir())) == 4


def test_a_lora_at_scale_0_has_no_effect(base, lora, base_video, tmp_path):
    assert same(run(base, tmp_path / "a.mp4", "--lora", lora, "--lora_scale", 0), base_video)


def test_each_prompt_and_seed_has_its_own_file(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("A red circle\n\nEin Käfer\n", encoding="utf-8")
    size = [f"--{name}={value}" for name, value in (SIZE | {"num_frames": 1}).items()]
    flags = ["--prompts_file", "prompts.txt", "--num_inference_steps", "1", "--guidance_scale", "1", *size]
    generate.main(["--model_path", str(base), *flags, "--seed", "5", "--num_videos", "2"])
    names = [f"{name}-seed-{seed}.mp4" for name in ("00-a-red-circle", "01-ein-käfer") for seed in (5, 6)]
    assert sorted(file.name for file in Path("generated").iterdir()) == names
    assert len({(Path("generated") / name).read_bytes() for name in names}) == 4


def test_a_tuned_transformer_replaces_that_of_the_base_model(base, tmp_path):
    tuned = CogVideoXTransformer3DModel.from_pretrained(base / "transformer")
    with torch.no_grad():
        tuned.proj_out.weight.mul_(1.5)
    FullFinetune().save(tuned, tmp_path / "run", torch.float32)
    pipeline = CogVideoXPipeline.from_pretrained(base, transformer=tuned)
    expected = sampled(pipeline, tmp_path, prompt="a red circle")
    assert same(run(base, tmp_path / "ours.mp4", "--transformer", tmp_path / "run"), expected)


def test_an_image_to_video_model_starts_with_the_cropped_image(tiny_models, make_lora, tmp_path):
    model = tiny_models("1.5-5b-i2v")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8))
    picture.save(tmp_path / "start.png")
    lora = make_lora(model)
    ours = run(model, tmp_path / "ours.mp4", "--image", tmp_path / "start.png", "--lora", lora)
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(model)
    pipeline.load_lora_weights(lora)
    image = ImageOps.fit(picture, (48, 32))
    assert same(ours, sampled(pipeline, tmp_path, image=image, prompt="a red circle", fps=16))


def test_learned_positions_are_dropped_if_the_result_lacks_them(tiny_models, make_lora, tmp_path, capsys):
    model = tiny_models("5b-i2v")
    Image.new("RGB", (48, 32), (220, 10, 10)).save(tmp_path / "start.png")
    flags = ("--image", tmp_path / "start.png")
    assert "learned positions" in error_of(capsys, model, tmp_path / "a.mp4", *flags)
    dropped = run(model, tmp_path / "a.mp4", *flags, "--ignore_learned_positional_embeddings")

    transformer = ModelSource(str(model)).load_transformer(torch.float32)
    ImageToVideo(0.0, ignore_learned_positions=True).prepare_model(transformer)
    FullFinetune().save(transformer, tmp_path / "run", torch.float32)  # its config says so
    assert same(run(model, tmp_path / "b.mp4", *flags, "--transformer", tmp_path / "run"), dropped)


def test_a_quantized_base_with_a_lora_samples_almost_the_same_video(base, lora, lora_video, base_video, tmp_path):
    run(base, tmp_path / "int8.mp4", "--lora", lora, "--quantize_base", "int8")
    (tmp_path / "whole.mp4").write_bytes(lora_video)
    (tmp_path / "without.mp4").write_bytes(base_video)
    whole, int8, without = (read_video(tmp_path / f"{name}.mp4").astype(int) for name in ("whole", "int8", "without"))
    assert 0 < np.abs(int8 - whole).mean() < np.abs(without - whole).mean() / 4


def test_a_lora_is_found_by_its_hub_id(base, lora, lora_video, tmp_path):
    repository = tmp_path / "models--owner--style"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    write(repository / "refs" / "main", "abc")
    shutil.copy(lora / LORA_FILE, repository / "snapshots" / "abc")
    assert same(run(base, tmp_path / "a.mp4", "--lora", "owner/style", "--cache_dir", tmp_path), lora_video)


def test_a_lora_without_metadata_needs_a_scale_of_alpha_by_rank(base, lora, lora_video, tmp_path, capsys):
    save_file(load_file(lora / LORA_FILE), tmp_path / "bare.safetensors")
    flags = ("--lora", tmp_path / "bare.safetensors", "--lora_scale", 0.5)
    assert same(run(base, tmp_path / "a.mp4", *flags), lora_video)
    assert "bare.safetensors has no metadata on its alpha" in capsys.readouterr().err


@pytest.mark.parametrize(("scale", "is_warned"), [(0.5, True), (0.6, False), (1, False)])
def test_a_scale_that_is_in_the_file_too_draws_a_warning(base, lora, caplog, scale, is_warned):
    check_loras([(str(lora / LORA_FILE), scale)], ModelSource(str(base)).configs())
    warning = "--lora_scale 0.5: the file of"
    assert (warning in caplog.text) == is_warned


@pytest.fixture
def no_weights(base, tmp_path) -> Path:
    """The base model without weights, which must not be read before the checks."""
    folder = tmp_path / "no-weights"
    shutil.copytree(base, folder, ignore=lambda _, names: [name for name in names if name.endswith(".safetensors")])
    return folder


def test_a_lora_without_effect_is_refused(base, no_weights, make_lora, tmp_path, capsys):
    message = error_of(capsys, no_weights, tmp_path / "a.mp4", "--lora", make_lora(base, scale=0))
    assert "has no effect: all its lora_B weights are 0" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("not a number", "has NaN or infinite weights"),
        ("half", "is incomplete: it has no transformer_blocks.0.attn1.to_k.lora_B.weight"),
        ("ranks", "cannot be mounted (Error(s) in loading state_dict"),
        ("newer", "cannot be mounted (LoraConfig.__init__() got an unexpected keyword argument 'of_next_year')"),
        ("list", "cannot be used ("),
        ("other layers", "was trained on another model"),
        ("another size", "was trained on another model"),
        ("no LoRA", "cannot be used"),
        ("truncated", "cannot be used"),
    ],
)
def test_a_lora_that_is_damaged_or_of_another_model_is_refused(no_weights, lora, tmp_path, capsys, change, reason):
    file, weights = tmp_path / "lora.safetensors", load_file(lora / LORA_FILE)
    name, other = (f"transformer.transformer_blocks.0.attn1.to_k.lora_{matrix}.weight" for matrix in "BA")
    metadata = {"lora_alpha": 2, "r": 4, "target_modules": ["to_k", "to_q", "to_v", "to_out.0"]}
    if change == "not a number":
        weights[name][0, 0] = torch.nan
    elif change == "half":
        del weights[name]
    elif change == "ranks":
        weights[other] = weights[other].repeat(2, 1)
    elif change == "newer":
        metadata["of_next_year"] = True
    elif change == "other layers":
        weights = {name.replace("attn1", "attn7"): weight for name, weight in weights.items()}
    elif change == "another size":
        weights = {name: weight.repeat(1, 2) for name, weight in weights.items()}
    elif change == "no LoRA":
        weights = {f"unet.{name}": weight for name, weight in weights.items()}
    written = json.dumps({f"transformer.{key}": value for key, value in metadata.items()} if change != "list" else [1])
    has_metadata = change in ("not a number", "half", "ranks", "newer", "list")
    save_file(weights, file, {"lora_adapter_metadata": written} if has_metadata else None)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    message = error_of(capsys, no_weights, tmp_path / "a.mp4", "--lora", file)
    assert message.startswith(f"error: --lora: '{file}' {reason}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora outputs/misspelt", "--lora: 'outputs/misspelt' is not a file or folder here, and cannot be used"),
        ("--transformer outputs/misspelt", "--transformer: 'outputs/misspelt' cannot be read"),
        ("--dtype fp16 --enable_model_cpu_offload", "error: --dtype fp16: needs a GPU; pass bf16 or fp32"),
    ],
)
def test_paths_that_are_nowhere_and_fp16_without_a_gpu_are_refused(no_weights, tmp_path, capsys, flags, message):
    assert message in error_of(capsys, no_weights, tmp_path / "a.mp4", *flags.split())


def test_a_transformer_of_another_model_is_refused(no_weights, tiny_models, tmp_path, capsys):
    message = error_of(capsys, no_weights, tmp_path / "a.mp4", "--transformer", tiny_models("1.5-5b"))
    assert "was tuned from another model than --pretrained_model_name_or_path" in message


def test_an_image_is_needed_by_image_to_video_models_and_only_by_them(no_weights, tiny_models, tmp_path, capsys):
    Image.new("RGB", (48, 32)).save(tmp_path / "start.png")
    message = error_of(capsys, no_weights, tmp_path / "a.mp4", "--image", tmp_path / "start.png")
    assert message.startswith("error: --image: this is a text-to-video model")
    message = error_of(capsys, tiny_models("5b-i2v"), tmp_path / "a.mp4")
    assert message.startswith("error: --image: this is an image-to-video model; pass an image")
    text = tmp_path / "text.png"
    text.write_text("no image")
    message = error_of(capsys, tiny_models("5b-i2v"), tmp_path / "a.mp4", "--image", text, sized=False)
    assert message.startswith(f"error: --image: '{text}': not a still image")


def test_a_size_that_the_model_cannot_sample_is_refused(tiny_models, tmp_path, capsys):
    model = tiny_models("1.5-5b")
    message = error_of(capsys, model, tmp_path / "a.mp4", "--num_frames", 12)
    assert message.startswith("error: --num_frames: CogVideoX 1.5 takes 1, 8k or 8k+1 frames, not 12")
    message = error_of(capsys, model, tmp_path / "a.mp4", "--height", 256)
    assert message.startswith("error: --height, --width: this CogVideoX 1.5 model has positions for up to 64x96")


def test_a_data_set_of_the_base_model_can_be_trained_on_and_is_continued(base, tmp_path, capsys):
    folder = tmp_path / "kept"
    prompts = write(tmp_path / "prompts.txt", "a red circle\na blue square\n")
    argv = ["--model_path", base, "--prompts_file", prompts, "--as_dataset", "--output_dir", folder]
    argv += ["--num_inference_steps", 1, *(f"--{name}={value}" for name, value in SIZE.items())]
    generate.main(list(map(str, argv)))
    clips, bad = read_clips(DataSource(folder), tmp_path / "cache")
    assert ([clip.caption for clip in clips], bad) == (["a red circle", "a blue square"], [])
    made = {clip.video: clip.video.stat().st_mtime_ns for clip in clips}
    first, second = made
    content = first.read_bytes()
    first.unlink()
    for _ in range(2):  # the second time, nothing is left
        generate.main(list(map(str, argv)))
    assert first.read_bytes() == content
    assert second.stat().st_mtime_ns == made[second]
    assert f"all videos of {folder} are there already" in capsys.readouterr().err
