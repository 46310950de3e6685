"""The flags on clips."""

from dataclasses import dataclass

from flags.schema import flag
from flags.types import non_negative_int, path, positive_float, positive_int, probability
from video.frames import LONG_CLIPS


DEFAULT_BUCKETS = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)
# How raw clips become samples: fixed once they are prepared.
PREPARED_FLAGS = (
    "id_token",
    "video_reshape_mode",
    "random_flip",
    "fps",
    "skip_frames_start",
    "skip_frames_end",
    "long_clips",
    "hold_last_frame",
    "height_buckets",
    "width_buckets",
    "frame_buckets",
)


@dataclass(frozen=True)
class SourceFlags:
    """Where the clips and captions are, and which frames of a file count."""

    data_root: str | None = flag(
        None,
        "Folder that holds the clips; required unless another flag names the data. It lists them in two text "
        "files (see --video_column), or has a caption clip.txt beside each clip.mp4.",
        type=path,
        metavar="FOLDER",
        also=("--instance_data_root",),
    )
    dataset_file: str | None = flag(
        None,
        "Table with one row per clip: .csv, .tsv, .jsonl, .json or .parquet. Paths in it are relative to "
        "--data_root, or to the file itself without one.",
        type=path,
        metavar="FILE",
        shown="none",
    )
    video_column: str = flag(
        "video",
        "Column with the clips' paths, or name of the text file in --data_root that lists them, videos.txt otherwise.",
        metavar="NAME",
    )
    caption_column: str = flag(
        "text",
        "Column with the captions, or name of the text file that lists them, prompts.txt otherwise.",
        metavar="NAME",
    )
    image_column: str | None = flag(
        None,
        "Image-to-video: column with images to start from, or name of the text file that lists them. Where it is "
        "empty, a clip starts from its own first frame.",
        metavar="NAME",
        shown="image or images.txt, where there is one",
    )
    allow_outside_paths: bool = flag(
        False,
        "Follow paths of a list wherever they lead; lists may come from strangers. Otherwise what a table, text "
        "file or data set names must lie in --data_root or in the table's own folder, what --dataset_mix names "
        "below that file's folder, and what the index of a prepared folder names in that folder; links inside "
        "these are followed.",
    )
    on_bad_clip: str = flag(
        "error",
        "What to do about clips that are missing, damaged, too short or without a caption: list them all and "
        "stop, or skip them and list them in skipped_clips.csv in --output_dir (captioning: in the log).",
        choices=("error", "skip"),
    )
    dataset_name: str | None = flag(
        None,
        "Data set on the Hugging Face hub, or a local one, as `datasets.load_dataset` takes it; its clips may be "
        "paths, bytes or decoded videos.",
        metavar="NAME",
        shown="none",
    )
    dataset_config_name: str | None = flag(
        None, "Configuration of --dataset_name.", metavar="NAME", shown="its only one"
    )
    dataset_split: str = flag("train", "Split of --dataset_name.", metavar="NAME")
    dataset_streaming: bool = flag(
        False,
        "Read --dataset_name row by row instead of downloading all of it first; with --max_samples, only what is "
        "used is downloaded.",
    )
    max_samples: int | None = flag(
        None,
        "Use only the first N rows of the data set, to try something out.",
        type=positive_int,
        metavar="N",
        shown="all",
    )
    id_token: str | None = flag(
        None,
        "Rare word put in front of every caption, which then calls up what you trained; use the same word in "
        "prompts later.",
        metavar="WORD",
        shown="none",
    )
    dataset_mix: str | None = flag(
        None,
        "Several data sets: a JSON file with a list of objects, each with these flags as keys and with repeats "
        "(how often its clips come in an epoch) or weight (its share of an epoch).",
        type=path,
        metavar="JSON",
        shown="none",
    )
    skip_frames_start: int = flag(
        0,
        "Frames of the file to skip at the clip's start, for title cards and fades; pass the same number to every "
        "script.",
        type=non_negative_int,
        metavar="N",
    )
    skip_frames_end: int = flag(
        0,
        "Frames of the file to skip at the clip's end; pass the same number to every script.",
        type=non_negative_int,
        metavar="N",
    )


@dataclass(frozen=True)
class ClipFlags:
    """How a clip becomes a sample: its size, its frames, its augmentation."""

    height_buckets: tuple[int, ...] = flag(
        DEFAULT_BUCKETS,
        "Heights in pixels, multiples of 16; each clip is resized to the nearest height x width of the two "
        "lists. When neither list is given but both --height and --width are, that one size is used for all "
        "clips.",
        type=positive_int,
        metavar="PX",
    )
    width_buckets: tuple[int, ...] = flag(
        DEFAULT_BUCKETS, "Widths in pixels, multiples of 16; see --height_buckets.", type=positive_int, metavar="PX"
    )
    height: int = flag(
        480,
        "Height in pixels, a multiple of 16, of validation videos; together with --width, and without bucket "
        "lists, also the only size of clips.",
        type=positive_int,
        metavar="PX",
    )
    width: int = flag(720, "Width in pixels, a multiple of 16; see --height.", type=positive_int, metavar="PX")
    video_reshape_mode: str = flag(
        "center",
        "How a clip gets its bucket's size: center and random resize it with its aspect kept and crop the middle "
        "or a random part; none stretches it, which distorts clips of another aspect.",
        choices=("center", "random", "none"),
    )
    frame_buckets: tuple[int, ...] = flag(
        (49,),
        "Lengths in frames that clips are cut to: 1, or numbers of the form 4k or 4k+1. The models know 49 "
        "(CogVideoX 1.5: 81).",
        type=positive_int,
        metavar="N",
    )
    max_num_frames: int = flag(
        49,
        "Longest clip in frames, and the length of validation videos. Raise it together with --frame_buckets.",
        type=positive_int,
        metavar="N",
    )
    fps: float | None = flag(
        None,
        "Sample clips in time at this many frames per second, so that motion keeps its speed; give the model's "
        "own rate (8, CogVideoX 1.5: 16). Without it frames are spread evenly over the clip, and written videos "
        "play at 8.",
        type=positive_float,
        metavar="RATE",
        shown="not resampled",
    )
    long_clips: str | None = flag(
        None,
        "What to take of a clip longer than its frame bucket: spread takes frames evenly from all of it, first "
        "its first frames in succession, split makes several samples of successive frames.",
        choices=LONG_CLIPS,
        shown="spread; with --fps, which spread cannot keep, first",
    )
    hold_last_frame: bool = flag(
        False,
        "Fill clips that are too short for the smallest frame bucket by holding their last frame; otherwise they "
        "are bad clips.",
    )
    random_flip: float | None = flag(
        None,
        "Probability (0 to 1) of mirroring a clip left to right: one coin per clip, so all its frames agree. "
        "Avoid it when clips show text or captions say left and right.",
        type=probability,
        metavar="P",
        shown="no flips",
    )


@dataclass(frozen=True)
class LoaderFlags:
    """How samples are read."""

    dataloader_num_workers: int = flag(
        0,
        "Processes that read clips while the model computes; 0 reads in the main process. Raise it (4 to 8) when "
        "steps wait for data.",
        type=non_negative_int,
        metavar="N",
    )
    pin_memory: bool = flag(
        False, "Keep batches in page-locked memory, which makes copies to a GPU faster at the cost of RAM."
    )


@dataclass(frozen=True)
class PreparedFlags:
    """Training on data from prepare_dataset.py."""

    load_tensors: bool = flag(
        False,
        "Train on latents and embeddings written by prepare_dataset.py, with --data_root as its --output_dir. "
        "Saves loading the VAE and the text encoder and makes steps faster; use it whenever you train for more "
        "than one epoch.",
    )
    ignore_prepared_mismatch: bool = flag(
        False,
        "With --load_tensors, go on with a warning when the data was prepared with other encoders than the model's.",
    )
