"""Calculate the memory of activations: those kept for the backward pass, and those alive during a computation.

They are the activations of `models.blocks`, listed in `block_tensors`. A unit is a tensor `[B, T, D]` of all tokens,
text and video, in the compute dtype.
"""

from collections.abc import Mapping
from math import ceil, prod
from typing import Any

from data.buckets import Bucket
from memory.activations import count_kept
from memory.facts import ModelFacts, Workload
from memory.settings import MemorySettings
from methods.full import FullFinetune
from methods.lora import Lora


_ATTENTION = ("result of the attention", "statistics of the attention")
_FEED_FORWARD = ("input of the feed-forward", "input of its activation", "output of its activation")


def block_tensors(facts: ModelFacts, settings: MemorySettings, workload: Workload) -> dict[str, int]:
    """Return the tensors that autograd keeps of a transformer block that is not computed again: name -> bytes.

    Tensors of a few rows (modulations, gates) are omitted. LoRA: a frozen layer keeps no input, an adapter does. Full
    fine-tuning: every layer keeps its input, and so do gates.
    """
    tokens = ceil(workload.batch_size * facts.count_tokens(workload.size))
    compute = workload.compute_bytes
    unit = tokens * facts.dim * compute
    is_full = settings.method == "sft"

    def has_input(name: str) -> bool:
        return is_full or (name in facts.adapters and not _copies_inputs(facts.method, compute))

    wide = 4 * unit
    trains_gates = is_full or any(name.startswith("norm") for name in facts.adapters)
    tensors = {
        "input of the first norm": unit,
        "input of the projections": unit
        if any(has_input(f"attn1.{name}") for name in ("to_q", "to_k", "to_v"))
        else 0,
        "queries and keys before their norms": 2 * unit,
        "queries, keys and values": 3 * unit,
        "result of the attention": unit,
        "result of the attention's projection, for its gate": unit if trains_gates else 0,
        "input of the second norm": unit,
        "input of the feed-forward": unit if has_input("ff.net.0.proj") else 0,
        "input of its activation": wide,
        "output of its activation": wide if has_input("ff.net.2") else 0,
        "result of the feed-forward, for its gate": unit if trains_gates else 0,
        "adapters": _adapter_bytes(facts, tokens, compute),
        "statistics of norms": tokens * 4 * (2 * 2 + 2 * 2 * facts.heads),
        "statistics of the attention": tokens * 4 * facts.heads,
    }
    if is_full and settings.trained_bytes != compute:
        tensors["weights in the compute dtype"] = compute * sum(facts.linear_weights)
    return tensors


def _copies_inputs(method: Lora | FullFinetune, compute: int) -> bool:
    """Return whether each adapter has its own copy of the layer's input: after dropout, or in another precision."""
    if isinstance(method, FullFinetune):
        return False
    return method.dropout > 0 or (compute < 4 and (method.use_dora or method.adapter == "lokr"))


def _adapter_bytes(facts: ModelFacts, tokens: int, compute: int) -> int:
    """Return what the adapters of a block keep besides the inputs of layers that they share.

    A LoRA keeps what is between its factors. DoRA and dropout are left to peft: it casts inputs, keeps the mask of the
    dropout, and for DoRA the outputs of layer and adapter and an identity matrix. A LoKr or LoHa keeps the product of
    its factors, which is as large as the layer's weight.
    """
    method, layers = facts.method, facts.adapters
    if isinstance(method, FullFinetune):
        return 0
    # The layers of norms see one vector a sample.
    on_tokens = [layer for name, layer in layers.items() if not name.startswith("norm")]
    inputs = tokens * sum(layer.inputs for layer in on_tokens)
    numbers = inputs if _copies_inputs(method, compute) else 0
    if method.adapter == "lora":
        numbers += tokens * sum(layer.rank for layer in on_tokens)
    else:
        numbers += sum(layer.inputs * layer.outputs for layer in layers.values())
    if method.use_dora:
        numbers += 2 * tokens * sum(layer.outputs for layer in on_tokens)
        numbers += sum(layer.inputs**2 for layer in layers.values())
    return compute * numbers + (inputs if method.dropout else 0)


def kept_memory(facts: ModelFacts, settings: MemorySettings, workload: Workload) -> tuple[dict[str, int], int]:
    """Return the bytes of activations on the device, by their names in `MemoryAccount`, and on the host."""
    tensors = block_tensors(facts, settings, workload)
    block = sum(tensors.values())
    feed_forward = sum(tensors[name] for name in _FEED_FORWARD)
    size = ceil(workload.batch_size * facts.count_tokens(workload.size)) * facts.dim
    unit = size * workload.compute_bytes
    scope = settings.checkpoint_scope if settings.gradient_checkpointing else "none"
    every = settings.checkpoint_every
    kept = count_kept(scope, every, facts.num_blocks)
    attention = sum(tensors[name] for name in _ATTENTION)
    # The blocks of the working set are among the complete ones.
    at_once = min(every, facts.num_blocks) if scope == "segment" else 1
    on_device = min(kept.inputs, 2) if settings.offload_checkpoints else kept.inputs
    # The first norm shares its input with the checkpoint.
    shared = unit if kept.inputs and scope != "feed-forward" else 0
    complete, partial = kept.complete_blocks - at_once, kept.without_feed_forward
    return {
        "kept_inputs": on_device * unit,
        "last_input": min(on_device, 1) * unit,
        "kept_activations": complete * block
        + partial * (block - feed_forward)
        + max(kept.attentions - 1, 0) * attention,
        "working_set": at_once * block + _backward_extra(facts, settings, workload, unit) - shared,
    }, (kept.inputs - on_device) * unit


def _backward_extra(facts: ModelFacts, settings: MemorySettings, workload: Workload, unit: int) -> int:
    """Return what the backward pass of a block adds to the kept activations, at its peak in the feed-forward.

    That is the gradient of the block's output, and those of the feed-forward activation's output and input, 4 units
    each. Where the activation's output was kept, it is freed by then and makes room for one of them. A quantized
    weight is also there in the compute dtype. Of adapters on the feed-forward, the product of a LoKr or LoHa is there
    in float32, unscaled too, and so is the activation's output where peft casts it or drops a part.
    """
    method, compute = facts.method, workload.compute_bytes
    wide = 4 * unit * (2 if "ff.net.2" not in facts.adapters and settings.method == "lora" else 1)
    dequantized = max(facts.linear_weights) * compute if settings.quantize_base != "none" else 0
    products = [one.inputs * one.outputs for name, one in facts.adapters.items() if name.startswith("ff.")]
    in_float32 = 2 * 4 * max(products, default=0) if settings.method == "lora" and method.adapter != "lora" else 0
    if "ff.net.2" in facts.adapters and _copies_inputs(method, compute):
        copies = (compute < 4) * (1 + method.use_dora) + (method.dropout > 0)
        in_float32 += copies * 4 * unit * 4 // compute
    return unit + wide + dequantized + in_float32


def batch_bytes(facts: ModelFacts, workload: Workload) -> int:
    """Return the bytes of a batch, and of latents, noise and velocities beside it.

    A batch has moments of clips and of what is given with them, prompt embeddings, positions, masks, and the pixels of
    raw clips.
    """
    config, channels = facts.configs.transformer, facts.configs.vae["latent_channels"]
    batch_size, size = ceil(workload.batch_size), workload.size
    frames, height, width = size.latent_shape
    given = _given_frames(facts, workload)
    given_latents = given if given == 2 else ceil(given / 4)
    text_tokens = config["max_text_seq_length"]
    moments = 2 * channels * (frames + given_latents) * height * width
    per_sample = (moments + text_tokens * config["text_embed_dim"]) * workload.compute_bytes
    per_sample += 8 * 4 * channels * frames * height * width  # eight tensors of the latents' size in float32
    if workload.has_masks:
        per_sample += (2 + 4) * frames * height * width  # in half precision, and the weights of positions
    if workload.is_raw:
        per_sample += 3 * (size.num_frames + given) * size.height * size.width
    num_bytes = batch_size * per_sample
    if config["use_rotary_positional_embeddings"]:
        num_bytes += 2 * (facts.count_tokens(workload.size) - text_tokens) * (facts.dim // facts.heads) * 4
    return num_bytes


def _given_frames(facts: ModelFacts, workload: Workload) -> int:
    """Return the frames that the transformer sees of each clip: all of a control, some of the clip, or none."""
    if facts.configs.is_control:
        return workload.size.num_frames
    return workload.given_frames if facts.configs.is_image_to_video else 0


def sampling_bytes(facts: ModelFacts, workload: Workload) -> int:
    """Return the peak of a denoising step, which keeps nothing for a backward pass.

    It is in the feed-forward: the input of the block, the sum after its attention, the input of the feed-forward, and
    the input and the output of its activation. PAB keeps the attention's output of each block, FasterCache the last
    two, the first-block cache three outputs of blocks. The pipeline keeps the pixels of a control.
    """
    tokens = (2 if workload.is_guided else 1) * facts.count_tokens(workload.sampled)
    blocks = facts.num_blocks
    cached = {"none": 0, "first-block": 3, "pab": blocks, "faster": 2 * blocks}[workload.sampling_cache]
    pixels = 3 * prod(workload.sampled) if facts.configs.is_control else 0
    return ((3 + 2 * 4 + cached) * tokens * facts.dim + pixels) * workload.compute_bytes


def decoding_bytes(facts: ModelFacts, workload: Workload) -> int:
    """Return the peak of decoding a validation video by tiles, with the video itself.

    It is in the decoder's last up block. The decoder takes two latent frames at a time, or three at first if their
    number is odd. About ten tensors of that many frames at full size are alive at once: a residual, a normed and its
    two modulations, a padded copy, the result, and what each layer keeps of earlier frames, if there are any.
    The pixels of a control are still there; encoding them, by tiles too, took less.
    """
    vae = facts.configs.vae
    frames, height, width = workload.sampled.latent_shape
    at_once = 9 if frames % 2 else 8
    tensors = 10 if frames > 3 else 7.5
    tile = min(height * 8, vae["sample_height"] // 2) * min(width * 8, vae["sample_width"] // 2)
    videos = 3 if facts.configs.is_control else 2  # the tiles, the joined video, and the control
    videos *= prod(workload.sampled) * 3 * workload.compute_bytes
    return videos + int(tensors * vae["block_out_channels"][1] * at_once * tile * workload.compute_bytes)


def encoding_bytes(
    vae: Mapping[str, Any],
    size: Bucket,
    batch_size: int,
    itemsize: int,
    *,
    slicing: bool = False,
    tiling: bool = False,
) -> int:
    """Return the peak of encoding videos, without weights.

    It is in the encoder's first down block, at full size. The encoder takes eight frames at a time, and at first those
    that remain too: about five tensors of that many frames, and the frames that convolutions add. From the second time
    on, it also keeps what each layer needs of earlier frames. The library splits inputs of more than 2^30 numbers.

    Args:
        vae: its config.
        itemsize: bytes of a number.
        slicing: the videos are encoded one after another.
        tiling: a frame is encoded by tiles.
    """
    frames, height, width = size
    pixels = 3 * batch_size * frames * height * width * itemsize
    if tiling:
        height, width = min(height, vae["sample_height"] // 2), min(width, vae["sample_width"] // 2)
    numbers = (1 if slicing else batch_size) * height * width
    tensors = 16 + 4.8 * min(frames, 8 + frames % 8)  # of the block's channels, a frame each
    if frames >= 16:
        tensors = max(tensors, 75)
    channels = vae["block_out_channels"][0]
    if channels * (8 + 2) * numbers > 2**30:
        tensors *= 1.2
    return int(pixels + channels * tensors * numbers * itemsize)
