"""The commands of the app are those of a shell, with the errors of the command line."""

import shlex
from dataclasses import replace
from itertools import product

import pytest

from common.errors import UserError
from studio.commands import Form, check_command, prepare_command, sample_command, shown, train_command
from studio.given import CHOICES, CONTROL, CONTROLS, Given


@pytest.fixture
def form(tmp_path, monkeypatch):
    for folder in ("clips", "model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model/model_index.json").touch()
    monkeypatch.chdir(tmp_path)
    sizes, training = (64, 96, 17), ("fp16", "24 GB", 10, 1e-4, "out")
    form = Form("model", "clips", "text only", 3, "canny", "-TOKEN x", *sizes, *training, "", "")
    (tmp_path / form.prepared).mkdir(parents=True)
    return form


def test_the_form_becomes_flags_that_the_scripts_understand(form, tmp_path):
    prepared = check_command(prepare_command(form), tmp_path)
    trained = check_command(train_command(form), tmp_path)
    assert (prepared.sources.data_root, prepared.sources.id_token) == ("clips", "-TOKEN x")
    assert (prepared.clips.height_buckets, prepared.clips.frame_buckets) == ((64,), (17,))
    assert prepared.model.dtype == "fp16"
    assert prepared.preparation.output_dir == trained.sources.data_root
    assert (trained.training.max_train_steps, trained.schedule.learning_rate) == (10, 1e-4)
    assert (trained.memory.memory_budget_gb, trained.training.mixed_precision) == (24.0, "fp16")


def test_a_table_is_passed_as_such(form, tmp_path):
    (tmp_path / "table.csv").write_text("video,caption\n")
    settings = check_command(prepare_command(replace(form, clips="table.csv")), tmp_path)
    assert (settings.sources.data_root, settings.sources.dataset_file) == (None, "table.csv")


@pytest.mark.parametrize(
    ("given", "control", "task", "prepared", "frames"),
    [
        ("text only", "canny", "text_to_video", [False, False, None], "first"),
        ("first frame", "canny", "image_to_video", [True, False, None], "first"),
        ("first and last frame", "canny", "image_to_video", [True, False, None], "first,last"),
        ("first K frames", "canny", "image_to_video", [True, False, None], "first:3"),
        ("control video", "tile", "control_to_video", [False, True, "tile"], "first"),
        ("control video", "own clips", "control_to_video", [False, True, None], "first"),
    ],
)
def test_what_is_given_is_prepared_and_trained_on(form, tmp_path, given, control, task, prepared, frames):
    form = replace(form, given=given, control=control)
    settings = check_command(prepare_command(form), tmp_path)
    what = settings.preparation
    assert [what.save_image_latents, what.save_control_latents, settings.control.compute_control] == prepared
    assert what.condition_frames == frames
    (tmp_path / form.prepared).mkdir(exist_ok=True)
    command = train_command(form)
    assert command[1].endswith(f"cogvideox_{task}_lora.py")
    assert check_command(command, tmp_path).image.condition_frames == frames


def test_data_prepared_for_other_choices_is_in_another_folder(form):
    choices = [*product(CHOICES, [2, 3], ["canny"]), *product([CONTROL], [3], CONTROLS)]
    forms = [replace(form, given=kind, latents=latents, control=control) for kind, latents, control in choices]
    flags = {tuple(form.condition.prepared) for form in forms}
    assert len({form.prepared for form in forms}) == len(flags) == 5 + len(CONTROLS)


def test_an_unfinished_run_is_resumed(form, tmp_path):
    (tmp_path / "out/checkpoint-5").mkdir(parents=True)
    (tmp_path / "out/checkpoint-5/manifest.json").touch()
    assert check_command(train_command(form), tmp_path).checkpoints.resume_from_checkpoint == "latest"
    (tmp_path / "out/pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UserError, match="already holds a run"):
        check_command(train_command(form), tmp_path)


def test_prompts_are_lines_and_no_shell_reads_them(form, tmp_path):
    hostile = '"; touch $(x) `y` <script>'
    flags = Given(), [], 5, 6.0, 1, "--num_frames 9"
    settings = check_command(sample_command("model", "", f"{hostile}\n\n two ", *flags), tmp_path)
    assert (settings.content.prompt, settings.sampling.num_frames) == ((hostile, "two"), 9)
    for prompts in (("-one",), ("--a b", "--seed=3", "-4", "--config", "--")):
        command = sample_command("model", "", "\n".join(prompts), *flags)
        settings = check_command(command, tmp_path)
        assert (settings.content.prompt, settings.sampling.seed) == (prompts, (1,))
    assert shlex.split(shown([command], tmp_path)) == ["cd", str(tmp_path), *command]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rnak 4", "did you mean --rank"),
        ("--rank four", "--rank: 'four' is not a whole number"),
        ("--validation_prompt 'a", "No closing quotation"),
        ("--help", "run the command in a shell"),
        ("--output_dir ../elsewhere", "--output_dir: ../elsewhere is not inside"),
        ("--lora_weights /etc/x.safetensors", "--lora_weights: no file"),
        ("--logging_dir /tmp", "--logging_dir: /tmp is not inside"),
        ("--dataset_name /etc", "--dataset_name: /etc is not inside"),
        ("--cache_dir ~", "is not inside"),
        ("--variant ../../x", "--variant: '../../x' would be another folder"),
        ("--validation_images a.png:::../b.png", "--validation_images: "),
        ("--validation_prompt_separator / --output_dir /tmp/x", "--output_dir: /tmp/x is not inside"),
        ("--hub_token=hf_secret", "log in with `hf auth login`"),
        ("--allow_outside_paths", "in a shell"),
        ("--config /etc/passwd", "add its flags themselves"),
    ],
)
def test_more_flags_are_checked_as_on_the_command_line_and_stay_inside_the_root(form, tmp_path, flags, message):
    with pytest.raises(UserError) as caught:
        check_command(train_command(replace(form, train_flags=flags)), tmp_path)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("column", ["video", "caption", "image", "control", "mask"])
def test_lists_that_columns_name_stay_inside_the_root(form, tmp_path, column):
    (tmp_path / "clips/list.txt").touch()
    (tmp_path / "clips/link.txt").symlink_to("/etc/passwd")
    needed = {"control": ["--save_control_latents"], "mask": ["--use_masks"]}.get(column, [])
    flags = [*needed, f"--{column}_column"]
    check_command(prepare_command(form, *flags, "list.txt"), tmp_path)
    for path in ("/etc/passwd", "../list.txt", "link.txt"):
        with pytest.raises(UserError, match=f"--{column}_column: .*{path} is not inside"):
            check_command(prepare_command(form, *flags, path), tmp_path)


def test_both_images_of_a_pair_stay_inside_the_root(form, tmp_path):
    (tmp_path / "first.png").touch()
    flags = "--condition_frames first,last --validation_prompt a --validation_images first.png,/etc/passwd"
    form = replace(form, given="first frame", train_flags=flags)
    (tmp_path / form.prepared).mkdir()
    with pytest.raises(UserError, match="--validation_images: /etc/passwd is not inside"):
        check_command(train_command(form), tmp_path)
