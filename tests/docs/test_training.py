"""The page on training says what the code does: its commands are launched and their flags parsed, its code runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import CogVideoXTransformer3DModel
from PIL import Image

from args import flag_names, parse_args
from pages import code_blocks, flags_of, marked_blocks, noted_calls, script_of
from repository import ROOT, TRAINING
from run.config import render_config, split_flags


PAGE = (ROOT / "assets" / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = marked_blocks(PAGE)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with what the commands name."""
    for name in ("prepared", "my-clips", "held-out"):
        (tmp_path / name).mkdir()
    (tmp_path / "held-out" / "metadata.csv").write_text("video,text\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "rabbit.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_launcher_of_the_page_calls_its_script_with_flags_that_are_taken(folder):
    calls = noted_calls(BLOCKS["launchers"], folder)
    scripts = [f"cogvideox_{task}_to_video_{method}.py" for task in ("text", "image") for method in ("lora", "sft")]
    assert list(map(script_of, calls)) == scripts
    runs = list(map(flags_of, calls))
    assert len({run.output_dir for run in runs}) == 4
    assert [run.use_8bit for run in runs] == [False, True, False, True]
    assert all(run.load_tensors and run.data_root == "prepared" for run in runs)
    assert runs[2].settings.validation.images == ("rabbit.png",)
    assert (runs[3].save_pipeline, runs[3].max_num_frames, runs[3].width) == (True, 81, 1360)


@pytest.mark.parametrize(
    ("block", "flag", "value"),
    [
        ("dry run", "dry_run", True),
        ("prepare for images", "save_image_latents", True),
        ("validation set", "validation_dataset_file", "held-out/metadata.csv"),
    ],
)
def test_a_command_of_the_page_does_what_it_is_there_for(folder, block, flag, value):
    (call,) = noted_calls(BLOCKS[block], folder)
    assert getattr(flags_of(call), flag) == value


def test_the_commands_on_memory_let_the_toolkit_choose(folder):
    budget, trial = map(flags_of, noted_calls(BLOCKS["memory"], folder))
    assert (budget.memory_budget_gb, budget.auto_fit) == (16, False)
    assert (trial.memory_budget_gb, trial.auto_fit) == (None, True)


def test_the_command_with_a_file_of_flags_reads_the_one_that_the_page_shows(folder):
    (file,) = re.findall(r"```yaml\n(# run.yaml\n.*?)```", PAGE, flags=re.DOTALL)
    (folder / "run.yaml").write_text(file)
    (call,) = noted_calls(BLOCKS["config"], folder)
    args = flags_of(call)
    assert (args.mixed_precision, args.learning_rate, args.max_train_steps) == ("bf16", 1e-4, 3000)
    assert (args.rank, args.gradient_checkpointing, args.output_dir) == (64, False, "outputs/rank-64")


@pytest.mark.parametrize("launcher", sorted(path.name for path in ROOT.glob("*.sh")))
@pytest.mark.parametrize("flags", ["--config run.yaml", "--report_to none --config=run.yaml"])
def test_a_launcher_whose_settings_would_count_more_refuses_a_file(folder, launcher, flags):
    done = subprocess.run(["bash", ROOT / launcher, *flags.split()], capture_output=True, text=True)
    assert done.returncode == 2
    named = re.search(r"^error: --config: .* (training/\w+\.py)$", done.stderr).group(1)
    assert named in (ROOT / launcher).read_text().split("command=(")[1]


def test_the_command_that_repeats_a_run_reads_what_that_run_wrote(folder):
    (folder / "outputs" / "my-lora").mkdir(parents=True)
    args = parse_args(
        ["--pretrained_model_name_or_path", "a/b", "--data_root", "prepared"], task="text-to-video", method="lora"
    )
    repeated, others = split_flags(args, flag_names("text-to-video", "lora"), seed=7)
    (folder / "outputs/my-lora/config.yaml").write_text(render_config(repeated, others, []), encoding="utf-8")
    (call,) = noted_calls(BLOCKS["repeat"], folder)
    again = flags_of(call)
    assert (again.seed, again.data_root, again.output_dir) == (7, "prepared", "outputs/again")


def test_all_code_of_the_page_is_tested():
    assert code_blocks(PAGE) == list(BLOCKS.values())
    tested = {"launchers", "dry run", "prepare for images", "all weights", "validation set", "memory"}
    tested |= {"config", "repeat"}
    assert BLOCKS.keys() == tested


def test_the_code_for_all_weights_loads_them(folder, tiny_models):
    tuned = CogVideoXTransformer3DModel.from_pretrained(tiny_models("5b") / "transformer")
    tuned.save_pretrained(folder / "outputs" / "my-model" / "transformer")
    code = BLOCKS["all weights"].replace("THUDM/CogVideoX-5b", str(tiny_models("5b")))
    names: dict = {}
    exec(code, names)
    assert names["pipe"].transformer is names["transformer"]


@pytest.mark.parametrize("task", ["text", "image"])
@pytest.mark.parametrize("method", ["lora", "sft"])
def test_the_flags_that_the_page_names_exist(task, method):
    done = subprocess.run(
        [sys.executable, TRAINING / f"cogvideox_{task}_to_video_{method}.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    of_lora, of_sft = {"--lora_target_modules", "--use_rslora", "--use_dora", "--lora_dropout"}, {"--save_pipeline"}
    of_lora |= {"--lora_weights", "--quantize_base", "--stream_blocks"}
    of_sft |= {"--weights_dtype"}
    elsewhere = {"--save_image_latents"} | (of_sft if method == "lora" else of_lora)
    elsewhere |= {"--config_file", "--no-NAME", "--no-gradient_checkpointing"}
    named = set(re.findall(r"--\w[\w-]*", re.sub(r"<!--.*?-->", "", PAGE))) - elsewhere
    assert named <= set(re.findall(r"--\w[\w-]*", done.stdout))
