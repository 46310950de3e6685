"""Sample videos from a base model, with LoRAs, or with a fine-tuned transformer.

    python training/generate.py --pretrained_model_name_or_path THUDM/CogVideoX-5b --lora outputs/my-lora \
      --prompt "A rabbit yawns" --output_dir generated

With `--compare`, the base model is sampled from the same noise, and both are shown side by side.
"""

from collections.abc import Sequence

from args import parse_generate_args
from checks.generation import HOST_SAVINGS, sampling_memory_advice
from cli.schema import flag_values
from common.errors import one_line_errors
from common.startup import heavy_imports


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the flags of `argv`, or of the command line if it is None."""
    kept = "finished videos are kept; run it again with --overwrite, or only the prompts that are left"
    with one_line_errors(f"{kept} (with --as_dataset: the same command)"):
        settings = parse_generate_args(argv)
        # Importing torch and diffusers takes many seconds, so flags and files are checked first.
        with heavy_imports(flag_values(settings), owns_process=argv is None):
            from common.failures import explained_failures
            from results.generation import generate

        with explained_failures(lambda: sampling_memory_advice(settings.memory), HOST_SAVINGS):
            generate(settings)


if __name__ == "__main__":
    main()
