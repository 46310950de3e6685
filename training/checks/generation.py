"""Checks of the flags of generate.py, which name prompts, results of training and files; none needs a model.

Each raises `UserError` with one line that names the flag and what to do.
"""

import os
from dataclasses import replace
from pathlib import Path

from checks.data import check_frame_count, check_size
from checks.files import check_writable, find_lora, is_hub_id
from common.errors import UserError
from common.files import slug
from common.run_folder import LORA_FILE, TRANSFORMER_FOLDER, list_checkpoints
from flags.generation import (
    BASE,
    COMPARED,
    DEFAULT_FOLDER,
    SHEET,
    ContentFlags,
    OutputFlags,
    PlannedVideo,
    ResultFlags,
    SamplingFlags,
    SamplingMemoryFlags,
)


MOST_SEEDS = 2**64  # of torch's generators


def settle_prompts(content: ContentFlags) -> ContentFlags:
    """Return the flags with the prompts of the command line or of the file; there are some, and none is empty."""
    if content.prompts_file is None:
        prompts = tuple(prompt.strip() for prompt in content.prompt)
        if "" in prompts:
            raise UserError(f"--prompt: prompt {prompts.index('') + 1} of {len(prompts)} is empty")
        return replace(content, prompt=prompts)
    if content.prompt:
        raise UserError("--prompts_file: there is a --prompt already; leave one of them out")
    from common.text_files import read_lines

    try:
        prompts = tuple(line for line in read_lines(Path(content.prompts_file)) if line)
    except UserError as error:
        raise UserError(f"--prompts_file: {error}") from error
    if not prompts:
        raise UserError(f"--prompts_file: '{content.prompts_file}' is empty; write a prompt on each line")
    return replace(content, prompt=prompts)


def check_sampling(sampling: SamplingFlags) -> None:
    """Check seeds and sizes."""
    for flag, size in (("--height", sampling.height), ("--width", sampling.width)):
        if size is not None:
            check_size(flag, size)
    if sampling.num_frames is not None:
        check_frame_count("--num_frames", sampling.num_frames)
    seeds, num_videos = sampling.seed, sampling.num_videos
    if len(seeds) > 1 and num_videos > 1:
        raise UserError("--num_videos: there are several in --seed already; give one seed, or leave --num_videos out")
    if len(set(seeds)) < len(seeds):
        raise UserError("--seed: a seed is given twice, which gives the same video; leave one out")
    if max(seeds) + num_videos > MOST_SEEDS:
        raise UserError(f"--seed: goes beyond {MOST_SEEDS - 1}, the largest that there is; give a smaller one")


def check_sampling_memory(memory: SamplingMemoryFlags) -> None:
    """Check that the memory savings go together."""
    if memory.enable_sequential_cpu_offload and memory.enable_model_cpu_offload:
        raise UserError("--enable_sequential_cpu_offload: goes further than --enable_model_cpu_offload; give one")
    if memory.enable_sequential_cpu_offload and memory.quantize_base != "none":
        raise UserError(
            "--enable_sequential_cpu_offload: cannot move quantized layers; leave out --quantize_base, or give "
            "--enable_model_cpu_offload"
        )


def find_loras(result: ResultFlags) -> tuple[tuple[str, float], ...]:
    """Return the file or hub id of each LoRA, with its scale."""
    if result.lora_scale and not result.lora:
        raise UserError("--lora_scale: there is no --lora; add it or leave the scale out")
    scales = result.lora_scale or [1.0] * len(result.lora)
    if len(scales) != len(result.lora):
        raise UserError(f"--lora_scale: {len(scales)} for {len(result.lora)} in --lora; give one for each")
    for reference in result.lora:
        if os.path.isdir(reference) and not os.path.isfile(os.path.join(reference, LORA_FILE)):
            raise UserError(f"--lora: no {LORA_FILE} in '{reference}'; {_advice(Path(reference), '--transformer')}")
    files = [one if is_hub_id(one) else find_lora("--lora", one) for one in result.lora]
    return tuple(zip(files, scales, strict=True))


def find_transformer(reference: str) -> str:
    """Return the folder that holds transformer/, which may be given itself; a hub id as it is."""
    folder = Path(reference)
    if folder.name == TRANSFORMER_FOLDER and (folder / "config.json").is_file():
        return str(folder.parent)
    if (folder / TRANSFORMER_FOLDER / "config.json").is_file() or is_hub_id(reference):
        return reference
    if not folder.is_dir():
        raise UserError(f"--transformer: no folder '{reference}'; give the output folder of a run, or a hub id")
    raise UserError(f"--transformer: no {TRANSFORMER_FOLDER}/ in '{reference}'; {_advice(folder, '--lora')}")


def _advice(folder: Path, other: str) -> str:
    """Return what to pass instead of a folder without the wanted result; `other` is the other result's flag."""
    if (folder / (LORA_FILE if other == "--lora" else TRANSFORMER_FOLDER)).exists():
        return f"give it as {other}"
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        return f"the run has not ended; give its checkpoint '{checkpoints[-1][1]}'"
    return "give the output folder of a run, or its checkpoint-N"


def plan_videos(
    prompts: tuple[str, ...], sampling: SamplingFlags, output: OutputFlags, *, compare: bool
) -> tuple[PlannedVideo, ...]:
    """Return each prompt with each seed, and the file it goes to; no file exists, and all can be written."""
    seeds = sampling.seed
    if sampling.num_videos > 1:
        seeds = tuple(seeds[0] + number for number in range(sampling.num_videos))
    if output.output_file:
        if output.output_dir:
            raise UserError("--output_file: there is an --output_dir already; leave one of them out")
        if len(prompts) * len(seeds) > 1:
            raise UserError(f"--output_file: there are {len(prompts) * len(seeds)} videos; give --output_dir")
        file = Path(output.output_file)
        if file.suffix.lower() != ".mp4":
            raise UserError(f"--output_file: '{file}' is no mp4, which is what is written; name it .mp4")
        videos = [PlannedVideo(0, prompts[0], seeds[0], file)]
    else:
        folder = Path(output.output_dir or DEFAULT_FOLDER)
        videos = [
            PlannedVideo(number, prompt, seed, folder / _name(number, prompt, seed))
            for number, prompt in enumerate(prompts)
            for seed in seeds
        ]
    files = [video.file for video in videos]
    if compare:
        files += [video.beside(ending) for video in videos for ending in (BASE, COMPARED, SHEET)]
    flag = "--output_file" if output.output_file else "--output_dir"
    there = [file for file in files if os.path.lexists(file)]
    if there and not output.overwrite:
        raise UserError(f"{flag}: {there[0]} is there already; give another place, or --overwrite")
    if folders := [file for file in there if file.is_dir()]:
        raise UserError(f"{flag}: {folders[0]} is a folder, which no video is written over; give another place")
    check_writable(str(videos[0].file.parent), flag)
    return tuple(videos)


def _name(number: int, prompt: str, seed: int) -> str:
    return "-".join(filter(None, (f"{number:02d}", slug(prompt), f"seed-{seed}"))) + ".mp4"


HOST_SAVINGS = "give --dtype bf16 or --quantize_base int8, smaller --height and --width, or fewer --num_frames"


def sampling_memory_advice(memory: SamplingMemoryFlags) -> list[str]:
    """Return what makes sampling take less GPU memory, for the user: a line each, the least costly first."""
    is_offloaded = memory.enable_model_cpu_offload or memory.enable_sequential_cpu_offload
    savings = [
        (not memory.enable_tiling, "--enable_tiling"),
        (not is_offloaded, "--enable_model_cpu_offload"),
        (memory.dtype == "fp32", "--dtype bf16"),
        (not memory.text_encoder_8bit, "--text_encoder_8bit (where prompts are being embedded)"),
        (memory.quantize_base == "none" and not memory.enable_sequential_cpu_offload, "--quantize_base int8"),
        (
            not memory.enable_sequential_cpu_offload,
            "--enable_sequential_cpu_offload without --quantize_base (very slow)",
        ),
        (True, "smaller --height and --width, or fewer --num_frames"),
    ]
    return [advice for is_open, advice in savings if is_open]
