"""Measure how a prepared data set's index, order and loading grow with the number of samples, without a GPU.

    make growth

The tensors are small and never written: shards are files with a header and a hole. Like a rank of a training run, a
process opens the index, takes its digest, draws the first batch of one sample and reads it, then loads more. Seconds
are CPU time of one process; those of loading are without the system's, which reads the files. Memory is what a process
has more than after its imports: its own, and the pages of files, which all processes of a machine share.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

from data.buckets import Bucket
from data.sampler import BucketBatchSampler
from dataset import PreparedDataset, make_loader
from planning.samples import PreparedData
from prepared.index import write_index
from prepared.read_index import read_index, row_in_shards, sample_in_shards


BUCKET = Bucket(9, 64, 96)
SHAPES = {"video_latents": [32, 3, 8, 12], "prompt_embeds": [226, 64]}
LATENTS_PER_SHARD, EMBEDS_PER_SHARD = 100, 500  # of 49x480x720 in a gigabyte: about 230 and 580
LOADED = 2000
ROWS = ("index written, s", "index opened, s", "digest, s", "first batch, s", "start, s", "own memory, MB")
ROWS += ("shared pages, MB", "samples loaded a second")


def write_shard(file: Path, names: Sequence[str], kind: str, shape: Sequence[int]) -> None:
    """Write a safetensors file of zeros in bfloat16, without their bytes."""
    size = 2
    for side in shape:
        size *= side
    header = {
        f"{name}.{kind}": {"dtype": "BF16", "shape": shape, "data_offsets": [place * size, (place + 1) * size]}
        for place, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    with open(file, "wb") as shard:
        shard.write(len(text).to_bytes(8, "little") + text)
        shard.truncate(8 + len(text) + size * len(names))


def write_folder(folder: Path, count: int) -> float:
    """Write a folder of `count` samples with a caption each; return the seconds that the index took."""
    names = [f"clip-{number:08d}-{number:016x}" for number in range(count)]
    keys = [f"{number:032x}" for number in range(count)]
    shards = {}
    for kind, part, owned, per_shard in (
        ("video_latents", "latents", names, LATENTS_PER_SHARD),
        ("prompt_embeds", "prompt_embeds", keys, EMBEDS_PER_SHARD),
    ):
        (folder / part).mkdir(parents=True)
        shards[kind] = [folder / part / f"{start:016x}.safetensors" for start in range(0, count, per_shard)]
        for number, file in enumerate(shards[kind]):
            write_shard(file, owned[number * per_shard : (number + 1) * per_shard], kind, SHAPES[kind])

    def entries() -> Iterator[dict]:
        for number, (name, key) in enumerate(zip(names, keys, strict=True)):
            latents = shards["video_latents"][number // LATENTS_PER_SHARD]
            embeds = shards["prompt_embeds"][number // EMBEDS_PER_SHARD]
            entry = sample_in_shards(folder, name, latents, embeds, key, BUCKET, with_images=False)
            caption = f"Clip {number} shows a street at dusk, filmed from a moving tram, while people cross it. " * 2
            yield entry | {"caption": caption, "source": f"table.parquet:row {number}", "clip": f"videos/{name}.mp4"}

    began = time.process_time()
    write_index(folder, map(row_in_shards, entries()))
    return time.process_time() - began


def resident() -> tuple[float, float]:
    """Return the megabytes of this process that are its own, and those that it maps from files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile"))


def measure(folder: Path) -> dict[str, float]:
    """Measure in this process, which must be new."""
    own, shared = resident()
    times = [time.process_time()]
    data = PreparedData(read_index(folder), [folder])
    times.append(time.process_time())
    data.fingerprint  # noqa: B018
    times.append(time.process_time())
    sampler = BucketBatchSampler(data.buckets, 1, seed=0, repeats=data.repeats)
    sampler.total_batches = sampler.batches_per_epoch
    loader = make_loader(PreparedDataset(data.clips), sampler, num_workers=0)
    next(iter(loader))
    times.append(time.process_time())
    own_now, shared_now = resident()
    began = os.times().user
    number = sum(1 for _ in islice(loader, LOADED))
    rate = number / (os.times().user - began)
    seconds = [end - start for start, end in pairwise(times)]
    return dict(zip(ROWS[1:], (*seconds, sum(seconds), own_now - own, shared_now - shared, rate), strict=True))


def main() -> None:
    """Print a table with a column for each number of samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    columns = []
    for count in args.samples:
        with tempfile.TemporaryDirectory() as folder:
            written = write_folder(Path(folder), count)
            command = [sys.executable, __file__, "--measure", folder]
            found = subprocess.run(command, env=dict(os.environ), check=True, capture_output=True, text=True).stdout
            columns.append({ROWS[0]: written} | json.loads(found.splitlines()[-1]))
    print(f"{'samples':24}" + "".join(f"{count:>12,}" for count in args.samples))
    for row in ROWS:
        digits = 2 if row.endswith(", s") else 0
        print(f"{row:24}" + "".join(f"{column[row]:12.{digits}f}" for column in columns))


if __name__ == "__main__":
    main()
