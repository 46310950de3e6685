"""Measure speed at full size on a GPU: the steps of a 5b LoRA with the important settings, and the VAE's encoder.

    PYTHONPATH=training:assets/scripts python benchmarks/gpu_speed.py          # into benchmarks/speed_gpu.json
    PYTHONPATH=training:assets/scripts python benchmarks/gpu_speed.py --tiny --output_file x.json    # on a CPU too

Models and clips are those of measure_memory.py. All rows run in this process, and those without a quantized or
streamed base share one loaded transformer. Some rows may use only the memory of a smaller card. The seconds of every
step are recorded; figures are written after each row.
"""

import gc
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import measure_memory
import torch
from apart import attempt
from diffusers import CogVideoXTransformer3DModel
from materials import folders
from memory_rows import CHECKPOINTED, Row

from common.startup import configure_allocator
from memory.settings import GB
from models.configs import CPU
from models.encoding import encode_videos
from models.source import ModelSource


PREPARE = "prepare"
STEPS = (1, 3)
CUDA_CONTEXT_GB = 0.5  # of a card, which torch's allocator cannot use
ATTENTION_KEPT = (*CHECKPOINTED, "--checkpoint_scope", "all-but-attention")


def step(name: str, *flags: str, card_gb: int | None = None) -> Row:
    """Return a row that trains a 5b LoRA without validation."""
    return Row(name, "5b", "lora", flags, is_sampled=False, steps=STEPS, card_gb=card_gb)


ROWS = (
    step("5b LoRA, blocks checkpointed", *CHECKPOINTED),
    step("5b LoRA, attention kept", *ATTENTION_KEPT),
    step("5b LoRA, nothing checkpointed"),
    step("5b LoRA, attention kept, compiled", *ATTENTION_KEPT, "--compile"),
    *(
        row
        for card in (24, 16)
        for row in (
            step(f"{card} GB: blocks checkpointed", *CHECKPOINTED, card_gb=card),
            step(f"{card} GB: attention kept", *ATTENTION_KEPT, card_gb=card),
            step(f"{card} GB: nothing checkpointed", card_gb=card),
            step(f"{card} GB: --memory_budget_gb {card}", "--memory_budget_gb", str(card), card_gb=card),
        )
    ),
    step("24 GB: attention kept, compiled", *ATTENTION_KEPT, "--compile", card_gb=24),
    step("16 GB: attention kept, compiled", *ATTENTION_KEPT, "--compile", card_gb=16),
    step("5b LoRA, every second block checkpointed", *CHECKPOINTED, "--checkpoint_every", "2"),
    step("5b LoRA, nothing checkpointed, compiled", "--compile"),
    step("5b LoRA, blocks checkpointed, offloaded", *CHECKPOINTED, "--offload_checkpoints"),
    Row("VAE encoder", "5b", PREPARE),
)


class SharedModel(ModelSource):
    """A model whose transformer is loaded once and given to one run after another, as long as they load it alike."""

    _loaded: ClassVar[dict[tuple, CogVideoXTransformer3DModel]] = {}  # at most one

    def load_transformer(
        self, dtype: torch.dtype, *, device: torch.device = CPU, quantize: str = "none"
    ) -> CogVideoXTransformer3DModel:
        """Load the transformer, or return the loaded one in its state after loading."""
        key = (self.path, dtype, str(device), quantize)
        if key not in self._loaded:
            self._loaded.clear()
            measure_memory.forget_device_peaks()
            transformer = super().load_transformer(dtype, device=device, quantize=quantize)
            if quantize != "none" or (device == CPU and torch.cuda.is_available()):
                return transformer  # quantized layers may be replaced, and streamed ones move
            self._loaded[key] = transformer
        return as_loaded(self._loaded[key])


def as_loaded(transformer: CogVideoXTransformer3DModel) -> CogVideoXTransformer3DModel:
    """Remove what a run with a LoRA adds: adapters, forward passes, checkpoints, compiled functions."""
    torch._dynamo.reset()
    for module in transformer.modules():
        for name in ("forward", "_original_forward", "project"):  # the second is accelerate's
            module.__dict__.pop(name, None)
    transformer._forward_pre_hooks.clear()
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()
    transformer.disable_gradient_checkpointing()
    return transformer.requires_grad_(False)


def main() -> None:
    """Measure the rows."""
    parser = measure_memory.make_parser(__doc__, "speed_gpu.json", tiny="tiny models, on any device")
    args = measure_memory.parse_flags(parser, "speed_gpu.json")
    rows = measure_memory.find_rows(parser, ROWS, args.only)
    if args.tiny and not args.only:
        rows = [row for row in rows if "--compile" not in row.flags]  # on a CPU, would take longest by far
    output = args.output_file or measure_memory.HERE / "speed_gpu.json"
    with tempfile.TemporaryDirectory() as folder:
        work = args.work_dir or Path(folder)
        limits = (args.time_limit, None)  # these rows run in this process, where none can be killed
        configure_allocator()  # as runs do
        measure_memory.measure_rows(rows, work, output, tiny=args.tiny, limits=limits, measure=measure, run=attempt)


def measure(row: Row, work: Path, tiny: bool) -> dict[str, Any]:
    """Run a row of either kind, with the memory of its card."""
    gc.collect()
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        share = 1.0 if row.card_gb is None else min(1.0, (row.card_gb - CUDA_CONTEXT_GB) * GB / total)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share)
    if row.method == PREPARE:
        return measure_encoder(row, work, tiny)
    return measure_memory.measure_row(row, work, tiny, SharedModel(str(folders(row, work, tiny)[0])))


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
    return {"device": measure_memory.device_name(), "measured": measured}


if __name__ == "__main__":
    main()
