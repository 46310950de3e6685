"""Clips with masks, from a folder to training on raw and on prepared clips."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cogvideox_control_to_video_lora
import prepare_dataset
from args import parse_args, parse_prepare_args
from common.errors import UserError
from data.sampler import Draw
from models.source import ModelSource
from planning.describe import describe_plan
from planning.plan import plan_raw_clips, plan_training_data
from preparation.prepare import name_sample, tensor_bytes
from preparation.report import sheet_rows
from prepared.folder import read_tensor
from prepared.read_index import read_index
from run.recipe import Recipe
from run.setup import make_dataset
from tiny_runs import SIZE, set_up_run, short_run_flags, train
from video.probe import probe_video


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
MASKED = [*SIZE, "--use_masks", "--random_flip", "0.5", "--video_reshape_mode", "random"]


@pytest.fixture(scope="module")
def data(demo_clips, tmp_path_factory) -> Path:
    """Three clips: with a still mask, white on the left half; with a video mask; without a mask."""
    folder = tmp_path_factory.mktemp("masked")
    for name, clip in zip("abc", sorted((demo_clips / "videos").iterdir()), strict=False):
        shutil.copy(clip, folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text("a red circle")
    info = probe_video(folder / "a.mp4")
    mask = np.zeros((info.height, info.width), np.uint8)
    mask[:, : info.width // 2] = 255
    Image.fromarray(mask).save(folder / "a.mask.png")
    shutil.copy(folder / "b.mp4", folder / "b.mask.mp4")
    return folder


def flags_of(model: Path, data: Path, output: Path, *flags: str) -> list[str]:
    places = ["--model_id", str(model), "--data_root", str(data), "--output_dir", str(output)]
    return [*places, *MASKED, "--save_latents_and_embeddings", *flags]


@pytest.fixture(scope="module")
def prepared(tiny_models, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare_dataset.main(flags_of(tiny_models("5b"), data, folder))
    return folder


def test_prepared_masks_are_those_of_raw_clips_and_their_bytes_are_known(tiny_models, data, prepared):
    argv = [*short_run_flags(tiny_models("5b"), data), *MASKED]
    trained = parse_args(argv, task="text-to-video", method="lora")
    recipe = Recipe(trained, plan_training_data(trained))
    raw = make_dataset(recipe, 42, replace_failed=False)
    index = read_index(prepared)
    names = {clip.name[0]: clip for clip in index}
    assert [sample.clip.video.stem for sample in recipe.data.clips] == sorted(names) == ["a", "b", "c"]
    for number, name in enumerate(sorted(names)):
        assert torch.equal(read_tensor(names[name].mask), raw[Draw(number, 0)].masks[0])
    assert torch.equal(raw[Draw(2, 0)].masks, torch.ones(1, 5, 8, 12).half())
    assert {0.0, 1.0} <= set(raw[Draw(0, 0)].masks.unique().tolist())
    settings = parse_prepare_args(flags_of(tiny_models("5b"), data, prepared))
    num_bytes = tensor_bytes(settings, recipe.source.configs(), recipe.data.clips)["latents"]
    assert num_bytes == sum(read_tensor(one).nbytes for clip in index for one in (clip.video_latents, clip.mask))


def test_a_changed_mask_is_other_data(tiny_models, data, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    shutil.move(other / "b.mask.mp4", other / "c.mask.mp4")
    with Image.open(other / "a.mask.png") as mask:
        mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other / "a.mask.png")
    (settings, first), (_, second) = (planned(tiny_models("5b"), folder) for folder in (data, other))
    assert first.fingerprint != second.fingerprint
    names = [{name_sample(clip, settings).name for clip in one.clips} for one in (first, second)]
    assert not names[0] & names[1]


def planned(model: Path, folder: Path, *flags: str) -> tuple:
    settings = parse_prepare_args(flags_of(model, folder, Path("out"), *flags))
    return settings, plan_raw_clips(settings.sources, settings.clips, masks=settings.masks)


def test_clips_without_a_mask_are_counted_unless_none_has_one(tiny_models, data, demo_clips):
    settings, found = planned(tiny_models("5b"), data)
    source = ModelSource(str(tiny_models("5b")))
    text = describe_plan(found, settings, source, source.configs(), batch_size=1)
    assert "1 of 3 samples have no mask: they count fully everywhere" in text
    titles = [row.title for row in sheet_rows(settings, found.clips)]
    assert titles.count("its loss counts where it is not black") == 3
    with pytest.raises(UserError, match=r"--use_masks: none of the \d+ samples has a mask; .* masks\.txt"):
        planned(tiny_models("5b"), demo_clips)
    shutil.copytree(data, (bare := data.parent / "bare"), ignore=shutil.ignore_patterns("*.mask.*"))
    with pytest.raises(UserError, match=r"--use_masks: none of the 3 samples has a mask; add a\.mask\.mp4"):
        planned(tiny_models("5b"), bare)


def test_the_loss_of_regularization_counts_everywhere_even_if_its_controls_need_masks(
    tiny_models, data, prepared, tmp_path
):
    places = kept, trained = [Path(shutil.copytree(data, tmp_path / name)) for name in ("kept", "trained")]
    for folder, other in zip(places, "ab", strict=True):
        for file in (file for name in (other, "c") for file in folder.glob(f"{name}.*")):
            file.unlink()
    flags = ["--compute_control", "inpaint", "--use_masks", "--regularization_data_root", str(kept)]
    argv = [*short_run_flags(tiny_models("5b"), trained), *SIZE, *flags, "--validation_fraction", "0"]
    settings = parse_args(argv, task="control-to-video", method="lora")
    dataset = make_dataset(Recipe(settings, plan_training_data(settings)), 42, replace_failed=False)
    weighted, everywhere = (dataset[Draw(number, 0)].masks.float().mean() for number in range(2))
    assert weighted < 1 == everywhere
    index = read_index(prepared)
    assert {clip.mask is None for clip in index} == {False}
    assert {clip.mask is None for clip in index.with_facts(regularization=True)} == {True}


def test_clips_with_masks_that_cannot_be_used_are_listed_if_no_other_clip_has_a_mask(tiny_models, data, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    Image.new("L", (32, 32)).save(other / "a.mask.png")
    (other / "b.txt").unlink()
    _, found = planned(tiny_models("5b"), other)
    assert [sample.clip.video.name for sample in found.clips] == ["c.mp4"]
    caption, size = sorted(clip.reason for clip in found.bad)
    assert caption.startswith("has no caption file") and "its mask" in size and "has 32x32 pixels" in size
    with pytest.raises(UserError, match=r"none of the 1 samples has a mask; .*; skipped are:\n(.*\n)*.*32x32 pixels"):
        planned(tiny_models("5b"), other, "--on_bad_clip", "skip")


def test_the_training_loss_is_weighted_and_the_validation_loss_is_not(tiny_models, prepared, tmp_path):
    flags = ("--use_masks", "--mask_background_weight", "0.25", "--max_train_steps", "1")
    flags += ("--validation_fraction", "0.34")
    run = set_up_run("text-to-video", tiny_models("5b"), prepared, tmp_path / "run", *flags)
    assert run.objective.mask_background == 0.25
    assert next(run.batches).masks.shape == (1, 5, 8, 12)
    assert [batch.masks for batch in run.inputs.held_out] == [None]


def test_prepared_data_without_masks_is_refused(tiny_models, prepared_demo, tmp_path):
    bare = prepared_demo(*SIZE, "--max_samples", "2")
    with pytest.raises(UserError, match=r"--use_masks: 2 samples were prepared without masks; .* with --use_masks:"):
        set_up_run("text-to-video", tiny_models("5b"), bare, tmp_path / "run", "--use_masks")


def test_a_dry_run_of_inpainting_needs_masks_of_all_clips_and_no_control_for_its_video(
    tiny_models, data, tmp_path, capfd
):
    flags = ["--compute_control", "inpaint", "--dry_run", "--max_train_steps", "4", "--report_to", "none"]
    with pytest.raises(SystemExit):
        train(cogvideox_control_to_video_lora, tiny_models("2b"), data, tmp_path / "out", *flags)
    assert "c.mp4 (c.txt): has no mask" in capfd.readouterr().err
    train(cogvideox_control_to_video_lora, tiny_models("2b"), data, tmp_path / "out", *flags, "--max_samples", "2")
    assert list(tmp_path.iterdir()) == []
    assert "saving, loading and sampling all work" in capfd.readouterr().err
