"""Checks of the flags of prepare_dataset.py beside those on clips, and advice when memory runs out."""

import os
from collections.abc import Collection
from dataclasses import replace

from common.errors import UserError
from common.stores import is_url
from flags.preparation import EncodingFlags, PreparationFlags
from video.condition_frames import FIRST


def settle_preparation(
    preparation: PreparationFlags, given: Collection[str], *, use_masks: bool, text_encoder_8bit: bool
) -> PreparationFlags:
    """Return the checked flags with the layout, and the number of image latents that it can store."""
    if not preparation.save_latents_and_embeddings:
        for flag, is_given in (
            ("--save_image_latents", preparation.save_image_latents),
            ("--save_control_latents", preparation.save_control_latents),
            ("--use_masks", use_masks),
            ("--text_encoder_8bit", text_encoder_8bit),
            ("--layout shards", preparation.layout == "shards"),
        ):
            if is_given:
                raise UserError(f"{flag}: no effect without latents and embeddings; add --save_latents_and_embeddings")
    for name in ("control_column", "compute_control"):
        if name in given and not preparation.save_control_latents:
            raise UserError(f"--{name}: no effect without latents of controls; add --save_control_latents")
    frames = preparation.condition_frames
    if frames != FIRST and not preparation.save_image_latents:
        raise UserError("--condition_frames: no effect without latents of images; add --save_image_latents")
    layout = preparation.layout or ("shards" if preparation.save_latents_and_embeddings else "files")
    if layout == "files" and is_url(preparation.output_dir or ""):
        raise UserError(
            f"--output_dir: {preparation.output_dir} takes only shards (--save_latents_and_embeddings, not --layout "
            "files); pass a folder, and copy it"
        )
    for flag, is_given in (
        ("--save_control_latents", preparation.save_control_latents),
        ("--use_masks", use_masks),
    ):
        if layout == "files" and is_given:
            raise UserError(f"{flag}: --layout files has no place for them; use shards")
    if layout == "files" and frames != FIRST:
        raise UserError(f"--condition_frames {frames}: --layout files stores only first frames; use shards")
    num_latents = preparation.num_image_latents
    if layout == "files" and num_latents > 1:
        if "num_image_latents" in given:
            raise UserError("--num_image_latents: --layout files stores only one; omit it, or use shards")
        num_latents = 1
    return replace(preparation, layout=layout, num_image_latents=num_latents)


def check_place(data_root: str | None, output_dir: str | None) -> None:
    """Refuse the folder of the clips as that of the prepared data, which has lists and pages of the same names."""
    if data_root and output_dir and os.path.realpath(data_root) == os.path.realpath(output_dir):
        raise UserError(f"--output_dir: {output_dir} is the folder of the clips; pass another one, such as a new one")


def preparation_memory_advice(encoding: EncodingFlags, dtype: str) -> list[str]:
    """Return what lowers the GPU memory of the preparation, a line each, the least costly first."""
    folder = "; needs a new folder"
    savings = [
        (encoding.batch_size > 1, "--batch_size 1"),
        (not encoding.use_slicing, "--use_slicing"),
        (not encoding.use_tiling, f"--use_tiling (the latents differ a little{folder})"),
        (dtype == "fp32", f"--dtype bf16 (half of everything{folder})"),
        (not encoding.text_encoder_8bit, f"--text_encoder_8bit (while captions are embedded{folder})"),
        (True, "smaller --height_buckets and --width_buckets, or fewer frames in --frame_buckets"),
    ]
    return [advice for is_open, advice in savings if is_open]
