"""Compare ways to give the tiny model a control: on channels, as training does, and in the sequence of its frames.

    PYTHONPATH=training:assets/scripts python benchmarks/in_context.py

writes the table of assets/docs/control.md in about an hour on one core.

In the sequence, the latents of the control stand in front of the noisy ones, clean, and no weights are added: temporal
in-context fine-tuning, https://arxiv.org/abs/2506.00996. Every way trains the same LoRA on the same drawn clips, from
the same noise, and samples videos for the same held-out controls.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from sys import stderr

import numpy as np
import torch
from diffusers import CogVideoXFunControlPipeline, CogVideoXTransformer3DModel
from PIL import Image

from data.buckets import Bucket, count_tokens
from data.sampler import Draw
from dataset import Batch
from diffusion.control_to_video import ControlToVideo
from diffusion.objective import Objective
from diffusion.positions import rotary_embeddings
from diffusion.randomness import step_generator
from make_control_clips import draw_controlled_clips
from make_full_size_model import full_size_configs
from measure_control import overlap
from methods.lora import Lora
from models.configs import CPU
from models.encoding import encode_prompts, encode_videos
from models.sampling import sample_video
from models.source import ModelSource, NoiseScheduler
from tracking.flops import count_flops
from video.io import stream_frames, write_video


SOURCE = ModelSource(str(Path(__file__).parents[1] / "assets" / "models" / "tiny-cogvideox"))
TASK = ControlToVideo()
SIZE, FULL_SIZE = Bucket(17, 64, 96), Bucket(49, 480, 720)
BATCH_SIZE, LEARNING_RATE, RANK = 4, 1e-3, 64  # as in control_demo.sh
GUIDANCE_SCALE, SAMPLING_STEPS = 2.0, 20
BUFFER_LEVELS = (0.25, 0.5, 0.75)  # of the timesteps: the paper's code


@dataclass(frozen=True)
class Way:
    """A way to give the control."""

    name: str
    in_sequence: bool = True
    num_buffers: int = 0  # frames between control and video that are noised more and more
    shares_positions: bool = False  # a frame of the control has the position of its frame of the video

    def extra_frames(self, num_frames: int) -> int:
        """Return how many latent frames are computed beside those of the video."""
        return num_frames + self.num_buffers if self.in_sequence else 0


WAYS = [
    Way("on channels", in_sequence=False),
    Way("in the sequence, before the video, with buffers", num_buffers=len(BUFFER_LEVELS)),
    Way("in the sequence, before the video"),
    Way("in the sequence, at the video's positions", shares_positions=True),
]


@dataclass(frozen=True)
class Clips:
    """Drawn clips with their controls, as files and encoded."""

    videos: list[Path]
    controls: list[Path]
    moments: dict[str, torch.Tensor]  # of "videos" and "controls", [N, 2C, F', H / 8, W / 8]
    embeds: torch.Tensor  # [N, 226, D]
    empty: torch.Tensor  # [226, D], of the empty prompt

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return some of the clips as training reads them."""
        return Batch(
            names=[self.videos[index].stem for index in indices],
            bucket=SIZE,
            video_moments=self.moments["videos"][indices],
            control_moments=self.moments["controls"][indices],
            prompt_embeds=self.embeds[indices],
            draws=[Draw(index, 0) for index in indices],
        )


def draw_clips(folder: Path, count: int, seed: int) -> Clips:
    """Draw clips as control_demo.sh does, and encode them."""
    with redirect_stdout(stderr):
        draw_controlled_clips(folder, count, seed)
    files = {name: sorted((folder / name).glob("*.mp4")) for name in ("videos", "controls")}
    vae = SOURCE.load_vae(torch.float32, slicing=False, tiling=False)

    def encode(file: Path) -> torch.Tensor:
        frames = np.stack(list(stream_frames(file, range(SIZE.num_frames))))
        return encode_videos(vae, torch.from_numpy(frames).permute(0, 3, 1, 2)[None])

    moments = {name: torch.cat([encode(file) for file in part]) for name, part in files.items()}
    captions = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    embeds = encode_prompts(SOURCE.load_text_pipeline(torch.float32, device=CPU), [*captions, ""])
    return Clips(files["videos"], files["controls"], moments, embeds[:-1], embeds[-1])


def put_in_sequence(transformer: CogVideoXTransformer3DModel, way: Way, scheduler: NoiseScheduler) -> None:
    """Have a transformer take the control on channels, as the pipeline passes it, and compute it as more frames.

    Control and buffers have the learned positions of the video, because there are no others. The rotary ones continue,
    as in the paper, or are the same.
    """
    num_frames, height, width = SIZE.latent_shape
    total, num_patches = num_frames + way.extra_frames(num_frames), height * width // 4
    patches, forward = transformer.patch_embed, transformer.forward
    text, video = patches.pos_embedding.split(
        [transformer.config.max_text_seq_length, num_frames * num_patches], dim=1
    )
    buffers = [video[:, -num_patches:]] * way.num_buffers
    patches.pos_embedding, patches.sample_frames = torch.cat([text, video, *buffers, video], dim=1), 4 * total - 3
    rotary = rotary_embeddings(transformer, total, SIZE.height, SIZE.width, CPU)
    if way.shares_positions:
        rotary = tuple(part[: num_frames * num_patches].repeat(2, 1) for part in rotary)

    def call(hidden_states: torch.Tensor, timestep: torch.Tensor, **others: object) -> tuple[torch.Tensor]:
        noisy, control = hidden_states.chunk(2, dim=2)
        frames, last = [control], control[:, -1:]
        for level in BUFFER_LEVELS[: way.num_buffers]:
            most = int(level * scheduler.config.num_train_timesteps)
            frames.append(scheduler.add_noise(last, torch.randn_like(last), timestep.clamp(max=most)))
        others |= {"image_rotary_emb": rotary, "return_dict": False}
        velocity = forward(hidden_states=torch.cat([*frames, noisy], dim=1), timestep=timestep, **others)[0]
        return (velocity[:, -num_frames:],)

    transformer.forward = call
    transformer.register_to_config(in_channels=2 * transformer.config.in_channels)  # what the pipeline passes


def load(way: Way, scheduler: NoiseScheduler) -> CogVideoXTransformer3DModel:
    """Load the model with a LoRA that does nothing yet, ready to take a control in this way."""
    torch.manual_seed(0)
    transformer = SOURCE.load_transformer(torch.float32)
    if way.in_sequence:
        Lora(RANK, RANK).attach(transformer)
        put_in_sequence(transformer, way, scheduler)
    else:
        TASK.prepare_model(transformer)
        new_inputs = transformer.patch_embed.proj.weight[0].numel() // 2
        Lora(RANK, RANK, new_inputs=new_inputs).attach(transformer)
    return transformer


def train(objective: Objective, clips: Clips, num_clips: int, num_steps: int) -> Iterator[float]:
    """Train on the first clips, and yield the loss of each step."""
    parameters = [parameter for parameter in objective.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    order = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        indices = torch.randperm(num_clips, generator=order)[:BATCH_SIZE].tolist()
        generators = [step_generator(CPU, 0, step, number) for number in range(BATCH_SIZE)]
        loss = objective(clips.batch(indices), generators).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def measure(pipeline: CogVideoXFunControlPipeline, clips: Clips, folder: Path) -> float:
    """Return the mean overlap of sampled videos with their controls, and leave the videos in a new folder."""
    folder.mkdir(parents=True)
    overlaps = []
    for number, control in enumerate(clips.controls):
        torch.manual_seed(number)  # of the buffers
        frames = sample_video(
            pipeline,
            clips.embeds[number],
            clips.empty,
            [Image.fromarray(frame) for frame in stream_frames(control, range(SIZE.num_frames))],
            size=SIZE,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            use_dynamic_cfg=False,
            seed=number,
        )
        write_video(folder / control.name, frames, 8)
        overlaps.append(overlap(folder / control.name, control))
    return float(np.mean(overlaps))


def follow(way: Way, clips: Clips, num_clips: int, num_steps: int, held_out: Clips, folder: Path) -> float:
    """Train one way, and return how well it follows the controls of held-out clips."""
    scheduler = SOURCE.load_scheduler("ddim")
    transformer = load(way, scheduler)
    configs = TASK.model_configs(SOURCE.configs())
    objective, losses = Objective(TASK, transformer, transformer, scheduler, configs, None, torch.float32), []
    for loss in train(objective, clips, num_clips, num_steps):
        losses.append(loss)
        if len(losses) % 50 == 0:
            print(f"{way.name}, {num_clips} clips, step {len(losses)}: loss {np.mean(losses[-50:]):.4f}", file=stderr)
    vae = SOURCE.load_vae(torch.float32, slicing=False, tiling=False)
    pipeline = CogVideoXFunControlPipeline(None, None, vae, transformer.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return measure(pipeline, held_out, folder)


def relative_flop(way: Way) -> float:
    """Return the operations of a step of CogVideoX-5b in relation to those of a control on channels."""
    config = full_size_configs("5b").transformer
    num_frames = FULL_SIZE.latent_shape[0]
    text = config["max_text_seq_length"]
    video = count_tokens(config, FULL_SIZE) - text
    longer = text + video + video // num_frames * way.extra_frames(num_frames)
    return count_flops(config, longer, trains_all=False) / count_flops(config, text + video, trains_all=False)


def table(ways: Sequence[Way], sizes: Sequence[int], num_steps: int, num_videos: int, folder: Path) -> Iterator[str]:
    """Yield the lines of the table in markdown."""
    clips, held_out = draw_clips(folder / "clips", max(sizes), 0), draw_clips(folder / "held-out", num_videos, 1)
    yield "| control | FLOP of a step, 5b | " + " | ".join(f"IoU, {size} clips" for size in sizes) + " |"
    yield "|---" * (2 + len(sizes)) + "|"
    for number, way in enumerate(ways):
        ious = [follow(way, clips, size, num_steps, held_out, folder / f"{number}-{size}-clips") for size in sizes]
        yield "| " + " | ".join([way.name, f"{relative_flop(way):.1f}x", *(f"{iou:.3f}" for iou in ious)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, nargs="+", default=[16, 96], help="sizes of the data sets")
    parser.add_argument("--steps", type=int, default=400, help="of training (default: %(default)s)")
    parser.add_argument("--videos", type=int, default=12, help="held-out controls to sample (default: %(default)s)")
    parser.add_argument("--ways", type=int, nargs="+", default=range(len(WAYS)), help="numbers of ways, from 0")
    parser.add_argument("--work_dir", type=Path, help="a new folder for clips and videos; not kept by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        ways, folder = [WAYS[number] for number in args.ways], args.work_dir or Path(temporary)
        for line in table(ways, args.clips, args.steps, args.videos, folder):
            print(line, flush=True)


if __name__ == "__main__":
    main()
