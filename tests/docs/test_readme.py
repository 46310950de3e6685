"""The README's own commands, run as they stand, with a tiny model in the place of the real one."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import cogvideox_text_to_video_lora
import generate
from make_demo_clips import make_demo_clips
from make_real_clips import make_real_clips
from make_tiny_model import make_tiny_model
from pages import (
    broken_links,
    code_blocks,
    flags_of,
    known_flags,
    marked_blocks,
    named_flags,
    noted_calls,
    script_of,
    table_rows,
    without_code,
)
from repository import ROOT


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = marked_blocks(README)

# What the launchers need on a CPU instead of their defaults.
SMALL = {
    "ACCELERATE_CONFIG": "accelerate_configs/cpu.yaml",
    "MIXED_PRECISION": "no",
    "DTYPE": "fp32",
    "BATCH_SIZE": "2",
    "MAX_TRAIN_STEPS": "2",
}
TINY = {"HEIGHT_BUCKETS": "64", "WIDTH_BUCKETS": "96", "FRAME_BUCKETS": "17", "MAX_NUM_FRAMES": "17"}
TINY |= {"HEIGHT": "64", "WIDTH": "96", "NUM_FRAMES": "17"}

# For what needs the network. The data set on the hub has the same two lists, the captions in prompt.txt.
STAND_INS = """
make() { true; }
hf() { cp -r drawn-clips "${@: -1}" && mv "${@: -1}/prompts.txt" "${@: -1}/prompt.txt"; }
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of the repository, in a folder with a space, with clips and a tiny model in it."""
    folder = tmp_path_factory.mktemp("readme") / "a copy"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    make_tiny_model("5b", folder / "tiny")
    make_demo_clips(folder / "drawn-clips", count=4)
    make_real_clips(folder / "my-clips")
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    return folder


def block(name: str, *replaced: tuple[str, str]) -> str:
    """A block of the README with the tiny model in it, and with other replacements that must apply."""
    code = BLOCKS[name].replace("THUDM/CogVideoX-5b", "./tiny")
    for old, new in replaced:
        assert old in code
        code = code.replace(old, new)
    return code


def words_of(command: str) -> list[str]:
    """The words of one shell command."""
    return shlex.split(command.replace("\\\n", " "))


def run(repository: Path, code: str, **environment: str) -> str:
    """Run shell code in the copy; returns what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euc", STAND_INS + code],
        cwd=repository,
        env=os.environ | SMALL | environment | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_command_of_the_readme_is_run_here_or_by_make():
    others = [code for code in code_blocks(README) if code not in BLOCKS.values()]
    assert all(line.startswith("make ") for code in others for line in code.strip().splitlines())
    with_a_model = {"hub", "own clips", "script", "python", "inference", "generate"}
    assert BLOCKS.keys() == with_a_model | {"sweep", "budget", "recipes", "captions"}


def test_every_flag_and_link_of_the_readme_exists():
    assert named_flags(without_code(README)) <= known_flags()
    assert broken_links(ROOT / "README.md") == []


def test_each_recipe_prepares_and_trains_with_flags_that_are_taken(tmp_path, monkeypatch):
    for name in ("my-clips", "my-prepared", "prepared-2b", "prepared-i2v", "prepared-1.5"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "rabbit.png")
    monkeypatch.chdir(tmp_path)
    calls = noted_calls(BLOCKS["recipes"], tmp_path)
    runs = [(script_of(call), flags_of(call)) for call in calls]
    prepared_for = {flags.output_dir: flags.model_id for name, flags in runs if name == "prepare_dataset.py"}
    trained = [(name, flags) for name, flags in runs if name != "prepare_dataset.py"]
    scripts = [f"cogvideox_{task}_to_video_{method}.py" for task in ("text", "image") for method in ("lora", "sft")]
    assert [name for name, _ in trained] == [*scripts, scripts[0]]
    for _, flags in trained:
        model = flags.pretrained_model_name_or_path
        assert flags.load_tensors and prepared_for.get(flags.data_root, "THUDM/CogVideoX-5b") == model
    assert calls[-1][calls[-1].index("--num_processes") + 1] == "8"
    later = [flags for name, flags in runs if "1.5" in flags.output_dir]
    assert [(flags.max_num_frames, flags.frame_buckets) for flags in later] == [(81, [81])] * 2
    assert later[0].height_buckets == [768] and later[0].save_image_latents


def test_captions_are_asked_for_at_the_endpoint(tmp_path, monkeypatch):
    (tmp_path / "my-footage").mkdir()
    monkeypatch.chdir(tmp_path)
    (call,) = noted_calls(BLOCKS["captions"], tmp_path)
    assert flags_of(call).endpoint == "http://localhost:8000/v1"


def test_the_memory_shown_is_that_of_the_page_on_memory_with_the_same_flags(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from memory_rows import ROWS

    flags_of_row = {row.name: set(row.flags) for row in ROWS}
    page = (ROOT / "assets" / "docs" / "memory.md").read_text(encoding="utf-8").split("## What a training step")[0]
    of_page = {cells[0]: cells[-4:] for cells in table_rows(page) if cells[0] in flags_of_row}
    published = {cells[0]: cells[1] for cells in table_rows(page) if len(cells) == 6}
    shown = [cells for cells in table_rows(README) if cells[0] in flags_of_row]
    assert len(shown) == 8
    for name, flags, by_others, measured, calculated in shown:
        own, _, expected, _ = of_page[name]
        assert (measured, calculated) == (own, expected)
        assert by_others == published.get(name, "")
        of_launcher = {"--gradient_checkpointing", *(["--use_8bit"] if "full" in name else [])}
        assert of_launcher | set(flags.strip("`").split()) == flags_of_row[name]


def test_a_data_set_of_the_hub_becomes_a_lora(repository):
    steps = (
        "bash train_text_to_video_lora.sh",
        "bash train_text_to_video_lora.sh --num_inference_steps 2 --no-validate_first",
    )
    run(repository, block("hub", steps), **TINY)
    (result,) = (repository / "outputs").glob("cogvideox-lora__*/pytorch_lora_weights.safetensors")
    assert list((result.parent / "validation").glob("step-2/*.mp4"))
    assert '"caption": "BW_STYLE ' in (repository / "prepared" / "index.jsonl").read_text()


def test_real_clips_become_a_lora_that_is_loaded_and_sampled(repository, monkeypatch):
    assert re.search(r"17x64x96 +16 ", run(repository, block("own clips"), **TINY))

    monkeypatch.chdir(repository)
    script = block(
        "script",
        (
            "--mixed_precision bf16",
            "--mixed_precision no --num_inference_steps 2 --report_to none --no-validate_first",
        ),
        ("--max_train_steps 2000", "--max_train_steps 2"),
        ("--height 480 --width 720", "--height 64 --width 96 --frame_buckets 17 --max_num_frames 17"),
    )
    argv = words_of(script)
    cogvideox_text_to_video_lora.main(argv[argv.index("training/cogvideox_text_to_video_lora.py") + 1 :])
    assert len(list(Path("outputs/my-lora/validation/step-2").glob("*.mp4"))) == 2

    python = block("python", ("num_inference_steps=50", "num_inference_steps=2"), ("torch.bfloat16", "torch.float32"))
    exec(python.replace("pipe.enable_model_cpu_offload()", ""), {})
    assert Path("rabbit.mp4").stat().st_size > 0
    Path("rabbit.mp4").unlink()

    small = ("--num_inference_steps", "2", "--height", "64", "--width", "96", "--num_frames", "17")
    generate.main([*words_of(block("generate"))[2:], *small])
    assert len(list(Path("generated").glob("00-a-rabbit-yawns-seed-42*"))) == 4

    runpy.run_path(str(ROOT / "tests" / "test_lora_inference.py"))["main"](
        [*words_of(block("inference"))[2:], "--num_inference_steps", "2"]
    )
    assert Path("rabbit.mp4").stat().st_size > 0


@pytest.fixture
def launches(repository, tmp_path):
    """Give what code would launch: with `accelerate` replaced by what prints its arguments."""
    (tmp_path / "accelerate").write_text('#!/usr/bin/env bash\nprintf "%s|" "$@"\necho\n')
    (tmp_path / "accelerate").chmod(0o755)

    def launches(code: str) -> list[list[str]]:
        output = run(repository, f'PATH="{tmp_path}:$PATH"\n{code}')
        return [line.split("|") for line in output.splitlines() if line.startswith("launch|")]

    return launches


def test_the_memory_that_there_is_reaches_the_script(launches):
    (argv,) = launches("OUTPUT_ROOT=budget " + block("budget"))
    assert argv[argv.index("--memory_budget_gb") + 1] == "16"


def test_the_readme_names_the_folder_of_the_run_that_it_shows(launches):
    train = BLOCKS["hub"][BLOCKS["hub"].index("MODEL_PATH=") :]
    (argv,) = launches(f"MAX_TRAIN_STEPS= {train}")
    assert f"`{argv[argv.index('--output_dir') + 1]}/`" in README


@pytest.mark.parametrize("launcher", ["text_to_video_sft", "image_to_video_sft", "image_to_video_lora"])
def test_a_launcher_leaves_its_own_savings_out_where_the_toolkit_is_to_choose(launches, launcher):
    savings = {"--gradient_checkpointing", *(["--use_8bit"] if launcher.endswith("sft") else [])}
    settings = "MODEL_PATH=model DATA_ROOT=data OUTPUT_ROOT=chosen VALIDATION_IMAGES=start.png"
    (plain,), (chosen,), (given,) = (
        launches(f"{settings} {more} bash train_{launcher}.sh {flags}")
        for more, flags in (("", ""), ("", "--auto_fit"), ("OPTIMIZER_FLAGS=--use_4bit", "--memory_budget_gb 24"))
    )
    assert savings <= set(plain)
    assert not savings & {*chosen, *given}
    assert ("--use_4bit" in given) == launcher.endswith("sft")


def test_the_sweep_launches_one_run_for_each_combination(launches):
    runs = launches('OPTIMIZERS="adam adamw" ' + block("sweep"))
    values = [
        tuple(argv[argv.index(flag) + 1] for flag in ("--learning_rate", "--optimizer", "--max_train_steps"))
        for argv in runs
    ]
    assert values == [(rate, name, "2000") for rate in ("1e-4", "3e-4") for name in ("adam", "adamw")]
    assert len({argv[argv.index("--output_dir") + 1] for argv in runs}) == 4
