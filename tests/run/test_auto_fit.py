"""A run that does not fit into memory finds settings under which it does, by trying them out."""

import weakref
from collections.abc import Callable

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

import cogvideox_text_to_video_lora
from tiny_runs import SIZE


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def short_of_memory(monkeypatch):
    """Have forward passes that train run out of memory, but for transformers that fit by the function given."""
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
        argv = ["--pretrained_model_name_or_path", str(tiny_models("5b")), "--data_root", str(demo_clips)]
        argv += ["--caption_column", "prompts.txt", "--max_samples", "1", "--train_batch_size", "1", "--rank", "4"]
        argv += ["--output_dir", str(tmp_path / "out"), "--max_train_steps", "1", "--seed", "0", "--report_to", "none"]
        cogvideox_text_to_video_lora.main([*argv, *SIZE, "--auto_fit", *flags])

    return run


def test_a_run_starts_again_with_stronger_savings_until_it_fits(short_of_memory, run, tmp_path, capfd):
    short_of_memory(lambda transformer: transformer.gradient_checkpointing)
    run()
    assert restarts(capfd) == ["--gradient_checkpointing --checkpoint_every 2"]  # the model has four blocks
    assert load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert not list(tmp_path.rglob(".dry-run*"))


def test_what_the_user_typed_stays(short_of_memory, run, capfd):
    short_of_memory(lambda transformer: "Int8" in type(quantized_weight(transformer)).__name__)
    run("--gradient_checkpointing")
    assert restarts(capfd) == ["--offload_checkpoints", "--quantize_base int8"]


def restarts(capfd) -> list[str]:
    """What was added, each time."""
    lines = capfd.readouterr().err.splitlines()
    return [line.partition("starts again with ")[2] for line in lines if "--auto_fit starts again" in line]


def quantized_weight(transformer: CogVideoXTransformer3DModel) -> torch.Tensor:
    return transformer.transformer_blocks[0].ff.net[2].weight


def test_a_run_that_fits_under_no_settings_says_what_to_change(short_of_memory, run, tmp_path, capsys):
    short_of_memory(lambda transformer: False)
    with pytest.raises(SystemExit, match="2"):
        run("--gradient_checkpointing", "--quantize_base", "none")
    assert "--auto_fit: the largest batch runs out of memory with all the savings there are" in capsys.readouterr().err
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_another_error_is_not_taken_for_one_of_memory(short_of_memory, run, monkeypatch):
    def fail(transformer, *inputs, **named):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run()
