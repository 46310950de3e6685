"""The flags of convert_lora.py: one line for every mistake, before anything heavy is imported."""

from pathlib import Path

import pytest

from args import parse_convert_args
from common.run_folder import LORA_FILE


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for file in (f"lora/{LORA_FILE}", "mine.safetensors", "mine.bin", "full/transformer/config.json"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    Path("model").mkdir()
    Path("model/model_index.json").touch()
    return tmp_path


TO_FILE, EXTRACT = "--output_file new.safetensors", "--transformer full --output_file new.safetensors"
WRONG = {
    TO_FILE: "--lora or --transformer: required",
    "--lora lora": "--output_file or --output_dir: required",
    f"--lora nowhere {TO_FILE}": "--lora: nowhere does not exist",
    f"--lora mine.bin {TO_FILE}": "--lora: 'mine.bin' is not a .safetensors file",
    f"--lora full {TO_FILE}": "--lora: no pytorch_lora_weights.safetensors in 'full'; pass it as --transformer",
    f"--lora lora --lora mine.safetensors {TO_FILE}": "--lora: passed twice; pass all values after one --lora",
    f"--lora lora --lora_scale 1 2 {TO_FILE}": "--lora_scale: 2 for 1 in --lora",
    f"--lora lora {EXTRACT}": "--transformer: not together with --lora",
    f"--model_path model {EXTRACT}": "--transformer: how large is its LoRA to be? Pass --rank 64",
    f"--rank 4 {EXTRACT}": "--pretrained_model_name_or_path: required",
    f"--lora lora --model_path model {TO_FILE}": "--pretrained_model_name_or_path: no effect",
    f"--lora lora --energy 1.1 {TO_FILE}": "--energy: 1.1 is out of range",
    f"--lora lora --format sat {TO_FILE}": "--format: invalid choice 'sat'; choose from diffusers, comfyui",
    "--lora lora --output_file new.bin": "--output_file: 'new.bin' must end in .safetensors",
    "--lora lora --output_file mine.safetensors": "--output_file: mine.safetensors exists; pass another name",
    "--lora lora --output_file mine.bin/a.safetensors": "is not a folder; choose another place",
    "--lora lora --output_dir full --model_path model": "--output_dir: full exists",
    "--lora lora --output_dir new": "--pretrained_model_name_or_path: required",
    "--lora lora --output_dir new --model_path model --rank 4": "--output_dir: not with --rank",
    "--transformer full --output_dir new --model_path model": "--output_dir: --transformer is complete already",
    f"--lora lora --output_dir new --model_path model {TO_FILE}": "--output_dir: not together with --output_file",
    "--lora lora --output_dir new --model_path nowhere": "--pretrained_model_name_or_path: no folder 'nowhere'",
}


@pytest.mark.parametrize(("flags", "expected"), WRONG.items(), ids=WRONG)
def test_a_mistake_is_one_line(flags, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_convert_args(flags.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("error: ") and expected in line
    assert not Path("new").exists()


def test_the_files_of_folders_are_found_with_their_scales():
    settings = parse_convert_args(f"--lora lora mine.safetensors --lora_scale 1 -0.5 {TO_FILE}".split())
    assert settings.loras == ((f"lora/{LORA_FILE}", 1.0), ("mine.safetensors", -0.5))
    tuned = parse_convert_args(f"--model_path model --rank 4 --transformer full/transformer {TO_FILE}".split())
    assert tuned.source.transformer == "full"
