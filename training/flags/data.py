"""The flags on clips."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import Condition, FilePath, FolderPath, NonNegativeInt, Pixels, PositiveFloat, PositiveInt, Probability
from common.remote import DEFAULT_LIMIT_GB
from video.controls import KINDS
from video.frames import LONG_CLIPS, RESHAPE_MODES


DEFAULT_BUCKETS = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)
# How raw clips become samples: fixed once they are prepared.
PREPARED_FLAGS = ("id_token", "video_reshape_mode", "random_flip", "fps", "skip_frames_start", "skip_frames_end")
PREPARED_FLAGS += (
    "long_clips",
    "hold_last_frame",
    "height_buckets",
    "width_buckets",
    "frame_buckets",
    "keep",
    "compute_control",
    "condition_frames",
    "caption_per_line",
    "shuffle_tags",
)


@dataclass(frozen=True)
class SourceFlags:
    """Where the clips and captions are, and which frames of a file to use."""

    data_root: FolderPath | None = flag(
        None,
        "Folder of the clips, or its URL (hf, s3, gs, az, https); required unless another flag names the data. Two "
        "text files list them (see --video_column), or each clip.mp4 has its caption in clip.txt.",
        alias="instance_data_root",
    )
    dataset_file: FilePath | None = flag(
        None,
        "Table with one row per clip, or its URL: .csv, .tsv, .jsonl, .json or .parquet. Paths in it start from "
        "--data_root, or else from its own folder.",
    )
    video_column: str = flag("video", "Column of the clips' paths, or list of them in --data_root (else videos.txt).")
    caption_column: str = flag("text", "Column of the captions, or text file that lists them (else prompts.txt).")
    caption_per_line: bool = flag(
        False,
        "Each line of a caption is a caption of its own; they take turns from epoch to epoch. JSON, Parquet and data "
        "sets may have lists of captions without it.",
    )
    shuffle_tags: PositiveInt | None = flag(
        None,
        "For captions of comma-separated tags: make N captions of each, with its tags in random order, which take "
        "turns from epoch to epoch. --id_token stays in front.",
        metavar="N",
        shown="as written",
    )
    image_column: str | None = flag(
        None,
        "Image-to-video: column or text file of first frames. Where empty, a clip's own first frame is used.",
        shown="image or images.txt, if it exists",
    )
    allow_outside_paths: bool = flag(
        False,
        "Allow listed paths to point anywhere; not for lists from strangers. Otherwise a table, text file or data set "
        "may name only files in --data_root or the table's folder, --dataset_mix only files below its own folder, and "
        "the index of a prepared folder only files in it. Links inside these are followed.",
    )
    on_bad_clip: str = flag(
        "error",
        "For clips that are missing, damaged, too short or without a caption: error lists all and stops; skip lists "
        "them in skipped_clips.csv in --output_dir (captioning: in the log).",
        choices=("error", "skip"),
    )
    dataset_name: str | None = flag(None, "Data set for `datasets.load_dataset`, of paths, bytes or decoded videos.")
    dataset_config_name: str | None = flag(None, "Configuration of --dataset_name.", shown="its only one")
    dataset_split: str = flag("train", "Split of --dataset_name.")
    dataset_streaming: bool = flag(False, "Read --dataset_name row by row: --max_samples then limits the download.")
    max_samples: PositiveInt | None = flag(None, "Use only the first N rows of the data set, to try it.", shown="all")
    id_token: str | None = flag(
        None,
        "Rare trigger word to prepend to every caption that does not begin with it; start prompts with it later.",
        metavar="WORD",
    )
    dataset_mix: FilePath | None = flag(
        None,
        "Several data sets: a JSON list of objects with these flags as keys, and with repeats (passes over its clips "
        "per epoch) or weight (its share of an epoch).",
    )
    keep: Condition | None = flag(
        None,
        "Use only clips whose scores fulfil a condition, such as 'motion > 0.2 and sharpness > 40': comparisons of "
        "columns and numbers, with and, or, not, parentheses and ranges (0.2 < motion < 5). The others are listed "
        "with their scores.",
        shown="all",
    )
    scores: FilePath | None = flag(
        None, "The table for --keep.", shown="scores.csv where score_clips.py writes it for these data flags"
    )
    cache_limit_gb: PositiveFloat = flag(
        DEFAULT_LIMIT_GB,
        "Disk for files fetched from URLs, in ~/.cache/cogvideox-factory or $COGVIDEOX_FACTORY_CACHE; those not used "
        "for the longest time are removed first.",
        metavar="GB",
    )
    skip_frames_start: NonNegativeInt = flag(0, "Frames to skip at a clip's start (titles); pass the same everywhere.")
    skip_frames_end: NonNegativeInt = flag(0, "Frames to skip at a clip's end; pass the same to every script.")


@dataclass(frozen=True)
class RegularizationFlags:
    """Clips of what the model should keep doing."""

    regularization_data_root: FolderPath | None = flag(
        None,
        "Folder of clips without the id token, of what the model should keep doing, such as videos of the base model "
        "(generate.py --as_dataset). As many of them as of the training samples are trained on, in batches between "
        "theirs. Like --data_root: raw, or prepared for --load_tensors.",
    )
    regularization_weight: PositiveFloat = flag(
        1.0, "Factor of the loss of regularization samples; raise it to keep more, lower it to learn more."
    )


@dataclass(frozen=True)
class ClipFlags:
    """How a clip becomes a sample: its size, its frames, its augmentation."""

    height_buckets: tuple[Pixels, ...] = flag(
        DEFAULT_BUCKETS,
        "Heights in pixels, multiples of 16; each clip is resized to the nearest height x width of both lists. "
        "Without lists, --height and --width together set the only size.",
    )
    width_buckets: tuple[Pixels, ...] = flag(DEFAULT_BUCKETS, "Widths, multiples of 16; see --height_buckets.")
    height: Pixels = flag(
        480,
        "Height of validation videos; with --width and no bucket lists, also of all clips.",
        shown="that of most clips",
    )
    width: Pixels = flag(720, "Width in pixels, a multiple of 16; see --height.", shown="that of most clips")
    video_reshape_mode: str = flag(
        "center",
        "How a clip gets its bucket's size: center and random keep the aspect ratio and crop the middle or a random "
        "part; none stretches the clip.",
        choices=RESHAPE_MODES,
    )
    frame_buckets: tuple[PositiveInt, ...] = flag(
        (49,), "Lengths in frames to cut clips to: 1, 4k or 4k+1. The models were trained on 49 (CogVideoX 1.5: 81)."
    )
    max_num_frames: PositiveInt = flag(
        49,
        "Longest clip; if passed, also the length of validation videos, which else are as long as most clips. See "
        "--frame_buckets.",
    )
    fps: PositiveFloat | None = flag(
        None,
        "Resample clips to this frame rate, so that motion keeps its speed; use the model's (8, CogVideoX 1.5: 16). "
        "Without it frames are spread evenly over the clip, and written videos play at 8.",
        metavar="RATE",
        shown="not resampled",
    )
    long_clips: str | None = flag(
        None,
        "For clips longer than their frame bucket: spread takes frames evenly from all of it, first its first "
        "consecutive frames, split several samples of consecutive frames.",
        choices=LONG_CLIPS,
        shown="spread; first with --fps, which spread cannot keep",
    )
    hold_last_frame: bool = flag(False, "Repeat the last frame of clips too short for all buckets, else bad clips.")
    random_flip: Probability | None = flag(
        None, "Probability of mirroring all frames of a clip. Not with text in clips or left and right in captions."
    )


@dataclass(frozen=True)
class ControlFlags:
    """The control videos of clips, for control-to-video."""

    control_column: str | None = flag(
        None,
        "Column or text file of control clips (edges, depth, poses, another video): each has the frames and the size "
        "of its clip, and is cut, cropped and flipped like it.",
        shown="control, or controls.txt; in a folder of clips, a.control.mp4 beside a.mp4",
    )
    compute_control: str | None = flag(
        None,
        "Compute controls from the clips instead: edges, grey values, blurred, a mosaic of 12 tiles on the shorter "
        "side, or grey where the mask is white (inpaint). Depth and poses need another model: pass your own clips.",
        choices=tuple(KINDS),
        shown="controls are listed",
    )


@dataclass(frozen=True)
class MaskFlags:
    """The masks of clips."""

    use_masks: bool = flag(
        False,
        "Weight the loss by masks, white where it counts fully (training) and black where "
        "--mask_background_weight applies; prepare_dataset.py writes them at the size of the latents. Clips without "
        "a mask count fully everywhere.",
    )
    mask_column: str | None = flag(
        None,
        "With --use_masks or --compute_control inpaint: column or text file of masks. A mask is a video with the "
        "frames and the size of its clip, or a still image of its size.",
        shown="mask, or masks.txt; in a folder of clips, a.mask.mp4 or a.mask.png beside a.mp4",
    )


@dataclass(frozen=True)
class LoaderFlags:
    """How samples are read."""

    dataloader_num_workers: NonNegativeInt = flag(
        0, "Worker processes that read clips; 0 reads in the main process. Raise it (4 to 8) if steps wait for data."
    )
    pin_memory: bool = flag(False, "Keep batches in page-locked memory: faster copies to a GPU, more RAM.")


@dataclass(frozen=True)
class PreparedFlags:
    """Training on data from prepare_dataset.py."""

    load_tensors: bool = flag(
        False,
        "Train on latents and embeddings of prepare_dataset.py; --data_root is its --output_dir. Steps are faster, "
        "and neither VAE nor text encoder is loaded. Use it for more than one epoch.",
    )
    ignore_prepared_mismatch: bool = flag(False, "With --load_tensors, only warn if other encoders prepared the data.")
