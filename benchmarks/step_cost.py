"""Count what a training step costs at full size: arithmetic, memory traffic, operators, waits, peak memory.

    make step-cost                                              # all rows, as the table of assets/docs/training.md
    python benchmarks/step_cost.py --only "5b LoRA, block"      # with PYTHONPATH=training:assets/scripts

Neither a GPU nor a model is needed: the step runs on torch's fake tensors, which have shapes and no values, with the
operators of a GPU. Blocks are alike, so a few are counted and the rest extrapolated.

The peers are the plain steps of diffusers' `train_cogvideox_lora.py` and of the original CogVideoX Factory: the
library's transformer with its gradient checkpointing under autocast, AdamW, and the values that they read each step.
"""

import argparse
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torchao.quantization import quantize_

from data.buckets import Bucket
from flags.optimizer import OptimizerFlags
from make_full_size_model import full_size_configs
from memory.activations import checkpoint_activations
from memory.block_streaming import BlockStream, plain_parts, rebuilt, stream_blocks
from memory.settings import GB
from methods.full import FullFinetune
from methods.lora import Lora
from models.attention import set_attention
from models.configs import ModelConfigs
from models.quantization import compute_frozen, quantize_remaining, quantize_transformer
from optimizers.build import make_optimizer


@register_flop_formula(torch.ops.bitsandbytes.gemm_4bit)
def count_gemm_4bit(rows: torch.Size, packed: torch.Size, weight: list[int], *_: Any, **__: Any) -> int:
    """Return the operations of a product with a weight `[out, in]` in nf4."""
    return 2 * rows.numel() * weight[0]


SIZE = Bucket(49, 480, 720)
PHASES = ("forward", "backward", "recomputed")


@dataclass(frozen=True)
class StepRow:
    """A model and the settings of a training step of one clip."""

    name: str
    model: str = "5b"
    method: str = "lora"  # lora, sft
    scope: str = "none"  # of --checkpoint_scope; none without --gradient_checkpointing
    every: int = 1
    base: str = "none"  # of --quantize_base
    streams: bool = False  # --stream_blocks
    peer: str = ""  # diffusers, original factory; "" for our own step


ROWS = (
    StepRow("5b LoRA, diffusers' example", scope="block", peer="diffusers"),
    StepRow("5b LoRA, original factory", scope="block", peer="original factory"),
    StepRow("5b LoRA, block", scope="block"),
    StepRow("5b LoRA, all-but-attention", scope="all-but-attention"),
    StepRow("5b LoRA, segments of two", scope="segment", every=2),
    StepRow("5b LoRA, every second block", scope="block", every=2),
    StepRow("5b LoRA, feed-forward", scope="feed-forward"),
    StepRow("5b LoRA, none"),
    StepRow("5b LoRA, none, fp8 base", base="fp8"),
    StepRow("5b LoRA, all-but-attention, fp8 base", scope="all-but-attention", base="fp8"),
    StepRow("5b LoRA, all-but-attention, int8 base", scope="all-but-attention", base="int8"),
    StepRow("5b LoRA, all-but-attention, nf4 base", scope="all-but-attention", base="nf4"),
    StepRow("5b LoRA, all-but-attention, streamed", scope="all-but-attention", streams=True),
    StepRow("5b LoRA, all-but-attention, streamed int8 base", scope="all-but-attention", base="int8", streams=True),
    StepRow("5b full, block", method="sft", scope="block"),
    StepRow("2b LoRA, block", model="2b", scope="block"),
    StepRow("2b full, block", model="2b", method="sft", scope="block"),
)


@dataclass(frozen=True)
class Card:
    """Assumed rates of a card: what kernels reach, not the data sheet's peak; attention is in bfloat16."""

    linear: float  # TFLOP/s in bfloat16
    fp8: float | None  # TFLOP/s; None where there are no such products
    attention: float  # TFLOP/s of the forward pass
    attention_backward: float  # TFLOP/s
    traffic: float  # TB/s


CARDS = {
    "H200": Card(680, 1360, 430, 400, 4.0),
    "A100": Card(250, None, 190, 160, 1.6),
    "RTX 4090": Card(150, 300, 140, 120, 0.9),
    "RTX 3090": Card(62, None, 55, 45, 0.8),
}


@dataclass
class StepCost:
    """Counts of a step; linear in the number of blocks, so that costs can be added and scaled."""

    # (phase, "linear", "fp8" or "attention") -> operations
    flop: Counter[tuple[str, str]] = field(default_factory=Counter)
    traffic: float = 0.0  # bytes read and written outside matrix products
    operators: float = 0.0  # that launch at least one kernel
    waits: float = 0.0  # values read by the CPU, which waits for the GPU
    peak: float = 0.0  # bytes of tensors

    def extrapolated(self, more: "StepCost", times: float) -> "StepCost":
        """Return this cost plus `times` the difference of `more` to it."""

        def add(mine: float, other: float) -> float:
            return mine + times * (other - mine)

        flop = Counter({key: add(self.flop[key], more.flop[key]) for key in self.flop | more.flop})
        numbers = {name: add(getattr(self, name), getattr(more, name)) for name in vars(self) if name != "flop"}
        return StepCost(flop, **numbers)

    def tflop(self, phase: str) -> float:
        """Return the TFLOP of one of PHASES."""
        return 1e-12 * sum(count for key, count in self.flop.items() if key[0] == phase)

    def seconds(self, card: Card) -> float | None:
        """Estimate the duration on a card: products and traffic one after another, nothing else; None without fp8."""
        rates = {"linear": card.linear, "fp8": card.fp8, "attention": card.attention}
        if card.fp8 is None and any(kind == "fp8" for _, kind in self.flop):
            return None
        total = self.traffic / (1e12 * card.traffic)
        for (phase, kind), count in self.flop.items():
            rate = card.attention_backward if (phase, kind) == ("backward", "attention") else rates[kind]
            total += count / (1e12 * rate)
        return total


class StepCounter(TorchDispatchMode):
    """Counts the operators that run inside it, on fake tensors.

    The peak is that of the tensors created in it; `resident` tensors are neither counted nor freed.
    """

    def __init__(self, resident: list[torch.Tensor]) -> None:
        super().__init__()
        self.cost = StepCost()
        self.bytes_by_operator: Counter[str] = Counter()  # traffic, for a look at what is left
        self.phase = "forward"
        self._now = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in resident}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(map(is_traceable_wrapper_subclass, _tensors((args, kwargs)))):
            return NotImplemented  # a quantized tensor then calls operators on its parts
        if function is torch.ops.aten._local_scalar_dense.default:
            self.cost.waits += self.phase != "optimizer"  # AdamW's own step counts are on the CPU
            return 1.0
        result = function(*args, **kwargs)
        outputs = _tensors(result)
        inputs = _tensors((args, {name: value for name, value in kwargs.items() if name != "out"}))
        self._allocate(outputs)
        if function in flop_registry or function._overloadpacket in flop_registry:
            self._count_product(function, args, kwargs, result)
        elif not _only_views(function, inputs, outputs):
            self.cost.operators += 1
            moved = sum(map(_touched_bytes, [*inputs, *outputs]))
            self.cost.traffic += moved
            self.bytes_by_operator[str(function)] += moved
        return result

    def _count_product(self, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        count = flop_registry[function._overloadpacket](*args, **kwargs, out_val=result)
        name = str(function)
        kind = "attention" if "attention" in name else "fp8" if "scaled_mm" in name else "linear"
        # In the backward pass, only a checkpoint that computes again has hooks on what autograd saves.
        is_again = self.phase == "backward" and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        self.cost.flop["recomputed" if is_again else self.phase, kind] += count
        self.cost.operators += 1

    def _allocate(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen and tensor.device.type != "meta":
                self._seen.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.cost.peak = max(self.cost.peak, self._now)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements, those of an expanded one once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def _only_views(function: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Return whether an operator launches nothing: it returns views, or memory that nothing has written yet."""
    if function._schema.is_mutable:
        return False
    if "empty" in function._schema.name:
        return True
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in storages for tensor in outputs)


def count_step(row: StepRow) -> StepCost:
    """Count a step of a row at full size."""
    configs = full_size_configs(row.model)
    first, second = 2 * row.every, 3 * row.every
    costs = [count_layers(row, configs, layers)[0] for layers in (first, second)]
    return costs[0].extrapolated(costs[1], (configs.transformer["num_layers"] - first) / (second - first))


def count_layers(row: StepRow, configs: ModelConfigs, layers: int) -> tuple[StepCost, Counter[str]]:
    """Count a step with so many blocks; return the traffic by operator too."""
    configs = replace(configs, transformer=configs.transformer | {"num_layers": layers})
    transformer, stream = build(row, configs), None
    with FakeTensorMode(allow_non_fake_inputs=True), gpu_like():
        # The peers keep adapters in the precision of the base.
        fake_model(transformer, torch.bfloat16, trained=torch.bfloat16 if row.peer else torch.float32)
        if row.streams:
            stream = stream_blocks(transformer, torch.device("cpu"), scope=row.scope, every=row.every)
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(row, parameters)
        inputs, target = fake_inputs(configs, SIZE, 1, torch.bfloat16), torch.empty(1)
        weights = resident_weights(transformer, stream)
        resident = [*weights, *_tensors([list(state.values()) for state in optimizer.state.values()])]
        with StepCounter([*resident, *_tensors(inputs), target]) as counter:
            loss = (transformer(**inputs)[0].float() - target).square().mean()
            counter.phase = "backward"
            loss.backward()
            end_step(row, parameters, optimizer, counter, loss)
    counter.cost.peak += sum(tensor.nbytes for tensor in resident)
    return counter.cost, counter.bytes_by_operator


def build(row: StepRow, configs: ModelConfigs) -> CogVideoXTransformer3DModel:
    """Build a transformer without memory as the row trains it, except for streams."""
    method = Lora(64, 64) if row.method == "lora" else FullFinetune()
    if row.peer:
        with torch.device("meta"):
            transformer = CogVideoXTransformer3DModel.from_config(configs.transformer).requires_grad_(False).train()
            targets = ["to_k", "to_q", "to_v", "to_out.0"]
            transformer.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=targets))
        transformer.enable_gradient_checkpointing()
        return transformer
    transformer = on_meta(configs, method, row.base)
    if row.scope != "none" and not row.streams:
        checkpoint_activations(transformer, row.scope, row.every)
    return transformer


def resident_weights(transformer: CogVideoXTransformer3DModel, stream: BlockStream | None) -> list[torch.Tensor]:
    """Return the tensors with the weights on the device: of streamed blocks the slots."""
    named = transformer.named_parameters()
    kept = [weight for name, weight in named if not stream or weight.requires_grad or "blocks." not in name]
    return [*(stream.slots if stream else ()), *(part for weight in kept for part in plain_parts(weight))]


def quantize_blocks(transformer: CogVideoXTransformer3DModel, base: str) -> None:
    """Quantize as loading does: int8, fp8 or nf4."""
    transformer.transformer_blocks.to(torch.bfloat16)
    if base == "nf4":
        quantize_remaining(transformer, base, torch.bfloat16)
    else:
        config = quantize_transformer(base, torch.bfloat16, torch.device("cpu"))
        quantize_(transformer.transformer_blocks, config.quant_type)
    compute_frozen(transformer, in_fp8=base == "fp8")


def build_optimizer(row: StepRow, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Build AdamW with its states."""
    if row.peer:
        optimizer = torch.optim.AdamW(parameters, foreach=True)
    else:
        optimizer = make_optimizer(parameters, OptimizerFlags("adamw"), 1e-4)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def end_step(
    row: StepRow,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    counter: StepCounter,
    loss: torch.Tensor,
) -> None:
    """Clip, step, and read what the row's script reads in every step."""
    if row.peer == "original factory":
        norm_by_parameter(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    if row.peer == "original factory":
        norm_by_parameter(parameters)
    if row.peer:
        loss.item()
    counter.phase = "optimizer"
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def norm_by_parameter(parameters: list[torch.nn.Parameter]) -> float:
    """Compute the norm of the gradients on the CPU, from the norm of each parameter's gradient."""
    return sum(parameter.grad.norm(2).item() ** 2 for parameter in parameters) ** 0.5


@contextmanager
def gpu_like() -> Iterator[None]:
    """A GPU's autocast, attention and dropout for fake tensors on the CPU: autograd runs on none of a missing GPU."""
    functional = torch.nn.functional
    attend, norm, drop = functional.scaled_dot_product_attention, functional.layer_norm, functional.dropout

    def attend_on_gpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        half = [tensor.to(torch.bfloat16) for tensor in (query, key, value)]
        return torch.ops.aten._scaled_dot_product_flash_attention(*half, 0.0, False, False)[0]

    def norm_on_gpu(states: torch.Tensor, shape: Any, *weights: torch.Tensor | None, **options: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):  # a GPU's computes norms in float32 and returns it
            states = states.float()
            weights = tuple(value.float() if isinstance(value, torch.Tensor) else value for value in weights)
        return norm(states, shape, *weights, **options)

    def drop_on_gpu(inputs: torch.Tensor, p: float, training: bool, inplace: bool) -> torch.Tensor:
        return torch.ops.aten.native_dropout(inputs, p, True)[0] if p and training else inputs

    functional.scaled_dot_product_attention, functional.layer_norm = attend_on_gpu, norm_on_gpu
    functional.dropout = drop_on_gpu
    try:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            yield
    finally:
        functional.scaled_dot_product_attention, functional.layer_norm, functional.dropout = attend, norm, drop


def on_meta(configs: ModelConfigs, method: Lora | FullFinetune, base: str = "none") -> CogVideoXTransformer3DModel:
    """Build a transformer without memory as a run does, made trainable by the method."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(configs.transformer)
        if base != "none":
            quantize_blocks(transformer, base)
        method.attach(transformer)
        set_attention(transformer)
    return transformer.train()


def fake_model(model: torch.nn.Module, dtype: torch.dtype, *, trained: torch.dtype = torch.float32) -> None:
    """Replace the tensors of a model on the meta device by fake ones, in its CPU's memory; quantize nf4 weights.

    Args:
        dtype: of frozen weights that are not quantized.
        trained: dtype of trainable ones.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            kind = trained if parameter.requires_grad else dtype
            if is_traceable_wrapper_subclass(parameter):
                fake = rebuilt(parameter, lambda part: torch.empty_like(part, device="cpu"))
            else:
                fake = torch.empty(parameter.shape, dtype=kind)
            fake, state = quantize_4bit(fake, quant_type="nf4") if type(parameter) is Params4bit else (fake, None)
            module._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
            if state is not None:
                module._parameters[name].quant_state = state
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=dtype)


def fake_inputs(configs: ModelConfigs, size: Bucket, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return a transformer's inputs for clips of a size."""
    config = configs.transformer
    frames, height, width = size.latent_shape
    video = frames * (height // 2) * (width // 2)
    head = config["attention_head_dim"]
    positions = [torch.empty(video, head) for _ in range(2)]
    return {
        "hidden_states": torch.empty(batch, frames, config["in_channels"], height, width, dtype=dtype),
        "encoder_hidden_states": torch.empty(batch, 226, config["text_embed_dim"], dtype=dtype),
        "timestep": torch.empty(batch, dtype=torch.int64),
        "image_rotary_emb": positions if config["use_rotary_positional_embeddings"] else None,
        "return_dict": False,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=[row.name for row in ROWS], help="names of rows")
    parser.add_argument("--by_operator", action="store_true", help="print the traffic of a block by operator")
    args = parser.parse_args()
    rows = [row for row in ROWS if not args.only or row.name in args.only]
    print("\n".join(table(rows)))
    if args.by_operator:
        for row in rows:
            few, many = (count_layers(row, full_size_configs(row.model), row.every * n)[1] for n in (2, 3))
            many.subtract(few)
            print(f"\n{row.name}, GB a block:")
            print(*(f"{moved / 1e9 / row.every:6.2f} {name}" for name, moved in many.most_common(14)), sep="\n")


def table(rows: list[StepRow]) -> list[str]:
    """Return the lines of the table in markdown."""
    head = ["step", *PHASES, "TFLOP", "GB moved", "operators", "waits", "peak GB", *(f"{card}, s" for card in CARDS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cost = count_step(row)
        phases = [cost.tflop(phase) for phase in PHASES]
        counts = (*phases, sum(phases), cost.traffic / 1e9, cost.operators, cost.waits)
        cells = [row.name, *(f"{count:,.0f}" for count in counts), f"{cost.peak / GB:.1f}"]
        cells += [f"{seconds:.1f}" if seconds else "" for seconds in map(cost.seconds, CARDS.values())]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
