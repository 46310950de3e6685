"""Sharded weights on several ranks (FSDP2) train, save, resume and sample like unsharded ones.

The launches run on CPUs: see fsdp_on_cpu.py.
"""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

import cogvideox_text_to_video_lora
import cogvideox_text_to_video_sft
import tiny_runs
from accelerate_env import environment_of
from args import parse_args
from common.errors import UserError
from parallel.coordinator import Coordinator
from parallel.fsdp import load_optimizer, save_optimizer
from parallel.lockstep import OutOfStep, lockstep
from planning.samples import RawData
from repository import ROOT, TRAINING
from run.recipe import Recipe
from run.spec import check_device


CONFIG = ROOT / "accelerate_configs" / "fsdp2.yaml"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
LORA, SFT = cogvideox_text_to_video_lora.__name__, cogvideox_text_to_video_sft.__name__
LORA_FILE = "pytorch_lora_weights.safetensors"
TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"
SIZE = ["--height", "32", "--width", "48", "--frame_buckets", "9", "--max_num_frames", "9"]


def launch(runs: list[tuple[str, list[str]]], folder: Path, num_ranks: int = 2, **others: str) -> str:
    (folder / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run(
        [*TORCHRUN, str(num_ranks), str(ROOT / "tests" / "helpers" / "fsdp_on_cpu.py"), str(folder / "runs.json")],
        env=os.environ | environment_of(str(CONFIG)) | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | others,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_alone(run: tuple[str, list[str]]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    {LORA: cogvideox_text_to_video_lora, SFT: cogvideox_text_to_video_sft}[run[0]].main(run[1])
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def a_run(tiny_models, prepared_demo):
    """A function that returns script and flags of a run with four samples a step on two ranks or on one."""
    prepared = prepared_demo(*SIZE)

    def make(script: str, output: Path, *flags: str, batches: int = 2) -> tuple[str, list[str]]:
        made = ["--pretrained_model_name_or_path", str(tiny_models("5b")), "--data_root", str(prepared)]
        made += ["--load_tensors", "--output_dir", str(output), *SIZE, "--train_batch_size", "1", "--seed", "0"]
        made += ["--gradient_accumulation_steps", str(batches), "--max_train_steps", "3", "--learning_rate", "1e-3"]
        made += ["--lr_warmup_steps", "0", "--optimizer", "adamw", "--max_grad_norm", "0.1"]
        made += ["--rank", "4", "--lora_alpha", "4"] if script == LORA else []
        return script, [*made, *flags]

    return make


def curve(output: Path, name: str) -> list[float]:
    return list(tiny_runs.curve(output, name).values())


def assert_same_curves(ours: Path, theirs: Path, *names: str, tolerance: float = 1e-4) -> None:
    for name in names:
        assert curve(ours, name) == pytest.approx(curve(theirs, name), rel=tolerance)


def assert_same_run(ours: Path, theirs: Path, file: str) -> None:
    assert_same_curves(ours, theirs, "loss", "grad_norm", "lr")
    assert_same_weights(ours / file, theirs / file)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    saved, expected = load_file(ours), load_file(theirs)
    assert saved.keys() == expected.keys()
    for name, weight in saved.items():
        assert weight.dtype == expected[name].dtype
        # The size of Adam's first steps does not depend on the gradient's: tiny gradients may cause a difference.
        assert (weight - expected[name]).abs().gt(1e-4).float().mean() < 0.01, name


@pytest.fixture(scope="module")
def in_shards(a_run, demo_clips, tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("runs")
    done = SimpleNamespace(**{name: root / name for name in ("lora", "lora_alone", "resumed", "sft", "sft_alone")})
    video = sorted((demo_clips / "videos").iterdir())[0]
    table = root / "held-out.jsonl"
    table.write_text(json.dumps({"video": str(video), "text": "a clip"}) + "\n")  # one clip for both ranks
    validation = ["--validation_dataset_file", str(table), "--allow_outside_paths"]
    sampling = ["--validation_prompt", "a:::b:::c", "--num_inference_steps", "2"]
    (done.lora / "validation" / "step-3" / "01-00-b.mp4").mkdir(parents=True)  # in the way of the second rank
    done.output = launch(
        [
            a_run(LORA, done.lora, "--checkpointing_steps", "2", "--gradient_checkpointing", *validation, *sampling),
            a_run(LORA, done.resumed, "--resume_from_checkpoint", str(done.lora / "checkpoint-2")),
            a_run(SFT, done.sft),
        ],
        root,
    )
    run_alone(a_run(LORA, done.lora_alone, *validation, batches=4))
    run_alone(a_run(SFT, done.sft_alone, batches=4))
    return done


@pytest.mark.slow
def test_training_equals_that_of_one_process(in_shards):
    assert_same_run(in_shards.lora, in_shards.lora_alone, LORA_FILE)
    assert_same_run(in_shards.sft, in_shards.sft_alone, TRANSFORMER_FILE)
    configs = [(run / "transformer" / "config.json").read_text() for run in (in_shards.sft, in_shards.sft_alone)]
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_a_resumed_sharded_run_is_bit_exact(in_shards):
    tiny_runs.assert_same_weights(*map(tiny_runs.weights_of, (in_shards.resumed, in_shards.lora)))
    assert curve(in_shards.resumed, "loss") == curve(in_shards.lora, "loss")[2:]


@pytest.mark.slow
def test_a_checkpoint_holds_only_trained_weights_and_each_rank_writes_its_states(in_shards):
    checkpoint = in_shards.lora / "checkpoint-3"
    expected = {LORA_FILE, "optimizer", "custom_checkpoint_0.pkl", "trainer_state.json", "manifest.json"}
    expected |= {"random_states_0.pkl", "random_states_1.pkl"}
    assert {path.name for path in checkpoint.iterdir()} == expected
    shards = [load_file(path) for path in sorted((checkpoint / "optimizer").iterdir())]
    adapters = sum(weight.numel() for weight in load_file(checkpoint / LORA_FILE).values())
    for shard in shards:
        kept = {name: state.numel() for name, state in shard.items() if not name.endswith(".step")}
        assert sum(kept.values()) == 2 * adapters / len(shards)
    assert len(shards) == 2


@pytest.mark.slow
def test_the_held_out_loss_is_that_of_one_process(in_shards):
    assert len(curve(in_shards.lora, "validation_loss")) == 2
    assert_same_curves(in_shards.lora, in_shards.lora_alone, "validation_loss")


@pytest.mark.slow
def test_ranks_sample_together_and_a_failed_one_does_not_block_the_others(in_shards):
    before, after = (in_shards.lora / "validation" / f"step-{step}" for step in (0, 3))
    assert {path.name for path in before.glob("*.mp4")} == {"00-00-a.mp4", "01-00-b.mp4", "02-00-c.mp4"}
    assert {path.name for path in after.glob("*.mp4") if path.is_file()} == {"00-00-a.mp4"}
    assert in_shards.output.count("training continues; rank 1: ") == 1
    tiny_runs.assert_same_weights(*map(tiny_runs.weights_of, (after, in_shards.lora)))


@pytest.mark.slow
def test_three_ranks_resume_a_run_of_two(a_run, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    two_steps = ["--max_train_steps", "2", "--checkpointing_steps", "1"]  # of six samples
    launch([a_run(SFT, straight, *two_steps, batches=3)], tmp_path)
    resume = ["--resume_from_checkpoint", str(straight / "checkpoint-1")]
    launch([a_run(SFT, resumed, *two_steps, *resume, batches=2)], tmp_path, num_ranks=3)
    assert curve(resumed, "loss") == pytest.approx(curve(straight, "loss")[1:], rel=1e-4)
    assert curve(resumed, "grad_norm") == pytest.approx(curve(straight, "grad_norm")[1:], rel=1e-4)
    assert_same_weights(resumed / TRANSFORMER_FILE, straight / TRANSFORMER_FILE)


@pytest.mark.slow
def test_half_precision_training_equals_that_of_one_process(a_run, tmp_path):
    half = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--checkpoint_scope", "segment"]
    half += ["--checkpoint_every", "2"]
    runs = [("lora", LORA, half), ("dora", LORA, [*half, "--use_dora", "--lora_dropout", "0"]), ("sft", SFT, half)]
    launch([a_run(script, tmp_path / name, *flags) for name, script, flags in runs], tmp_path)
    for name, script, flags in runs:
        run_alone(a_run(script, tmp_path / f"{name}-alone", *flags, batches=4))
    for name in ("lora", "dora"):
        assert_same_run(tmp_path / name, tmp_path / f"{name}-alone", LORA_FILE)
    # Norms have bfloat16 weights too.
    assert_same_curves(tmp_path / "sft", tmp_path / "sft-alone", "loss", "grad_norm", tolerance=2e-3)


@pytest.mark.slow
def test_sharded_ranks_divide_the_tokens_of_a_sample(a_run, tmp_path):
    parallelism = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
    launch([a_run(SFT, tmp_path / "divided")], tmp_path, **parallelism, PARALLELISM_CONFIG_DP_SHARD_SIZE="1")
    run_alone(a_run(SFT, tmp_path / "unsharded"))
    assert_same_run(tmp_path / "divided", tmp_path / "unsharded", TRANSFORMER_FILE)


@pytest.mark.gpu
@pytest.mark.parametrize("script", [LORA, SFT])
def test_one_sharded_gpu_trains_as_an_unsharded_one(a_run, tmp_path, script):
    flags = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--validation_prompt", "a"]
    name, made = a_run(script, tmp_path / "sharded", *flags, "--num_inference_steps", "2")
    environment = os.environ | environment_of(str(CONFIG))
    subprocess.run([*TORCHRUN, "1", str(TRAINING / f"{name}.py"), *made], env=environment, check=True)
    run_alone(a_run(script, tmp_path / "alone", *flags, "--num_inference_steps", "2"))
    assert_same_curves(tmp_path / "sharded", tmp_path / "alone", "loss", "grad_norm", tolerance=1e-2)
    assert list((tmp_path / "sharded" / "validation" / "step-3").glob("*.mp4"))


def test_errors_of_writing_and_reading_states_have_the_documented_types(one_rank, tmp_path):
    model, optimizer = in_one_shard(torch.nn.Linear(4, 4))
    save_optimizer(model, optimizer, tmp_path / "small")
    load_optimizer(model, optimizer, tmp_path / "small")
    larger = in_one_shard(torch.nn.Linear(4, 8))
    with pytest.raises(ValueError, match=r"lacks parts of state\."):
        load_optimizer(*larger, tmp_path / "small")
    with pytest.raises(OSError):
        load_optimizer(model, optimizer, tmp_path / "none")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "optimizer").write_text("in the way")
    with pytest.raises(OSError, match="exists"):
        save_optimizer(model, optimizer, tmp_path / "blocked")
    (shard,) = (tmp_path / "small" / "optimizer").iterdir()
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError):
        load_optimizer(model, optimizer, tmp_path / "small")


def in_one_shard(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Shard the model on the only rank, with an optimizer that has made a step."""
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def one_rank(fresh_accelerator, tmp_path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_failure_inside_the_network_ends_the_run(one_rank):
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    network = torch.nn.Linear(4, 4)
    with pytest.raises(OutOfStep, match="resume it"), lockstep(accelerator, Coordinator()) as watch:
        watch(network)
        network(torch.ones(1, 4))
        network(torch.ones(1, 5))


def launched_by(monkeypatch: pytest.MonkeyPatch, **others: str) -> None:
    for name, value in (environment_of(str(CONFIG)) | others).items():
        monkeypatch.setenv(name, value)


def flags_of(demo_clips: Path, *flags: str, method: str = "lora") -> Namespace:
    needed = ["--pretrained_model_name_or_path", "org/name", "--data_root", str(demo_clips)]
    return parse_args([*needed, *flags], task="text-to-video", method=method)


@pytest.mark.parametrize("config", sorted(CONFIG.parent.glob("fsdp2*.yaml")), ids=lambda path: path.name)
def test_the_configs_are_accepted_and_shard_block_by_block(monkeypatch, demo_clips, config):
    launched_by(monkeypatch, **environment_of(str(config)), RANK="0", WORLD_SIZE="8")
    flags = ["--optimizer", "adamw", "--mixed_precision", "bf16", "--gradient_checkpointing"]
    context_size = 4 if config.stem == "fsdp2_context_parallel" else 1
    assert flags_of(demo_clips, *flags).speed.context_parallel_size == context_size
    assert ParallelismConfig().fsdp_dim_names == ["dp_shard_cp"]  # all eight
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.transformer_cls_names_to_wrap == ["CogVideoXBlock"]
    assert plugin.reshard_after_forward is True


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("FSDP_VERSION", "1", "fsdp_version must be 2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading must be false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing must be false"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params must be false"),
    ],
)
def test_unsupported_settings_are_refused(monkeypatch, demo_clips, capsys, variable, value, named):
    launched_by(monkeypatch, **{variable: value})
    with pytest.raises(SystemExit):
        flags_of(demo_clips, "--optimizer", "adamw")
    assert capsys.readouterr().err.startswith(f"error: --config_file: {named}, as in ")


REFUSED = ["--optimizer prodigy", "--optimizer came", "--optimizer muon", "--mixed_precision fp16", "--use_8bit"]
REFUSED += ["--use_torchao --use_4bit", "--use_ema", "--enable_model_cpu_offload", "--auto_fit"]
REFUSED += ["--memory_budget_gb 24", "--sampling_cache first-block"]
IN_BF16 = "--weights_dtype bf16 --use_torchao --optimizer adamw --mixed_precision bf16"


@pytest.mark.parametrize(("method", "flags"), [*(("lora", flags) for flags in REFUSED), ("sft", IN_BF16)])
def test_flags_that_need_unsharded_weights_are_refused(monkeypatch, demo_clips, capsys, method, flags):
    launched_by(monkeypatch)
    with pytest.raises(SystemExit):
        flags_of(demo_clips, *flags.split(), method=method)
    assert "does not work on sharded weights (FSDP)" in (refusal := capsys.readouterr().err)
    assert refusal.split(":")[1].split()[0] in flags.split()


def test_fsdp_without_gpus_is_refused(a_run, monkeypatch, tmp_path):
    launched_by(monkeypatch, RANK="0", WORLD_SIZE="2")
    accelerator = SimpleNamespace(device=torch.device("cpu"), distributed_type=DistributedType.NO)
    args = parse_args(a_run(LORA, tmp_path)[1], task="text-to-video", method="lora")
    with pytest.raises(UserError, match="accelerate supports FSDP only on GPUs"):
        check_device(Recipe(args, RawData([])), accelerator)
