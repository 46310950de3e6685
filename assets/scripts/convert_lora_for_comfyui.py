"""Convert a LoRA for ComfyUI's own CogVideoX nodes, which name the layers in their own way and read alpha as tensors.

    python assets/scripts/convert_lora_for_comfyui.py --lora outputs/my-lora --output_file my-lora-comfyui.safetensors

The CogVideoX wrapper for ComfyUI reads LoRAs as they are; see assets/docs/comfyui.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


# What differs between the names of diffusers and those of comfy/ldm/cogvideo/model.py.
RENAMED = {
    "transformer.": "diffusion_model.",
    "transformer_blocks.": "blocks.",
    "attn1.to_out.0": "attn_out",
    "attn1.to_": "",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
    "_embedding.linear_": "_embedding_linear_",
}


def convert(lora: Path, output_file: Path) -> None:
    """Write the LoRA with ComfyUI's names and its alpha beside each layer.

    Args:
        lora: a .safetensors file that a run wrote, or the folder with it.

    Raises SystemExit with the reason if it cannot be converted.
    """
    file = lora / "pytorch_lora_weights.safetensors" if lora.is_dir() else lora
    if not file.is_file():
        raise SystemExit(f"error: --lora: {file} does not exist")
    if output_file.exists():
        raise SystemExit(f"error: --output_file: {output_file} exists; pass another name, or delete it")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if "lora_adapter_metadata" not in metadata:
        raise SystemExit(f"error: --lora: {file} has no metadata on its alpha; pass a LoRA that this toolkit wrote")
    config = json.loads(metadata["lora_adapter_metadata"])
    if config["transformer.use_dora"]:
        raise SystemExit(f"error: --lora: {file} was trained with --use_dora, which ComfyUI computes in another way")
    rank, alpha = config["transformer.r"], float(config["transformer.lora_alpha"])
    # ComfyUI scales by alpha / rank, rsLoRA by alpha / sqrt(rank).
    alpha = torch.tensor(alpha * rank**0.5 if config["transformer.use_rslora"] else alpha)
    converted = {}
    for name, weight in weights.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        layer = name.split(".lora_")[0]
        converted |= {name: weight, f"{layer}.alpha": alpha.clone()}
    try:
        output_file.parent.mkdir(parents=True, exist_ok=True)
        save_file(converted, output_file)
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"error: --output_file: {output_file} cannot be written: {error}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, required=True, help="a LoRA file, or the folder of a run or checkpoint")
    parser.add_argument("--output_file", type=Path, required=True, help="the .safetensors file to write")
    args = parser.parse_args(argv)
    convert(args.lora, args.output_file)
    print(f"wrote {args.output_file}")


if __name__ == "__main__":
    main()
