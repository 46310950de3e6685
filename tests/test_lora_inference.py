"""Sample a video with a LoRA, and check that it is really mounted: without it, the same noise gives another video.

    python tests/test_lora_inference.py --prompt "A panda plays a guitar" --model_path THUDM/CogVideoX-5b \
      --lora_path outputs/my-lora --lora_name my-lora --output_file video.mp4 --fps 8

Under pytest, this file tests that check.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


if __name__ == "__main__":
    # diffusers imports these if they are installed, which takes seconds and prints warnings.
    sys.modules |= dict.fromkeys(("bitsandbytes", "deepspeed", "torchao"))

import av
import pytest
import torch
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_video


def load_pipeline(model_path: str, lora_path: str, lora_name: str) -> CogVideoXPipeline:
    """Load model and LoRA as any diffusers user would: in bfloat16 on a GPU, in float32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    pipeline = CogVideoXPipeline.from_pretrained(model_path, dtype=torch.bfloat16 if on_gpu else torch.float32)
    pipeline.load_lora_weights(lora_path, adapter_name=lora_name)
    if on_gpu:
        pipeline.enable_model_cpu_offload()
    pipeline.vae.enable_slicing()
    pipeline.vae.enable_tiling()
    return pipeline


def lora_effect(pipeline: CogVideoXPipeline, lora_name: str, prompt: str, **size: int | None) -> float:
    """The relative change that the LoRA makes to latents sampled in two steps from the same noise; 0: no effect."""

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        output = pipeline(prompt, num_inference_steps=2, generator=generator, output_type="latent", **size)
        return output.frames.float()

    mounted = {name for names in pipeline.get_list_adapters().values() for name in names}
    if lora_name not in mounted:
        return 0.0
    with_lora = sample()
    pipeline.disable_lora()
    without_lora = sample()
    pipeline.enable_lora()
    return ((with_lora - without_lora).norm() / without_lora.norm()).item()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with the given flags; None for those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--model_path", default="THUDM/CogVideoX-5b", help="the model that the LoRA was trained on")
    parser.add_argument("--lora_path", required=True, help="folder or file of the LoRA")
    parser.add_argument("--lora_name", default="lora_adapter", help="what to call the adapter")
    parser.add_argument("--output_file", default="output.mp4")
    parser.add_argument("--fps", type=int, default=8, help="frame rate of the written file")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--height", type=int, help="default: the model's own")
    parser.add_argument("--width", type=int, help="default: the model's own")
    parser.add_argument("--num_frames", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    for flag in ("model_path", "lora_path"):
        path = getattr(args, flag)
        if not Path(path).exists() and path.count("/") != 1:
            parser.error(f"--{flag}: no file or folder '{path}'")

    pipeline = load_pipeline(args.model_path, args.lora_path, args.lora_name)
    size = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
    effect = lora_effect(pipeline, args.lora_name, args.prompt, **size)
    if effect == 0:
        sys.exit(f"error: the LoRA {args.lora_path} has no effect: the latents with and without it are the same")
    print(f"the LoRA is mounted: it changes the latents by {effect:.1%} after two denoising steps")

    video = pipeline(
        args.prompt,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
        **size,
    ).frames[0]
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    export_to_video(video, args.output_file, fps=args.fps)
    print(f"wrote {args.output_file}")


@pytest.fixture
def make_lora(tiny_models, tmp_path):
    """Write a LoRA for the tiny 5b model whose second factor is `scale` times random numbers."""
    from methods.lora import Lora
    from models.source import ModelSource

    def write(scale: float) -> Path:
        transformer = ModelSource(str(tiny_models("5b"))).load_transformer(torch.float32)
        lora = Lora(rank=4, alpha=4)
        lora.attach(transformer)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in transformer.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        lora.save(transformer, tmp_path, torch.float32)
        return tmp_path

    return write


def command(model: Path, lora: Path, output: Path) -> list[str]:
    return [
        *("--prompt", "a red circle", "--model_path", str(model), "--lora_path", str(lora)),
        *("--lora_name", "tested", "--output_file", str(output), "--fps", "8", "--num_inference_steps", "2"),
        *("--height", "32", "--width", "48", "--num_frames", "9"),
    ]


def test_a_trained_lora_is_found_mounted_and_its_video_is_written(tiny_models, make_lora, tmp_path, capsys):
    main(command(tiny_models("5b"), make_lora(0.1), tmp_path / "video.mp4"))
    assert "the LoRA is mounted" in capsys.readouterr().out
    with av.open(tmp_path / "video.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
        assert container.streams.video[0].average_rate == 8


def test_an_untrained_lora_is_refused_before_a_video_is_written(tiny_models, make_lora, tmp_path):
    with pytest.raises(SystemExit, match="has no effect"):
        main(command(tiny_models("5b"), make_lora(0.0), tmp_path / "video.mp4"))
    assert not (tmp_path / "video.mp4").exists()


if __name__ == "__main__":
    main()
