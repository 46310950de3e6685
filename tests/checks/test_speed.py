import pytest

from args import parse_args


@pytest.fixture
def flags(tmp_path) -> list[str]:
    folders = ["--data_root", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    return ["--pretrained_model_name_or_path", "o/m", *folders]


def parse(*argv: str):
    return parse_args(argv, task="text-to-video", method="lora")


def error_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(*argv)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    return line


OFFLOAD = "--gradient_checkpointing --offload_checkpoints"


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ("--attention_backend sage", "no backward pass; use --validation_attention_backend sage"),
        ("--validation_attention_backend flash", "no video is sampled; add --validation_prompt"),
        ("--sampling_cache pab --compile --validation_prompt a", "skips parts of blocks"),
        ("--sampling_cache faster --compile --validation_prompt a", "use first-block, or omit --compile"),
        (f"--compile {OFFLOAD} --checkpoint_scope feed-forward", "use --checkpoint_scope all-but"),
    ],
)
def test_kernels_and_compilation_that_cannot_work_are_refused(flags, capsys, others, reason):
    line = error_of(capsys, *flags, *others.split())
    assert line.startswith(f"error: {others.split()[0]}")
    assert reason in line


def test_sage_samples_and_checkpointed_blocks_are_compiled(flags):
    args = parse(*flags, "--validation_attention_backend", "SAGE", "--validation_prompt", "a rabbit")
    assert args.speed.validation_attention_backend == "sage"
    assert parse(*flags, "--compile", "--gradient_checkpointing").speed.compile


@pytest.fixture
def launch(monkeypatch):
    """Stand for one of so many processes, launched with a parallelism_config or without."""

    def launch(num_processes: int, **sizes: int) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(num_processes))
        for name, size in sizes.items():
            monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
            monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", str(size))

    return launch


def test_samples_are_divided_as_the_flag_or_the_launch_says(flags, launch):
    assert parse(*flags).speed.context_parallel_size == 1
    launch(8)
    assert parse(*flags).speed.context_parallel_size == 1
    assert parse(*flags, "--context_parallel_size", "4").speed.context_parallel_size == 4
    launch(8, dp_shard_size=8)
    assert parse(*flags, "--context_parallel_size", "2").speed.context_parallel_size == 2
    launch(8, dp_shard_size=2, cp_size=4)
    assert parse(*flags).speed.context_parallel_size == 4
    assert parse(*flags, "--context_parallel_size", "4").speed.context_parallel_size == 4


SIZE = "--context_parallel_size"


@pytest.mark.parametrize(
    ("num_processes", "sizes", "others", "expected"),
    [
        (1, {}, "--context_parallel_size 2", "size 2: does not divide the number of processes (1); "),
        (6, {}, "--context_parallel_size 4", "size 4: does not divide the number of processes (6); "),
        (4, {"cp_size": 4}, f"{SIZE} 2", "size 2: parallelism_config_cp_size in the accelerate config"),
        (4, {"cp_size": 4, "dp_shard_size": 2}, "", "dp_shard_size 2 x cp_size 4) than the 4 launched; set dp_shard_"),
        (4, {"tp_size": 4}, "", "parallelism_config_tp_size: not supported; use parallelism_config_cp_size"),
        (4, {"sp_size": 4}, "", "parallelism_config_sp_size: not supported; use parallelism_config_cp_size"),
        (4, {"cp_size": 4, "cp_comm_strategy": "alltoall"}, "", "strategy alltoall: not supported; set it to all"),
        (2, {}, "--context_parallel_size 2 --compile", "--compile: blocks that gather keys"),
        (2, {}, "--context_parallel_size 2 --memory_budget_gb 24", "--memory_budget_gb: not with divided samples"),
    ],
)
def test_samples_that_cannot_be_divided_are_refused(flags, launch, capsys, num_processes, sizes, others, expected):
    launch(num_processes, **sizes)
    assert expected in error_of(capsys, *flags, *others.split())


def test_a_model_compiled_by_the_launch_configuration_is_refused(flags, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert "pass --compile to the script" in error_of(capsys, *flags)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as accelerate launch says it
    assert parse(*flags).speed.compile is False
