"""Prepared folders and their indexes, without a preparation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch
from safetensors.torch import save_file

from common.text_files import index_lines
from data.buckets import Bucket
from prepared.index import IndexedFolder, PreparedIndex, make_table, write_index
from prepared.read_index import read_index, row_in_shards, sample_in_shards


def rows_of(folder: Path) -> list[dict]:
    """The rows of a folder's index."""
    return pa.ipc.open_file(str(folder / "index.arrow")).read_all().to_pylist()


def index_of(
    buckets: Sequence[Bucket], folder: Path = Path("prepared"), names: Sequence[str] | None = None, **columns: Sequence
) -> PreparedIndex:
    """An index in memory of samples without tensors; columns are values of their entries."""
    shards = folder / "latents/a.safetensors", folder / "prompt_embeds/b.safetensors"
    names = names or [str(number) for number in range(len(buckets))]
    entries = [
        sample_in_shards(folder, names[number], *shards, f"key-{number}", bucket, with_images=False)
        | {name: values[number] for name, values in columns.items()}
        for number, bucket in enumerate(buckets)
    ]
    return PreparedIndex([IndexedFolder(folder, make_table(map(row_in_shards, entries)))])


def write_prepared(
    folder: Path, samples: Mapping[str, Mapping[str, torch.Tensor]], bucket: Bucket, *, older: bool = False, **entry
) -> PreparedIndex:
    """Write samples, {name: {kind: tensor}}, with a caption each, into two shards, and read their index.

    Args:
        older: write the index of earlier versions.
        entry: values of all entries, such as the repeats.
    """
    latents, embeds = {}, {}
    for name, tensors in samples.items():
        embeds[f"caption of {name}.prompt_embeds"] = tensors["prompt_embeds"]
        latents |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items() if kind != "prompt_embeds"}
    files = folder / "latents" / "aa.safetensors", folder / "prompt_embeds" / "bb.safetensors"
    for file, tensors in zip(files, (latents, embeds), strict=True):
        file.parent.mkdir(parents=True)
        # Copies, because safetensors refuses tensors that share memory.
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, file)
    entries = [
        sample_in_shards(
            folder,
            name,
            *files,
            f"caption of {name}",
            bucket,
            with_images="image_latents" in tensors,
            with_controls="control_latents" in tensors,
            with_masks="mask" in tensors,
        )
        | {"caption": f"a {name}"}
        | entry
        for name, tensors in samples.items()
    ]
    if older:
        (folder / "index.jsonl").write_text(index_lines(entries))
    else:
        write_index(folder, map(row_in_shards, entries))
    return read_index(folder)
