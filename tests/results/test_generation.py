"""A result is sampled only as the task of its training, whatever the shapes of its weights."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from args import parse_generate_args
from common.errors import UserError
from common.run_folder import CONFIG_TITLE
from diffusion.control_to_video import ControlToVideo
from flags.settings import GenerationSettings
from forward_pass import load
from methods.lora_file import LORA_FILE
from results.generation import settle
from results.trained_conditions import TrainedConditions, note_trained_conditions
from tuned_models import only_configs, write_lora


pytestmark = pytest.mark.usefixtures("one_thread")
CONTROL = TrainedConditions(takes_control=True)


def parse(model: Path, *flags: object) -> GenerationSettings:
    return parse_generate_args(["--model_path", str(model), "--prompt", "a", "--num_frames", "9", *map(str, flags)])


def refused(model: Path, *flags: object) -> str:
    with pytest.raises(UserError) as caught:
        settle(parse(model, *flags))
    return str(caught.value)


@pytest.fixture(scope="module")
def lora(tiny_models, tmp_path_factory) -> Path:
    """The LoRA of a control on a text-to-video model, outside of its run."""
    return write_lora(tiny_models("5b"), tmp_path_factory.mktemp("lora"), new_inputs=64)


@pytest.fixture
def clip(demo_clips) -> tuple[str, Path]:
    return "--control", demo_clips / "videos/clip-000.mp4"


def full(model: Path, folder: Path, conditions: TrainedConditions | None = None) -> Path:
    """The config of a model's transformer, as full fine-tuning leaves it in the folder of its run, if any."""
    shutil.copytree(only_configs(model, folder / "model") / "transformer", folder / "transformer")
    if conditions:
        note_trained_conditions(folder, conditions)
    return folder


def controlled(model: Path, folder: Path, conditions: TrainedConditions | None = None) -> Path:
    """The transformer of a control, as full fine-tuning leaves it."""
    transformer = load(model)
    ControlToVideo().prepare_model(transformer)
    transformer.save_pretrained(folder / "transformer")
    if conditions:
        note_trained_conditions(folder, conditions)
    return folder


def test_a_result_with_a_control_is_refused_on_an_image_to_video_model(tiny_models, lora, tmp_path):
    model = tiny_models("5b-i2v")
    style = write_lora(model, tmp_path / "style")  # of a control model, by the config of its run
    note_trained_conditions(style.parent, CONTROL)
    transformer = controlled(tiny_models("5b"), tmp_path / "full", CONTROL)
    for flag, result in (("--lora", lora), ("--lora", style), ("--transformer", transformer)):
        message = refused(model, flag, result)
        assert f"this is an image-to-video model, and '{result}' was trained with controls; pass the text" in message


@pytest.mark.parametrize(("kind", "frames"), [("5b", 9), ("1.5-5b", 16)])
def test_an_image_to_video_transformer_is_not_one_of_a_control(tiny_models, clip, tmp_path, kind, frames):
    found = full(tiny_models(f"{kind}-i2v"), tmp_path / "elsewhere")
    of_run = full(tiny_models(f"{kind}-i2v"), tmp_path / "run", TrainedConditions())
    for transformer in (found, of_run):
        for flags in ((), clip):
            message = refused(tiny_models(kind), *flags, "--transformer", transformer, "--num_frames", frames)
            assert "was tuned from another model" in message and "an image-to-video one: its in_channels" in message


def test_one_of_a_run_that_dropped_its_positions_is_not_one_of_a_control(tiny_models, clip, tmp_path):
    transformer = controlled(tiny_models("5b"), tmp_path, TrainedConditions())  # of the same config
    assert "an image-to-video one" in refused(tiny_models("5b"), *clip, "--transformer", transformer)
    (tmp_path / "config.yaml").write_text(f"# {CONFIG_TITLE}\n# compute_control: null\n")
    assert settle(parse(tiny_models("5b"), *clip, "--transformer", transformer)).task.condition == "control"


def test_a_lora_that_cannot_be_read_or_is_of_a_control_model_says_so(tiny_models, lora, clip, tmp_path):
    damaged = tmp_path / LORA_FILE
    damaged.write_bytes(lora.read_bytes()[:2000])
    for flags in ((), clip):
        assert f"--lora: '{damaged}' cannot be used" in refused(tiny_models("5b"), "--lora", damaged, *flags)
    of_model = write_lora(tiny_models("5b"), tmp_path / "run")
    note_trained_conditions(of_model.parent, CONTROL)
    for flags in ((), clip):
        message = refused(tiny_models("5b"), "--lora", of_model, *flags)
        assert f"'{of_model}' was trained on a control model; pass that model" in message
    assert settle(parse(tiny_models("5b"), "--lora", of_model, lora, *clip)).task.condition == "control"


def test_a_repository_with_a_lora_only_in_a_folder_is_refused(tiny_models, monkeypatch):
    monkeypatch.setattr("methods.lora_file.is_offline_mode", lambda: False)
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename=f"checkpoint-5/{LORA_FILE}")])
    monkeypatch.setattr("diffusers.loaders.lora_base.model_info", lambda *_, **__: listed)
    assert "--lora: 'owner/lora' is not a file or folder here, and" in refused(
        tiny_models("5b"), "--lora", "owner/lora"
    )


def test_full_fine_tuning_of_the_base_is_widened_for_the_lora_of_a_control(tiny_models, lora, clip, tmp_path):
    tuned = full(tiny_models("5b"), tmp_path / "tuned")
    assert settle(parse(tiny_models("5b"), "--transformer", tuned, "--lora", lora, *clip)).task.widens
