"""Read the command line of every script, and check it as far as possible without a model.

Only the standard library is imported, so that `--help` and mistakes in the flags show within a fraction of a second.
The flags are the fields of the dataclasses in `flags/`.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from checks.captions import check_captioning, settle_prompt
from checks.comparison import settle_comparison
from checks.conversion import settle_conversion
from checks.data import (
    check_control,
    check_masks,
    check_prepared_flags,
    check_sources,
    drop_long_buckets,
    settle_clips,
)
from checks.deepspeed import check_zero
from checks.files import check_data_folder, check_files, check_on_disk, check_writable
from checks.footage import check_splitting
from checks.fsdp import check_fsdp
from checks.generation import settle_generation
from checks.memory import check_memory, check_optimizer, settle_memory
from checks.preparation import check_place, settle_preparation
from checks.scores import check_scoring
from checks.speed import check_speed, settle_context_parallel
from checks.training import (
    check_details,
    check_no_earlier_run,
    check_tracker,
    settle_batches,
    settle_files,
    settle_validation,
    training_warnings,
)
from cli.schema import FlagParser
from common.errors import UserError
from common.ranks import launch_rank
from flags.settings import (
    AppSettings,
    CaptioningSettings,
    ComparisonSettings,
    ConversionSettings,
    FirstFrameSettings,
    GenerationSettings,
    PreparationSettings,
    ScoringSettings,
    SplittingSettings,
    TrainingSettings,
)


TASKS = ("text-to-video", "image-to-video", "control-to-video")
METHODS = ("lora", "sft")
DATA_FLAGS = ("data_root", "dataset_file", "dataset_name", "dataset_mix")  # one of them names the data
_LORA_ONLY = ("lora_target_modules", "use_rslora", "use_dora", "lora_dropout", "lora_weights")
_LORA_ONLY += ("adapter", "lokr_factor", "quantize_base", "stream_blocks")
_CAPTION_FLAGS = ("caption_per_line", "shuffle_tags")  # no effect on scripts that do not read captions
_CONTROL_ONLY = ("control_column", "compute_control", "validation_controls")
_IMAGE_ONLY = ("image_column", "noised_image_dropout", "ignore_learned_positional_embeddings", "validation_images")
_IMAGE_ONLY += ("condition_frames",)
_SFT_ONLY = ("save_pipeline", "save_validation_weights", "weights_dtype")


def parse_args(argv: Sequence[str] | None = None, *, task: str, method: str) -> TrainingSettings:
    """Read and check the flags of a training script.

    Args:
        argv: the flags; those of the running process when None.
        task: one of TASKS.
        method: "lora" or "sft".

    Raises:
        SystemExit: code 2 after one line on stderr when a flag is wrong; code 0 after `--help`.
    """
    if task not in TASKS or method not in METHODS:
        raise ValueError(f"task must be one of {TASKS} and method one of {METHODS}, not {task!r} and {method!r}")
    parser = _training_parser(task, method)
    groups, given = parser.read(argv)
    with _reported(parser):
        settings = _check_training(TrainingSettings(task, method, given, **groups))
    clips, warnings = drop_long_buckets(settings.clips)
    _warn([*training_warnings(settings), *warnings])
    return replace(settings, clips=clips)


def _check_training(settings: TrainingSettings) -> TrainingSettings:
    settings = settle_validation(replace(settings, clips=settle_clips(settings.clips, settings.given)))
    check_sources(settings.sources)
    check_control(settings.control)
    check_masks(settings.masks, settings.control, settings.given)
    check_optimizer(settings)
    check_memory(settings)
    settings = settle_memory(settings)
    check_speed(settings)
    settings = settle_batches(settle_context_parallel(settings))
    check_zero(settings)
    check_fsdp(settings)
    check_details(settings)
    check_tracker(settings.tracking.report_to)
    check_files(settings.model.pretrained_model_name_or_path, settings.sources, settings.training.output_dir)
    check_data_folder("--regularization_data_root", settings.regularization.regularization_data_root)
    settings = settle_files(settings)
    check_prepared_flags(settings)
    if not settings.training.dry_run:
        check_no_earlier_run(settings)
    return settings


def _training_parser(task: str, method: str) -> FlagParser:
    is_lora, is_control = method == "lora", task == "control-to-video"
    return FlagParser(
        TrainingSettings,
        required=(("pretrained_model_name_or_path",), DATA_FLAGS),
        omit=(*(_SFT_ONLY if is_lora else _LORA_ONLY), *(_IMAGE_ONLY if is_control else _CONTROL_ONLY)),
        defaults={"output_dir": f"cogvideox-{method}", "tracker_name": f"cogvideox-{method}"},
        # Both of its flags are accepted with a warning, because launchers of both methods share them.
        titles={} if is_lora else {"lora": "lora (no effect on full fine-tuning)"},
        usage="%(prog)s --pretrained_model_name_or_path MODEL --data_root FOLDER [flags]",
        description=f"{'Train a LoRA for' if is_lora else 'Fine-tune'} a CogVideoX {task} model on your own clips.",
    )


def flag_names(task: str, method: str) -> list[str]:
    """Return the names of the flags of a training script, in the order of `--help`."""
    names = dict.fromkeys(action.dest for action in _training_parser(task, method)._actions)
    return [name for name in names if name != "help"]


def parse_prepare_args(argv: Sequence[str] | None = None) -> PreparationSettings:
    """Read and check the flags of prepare_dataset.py; see `parse_args`."""
    parser = FlagParser(
        PreparationSettings,
        required=(DATA_FLAGS, ("output_dir",)),
        defaults={"caption_column": "caption"},
        usage="%(prog)s --data_root FOLDER --output_dir FOLDER [flags]",
        description="Encode clips and captions as latents and text embeddings, for training with --load_tensors.",
    )
    groups, given = parser.read(argv)
    settings = PreparationSettings(given, **groups)
    with _reported(parser):
        clips = settle_clips(settings.clips, given)
        check_sources(settings.sources)
        check_control(settings.control)
        check_masks(settings.masks, settings.control, given)
        preparation = settle_preparation(
            settings.preparation,
            given,
            use_masks=settings.masks.use_masks,
            text_encoder_8bit=settings.encoding.text_encoder_8bit,
        )
        output_dir = preparation.output_dir
        check_place(settings.sources.data_root, output_dir)
        check_files(settings.model.model_id, settings.sources, output_dir, model_flag="--model_id", is_to_store=True)
    clips, warnings = drop_long_buckets(clips)
    _warn(warnings)
    return replace(settings, clips=clips, preparation=preparation)


def parse_caption_args(argv: Sequence[str] | None = None) -> CaptioningSettings:
    """Read and check the flags of caption_dataset.py; see `parse_args`.

    The flags on data mean the same as for prepare_dataset.py. There is no --id_token: preparation and training put it
    before captions. An unusable file of the prompt is a UserError.
    """
    parser = FlagParser(
        CaptioningSettings,
        required=(("data_root", "dataset_file", "dataset_name"), ("endpoint", "model")),
        omit=("id_token", "dataset_mix", *_CAPTION_FLAGS),
        defaults={"caption_column": "caption"},
        has_config=False,
        usage="%(prog)s --data_root FOLDER (--endpoint URL | --model NAME) [flags]",
        description="Write captions for clips that have none, with a vision-language model: behind an "
        "OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, Ollama, a hosted one), or loaded with transformers. Run "
        "again to continue a stopped run.",
    )
    groups, given = parser.read(argv)
    settings = CaptioningSettings(**groups)
    with _reported(parser):
        check_captioning(settings, given)
    return replace(settings, captions=settle_prompt(settings.captions))


def parse_split_args(argv: Sequence[str] | None = None) -> SplittingSettings:
    """Read and check the flags of split_scenes.py; see `parse_args`."""
    parser = FlagParser(
        SplittingSettings,
        required=(("data_root",), ("output_dir",)),
        has_config=False,
        usage="%(prog)s --data_root FOOTAGE --output_dir FOLDER [flags]",
        description="Cut footage into clips of one scene each. Run again to continue a stopped run, or after adding "
        "footage.",
    )
    groups, _ = parser.read(argv)
    settings = SplittingSettings(**groups)
    with _reported(parser):
        check_splitting(settings)
    return settings


def parse_score_args(argv: Sequence[str] | None = None) -> ScoringSettings:
    """Read and check the flags of score_clips.py; see `parse_args`. Those on data mean the same."""
    parser = FlagParser(
        ScoringSettings,
        required=(("data_root", "dataset_file", "dataset_name"),),
        omit=("id_token", "dataset_mix", "keep", "scores", *_CAPTION_FLAGS),
        defaults={"caption_column": "caption"},
        has_config=False,
        usage="%(prog)s --data_root FOLDER [flags]",
        description="Measure motion, sharpness, light, near-duplicates and more of every clip, for --keep of the "
        "other scripts. Clips need no captions. Run again to continue a stopped run, or after adding clips.",
    )
    groups, _ = parser.read(argv)
    settings = ScoringSettings(**groups)
    with _reported(parser):
        check_sources(settings.sources)
        check_scoring(settings)
    return settings


def parse_first_frame_args(argv: Sequence[str] | None = None) -> FirstFrameSettings:
    """Read and check the flags of make_first_frames.py; see `parse_args`."""
    parser = FlagParser(
        FirstFrameSettings,
        required=(("data_root", "dataset_file", "dataset_name"), ("output_dir",)),
        omit=("id_token", "dataset_mix", "skip_frames_end", "keep", "scores", *_CAPTION_FLAGS),
        defaults={"caption_column": "caption"},
        has_config=False,
        usage="%(prog)s --data_root FOLDER --output_dir FOLDER [flags]",
        description="Write the first frame of every clip as a PNG, and a table of both for --dataset_file.",
    )
    groups, _ = parser.read(argv)
    settings = FirstFrameSettings(**groups)
    with _reported(parser):
        check_sources(settings.sources)
        check_on_disk("--output_dir", settings.output.output_dir)
    return settings


def parse_generate_args(argv: Sequence[str] | None = None) -> GenerationSettings:
    """Read and check the flags of generate.py; see `parse_args`."""
    parser = FlagParser(
        GenerationSettings,
        required=(("pretrained_model_name_or_path",), ("prompt", "prompts_file")),
        has_config=False,
        may_repeat=False,
        usage="%(prog)s --pretrained_model_name_or_path MODEL --prompt TEXT [flags]",
        description="Sample videos from a CogVideoX model: as it is, with LoRAs, or fully fine-tuned.",
    )
    groups, given = parser.read(argv)
    with _reported(parser):
        return settle_generation(GenerationSettings(**groups), has_negative_prompt="negative_prompt" in given)


def parse_convert_args(argv: Sequence[str] | None = None) -> ConversionSettings:
    """Read and check the flags of convert_lora.py; see `parse_args`."""
    parser = FlagParser(
        ConversionSettings,
        required=(("lora", "transformer"), ("output_file", "output_dir")),
        has_config=False,
        may_repeat=False,
        usage="%(prog)s (--lora FILE ... | --transformer FOLDER) (--output_file FILE | --output_dir FOLDER) [flags]",
        description="Convert LoRAs: to the names of other tools, to another rank or precision, several into one, from "
        "LoKr and LoHa, from full fine-tuning, or into the weights of the base model.",
    )
    groups, _ = parser.read(argv)
    with _reported(parser):
        return settle_conversion(ConversionSettings(**groups))


def parse_app_args(argv: Sequence[str] | None = None) -> AppSettings:
    """Read and check the flags of app.py; see `parse_args`."""
    parser = FlagParser(
        AppSettings,
        required=(),
        has_config=False,
        description="Show an app in the browser: look at clips, correct captions, start and watch runs, sample.",
    )
    groups, _ = parser.read(argv)
    settings = AppSettings(**groups)
    with _reported(parser):
        if not os.path.isdir(settings.app.root):
            raise UserError(f"--root: no folder '{settings.app.root}'; pass the folder that your clips are in")
        check_writable(settings.app.root, "--root")
    return settings


def parse_compare_args(argv: Sequence[str] | None = None) -> ComparisonSettings:
    """Read and check the flags of compare_runs.py; see `parse_args`."""
    parser = FlagParser(
        ComparisonSettings,
        required=(),
        has_config=False,
        usage="%(prog)s RUN [RUN ...] [--output_file FILE]",
        description="Show runs on one page: which learned, their curves, the settings that differ, their last videos.",
    )
    groups, _ = parser.read(argv)
    with _reported(parser):
        return settle_comparison(ComparisonSettings(**groups))


@contextmanager
def _reported(parser: FlagParser) -> Iterator[None]:
    """Report a mistake in the flags as the parser reports its own."""
    try:
        yield
    except UserError as error:
        parser.error(str(error))


def _warn(lines: list[str]) -> None:
    """Write each line to stderr, once for all processes of a launch."""
    if launch_rank() == 0:
        for line in lines:
            print(f"warning: {line}", file=sys.stderr, flush=True)
