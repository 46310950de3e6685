"""Measure whether a model of drawn shapes follows its prompts: the right colour, moving in the right direction.

    python assets/scripts/measure_model.py --model_dir assets/models/tiny-cogvideox

samples every held-out scene, measures colour and motion in the frames, and prints the shares. An image-to-video model
gets the first frame of each scene. The VAE is measured on the clips of the same scenes.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXImageToVideoPipeline, DiffusionPipeline
from PIL import Image

from make_base_clips import COLOURS, DIRECTIONS, plan_base_scenes
from shapes import COLOURS as RGB
from shapes import Scene, draw_frame
from train_vae import measure_psnr


DIFFERENT = 100  # from the background, summed over R, G and B, for a pixel to be part of the shape


@dataclass(frozen=True)
class Seen:
    """The content of a video; None: not recognised."""

    colour: str | None
    direction: tuple[int, int] | None  # (x, y), y downwards


def see(frames: np.ndarray) -> Seen:
    """Find colour and direction in a video of one shape over a plain background.

    Args:
        frames: [F, H, W, 3], uint8, RGB.
    """
    border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
    background = np.median(border, axis=(0, 1))
    difference = np.abs(frames - background).sum(axis=-1)
    is_shape = difference > DIFFERENT
    if not is_shape.any():
        return Seen(None, None)
    inside = difference >= np.median(difference[is_shape])  # its border is blurred
    shown = np.median(frames[inside], axis=0)
    colour = min(COLOURS, key=lambda name: np.abs(shown - RGB[name]).sum())
    centres = [np.argwhere(mask).mean(axis=0)[::-1] for mask in is_shape if mask.any()]
    third = max(1, len(centres) // 3)
    way = np.mean(centres[-third:], axis=0) - np.mean(centres[:third], axis=0)
    if np.abs(way).max() < frames.shape[1] / 8:
        return Seen(colour, None)
    axis = int(np.abs(way).argmax())
    sign = int(np.sign(way[axis]))
    return Seen(colour, (sign, 0) if axis == 0 else (0, sign))


def sample(
    pipeline: DiffusionPipeline, scenes: Sequence[Scene], word: str, steps: int, guidance_scale: float
) -> np.ndarray:
    """Sample one video for each scene, with its number as the seed.

    Args:
        pipeline: text-to-video or image-to-video.
        word: put before the caption if it is not empty.

    Returns:
        [N, F, H, W, 3], uint8, RGB.
    """
    takes_images = isinstance(pipeline, CogVideoXImageToVideoPipeline)
    images = {"image": [Image.fromarray(draw_frame(scene, 0)) for scene in scenes]} if takes_images else {}
    videos = pipeline(
        prompt=[f"{word} {scene.caption}".strip() for scene in scenes],
        **images,
        num_frames=scenes[0].num_frames,  # else the image-to-video pipeline makes 49
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(number) for number in range(len(scenes))],
        output_type="np",
    ).frames
    return (videos * 255).round().astype(np.uint8)


def measure(model_dir: Path, steps: int, guidance_scale: float) -> dict[str, float]:
    """Return the three numbers and the settings they were measured with."""
    scenes = plan_base_scenes()[1]
    pipeline = DiffusionPipeline.from_pretrained(model_dir, dtype=torch.float32)
    pipeline.set_progress_bar_config(desc="sampling")
    videos = sample(pipeline, scenes, "", steps, guidance_scale)
    seen = [see(frames) for frames in videos]
    return {
        "vae_psnr_db": round(measure_psnr(AutoencoderKLCogVideoX.from_pretrained(model_dir / "vae").float()), 2),
        "prompts": len(scenes),
        "right_colour": sum(one.colour == scene.colour for one, scene in zip(seen, scenes, strict=True)),
        "right_direction": sum(
            one.direction == DIRECTIONS[scene.motion] for one, scene in zip(seen, scenes, strict=True)
        ),
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="a model of drawn shapes")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--output_file", type=Path, help="where to write the numbers too, as JSON")
    args = parser.parse_args()
    text = json.dumps(measure(args.model_dir, args.num_inference_steps, args.guidance_scale), indent=2)
    print(text)
    if args.output_file:
        args.output_file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
