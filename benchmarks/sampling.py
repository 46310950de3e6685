"""Measure what faster sampling changes: the videos, by PSNR and by what they show, and the arithmetic that it saves.

    make sampling      # the table of assets/docs/inference.md; some minutes

Each way samples the same held-out prompts from the same noise with the tiny model of the demo. Its PSNR is against 50
steps of the same scheduler without a cache. Executed parts of blocks are counted, and weighed with the arithmetic of a
full-size model too, in which attention is a larger share.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

from data.buckets import Bucket, count_tokens
from make_base_clips import plan_base_scenes
from make_full_size_model import full_size_configs
from measure_model import DIRECTIONS, see
from models.configs import CPU
from models.encoding import encode_prompts
from models.sampling import cached, sample_video
from models.source import ModelSource


MODEL = Path(__file__).parents[1] / "assets" / "models" / "tiny-cogvideox"
SIZE, FULL_SIZE = Bucket(17, 64, 96), Bucket(49, 480, 720)
GUIDANCE_SCALE = 2.0  # at which the tiny model shows the right colours
PARTS = [(place, part) for place in ("first", "other") for part in ("attention", "feed-forward")]


@dataclass(frozen=True)
class Way:
    """A way of sampling, by the values of the flags."""

    scheduler: str = "ddim"
    steps: int = 50
    cache: str = "none"


CACHES = ("pab", "first-block", "faster")
WAYS = [Way(steps=steps) for steps in (50, 40, 30, 25, 20, 10)]
WAYS += [Way(cache=cache) for cache in CACHES] + [Way(steps=25, cache="pab")]
WAYS += [Way("dpm", steps) for steps in (50, 25, 20)] + [Way("dpm", cache=cache) for cache in CACHES[:2]]


@dataclass(frozen=True)
class Sampled:
    """The videos of a way, and what was computed for them."""

    videos: np.ndarray  # [N, F, H, W, 3], uint8, RGB
    passes: int  # calls of the transformer
    calls: Counter[tuple[str, str]]  # of each of PARTS, in the first block and in one of the others, a sample each

    def flop(self, config: Mapping[str, Any], size: Bucket) -> float:
        """Return the operations of the blocks of a model with these calls; see `tracking.flops.count_flops`."""
        tokens, width = count_tokens(config, size), config["num_attention_heads"] * config["attention_head_dim"]
        of_part = {"attention": 8 * tokens * width**2 + 4 * tokens**2 * width, "feed-forward": 16 * tokens * width**2}
        blocks = {"first": 1, "other": config["num_layers"] - 1}
        return sum(blocks[place] * of_part[part] * self.calls[place, part] for place, part in PARTS)


def sample(source: ModelSource, way: Way, embeds: Sequence[torch.Tensor]) -> Sampled:
    """Sample a video for each prompt.

    Args:
        embeds: `[T, D]` each, the first one of the empty prompt.
    """
    transformer = source.load_transformer(torch.float32).eval()
    vae = source.load_vae(torch.float32, slicing=False, tiling=False, decoder_only=True)
    pipeline = CogVideoXPipeline(None, None, vae, transformer, source.load_scheduler(way.scheduler))
    pipeline.set_progress_bar_config(disable=True)
    calls, passes = count_calls(transformer), []
    transformer.register_forward_pre_hook(lambda *_: passes.append(1))
    options = {"size": SIZE, "num_inference_steps": way.steps, "guidance_scale": GUIDANCE_SCALE}
    with cached(pipeline, way.cache, is_guided=True):
        videos = [
            sample_video(pipeline, prompt, embeds[0], None, **options, use_dynamic_cfg=False, seed=number)
            for number, prompt in enumerate(embeds[1:])
        ]
    return Sampled(np.stack([np.stack(frames) for frames in videos]), len(passes), calls)


def count_calls(transformer: CogVideoXTransformer3DModel) -> Counter[tuple[str, str]]:
    """Return a counter of the samples that parts of the first two blocks compute; a skipped part calls no layer."""
    calls = Counter()

    def count(name: tuple[str, str], layer: torch.nn.Module) -> None:
        layer.register_forward_hook(lambda module, inputs, output: calls.update({name: len(output)}))

    for place, block in zip(("first", "other"), transformer.transformer_blocks, strict=False):
        count((place, "attention"), block.attn1.to_out[0])
        count((place, "feed-forward"), block.ff)
    return calls


def measure_psnr(videos: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the PSNR of each video, in dB; infinite for equal ones."""
    error = np.square(videos / 255 - others / 255).mean(axis=(1, 2, 3, 4))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def table(ways: Sequence[Way], source: ModelSource, num_prompts: int) -> Iterator[str]:
    """Yield the lines of the table in markdown; the ways begin with 50 steps without a cache, of each scheduler."""
    scenes = plan_base_scenes()[1][:num_prompts]
    embeds = encode_prompts(
        source.load_text_pipeline(torch.float32, device=CPU), ["", *(one.caption for one in scenes)]
    )
    head = ["`--sampling_scheduler`", "`--num_inference_steps`", "`--sampling_cache`", "PSNR, mean (least)"]
    head += ["right colour, direction", "passes", "FLOP, tiny", "FLOP, 5b"]
    yield from ("| " + " | ".join(head) + " |", "|---" * len(head) + "|")
    models = ((source.configs().transformer, SIZE), (full_size_configs("5b").transformer, FULL_SIZE))
    done: dict[Way, Sampled] = {}
    for way in ways:
        sampled = done[way] = sample(source, way, embeds)
        full = done[replace(way, steps=50, cache="none")]
        psnr = measure_psnr(sampled.videos, full.videos)
        seen = [see(frames) for frames in sampled.videos]
        right = [sum(one.colour == scene.colour for one, scene in zip(seen, scenes, strict=True))]
        right += [sum(one.direction == DIRECTIONS[scene.motion] for one, scene in zip(seen, scenes, strict=True))]
        cells = [
            way.scheduler,
            str(way.steps),
            way.cache,
            "" if sampled is full else f"{psnr.mean():.1f} ({psnr.min():.1f})",
        ]
        cells += [", ".join(f"{count}/{len(scenes)}" for count in right), str(sampled.passes // len(scenes))]
        cells += [f"{sampled.flop(*model) / full.flop(*model):.0%}" for model in models]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts to sample (default: %(default)s)")
    for line in table(WAYS, ModelSource(str(MODEL)), parser.parse_args().prompts):
        print(line, flush=True)


if __name__ == "__main__":
    main()
