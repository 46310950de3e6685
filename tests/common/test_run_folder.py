"""What may be written into a folder that holds a run already."""

import pytest

from args import parse_args
from common.run_folder import CONFIG_FILE, CONFIG_TITLE, MANIFEST


@pytest.fixture
def run_folder(tmp_path):
    """A folder with a result and two checkpoints, and one that was half removed."""
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


@pytest.mark.parametrize("checkpoint", ["latest", "checkpoint-10"])
def test_the_newest_checkpoint_of_a_run_is_resumed_in_place(run_folder, tmp_path, checkpoint):
    parse(tmp_path, run_folder, "--resume_from_checkpoint", checkpoint)


@pytest.mark.parametrize("checkpoint", ["checkpoint-2", "checkpoint-12"])
def test_going_back_in_place_would_write_over_newer_work(run_folder, tmp_path, checkpoint, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(tmp_path, run_folder, "--resume_from_checkpoint", checkpoint)
    assert "choose another --output_dir" in capsys.readouterr().err


def test_a_run_branches_off_into_a_new_folder(run_folder, tmp_path):
    parse(tmp_path, tmp_path / "new", "--resume_from_checkpoint", str(run_folder / "checkpoint-2"))


def test_another_runs_checkpoint_is_not_resumed_over_a_finished_run(run_folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    with pytest.raises(SystemExit, match="2"):
        parse(tmp_path, other, "--resume_from_checkpoint", str(run_folder / "checkpoint-10"))
    assert "--output_dir" in capsys.readouterr().err


def test_a_result_without_a_checkpoint_is_not_trained_over_by_latest(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    with pytest.raises(SystemExit, match="2"):
        parse(tmp_path, tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert "no complete checkpoint" in capsys.readouterr().err


def test_latest_in_an_empty_folder_starts_anew(tmp_path):
    parse(tmp_path, tmp_path / "run", "--resume_from_checkpoint", "latest")


def test_flags_that_somebody_wrote_are_not_written_over(run_folder, tmp_path, capsys):
    new = tmp_path / "new"
    new.mkdir()
    (new / CONFIG_FILE).write_text("rank: 8\n")
    with pytest.raises(SystemExit, match="2"):
        parse(tmp_path, new, "--config", str(new / CONFIG_FILE))
    assert f"would write its flags over '{new / CONFIG_FILE}', which is not of a run" in capsys.readouterr().err
    parse(tmp_path, tmp_path / "elsewhere", "--config", str(new / CONFIG_FILE))
    # Of a run that ended before its first checkpoint, and of one that goes on, whose file is left as it is.
    (new / CONFIG_FILE).write_text(f"# {CONFIG_TITLE} on some day\nrank: 8\n")
    assert parse(tmp_path, new, "--config", str(new / CONFIG_FILE)).lora.rank == 8
    (run_folder / CONFIG_FILE).write_text("rank: 8\n")
    parse(tmp_path, run_folder, "--resume_from_checkpoint", "latest")
