"""Fine-tune all weights of a CogVideoX text-to-video model to follow control videos.

    bash train_control_to_video_sft.sh

or, on one GPU, from data that prepare_dataset.sh --save_control_latents prepared:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml training/cogvideox_control_to_video_sft.py \
      --pretrained_model_name_or_path THUDM/CogVideoX-5b --data_root prepared --load_tensors \
      --mixed_precision bf16 --gradient_checkpointing --output_dir cogvideox-sft
"""

from collections.abc import Sequence

from args import parse_args
from cli.schema import flag_values
from common.errors import one_line_errors
from common.startup import announce, heavy_imports
from planning.plan import plan_training_data


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the flags of `argv`, or of the command line if it is None."""
    with one_line_errors("run it again, with --resume_from_checkpoint latest if it has saved a checkpoint"):
        settings = parse_args(argv, task="control-to-video", method="sft")
        announce("reading the data")
        data = plan_training_data(settings)
        # Importing torch and diffusers takes many seconds, so flags and clips are checked first.
        with heavy_imports(flag_values(settings), owns_process=argv is None):
            from run.finetune import finetune

        finetune(settings, data)


if __name__ == "__main__":
    main()
