"""The flags of prepare_dataset.py beside those on clips."""

from dataclasses import dataclass

from flags.memory import text_encoder_flag
from flags.schema import flag
from flags.types import non_negative_int, path, positive_int


FIRST_FRAMES_FILE = "metadata.jsonl"


@dataclass(frozen=True)
class PreparationFlags:
    """What is prepared, and how it is stored."""

    output_dir: str | None = flag(
        None,
        "Required. Where the prepared dataset is written; give it as --data_root when training.",
        type=path,
        metavar="FOLDER",
    )
    save_latents_and_embeddings: bool = flag(
        False,
        "Write latents and text embeddings, for training with --load_tensors. Without it only resized clips and "
        "captions are written.",
    )
    save_image_latents: bool = flag(
        False, "Also write the latents of each clip's first frame, which image-to-video training needs."
    )
    num_image_latents: int = flag(
        4,
        "With --save_image_latents, encode each first frame K times under noise of different strength; training "
        "picks one at each step.",
        type=positive_int,
        metavar="K",
    )
    layout: str | None = flag(
        None,
        "shards: safetensors files of --shard_size_mb; files: one file per clip and tensor, and a preview of "
        "each, as the original script wrote them.",
        choices=("shards", "files"),
        shown="shards; files without --save_latents_and_embeddings",
    )
    shard_size_mb: int = flag(1024, "About how large a shard becomes.", type=positive_int, metavar="MIB")
    dry_run: bool = flag(
        False,
        "Only check the clips and print the plan; write it clip by clip to plan.csv in --output_dir, and a "
        "picture of some clips as the model will see them to contact_sheet.png.",
    )
    target_fps: int = flag(
        8,
        "Frame rate of the preview videos of --layout files only; to resample clips in time use --fps.",
        type=positive_int,
        metavar="RATE",
    )
    max_sequence_length: int = flag(
        226,
        "Length of text embeddings in tokens; the released models want the default.",
        type=positive_int,
        metavar="N",
    )
    seed: int = flag(42, "Seed of random crops and flips.", type=non_negative_int, metavar="N")


@dataclass(frozen=True)
class EncodingFlags:
    """Memory and speed of the encoders."""

    batch_size: int = flag(
        1, "Clips encoded at once on each device; lower it when memory runs out.", type=positive_int, metavar="N"
    )
    text_encoder_8bit: bool = text_encoder_flag()
    use_slicing: bool = flag(False, "Let the VAE work on one clip of a batch at a time: less memory, a little slower.")
    use_tiling: bool = flag(False, "Let the VAE work on overlapping tiles of a frame: much less memory, slower.")
    num_decode_threads: int = flag(
        0, "Threads that decode one clip; 0 lets the decoder choose.", type=non_negative_int, metavar="N"
    )
    num_artifact_workers: int = flag(
        4, "Threads that write files while the next clips are encoded.", type=positive_int, metavar="N"
    )


@dataclass(frozen=True)
class FirstFrameFlags:
    """The output of make_first_frames.py."""

    output_dir: str | None = flag(
        None,
        f"Required. Where the images and {FIRST_FRAMES_FILE} are written; best a folder that holds nothing else.",
        type=path,
        metavar="FOLDER",
    )
