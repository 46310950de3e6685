"""Build a CogVideoX model small enough for a CPU: the real classes at tiny sizes, random weights, every file in place.

    python assets/scripts/make_tiny_model.py --kind 5b --output_dir demo/model

The folder loads with `CogVideoXPipeline.from_pretrained` (the I2V kinds with `CogVideoXImageToVideoPipeline`), about
8 MB. The configs of the five kinds differ as in the released models; only widths and depths are smaller.

Plain random weights would lose the colours, and their gates would be almost closed. So three things are adjusted. The
VAE encodes and decodes the mean colour of every block of 4 frames × 8 × 8 pixels, so that samples can be viewed. Its
scaled latents have mean 0 and standard deviation 1, with little posterior noise. The transformer depends on the text
and on the timestep, so that the loss of a LoRA falls visibly.
"""

import argparse
import json
import math
import string
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from clip_files import check_free, new_folder


if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, SchedulerMixin
    from torch import Tensor, nn
    from transformers import T5EncoderModel, T5Tokenizer


RECIPE = 2  # raise it with every change of weights or configs, so that old folders are refused
SETTINGS_FILE = "tiny_model.json"

TEXT_LENGTH = 226
TEXT_DIM = 64
TIME_EMBED_DIM = 64  # the ofs embedding is added to the time embedding, so it has the same size
POSTERIOR_STD = 0.1  # of the scaled latents
REFERENCE = 3.0  # see `carry_colours`
VAE_CHANNELS = (8, 16, 16, 32)
NUM_LAYERS, NUM_HEADS = 4, 4


@dataclass(frozen=True)
class TinyKind:
    """The differences between the released kinds, named as in the configs."""

    image_to_video: bool
    scaling_factor: float  # VAE
    invert_scale_latents: bool  # VAE
    snr_shift_scale: float  # scheduler
    # The scheduler that the authors recommend for sampling. The published folders name the DDIM one, which differs
    # in the sampling only: the noise schedule is the same.
    scheduler: str
    transformer: dict[str, object]


KINDS: dict[str, TinyKind] = {
    "2b": TinyKind(
        image_to_video=False,
        scaling_factor=1.15258426,
        invert_scale_latents=False,
        snr_shift_scale=3.0,
        scheduler="CogVideoXDDIMScheduler",
        transformer={"in_channels": 16},
    ),
    "5b": TinyKind(
        image_to_video=False,
        scaling_factor=0.7,
        invert_scale_latents=False,
        snr_shift_scale=1.0,
        scheduler="CogVideoXDPMScheduler",
        transformer={"in_channels": 16, "use_rotary_positional_embeddings": True},
    ),
    "5b-i2v": TinyKind(
        image_to_video=True,
        scaling_factor=0.7,
        invert_scale_latents=False,
        snr_shift_scale=1.0,
        scheduler="CogVideoXDPMScheduler",
        transformer={
            "in_channels": 32,
            "use_rotary_positional_embeddings": True,
            "use_learned_positional_embeddings": True,
        },
    ),
    "1.5-5b": TinyKind(
        image_to_video=False,
        scaling_factor=0.7,
        invert_scale_latents=True,
        snr_shift_scale=1.0,
        scheduler="CogVideoXDPMScheduler",
        transformer={
            "in_channels": 16,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
        },
    ),
    "1.5-5b-i2v": TinyKind(
        image_to_video=True,
        scaling_factor=0.7,
        invert_scale_latents=True,
        snr_shift_scale=1.0,
        scheduler="CogVideoXDPMScheduler",
        transformer={
            "in_channels": 32,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "ofs_embed_dim": TIME_EMBED_DIM,
        },
    ),
}

WORD_START = "▁"  # T5's mark for the space before a word
# Source of the tokenizer's pieces: the words of the demo captions, then frequent words of captions.
TOKENIZER_TEXT = """
a red circle moves from left to right over a plain white background
an orange square falls from top to bottom over a plain black background
a yellow triangle rises from bottom to top over a plain grey background
a green circle grows in the middle over a plain beige background
a blue square shrinks in the middle over a plain light blue background
a purple triangle moves from the top left to the bottom right over a plain dark green background
a pink circle moves from the bottom left to the top right over a plain navy blue background
A big grey rabbit crawls out of its burrow in a bright green meadow and stretches with a wide yawn.
Seen from above, the roof of a long vehicle drives along a street, then the shot cuts to a man in a dark suit.
A cyclist with a helmet waits at the edge of a busy street while cars and a white van rush past in the background.
An old bicycle leans against a worn wall, a pedestrian walks past on the pavement, the camera does not move.
A young man with brown hair talks to the camera in the back of a moving car, the landscape passes outside the window.
A woman in a long dress walks slowly through a quiet forest in the early morning, soft sunlight between tall trees.
The camera follows a small dog running along a sandy beach, waves rolling in behind it, a cloudy sky above the sea.
Close-up of hands cutting fresh vegetables on a wooden table in a warm kitchen, steam rising from a pot.
An aerial view of a city at night with shining lights, traffic moving through the streets between high buildings.
Cartoon animation of a mouse and a cat playing together in a colorful room, smooth motion, high quality, detailed.
Two children are sitting on a bench near a river, one of them throwing stones into the water, birds flying away.
"""


def build_tokenizer() -> "T5Tokenizer":
    """Return a T5 tokenizer with some hundred pieces: `<pad>` 0, `</s>` 1 (after every text), `<unk>` 2.

    The pieces are the frequent parts of the words above, with the logarithm of their frequency as their score. (The
    trainer of the `tokenizers` library would choose better ones, but others each time it runs.)
    """
    from transformers import T5Tokenizer

    counts = Counter(string.ascii_letters + string.digits + string.punctuation + WORD_START)
    for word in TOKENIZER_TEXT.split():
        marked = WORD_START + word
        counts.update(marked[i:j] for i, j in combinations(range(len(marked) + 1), 2))
    saved = {piece: count * (len(piece) - 1) for piece, count in counts.items()}  # tokens that the piece saves
    singles = sorted(piece for piece in counts if len(piece) == 1)
    longer = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-saved[piece], piece))
    pieces = singles + longer[:600]
    scores = [(piece, math.log(counts[piece] / counts.total())) for piece in pieces]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=special + scores, extra_ids=0, model_max_length=TEXT_LENGTH)


def build_text_encoder(vocab_size: int) -> "T5EncoderModel":
    """Return a T5 v1.1 encoder of two layers, [B, 226] token ids -> [B, 226, TEXT_DIM]."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def build_vae(kind: TinyKind, channels: Sequence[int] = VAE_CHANNELS) -> "AutoencoderKLCogVideoX":
    """Return the VAE with the released compression (4 in time, 8 in space, 16 channels) and thin layers.

    Args:
        channels: of its four levels; multiples of 8.
    """
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX(
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        # As released, whatever the native size: tiles are cut from it, and the overlap of small ones does not divide
        # by 8.
        sample_height=480,
        sample_width=720,
        scaling_factor=kind.scaling_factor,
        invert_scale_latents=kind.invert_scale_latents,
    ).eval()
    carry_colours(vae.encoder)
    calibrate(vae)
    return vae


def carry_colours(encoder: "nn.Module") -> None:
    """Change weights of the random encoder so that the colours reach the last layer unchanged.

    The group norm before the last layer takes the mean and the scale out of everything it sees, the brightness
    with it: a plain red clip and a plain blue one would give almost the same latents. So of every 8 channels (a group
    there) two are held at plus and minus REFERENCE and decide the scale; the other six are R, G, B and their
    negatives, so that the mean is 0 and SiLU loses nothing, as silu(u) - silu(-u) = u. Random weights remain on top.
    """
    import torch

    group = 8
    with torch.no_grad():
        for name, module in encoder.named_modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if name.endswith(("conv2.conv", "conv_in.conv", "downsamplers.0.conv", "conv_shortcut")):
                weight.mul_(0.1)
                bias.mul_(0.1)
            if name.endswith("downsamplers.0.conv"):  # mean of 2 × 2 pixels
                for channel in range(weight.shape[0]):
                    weight[channel, channel, :2, :2] += 0.25
            elif name.endswith("conv_shortcut"):  # the groups again and again
                for channel in range(weight.shape[0]):
                    weight[channel, channel % weight.shape[1]] += 1
        conv_in, conv_out = encoder.conv_in.conv, encoder.conv_out.conv
        conv_in.weight[:2] = 0
        conv_in.bias[:2] = torch.tensor([REFERENCE, -REFERENCE])
        for colour in range(3):
            conv_in.weight[2 + colour, colour, -1, 1, 1] += 1  # the kernel's last step in time is the present frame
            conv_in.weight[5 + colour, colour, -1, 1, 1] -= 1
        encoder.norm_out.weight.fill_(REFERENCE * math.sqrt(2 / group))
        centre = conv_out.weight[:, :, -1, 1, 1].clone()
        conv_out.weight.mul_(0.1)
        conv_out.weight[:, :, -1, 1, 1] = centre
        for reference in (0, 1):  # redundant, and the border would be visible, where padding is 0
            conv_out.weight[:, reference::group] = 0


def calibrate(vae: "AutoencoderKLCogVideoX") -> None:
    """Set the last layers: scaled latents with mean 0, deviation 1 and little noise, decoded to colours.

    Diffusion assumes latents of about unit variance, and where sampling noise outweighs the content there is nothing
    to learn. One pass over synthetic clips measures the mean and deviation of each channel, and the last layer of the
    encoder undoes them. The decoder's last norm adds a linear map of the latents themselves (its conv_b): it is
    chosen by least squares so that the clips' colours come out.
    """
    import torch

    scale = vae.config.scaling_factor
    channels = vae.config.latent_channels
    with torch.no_grad():
        clips = draw_calibration_clips()
        latents = vae.encode(clips).latent_dist.mean.double().movedim(1, -1).flatten(0, -2)
        shift, deviation = latents.mean(0), latents.std(0)
        # Rounded to three digits, as the last bits differ between machines.
        gain = (1 / (deviation * scale)).bfloat16().float()
        shift = shift.bfloat16().float()

        conv_out = vae.encoder.conv_out.conv
        conv_out.bias[:channels] = (conv_out.bias[:channels] - shift) * gain
        conv_out.weight[:channels] *= gain[:, None, None, None, None]
        conv_out.bias[channels:] = 2 * math.log(POSTERIOR_STD / scale)
        conv_out.weight[channels:] *= 0.1

        latents = (latents - shift) * gain
        ones = torch.ones(len(latents), 1, dtype=latents.dtype)
        fit = torch.linalg.lstsq(torch.cat([latents, ones], dim=1), block_colours(clips).double()).solution
        show_colours(vae.decoder, *fit.bfloat16().float().split([channels, 1]))


def show_colours(decoder: "nn.Module", matrix: "Tensor", offset: "Tensor") -> None:
    """Let the decoder show `latents @ matrix + offset`, with a little of the output of its random layers.

    Args:
        matrix: [16, 3], from latent channels to R, G, B.
        offset: [1, 3].
    """
    norm, conv_out = decoder.norm_out, decoder.conv_out.conv
    for parameter in (norm.conv_y.conv.weight, norm.conv_b.conv.weight, norm.conv_y.conv.bias, norm.conv_b.conv.bias):
        parameter.mul_(0.05)
    conv_out.weight.mul_(0.1)
    conv_out.bias.zero_()
    for colour in range(3):
        for channel, sign in ((2 * colour, 1), (2 * colour + 1, -1)):  # silu(u) - silu(-u) = u, as in the encoder
            norm.conv_b.conv.weight[channel] = sign * matrix[:, colour, None, None, None]
            norm.conv_b.conv.bias[channel] = sign * offset[0, colour]
            conv_out.weight[colour, channel, -1, 1, 1] += sign


def draw_calibration_clips(count: int = 24, frames: int = 9, size: int = 48) -> "Tensor":
    """Draw plain backgrounds with two moving rectangles: [count, 3, frames, size, size] in [-1, 1]."""
    import torch

    def draw_colours(*shape: int) -> "Tensor":
        # Half of the variance is brightness, which the three channels share, as in photographs.
        return ((torch.randn(count, 1, *shape) + torch.randn(count, 3, *shape)) * 0.6).clamp(-1, 1)

    clips = draw_colours(1, 1, 1).expand(-1, -1, frames, size, size).clone()
    for _ in range(2):
        colours = draw_colours(1, 1)
        sides = torch.randint(size // 4, size // 2, (count, 2))
        ends = torch.rand(2, count, 2)  # first and last place, as fractions of the free space
        for clip in range(count):
            side_y, side_x = sides[clip].tolist()
            for frame in range(frames):
                place = torch.lerp(ends[0, clip], ends[1, clip], frame / (frames - 1)) * (size - sides[clip])
                y, x = place.long().tolist()
                clips[clip, :, frame, y : y + side_y, x : x + side_x] = colours[clip]
    return clips


def block_colours(clips: "Tensor") -> "Tensor":
    """Return each latent's mean colour, [N, 3]: of 8 × 8 pixels of the first frame, then of four frames."""
    import torch
    from torch.nn.functional import avg_pool3d

    first, others = clips[:, :, :1], clips[:, :, 1:]
    blocks = torch.cat([avg_pool3d(first, (1, 8, 8)), avg_pool3d(others, (4, 8, 8))], dim=2)
    return blocks.movedim(1, -1).flatten(0, -2)


def build_scheduler(kind: TinyKind, class_name: str) -> "SchedulerMixin":
    """Return a scheduler of that class of diffusers, with the noise schedule of the released models of the kind."""
    import diffusers

    return getattr(diffusers, class_name)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=kind.snr_shift_scale,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_transformer(
    kind: TinyKind,
    height: int,
    width: int,
    num_frames: int,
    num_layers: int = NUM_LAYERS,
    num_heads: int = NUM_HEADS,
) -> "CogVideoXTransformer3DModel":
    """Return the transformer, with heads of 32. Its native size is height × width × num_frames of the video."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_layers=num_layers,
        num_attention_heads=num_heads,
        attention_head_dim=32,
        time_embed_dim=TIME_EMBED_DIM,
        text_embed_dim=TEXT_DIM,
        max_text_seq_length=TEXT_LENGTH,
        sample_height=height // 8,
        sample_width=width // 8,
        sample_frames=num_frames,
        **kind.transformer,
    ).eval()
    with torch.no_grad():
        # Initialized randomly, the layers almost ignore timestep and text: the time embedding hardly varies,
        # the gates are near 0, and attention is an even mean over all tokens. LoRA would have as little effect.
        transformer.time_embedding.linear_2.weight.mul_(4)
        for block in transformer.transformer_blocks:
            block.attn1.norm_q.weight.fill_(2)
            block.attn1.norm_k.weight.fill_(2)
            for norm in (block.norm1, block.norm2):
                _, _, gate, _, _, text_gate = norm.linear.bias.chunk(6)
                gate.add_(1)
                text_gate.add_(1)
        if transformer.config.use_learned_positional_embeddings:
            # They are initialized as the sin-cos table of other kinds; a trained model has others.
            positions = transformer.patch_embed.pos_embedding
            positions.add_(0.1 * torch.randn_like(positions))
    return transformer


def check_native_size(height: int, width: int, num_frames: int) -> None:
    """Raise ValueError unless the model can have this native size."""
    for name, value in (("height", height), ("width", width)):
        if value < 16 or value % 16:
            raise ValueError(f"{name} {value} must be a multiple of 16")
    if num_frames < 5 or num_frames % 4 != 1:
        raise ValueError(f"num_frames {num_frames} must be 4 k + 1, for example 9, 17 or 49")


def read_settings(folder: Path) -> dict[str, object]:
    """Return the settings that `make_tiny_model` wrote to a folder; empty for any other folder."""
    file = folder / SETTINGS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def make_tiny_model(
    kind: str,
    output_dir: Path,
    *,
    seed: int = 0,
    height: int = 64,
    width: int = 96,
    num_frames: int = 17,
    num_layers: int = NUM_LAYERS,
    num_heads: int = NUM_HEADS,
    vae_channels: Sequence[int] = VAE_CHANNELS,
    learned_positions: bool = False,
) -> Path:
    """Build the model folder of one kind; do nothing if it exists.

    Args:
        kind: a key of KINDS.
        output_dir: the folder to make; missing or empty, or made by an earlier call with the same settings.
        seed: for all random weights. The same seed gives the same bytes.
        height: native height of the videos in pixels, a multiple of 16.
        width: native width, a multiple of 16.
        num_frames: native number of frames, 4 k + 1.
        num_layers, num_heads: of the transformer; a head has 32 channels.
        vae_channels: of the VAE's four levels.
        learned_positions: positions are told in the input too, as in 5b-i2v; the native size is the only one then.

    Returns:
        `output_dir` as a Path.

    Raises:
        FileExistsError: if `output_dir` holds something else.
        ValueError: if the native size is impossible.
    """
    output_dir = Path(output_dir)
    settings = {
        "recipe": RECIPE,
        "kind": kind,
        "seed": seed,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "vae_channels": list(vae_channels),
    }
    traits = KINDS[kind]
    if learned_positions:
        settings["learned_positions"] = True
        traits = replace(traits, transformer=traits.transformer | {"use_learned_positional_embeddings": True})
    check_native_size(height, width, num_frames)
    if read_settings(output_dir).items() >= settings.items():
        return output_dir
    check_free(output_dir)

    import diffusers
    import torch

    with torch.random.fork_rng(devices=[]), new_folder(output_dir) as folder:
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        networks = {
            "text_encoder": build_text_encoder(len(tokenizer)),
            "vae": build_vae(traits, vae_channels),
            "transformer": build_transformer(traits, height, width, num_frames, num_layers, num_heads),
        }
        scheduler = build_scheduler(traits, traits.scheduler)
        pipeline_class = (
            diffusers.CogVideoXImageToVideoPipeline if traits.image_to_video else diffusers.CogVideoXPipeline
        )
        pipeline_class(tokenizer=tokenizer, scheduler=scheduler, **networks).save_pretrained(folder)
        settings["parameters"] = {
            name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()
        }
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return output_dir


def describe(folder: Path) -> str:
    """Return a line on a folder: path, kind, numbers of parameters, size."""
    settings = read_settings(folder)
    parameters = ", ".join(f"{name} {count:,}" for name, count in settings["parameters"].items())
    megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    return f"{folder}: tiny CogVideoX {settings['kind']}, parameters: {parameters}; {megabytes:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=tuple(KINDS), required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0, help="for the random weights (default: 0)")
    parser.add_argument("--height", type=int, default=64, help="native height in pixels (default: 64)")
    parser.add_argument("--width", type=int, default=96, help="native width in pixels (default: 96)")
    parser.add_argument("--num_frames", type=int, default=17, help="native number of frames, 4 k + 1 (default: 17)")
    parser.add_argument("--num_layers", type=int, default=NUM_LAYERS, help="of the transformer (default: 4)")
    parser.add_argument("--num_heads", type=int, default=NUM_HEADS, help="of 32 channels each (default: 4)")
    parser.add_argument(
        "--vae_channels",
        type=int,
        nargs=4,
        default=VAE_CHANNELS,
        help="of the VAE's levels, multiples of 8 (default: 8 16 16 32)",
    )
    parser.add_argument(
        "--learned_positions", action="store_true", help="tell positions in the input too, as 5b-i2v does"
    )
    args = vars(parser.parse_args())
    for name in ("bitsandbytes", "deepspeed", "torchao"):
        # diffusers imports these if they are installed, which takes seconds and prints warnings.
        sys.modules.setdefault(name, None)
    existed = bool(read_settings(args["output_dir"]))
    try:
        folder = make_tiny_model(**args)
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(describe(folder) + (" (up to date already)" if existed else ""))


if __name__ == "__main__":
    main()
