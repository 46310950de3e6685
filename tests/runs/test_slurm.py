"""The SLURM scripts, run on one machine with stand-ins for srun and scontrol."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from accelerate_env import environment_of
from args import parse_args, parse_prepare_args
from cli.schema import flag_values
from prepared.read_index import read_index
from repository import ROOT


SCRIPTS = ROOT / "assets" / "slurm"

# Starts as many tasks as SLURM would, and exits with the highest of their codes, 128 + n for signal n.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % (SLURM_NTASKS / SLURM_NNODES))) "$@" &
  tasks+=($!)
done
echo "${tasks[@]}" > "$NOTES/tasks"
highest=0
for task in "${tasks[@]}"; do
  code=0
  wait "$task" || code=$?
  highest=$((code > highest ? code : highest))
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1 $2" == "show hostnames" ]]; then
  [[ "$3" == "node[7-8]" ]] && printf '127.0.0.1\\n127.0.0.2\\n'
else
  echo "$*" >> "$NOTES/scontrol"
fi
"""
# Replaces Python: notes how it was started, then exits with a code or waits for a signal.
TASK = f"""#!{sys.executable}
import json, os, signal, sys
if sys.argv[1].endswith("accelerate_env.py"):
    print("export FROM_CONFIG=" + sys.argv[2])
    sys.exit()
if os.environ["LEAVE_WITH"] == "75 on USR1":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
with open(os.environ["NOTES"] + "/started", "w") as started:
    started.write(json.dumps([os.getpid(), sys.argv[1:], dict(os.environ)]) + "\\n")
if os.environ["LEAVE_WITH"].isdigit():
    sys.exit(int(os.environ["LEAVE_WITH"]))
signal.pause()
"""


@pytest.fixture
def submit(tmp_path) -> Callable[..., subprocess.Popen]:
    """Start a script as SLURM does on two nodes of one task each; the stand-ins note their arguments."""
    notes = tmp_path / "notes"
    for folder in (notes, tmp_path / "programs"):
        folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("task", TASK)):
        (tmp_path / "programs" / name).write_text(text)
        (tmp_path / "programs" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "31007", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
    slurm |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "3", "NOTES": str(notes), "OMP_NUM_THREADS": "1"}
    slurm |= {"PATH": os.pathsep.join([str(tmp_path / "programs"), os.environ["PATH"]])}

    def submit(script: str, *flags: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", SCRIPTS / script, *flags],
            cwd=tmp_path,
            env=os.environ | slurm | {"PYTHON": "task"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return submit


def started(notes: Path, count: int) -> list[tuple[int, list[str], dict[str, str]]]:
    """Wait for the notes of as many tasks: process, arguments and environment, by rank."""
    lines: list[str] = []
    while len(lines) < count:
        lines += (notes / "started").read_text().splitlines()  # ends when the tasks that have opened it close it
    return sorted((json.loads(line) for line in lines), key=lambda task: task[2]["RANK"])


@pytest.mark.parametrize(
    ("script", "ends_by", "leaves_with"), [("train.sbatch", "75 on USR1", 75), ("prepare.sbatch", "USR1", 138)]
)
def test_a_signal_reaches_python_and_requeues_the_job(submit, tmp_path, script, ends_by, leaves_with):
    os.mkfifo(tmp_path / "notes" / "started")
    (tmp_path / "data").mkdir()
    folders = {"DATA_ROOT": str(tmp_path / "data"), "OUTPUT_DIR": str(tmp_path / "out")}
    job = submit(script, "--seed", "7", LEAVE_WITH=ends_by, **folders)
    tasks = started(tmp_path / "notes", 2)
    processes = [process for process, _, _ in tasks]
    for process in processes:
        os.kill(process, signal.SIGUSR1)
    job.communicate()
    assert sorted(processes) == sorted(map(int, (tmp_path / "notes" / "tasks").read_text().split()))
    assert job.returncode == leaves_with
    assert (tmp_path / "notes" / "scontrol").read_text() == "requeue 31007\n"

    common = {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "SRUN_CPUS_PER_TASK": "3"}
    if script == "train.sbatch":
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "21007"}
    assert len(tasks) == 2
    for rank, (_, _, environment) in enumerate(tasks):
        assert environment.items() >= (common | {"RANK": str(rank)}).items()
    (_, (called, *flags), environment) = tasks[0]
    if script == "train.sbatch":
        assert environment["FROM_CONFIG"] == "accelerate_configs/ddp.yaml"
        assert called == "training/cogvideox_text_to_video_lora.py"
        values = flag_values(parse_args(flags, task="text-to-video", method="lora"))
        assert values.items() >= {"seed": 7, "resume_from_checkpoint": "latest", "load_tensors": True}.items()
    else:
        assert called == "training/prepare_dataset.py"
        values = flag_values(parse_prepare_args(flags))
        assert values.items() >= {"seed": 7, "frame_buckets": (49,), "max_num_frames": 49, "dtype": "bf16"}.items()


@pytest.mark.parametrize("script", ["train.sbatch", "prepare.sbatch"])
@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_is_done_or_failed_is_not_requeued(submit, tmp_path, script, code):
    job = submit(script, LEAVE_WITH=str(code))
    job.communicate()
    assert job.returncode == code
    assert not (tmp_path / "notes" / "scontrol").exists()


CLUSTER = """
compute_environment: LOCAL_MACHINE
machine_rank: 0
mixed_precision: bf16
num_machines: 2
num_processes: 16
use_cpu: false
"""
FSDP = f"""{CLUSTER}
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: CogVideoXBlock
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""
DEEPSPEED = f"""{CLUSTER}
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_multinode_launcher: standard
  zero_stage: 2
  offload_optimizer_device: cpu
"""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FSDP, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_TRANSFORMER_CLS_TO_WRAP": "CogVideoXBlock"}),
        (DEEPSPEED, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    ],
)
def test_a_config_sets_the_environment_of_the_tasks(tmp_path, config, expected):
    (tmp_path / "config.yaml").write_text(config)
    environment = environment_of(str(tmp_path / "config.yaml"))
    assert environment.items() >= expected.items()
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert not environment.keys() & {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "CUDA_VISIBLE_DEVICES"}


@pytest.mark.parametrize("config", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_can_be_passed_to_the_tasks(config):
    assert environment_of(str(config))["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.slow
@pytest.mark.parametrize("config", [FSDP, DEEPSPEED, (ROOT / "accelerate_configs" / "ddp.yaml").read_text()])
def test_the_tasks_get_the_environment_of_accelerate_launch(tmp_path, config):
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "script.py").write_text("import json, os\nprint('environment:', json.dumps(dict(os.environ)))\n")
    launch = ["accelerate", "launch", "--config_file", "config.yaml", "--num_processes", "1", "--num_machines", "1"]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        capture_output=True,
        text=True,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("environment: ")]
    told = json.loads(line.removeprefix("environment: "))
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    ours = environment_of(str(tmp_path / "config.yaml"))
    assert ours == {name: value for name, value in told.items() if name.startswith(prefixes)}


@pytest.fixture
def real(tiny_models, demo_clips, tmp_path) -> dict[str, str]:
    settings = {"PYTHON": sys.executable, "MODEL_ID": str(tiny_models("5b")), "DATA_ROOT": str(demo_clips)}
    settings |= {"HEIGHT_BUCKETS": "64", "WIDTH_BUCKETS": "96", "FRAME_BUCKETS": "9 17", "DTYPE": "fp32"}
    return settings | {"OUTPUT_DIR": str(tmp_path / "prepared"), "ACCELERATE_USE_CPU": "true"}


@pytest.mark.slow
def test_two_nodes_prepare_one_data_set(submit, real, tmp_path):
    job = submit("prepare.sbatch", "--dataloader_num_workers", "0", **real)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert "16/16" in output
    assert len(read_index(tmp_path / "prepared")) == 16
    assert not list((tmp_path / "prepared").rglob(".*"))


@pytest.mark.slow
def test_two_nodes_train_until_they_are_told_to_stop_and_resume(submit, real, tiny_models, tmp_path):
    submit("prepare.sbatch", **real).communicate()
    settings = {"PYTHON": sys.executable, "MODEL_PATH": str(tiny_models("5b")), "DATA_ROOT": real["OUTPUT_DIR"]}
    settings |= {"OUTPUT_DIR": str(tmp_path / "run"), "ACCELERATE_CONFIG": "accelerate_configs/cpu.yaml"}
    settings |= {"MIXED_PRECISION": "no"}
    (tmp_path / "run").mkdir()
    flags = ("--train_batch_size", "1", "--report_to", "none")
    job = submit("train.sbatch", *flags, **settings | {"MAX_TRAIN_STEPS": "100000"})
    output = ""
    while not re.search(r"Training:.* [1-9]\d*/100000 ", output):
        line = job.stdout.readline()  # tqdm's too: they end with a carriage return
        assert line, output
        output += line
    for process in (tmp_path / "notes" / "tasks").read_text().split():
        os.kill(int(process), signal.SIGUSR1)
    output += job.communicate()[0]
    assert job.returncode == 75, output
    assert re.search(r"steps +1 to 100000,", output)
    assert re.search(r"devices +2 x cpu", output)
    assert (tmp_path / "notes" / "scontrol").read_text() == "requeue 31007\n"

    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    job = submit("train.sbatch", *flags, **settings | {"MAX_TRAIN_STEPS": str(done + 1)})
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert re.search(rf"steps +{done + 1} to {done + 1},", output)
    assert re.search(r"devices +2 x cpu", output)
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "notes" / "scontrol").read_text() == "requeue 31007\n"
