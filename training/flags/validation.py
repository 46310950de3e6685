"""The flags on what is validated, and how."""

import argparse
import os

from flags.types import denoising_steps, non_negative_float, path, positive_int, prose


TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def add_validation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--validation_prompt",
        metavar="TEXT",
        type=prose,
        help="Prompts to make videos from during and after training, several joined by --validation_prompt_separator. "
        "Without it nothing is validated.",
    )
    group.add_argument(
        "--validation_images",
        metavar="PATHS",
        help="Image-to-video: first frames, one path or http(s) URL per prompt, joined by the same separator.",
    )
    group.add_argument(
        "--validation_prompt_separator",
        metavar="TEXT",
        default=":::",
        help="What stands between two prompts or two images; change it when a prompt contains it. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--num_validation_videos",
        metavar="N",
        type=positive_int,
        default=1,
        help="Videos per prompt; more show how much the seed matters, each costs a full sampling. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--validation_steps",
        metavar="N",
        type=positive_int,
        help="Validate every N optimizer steps. (default: only once, when training ends)",
    )
    group.add_argument(
        "--validation_epochs",
        metavar="N",
        type=positive_int,
        help="Validate every N epochs; handy when the dataset is small. (default: only once, when training ends)",
    )
    group.add_argument(
        "--validate_first",
        action=argparse.BooleanOptionalAction,
        help="Validate once before the first step: what would fail after hours fails now, and the videos of the "
        "untrained model stand beside all later ones. --no-validate_first saves the time. (default: on whenever "
        "anything is validated)",
    )
    add_guidance_flags(group, " in validation")
    group.add_argument(
        "--enable_model_cpu_offload",
        action="store_true",
        help="In validation keep each network on the CPU except while it works: slower, but needs less GPU memory. "
        "(default: off)",
    )


def add_guidance_flags(group: argparse._ArgumentGroup, where: str = "") -> None:
    """How a video is sampled, in validation and by generate.py; the same defaults make the same video."""
    group.add_argument(
        "--num_inference_steps",
        metavar="N",
        type=denoising_steps,
        default=50,
        help=f"Denoising steps{where}; fewer are faster but coarser. (default: %(default)s)",
    )
    group.add_argument(
        "--guidance_scale",
        metavar="X",
        type=non_negative_float,
        default=6.0,
        help=f"Strength of classifier-free guidance{where}; higher follows the prompt more closely, 1 and below "
        "switch it off. (default: %(default)s)",
    )
    group.add_argument(
        "--use_dynamic_cfg",
        action="store_true",
        help="Let the guidance grow over the denoising steps instead of keeping it constant. (default: off)",
    )


def add_validation_set_flags(group: argparse._ArgumentGroup) -> None:
    """The clips whose loss shows overfitting."""
    group.add_argument(
        "--validation_dataset_file",
        metavar="FILE",
        type=_table,
        help="Table of clips held out from training, as --dataset_file takes it; their loss at nine fixed noise "
        "levels is logged at each validation: when it rises while the training loss falls, the model overfits. Paths "
        "in it always start from the table's own folder, whatever --data_root is. Columns, --id_token, sizes and "
        "frames are those of the training clips, with --load_tensors as these were prepared; the clips are encoded "
        "when training starts. (default: none)",
    )


def _table(text: str) -> str:
    """A table of clips that exists; argparse.ArgumentTypeError otherwise."""
    file = path(text)
    if not os.path.isfile(file):
        raise argparse.ArgumentTypeError(f"no file '{file}'; give the path of a table of clips")
    if os.path.splitext(file)[1].lower() not in TABLE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"'{file}' is no table; it must be one of {', '.join(TABLE_SUFFIXES)}")
    return file
