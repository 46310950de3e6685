"""Checks of the flags of generate.py; none needs a model.

Each raises `UserError` with one line that names the flag and what to do.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from checks.data import check_frame_count, check_size
from checks.files import check_model, check_writable, find_images, find_lora, find_videos, is_hub_id
from cli.types import TABLE_SUFFIXES
from common.errors import UserError, one_line
from common.files import slug
from common.ranks import launch_rank, launch_size
from common.run_folder import LORA_FILE, TRANSFORMER_FOLDER, list_checkpoints
from flags.conversion import ConvertedFlags
from flags.generation import (
    BASE,
    COMPARED,
    DEFAULT_FOLDER,
    SHEET,
    ContentFlags,
    PlannedVideo,
    ResultFlags,
    SamplingFlags,
    SamplingMemoryFlags,
)
from flags.settings import GenerationSettings


MOST_SEEDS = 2**64  # of torch's generators


def settle_generation(settings: GenerationSettings, *, has_negative_prompt: bool) -> GenerationSettings:
    """Return the settings with prompts and results that exist, and the videos to sample."""
    content, result = _settle_content(settings.content), settings.result
    _check_sampling(settings.sampling)
    if has_negative_prompt and settings.guidance.guidance_scale <= 1:
        raise UserError("--negative_prompt: no effect without guidance; raise --guidance_scale above 1")
    _check_memory(settings.memory)
    check_model(settings.model.pretrained_model_name_or_path, "--pretrained_model_name_or_path")
    loras = find_loras(result)
    result = replace(result, transformer=result.transformer and find_transformer(result.transformer))
    if result.compare and not loras and not result.transformer:
        raise UserError("--compare: there is nothing to compare the base model with; add --lora or --transformer")
    settings = replace(settings, content=content, result=result, loras=loras)
    return replace(settings, videos=_plan_videos(settings))


def _settle_content(content: ContentFlags) -> ContentFlags:
    """Return the flags with the prompts of the command line or of the file, and their images."""
    if content.prompts_file is None:
        prompts = tuple(prompt.strip() for prompt in content.prompt)
        if "" in prompts:
            raise UserError(f"--prompt: prompt {prompts.index('') + 1} of {len(prompts)} is empty")
    else:
        if content.prompt:
            raise UserError("--prompts_file: not together with --prompt; omit one of them")
        prompts = _read_prompts(content.prompts_file)
    files = {name: find_images(f"--{name}", getattr(content, name)) for name in ("image", "last_image")}
    files |= {name: find_videos(f"--{name}", getattr(content, name)) for name in ("video", "control")}
    for name, found in files.items():
        if found and len(found) != len(prompts):
            raise UserError(f"--{name}: {len(found)} for {len(prompts)} prompts; pass one for each prompt")
    if content.compute_control and not files["control"]:
        raise UserError("--compute_control: there is no clip to compute a control from; add --control")
    return replace(content, prompt=prompts, **files)


def _read_prompts(file: str) -> tuple[str, ...]:
    try:
        prompts = _read_lines_or_captions(Path(file))
    except UserError as error:
        raise UserError(f"--prompts_file: {error}") from error
    if not prompts:
        raise UserError(f"--prompts_file: '{file}' is empty; write a prompt on each line")
    return prompts


def _read_lines_or_captions(place: Path) -> tuple[str, ...]:
    """Return the lines of a text file; of a folder of clips or a table, the captions, each once."""
    from common.remote import default_cache_folder
    from common.text_files import read_lines
    from data.sources import DataSource, read_clips
    from data.tables import read_table

    if place.is_dir():
        clips, _ = read_clips(DataSource(place), default_cache_folder() / "media")
        return tuple(dict.fromkeys(clip.caption for clip in clips))
    if place.suffix.lower() not in TABLE_SUFFIXES:
        return tuple(line for line in read_lines(place) if line)
    table = read_table(place, DataSource(None))
    column = next((name for name in ("caption", "text") if name in table.names), None)
    if column is None:
        raise UserError(f"{place} has no column caption or text, but {', '.join(map(one_line, table.names))}")
    captions = (str(row.values.get(column) or "").strip() for row in table.rows)
    return tuple(dict.fromkeys(filter(None, captions)))


def _check_sampling(sampling: SamplingFlags) -> None:
    for flag, size in (("--height", sampling.height), ("--width", sampling.width)):
        if size is not None:
            check_size(flag, size)
    if sampling.num_frames is not None:
        check_frame_count("--num_frames", sampling.num_frames)
    seeds = sampling.seed
    if len(seeds) > 1 and sampling.num_videos > 1:
        raise UserError("--num_videos: there are several in --seed already; pass one seed, or omit --num_videos")
    if len(set(seeds)) < len(seeds):
        raise UserError("--seed: a seed is given twice, which samples the same video twice; omit one")
    if max(seeds) + sampling.num_videos > MOST_SEEDS:
        raise UserError(f"--seed: goes beyond the largest, {MOST_SEEDS - 1}; pass a smaller one")


def _check_memory(memory: SamplingMemoryFlags) -> None:
    flag = "--enable_sequential_cpu_offload"
    if memory.enable_sequential_cpu_offload and memory.enable_model_cpu_offload:
        raise UserError(f"{flag}: includes --enable_model_cpu_offload; omit one of them")
    if memory.enable_sequential_cpu_offload and memory.quantize_base != "none":
        raise UserError(f"{flag}: not with --quantize_base; omit it, or use --enable_model_cpu_offload")


def find_loras(result: ResultFlags | ConvertedFlags) -> tuple[tuple[str, float], ...]:
    """Return the file or hub id of each LoRA, with its scale."""
    if result.lora_scale and not result.lora:
        raise UserError("--lora_scale: there is no --lora; add it or omit the scale")
    scales = result.lora_scale or [1.0] * len(result.lora)
    if len(scales) != len(result.lora):
        raise UserError(f"--lora_scale: {len(scales)} for {len(result.lora)} in --lora; pass one for each")
    for reference in result.lora:
        if os.path.isdir(reference) and not os.path.isfile(os.path.join(reference, LORA_FILE)):
            raise UserError(f"--lora: no {LORA_FILE} in '{reference}'; {_advice(Path(reference), '--transformer')}")
    files = [one if is_hub_id(one) else find_lora("--lora", one) for one in result.lora]
    return tuple(zip(files, scales, strict=True))


def find_transformer(reference: str) -> str:
    """Return the folder that contains transformer/, which may be passed itself; a hub id as it is."""
    folder = Path(reference)
    if folder.name == TRANSFORMER_FOLDER and (folder / "config.json").is_file():
        return str(folder.parent)
    if (folder / TRANSFORMER_FOLDER / "config.json").is_file() or is_hub_id(reference):
        return reference
    if not folder.is_dir():
        raise UserError(f"--transformer: no folder '{reference}'; pass the output folder of a run, or a hub id")
    raise UserError(f"--transformer: no {TRANSFORMER_FOLDER}/ in '{reference}'; {_advice(folder, '--lora')}")


def _advice(folder: Path, other: str) -> str:
    """Return what to pass instead of a folder without the wanted result; `other` is the other result's flag."""
    if (folder / (LORA_FILE if other == "--lora" else TRANSFORMER_FOLDER)).exists():
        return f"pass it as {other}"
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        return f"the run has not ended; pass its checkpoint '{checkpoints[-1][1]}'"
    return "pass the output folder of a run, or its checkpoint-N"


def _plan_videos(settings: GenerationSettings) -> tuple[PlannedVideo, ...]:
    """Return this process's share of each prompt with each seed, and its file, which can be written.

    Without --overwrite, none of these files exists.
    """
    prompts, seeds, output = settings.content.prompt, settings.sampling.seed, settings.output
    if settings.sampling.num_videos > 1:
        seeds = tuple(seeds[0] + number for number in range(settings.sampling.num_videos))
    videos = [
        PlannedVideo(number, prompt, seed, Path(output.output_dir or DEFAULT_FOLDER, _name(number, prompt, seed)))
        for (number, prompt), seed in product(enumerate(prompts), seeds)
    ]
    if output.output_file:
        if output.output_dir:
            raise UserError("--output_file: not together with --output_dir; omit one of them")
        if len(videos) > 1:
            raise UserError(f"--output_file: there are {len(videos)} videos; use --output_dir")
        videos = [replace(videos[0], file=Path(output.output_file))]
        if videos[0].file.suffix.lower() != ".mp4":
            raise UserError(f"--output_file: '{output.output_file}' must end in .mp4, the format that is written")
    if launch_size() > len(videos):
        raise UserError(f"{launch_size()} processes were launched for {len(videos)} videos; launch at most as many")
    videos = videos[launch_rank() :: launch_size()]
    files = [video.file for video in videos]
    if settings.result.compare:
        files += [video.beside(ending) for video in videos for ending in (BASE, COMPARED, SHEET)]
    flag = "--output_file" if output.output_file else "--output_dir"
    there = [file for file in files if os.path.lexists(file)]
    if output.as_dataset:
        return _plan_dataset(settings, videos)
    if there and not output.overwrite:
        raise UserError(f"{flag}: {there[0]} already exists; choose another place, or add --overwrite")
    if folders := [file for file in there if file.is_dir()]:
        raise UserError(f"{flag}: {folders[0]} is a folder, which a video cannot overwrite; choose another place")
    check_writable(str(videos[0].file.parent), flag)
    return tuple(videos)


def _plan_dataset(settings: GenerationSettings, videos: Sequence[PlannedVideo]) -> tuple[PlannedVideo, ...]:
    """Return the videos of a data set that are still to be sampled."""
    for is_set, flag, reason in (
        (settings.output.output_file, "--output_file", "a data set is a folder"),
        (settings.output.overwrite, "--overwrite", "existing videos are kept"),
        (settings.result.compare, "--compare", "the pairs would become clips"),
    ):
        if is_set:
            raise UserError(f"--as_dataset: not with {flag}, because {reason}; omit one of them")
    check_writable(str(videos[0].file.parent), "--output_dir")
    return tuple(video for video in videos if not video.file.exists())


def _name(number: int, prompt: str, seed: int) -> str:
    return "-".join(filter(None, (f"{number:02d}", slug(prompt), f"seed-{seed}"))) + ".mp4"


HOST_SAVINGS = "use --dtype bf16 or --quantize_base int8, smaller --height and --width, or fewer --num_frames"


def sampling_memory_advice(memory: SamplingMemoryFlags) -> list[str]:
    """Return what lowers the GPU memory of sampling, a line each, the least costly first."""
    is_sequential = memory.enable_sequential_cpu_offload
    savings = [
        (not memory.enable_tiling, "--enable_tiling"),
        (not memory.enable_model_cpu_offload and not is_sequential, "--enable_model_cpu_offload"),
        (memory.dtype == "fp32", "--dtype bf16"),
        (not memory.text_encoder_8bit, "--text_encoder_8bit (while prompts are embedded)"),
        (memory.quantize_base == "none" and not is_sequential, "--quantize_base int8"),
        (not is_sequential, "--enable_sequential_cpu_offload without --quantize_base (very slow)"),
        (True, "smaller --height and --width, or fewer --num_frames"),
    ]
    return [advice for is_open, advice in savings if is_open]
