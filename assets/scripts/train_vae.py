"""Train the tiny model's VAE on drawn clips: shapes that move in any direction, some as old film.

    python assets/scripts/train_vae.py --model_dir base/model --num_steps 3000

starts from the VAE in the folder, writes it back, and prints its PSNR on held-out clips. The
loss is the usual one of a VAE: the squared error of the pixels and the KL divergence of the latents from a standard
normal distribution (Kingma and Welling, arXiv:1312.6114), with a weight that leaves it to set the scale of latents.
"""

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from make_base_clips import plan_base_scenes
from shapes import BACKGROUNDS, COLOURS, SHAPES, as_old_film, draw_frames, draw_shape


KL_WEIGHT = 2e-4
SIZE = 48  # of the clips that are trained on; it is all convolutions, so larger ones work too
# In turn: the VAE encodes 9 frames at once, and longer clips 8 by 8 with a cache of the frames before.
LENGTHS = (9, 17)


def draw_random_clip(chance: random.Random, num_frames: int) -> torch.Tensor:
    """Draw a shape of any colour that moves straight, by up to 6 pixels a frame: [3, F, H, W] in [-1, 1]."""
    if chance.random() < 0.6:
        colour, background = chance.choice(list(COLOURS.values())), chance.choice(list(BACKGROUNDS.values()))
    else:
        colour, background = (tuple(chance.randrange(256) for _ in range(3)) for _ in range(2))
    shape, angle, speed = chance.choice(SHAPES), chance.uniform(0, 2 * math.pi), chance.uniform(0, 6)
    x, y, radius = chance.uniform(0, SIZE), chance.uniform(0, SIZE), chance.uniform(6, 24)
    growth = chance.choice((0.0, 0.0, chance.uniform(-1, 1)))
    frames = []
    for moment in range(-(num_frames // 2), num_frames // 2 + 1):
        moved = (x + math.cos(angle) * speed * moment, y + math.sin(angle) * speed * moment)
        place = (*moved, max(2.0, radius + growth * moment))
        frames.append(draw_shape(shape, colour, background, place, SIZE, SIZE))
    if chance.random() < 0.3:
        frames = list(as_old_film(frames))
    return as_tensor(frames)


def as_tensor(frames: list[np.ndarray]) -> torch.Tensor:
    """Convert frames of [H, W, 3] in uint8 to [3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 127.5 - 1


def held_out_clips() -> Iterator[torch.Tensor]:
    """Yield the held-out scenes, [1, 3, F, H, W] each."""
    return (as_tensor(list(draw_frames(scene)))[None] for scene in plan_base_scenes()[1])


@torch.inference_mode()
def measure_psnr(vae: AutoencoderKLCogVideoX) -> float:
    """Return the mean peak signal-to-noise ratio over the held-out scenes, in dB."""
    values = []
    for clip in held_out_clips():
        shown = vae.decode(vae.encode(clip).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * math.log10(4 / (shown - clip).square().mean().item()))
    return sum(values) / len(values)


@torch.inference_mode()
def measure_scale(vae: AutoencoderKLCogVideoX) -> float:
    """Return the standard deviation of the latents of the held-out scenes."""
    return torch.cat([vae.encode(clip).latent_dist.mode() for clip in held_out_clips()]).std().item()


def train(vae: AutoencoderKLCogVideoX, num_steps: int, batch_size: int, learning_rate: float, folder: Path) -> None:
    """Train in place; save every 500 steps."""
    chance = random.Random(0)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=num_steps)
    bar = tqdm(range(1, num_steps + 1), desc="VAE")
    for step in bar:
        length = LENGTHS[step % len(LENGTHS)]
        count = max(1, batch_size * LENGTHS[0] // length)
        clips = torch.stack([draw_random_clip(chance, length) for _ in range(count)])
        latents = vae.encode(clips).latent_dist
        error = (vae.decode(latents.sample()).sample - clips).square().mean()
        divergence = 0.5 * (latents.mean.square() + latents.var - 1 - latents.logvar).mean()
        (error + KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix_str(f"psnr={10 * math.log10(4 / error.item()):.1f}, kl={divergence.item():.2f}")
        if step % 500 == 0 or step == num_steps:
            tqdm.write(f"step {step}: {measure_psnr(vae):.2f} dB on held-out scenes")
            vae.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="a folder of make_tiny_model.py")
    parser.add_argument("--num_steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    args = parser.parse_args()
    folder = args.model_dir / "vae"
    vae = AutoencoderKLCogVideoX.from_pretrained(folder)
    print(f"step 0: {measure_psnr(vae):.2f} dB on held-out scenes")
    train(vae.train(), args.num_steps, args.batch_size, args.learning_rate, folder)
    vae.register_to_config(scaling_factor=round(1 / measure_scale(vae), 3))
    vae.save_pretrained(folder)


if __name__ == "__main__":
    main()
