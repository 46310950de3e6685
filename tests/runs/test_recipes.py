"""Every recipe on every model: results load into plain diffusers and have the same effect there as in training."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from PIL import Image

import tiny_runs
from clip_lists import write
from data.buckets import Bucket
from methods.lora import Lora
from models.source import ModelSource
from tiny_runs import SIZE, assert_same_weights, weights_of


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
TASKS = {"2b": "text", "5b": "text", "1.5-5b": "text", "5b-i2v": "image", "1.5-5b-i2v": "image"}


@pytest.fixture(scope="module")
def prepared(prepared_demo) -> Callable[[str], Path]:
    return lambda kind: prepared_demo(*SIZE, "--max_samples", "2", "--save_image_latents", kind=kind)


def train(kind: str, method: str, model: Path, data: Path, output: Path, *flags: str) -> Path:
    of_lora = ("--rank", "4", "--lora_alpha", "4") if method == "lora" else ()
    script = import_module(f"cogvideox_{TASKS[kind]}_to_video_{method}")
    return tiny_runs.train(script, model, data, output, "--report_to", "none", *of_lora, *flags)


def sample(kind: str, model: Path, output: Path | None, method: str) -> torch.Tensor:
    classes = {"text": CogVideoXPipeline, "image": CogVideoXImageToVideoPipeline}
    parts = {}
    if output is not None and method == "sft":
        parts["transformer"] = CogVideoXTransformer3DModel.from_pretrained(output / "transformer")
    pipeline = classes[TASKS[kind]].from_pretrained(model, **parts)
    if output is not None and method == "lora":
        pipeline.load_lora_weights(output)
    inputs = {"prompt": "a red circle", "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    inputs |= {"image": Image.new("RGB", (96, 64), "red")} if TASKS[kind] == "image" else {}
    return tiny_runs.sample_latents(pipeline, Bucket(17, 64, 96), **inputs)


@pytest.fixture(scope="module")
def sample_base(tiny_models):
    """Return the latents that a model samples without a result, computed once."""
    return cache(lambda kind: sample(kind, tiny_models(kind), None, ""))


@pytest.mark.parametrize("method", ["lora", "sft"])
@pytest.mark.parametrize("kind", TASKS)
def test_a_result_loads_into_its_pipeline_and_changes_what_is_sampled(
    tiny_models, prepared, sample_base, tmp_path, kind, method
):
    flags = ("--load_tensors", "--max_train_steps", "6", "--learning_rate", "1e-3", "--lr_warmup_steps", "0")
    output = train(kind, method, tiny_models(kind), prepared(kind), tmp_path / "out", *flags)
    sampled, base = sample(kind, tiny_models(kind), output, method), sample_base(kind)
    assert sampled.isfinite().all()
    assert (sampled - base).norm() > 1e-3 * base.norm()


@pytest.mark.parametrize("kind", TASKS)
def test_an_untrained_lora_changes_nothing(tiny_models, sample_base, tmp_path, kind):
    transformer = ModelSource(str(tiny_models(kind))).load_transformer(torch.float32)
    lora = Lora(rank=4, alpha=8)
    lora.attach(transformer)
    lora.save(transformer, tmp_path, torch.float32)
    assert torch.equal(sample(kind, tiny_models(kind), tmp_path, "lora"), sample_base(kind))


@pytest.mark.parametrize("method", ["lora", "sft"])
@pytest.mark.parametrize("kind", ["5b", "1.5-5b-i2v"])
def test_a_result_of_learning_rate_zero_samples_exactly_as_the_model(
    tiny_models, prepared, sample_base, tmp_path, kind, method
):
    model = tiny_models(kind)
    flags = ("--load_tensors", "--max_train_steps", "2", "--learning_rate", "0")
    output = train(kind, method, model, prepared(kind), tmp_path / "out", *flags)
    assert torch.equal(sample(kind, model, output, method), sample_base(kind))


@pytest.mark.parametrize(("kind", "method"), [("2b", "lora"), ("5b-i2v", "sft")])
def test_a_model_with_configs_older_than_the_library_trains_alike(tiny_models, prepared, tmp_path, kind, method):
    """The released CogVideoX-2b and 5b lack the settings of later kinds."""
    model = Path(shutil.copytree(tiny_models(kind), tmp_path / "model"))
    removed = {"transformer": ["patch_size_t", "ofs_embed_dim", "patch_bias"], "vae": ["invert_scale_latents"]}
    removed["transformer"] += ["use_learned_positional_embeddings"] if kind == "2b" else []
    for part, names in removed.items():
        file = model / part / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({name: value for name, value in config.items() if name not in names}))
    flags = ("--load_tensors", "--max_train_steps", "2", "--learning_rate", "1e-3", "--lr_warmup_steps", "0")
    whole = train(kind, method, tiny_models(kind), prepared(kind), tmp_path / "whole", *flags)
    older = train(kind, method, model, prepared(kind), tmp_path / "older", *flags)
    assert torch.equal(sample(kind, model, older, method), sample(kind, tiny_models(kind), whole, method))


SAMPLED = "--validation_prompt circle --height_buckets 64 --width_buckets 96"


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("1.5-5b-i2v", "--height_buckets 80 --width_buckets 96", "up to 64x96 (height x width), not for 80x96"),
        ("1.5-5b", f"--max_num_frames 21 {SAMPLED}", "error: --max_num_frames: CogVideoX 1.5 takes 1, 8k or 8k+1"),
        ("1.5-5b", f"--height 80 {SAMPLED}", "error: --height, --width: this CogVideoX 1.5"),
        ("5b-i2v", "--frame_buckets 16", "--ignore_learned_positional_embeddings"),
    ],
)
def test_a_size_that_the_model_does_not_support_is_refused_before_weights_are_loaded(
    tiny_models, demo_clips, tmp_path, capsys, kind, flags, message
):
    model = Path(shutil.copytree(tiny_models(kind), tmp_path / "model"))
    for weights in model.rglob("*.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        train(kind, "lora", model, demo_clips, tmp_path / "out", "--caption_column", "prompts.txt", *flags.split())
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("method", ["lora", "sft"])
def test_image_to_video_trains_on_raw_clips_and_validates(tiny_models, demo_clips, tmp_path, method):
    Image.new("RGB", (200, 100), "blue").save(tmp_path / "start.png")
    flags = ("--max_samples", "2", "--max_train_steps", "2", "--validation_prompt", "a", "--num_inference_steps", "1")
    flags += ("--validation_images", str(tmp_path / "start.png"), "--caption_column", "prompts.txt")
    output = train("5b-i2v", method, tiny_models("5b-i2v"), demo_clips, tmp_path / "out", *flags)
    assert list((output / "validation" / "step-2").glob("*.mp4"))


def test_a_model_trained_without_learned_positions_samples_at_another_size(tiny_models, demo_clips, tmp_path):
    flags = ("--max_samples", "2", "--max_train_steps", "1", "--ignore_learned_positional_embeddings")
    flags += ("--height", "96", "--width", "64")
    output = train("5b-i2v", "sft", tiny_models("5b-i2v"), demo_clips, tmp_path / "out", *flags)
    transformer = CogVideoXTransformer3DModel.from_pretrained(output / "transformer")
    assert not transformer.config.use_learned_positional_embeddings
    assert "patch_embed.pos_embedding" not in transformer.state_dict()


def test_full_fine_tuning_is_resumed_bit_for_bit(tiny_models, prepared, tmp_path):
    common = ("--load_tensors", "--learning_rate", "1e-3", "--lr_warmup_steps", "0", "--checkpointing_steps", "2")
    common += ("--max_train_steps", "4")
    model, data = tiny_models("5b"), prepared("5b")
    whole = train("5b", "sft", model, data, tmp_path / "whole", *common)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    parts = train("5b", "sft", model, data, tmp_path / "parts", *common, "--resume_from_checkpoint", "latest")
    assert_same_weights(weights_of(parts), weights_of(whole))


def test_clips_of_several_sizes_share_batches_and_the_run_is_resumed(tiny_models, prepared_demo, tmp_path, capsys):
    model = tiny_models("1.5-5b-i2v")
    sizes = {"--height": "64", "--max_samples": "2"}  # of 298 and 258 tokens: two and one fill a batch
    folders = [
        prepared_demo(*chain(*(sizes | size).items()), "--save_image_latents", kind="1.5-5b-i2v")
        for size in (
            {"--width": "96", "--frame_buckets": "17", "--max_num_frames": "17"},
            {"--width": "64", "--frame_buckets": "9", "--max_num_frames": "9"},
        )
    ]
    mix = write(tmp_path / "mix.json", json.dumps([{"data_root": str(folder)} for folder in folders]))
    flags = ["--pretrained_model_name_or_path", str(model), "--dataset_mix", str(mix), "--load_tensors", "--seed", "0"]
    flags += [
        "--allow_outside_paths",
        "--max_tokens_per_batch",
        "860",
        "--gradient_checkpointing",
        "--report_to",
        "none",
        "--rank",
        "4",
    ]
    script = import_module("cogvideox_image_to_video_lora")

    def run(name: str, *more: str) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        script.main([*flags, "--output_dir", str(tmp_path / name), *more])
        return tmp_path / name

    complete = run("complete", "--max_train_steps", "4")
    assert "4 samples (frames x height x width): 2 x 9x64x64, 2 x 17x64x96" in capsys.readouterr().err
    resumed = run("resumed", "--max_train_steps", "2", "--checkpointing_steps", "2")
    run("resumed", "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert_same_weights(weights_of(complete), weights_of(resumed))
