"""Read the command line of every script, and check it as far as no model is needed.

Only the standard library is imported, so `--help` and every mistake in the flags show within a fraction of a second,
before anything heavy is loaded. The flags themselves are the fields of the dataclasses in `flags/`.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from checks.captions import check_captioning, settle_prompt
from checks.data import check_prepared_flags, check_sources, drop_long_buckets, settle_clips
from checks.deepspeed import check_zero
from checks.files import check_files, check_model, find_images
from checks.fsdp import check_fsdp
from checks.generation import (
    check_sampling,
    check_sampling_memory,
    find_loras,
    find_transformer,
    plan_videos,
    settle_prompts,
)
from checks.memory import check_memory, check_optimizer, settle_memory
from checks.preparation import settle_preparation
from checks.speed import check_speed, settle_context_parallel
from checks.training import (
    check_details,
    check_no_earlier_run,
    check_tracker,
    settle_files,
    settle_validation,
    training_warnings,
)
from common.errors import UserError
from common.ranks import launch_rank
from flags.schema import FlagParser
from flags.settings import (
    CaptioningSettings,
    FirstFrameSettings,
    GenerationSettings,
    PreparationSettings,
    TrainingSettings,
)


TASKS = ("text-to-video", "image-to-video")
METHODS = ("lora", "sft")
DATA_FLAGS = ("data_root", "dataset_file", "dataset_name", "dataset_mix")  # one of them names the data
_LORA_ONLY = ("lora_target_modules", "use_rslora", "use_dora", "lora_dropout", "lora_weights")
_LORA_ONLY += ("quantize_base", "stream_blocks")
_SFT_ONLY = ("save_pipeline", "weights_dtype")


def parse_args(argv: Sequence[str] | None = None, *, task: str, method: str) -> TrainingSettings:
    """Read and check the flags of a training script.

    Args:
        argv: the flags; those of the running process when None.
        task: "text-to-video" or "image-to-video".
        method: "lora" or "sft".

    Returns:
        The settings, every flag checked as far as this is possible without loading anything.

    Raises:
        SystemExit: code 2 after one line on stderr when a flag is wrong; code 0 after `--help`.
        ValueError: the caller passed an unknown task or method.
    """
    if task not in TASKS or method not in METHODS:
        raise ValueError(f"task must be one of {TASKS} and method one of {METHODS}, not {task!r} and {method!r}")
    parser = training_parser(task, method)
    groups, given = parser.read(argv)
    try:
        settings = _check_training(TrainingSettings(task, method, given, **groups))
    except UserError as error:
        parser.error(str(error))
    clips, warnings = drop_long_buckets(settings.clips)
    _warn([*training_warnings(settings), *warnings])
    return replace(settings, clips=clips)


def _check_training(settings: TrainingSettings) -> TrainingSettings:
    settings = settle_validation(replace(settings, clips=settle_clips(settings.clips, settings.given)))
    check_sources(settings.sources)
    check_optimizer(settings)
    check_memory(settings)
    settings = settle_memory(settings)
    check_speed(settings)
    settings = settle_context_parallel(settings)
    check_zero(settings)
    check_fsdp(settings)
    check_details(settings)
    check_tracker(settings.tracking.report_to)
    check_files(settings.model.pretrained_model_name_or_path, settings.sources, settings.training.output_dir)
    settings = settle_files(settings)
    check_prepared_flags(settings)
    if not settings.training.dry_run:
        check_no_earlier_run(settings)
    return settings


def training_parser(task: str, method: str) -> FlagParser:
    """Return the parser of a training script."""
    what = {"lora": "Train a LoRA for", "sft": "Fine-tune all weights of"}[method]
    is_lora = method == "lora"
    return FlagParser(
        TrainingSettings,
        required=(("pretrained_model_name_or_path",), DATA_FLAGS),
        omit=_SFT_ONLY if is_lora else _LORA_ONLY,
        defaults={"output_dir": f"cogvideox-{method}", "tracker_name": f"cogvideox-{method}"},
        # Both are accepted with a warning, because launchers of both methods share them.
        titles={} if is_lora else {"lora": "lora (no effect on full fine-tuning)"},
        usage="%(prog)s --pretrained_model_name_or_path MODEL --data_root FOLDER [flags]",
        description=f"{what} a CogVideoX {task} model on your own clips.",
    )


def flag_names(task: str, method: str) -> list[str]:
    """Return the names of the flags of a training script, in the order of `--help`."""
    return [action.dest for action in training_parser(task, method)._actions if action.dest != "help"]


def parse_prepare_args(argv: Sequence[str] | None = None) -> PreparationSettings:
    """Read and check the flags of prepare_dataset.py.

    Args:
        argv: the flags; those of the running process when None.

    Raises:
        SystemExit: code 2 after one line on stderr when a flag is wrong; code 0 after `--help`.
    """
    parser = FlagParser(
        PreparationSettings,
        required=(DATA_FLAGS, ("output_dir",)),
        defaults={"caption_column": "caption"},
        usage="%(prog)s --data_root FOLDER --output_dir FOLDER [flags]",
        description="Turn clips and captions into latents and text embeddings on disk, for training with "
        "--load_tensors.",
    )
    groups, given = parser.read(argv)
    settings = PreparationSettings(**groups)
    try:
        clips = settle_clips(settings.clips, given)
        check_sources(settings.sources)
        preparation = settle_preparation(
            settings.preparation, given, text_encoder_8bit=settings.encoding.text_encoder_8bit
        )
        check_files(settings.model.model_id, settings.sources, preparation.output_dir, model_flag="--model_id")
    except UserError as error:
        parser.error(str(error))
    clips, warnings = drop_long_buckets(clips)
    _warn(warnings)
    return replace(settings, clips=clips, preparation=preparation)


def parse_caption_args(argv: Sequence[str] | None = None) -> CaptioningSettings:
    """Read and check the flags of caption_dataset.py. Those on data mean what they mean to prepare_dataset.py.

    There is no --id_token: preparation and training put it before captions.

    Args:
        argv: the flags; those of the running process when None.

    Raises:
        SystemExit: code 2 after one line on stderr when a flag is wrong; code 0 after `--help`.
        UserError: the file of the prompt cannot be used.
    """
    parser = FlagParser(
        CaptioningSettings,
        required=(("data_root", "dataset_file", "dataset_name"), ("endpoint", "model")),
        omit=("id_token", "dataset_mix"),
        defaults={"caption_column": "caption"},
        has_config=False,
        usage="%(prog)s --data_root FOLDER (--endpoint URL | --model NAME) [flags]",
        description="Write captions for clips that have none, with a vision-language model: one behind an "
        "OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, Ollama, a hosted one), or one that transformers loads. "
        "Run again, it continues where it was stopped.",
    )
    groups, given = parser.read(argv)
    settings = CaptioningSettings(**groups)
    try:
        check_captioning(settings.sources, settings.model, settings.captions, given)
    except UserError as error:
        parser.error(str(error))
    if settings.model.endpoint is not None:
        settings = replace(settings, model=replace(settings.model, endpoint=settings.model.endpoint.rstrip("/")))
    return replace(settings, captions=settle_prompt(settings.captions))


def parse_first_frame_args(argv: Sequence[str] | None = None) -> FirstFrameSettings:
    """Read and check the flags of make_first_frames.py.

    Args:
        argv: the flags; those of the running process when None.

    Raises:
        SystemExit: code 2 after one line on stderr when a flag is wrong; code 0 after `--help`.
    """
    parser = FlagParser(
        FirstFrameSettings,
        required=(("data_root", "dataset_file", "dataset_name"), ("output_dir",)),
        omit=("id_token", "dataset_mix", "skip_frames_end"),
        defaults={"caption_column": "caption"},
        has_config=False,
        usage="%(prog)s --data_root FOLDER --output_dir FOLDER [flags]",
        description="Write the first frame of every clip as a PNG, and a table of both for --dataset_file.",
    )
    groups, _ = parser.read(argv)
    settings = FirstFrameSettings(**groups)
    try:
        check_sources(settings.sources)
    except UserError as error:
        parser.error(str(error))
    return settings


def parse_generate_args(argv: Sequence[str] | None = None) -> GenerationSettings:
    """Read and check the flags of generate.py.

    Args:
        argv: the flags; those of the running process when None.

    Raises:
        SystemExit: code 2 after one line on stderr when a flag is wrong; code 0 after `--help`.
    """
    parser = generation_parser()
    groups, given = parser.read(argv)
    try:
        return _check_generation(GenerationSettings(**groups), has_negative_prompt="negative_prompt" in given)
    except UserError as error:
        parser.error(str(error))


def generation_parser() -> FlagParser:
    """Return the parser of generate.py."""
    return FlagParser(
        GenerationSettings,
        required=(("pretrained_model_name_or_path",), ("prompt", "prompts_file")),
        has_config=False,
        usage="%(prog)s --pretrained_model_name_or_path MODEL --prompt TEXT [flags]",
        description="Sample videos from a CogVideoX model: as it is, with LoRAs, or with all its weights tuned.",
    )


def _check_generation(settings: GenerationSettings, *, has_negative_prompt: bool) -> GenerationSettings:
    content, result = settle_prompts(settings.content), settings.result
    content = replace(content, image=find_images("--image", content.image))
    if content.image and len(content.image) != len(content.prompt):
        raise UserError(f"--image: {len(content.image)} for {len(content.prompt)} prompts; give one for each prompt")
    check_sampling(settings.sampling)
    if has_negative_prompt and settings.guidance.guidance_scale <= 1:
        raise UserError("--negative_prompt: no effect without guidance; raise --guidance_scale above 1")
    check_sampling_memory(settings.memory)
    check_model(settings.model.pretrained_model_name_or_path, "--pretrained_model_name_or_path")
    loras = find_loras(result)
    result = replace(result, transformer=result.transformer and find_transformer(result.transformer))
    if result.compare and not loras and not result.transformer:
        raise UserError("--compare: there is nothing to compare the base model with; add --lora or --transformer")
    videos = plan_videos(content.prompt, settings.sampling, settings.output, compare=result.compare)
    return replace(settings, content=content, result=result, loras=loras, videos=videos)


def _warn(lines: list[str]) -> None:
    """Write each line to stderr, once for all processes of a launch."""
    if launch_rank() == 0:
        for line in lines:
            print(f"warning: {line}", file=sys.stderr, flush=True)
