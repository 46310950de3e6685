"""The flags of generate.py, checked as far as no model is needed; nothing heavy is imported."""

import argparse
from collections.abc import Sequence

from common.errors import UserError
from common.run_folder import LORA_FILE
from flags.checks import check_model, find_images
from flags.data import add_download_flags
from flags.generation_checks import (
    BASE,
    COMPARED,
    DEFAULT_FOLDER,
    DEFAULT_SEED,
    SHEET,
    check_sampling,
    check_sampling_memory,
    check_video_sizes,
    find_loras,
    find_prompts,
    find_transformer,
    plan_videos,
)
from flags.memory import QUANTIZATIONS, add_text_encoder_flag
from flags.types import FlagParser, choice, finite_float, non_negative_int, path, positive_int, prose
from flags.validation import add_guidance_flags


def parse_generate_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags of generate.py.

    Besides one attribute for each flag, the result has `prompts` (list of str), `loras` (list of (file or hub id,
    scale)) and `videos` (list of `PlannedVideo`). On return, `image` is a list of str and `transformer` a folder with
    transformer/ in it, a hub id or None.

    Args:
        argv: the flags; those of the running process when None.

    Raises:
        SystemExit: code 2 after one line on stderr when a flag is wrong; code 0 after `--help`.
    """
    parser = _parser()
    args, given = parser.read(argv)
    try:
        args.prompts = find_prompts(args)
        args.image = find_images("--image", args.image)
        if args.image and len(args.image) != len(args.prompts):
            raise UserError(f"--image: {len(args.image)} for {len(args.prompts)} prompts; give one for each prompt")
        check_video_sizes(args)
        check_sampling(args, given)
        check_sampling_memory(args)
        check_model(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path")
        args.loras = find_loras(args)
        args.transformer = args.transformer and find_transformer(args.transformer)
        if args.compare and not args.loras and not args.transformer:
            raise UserError("--compare: there is nothing to compare the base model with; add --lora or --transformer")
        args.videos = plan_videos(args)
    except UserError as error:
        parser.error(str(error))
    return args


def _parser() -> FlagParser:
    parser = FlagParser(
        usage="%(prog)s --pretrained_model_name_or_path MODEL --prompt TEXT [flags]",
        description="Sample videos from a CogVideoX model: as it is, with LoRAs, or with all its weights tuned.",
        required=(("pretrained_model_name_or_path",), ("prompt", "prompts_file")),
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path",
        "--model_path",
        metavar="MODEL",
        type=path,
        help="Required. Base model: a hub id such as THUDM/CogVideoX-5b, or a local folder in the diffusers layout, "
        "pipeline/ of --save_pipeline too. Its config says whether it makes videos from text or from images.",
    )
    add_download_flags(model)
    _add_result_flags(parser.add_argument_group("result of training"))
    _add_content_flags(parser.add_argument_group("content"))
    _add_sampling_flags(parser.add_argument_group("sampling"))
    _add_memory_flags(parser.add_argument_group("precision and memory"))
    _add_output_flags(parser.add_argument_group("output"))
    return parser


def _add_result_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora",
        metavar="PATH",
        nargs="+",
        type=path,
        default=[],
        help=f"LoRAs: .safetensors files, folders with {LORA_FILE} (of a run, or its checkpoint-N) or hub ids. Each "
        "is applied at the strength it was trained with. (default: none)",
    )
    group.add_argument(
        "--lora_scale",
        metavar="X",
        nargs="+",
        type=finite_float,
        help="A factor on the strength of each --lora: 0.5 is half of it, 0 is none. (default: 1)",
    )
    group.add_argument(
        "--transformer",
        metavar="PATH",
        type=path,
        help="All weights, tuned: a folder with transformer/ (of a run, or its checkpoint-N) or a hub id; it takes "
        "the place of the base model's. (default: the base model's)",
    )
    group.add_argument(
        "--ignore_learned_positional_embeddings",
        action="store_true",
        help="Drop the learned positions of CogVideoX-5b-I2V. Give it with a LoRA that was trained so. (default: off)",
    )
    group.add_argument(
        "--compare",
        action="store_true",
        help=f"Also sample the base model from the same noise, as *{BASE}, and show both: side by side in *{COMPARED} "
        f"(the base model is on the left), some frames in *{SHEET}. (default: off)",
    )


def _add_content_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        type=prose,
        help="This or --prompts_file is required. One or several prompts.",
    )
    group.add_argument("--prompts_file", metavar="FILE", type=path, help="Text file with a prompt on each line.")
    group.add_argument(
        "--negative_prompt",
        metavar="TEXT",
        type=prose,
        default="",
        help="What guidance leads away from. (default: the empty prompt, as in training)",
    )
    group.add_argument(
        "--image",
        metavar="PATH",
        nargs="+",
        default=[],
        help="Image-to-video: first frames, a path or http(s) URL for each prompt; they are cut to the video's "
        "aspect.",
    )


def _add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seed",
        metavar="N",
        nargs="+",
        type=non_negative_int,
        help=f"Seeds of the noise; each prompt is sampled with each of them. (default: {DEFAULT_SEED})",
    )
    group.add_argument(
        "--num_videos",
        metavar="N",
        type=positive_int,
        default=1,
        help="Videos per prompt: with the seed, the seed + 1 and so on. (default: %(default)s)",
    )
    group.add_argument("--height", metavar="H", type=positive_int, help="In pixels. (default: the model's own)")
    group.add_argument("--width", metavar="W", type=positive_int, help="In pixels. (default: the model's own)")
    group.add_argument("--num_frames", metavar="N", type=positive_int, help="4k or 4k+1. (default: the model's own)")
    add_guidance_flags(group)


def _add_memory_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dtype",
        **choice(("auto", "fp32", "fp16", "bf16")),
        default="auto",
        help="What the networks compute in. auto: what the model's own files are stored in, and fp32 without a GPU. "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--enable_model_cpu_offload",
        action="store_true",
        help="Keep each network on the CPU except while it works. (default: off)",
    )
    group.add_argument(
        "--enable_sequential_cpu_offload",
        action="store_true",
        help="Keep each layer on the CPU except while it works: least memory, very slow. (default: off)",
    )
    group.add_argument(
        "--quantize_base",
        **choice(QUANTIZATIONS),
        default="none",
        help="Store the transformer's linear layers in 8 bits (int8, fp8: by torchao) or 4 (nf4: by bitsandbytes, "
        "needs a GPU); LoRAs stay as they are. (default: %(default)s)",
    )
    add_text_encoder_flag(group)
    group.add_argument(
        "--enable_tiling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Let the VAE work on overlapping tiles of a frame, as validation does; whole, frames of 480x720 take "
        "18 GB. (default: on)",
    )


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output_dir",
        metavar="FOLDER",
        type=path,
        help="Where the videos go, named by number and beginning of their prompt and by their seed. "
        f"(default: {DEFAULT_FOLDER})",
    )
    group.add_argument("--output_file", metavar="FILE", type=path, help="In its place, the name of the only video.")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="Write over files that are there. (default: they are an error, before anything is sampled)",
    )
    group.add_argument(
        "--fps",
        metavar="N",
        type=positive_int,
        help="Frame rate of the written files. (default: the model's own, 8, or 16 for CogVideoX 1.5)",
    )
