"""Calculate the memory of a run from the model's configs; needs neither weights nor a GPU.

The bytes that torch allocates for tensors are counted. A run takes more: the CUDA context (about half a gigabyte), the
work space of libraries, and what torch's allocator reserves beyond the tensors because of fragmentation.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from memory.activation_bytes import batch_bytes, decoding_bytes, encoding_bytes, kept_memory, sampling_bytes
from memory.facts import ModelFacts, ParameterFacts, Workload
from memory.pinned import power_above
from memory.settings import MemorySettings


_TINY = 4096  # numbers; low-precision optimizers keep smaller tensors in full precision
_STATE_BLOCKS = {"8bit": 256, "fp8": 256, "4bit": 128}  # numbers that share a scale in torchao's states


@dataclass(frozen=True)
class MemoryAccount:
    """Bytes by purpose; all on the device except `host`."""

    frozen_weights: int
    trained_weights: int
    averaged_weights: int  # of --use_ema
    optimizer_states: int
    gradient_buckets: int  # of DistributedDataParallel, which are the gradients
    gradients: int  # that exist at once, outside of buckets
    earlier_gradients: int  # those of the other blocks while the backward pass is in its last block
    largest_gradient: int
    kept_inputs: int  # of checkpoints, until their backward pass
    last_input: int  # of the checkpoint that the backward pass reaches last
    kept_activations: int  # of blocks that are not computed again
    working_set: int  # of one block, or segment, that is computed again, with its backward pass
    batch: int  # latents, embeddings, positions, pixels
    encoding: int  # of raw clips, without weights; 0 for prepared ones
    sampling: int  # a denoising step of the validation, without weights
    vae_weights: int  # of the part that is used, in validation and to encode raw clips
    decoding: int  # of the validation video, without weights
    weights_while_decoding: int  # of the transformer
    host: int  # in host memory

    @property
    def resident(self) -> int:
        """The bytes that are allocated all the time."""
        trained = self.trained_weights + self.averaged_weights + self.optimizer_states + self.gradient_buckets
        return self.frozen_weights + trained

    @property
    def training(self) -> int:
        """The peak of a training step.

        At the start of the backward pass all activations are allocated and no gradient, at its end all gradients and
        only the last checkpoint; in between, the gradients replace the activations.
        """
        start, end = self.kept_inputs + self.kept_activations, self.last_input + self.earlier_gradients
        backward = self.working_set + self.largest_gradient + max(start, end)
        vae = self.vae_weights if self.encoding else 0
        return self.resident + vae + self.batch + max(backward, self.gradients, self.encoding)

    @property
    def validation(self) -> int:
        """The peak of a validation between steps, without gradients; 0 without validation."""
        if not self.sampling:
            return 0
        # Where the transformer is moved away for the decoding, so is the VAE for the sampling.
        sampling = self.resident + self.sampling + (self.vae_weights if self.weights_while_decoding else 0)
        static = self.averaged_weights + self.optimizer_states + self.gradient_buckets + self.weights_while_decoding
        return max(sampling, static + self.vae_weights + self.decoding)

    @property
    def peak(self) -> int:
        """The peak of the run on the device."""
        return max(self.training, self.validation)


def account(facts: ModelFacts, settings: MemorySettings, workload: Workload) -> MemoryAccount:
    """Calculate the memory of a run of the model with the method of `settings`."""
    frozen, on_host = _frozen_weights(facts, settings, workload)
    weights = [parameter.numel * settings.trained_bytes for parameter in facts.trainable]
    states, states_on_host = _place_states(facts, settings, weights)
    gradients, earlier_gradients = (0, 0) if workload.is_replicated else _gradients(facts, settings, weights)
    kept, kept_on_host = kept_memory(facts, settings, workload)
    sampled, raw = workload.sampled, workload.is_raw
    vae_numel = facts.vae_numel if raw or facts.configs.takes_condition else facts.decoder_numel
    return MemoryAccount(
        frozen_weights=frozen,
        trained_weights=sum(weights),
        averaged_weights=sum(weights) if settings.use_ema else 0,
        optimizer_states=states,
        gradient_buckets=sum(weights) if workload.is_replicated else 0,
        gradients=gradients,
        earlier_gradients=earlier_gradients,
        largest_gradient=max(weights),
        **kept,
        batch=batch_bytes(facts, workload),
        sampling=sampling_bytes(facts, workload) if sampled else 0,
        encoding=_encoding(facts, workload) if raw else 0,
        vae_weights=vae_numel * workload.compute_bytes if sampled or raw else 0,
        decoding=decoding_bytes(facts, workload) if sampled else 0,
        weights_while_decoding=0 if settings.enable_model_cpu_offload else frozen + sum(weights),
        host=on_host + states_on_host + kept_on_host,
    )


def _encoding(facts: ModelFacts, workload: Workload) -> int:
    """Return the peak of encoding a batch's clips, and its controls after them: no given frames take more."""
    how = {"slicing": workload.slicing, "tiling": workload.tiling}
    batch_size = ceil(workload.batch_size)
    return encoding_bytes(facts.configs.vae, workload.size, batch_size, workload.compute_bytes, **how)


def _frozen_weights(facts: ModelFacts, settings: MemorySettings, workload: Workload) -> tuple[int, int]:
    """Return the bytes on the device and on the host."""
    by_block: Counter[int | None] = Counter()
    for one in facts.parameters:
        if not one.is_trainable:
            kind = settings.quantize_base if one.block is not None and one.is_linear_weight else "none"
            if kind == "nf4" and one.is_modulation:
                kind = "int8"
            by_block[one.block] += quantized_bytes(one.shape, kind, workload.compute_bytes)
    outside = by_block.pop(None, 0)
    if settings.stream_blocks:
        return outside + 2 * max(by_block.values()), by_block.total()
    return outside + by_block.total(), 0


def quantized_bytes(shape: Sequence[int], quantization: str, compute_bytes: int) -> int:
    """Return the bytes of a frozen weight with its scales; a quantized one, in int8, fp8 or nf4, is `[out, in]`."""
    numel = prod(shape)
    if quantization == "nf4":
        scales = -(-numel // 64)  # a byte each, with a scale for 256 of them, a mean and two tables
        return -(-numel // 2) + scales + 4 * -(-scales // 256) + 4 + 4 * 256 + 4 * 16
    if quantization == "int8":
        return numel + shape[0] * (4 + 1)  # a scale and a zero point a row
    if quantization == "fp8":
        return numel + shape[0] * 4
    return numel * compute_bytes


def state_bytes(parameter: ParameterFacts, settings: MemorySettings) -> int:
    """Return the bytes of the optimizer's states for a parameter, except single numbers such as its step count."""
    numel, full = parameter.numel, settings.trained_bytes
    if settings.optimizer == "prodigy":
        return 4 * numel * full  # two averages, the initial weights, and the sum that determines the step size
    if settings.optimizer == "came" and len(parameter.shape) > 1:
        rows, columns = numel // parameter.shape[-1], numel // parameter.shape[-2]
        return (numel + 2 * (rows + columns)) * full  # factors of the second average and of its confidence
    if settings.optimizer == "muon" and len(parameter.shape) == 2:
        return numel * full
    if settings.optimizer in ("adam", "adamw"):
        return _adam_bytes(numel, settings, full)
    return 2 * numel * full


def checkpoint_bytes(facts: ModelFacts, settings: MemorySettings) -> int:
    """Return the bytes of a checkpoint without small files: weights (and their average) in float32, states."""
    copies = 2 if settings.use_ema else 1
    return sum(4 * copies * parameter.numel + state_bytes(parameter, settings) for parameter in facts.trainable)


def _adam_bytes(numel: int, settings: MemorySettings, full: int) -> int:
    if settings.state_bits == 32 or numel < _TINY:
        return 2 * numel * full
    if settings.use_8bit and not settings.use_torchao:  # bitsandbytes
        return 2 * (numel + 4 * -(-numel // 256))  # all share two tables
    block = _STATE_BLOCKS["4bit" if settings.use_4bit else "fp8" if settings.use_fp8 else "8bit"]
    if numel % block:
        return 2 * numel * full
    table = 0 if settings.use_fp8 else 4 * 2**settings.state_bits
    return 2 * (numel * settings.state_bits // 8 + 4 * (numel // block) + table)


def _place_states(facts: ModelFacts, settings: MemorySettings, weights: Sequence[int]) -> tuple[int, int]:
    """Return the bytes of states on the device and, with copies of weights and gradients, on the host."""
    states = [state_bytes(parameter, settings) for parameter in facts.trainable]
    if not settings.use_cpu_offload_optimizer:
        return sum(states), 0
    is_on_host = [parameter.numel >= _TINY for parameter in facts.trainable]
    on_device = sum(size for size, away in zip(states, is_on_host, strict=True) if not away)
    # Each weight and each gradient is pinned separately, in a power of two.
    copies = sum(2 * power_above(size) for size, away in zip(weights, is_on_host, strict=True) if away)
    return on_device, sum(states) - on_device + copies


def _gradients(facts: ModelFacts, settings: MemorySettings, weights: Sequence[int]) -> tuple[int, int]:
    """Return the bytes of gradients on the device at once, and of those of other blocks than the computed one.

    `_place_states` counts the gradients that an offloaded optimizer has on the host.
    """
    by_block: Counter[int | None] = Counter()
    for one, size in zip(facts.trainable, weights, strict=True):
        by_block[one.block] += size
    one_block = max(by_block[number] for number in range(facts.num_blocks))
    if settings.step_in_backward:
        return max(weights), 0
    if settings.use_cpu_offload_optimizer and settings.offload_gradients:
        return one_block, one_block  # the copies may lag behind the backward pass
    return sum(weights), sum(weights) - one_block
