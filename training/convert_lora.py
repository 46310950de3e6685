"""Convert LoRAs: to other names, ranks and precisions, several into one, from full fine-tuning, into a model.

    python training/convert_lora.py --lora outputs/my-lora --format comfyui --output_file my-style.safetensors
    python training/convert_lora.py --lora outputs/style outputs/motion --lora_scale 1 0.6 --rank 64 \
      --output_file both.safetensors
    python training/convert_lora.py --transformer outputs/my-model --model_path THUDM/CogVideoX-5b --rank 64 \
      --output_file extracted.safetensors
    python training/convert_lora.py --lora outputs/my-lora --model_path THUDM/CogVideoX-5b --output_dir merged
"""

from collections.abc import Sequence

from args import parse_convert_args
from cli.schema import flag_values
from common.errors import one_line_errors
from common.startup import heavy_imports


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the flags of `argv`, or of the command line if it is None."""
    with one_line_errors("nothing was written; run the same command again"):
        settings = parse_convert_args(argv)
        # Importing torch and diffusers takes many seconds, so flags and files are checked first.
        with heavy_imports(flag_values(settings), owns_process=argv is None):
            from results.conversion import convert

        convert(settings)


if __name__ == "__main__":
    main()
