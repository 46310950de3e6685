"""Build a CogVideoX model of the released size, with random weights: to measure memory and speed without a download.

    PYTHONPATH=training:assets/scripts python assets/scripts/make_full_size_model.py --kind 5b --output_dir model

Transformer and VAE are those of the release, 11 GB for a 5b kind. The text encoder, 9.5 GB in the release, is a
replacement of one thin layer whose embeddings have the right shape: it is not loaded in training and sampling.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from clip_files import new_folder
from make_tiny_model import KINDS, TEXT_LENGTH, build_scheduler, build_tokenizer
from models.configs import ModelConfigs


TEXT_DIM, TIME_EMBED_DIM = 4096, 512
INDEX = {
    "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLCogVideoX"],
}


def full_size_configs(kind: str) -> ModelConfigs:
    """Return the configs of a released model.

    Args:
        kind: 2b, 5b, 5b-i2v, 1.5-5b or 1.5-5b-i2v.
    """
    traits, is_small, is_newer = KINDS[kind], kind == "2b", kind.startswith("1.5")
    layers, heads = (30, 30) if is_small else (42, 48)
    frames, height, width = (81, 96, 170) if is_newer else (49, 60, 90)
    transformer = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "time_embed_dim": TIME_EMBED_DIM,
        "text_embed_dim": TEXT_DIM,
        "max_text_seq_length": TEXT_LENGTH,
        "sample_frames": frames,
        "sample_height": height,
        "sample_width": width,
        **traits.transformer,
    }
    if "ofs_embed_dim" in transformer:
        transformer["ofs_embed_dim"] = TIME_EMBED_DIM
    vae = {"scaling_factor": traits.scaling_factor, "invert_scale_latents": traits.invert_scale_latents}
    # Building them fills in the defaults, which are the released VAE's sizes.
    with torch.device("meta"):
        parts = CogVideoXTransformer3DModel(**transformer), AutoencoderKLCogVideoX(**vae)
    scheduler = build_scheduler(traits, CogVideoXDPMScheduler.__name__)
    # A note of diffusers' own, by which changes of what it names would be lost.
    hidden = "_use_default_values"
    return ModelConfigs(*({k: v for k, v in part.config.items() if k != hidden} for part in (*parts, scheduler)))


def make_full_size_model(kind: str, output_dir: Path, *, device: str = "cpu", num_layers: int | None = None) -> Path:
    """Write the model's folder, weights in bfloat16; do nothing if it exists.

    Args:
        kind: as `full_size_configs` takes it.
        output_dir: the folder to make.
        device: where the weights are drawn; a GPU does it in a second.
        num_layers: fewer transformer blocks than the release has.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        return output_dir
    configs = full_size_configs(kind)
    transformer_config = configs.transformer | ({"num_layers": num_layers} if num_layers else {})
    with new_folder(output_dir) as folder:
        _write_text_encoder(folder)
        CogVideoXDPMScheduler.from_config(configs.scheduler).save_pretrained(folder / "scheduler")
        _draw(CogVideoXTransformer3DModel, transformer_config, device).save_pretrained(folder / "transformer")
        _draw(AutoencoderKLCogVideoX, configs.vae, device).save_pretrained(folder / "vae")
        name = "CogVideoXImageToVideoPipeline" if KINDS[kind].image_to_video else "CogVideoXPipeline"
        (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **INDEX}, indent=2) + "\n")
    return output_dir


def _draw(model_class: type, config: dict[str, Any], device: str) -> torch.nn.Module:
    """Return a network with the random weights that its layers start with."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return model_class.from_config(config).to(torch.bfloat16)
    finally:
        torch.set_default_dtype(before)


def _write_text_encoder(folder: Path) -> None:
    tokenizer = build_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=64,
        d_ff=64,
        num_layers=1,
        num_heads=1,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    T5EncoderModel(config).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=tuple(KINDS), required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    parser.add_argument("--num_layers", type=int, help="transformer blocks (default: as released)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(make_full_size_model(args.kind, args.output_dir, device=device, num_layers=args.num_layers))


if __name__ == "__main__":
    main()
