"""What the flags of generate.py settle: prompts, the results of training, and which video goes into which file.

Each check raises `UserError` with one line that names the flag and what to do; none needs a model.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import slug
from common.run_folder import LORA_FILE, TRANSFORMER_FOLDER, list_checkpoints
from flags.checks import check_frame_count, check_size, check_writable, find_lora, is_hub_id


DEFAULT_FOLDER = "generated"
DEFAULT_SEED = 42
MOST_SEEDS = 2**64  # of torch's generators
BASE, COMPARED, SHEET = "-base.mp4", "-compare.mp4", "-compare.png"  # what --compare writes beside each video


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


def find_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts, from the command line or a file; there are some, and none is empty."""
    if args.prompts_file is None:
        prompts = [prompt.strip() for prompt in args.prompt]
        if "" in prompts:
            raise UserError(f"--prompt: prompt {prompts.index('') + 1} of {len(prompts)} is empty")
        return prompts
    if args.prompt:
        raise UserError("--prompts_file: there is a --prompt already; leave one of them out")
    from data.tables import read_lines  # brings NumPy along

    try:
        prompts = [line for line in read_lines(Path(args.prompts_file)) if line]
    except UserError as error:
        raise UserError(f"--prompts_file: {error}") from error
    if not prompts:
        raise UserError(f"--prompts_file: '{args.prompts_file}' is empty; write a prompt on each line")
    return prompts


def check_video_sizes(args: argparse.Namespace) -> None:
    """What is said of the size is what the VAE takes."""
    for flag, size in (("--height", args.height), ("--width", args.width)):
        if size is not None:
            check_size(flag, size)
    if args.num_frames is not None:
        check_frame_count("--num_frames", args.num_frames)


def check_sampling(args: argparse.Namespace, given: set[str]) -> None:
    """Seeds and guidance go together. Fills in the seed."""
    args.seed = args.seed or [DEFAULT_SEED]
    if len(args.seed) > 1 and args.num_videos > 1:
        raise UserError("--num_videos: there are several in --seed already; give one seed, or leave --num_videos out")
    if len(set(args.seed)) < len(args.seed):
        raise UserError("--seed: a seed is given twice, which gives the same video; leave one out")
    if max(args.seed) + args.num_videos > MOST_SEEDS:
        raise UserError(f"--seed: goes beyond {MOST_SEEDS - 1}, the largest that there is; give a smaller one")
    if "negative_prompt" in given and args.guidance_scale <= 1:
        raise UserError("--negative_prompt: no effect without guidance; raise --guidance_scale above 1")


def check_sampling_memory(args: argparse.Namespace) -> None:
    """The ways of saving memory go together."""
    if args.enable_sequential_cpu_offload and args.enable_model_cpu_offload:
        raise UserError("--enable_sequential_cpu_offload: goes further than --enable_model_cpu_offload; give one")
    if args.enable_sequential_cpu_offload and args.quantize_base != "none":
        raise UserError(
            "--enable_sequential_cpu_offload: cannot move quantized layers; leave out --quantize_base, or give "
            "--enable_model_cpu_offload"
        )


def find_loras(args: argparse.Namespace) -> list[tuple[str, float]]:
    """The file or hub id of each LoRA, with its scale."""
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


def find_transformer(reference: str) -> str:
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


def plan_videos(args: argparse.Namespace) -> list[PlannedVideo]:
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
    flag = "--output_file" if args.output_file else "--output_dir"
    there = [file for file in files if os.path.lexists(file)]
    if there and not args.overwrite:
        raise UserError(f"{flag}: {there[0]} is there already; give another place, or --overwrite")
    if folders := [file for file in there if file.is_dir()]:
        raise UserError(f"{flag}: {folders[0]} is a folder, which no video is written over; give another place")
    check_writable(str(videos[0].file.parent), flag)
    return videos


def _name(number: int, prompt: str, seed: int) -> str:
    return "-".join(filter(None, (f"{number:02d}", slug(prompt), f"seed-{seed}"))) + ".mp4"


HOST_SAVINGS = "give --dtype bf16 or --quantize_base int8, smaller --height and --width, or fewer --num_frames"


def sampling_memory_advice(args: argparse.Namespace) -> list[str]:
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
