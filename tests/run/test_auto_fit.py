"""A run that does not fit into memory finds settings that fit, by trial."""

import weakref
from collections.abc import Callable

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

import cogvideox_text_to_video_lora
from models.blocks import uses_blocks
from tiny_runs import run_flags


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def short_of_memory(monkeypatch):
    """Let training forward passes run out of memory, except those of transformers for which `fits` is true."""
    forward = CogVideoXTransformer3DModel.forward
    seen: weakref.WeakSet[CogVideoXTransformer3DModel] = weakref.WeakSet()

    def limit(fits: Callable[[CogVideoXTransformer3DModel], bool]) -> None:
        def forward_if_it_fits(transformer, *inputs, **named):
            seen.add(transformer)
            assert list(seen) == [transformer], "an earlier trial is still in memory"
            if torch.is_grad_enabled() and not fits(transformer):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(transformer, *inputs, **named)

        monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", forward_if_it_fits)

    return limit


@pytest.fixture
def run(tiny_models, demo_clips, tmp_path):
    def run(*flags: str) -> None:
        few = ("--max_samples", "1", "--train_batch_size", "1", "--max_train_steps", "1", "--rank", "4", "--auto_fit")
        argv = run_flags(tiny_models("5b"), demo_clips, tmp_path / "out", "--seed", "0", *few, *flags)
        cogvideox_text_to_video_lora.main(argv)

    return run


def test_a_run_saves_more_memory_until_it_fits(short_of_memory, run, tmp_path, capfd):
    short_of_memory(lambda transformer: not uses_blocks(transformer))  # but checkpointed ones
    run()
    assert restarts(capfd) == ["--gradient_checkpointing --checkpoint_every 2"]  # the model has four blocks
    assert load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert not list(tmp_path.rglob(".dry-run*"))


def test_flags_that_the_user_typed_are_kept(short_of_memory, run, capfd):
    def is_quantized(transformer: CogVideoXTransformer3DModel) -> bool:
        return "Int8" in type(transformer.transformer_blocks[0].ff.net[2].weight).__name__

    short_of_memory(is_quantized)
    run("--gradient_checkpointing")
    assert restarts(capfd) == ["--offload_checkpoints", "--stream_blocks", "--quantize_base int8 (no --stream_blocks)"]


def restarts(capfd) -> list[str]:
    """Return the flags that each restart adds."""
    lines = capfd.readouterr().err.splitlines()
    return [line.partition("starts again with ")[2] for line in lines if "--auto_fit starts again" in line]


def test_a_run_that_never_fits_says_what_to_change(short_of_memory, run, tmp_path, capsys):
    short_of_memory(lambda transformer: False)
    with pytest.raises(SystemExit, match="2"):
        run("--gradient_checkpointing", "--quantize_base", "none")
    assert "--auto_fit: the largest batch runs out of memory with all the savings there are" in capsys.readouterr().err
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_another_error_is_raised(short_of_memory, run, monkeypatch):
    def fail(transformer, *inputs, **named):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run()
