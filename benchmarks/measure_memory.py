"""Measure the memory of training, row by row of the tables in assets/docs/memory.md.

    make benchmark-memory                                   # all rows, on a GPU, into benchmarks/memory.json
    python benchmarks/measure_memory.py --only "5b LoRA" "2b LoRA"  # with PYTHONPATH=training:assets/scripts
    python benchmarks/measure_memory.py --tiny --output_file x.json # the same code with tiny models, on a CPU too
    python benchmarks/measure_memory.py --calculate                 # no run: into benchmarks/memory_calculated.json

Models have the released sizes and random weights: nothing is downloaded, but 11 GB are written for each 5b model. Each
row runs the training's own code in a separate process: a few steps on prepared clips of random numbers, then a
validation of two denoising steps. Results are written after each row; a failed row has the reason.
"""

import argparse
import gc
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any


# Rows run in forks of this process, which must not have used CUDA: torch then asks NVIDIA's management library for a
# GPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from apart import first_line, run_apart
from materials import CONTROL, folders, make_materials
from memory_rows import ROWS, Row

from args import parse_args
from common.files import atomic_write
from common.startup import configure_allocator
from data.buckets import Bucket, count_tokens
from diffusion.control_to_video import ControlToVideo
from make_full_size_model import full_size_configs
from memory.accounting import account
from memory.facts import Workload, model_facts
from memory.settings import memory_settings_of
from methods.full import FullFinetune
from methods.lora import Lora
from models.source import ModelSource
from planning.plan import plan_training_data
from run.loop import train
from run.memory_fit import choose_by_budget, run_facts
from run.recipe import Recipe
from run.setup import Run, set_up
from run.spec import check_spec
from tracking.flops import count_flops, peak_tflops


HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "torchao", "bitsandbytes")
SECONDS_A_ROW = 600.0


def main() -> None:
    """Measure or calculate the requested rows."""
    parser = make_parser(__doc__, "memory.json, or memory_calculated.json", tiny="tiny models and clips of 17x64x96")
    parser.add_argument("--calculate", action="store_true", help="calculate all rows from the configs; run nothing")
    parser.add_argument(
        "--row_limit", type=float, metavar="SECONDS", default=SECONDS_A_ROW,
        help="kill a row that has no result after so long, and continue with the next (default: %(default)g)",
    )  # fmt: skip
    args = parse_flags(parser, "memory.json")
    output = args.output_file or HERE / ("memory_calculated.json" if args.calculate else "memory.json")
    rows = find_rows(parser, ROWS, args.only)
    if args.calculate:
        write_json(output, {"rows": {row.name: calculate_row(row) for row in rows}})
        return
    with tempfile.TemporaryDirectory() as folder:
        work, limits = args.work_dir or Path(folder), (args.time_limit, args.row_limit)
        configure_allocator()  # as runs do
        measure_rows(rows, work, output, tiny=args.tiny, limits=limits)


def make_parser(description: str, results: str, *, tiny: str) -> argparse.ArgumentParser:
    """Return a parser of the flags that the benchmarks with rows share; `results` and `tiny` are for the help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of rows (default: all)")
    parser.add_argument("--tiny", action="store_true", help=tiny)
    parser.add_argument("--time_limit", type=float, metavar="SECONDS", help="start no row after so long")
    parser.add_argument("--work_dir", type=Path, help="folder of models and clips, kept (default: a temporary one)")
    parser.add_argument("--output_file", type=Path, help=f"(default: {results}, here)")
    return parser


def parse_flags(parser: argparse.ArgumentParser, results: str) -> argparse.Namespace:
    """Parse the command line; tiny figures must not get into the file of `results`."""
    args = parser.parse_args()
    if args.tiny and not args.output_file:
        parser.error(f"--tiny: its figures do not belong into {results}; pass an --output_file")
    return args


def find_rows(parser: argparse.ArgumentParser, rows: Iterable[Row], names: Iterable[str] | None) -> list[Row]:
    """Return the rows with these names in their order, all for None; end the program if a name is unknown."""
    by_name = {row.name: row for row in rows}
    if unknown := sorted(set(names or ()) - by_name.keys()):
        parser.error(f"--only: there is no row {', '.join(unknown)}; rows are {'; '.join(by_name)}")
    return [by_name[name] for name in names or by_name]


def measure_rows(
    rows: Iterable[Row],
    work: Path,
    output: Path,
    *,
    tiny: bool,
    limits: tuple[float | None, float],
    measure: Callable[[Row, Path, bool], dict[str, Any]] | None = None,
    run: Callable[..., dict[str, Any]] = run_apart,
) -> None:
    """Measure rows one after another, and write the results after each.

    Args:
        work: folder of models and clips.
        tiny: with tiny ones.
        limits: seconds after which no row is started, and after which a row without result is killed.
        measure: function to call for a row; `measure_row` by default.
        run: how to call it: in a separate process, or with `attempt` in this one, which ends no row.
    """
    started, (time_limit, row_limit) = time.monotonic(), limits
    for row in rows:
        if time_limit and time.monotonic() - started > time_limit:
            print(f"time is over: {row.name} and the rows after it are not measured", flush=True)
            return
        began = time.monotonic()
        result = run(make_materials, row, work, tiny, seconds=row_limit)
        if "failed" not in result:
            result = run(measure or measure_row, row, work, tiny, seconds=row_limit)
        write_result(output, row.name, result | {"seconds": round(time.monotonic() - began, 1)})


def write_result(output: Path, name: str, result: dict[str, Any]) -> None:
    """Add the result of a row to the file; a failure does not replace an earlier measurement."""
    results = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"rows": {}}
    if "measured" in result or "measured" not in results["rows"].get(name, {}):
        known = {"date": datetime.now(UTC).date().isoformat(), "versions": installed_versions()}
        results["rows"][name] = result | known
    write_json(output, results)
    print(f"{name}: {result.get('measured', '')} {result.get('failed', '')}".rstrip(), flush=True)


def bucket_flags(size: tuple[int, int, int]) -> list[str]:
    """Return the flags for clips of one size."""
    frames, height, width = map(str, size)
    flags = ["--frame_buckets", frames, "--height_buckets", height, "--width_buckets", width]
    return [*flags, "--max_num_frames", frames]


def row_flags(row: Row, model: Path | str, data: Path, output: Path, size: tuple[int, int, int]) -> list[str]:
    """Return the command line of a row."""
    _, height, width = map(str, size)
    flags = ["--pretrained_model_name_or_path", str(model), "--data_root", str(data), "--output_dir", str(output)]
    flags += ["--load_tensors", *bucket_flags(size), "--height", height, "--width", width]
    flags += ["--mixed_precision", "bf16", "--optimizer", "adamw", "--report_to", "none"]
    flags += ["--train_batch_size", str(row.batch_size)]
    flags += ["--max_train_steps", str(sum(row.steps)), "--seed", "0", *row.flags]
    if row.method == "lora":
        flags += ["--rank", str(row.rank), "--lora_alpha", str(row.rank)]
    if row.is_sampled:
        flags += ["--validation_prompt", "a red circle moves from left to right", "--num_inference_steps", "2"]
        flags += ["--validation_controls", str(data / CONTROL)] if row.task == "control-to-video" else []
    return flags


def measure_row(row: Row, work: Path, tiny: bool, source: ModelSource | None = None) -> dict[str, Any]:
    """Run a row; return its peaks in bytes and the seconds of its steps, also if the validation failed.

    Args:
        source: to load the model from instead of its folder.
    """
    model, prepared, size = folders(row, work, tiny)
    failed = {}
    with tempfile.TemporaryDirectory(dir=work) as output:
        args = parse_args(row_flags(row, model, prepared, Path(output), size), task=row.task, method=row.method)
        recipe = Recipe(args, plan_training_data(args))
        if args.memory.memory_budget_gb:
            recipe = recipe.with_memory(choose_by_budget(recipe))
        spec = check_spec(recipe)
        if source is not None:
            vars(spec)["source"] = source  # a cached property
        forget_host_peak()
        forget_device_peaks()
        run = set_up(spec)
        measured = device_peaks("set-up")
        forget_device_peaks()
        seconds = time_steps(run, sum(row.steps))
        facts, settings = run_facts(spec), memory_settings_of(spec.settings)
        measured |= {**speed_figures(seconds[row.steps[0] :], run), **device_peaks("training")}
        if row.is_sampled:
            forget_device_peaks()
            if failures := run.validate(sum(row.steps)):
                failed = {"failed": f"the validation: {first_line(failures[0])}"}
                facts = replace(facts, sampled=None)  # the figures are those of a run without validation
            else:
                peaks = run.memory.phases.get("validation", {})
                measured |= {f"validation {name}": size for name, size in peaks.items()}
        measured["host"] = host_peak()
    result = {"facts": asdict(facts), "settings": asdict(settings), "device": device_name(), "measured": measured}
    return result | {"step_seconds": [round(one, 4) for one in seconds], **failed}


def time_steps(run: Run, steps: int) -> list[float]:
    """Train; return the seconds of each step."""
    seconds, batches = [], run.batches
    for step in range(steps):
        run.state, run.total_steps = replace(run.state, step=step), step + 1
        run.batches = (batch for batch in batches)  # the training closes it, and not the others
        wait_for_device()
        began = time.perf_counter()
        train(run)
        wait_for_device()
        seconds.append(time.perf_counter() - began)
    return seconds


def speed_figures(seconds: list[float], run: Run) -> dict[str, float]:
    """Return the figures of the median step.

    The share of the peak, only for known cards: of all products (HFU), and without those computed again (MFU).
    """
    config, batch_size = run.spec.configs.transformer, run.spec.settings.training.train_batch_size
    tokens, second = count_tokens(config, run.spec.data.buckets[0]), median(seconds)
    settings = run.throughput.flops_settings
    once = {"trains_all": settings["trains_all"]}
    done, needed = (1e-12 * batch_size * count_flops(config, tokens, **which) / second for which in (settings, once))
    figures = {"seconds a step": second, "tokens/s": batch_size * tokens / second, "TFLOP/s": done}
    peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return figures | ({"HFU, %": 100 * done / peak, "MFU, %": 100 * needed / peak} if peak else {})


def calculate_row(row: Row) -> dict[str, int]:
    """Return the calculated bytes of a row."""
    with tempfile.TemporaryDirectory() as folder:
        # There is no clip to sample from.
        flags = row_flags(replace(row, is_sampled=False), "THUDM/CogVideoX-5b", Path(folder), Path(folder), row.size)
        args = parse_args(flags, task=row.task, method=row.method)
    base, size = full_size_configs(row.model), Bucket(*row.size)
    configs = ControlToVideo().model_configs(base) if row.task == "control-to-video" else base
    workload = Workload(size, row.batch_size, "bf16", size if row.is_sampled else None)
    if row.method == "lora":
        method = Lora.from_flags(args.lora, args.memory.quantize_base)
        method = replace(method, new_inputs=configs.patch_inputs - base.patch_inputs)
    else:
        method = FullFinetune(weights_dtype=args.memory.weights_dtype)
    result = account(model_facts(configs, method), memory_settings_of(args), workload)
    return {**asdict(result), "training": result.training, "validation": result.validation}


def wait_for_device() -> None:
    """Wait until all GPU operations are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_peaks(when: str) -> dict[str, int]:
    """Return the peaks of bytes on the device since the last reset; none on the CPU."""
    if not torch.cuda.is_available():
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    stats = torch.cuda.memory_stats()
    inactive = stats.get("inactive_split_bytes.all.peak", 0)  # free, but in the same segment as a tensor
    peaks = {"allocated": allocated, "reserved": reserved, "inactive": inactive}
    return {f"{when} {name}": size for name, size in (peaks | {"retries": stats.get("num_alloc_retries", 0)}).items()}


def forget_device_peaks() -> None:
    """Release unused memory, and reset the peaks and counts of the device."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()  # the retries


def device_name() -> str:
    """Return the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def forget_host_peak() -> None:
    """Reset the peak of host memory, if the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        print(f"the peak of host memory includes earlier memory: {error}", file=sys.stderr)


def host_peak() -> int:
    """Return the peak bytes of host memory, mapped files included."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect memory and speed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file completely or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
