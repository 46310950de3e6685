"""The flags of prepare_dataset.py, by group; those on data are in data_flags."""

import argparse

from flags.memory import add_text_encoder_flag
from flags.types import add_config_flag, choice, non_negative_int, path, positive_int


def add_prepare_flags(group: argparse._ArgumentGroup) -> None:
    add_config_flag(group)
    group.add_argument(
        "--output_dir",
        metavar="FOLDER",
        type=path,
        help="Required. Where the prepared dataset is written; give it as --data_root when training.",
    )
    group.add_argument(
        "--save_latents_and_embeddings",
        action="store_true",
        help="Write latents and text embeddings, for training with --load_tensors. Without it only resized clips and "
        "captions are written. (default: off)",
    )
    group.add_argument(
        "--save_image_latents",
        action="store_true",
        help="Also write the latents of each clip's first frame, which image-to-video training needs. (default: off)",
    )
    group.add_argument(
        "--num_image_latents",
        metavar="K",
        type=positive_int,
        default=4,
        help="With --save_image_latents, encode each first frame K times under noise of different strength; training "
        "picks one at each step. (default: %(default)s)",
    )
    group.add_argument(
        "--layout",
        **choice(("shards", "files")),
        help="shards: safetensors files of --shard_size_mb; files: one file per clip and tensor, and a preview of "
        "each, as the original script wrote them. (default: shards; files without --save_latents_and_embeddings)",
    )
    group.add_argument(
        "--shard_size_mb",
        metavar="MIB",
        type=positive_int,
        default=1024,
        help="About how large a shard becomes. (default: %(default)s)",
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="Only check the clips and print the plan; write it clip by clip to plan.csv in --output_dir, and a "
        "picture of some clips as the model will see them to contact_sheet.png. (default: off)",
    )
    group.add_argument(
        "--target_fps",
        metavar="RATE",
        type=positive_int,
        default=8,
        help="Frame rate of the preview videos of --layout files only; to resample clips in time use --fps. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max_sequence_length",
        metavar="N",
        type=positive_int,
        default=226,
        help="Length of text embeddings in tokens; the released models want the default. (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=non_negative_int,
        default=42,
        help="Seed of random crops and flips. (default: %(default)s)",
    )


def preparation_memory_advice(args: argparse.Namespace) -> list[str]:
    """What makes the preparation take less of the GPU's memory, for the user: a line each, the least costly first."""
    anew = "; into a new folder"
    savings = [
        (args.batch_size > 1, "--batch_size 1"),
        (not args.use_slicing, "--use_slicing"),
        (not args.use_tiling, f"--use_tiling (the latents differ a little{anew})"),
        (args.dtype == "fp32", f"--dtype bf16 (half of everything{anew})"),
        (not args.text_encoder_8bit, f"--text_encoder_8bit (where captions are being embedded{anew})"),
        (True, "smaller --height_buckets and --width_buckets, or fewer frames in --frame_buckets"),
    ]
    return [advice for is_open, advice in savings if is_open]


def add_prepare_speed_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch_size",
        metavar="N",
        type=positive_int,
        default=1,
        help="Clips encoded at once on each device; lower it when memory runs out. (default: %(default)s)",
    )
    add_text_encoder_flag(group)
    group.add_argument(
        "--use_slicing",
        action="store_true",
        help="Let the VAE work on one clip of a batch at a time: less memory, a little slower. (default: off)",
    )
    group.add_argument(
        "--use_tiling",
        action="store_true",
        help="Let the VAE work on overlapping tiles of a frame: much less memory, slower. (default: off)",
    )
    group.add_argument(
        "--num_decode_threads",
        metavar="N",
        type=non_negative_int,
        default=0,
        help="Threads that decode one clip; 0 lets the decoder choose. (default: %(default)s)",
    )
    group.add_argument(
        "--num_artifact_workers",
        metavar="N",
        type=positive_int,
        default=4,
        help="Threads that write files while the next clips are encoded. (default: %(default)s)",
    )
