"""A run does not overwrite the results of another run."""

import pytest

from args import parse_args
from common.run_folder import CONFIG_FILE, CONFIG_TITLE, MANIFEST


@pytest.fixture
def run_folder(tmp_path):
    """A folder with a result, two checkpoints, and an incomplete checkpoint."""
    folder = tmp_path / "run"
    for step in (2, 10):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / MANIFEST).write_text("{}")
    (folder / "checkpoint-12").mkdir()
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    return folder


def parse(data_root, output_dir, *flags):
    argv = ["--pretrained_model_name_or_path", "owner/name", "--data_root", str(data_root)]
    return parse_args([*argv, "--output_dir", str(output_dir), *flags], task="text-to-video", method="lora")


def refuse(capsys, *arguments) -> str:
    with pytest.raises(SystemExit, match="2"):
        parse(*arguments)
    return capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["latest", "checkpoint-10"])
def test_the_newest_checkpoint_of_a_run_is_resumed_in_place(run_folder, tmp_path, checkpoint):
    parse(tmp_path, run_folder, "--resume_from_checkpoint", checkpoint)


@pytest.mark.parametrize("checkpoint", ["checkpoint-2", "checkpoint-12"])
def test_resuming_an_older_checkpoint_in_place_is_refused(run_folder, tmp_path, checkpoint, capsys):
    error = refuse(capsys, tmp_path, run_folder, "--resume_from_checkpoint", checkpoint)
    assert "choose another --output_dir" in error


def test_a_run_branches_off_into_a_new_folder(run_folder, tmp_path):
    parse(tmp_path, tmp_path / "new", "--resume_from_checkpoint", str(run_folder / "checkpoint-2"))
    parse(tmp_path, tmp_path / "new", "--resume_from_checkpoint", "latest")


def test_a_result_is_not_overwritten(run_folder, tmp_path, capsys):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    for checkpoint, reason in ((run_folder / "checkpoint-10", "--output_dir"), ("latest", "no complete checkpoint")):
        assert reason in refuse(capsys, tmp_path, tmp_path / "result", "--resume_from_checkpoint", str(checkpoint))


def test_a_users_config_file_is_not_overwritten(run_folder, tmp_path, capsys):
    new = tmp_path / "new"
    new.mkdir()
    (new / CONFIG_FILE).write_text("rank: 8\n")
    error = refuse(capsys, tmp_path, new, "--config", str(new / CONFIG_FILE))
    assert f"would write its flags over '{new / CONFIG_FILE}', which is not of a run" in error
    parse(tmp_path, tmp_path / "elsewhere", "--config", str(new / CONFIG_FILE))
    # Config files of a run without a checkpoint, and of a resumed run, which does not write its own.
    (new / CONFIG_FILE).write_text(f"# {CONFIG_TITLE} on some day\nrank: 8\n")
    assert parse(tmp_path, new, "--config", str(new / CONFIG_FILE)).lora.rank == 8
    (run_folder / CONFIG_FILE).write_text("rank: 8\n")
    parse(tmp_path, run_folder, "--resume_from_checkpoint", "latest")
