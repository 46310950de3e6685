"""The launchers: one name for a thing in all of them, the choice of GPUs, `--help`, and mistakes in settings."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from check_settings import settings_of
from doc_pages import PROGRAMS, noted_calls, script_flags, script_of, value_of
from repository import ROOT


LAUNCHERS = sorted(path.name for path in ROOT.glob("*.sh"))
TRAIN, PREPARE = "bash train_text_to_video_lora.sh", "bash prepare_dataset.sh"
INTERRUPTED = '#!/usr/bin/env bash\nkill -INT $$ && echo "$0" >> "$CALLS"\n'  # fails if it hears the signal
SHOW_ENVIRONMENT = '#!/usr/bin/env bash\nenv | grep -E "^(ACCELERATE|OMP|KMP)_" | paste -sd " " >> "$CALLS"\n'
SHOW_GPUS = '#!/usr/bin/env bash\nprintf "%q " "${CUDA_VISIBLE_DEVICES-all}" "$@" >> "$CALLS"\necho >> "$CALLS"\n'


def refusal(code: str, folder: Path, **environment: str) -> str:
    with pytest.raises(subprocess.CalledProcessError) as error:
        noted_calls(code, folder, **environment)
    assert error.value.returncode == 2
    assert b"===" not in error.value.stdout
    return error.value.stderr.decode()


def test_settings_exported_once_serve_preparation_and_training(tmp_path):
    prepare, train = noted_calls(
        f"export MODEL_PATH=./model CLIPS=raw PREPARED=done CAPTION_COLUMN=words\n{PREPARE}\n{TRAIN}", tmp_path
    )
    assert value_of(prepare, "--model_id") == value_of(train, "--pretrained_model_name_or_path") == "./model"
    assert value_of(prepare, "--data_root") == "raw"
    assert value_of(prepare, "--output_dir") == value_of(train, "--data_root") == "done"
    assert value_of(prepare, "--caption_column") == value_of(train, "--caption_column") == "words"


@pytest.mark.parametrize(
    ("launcher", "old", "new"),
    [
        (PREPARE, "MODEL_ID=m DATA_ROOT=raw OUTPUT_DIR=done", "MODEL_PATH=m CLIPS=raw PREPARED=done"),
        (TRAIN, "MODEL_ID=m DATA_ROOT=done OUTPUT_DIR=runs", "MODEL_PATH=m PREPARED=done OUTPUT_ROOT=runs"),
        (TRAIN, "LOAD_TENSORS=false DATA_ROOT=raw", "LOAD_TENSORS=false CLIPS=raw"),
        (
            TRAIN,
            "ACCELERATE_CONFIG_FILE=accelerate_configs/ddp_2_machines.yaml NUM_PROCESSES=8",
            "ACCELERATE_CONFIG=accelerate_configs/ddp_2_machines.yaml NUM_GPUS=4",
        ),
    ],
)
def test_an_old_name_means_the_new_one(tmp_path, launcher, old, new):
    by_old, by_new = noted_calls(f"{old} {launcher}\n{new} {launcher}", tmp_path)
    assert by_old == by_new


def test_a_token_budget_replaces_the_batch_size(tmp_path):
    usual, budget = noted_calls(f"{TRAIN}\n{TRAIN} --max_tokens_per_batch 9000", tmp_path)
    assert value_of(usual, "--train_batch_size") == "1"
    assert "--train_batch_size" not in budget and value_of(budget, "--max_tokens_per_batch") == "9000"


def test_raw_clips_are_named_for_training_as_for_preparation(tmp_path):
    code = f"DATASET_FILE=a.csv CAPTION_COLUMN=words VIDEO_COLUMN=file LOAD_TENSORS=false {TRAIN}"
    (call,) = noted_calls(code, tmp_path)
    assert "--load_tensors" not in call and "--data_root" not in call
    names = ("--dataset_file", "--caption_column", "--video_column", "--height", "--width")
    assert [value_of(call, name) for name in names] == ["a.csv", "words", "file", "480", "720"]


@pytest.mark.parametrize(
    ("settings", "seen", "config", "processes"),
    [
        ("", "all", None, None),
        ("GPU_IDS=1", "1", None, None),
        ("NUM_MACHINES=1 NUM_GPUS=1", "all", None, None),
        ('GPU_IDS="0,1"', "0,1", "ddp", "2"),
        ('GPU_IDS="GPU-1a, MIG-b"', "GPU-1a,MIG-b", "ddp", "2"),
        ('GPU_IDS="0 3" ACCELERATE_CONFIG=accelerate_configs/zero2.yaml', "0,3", "zero2", "2"),
        ("NUM_GPUS=8", "all", "ddp", "8"),
        ("NUM_GPUS=8 NUM_MACHINES=3", "all", "ddp_2_machines", "24"),
        ("CUDA_VISIBLE_DEVICES=5", "5", None, None),
    ],
)
def test_the_gpus_that_are_named_are_used(tmp_path, settings, seen, config, processes):
    programs = PROGRAMS | dict.fromkeys(("accelerate", "torchrun", "python"), SHOW_GPUS)
    code = f"{settings} {TRAIN}\nMACHINE_RANK=0 MAIN_PROCESS_IP=a {settings} {PREPARE}"
    train, prepare = noted_calls(code, tmp_path, programs)
    if config is None:
        assert train[1].endswith(script_of(train))  # by python
    else:
        assert Path(value_of(train, "--config_file")).stem == config
        assert value_of(train, "--num_processes") == processes
    assert [train[0], prepare[0]] == [seen, seen]
    on_several = "--standalone" in prepare or "--nnodes" in prepare
    assert on_several == (processes is not None)


@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        ("", "24"),
        ("CPU_THREADS=3", "3"),
        ("NUM_GPUS=8", "3"),
        ("NUM_GPUS=32", "1"),
        ("NUM_GPUS=4 NUM_MACHINES=3", "6"),
        ("ACCELERATE_CONFIG=accelerate_configs/zero2_offload.yaml", "12"),
        ("ACCELERATE_CONFIG=accelerate_configs/ddp_2_machines.yaml", "3"),
        ("ACCELERATE_CONFIG=own.yaml", "24"),
    ],
)
def test_the_processes_of_a_machine_share_its_cores(tmp_path, settings, threads):
    (tmp_path / "own.yaml").write_text("mixed_precision: bf16\n")
    programs = PROGRAMS | {"nproc": "#!/bin/sh\necho 24\n", "python": SHOW_ENVIRONMENT}
    (call,) = noted_calls(f"MACHINE_RANK=0 MAIN_PROCESS_IP=a {settings} {TRAIN}", tmp_path, programs)
    if call[0] == "launch":
        assert value_of(call, "--num_cpu_threads_per_process") == threads
    else:
        assert f"OMP_NUM_THREADS={threads}" in call


def own_config(file: Path, text: str = "", **changed: str) -> str:
    """Write the configuration of one GPU with more lines or other values; return the setting of the launchers."""
    lines = (ROOT / "accelerate_configs/single_gpu.yaml").read_text() + text
    for name, value in changed.items():
        lines = re.sub(rf"^{name}:.*$", f"{name}: {value}", lines, flags=re.MULTILINE)
    file.write_text(lines)
    return f"ACCELERATE_CONFIG={file}"


def told_by_accelerate(call: list[str]) -> dict[str, str]:
    """Return the environment that `accelerate launch` with these arguments would start the script with."""
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(call))
    return prepare_simple_launcher_cmd_env(arguments)[1]


def test_one_process_starts_without_accelerate_but_is_told_the_same(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "OMP_", "KMP_"))]:
        monkeypatch.delenv(name)
    defaults = "debug: false\nenable_cpu_affinity: false\ntpu_env: []\ntpu_use_sudo: false\n"  # of `accelerate config`
    settings = [
        own_config(tmp_path / "gpu.yaml", defaults),
        own_config(tmp_path / "cpu.yaml", use_cpu="true", mixed_precision="bf16"),
        own_config(tmp_path / "half.yaml", mixed_precision="'fp16' # half"),
    ]
    code = "\n".join(f"CPU_THREADS=3 {setting} {TRAIN}" for setting in settings)
    for told in noted_calls(code, tmp_path, PROGRAMS | {"python": SHOW_ENVIRONMENT}):
        ours = dict(one.lower().split("=", 1) for one in told)
        flags = ["--config_file", ours.pop("accelerate_config"), "--num_cpu_threads_per_process", "3", "script.py"]
        theirs = {name.lower(): value.lower() for name, value in told_by_accelerate(flags).items()}
        # The rest are defaults, and settings of another OpenMP than torch's.
        seen = {name for name in theirs if name.startswith(("accelerate_", "omp_")) and "_dynamo_" not in name}
        assert ours == {name: theirs[name] for name in seen}


def test_a_file_with_another_setting_is_left_to_accelerate_which_leaves_the_visible_gpus_as_they_are(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    settings = [
        own_config(tmp_path / "dynamo.yaml", "dynamo_config:\n  dynamo_backend: INDUCTOR\n"),
        own_config(tmp_path / "debug.yaml", "debug: true\n"),
        own_config(tmp_path / "gpus.yaml", gpu_ids='"0"'),
    ]
    for call in noted_calls("\n".join(f"{setting} {TRAIN}" for setting in settings), tmp_path):
        assert call[0] == "launch"
        assert told_by_accelerate(call[1:])["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            f"RANK=8 {TRAIN}",
            "RANK is set, but is not a setting of train_text_to_video_lora.sh; rename it to LORA_RANK",
        ),
        (f"MODEL_ID=a MODEL_PATH=b {TRAIN}", "MODEL_ID=a and MODEL_PATH=b mean the same setting; unset MODEL_ID"),
        (f"GPU_IDS=0,1 NUM_GPUS=3 {PREPARE}", 'GPU_IDS="0,1" names 2 GPUs, but the number is set to 3'),
        (f"GPU_IDS=1 CUDA_VISIBLE_DEVICES=0 {TRAIN}", "GPU_IDS=1 and CUDA_VISIBLE_DEVICES=0 differ; unset one"),
        *(
            (f"GPU_IDS={wrong} {TRAIN}", f"GPU_IDS={wrong}: name each GPU once")
            for wrong in ("all", "-1", "0,,1", "0,0", "GPU-1,")
        ),
        (f"NUM_GPUS=two {TRAIN}", "NUM_GPUS=two: must be a whole number of 1 or more"),
        (f"NUM_MACHINES=0 {PREPARE}", "NUM_MACHINES=0: must be a whole number of 1 or more"),
        (f"NUM_PROCESSES=3 NUM_MACHINES=2 {TRAIN}", "NUM_PROCESSES=3: 2 machines cannot share it equally"),
        (
            f"GPU_IDS=0,1 ACCELERATE_CONFIG=accelerate_configs/single_gpu.yaml {TRAIN}",
            "starts one process, not 2; unset it, or use accelerate_configs/ddp.yaml",
        ),
        (
            f"NUM_MACHINES=2 ACCELERATE_CONFIG=accelerate_configs/cpu.yaml {TRAIN}",
            "starts one process, not 2; unset it, or use accelerate_configs/ddp_2_machines.yaml",
        ),
        (f"NUM_MACHINES=2 {PREPARE}", "NUM_MACHINES=2: needs MACHINE_RANK"),
        (f"DATA_ROOT=done OUTPUT_DIR=done {TRAIN}", "OUTPUT_ROOT=done is the folder of the prepared data"),
        (f"LOAD_TENSORS=1 {TRAIN}", "LOAD_TENSORS=1: must be true or false"),
        (f"CONTINUE=no-run {TRAIN}", "CONTINUE=no-run: not the folder of a run"),
        (f"ACCELERATE_CONFIG=accelerate_configs/uncompiled_1.yaml {TRAIN}", "now accelerate_configs/single_gpu.yaml"),
        (f"ACCELERATE_CONFIG=accelerate_configs/compiled_1.yaml {TRAIN}", "with the flag --compile"),
        (f"ACCELERATE_CONFIG_FILE=accelerate_configs/deepspeed.yaml {TRAIN}", "now accelerate_configs/zero2.yaml"),
    ],
)
def test_a_mistake_in_the_settings_is_an_error_before_anything_starts(tmp_path, command, message):
    error = refusal(command, tmp_path)
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_help_of_a_launcher_lists_its_settings_without_any_program(launcher):
    done = subprocess.run(
        ["bash", ROOT / launcher, "--help"], env={"PATH": "/usr/bin:/bin"}, check=True, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    for name in settings_of(ROOT / launcher):
        assert any(line.startswith(f"{name}=") for line in lines)
    assert "HEIGHT_BUCKETS=480" in lines or "OPTIMIZERS=adamw" in lines
    assert lines[-1].endswith("training/" + script_of(lines[-1].split()) + " --help")
    assert "${" not in done.stdout and "===" not in done.stdout


def test_a_launcher_is_executable_starts_with_sh_and_keeps_its_line_ends(tmp_path):
    for name in LAUNCHERS:
        assert os.access(ROOT / name, os.X_OK)
    by_sh, by_name = noted_calls("sh prepare_dataset.sh --seed 7\n./prepare_dataset.sh --seed 7", tmp_path)
    assert by_sh == by_name and script_flags(by_sh)[-2:] == ["--seed", "7"]
    shown = subprocess.run(["git", "check-attr", "eol", "--", *LAUNCHERS], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.splitlines() == [f"{name}: eol: lf" for name in LAUNCHERS]


def test_only_the_script_hears_ctrl_c_if_accelerate_starts_one_process(tmp_path):
    config = own_config(tmp_path / "own.yaml", "debug: true\n")
    (call,) = noted_calls(f"{config} {TRAIN}", tmp_path, PROGRAMS | {"accelerate": INTERRUPTED})
    assert Path(call[0]).name == "accelerate"


def test_ctrl_c_before_the_script_has_started_stops_accelerate(tmp_path):
    programs = PROGRAMS | {"accelerate": "#!/bin/sh\nkill -INT $PPID\nexec sleep 30\n"}
    with pytest.raises(subprocess.CalledProcessError) as error:
        noted_calls(f"{own_config(tmp_path / 'own.yaml', 'debug: true')} {TRAIN}", tmp_path, programs)
    assert (error.value.returncode, error.value.stderr) == (130, b"interrupted\n")


@pytest.mark.parametrize(("end", "code"), [("kill -INT $PPID; exit 75", 130), ("exit 75", 75)])
def test_a_launcher_of_one_process_ends_like_it_and_starts_no_other_run(tmp_path, end, code):
    programs = PROGRAMS | {"python": f"#!/bin/sh\necho >> $CALLS\n{end}\n"}
    with pytest.raises(subprocess.CalledProcessError) as error:
        noted_calls(f"MAX_TRAIN_STEPS='1 2' {TRAIN}", tmp_path, programs)
    assert (error.value.returncode, error.value.stderr) == (code, b"")
    assert (tmp_path / "calls").read_text() == "\n"


@pytest.mark.parametrize("command", [f"NUM_GPUS=2 {TRAIN}", f"NUM_GPUS=2 {PREPARE}"])
def test_after_ctrl_c_several_processes_end_with_a_line_that_says_how_to_continue(tmp_path, command):
    programs = PROGRAMS | dict.fromkeys(("accelerate", "torchrun"), "#!/bin/sh\nkill -INT $PPID\necho trace >&2\n")
    with pytest.raises(subprocess.CalledProcessError) as error:
        noted_calls(command, tmp_path, programs)
    assert error.value.returncode == 130
    assert error.value.stderr.decode() == "trace\ninterrupted; start the same command again to continue\n"


def test_a_linked_launcher_works_from_another_folder(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "prepare").symlink_to(ROOT / "prepare_dataset.sh")
    by_link, by_name = noted_calls(f"bin/prepare\n{PREPARE}", tmp_path)
    assert by_link == by_name


def test_a_sweep_ends_with_the_command_that_compares_its_runs(tmp_path):
    logged = '#!/usr/bin/env bash\nmkdir -p "${@: -1}" && touch "${@: -1}/metrics.jsonl"\n'
    start = f"{TRAIN} | tail -n 1 > last.txt"
    for rates, runs in (("1e-4", 1), ("1e-4 3e-4", 2)):
        sweep = {"LEARNING_RATES": rates, "OUTPUT_ROOT": "my runs", "PREPARED": "done"}
        noted_calls(start, tmp_path, PROGRAMS | dict.fromkeys(("accelerate", "python"), logged), **sweep)
        words = shlex.split((tmp_path / "last.txt").read_text())
        assert (words[:2] == ["python", str(ROOT / "training/compare_runs.py")]) == (runs > 1)
    assert words[2:] == sorted(f"my runs/{path.name}" for path in (tmp_path / "my runs").iterdir())
