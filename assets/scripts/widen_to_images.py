"""Make an image-to-video model from a text-to-video one, to train it further: the first step of the tiny i2v model.

    python assets/scripts/widen_to_images.py --model_dir base/run/pipeline --output_dir base/image-model

As CogVideoX-5b-I2V came from 5b (arXiv:2408.06072, section 3.3): the latents of the image are 16 more channels of the
transformer's input. Their weights are zero at first, so that the model's outputs are unchanged.
"""

import argparse
from pathlib import Path

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel

from clip_files import new_folder


def widen(transformer: CogVideoXTransformer3DModel) -> CogVideoXTransformer3DModel:
    """Return the transformer with image latents as additional input channels; its weights are copied."""
    channels = transformer.config.in_channels
    wide = CogVideoXTransformer3DModel.from_config(transformer.config, in_channels=2 * channels)
    weights = transformer.state_dict()
    patches = weights["patch_embed.proj.weight"]
    weights["patch_embed.proj.weight"] = torch.cat([patches, torch.zeros_like(patches)], dim=1)
    wide.load_state_dict(weights)
    return wide.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="a text-to-video model")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    args = parser.parse_args()
    pipeline = CogVideoXPipeline.from_pretrained(args.model_dir)
    components = pipeline.components | {"transformer": widen(pipeline.transformer)}
    try:
        with new_folder(args.output_dir) as folder:
            CogVideoXImageToVideoPipeline(**components).save_pretrained(folder)
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
