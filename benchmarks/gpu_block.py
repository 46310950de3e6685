"""Time one transformer block of CogVideoX-5b with a LoRA: attention back ends, our savings, precisions, compiled.

    PYTHONPATH=training:assets/scripts python benchmarks/gpu_block.py          # into benchmarks/block_gpu.json
    PYTHONPATH=training:assets/scripts python benchmarks/gpu_block.py --tiny --output_file x.json    # on a CPU too

All rows run in this process with the same weights, and on a GPU are timed by its events. The kernels of one call are
recorded, so that a row can be seen to differ from another only in what its name says. Gradients are compared with the
library's. Figures are written after each row.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from apart import attempt
from materials import TINY_SIZE
from measure_memory import (
    HERE,
    device_name,
    find_rows,
    forget_device_peaks,
    make_parser,
    parse_flags,
    wait_for_device,
    write_result,
)
from memory_rows import SIZE
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint

from common.startup import configure_allocator
from data.buckets import Bucket
from diffusion.positions import rotary_embeddings
from flags.speed import ATTENTION_BACKENDS
from flags.training import LORA_TARGET_MODULES
from make_full_size_model import make_full_size_model
from make_tiny_model import make_tiny_model
from memory.activations import checkpoint_activations
from memory.settings import GB
from methods.lora import Lora
from models.attention import check_attention, set_attention, use_implementation
from models.compilation import check_compiler, compile_blocks
from models.source import ModelSource


RANK = 64
CALLS = 5
DTYPE = torch.bfloat16
UNTIMED = ("native", "sage")  # that of the other rows, and one without backward pass
CHECKPOINT_SCOPES = ("block", "all-but-attention", "feed-forward")


@dataclass(frozen=True)
class BlockRow:
    """One way to compute a block."""

    name: str
    block: str = "ours"  # or library
    lora: str = "ours"  # or library: peft's own layers
    scope: str = "none"  # of --checkpoint_scope
    backend: str | None = None  # of --attention_backend
    base: str = "none"  # of --quantize_base
    is_compiled: bool = False


LIBRARY = BlockRow("library", block="library", lora="library")
OURS = BlockRow("ours")
ROWS = (
    LIBRARY,
    replace(LIBRARY, name="library, checkpointed", scope="block"),
    BlockRow("our block, library's LoRA", lora="library"),
    OURS,
    *(BlockRow(f"ours, {scope} checkpointed", scope=scope) for scope in CHECKPOINT_SCOPES),
    *(BlockRow(f"ours, {backend}", backend=backend) for backend in ATTENTION_BACKENDS if backend not in UNTIMED),
    *(BlockRow(f"ours, {base} base", base=base) for base in ("fp8", "int8", "nf4")),
    replace(OURS, name="ours, compiled", is_compiled=True),
    BlockRow("ours, all-but-attention checkpointed, compiled", scope="all-but-attention", is_compiled=True),
    replace(LIBRARY, name="library, compiled", is_compiled=True),
    BlockRow("ours, cudnn, compiled", backend="cudnn", is_compiled=True),
    BlockRow("ours, fp8 base, compiled", base="fp8", is_compiled=True),
)


def main() -> None:
    """Measure the rows."""
    parser = make_parser(__doc__, "block_gpu.json", tiny="a block of a tiny model, on any device")
    args = parse_flags(parser, "block_gpu.json")
    rows = find_rows(parser, ROWS, args.only)
    with tempfile.TemporaryDirectory() as folder:
        work, output = args.work_dir or Path(folder), args.output_file or HERE / "block_gpu.json"
        configure_allocator()  # as runs do
        measure_blocks(rows, work, output, tiny=args.tiny, time_limit=args.time_limit)


def measure_blocks(
    rows: list[BlockRow], work: Path, output: Path, *, tiny: bool, time_limit: float | None = None
) -> None:
    """Measure rows one after another, and write the results after each; start none after so many seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = work / ("tiny-block" if tiny else "block")
    make = make_tiny_model if tiny else partial(make_full_size_model, device=device.type, num_layers=1)
    make("5b", folder)
    source, size = ModelSource(str(folder)), Bucket(*(TINY_SIZE if tiny else SIZE))
    started, reference = time.monotonic(), cache(lambda: gradient_of(LIBRARY, source, size, device))
    for row in rows:
        if time_limit and time.monotonic() - started > time_limit:
            print(f"time is over: {row.name} and the rows after it are not measured", flush=True)
            return
        torch._dynamo.reset()
        forget_device_peaks()
        began = time.monotonic()
        result = attempt(measure_block, row, source, size, device, reference)
        write_result(output, row.name, result | {"seconds": round(time.monotonic() - began, 1)})


def measure_block(
    row: BlockRow, source: ModelSource, size: Bucket, device: torch.device, reference: Callable[[], torch.Tensor]
) -> dict[str, Any]:
    """Time forward and backward pass of a row; compare its gradients with the reference."""
    step, trained = build(row, source, size, device)
    began = time.perf_counter()
    step()
    wait_for_device()
    first = time.perf_counter() - began
    gradient = flat_gradient(trained)
    cosine = torch.nn.functional.cosine_similarity(gradient, reference(), dim=0).item()
    del gradient
    forget_device_peaks()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    times = [step() for _ in range(CALLS + 1)][1:]
    forward, backward = (median(column) for column in zip(*times, strict=True))
    measured = {"ms": forward + backward, "forward, ms": forward, "backward, ms": backward}
    if device.type == "cuda":
        measured["peak beyond weights, GB"] = (torch.cuda.max_memory_allocated() - before) / GB
    kernels = kernels_of(step, device)
    measured |= {"kernels": sum(calls for _, calls, _ in kernels), "first call, s": first, "gradient's cosine": cosine}
    calls = [[round(number, 4) for number in pair] for pair in times]
    return {"device": device_name(), "measured": measured, "calls": calls, "kernels": kernels[:12]}


def gradient_of(row: BlockRow, source: ModelSource, size: Bucket, device: torch.device) -> torch.Tensor:
    """Return the gradients of a row as one vector."""
    step, trained = build(row, source, size, device)
    step()
    return flat_gradient(trained)


def flat_gradient(trained: list[torch.Tensor]) -> torch.Tensor:
    """Return the gradients of tensors as one vector, float32."""
    return torch.cat([tensor.grad.float().flatten() for tensor in trained])


def build(
    row: BlockRow, source: ModelSource, size: Bucket, device: torch.device
) -> tuple[Callable[[], tuple[float, float]], list[torch.Tensor]]:
    """Return a step of a row, which returns the ms of forward and backward pass, and the tensors with gradients."""
    use_implementation(None)  # an earlier row's package would compute the library's attention too
    check_attention(row.backend, "--attention_backend", device, DTYPE, 64, trains=True)
    transformer = source.load_transformer(DTYPE, device=device, quantize=row.base)
    if row.lora == "ours":
        Lora(RANK, RANK).attach(transformer)
    else:
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LORA_TARGET_MODULES)))
    block, generator = transformer.transformer_blocks[0].train(), torch.Generator(device).manual_seed(0)
    for name, weight in block.named_parameters():
        if ".lora_" in name:
            weight.data = 0.02 * torch.randn(weight.shape, device=device, generator=generator)  # float32
    frames, height, width = size.latent_shape
    positions = rotary_embeddings(transformer, frames, size.height, size.width, device)
    config = transformer.config
    channels = config.num_attention_heads * config.attention_head_dim
    lengths = frames * (height // 2) * (width // 2), config.max_text_seq_length  # video and text

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=DTYPE, generator=generator)

    inputs = [draw(1, length, channels).requires_grad_() for length in lengths]
    gradients = [draw(1, length, channels) for length in lengths]
    embedding = draw(1, config.time_embed_dim)
    if row.block == "ours":
        set_attention(transformer, row.backend)
        if row.scope != "none":
            checkpoint_activations(transformer, row.scope)
    if row.is_compiled:
        check_compiler(device)
        is_tiny = channels < 1024  # for which inductor's compilation would take longest by far
        compile_blocks(transformer, num_sizes=1, backend="aot_eager" if is_tiny else "inductor")
    call = partial(checkpoint, block, use_reentrant=False) if (row.block, row.scope) == ("library", "block") else block
    trained = [*inputs, *(weight for weight in block.parameters() if weight.requires_grad)]

    def step() -> tuple[float, float]:
        for tensor in trained:
            tensor.grad = None
        clock = Clock(device)
        with torch.autocast(device.type, DTYPE, cache_enabled=False):
            outputs = call(*inputs, embedding, positions)
        clock.mark()
        torch.autograd.backward(outputs, [one.to(out.dtype) for one, out in zip(gradients, outputs, strict=True)])
        clock.mark()
        return clock.read()

    return step, trained


class Clock:
    """Measures the ms between its creation and marks: by events of a GPU, or else by the time."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self.marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """End a part."""
        if self.is_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> tuple[float, ...]:
        """Return the ms of the parts; wait for the device."""
        wait_for_device()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return tuple(one.elapsed_time(two) if self.is_gpu else 1000 * (two - one) for one, two in pairs)


def kernels_of(function: Callable[[], Any], device: torch.device) -> list[tuple[str, int, float]]:
    """Profile a call; return name, calls and ms of the kernels, slowest first; on a CPU, of the operators."""
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        function()
    device_type = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in profile.key_averages() if event.device_type == device_type]
    kernels = [(event.key, event.count, round(getattr(event, time_of) / 1000, 4)) for event in events]
    return sorted(kernels, key=lambda kernel: -kernel[2])


if __name__ == "__main__":
    main()
