"""Measure whether a LoRA of the demo's style, and only the LoRA, removes the colours from the tiny model's videos.

    python assets/scripts/measure_style.py --lora demo/outputs/cogvideox-lora__... --id_token OLD_FILM

samples prompts that neither the model nor the LoRA was trained on, through plain diffusers, and prints how colourful
the videos are: without and with the id token, then with the LoRA too, at half and at full strength.
"""

import argparse
import json
import sys
from pathlib import Path


if __name__ == "__main__":
    # diffusers imports these if they are installed, which takes seconds and prints warnings.
    sys.modules |= dict.fromkeys(("bitsandbytes", "deepspeed", "torchao"))

import torch
from diffusers import CogVideoXPipeline
from diffusers.utils.logging import disable_progress_bar

from make_base_clips import DIRECTIONS, plan_base_scenes
from measure_model import sample, saturation, see


MODEL_DIR = Path(__file__).resolve().parents[1] / "models" / "tiny-cogvideox"


def measure(
    model_dir: Path, lora: Path, id_token: str, num_prompts: int, steps: int, guidance_scale: float
) -> dict[str, float]:
    """Return the mean saturation of the videos, 0 to 1, and how many of the LoRA's move as their prompt says."""
    scenes = plan_base_scenes()[1][:num_prompts]
    disable_progress_bar()
    pipeline = CogVideoXPipeline.from_pretrained(model_dir, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    measured = {
        "base": saturation(sample(pipeline, scenes, "", steps, guidance_scale)),
        "base_with_token": saturation(sample(pipeline, scenes, id_token, steps, guidance_scale)),
    }
    pipeline.load_lora_weights(lora, adapter_name="style")
    pipeline.set_adapters("style", 0.5)
    measured["half_lora"] = saturation(sample(pipeline, scenes, id_token, steps, guidance_scale))
    pipeline.set_adapters("style", 1.0)
    videos = sample(pipeline, scenes, id_token, steps, guidance_scale)
    measured["lora"] = saturation(videos)
    right = sum(
        see(frames).direction == DIRECTIONS[scene.motion] for frames, scene in zip(videos, scenes, strict=True)
    )
    return {name: round(value, 4) for name, value in measured.items()} | {
        "prompts": num_prompts,
        "right_direction_with_lora": right,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, default=MODEL_DIR, help="the model (default: the trained tiny one)")
    parser.add_argument("--lora", type=Path, required=True, help="file or folder of the LoRA")
    parser.add_argument("--id_token", required=True, help="the word that names the style")
    parser.add_argument("--num_prompts", type=int, default=5)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--output_file", type=Path, help="where to write the numbers, as JSON")
    args = parser.parse_args()
    measured = measure(
        args.model_dir, args.lora, args.id_token, args.num_prompts, args.num_inference_steps, args.guidance_scale
    )
    print(f"saturation of {measured['prompts']} videos, 0 grey to 1:")
    print(f"  base model                         {measured['base']:.3f}")
    print(f"  base model, with the id token      {measured['base_with_token']:.3f}")
    print(f"  with the LoRA at half strength too {measured['half_lora']:.3f}")
    print(f"  with the LoRA at full strength     {measured['lora']:.3f}")
    if args.output_file:
        args.output_file.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
