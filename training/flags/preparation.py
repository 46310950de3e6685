"""The flags of prepare_dataset.py and make_first_frames.py beside those on clips."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import ConditionFrames, FolderPath, NonNegativeInt, PositiveInt
from flags.memory import text_encoder_flag


FIRST_FRAMES_FILE = "metadata.jsonl"


@dataclass(frozen=True)
class PreparationFlags:
    """What is prepared, and how it is stored."""

    output_dir: FolderPath | None = flag(
        None, "Required. Folder of the prepared data, or its URL (hf, s3, gs, az); the --data_root of training."
    )
    save_latents_and_embeddings: bool = flag(False, "Write latents and embeddings, not only clips and captions.")
    save_image_latents: bool = flag(False, "Also write latents of first frames, for image-to-video training.")
    condition_frames: ConditionFrames = flag(
        "first", "With --save_image_latents, the frames to encode for it, as --condition_frames of training."
    )
    num_image_latents: PositiveInt = flag(
        4, "With --save_image_latents, encode first frames K times with other noise; each step picks one.", metavar="K"
    )
    save_control_latents: bool = flag(
        False, "Also write latents of controls, for control-to-video training; see --control_column."
    )
    layout: str | None = flag(
        None,
        "shards: safetensors files of --shard_size_mb. files: one file per clip and tensor, and a preview of each, as "
        "the original script wrote them.",
        choices=("shards", "files"),
        shown="shards; files without --save_latents_and_embeddings",
    )
    shard_size_mb: PositiveInt = flag(1024, "Approximate size of a shard.", metavar="MIB")
    dry_run: bool = flag(
        False,
        "Only check the clips and print the plan. Writes it clip by clip to plan.csv in --output_dir, a picture of "
        "some clips as the model will see them to contact_sheet.png, and a page with both to report.html.",
    )
    target_fps: PositiveInt = flag(8, "Frame rate of previews of --layout files; --fps resamples.", metavar="RATE")
    max_sequence_length: PositiveInt = flag(226, "Length of embeddings in tokens; released models need the default.")
    seed: NonNegativeInt = flag(42, "Seed of random crops and flips.")


@dataclass(frozen=True)
class EncodingFlags:
    """Memory and speed of the encoders."""

    batch_size: PositiveInt = flag(1, "Clips per device that are encoded at once; lower it if memory runs out.")
    text_encoder_8bit: bool = text_encoder_flag()
    use_slicing: bool = flag(False, "Let the VAE encode one clip of a batch at a time: less memory, a little slower.")
    use_tiling: bool | None = flag(
        None,
        "Let the VAE encode overlapping tiles of a frame: much less memory, 1.4 times the arithmetic, and slightly "
        "other latents.",
        shown="as the folder was begun; in a new one, only if full frames do not fit into the GPU's free memory",
    )
    num_decode_threads: NonNegativeInt = flag(0, "Threads that decode one clip; 0 lets the decoder choose.")
    num_artifact_workers: PositiveInt = flag(4, "Threads that write files while the next clips are encoded.")


@dataclass(frozen=True)
class FirstFrameFlags:
    """The output of make_first_frames.py."""

    output_dir: FolderPath | None = flag(
        None, f"Required. Folder of the images and {FIRST_FRAMES_FILE}, beside the clips and not among them."
    )
