"""Write a complete pipeline: a tuned transformer and copies of its base model's other components."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from diffusers import CogVideoXPipeline

from common.errors import UserError, first_line
from common.files import replace_folder
from models.fingerprints import weight_files
from models.source import ModelSource


_INDEX = "model_index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".h5", ".msgpack", ".onnx")


def find_components(source: ModelSource, flag: str = "--save_pipeline") -> dict[Path, str]:
    """Find the files of a pipeline without its transformer; download those of a model on the hub.

    Returns file -> its path in the pipeline's folder, without the name of a variant. Raises UserError, which begins
    with the flag, if a component that `model_index.json` names is missing.
    """
    model = _local_folder(source, flag)
    index = json.loads((model / _INDEX).read_text(encoding="utf-8"))
    files = {model / _INDEX: _INDEX}
    for name, value in index.items():
        # A component is [library, class]; [null, null] is an omitted one, other values are settings.
        if isinstance(value, list) and all(value) and name != "transformer":
            found = _component_files(model / name, source.variant, flag)
            files |= {file: f"{name}/{target}" for file, target in found.items()}
    return files


def write_pipeline(
    source: ModelSource, transformer: Path, folder: Path, index: Mapping[str, object] = MappingProxyType({})
) -> Path:
    """Write a folder for the pipeline's `from_pretrained`, complete or not at all; replace an earlier one.

    Args:
        source: of the other components, which are copied, not loaded.
        transformer: folder of the tuned one, as `save_pretrained` writes it.
        index: what differs from the `model_index.json` of the source.
    """
    files = find_components(source)
    partial = folder.with_name(f".partial.{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(transformer, partial / "transformer", copy_function=_link_or_copy)
        copy_components(files, source.variant, partial, index)
        replace_folder(partial, folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"--save_pipeline: {folder} cannot be written ({reason}); {transformer} is complete"
        ) from error
    return folder


def copy_components(files: Mapping[Path, str], variant: str | None, folder: Path, index: Mapping[str, object]) -> None:
    """Copy what `find_components` found to a folder; `index` is what changes in its `model_index.json`."""
    for file, target in files.items():
        (folder / target).parent.mkdir(exist_ok=True)
        if _is_index(file):
            listed = json.loads(file.read_text(encoding="utf-8"))
            shards = {name: _without_variant(shard, variant) for name, shard in listed["weight_map"].items()}
            text = json.dumps(listed | {"weight_map": shards}, indent=2) + "\n"
            (folder / target).write_text(text, encoding="utf-8")
        elif target == _INDEX and index:
            changed = json.loads(file.read_text(encoding="utf-8")) | dict(index)
            (folder / target).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(file, folder / target)  # follows the symbolic links of a hub cache


def _local_folder(source: ModelSource, flag: str) -> Path:
    if Path(source.path).is_dir():
        return Path(source.path)
    try:
        # transformer=None skips its files.
        options = {"variant": source.variant, "revision": source.revision, "cache_dir": source.cache_dir}
        return Path(CogVideoXPipeline.download(source.path, transformer=None, **options))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{flag}: the model '{source.path}' cannot be downloaded: {reason}") from error


def _component_files(folder: Path, variant: str | None, flag: str) -> dict[Path, str]:
    """Map each file to its name without the variant; only the weights that `from_pretrained` would read."""
    weights = weight_files(folder, variant)
    if not weights and variant:  # which not every component has
        weights, variant = weight_files(folder, None), None
    others = [file for file in sorted(folder.glob("[!.]*")) if file.is_file() and not _is_index(file)]
    others = [file for file in others if file.suffix not in _WEIGHT_SUFFIXES]
    is_network = any(file.name == "config.json" for file in others)
    if not others or (is_network and not weights):
        raise UserError(
            f"{flag}: the model has no {'weights in' if others else 'files in'} '{folder}', which its {_INDEX} names; "
            "complete the model, or omit the flag"
        )
    names = {file: _without_variant(file.name, variant) for file in weights}
    if len(weights) > 1:
        suffix = weights[0].suffix
        for file in folder.glob(f"*{suffix}.index*.json"):
            plain = _without_variant(file.name, variant)
            # The index of a variant has it in the name; the plain one is of other files.
            if plain.endswith(f"{suffix}.index.json") and (plain != file.name) == bool(variant):
                names[file] = plain
    return names | {file: file.name for file in others}


def _is_index(file: Path) -> bool:
    return ".index." in file.name


def _without_variant(name: str, variant: str | None) -> str:
    return name.replace(f".{variant}", "") if variant else name


def _link_or_copy(source: str, target: str) -> None:
    """Link a file of the tuned transformer, many gigabytes that need not be stored twice."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
