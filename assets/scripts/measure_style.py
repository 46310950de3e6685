"""Measure whether a LoRA gives the demo's style to prompts with its word, and leaves prompts without it alone.

    PYTHONPATH=training python assets/scripts/measure_style.py --lora demo/outputs/cogvideox-lora__... \
      --id_token kinetoscope --output_dir demo/style

samples scenes that neither the model nor the LoRA was trained on, through plain diffusers, with and without the word,
all from the same noise. Each video is compared with the base model's video of the plain caption, and with the style:
the same scene drawn as old film.

The distance of two videos is the mean absolute difference of their pixels' R, G and B, from 0 to 255, at the same
place and time. So brightness, colour, dark corners, shape and motion all count. The distances in the table are means
over the scenes, in percent of the distance between base model and style: 0% is the same video.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


if __name__ == "__main__":
    # diffusers imports these if they are installed, which takes seconds and prints warnings.
    sys.modules |= dict.fromkeys(("bitsandbytes", "deepspeed", "torchao"))

import numpy as np
import torch
from diffusers import CogVideoXPipeline
from diffusers.utils.logging import disable_progress_bar

from make_base_clips import DIRECTIONS, plan_base_scenes
from make_style_clips import plan_style_scenes
from measure_model import sample, see
from shapes import Scene, as_old_film, draw_frames
from video.contact_sheet import SheetRow, draw_contact_sheet


MODEL_DIR = Path(__file__).resolve().parents[1] / "models" / "tiny-cogvideox"
NUM_PROMPTS = 8
PICTURED = (5, 2, 4)  # of the prompts: dark shapes on bright backgrounds


def sample_all(
    model_dir: Path, lora: Path, id_token: str, scenes: Sequence[Scene], steps: int, guidance_scale: float
) -> dict[str, np.ndarray]:
    """Return the videos of each row of the table: [N, F, H, W, 3], uint8, RGB."""
    disable_progress_bar()
    pipeline = CogVideoXPipeline.from_pretrained(model_dir, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    videos = {
        "base": sample(pipeline, scenes, "", steps, guidance_scale),
        "base_with_word": sample(pipeline, scenes, id_token, steps, guidance_scale),
    }
    pipeline.load_lora_weights(lora)
    return videos | {
        "lora_with_word": sample(pipeline, scenes, id_token, steps, guidance_scale),
        "lora_without_word": sample(pipeline, scenes, "", steps, guidance_scale),
        "style": np.stack([list(as_old_film(draw_frames(scene))) for scene in scenes]),
    }


def distance(videos: np.ndarray, others: np.ndarray) -> float:
    """Return the mean absolute difference of the pixels, 0 to 255."""
    return float(np.abs(videos.astype(int) - others).mean())


def direction(frames: np.ndarray) -> tuple[int, int]:
    """Return where the shape moves, (x, y) with y downwards, also before dark corners.

    Args:
        frames: [F, H, W, 3], uint8, RGB.
    """
    change = np.square(np.abs(frames - np.median(frames, axis=0)).sum(axis=-1))  # most pixels are background
    weight = change.sum(axis=(1, 2)).clip(1e-9)  # a frame may be equal to the median
    x, y = ((change.sum(axis=axis) * np.arange(frames.shape[3 - axis])).sum(axis=1) / weight for axis in (1, 2))
    third = len(frames) // 3
    way = [centres[-third:].mean() - centres[:third].mean() for centres in (x, y)]
    axis = int(np.abs(way).argmax())
    return (int(np.sign(way[0])), 0) if axis == 0 else (0, int(np.sign(way[1])))


def measure(videos: dict[str, np.ndarray], scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Return the measures of each row of the table.

    Args:
        videos: of `sample_all`.

    Returns:
        `to_base` and `to_style`: distances as shares of that of base model and style, 0 or more. `right_colour` and
        `right_direction`: how many videos show those of their caption (in the style, no colour is right).
    """
    scale = distance(videos["base"], videos["style"])
    rows = {}
    for name, frames in videos.items():
        rows[name] = {
            "to_base": round(distance(frames, videos["base"]) / scale, 4),
            "to_style": round(distance(frames, videos["style"]) / scale, 4),
            "right_colour": sum(
                see(video).colour == scene.colour for video, scene in zip(frames, scenes, strict=True)
            ),
            "right_direction": sum(
                direction(video) == DIRECTIONS[scene.motion] for video, scene in zip(frames, scenes, strict=True)
            ),
        }
    return rows


def print_table(rows: dict[str, dict[str, float]], id_token: str, num_scenes: int) -> None:
    """Print the rows with their names."""
    names = {
        "base": "base model",
        "base_with_word": f"base model, with {id_token}",
        "lora_with_word": f"LoRA, with {id_token}",
        "lora_without_word": f"LoRA, without {id_token}",
        "style": "target style",
    }
    print(f"{num_scenes} unseen prompts{'':22}distance to base  to style  right direction")
    for key, name in names.items():
        row = rows[key]
        right = f"{row['right_direction']} of {num_scenes}"
        print(f"{name:38}{row['to_base']:16.1%}{row['to_style']:10.1%}{right:>17}")


def draw_picture(videos: dict[str, np.ndarray], scenes: Sequence[Scene], id_token: str, file: Path) -> None:
    """Draw some scenes of the table, each with the training clip that has the most words of its caption."""
    columns = {
        "base": "base model",
        "lora_without_word": "LoRA, without the word",
        "lora_with_word": f"LoRA, with {id_token}",
    }
    rows = []
    for i in PICTURED:
        words = set(scenes[i].caption.split())
        clip = max(plan_style_scenes(), key=lambda scene: len(words & set(scene.caption.split())))
        target = list(as_old_film(draw_frames(clip)))[clip.num_frames // 2]
        frames = [videos[name][i, scenes[i].num_frames // 2] for name in columns]
        rows.append(SheetRow([*frames, target], scenes[i].caption, f"the training clip: {clip.caption}"))
    draw_contact_sheet(rows, file, [*columns.values(), "a training clip"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, default=MODEL_DIR, help="the model (default: the trained tiny one)")
    parser.add_argument("--lora", type=Path, required=True, help="file or folder of the LoRA")
    parser.add_argument("--id_token", required=True, help="the word that names the style")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--output_dir", type=Path, help="where to write style.json and style.png")
    args = parser.parse_args()
    scenes = plan_base_scenes()[1][:NUM_PROMPTS]
    videos = sample_all(
        args.model_dir, args.lora, args.id_token, scenes, args.num_inference_steps, args.guidance_scale
    )
    rows = measure(videos, scenes)
    print_table(rows, args.id_token, len(scenes))
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "style.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        draw_picture(videos, scenes, args.id_token, args.output_dir / "style.png")


if __name__ == "__main__":
    main()
