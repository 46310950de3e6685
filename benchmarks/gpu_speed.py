"""Measure speed at full size on a GPU: training steps with the important settings, and encoding clips with the VAE.

    PYTHONPATH=training:assets/scripts python benchmarks/gpu_speed.py          # into benchmarks/speed_gpu.json
    PYTHONPATH=training:assets/scripts python benchmarks/gpu_speed.py --tiny --output_file x.json    # on a CPU too

Models and clips are those of measure_memory.py. Every run has a separate process; figures are written after each.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import measure_memory
import torch
from materials import folders
from memory_rows import CHECKPOINTED, LOW_BIT, SMALLEST_FULL, Row

from models.encoding import encode_videos
from models.source import ModelSource


PREPARE = "prepare"
STEPS = (3, 4)
ATTENTION_KEPT = ("--checkpoint_scope", "all-but-attention")


def step(name: str, model: str, method: str, *flags: str) -> Row:
    """Return a row that trains without validation."""
    return Row(name, model, method, flags, is_sampled=False, steps=STEPS)


ROWS = (
    step("5b LoRA", "5b", "lora", *CHECKPOINTED),
    step("5b LoRA, attention kept", "5b", "lora", *CHECKPOINTED, *ATTENTION_KEPT),
    step("5b LoRA, compiled", "5b", "lora", *CHECKPOINTED, "--compile"),
    step("5b LoRA, attention kept, compiled", "5b", "lora", *CHECKPOINTED, *ATTENTION_KEPT, "--compile"),
    step("5b LoRA, cuDNN attention", "5b", "lora", *CHECKPOINTED, "--attention_backend", "cudnn"),
    step(
        "5b LoRA, compiled, cuDNN attention", "5b", "lora", *CHECKPOINTED, "--compile", "--attention_backend", "cudnn"
    ),
    Row("VAE encoder", "5b", PREPARE),
    step("5b LoRA, offloaded checkpoints", "5b", "lora", *CHECKPOINTED, "--offload_checkpoints"),
    step("5b LoRA, every second block checkpointed", "5b", "lora", *CHECKPOINTED, "--checkpoint_every", "2"),
    step("5b LoRA, int8, streamed blocks", "5b", "lora", *CHECKPOINTED, "--quantize_base", "int8", "--stream_blocks"),
    step("2b LoRA", "2b", "lora", *CHECKPOINTED),
    step("2b full, AdamW", "2b", "sft", *CHECKPOINTED),
    step("5b full, bf16 weights, 8-bit, step in backward", "5b", "sft", *CHECKPOINTED, *LOW_BIT, *SMALLEST_FULL),
    step("5b LoRA, flash attention", "5b", "lora", *CHECKPOINTED, "--attention_backend", "flash"),
    step("5b LoRA, feed-forward checkpointed", "5b", "lora", *CHECKPOINTED, "--checkpoint_scope", "feed-forward"),
    step("5b LoRA, nothing checkpointed", "5b", "lora"),
    step("2b LoRA, compiled", "2b", "lora", *CHECKPOINTED, "--compile"),
)


def main() -> None:
    """Measure the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of rows (default: all)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on any device")
    measure_memory.add_limits(parser)
    parser.add_argument("--work_dir", type=Path, help="folder of models and clips, kept (default: a temporary one)")
    parser.add_argument("--output_file", type=Path, help="(default: speed_gpu.json, here)")
    args = parser.parse_args()
    if args.tiny and not args.output_file:
        parser.error("--tiny: its figures do not belong into speed_gpu.json; pass an --output_file")
    rows = measure_memory.find_rows(parser, ROWS, args.only)
    output = args.output_file or measure_memory.HERE / "speed_gpu.json"
    with tempfile.TemporaryDirectory() as folder:
        work = args.work_dir or Path(folder)
        limits = (args.time_limit, args.row_limit)
        measure_memory.measure_rows(rows, work, output, tiny=args.tiny, limits=limits, measure=measure)


def measure(row: Row, work: Path, tiny: bool) -> dict[str, Any]:
    """Run a row of either kind."""
    return measure_encoder(row, work, tiny) if row.method == PREPARE else measure_memory.measure_row(row, work, tiny)


def measure_encoder(row: Row, work: Path, tiny: bool, clips: int = 3) -> dict[str, Any]:
    """Measure clips a second of the VAE's encoder, with contiguous and with channels-last weights."""
    model, _, size = folders(row, work, tiny)
    frames, height, width = size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = ModelSource(str(model)).load_vae(dtype, slicing=False, tiling=False, device=device)
    video = torch.randint(0, 256, (1, frames, 3, height, width), dtype=torch.uint8, device=device)
    measured = {}
    for name, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last_3d)):
        for weight in vae.parameters():
            if weight.dim() == 5:
                weight.data = weight.data.contiguous(memory_format=layout)
        encode_videos(vae, video)
        measure_memory.wait_for_device()
        began = time.perf_counter()
        for _ in range(clips):
            encode_videos(vae, video)
        measure_memory.wait_for_device()
        measured[f"clips/s, {name}"] = clips / (time.perf_counter() - began)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "measured": measured}


if __name__ == "__main__":
    main()
