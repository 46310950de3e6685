"""How much memory activations take: what is kept for the backward pass, what computing takes meanwhile.

The activations are those of diffusers' `CogVideoXBlock` under autocast, where norms compute in float32: the list is
in `block_tensors`. A unit, there and below, is a tensor `[B, T, D]` of all tokens, text and video, in the compute
dtype.
"""

from dataclasses import dataclass
from math import prod

from data.buckets import count_tokens
from memory.activations import count_kept
from memory.facts import ModelFacts, Workload
from memory.settings import MemorySettings
from models.configs import ModelConfigs


_DECODER_TENSORS = 10, 7.5  # alive at once in the decoder's last layers, see `decoding_bytes`


def block_tensors(facts: ModelFacts, configs: ModelConfigs, settings: MemorySettings, workload: Workload) -> dict:
    """What autograd keeps of a transformer block that is not computed again: name -> bytes.

    Tensors of a few rows (modulations, gates) are left out. With autocast every layer casts its own input, so that
    layers which share one keep copies; without, they share it. LoRA: a frozen layer keeps nothing of its input, an
    adapter does. Full fine-tuning: every layer keeps its input, and what a gate or a scale is multiplied with.
    """
    length = count_tokens(configs.transformer, workload.size)
    tokens = workload.batch_size * length
    compute, norm = workload.compute_bytes, workload.norm_bytes
    unit, normed = tokens * facts.dim * compute, tokens * facts.dim * norm
    is_cast = compute != norm
    is_full = settings.method == "sft"

    def has_input(name: str) -> bool:
        return is_full or name in facts.adapters

    projections = sum(has_input(f"attn1.{name}") for name in ("to_q", "to_k", "to_v"))
    wide = 4 * unit
    tensors = {
        "input of the first norm": normed,
        "output of the first norm, for its scale": normed if is_full else 0,
        "inputs of the query, key and value projections": unit * (projections if is_cast else min(projections, 1)),
        "queries and keys before their norms": 2 * normed,
        "queries, keys and values": 3 * unit,
        "result of the attention": unit,
        "its copy with heads side by side": unit if has_input("attn1.to_out.0") else 0,
        "result of the attention's projection, for its gate": unit if is_full else 0,
        "input of the second norm": normed,
        "output of the second norm, for its scale": normed if is_full else 0,
        "input of the feed-forward": unit if has_input("ff.net.0.proj") else 0,
        "input of its activation": wide,
        "output of its activation": wide if has_input("ff.net.2") else 0,
        "result of the feed-forward, for its gate": unit if is_full else 0,
        "adapters between their two factors": tokens * compute * sum(facts.adapters.values()),
        "statistics of norms and attention": tokens * 4 * (2 * 2 + (2 * 2 + 1) * facts.heads),
    }
    if is_full and settings.trained_bytes != compute:
        tensors["weights in the compute dtype"] = compute * sum(
            one.numel for one in facts.block(0) if one.is_linear_weight
        )
    return tensors


@dataclass(frozen=True)
class KeptMemory:
    inputs: int
    last_input: int
    activations: int
    working_set: int
    on_host: int


_FEED_FORWARD = ("input of the feed-forward", "input of its activation", "output of its activation")


def kept_memory(facts: ModelFacts, configs: ModelConfigs, settings: MemorySettings, workload: Workload) -> KeptMemory:
    """Activations of the whole model, by when they are on the device."""
    tensors = block_tensors(facts, configs, settings, workload)
    block = sum(tensors.values())
    feed_forward = sum(tensors[name] for name in _FEED_FORWARD)
    length = count_tokens(configs.transformer, workload.size)
    tokens = workload.batch_size * length
    unit = tokens * facts.dim * workload.compute_bytes
    scope = settings.checkpoint_scope if settings.gradient_checkpointing else "none"
    every = settings.checkpoint_every
    kept = count_kept(scope, every, facts.num_blocks)
    one_input = tokens * facts.dim * workload.norm_bytes if scope == "feed-forward" else unit
    # The blocks of the working set are among the whole ones.
    at_once = min(every, facts.num_blocks) if scope == "segment" else 1
    on_device = min(kept.inputs, 2) if settings.offload_checkpoints else kept.inputs
    # Where the first norm takes its input as it is, that is the checkpoint's.
    shared = unit if kept.inputs and scope != "feed-forward" and workload.norm_bytes == workload.compute_bytes else 0
    return KeptMemory(
        inputs=on_device * one_input,
        last_input=min(on_device, 1) * one_input,
        activations=(kept.whole_blocks - at_once) * block + kept.without_feed_forward * (block - feed_forward),
        working_set=at_once * block + _backward_extra(facts, settings, workload, unit) - shared,
        on_host=(kept.inputs - on_device) * one_input,
    )


def _backward_extra(facts: ModelFacts, settings: MemorySettings, workload: Workload, unit: int) -> int:
    """What the backward pass of a block has beside what was kept, at its peak in the feed-forward.

    That is the gradient of what came in, and those of the activation's output and input, 4 units each; full
    fine-tuning has let go of the output itself by then, which an adapter alone does not keep. A quantized weight is
    there in the compute dtype too.
    """
    wide = 4 * unit * (2 if "ff.net.2" not in facts.adapters and settings.method == "lora" else 1)
    largest = max((one.numel for one in facts.block(0) if one.is_linear_weight), default=0)
    dequantized = largest * workload.compute_bytes if settings.quantize_base != "none" else 0
    return unit + wide + dequantized


def batch_bytes(facts: ModelFacts, configs: ModelConfigs, workload: Workload) -> int:
    """Moments, latents, noise and prediction, prompt embeddings, positions."""
    length = count_tokens(configs.transformer, workload.size)
    latents = workload.batch_size * prod(workload.size.latent_shape) * facts.latent_channels
    embeds = workload.batch_size * facts.text_tokens * facts.text_dim * workload.compute_bytes
    positions = 2 * (length - facts.text_tokens) * (facts.dim // facts.heads) * 4 if facts.has_rotary else 0
    return 8 * 4 * latents + embeds + positions  # about eight tensors of the latents' size in float32


def sampling_bytes(facts: ModelFacts, configs: ModelConfigs, workload: Workload) -> int:
    """The peak of a denoising step, which keeps nothing for a backward pass: in the attention where there are rotary
    positions, which are applied in float32, else in the feed-forward."""
    length = count_tokens(configs.transformer, workload.sampled)
    tokens = (2 if workload.is_guided else 1) * length
    unit, normed = tokens * facts.dim * workload.compute_bytes, tokens * facts.dim * workload.norm_bytes
    rotary = 3 * tokens * facts.dim * 4 if facts.has_rotary else 0
    # The input, the residual, values; normed, joined with the text, queries, keys.
    attention = 3 * unit + 4 * normed + rotary
    feed_forward = 3 * unit + normed + 2 * 4 * unit
    return max(attention, feed_forward)


def decoding_bytes(facts: ModelFacts, configs: ModelConfigs, workload: Workload) -> int:
    """The peak of decoding a validation video by tiles, in the decoder's last layers but one, and the video itself.

    The decoder takes two latent frames at a time, three at first where their number is odd. In its last up block
    about ten tensors of that many frames at full size are alive at once: a residual, a normed and its two modulations,
    a padded copy, what is being computed, and what each layer keeps of the frames before, if there are any.
    """
    frames, height, width = workload.sampled.latent_shape
    at_once = 9 if frames % 2 else 8
    tensors = _DECODER_TENSORS[0 if frames > 3 else 1]
    tile = min(height * 8, configs.vae["sample_height"] // 2) * min(width * 8, configs.vae["sample_width"] // 2)
    videos = 2 * prod(workload.sampled) * 3 * workload.compute_bytes  # the tiles, and what they are joined to
    return videos + int(tensors * facts.decoder_channels * at_once * tile * workload.compute_bytes)
