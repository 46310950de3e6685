"""The flags on clips and models that training and preparation share."""

import argparse

from flags.types import choice, non_negative_int, path, positive_float, positive_int, probability
from video.frames import LONG_CLIPS


DEFAULT_BUCKETS = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)
DEFAULT_HEIGHT = 480
DEFAULT_WIDTH = 720


def add_download_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--revision",
        help="Branch, tag or commit of the model on the hub. Give a commit to make a run repeatable. "
        "(default: the main branch)",
    )
    group.add_argument(
        "--variant",
        help="Variant of the weight files, such as fp16 for files named *.fp16.safetensors. Only for models that are "
        "stored in several. (default: the plain files)",
    )
    group.add_argument(
        "--cache_dir",
        metavar="FOLDER",
        type=path,
        help="Where downloaded models are kept. Use it when your home disk is small. (default: the hub's own cache)",
    )


def add_data_flags(group: argparse._ArgumentGroup, *, caption_column: str) -> None:
    """The flags on clips which training and preparation share; they differ only in the default caption column."""
    add_dataset_flags(group, caption_column)
    add_dataset_name_flags(group)
    add_mix_flags(group)
    add_size_flags(group)
    add_frame_flags(group)
    add_long_clip_flags(group)
    group.add_argument(
        "--random_flip",
        metavar="P",
        type=probability,
        help="Probability (0 to 1) of mirroring a clip left to right: one coin per clip, so all its frames agree. "
        "Avoid it when clips show text or captions say left and right. (default: no flips)",
    )
    group.add_argument(
        "--dataloader_num_workers",
        metavar="N",
        type=non_negative_int,
        default=0,
        help="Processes that read clips while the model computes; 0 reads in the main process. Raise it (4 to 8) when "
        "steps wait for data. (default: %(default)s)",
    )
    group.add_argument(
        "--pin_memory",
        action="store_true",
        help="Keep batches in page-locked memory, which makes copies to a GPU faster at the cost of RAM. "
        "(default: off)",
    )


def add_dataset_flags(
    group: argparse._ArgumentGroup, caption_column: str, skipped_to: str = "skipped_clips.csv in --output_dir"
) -> None:
    group.add_argument(
        "--data_root",
        "--instance_data_root",
        metavar="FOLDER",
        type=path,
        help="Folder that holds the clips; required unless another flag names the data. "
        "It lists them in two text files (see --video_column), or has a caption clip.txt beside each clip.mp4.",
    )
    group.add_argument(
        "--dataset_file",
        metavar="FILE",
        type=path,
        help="Table with one row per clip: .csv, .tsv, .jsonl, .json or .parquet. Paths in it are relative to "
        "--data_root, or to the file itself without one. (default: none)",
    )
    group.add_argument(
        "--video_column",
        metavar="NAME",
        default="video",
        help="Column with the clips' paths, or name of the text file in --data_root that lists them, videos.txt "
        "otherwise. (default: %(default)s)",
    )
    group.add_argument(
        "--caption_column",
        metavar="NAME",
        default=caption_column,
        help="Column with the captions, or name of the text file that lists them, prompts.txt otherwise. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--image_column",
        metavar="NAME",
        help="Image-to-video: column with images to start from, or name of the text file that lists them. Where it is "
        "empty, a clip starts from its own first frame. (default: image or images.txt, where there is one)",
    )
    group.add_argument(
        "--allow_outside_paths",
        action="store_true",
        help="Follow paths of a list wherever they lead; lists may come from strangers. Otherwise what a table, text "
        "file or data set names must lie in --data_root or in the table's own folder, what --dataset_mix names below "
        "that file's folder, and what the index of a prepared folder names in that folder; links inside these are "
        "followed. (default: off)",
    )
    group.add_argument(
        "--on_bad_clip",
        **choice(("error", "skip")),
        default="error",
        help="What to do about clips that are missing, damaged, too short or without a caption: list them all and "
        f"stop, or leave them out and list them in {skipped_to}. (default: %(default)s)",
    )


def add_dataset_name_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset_name",
        metavar="NAME",
        help="Data set on the Hugging Face hub, or a local one, as `datasets.load_dataset` takes it; its clips may be "
        "paths, bytes or decoded videos. (default: none)",
    )
    group.add_argument(
        "--dataset_config_name",
        metavar="NAME",
        help="Configuration of --dataset_name. (default: its only one)",
    )
    group.add_argument(
        "--dataset_split",
        metavar="NAME",
        default="train",
        help="Split of --dataset_name. (default: %(default)s)",
    )
    group.add_argument(
        "--dataset_streaming",
        action="store_true",
        help="Read --dataset_name row by row instead of downloading all of it first; with --max_samples, only what is "
        "used is downloaded. (default: off)",
    )
    group.add_argument(
        "--max_samples",
        metavar="N",
        type=positive_int,
        help="Use only the first N rows of the data set, to try something out. (default: all)",
    )


def add_mix_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--id_token",
        metavar="WORD",
        help="Rare word put in front of every caption, which then calls up what you trained; use the same word in "
        "prompts later. (default: none)",
    )
    group.add_argument(
        "--dataset_mix",
        metavar="JSON",
        type=path,
        help="Several data sets: a JSON file with a list of objects, each with these flags as keys and with repeats "
        "(how often its clips come in an epoch) or weight (its share of an epoch). (default: none)",
    )


def add_size_flags(group: argparse._ArgumentGroup) -> None:
    buckets = " ".join(map(str, DEFAULT_BUCKETS))
    group.add_argument(
        "--height_buckets",
        metavar="PX",
        nargs="+",
        type=positive_int,
        help="Heights in pixels, multiples of 16; each clip is resized to the nearest height x width of the two "
        "lists. When neither list is given but both --height and --width are, that one size is used for all clips. "
        f"(default: {buckets})",
    )
    group.add_argument(
        "--width_buckets",
        metavar="PX",
        nargs="+",
        type=positive_int,
        help=f"Widths in pixels, multiples of 16; see --height_buckets. (default: {buckets})",
    )
    group.add_argument(
        "--height",
        metavar="PX",
        type=positive_int,
        help="Height in pixels, a multiple of 16, of validation videos; together with --width, and without bucket "
        f"lists, also the only size of clips. (default: {DEFAULT_HEIGHT})",
    )
    group.add_argument(
        "--width",
        metavar="PX",
        type=positive_int,
        help=f"Width in pixels, a multiple of 16; see --height. (default: {DEFAULT_WIDTH})",
    )
    group.add_argument(
        "--video_reshape_mode",
        **choice(("center", "random", "none")),
        default="center",
        help="How a clip gets its bucket's size: center and random resize it with its aspect kept and crop the middle "
        "or a random part; none stretches it, which distorts clips of another aspect. (default: %(default)s)",
    )


def add_frame_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--frame_buckets",
        metavar="N",
        nargs="+",
        type=positive_int,
        default=[49],
        help="Lengths in frames that clips are cut to: 1, or numbers of the form 4k or 4k+1. The models know 49 "
        "(CogVideoX 1.5: 81). (default: 49)",
    )
    group.add_argument(
        "--max_num_frames",
        metavar="N",
        type=positive_int,
        default=49,
        help="Longest clip in frames, and the length of validation videos. Raise it together with --frame_buckets. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--fps",
        metavar="RATE",
        type=positive_float,
        help="Sample clips in time at this many frames per second, so that motion keeps its speed; give the model's "
        "own rate (8, CogVideoX 1.5: 16). Without it frames are spread evenly over the clip, and written videos play "
        "at 8. (default: not resampled)",
    )
    add_skip_flags(group, ", for title cards and fades")


def add_skip_flags(group: argparse._ArgumentGroup, purpose: str) -> None:
    """The frames to leave out of every clip, and what to say of it behind that."""
    for end in ("start", "end"):
        group.add_argument(
            f"--skip_frames_{end}",
            metavar="N",
            type=non_negative_int,
            default=0,
            help=f"Frames of the file to leave out at the clip's {end}{purpose}. (default: %(default)s)",
        )


def add_long_clip_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--long_clips",
        **choice(LONG_CLIPS),
        help="What to take of a clip longer than its frame bucket: spread takes frames evenly from all of it, first "
        "its first frames in succession, split makes several samples of successive frames. "
        "(default: spread; with --fps, which spread cannot keep, first)",
    )
    group.add_argument(
        "--hold_last_frame",
        action="store_true",
        help="Fill clips that are too short for the smallest frame bucket by holding their last frame; otherwise they "
        "are bad clips. (default: off)",
    )
