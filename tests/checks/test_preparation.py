"""What the preparation can do with less memory, by its flags."""

import pytest

from args import parse_prepare_args
from checks.preparation import preparation_memory_advice


def advice(tmp_path, *flags: str) -> str:
    argv = ["--data_root", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--save_latents_and_embeddings"]
    settings = parse_prepare_args([*argv, *flags])
    return "\n".join(preparation_memory_advice(settings.encoding, settings.model.dtype))


def test_savings_are_advised_that_are_not_made_yet(tmp_path):
    every = advice(tmp_path, "--batch_size", "2")
    assert all(flag in every for flag in ("--batch_size 1", "--use_slicing", "--use_tiling", "--dtype bf16"))
    some = advice(tmp_path, "--use_tiling", "--dtype", "bf16")
    assert not any(flag in some for flag in ("--batch_size", "--use_tiling", "--dtype"))
    assert "--use_slicing" in some


def test_the_folder_of_the_clips_is_not_that_of_the_prepared_data(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    argv = ["--model_id", "a/b", "--data_root", str(tmp_path / "clips"), "--output_dir", f"{tmp_path}/./clips/"]
    with pytest.raises(SystemExit, match=r"^2$"):
        parse_prepare_args(argv)
    assert "is the folder of the clips; pass another one" in capsys.readouterr().err
