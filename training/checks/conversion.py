"""Checks of the flags of convert_lora.py; none needs a model.

Each raises `UserError` with one line that names the flag and what to do.
"""

import os
from dataclasses import replace

from checks.files import check_model, check_writable
from checks.generation import find_loras, find_transformer
from common.errors import UserError
from flags.conversion import DIFFUSERS
from flags.settings import ConversionSettings


def settle_conversion(settings: ConversionSettings) -> ConversionSettings:
    """Return the settings with inputs that exist, and an output that does not."""
    source, reduction, output = settings.source, settings.reduction, settings.output
    model = settings.model.pretrained_model_name_or_path
    merges, extracts = output.output_dir is not None, source.transformer is not None
    for is_wrong, message in (
        (extracts and source.lora, "--transformer: not together with --lora; omit one of them"),
        (merges and output.output_file, "--output_dir: not together with --output_file; omit one of them"),
        (merges and extracts, "--output_dir: --transformer is complete already; pass --output_file for its LoRA"),
        (
            merges and (reduction.rank or reduction.energy or output.format != DIFFUSERS),
            "--output_dir: not with --rank, --energy or --format, which are of a LoRA; omit them",
        ),
        (
            (merges or extracts) and not model,
            "--pretrained_model_name_or_path: required to merge and to extract; pass the base model",
        ),
        (
            model and not (merges or extracts),
            "--pretrained_model_name_or_path: no effect without --transformer or --output_dir; omit it",
        ),
        (
            extracts and not (reduction.rank or reduction.energy),
            "--transformer: how large is its LoRA to be? Pass --rank 64, or --energy 0.9",
        ),
    ):
        if is_wrong:
            raise UserError(message)
    for flag, reference in (*(("--lora", one) for one in source.lora), ("--transformer", source.transformer)):
        if reference is not None and not os.path.exists(reference):
            raise UserError(f"{flag}: {reference} does not exist; pass a file or folder on this machine")
    loras = find_loras(source)
    transformer = source.transformer and find_transformer(source.transformer)
    if model:
        check_model(model, "--pretrained_model_name_or_path")
    _check_output(settings)
    return replace(settings, source=replace(source, transformer=transformer), loras=loras)


def _check_output(settings: ConversionSettings) -> None:
    flag, path = "--output_dir", settings.output.output_dir
    if path is None:
        flag, path = "--output_file", settings.output.output_file
        if not path.endswith(".safetensors"):
            raise UserError(f"{flag}: '{path}' must end in .safetensors, the format that is written")
    if os.path.lexists(path):
        raise UserError(f"{flag}: {path} exists; pass another name, or delete it")
    check_writable(os.path.dirname(os.path.abspath(path)), flag)
