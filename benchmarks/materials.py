"""Make models with random weights and prepared clips of random numbers for the benchmarks; no video is encoded."""

from pathlib import Path
from typing import Any

import torch
from memory_rows import Row
from PIL import Image

from clip_files import new_folder
from data.buckets import Bucket
from data.clips import Clip, ClipSample
from make_full_size_model import make_full_size_model
from make_tiny_model import make_tiny_model
from models.configs import ModelConfigs
from models.source import ModelSource
from preparation.layouts import Sample, ShardLayout
from video.io import write_video
from video.probe import VideoInfo


TINY_SIZE = (17, 64, 96)
CONTROL = "control.mp4"  # in the folder of prepared clips with controls, for the validation


def folders(row: Row, work: Path, tiny: bool) -> tuple[Path, Path, tuple[int, int, int]]:
    """Return the folders of model and prepared clips, and the size of a row."""
    size = TINY_SIZE if tiny else row.size
    name = f"{'tiny-' if tiny else ''}{row.model}"
    kind = "-controls" if row.task == "control-to-video" else ""
    return work / name, work / f"prepared-{name}-{'x'.join(map(str, size))}{kind}", size


def make_materials(row: Row, work: Path, tiny: bool) -> dict[str, Any]:
    """Make the model and the prepared clips of a row, unless they exist."""
    model, prepared, size = folders(row, work, tiny)
    if tiny:
        make_tiny_model(row.model, model)
    else:
        make_full_size_model(row.model, model, device="cuda" if torch.cuda.is_available() else "cpu")
    if not prepared.is_dir():
        with new_folder(prepared) as folder:
            has_controls = row.task == "control-to-video"
            draw_prepared_clips(ModelSource(str(model)).configs(), folder, Bucket(*size), with_controls=has_controls)
            if has_controls:
                frames, height, width = size
                write_video(folder / CONTROL, [Image.new("RGB", (width, height), "gray")] * frames, 8)
    return {}


def draw_prepared_clips(
    configs: ModelConfigs, folder: Path, bucket: Bucket, count: int = 4, *, with_controls: bool = False
) -> None:
    """Write random bfloat16 moments and prompt embeddings in the format of prepare_dataset.py.

    Args:
        configs: of the model.
        folder: for `--load_tensors`.
        bucket: size of the clips.
        with_controls: write moments of controls too.
    """
    latents = (2 * configs.vae["latent_channels"], *bucket.latent_shape)
    embeds = (configs.transformer["max_text_seq_length"], configs.transformer["text_embed_dim"])
    info = VideoInfo(*bucket, fps=8.0)
    frames = tuple(range(bucket.num_frames))
    samples = [
        Sample(f"clip-{number}", f"caption-{number}", ClipSample(clip, info, bucket, frames))
        for number in range(count)
        for clip in [Clip(Path(f"clip-{number}.mp4"), f"caption {number}", "random numbers")]
    ]
    layout = ShardLayout(
        folder,
        samples,
        latent_bytes=lambda _: 2 * torch.Size(latents).numel() * (1 + with_controls),
        embed_bytes=2 * torch.Size(embeds).numel(),
        shard_bytes=2**30,
        with_images=False,
        with_controls=with_controls,
    )
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    layout.write_captions({sample.caption_key: draw(embeds) for sample in samples})
    kinds = ("video_latents", "control_latents") if with_controls else ("video_latents",)
    layout.write_clips({sample.name: {kind: draw(latents) for kind in kinds} for sample in samples}, {})
    layout.write_index(samples)
