"""Fine-tune all weights of a CogVideoX image-to-video model.

    bash train_image_to_video_sft.sh

or, on one GPU, from data that prepare_dataset.sh prepared:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml training/cogvideox_image_to_video_sft.py \
      --pretrained_model_name_or_path THUDM/CogVideoX-5b-I2V --data_root prepared --load_tensors \
      --mixed_precision bf16 --gradient_checkpointing --output_dir cogvideox-sft
"""

from collections.abc import Sequence

from args import parse_args
from common.errors import one_line_errors
from common.startup import prepare_imports
from data.plan import plan_training_data
from flags.schema import flag_values


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the given flags; None for those of the command line."""
    with one_line_errors():
        settings = parse_args(argv, task="image-to-video", method="sft")
        data = plan_training_data(settings)
        prepare_imports(flag_values(settings), owns_process=argv is None)
        # Importing torch and diffusers takes many seconds: flags and clips are found good first.
        from diffusion.tasks import ImageToVideo
        from methods.full import FullFinetune
        from run.finetune import finetune

        task = ImageToVideo(settings.image.noised_image_dropout, settings.image.ignore_learned_positional_embeddings)
        finetune(
            settings,
            data,
            task,
            FullFinetune(settings.full.save_pipeline, weights_dtype=settings.memory.weights_dtype),
        )


if __name__ == "__main__":
    main()
