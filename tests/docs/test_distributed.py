"""The page on several GPUs matches the code: its commands are launched, and their flags parsed."""

import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from doc_pages import PROGRAMS, flags_of, marked_blocks, noted_calls, read_page, script_flags, script_of, value_of
from repository import ROOT


PAGE = read_page("assets/docs/distributed.md")
BLOCKS = marked_blocks(PAGE)
# Like SLURM's: runs the script with the flags that follow it.
SBATCH = """#!/usr/bin/env bash
while [[ "$1" != *.sbatch ]]; do shift; done
SLURM_JOB_ID=1 SLURM_JOB_NODELIST=a SLURM_SUBMIT_DIR="$PWD" bash "$@"
"""
SRUN = '#!/usr/bin/env bash\nprintf "%q " "${@:7}" >> "$CALLS"\necho >> "$CALLS"\n'
SLURM = {"srun": SRUN, "sbatch": SBATCH, "scontrol": "#!/bin/sh\necho a\n", "not-python": "#!/bin/sh\n"}


@pytest.fixture
def calls_of(tmp_path, monkeypatch):
    for name in ("prepared", "my-clips", "clips"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return lambda block: noted_calls(
        BLOCKS[block].replace("/shared/", ""), tmp_path, PROGRAMS | SLURM, PYTHON="not-python"
    )


def options(call: list[str], *names: str) -> list[str]:
    return [value_of(call, f"--{name}") for name in names]


def test_the_number_of_gpus_reaches_the_launch(calls_of):
    second, prepare, eight = calls_of("gpus")
    assert script_flags(second) == second[1:] and options(eight, "num_processes") == ["8"]
    assert "--nproc_per_node=2" in prepare
    assert not {"--machine_rank", "--main_process_ip", "--main_process_port"} & {*second, *eight}


@pytest.mark.parametrize(
    ("block", "configs"),
    [
        ("ddp", ["ddp", "ddp_8"]),
        ("zero", ["zero2", "zero2_offload"]),
        ("fsdp", ["fsdp2"] * 2),
        ("context", ["fsdp2_context_parallel", "ddp"]),
    ],
)
def test_a_way_to_divide_a_run_is_a_config_and_accepted_flags(calls_of, monkeypatch, block, configs):
    calls = calls_of(block)
    assert [value_of(call, "--config_file") for call in calls] == [
        f"accelerate_configs/{name}.yaml" for name in configs
    ]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("FSDP_VERSION", "2")
    for call, config in zip(calls, configs, strict=True):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", str(config.startswith("fsdp2")).lower())
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str(config.startswith("zero")).lower())
        assert flags_of(call).data_root == "prepared"


def test_each_machine_gets_its_number_and_the_address(calls_of):
    calls = calls_of("two machines")
    assert [options(call, "machine_rank", "main_process_ip") for call in calls] == [[r, "10.0.0.1"] for r in "01"]
    assert flags_of(calls[0]) == flags_of(calls[1])


def test_the_jobs_of_slurm_call_their_scripts_with_accepted_flags(calls_of):
    prepare, *runs = map(flags_of, calls_of("slurm"))
    assert prepare.output_dir == runs[0].data_root == "prepared"
    assert [run.output_dir for run in runs] == ["outputs/cogvideox-lora", "outputs/other", "outputs/all-weights"]
    assert [run.learning_rate for run in runs] == [1e-4, 3e-4, 1e-4]
    assert [run.settings.method for run in runs] == ["lora", "lora", "sft"]


def test_preparation_is_launched_on_all_gpus_of_all_machines(calls_of):
    one, *machines = calls_of("prepare")
    assert "--standalone" in one and "--nproc_per_node=8" in one
    names = ("nnodes", "node_rank", "nproc_per_node", "master_addr", "master_port")
    assert [options(call, *names) for call in machines] == [["2", rank, "8", "10.0.0.1", "29500"] for rank in "01"]
    assert {flags_of(call).output_dir for call in (one, *machines)} == {"prepared"}


def test_a_process_joins_without_a_launch(calls_of):
    (call,) = calls_of("join")
    assert script_of(call) == "prepare_dataset.py" and flags_of(call).output_dir == "prepared"
    assert not {"--standalone", "--nnodes"} & {*call}


def test_a_task_of_ray_is_a_process_of_the_preparation_for_each_gpu(monkeypatch, tmp_path):
    """With a stand-in for Ray, which is not installed."""
    started = []
    ray = ModuleType("ray")
    ray.remote = lambda **options: lambda function: SimpleNamespace(remote=lambda: started.append(options) or function)
    ray.init, ray.cluster_resources = lambda: None, lambda: {"CPU": 64.0, "GPU": 2.0}
    ray.get = lambda tasks: [task() for task in tasks]
    calls = []
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(subprocess, "run", lambda command, cwd, check: calls.append([*command, cwd, str(check)]))
    exec(BLOCKS["ray"], {})
    assert [options["num_gpus"] for options in started] == [1, 1]
    assert calls[0] == calls[1]
    *call, folder, check = calls[0]
    assert (call[0], folder, check) == (sys.executable, "/shared/cogvideox-factory", "True")
    for name in ("clips", "prepared"):
        (tmp_path / name).mkdir()
    values = flags_of([word.replace("/shared", str(tmp_path)) for word in call])
    assert values.save_latents_and_embeddings and values.frame_buckets == (49,)


def test_the_run_that_finds_the_network_device_is_short(calls_of):
    (call,) = calls_of("debug")
    assert flags_of(call).max_train_steps == 2


def test_every_block_of_the_page_is_tested():
    tested = {"gpus", "ddp", "zero", "fsdp", "context", "two machines", "slurm", "prepare"}
    tested |= {"join", "ray", "debug"}
    assert BLOCKS.keys() == tested


def test_every_config_is_in_the_table():
    table = PAGE.split("| hardware")[1].split("\n\n")[0]
    configs = {path.name for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert configs <= set(re.findall(r"`(\w+\.yaml)`", table))
