"""The flags of generate.py, checked as far as no model is needed; nothing heavy is imported."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_flags import add_download_flags
from errors import UserError
from files import slug
from flag_checks import (
    check_frame_count,
    check_model,
    check_size,
    check_writable,
    find_images,
    find_lora,
    is_hub_id,
)
from flag_types import FlagParser, choice, finite_float, non_negative_float, non_negative_int, path, positive_int
from memory_flags import QUANTIZATIONS, add_text_encoder_flag
from run_folder import LORA_FILE, TRANSFORMER_FOLDER, list_checkpoints


DEFAULT_FOLDER = "generated"
DEFAULT_SEED = 42


@dataclass(frozen=True)
class PlannedVideo:
    """A video to be sampled."""

    number: int  # of its prompt
    prompt: str
    seed: int
    file: Path  # where it goes

    def beside(self, ending: str) -> Path:
        """The file of that ending which belongs to the video, such as "-base.mp4"."""
        return self.file.with_name(self.file.stem + ending)


BASE, COMPARED, SHEET = "-base.mp4", "-compare.mp4", "-compare.png"  # what --compare writes beside each video


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
        args.prompts = _find_prompts(args)
        args.image = find_images("--image", args.image)
        if args.image and len(args.image) != len(args.prompts):
            raise UserError(f"--image: {len(args.image)} for {len(args.prompts)} prompts; give one for each prompt")
        _check_size(args)
        _check_sampling(args, given)
        _check_memory(args)
        check_model(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path")
        args.loras = _find_loras(args)
        args.transformer = args.transformer and _find_transformer(args.transformer)
        if args.compare and not args.loras and not args.transformer:
            raise UserError("--compare: there is nothing to compare the base model with; add --lora or --transformer")
        args.videos = _plan_videos(args)
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
        "--prompt", metavar="TEXT", nargs="+", help="This or --prompts_file is required. One or several prompts."
    )
    group.add_argument("--prompts_file", metavar="FILE", type=path, help="Text file with a prompt on each line.")
    group.add_argument(
        "--negative_prompt",
        metavar="TEXT",
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
    group.add_argument(
        "--num_inference_steps",
        metavar="N",
        type=positive_int,
        default=50,
        help="Denoising steps; fewer are faster but coarser. (default: %(default)s)",
    )
    group.add_argument(
        "--guidance_scale",
        metavar="X",
        type=non_negative_float,
        default=6.0,
        help="Strength of classifier-free guidance; higher follows the prompt more closely, 1 and below switch it "
        "off. (default: %(default)s)",
    )
    group.add_argument(
        "--use_dynamic_cfg",
        action="store_true",
        help="Let the guidance grow over the denoising steps instead of keeping it constant. (default: off)",
    )


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


def _find_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts_file is None:
        prompts = [prompt.strip() for prompt in args.prompt]
        if "" in prompts:
            raise UserError(f"--prompt: prompt {prompts.index('') + 1} of {len(prompts)} is empty")
        return prompts
    if args.prompt:
        raise UserError("--prompts_file: there is a --prompt already; leave one of them out")
    from tables import read_lines  # brings NumPy along

    try:
        prompts = [line for line in read_lines(Path(args.prompts_file)) if line]
    except UserError as error:
        raise UserError(f"--prompts_file: {error}") from error
    if not prompts:
        raise UserError(f"--prompts_file: '{args.prompts_file}' is empty; write a prompt on each line")
    return prompts


def _check_size(args: argparse.Namespace) -> None:
    for flag, size in (("--height", args.height), ("--width", args.width)):
        if size is not None:
            check_size(flag, size)
    if args.num_frames is not None:
        check_frame_count("--num_frames", args.num_frames)


def _check_sampling(args: argparse.Namespace, given: set[str]) -> None:
    args.seed = args.seed or [DEFAULT_SEED]
    if len(args.seed) > 1 and args.num_videos > 1:
        raise UserError("--num_videos: there are several in --seed already; give one seed, or leave --num_videos out")
    if len(set(args.seed)) < len(args.seed):
        raise UserError("--seed: a seed is given twice, which gives the same video; leave one out")
    if "negative_prompt" in given and args.guidance_scale <= 1:
        raise UserError("--negative_prompt: no effect without guidance; raise --guidance_scale above 1")


def _check_memory(args: argparse.Namespace) -> None:
    if args.enable_sequential_cpu_offload and args.enable_model_cpu_offload:
        raise UserError("--enable_sequential_cpu_offload: goes further than --enable_model_cpu_offload; give one")
    if args.enable_sequential_cpu_offload and args.quantize_base != "none":
        raise UserError(
            "--enable_sequential_cpu_offload: cannot move quantized layers; leave out --quantize_base, or give "
            "--enable_model_cpu_offload"
        )


def _find_loras(args: argparse.Namespace) -> list[tuple[str, float]]:
    if args.lora_scale and not args.lora:
        raise UserError("--lora_scale: there is no --lora; add it or leave the scale out")
    scales = args.lora_scale or [1.0] * len(args.lora)
    if len(scales) != len(args.lora):
        raise UserError(f"--lora_scale: {len(scales)} for {len(args.lora)} in --lora; give one for each")
    for reference in args.lora:
        if os.path.isdir(reference) and not os.path.isfile(os.path.join(reference, LORA_FILE)):
            raise UserError(f"--lora: no {LORA_FILE} in '{reference}'; {_advice(Path(reference), '--transformer')}")
    files = [one if is_hub_id(one) else find_lora("--lora", one) for one in args.lora]
    return list(zip(files, scales, strict=True))


def _find_transformer(reference: str) -> str:
    """The folder that transformer/ is in, given by itself or by transformer/; a hub id as it is."""
    folder = Path(reference)
    if folder.name == TRANSFORMER_FOLDER and (folder / "config.json").is_file():
        return str(folder.parent)
    if (folder / TRANSFORMER_FOLDER / "config.json").is_file() or is_hub_id(reference):
        return reference
    if not folder.is_dir():
        raise UserError(f"--transformer: no folder '{reference}'; give the output folder of a run, or a hub id")
    raise UserError(f"--transformer: no {TRANSFORMER_FOLDER}/ in '{reference}'; {_advice(folder, '--lora')}")


def _advice(folder: Path, other: str) -> str:
    """What to give in the place of a folder without the result that was looked for; `other` is the other result's."""
    if (folder / (LORA_FILE if other == "--lora" else TRANSFORMER_FOLDER)).exists():
        return f"give it as {other}"
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        return f"the run has not ended; give its checkpoint '{checkpoints[-1][1]}'"
    return "give the output folder of a run, or its checkpoint-N"


def _plan_videos(args: argparse.Namespace) -> list[PlannedVideo]:
    """Each prompt with each seed; no file is there already, and those that are not can be written."""
    seeds = [args.seed[0] + number for number in range(args.num_videos)] if args.num_videos > 1 else args.seed
    if args.output_file:
        if args.output_dir:
            raise UserError("--output_file: there is an --output_dir already; leave one of them out")
        if len(args.prompts) * len(seeds) > 1:
            raise UserError(f"--output_file: there are {len(args.prompts) * len(seeds)} videos; give --output_dir")
        file = Path(args.output_file)
        if file.suffix.lower() != ".mp4":
            raise UserError(f"--output_file: '{file}' is no mp4, which is what is written; name it .mp4")
        videos = [PlannedVideo(0, args.prompts[0], seeds[0], file)]
    else:
        folder = Path(args.output_dir or DEFAULT_FOLDER)
        videos = [
            PlannedVideo(number, prompt, seed, folder / _name(number, prompt, seed))
            for number, prompt in enumerate(args.prompts)
            for seed in seeds
        ]
    files = [video.file for video in videos]
    if args.compare:
        files += [video.beside(ending) for video in videos for ending in (BASE, COMPARED, SHEET)]
    there = [file for file in files if os.path.lexists(file)]
    if there and not args.overwrite:
        flag = "--output_file" if args.output_file else "--output_dir"
        raise UserError(f"{flag}: {there[0]} is there already; give another place, or --overwrite")
    check_writable(str(videos[0].file.parent))
    return videos


def _name(number: int, prompt: str, seed: int) -> str:
    return "-".join(filter(None, (f"{number:02d}", slug(prompt), f"seed-{seed}"))) + ".mp4"


def describe_savings(args: argparse.Namespace) -> list[str]:
    """What makes sampling take less of the GPU's memory, for the user: a line each, the least costly first."""
    is_offloaded = args.enable_model_cpu_offload or args.enable_sequential_cpu_offload
    savings = [
        (not args.enable_tiling, "--enable_tiling"),
        (not is_offloaded, "--enable_model_cpu_offload"),
        (args.dtype == "fp32", "--dtype bf16"),
        (not args.text_encoder_8bit, "--text_encoder_8bit (where prompts are being embedded)"),
        (args.quantize_base == "none" and not args.enable_sequential_cpu_offload, "--quantize_base int8"),
        (
            not args.enable_sequential_cpu_offload,
            "--enable_sequential_cpu_offload without --quantize_base (very slow)",
        ),
        (True, "smaller --height and --width, or fewer --num_frames"),
    ]
    return [advice for is_open, advice in savings if is_open]
