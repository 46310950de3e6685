"""Context parallelism: outputs, gradients and complete runs are those of one process."""

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cogvideox_text_to_video_lora
import cogvideox_text_to_video_sft
from diffusion.positions import rotary_embeddings
from forked_ranks import call_on_ranks
from memory.activations import checkpoint_activations
from memory.block_streaming import stream_blocks
from methods.full import FullFinetune
from models.attention import set_attention
from parallel.context import ContextParallel, part_of, start_context_parallel
from tiny_runs import curve
from tiny_steps import Result, add_adapters


CPU = torch.device("cpu")
MINUTE = timedelta(seconds=60)
SIZE = ["--height", "48", "--width", "80", "--frame_buckets", "17", "--max_num_frames", "17"]


Case = tuple[Path, str, str]  # the model, the method, the way it is run


def load(model: Path, method: str) -> CogVideoXTransformer3DModel:
    transformer = CogVideoXTransformer3DModel.from_pretrained(model, subfolder="transformer")
    if method == "lora":
        add_adapters(transformer, dropout=0.0)
    else:
        FullFinetune().attach(transformer)
    return transformer.train()


def step(transformer: CogVideoXTransformer3DModel, model: torch.nn.Module | None = None, seed: int = 0) -> Result:
    """Return output and gradients of the mean loss of two samples of 48x80 pixels, with 15 tokens per frame.

    There are five frames, or three pairs of frames, so that the number of tokens is odd.
    """
    config, generator = transformer.config, torch.Generator().manual_seed(seed)
    frames = 5 + 5 % (config.patch_size_t or 1)
    latents = torch.randn(2, frames, config.in_channels, 6, 10, generator=generator)
    target = torch.randn(2, frames, config.out_channels, 6, 10, generator=generator)
    output = (model or transformer)(
        latents,
        torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=generator),
        torch.tensor([100, 900]),
        ofs=None if config.ofs_embed_dim is None else torch.full((1,), 2.0),
        image_rotary_emb=rotary_embeddings(transformer, frames, 48, 80, CPU),
        return_dict=False,
    )[0]
    (output - target).square().mean().backward()
    gradients = {name: weight.grad for name, weight in transformer.named_parameters() if weight.requires_grad}
    return output.detach(), gradients


def divided(transformer: CogVideoXTransformer3DModel, size: int) -> ContextParallel:
    context = start_context_parallel(size, MINUTE)
    set_attention(transformer, None, context)
    context.divide(transformer)
    return context


def divided_step(model: Path, method: str, way: str, size: int) -> Result:
    """Do the same with context groups of `size` ranks, each group with different samples."""
    transformer = load(model, method)
    if way == "streamed":
        stream_blocks(transformer, CPU)
    elif way != "plain":
        checkpoint_activations(transformer, "feed-forward" if way == "feed-forward" else "block")
    divided(transformer, size)
    seed = distributed.get_rank() // size
    if way != "sharded":
        return step(transformer, DistributedDataParallel(transformer), seed)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in transformer.transformer_blocks:
        fully_shard(block, mesh=mesh)
    output, gradients = step(fully_shard(transformer, mesh=mesh), seed=seed)
    return output, {name: gradient.full_tensor() for name, gradient in gradients.items()}


def divided_steps(cases: Sequence[Case], size: int) -> list[Result]:
    return [divided_step(*case, size) for case in cases]


def alone_beside_others(model: Path) -> torch.Tensor:
    """Return what the first rank computes while the other one does nothing; then both compute together."""
    transformer = load(model, "full")
    with divided(transformer, 2).off():
        output = step(transformer)[0] if distributed.get_rank() == 0 else torch.zeros(())
    assert step(transformer)[0].isfinite().all()
    return output


def assert_same_step(result: Result, expected: Result) -> None:
    """Compare up to the order of sums. Gradients of unrotated keys' biases are zero up to rounding."""
    torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=1e-6)
    assert result[1].keys() == expected[1].keys()
    largest = max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = (result[1][name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-7 * largest, f"{name}: {error} of {gradient.norm()}"


def assert_same_steps(results: list[list[Result]], cases: Sequence[Case], size: int) -> None:
    """Check that each rank has the output of its group's samples and the mean gradients of all groups."""
    num_groups = len(results) // size
    for number, (model, method, _) in enumerate(cases):
        transformers = [load(model, method) for _ in range(num_groups)]
        expected = [step(transformer, seed=group) for group, transformer in enumerate(transformers)]
        mean = {name: sum(gradients[name] for _, gradients in expected) / num_groups for name in expected[0][1]}
        for rank, result in enumerate(results):
            assert_same_step(result[number], (expected[rank // size][0], mean))


@pytest.fixture(scope="module")
def prepared(prepared_demo) -> Path:
    """Demo clips of 17x48x80, which have 75 tokens each."""
    return prepared_demo(*SIZE)


def training_flags(model: Path, data: Path, output: Path, *others: str) -> list[str]:
    flags = ["--pretrained_model_name_or_path", str(model), "--data_root", str(data), "--output_dir", str(output)]
    flags += ["--load_tensors", "--train_batch_size", "1", "--seed", "0", "--learning_rate", "1e-3", *SIZE]
    flags += ["--optimizer", "adamw", "--lr_warmup_steps", "0", "--gradient_checkpointing", "--logging_steps", "1"]
    return [*flags, "--stratified_timesteps", "--nccl_timeout", "60", *others]


def assert_same_curves(output: Path, expected: Path) -> None:
    """Compare up to the order of sums, whose effect grows with the steps."""
    for name in ("loss", "grad_norm"):
        values, reference = curve(output, name), curve(expected, name)
        assert values.keys() == reference.keys()
        assert list(values.values()) == pytest.approx(list(reference.values()), rel=1e-3)


def divide_everything(cases: Sequence[Case], flags: list[str]) -> tuple[list[Result], torch.Tensor]:
    results = divided_steps(cases, 2), alone_beside_others(cases[0][0])
    cogvideox_text_to_video_lora.main(flags)
    return results


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_two_ranks_of_a_context_group_train_as_one_process(tiny_models, prepared, tmp_path):
    cases = [
        (tiny_models("5b"), "lora", "checkpointed"),
        (tiny_models("2b"), "full", "feed-forward"),
        (tiny_models("1.5-5b-i2v"), "full", "plain"),
        (tiny_models("1.5-5b"), "lora", "streamed"),
        (tiny_models("5b"), "full", "sharded"),
    ]
    # If the division were not off during sampling, the rank without a prompt would block the other one.
    others = ["--max_train_steps", "4", "--rank", "8", "--validation_prompt", "a", "--num_inference_steps", "1"]
    flags = training_flags(tiny_models("5b"), prepared, tmp_path / "divided", *others)
    ranks = call_on_ranks(divide_everything, 2, tmp_path / "ranks", cases, [*flags, "--context_parallel_size", "2"])
    assert_same_steps([results for results, _ in ranks], cases, 2)
    torch.testing.assert_close(ranks[0][1], step(load(cases[0][0], "full"))[0])
    assert (tmp_path / "divided" / "validation" / "step-4" / "00-00-a.mp4").is_file()

    cogvideox_text_to_video_lora.main(training_flags(tiny_models("5b"), prepared, tmp_path / "undivided", *others[:4]))
    assert_same_curves(tmp_path / "divided", tmp_path / "undivided")


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "size"), [(4, 4), (4, 2)])
def test_context_groups_of_any_size_divide_samples_of_any_length(tiny_models, tmp_path, num_ranks, size):
    kinds = ("5b", "1.5-5b", "1.5-5b-i2v")  # with 75, 45 and 45 tokens
    ways = ("plain", "checkpointed", "sharded")
    cases = [(tiny_models(kind), method, way) for kind in kinds for method in ("lora", "full") for way in ways]
    cases = [case for case in cases if case[1:] != ("lora", "sharded")]
    assert_same_steps(call_on_ranks(divided_steps, num_ranks, tmp_path / "ranks", cases, size), cases, size)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_each_context_group_of_a_torchrun_trains_on_one_sample(tiny_models, prepared, tmp_path):
    others = ["--max_train_steps", "3", "--scale_lr"]
    script = cogvideox_text_to_video_sft.__file__
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4", script),
            *training_flags(tiny_models("1.5-5b"), prepared, tmp_path / "divided", *others),
            *("--context_parallel_size", "2", "--validation_prompt", "a:::b", "--num_inference_steps", "1"),
        ],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "up to 2 samples a step, 8 steps an epoch" in done.stderr
    assert "2 ranks at a time divide the tokens of a sample" in done.stderr

    others += ["--gradient_accumulation_steps", "2"]
    cogvideox_text_to_video_sft.main(training_flags(tiny_models("1.5-5b"), prepared, tmp_path / "undivided", *others))
    assert_same_curves(tmp_path / "divided", tmp_path / "undivided")
    assert curve(tmp_path / "divided", "lr") == curve(tmp_path / "undivided", "lr")


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9])
def test_parts_are_equally_long_and_complete(num_tokens):
    tokens = torch.arange(1, 2 * num_tokens + 1).view(2, num_tokens)
    parts = [part_of(tokens, 1, part, 4) for part in range(4)]
    assert {part.shape[1] for part in parts} == {-(-num_tokens // 4)}
    joined = torch.cat(parts, dim=1)
    assert torch.equal(joined[:, :num_tokens], tokens)
    assert joined[:, num_tokens:].sum() == 0
