"""The page on training matches the code: its commands are launched and their flags parsed, its code runs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from diffusers import CogVideoXTransformer3DModel
from PIL import Image

import cogvideox_text_to_video_lora as train_script
from args import parse_args
from cli.schema import flag_values
from common.run_folder import LORA_FILE
from compare_runs import compare_runs
from doc_pages import (
    PARSERS,
    TRAINING_SCRIPTS,
    flags_of,
    help_flags,
    marked_blocks,
    named_flags,
    noted_calls,
    read_page,
    script_flags,
    script_of,
    table_rows,
    value_of,
    without_code,
)
from drawn_runs import write_run
from repository import ROOT
from run.config import render_config, split_flags
from tiny_runs import assert_same_weights, weights_of
from video.condition_frames import fewest_frames


PAGE = read_page("assets/docs/training.md")
BLOCKS = marked_blocks(PAGE)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in (
        "my-prepared",
        "prepared-2b",
        "prepared-i2v",
        "prepared-ends",
        "prepared-1.5",
        "my-clips",
        "held-out",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "held-out" / "metadata.csv").write_text("video,text\n")
    (tmp_path / "outputs/my-lora/validation/step-1000").mkdir(parents=True)
    (tmp_path / "outputs/my-lora/validation/step-1000" / LORA_FILE).touch()
    for name in ("rabbit.png", "yawn.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_recipe_prepares_and_trains_with_flags_that_are_accepted(folder):
    calls = noted_calls(BLOCKS["recipes"], folder)
    runs = [(script_of(call), flags_of(call)) for call in calls]
    prepared_for = {flags.output_dir: flags.model_id for name, flags in runs if name == "prepare_dataset.py"}
    trained = [(name, flags) for name, flags in runs if name != "prepare_dataset.py"]
    scripts = [f"cogvideox_{task}_to_video_{method}.py" for task in ("text", "image") for method in ("lora", "sft")]
    assert [name for name, _ in trained] == [*scripts, scripts[0]]
    assert len({flags.output_dir for _, flags in trained[:4]}) == 4
    for name, flags in trained:
        model = flags.pretrained_model_name_or_path
        assert flags.load_tensors and prepared_for.get(flags.data_root, "THUDM/CogVideoX-5b") == model
        assert flags.use_8bit == name.endswith("_sft.py")
    assert trained[2][1].settings.validation.images == ("rabbit.png",)
    assert value_of(calls[-1], "--num_processes") == "8"
    assert value_of(calls[-1], "--config_file").endswith("/ddp.yaml")
    later = [flags for name, flags in runs if "1.5" in flags.output_dir]
    assert [(flags.max_num_frames, flags.frame_buckets) for flags in later] == [(81, (81,))] * 2
    assert later[0].height_buckets == (768,) and later[0].save_image_latents
    assert later[1].width == 1360 and later[1].save_pipeline


@pytest.mark.parametrize(
    ("block", "flag", "value"),
    [
        ("script", "load_tensors", True),
        ("dry run", "dry_run", True),
        ("best step", "lora", ("outputs/my-lora/validation/step-1000",)),
        ("validation set", "validation_dataset_file", "held-out/metadata.csv"),
    ],
)
def test_a_command_passes_its_flag(folder, block, flag, value):
    (call,) = noted_calls(BLOCKS[block], folder)
    assert getattr(flags_of(call), flag) == value


def test_the_frames_that_the_page_prepares_are_those_that_it_trains_on(folder):
    prepare, train = map(flags_of, noted_calls(BLOCKS["given frames"], folder))
    assert prepare.condition_frames == train.condition_frames == "first,last"
    assert (train.data_root, train.load_tensors, prepare.save_image_latents) == (prepare.output_dir, True, True)
    assert train.settings.validation.images == ("rabbit.png,yawn.png",)
    demo, continued = (BLOCKS[block].split() for block in ("last frame", "continued"))
    assert (ROOT / demo[1]).is_file() and continued == ["DEMO_FRAMES=first:3", *demo]
    rows = table_rows(PAGE.split("### Last frames")[1].split("##")[0])
    shortest = {
        row[0].split("`")[1]: int(row[3].replace("4K+1", "13").split()[0]) for row in rows if "`first" in row[0]
    }
    assert shortest == {value: fewest_frames(value.replace("K", "3")) for value in ("first", "first,last", "first:K")}


def test_the_sweep_launches_one_run_for_each_combination(folder):
    runs = noted_calls(BLOCKS["sweep"], folder, OPTIMIZERS="adam adamw")
    names = ("--learning_rate", "--optimizer", "--max_train_steps")
    values = [tuple(value_of(call, name) for name in names) for call in runs]
    assert values == [(rate, name, "2000") for rate in ("1e-4", "3e-4") for name in ("adam", "adamw")]
    assert len({value_of(call, "--output_dir") for call in runs}) == 4


def shown(value: object) -> str:
    """Return a value as the table of defaults shows it."""
    if isinstance(value, tuple):
        return str(value[0]) if len(value) == 1 else f"{value[0]} to {value[-1]}"
    if value is None or isinstance(value, bool):
        return "-" if value is None else ("on" if value else "off")
    return {1e-4: "1e-4", 1e-5: "1e-5"}.get(value, str(value))


def test_the_defaults_that_differ_from_those_of_the_scripts_are_in_the_table(folder):
    """All but names of models and folders, the prompt, and what follows from other flags."""
    own = {"pretrained_model_name_or_path", "output_dir", "data_root", "validation_prompt", "validation_images"}
    own |= {"validate_first", "layout", "num_image_latents"}
    rows = table_rows(PAGE.split("### Defaults that differ")[1].split("###")[0])
    table = {tuple(cell.removesuffix(" (preparation)") for cell in row[:3]) for row in rows if row[0][0] == "`"}
    differing = set()
    for path in ROOT.glob("*.sh"):
        settings = {"CLIPS": "my-clips", "PREPARED": "my-prepared", "VALIDATION_IMAGES": "rabbit.png"}
        (call,) = noted_calls(f"bash {path.name}", folder, **settings)
        needed = (
            ["--output_dir", "out"] if path.name.startswith("prepare") else ["--pretrained_model_name_or_path", "a/b"]
        )
        defaults = flag_values(PARSERS[script_of(call)]([*needed, "--data_root", "my-clips"]))
        values = flag_values(flags_of(call).settings).items()
        changed = {name: value for name, value in values if value != defaults[name] and name not in own}
        differing |= {(f"`--{name}`", shown(value), shown(defaults[name])) for name, value in changed.items()}
    assert differing == table


def test_a_finished_run_is_trained_longer_with_its_own_flags(folder, tiny_models, prepared_demo, fresh_accelerator):
    """The continued run ends as one of that length does."""
    data = prepared_demo("--height_buckets", "64", "--width_buckets", "96", "--frame_buckets", "17")
    tiny = {"MODEL_PATH": str(tiny_models("5b")), "PREPARED": str(data), "MIXED_PRECISION": "no", "REPORT_TO": "none"}
    tiny |= {"HEIGHT": "64", "WIDTH": "96", "NUM_FRAMES": "17", "LR_SCHEDULES": "constant", "LORA_RANK": "4"}
    start = "bash train_text_to_video_lora.sh --num_inference_steps 1"
    for output, steps in (("outputs/short", "2"), ("outputs/long", "3")):
        (call,) = noted_calls(start, folder, **tiny, MAX_TRAIN_STEPS=steps)
        train_script.main([*script_flags(call), "--output_dir", output])
    (call,) = noted_calls(BLOCKS["continue"].replace("3000", "3").replace("my-lora", "short"), folder)
    train_script.main(script_flags(call))
    run = folder / "outputs/short"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert_same_weights(weights_of(run), weights_of(folder / "outputs/long"))

    again = "CONTINUE=outputs/short MAX_TRAIN_STEPS=4 bash train_text_to_video_lora.sh"
    (call,) = noted_calls(again, folder)
    assert value_of(call, "--config") == "outputs/short/config-step-2.yaml"


def test_the_memory_commands_let_the_toolkit_choose(folder):
    budget, trial = map(flags_of, noted_calls(BLOCKS["memory"], folder))
    assert (budget.memory_budget_gb, budget.auto_fit) == (16, False)
    assert (trial.memory_budget_gb, trial.auto_fit) == (None, True)


@pytest.mark.parametrize("launcher", sorted(path.name for path in ROOT.glob("train_*.sh")))
def test_a_launcher_drops_its_own_memory_flags_if_the_toolkit_chooses(folder, launcher):
    savings = {"--use_8bit"} if launcher.endswith("sft.sh") else set()
    code = (
        f"bash {launcher}\nbash {launcher} --auto_fit\n"
        f"OPTIMIZER_FLAGS=--use_4bit bash {launcher} --memory_budget_gb 24"
    )
    plain, chosen, own = noted_calls(code, folder, VALIDATION_IMAGES="start.png")
    assert savings <= set(plain) and "--gradient_checkpointing" not in plain
    assert not savings & {*chosen, *own}
    assert ("--use_4bit" in own) == launcher.endswith("sft.sh")


def test_the_command_with_a_file_of_flags_reads_the_one_that_the_page_shows(folder):
    (file,) = re.findall(r"```yaml\n(# run.yaml\n.*?)```", PAGE, flags=re.DOTALL)
    (folder / "run.yaml").write_text(file)
    (call,) = noted_calls(BLOCKS["config"], folder)
    args = flags_of(call)
    assert (args.mixed_precision, args.learning_rate, args.max_train_steps) == ("bf16", 1e-4, 3000)
    assert (args.rank, args.gradient_checkpointing, args.output_dir) == (64, False, "outputs/rank-64")


@pytest.mark.parametrize("launcher", sorted(path.name for path in ROOT.glob("*.sh")))
@pytest.mark.parametrize("flags", ["--config run.yaml", "--report_to none --config=run.yaml"])
def test_a_launcher_refuses_a_file_that_its_settings_would_override(folder, launcher, flags):
    done = subprocess.run(["bash", ROOT / launcher, *flags.split()], capture_output=True, text=True)
    assert done.returncode == 2
    named = re.search(r"^error: --config: .* (training/\w+\.py)$", done.stderr).group(1)
    assert f"script={named}\n" in (ROOT / launcher).read_text()


def test_the_command_that_repeats_a_run_reads_what_that_run_wrote(folder):
    args = parse_args(
        ["--pretrained_model_name_or_path", "a/b", "--data_root", "my-prepared"], task="text-to-video", method="lora"
    )
    repeated, others = split_flags(args, seed=7)
    (folder / "outputs/my-lora/config.yaml").write_text(render_config(repeated, others, []), encoding="utf-8")
    (call,) = noted_calls(BLOCKS["repeat"], folder)
    again = flags_of(call)
    assert (again.seed, again.data_root, again.output_dir) == (7, "my-prepared", "outputs/again")


def test_the_runs_of_a_sweep_are_compared(folder):
    for name in ("a", "b"):
        write_run(folder / "outputs" / name)
    shutil.rmtree(folder / "outputs/my-lora")
    (call,) = noted_calls(BLOCKS["compare"], folder)
    assert compare_runs(flags_of(call).settings) == Path("outputs/comparison.html")


def test_every_block_of_the_page_is_tested():
    tested = {"recipes", "sweep", "script", "dry run", "all weights", "memory", "config", "repeat"}
    tested |= {
        "best step",
        "continue",
        "validation set",
        "compare",
        "docker",
        "given frames",
        "last frame",
        "continued",
    }  # the last: test_dockerfile.py
    assert BLOCKS.keys() == tested


def test_the_code_for_full_fine_tuning_loads_the_weights(folder, tiny_models):
    tuned = CogVideoXTransformer3DModel.from_pretrained(tiny_models("5b") / "transformer")
    tuned.save_pretrained(folder / "outputs" / "my-model" / "transformer")
    code = BLOCKS["all weights"].replace("THUDM/CogVideoX-5b", str(tiny_models("5b")))
    names: dict = {}
    exec(code, names)
    assert names["pipe"].transformer is names["transformer"]


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_the_flags_that_the_page_names_are_those_of_each_script(script):
    of_lora = {"--lora_target_modules", "--use_rslora", "--use_dora", "--lora_dropout", "--lora_alpha", "--rank"}
    of_lora |= {"--lora_weights", "--quantize_base", "--stream_blocks", "--adapter", "--lokr_factor"}
    elsewhere = {"--image", "--last_image", "--video", "--quiet", "--lora_scale"} | help_flags("prepare_dataset.py")
    elsewhere |= (
        of_lora if script.endswith("_sft.py") else {"--save_pipeline", "--save_validation_weights", "--weights_dtype"}
    )
    images = {"--noised_image_dropout", "--ignore_learned_positional_embeddings", "--validation_images"}
    images.add("--condition_frames")
    elsewhere |= images if "control" in script else {"--validation_controls"}
    assert named_flags(without_code(PAGE)) - elsewhere <= help_flags(script)
