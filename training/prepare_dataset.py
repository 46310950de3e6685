"""Encode clips and captions once, so that training needs neither the VAE nor the text encoder.

    bash prepare_dataset.sh

or

    python training/prepare_dataset.py --model_id THUDM/CogVideoX-5b --data_root clips --output_dir prepared \
      --height_buckets 480 --width_buckets 720 --dtype bf16 --save_latents_and_embeddings

and on several GPUs with `torchrun --nproc_per_node=N` or `accelerate launch` instead of `python`. A second run does
only what is missing. `--dry_run` only shows the samples that would be made, as a table, a picture and a page.
"""

from collections.abc import Sequence

from args import parse_prepare_args
from checks.preparation import preparation_memory_advice
from cli.schema import flag_values
from common.errors import UserError, one_line_errors
from common.startup import announce, heavy_imports
from planning.describe import advise_early
from planning.plan import check_bad_clips, plan_raw_clips


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script with the flags of `argv`, or of the command line if it is None."""
    with one_line_errors():
        settings = parse_prepare_args(argv)
        announce("reading the data")
        flags = settings.preparation
        data = plan_raw_clips(
            settings.sources,
            settings.clips,
            with_images=flags.save_image_latents,
            condition_frames=flags.condition_frames,
            control=settings.control if flags.save_control_latents else None,
            masks=settings.masks,
        )
        if data.regularization is not None:
            raise UserError(
                "--dataset_mix: entries for regularization get a folder of their own; prepare them without "
                '"regularization": true, and pass the folder to training as --regularization_data_root'
            )
        if not (settings.preparation.dry_run and data.clips):
            model = settings.model.model_id
            check_bad_clips(data, settings.sources.on_bad_clip, lambda: advise_early(data, settings, model))
        # Importing torch and diffusers takes many seconds, so flags and clips are checked first.
        with heavy_imports(flag_values(settings), owns_process=argv is None):
            from common.failures import explained_failures
            from preparation.dry_run import show_plan
            from preparation.prepare import prepare

        if settings.preparation.dry_run:
            show_plan(settings, data)
            if data.bad and settings.sources.on_bad_clip == "error":
                raise UserError("these clips stop the preparation; fix or remove them, or pass --on_bad_clip skip")
        else:
            with explained_failures(lambda: preparation_memory_advice(settings.encoding, settings.model.dtype)):
                prepare(settings, data)


if __name__ == "__main__":
    main()
