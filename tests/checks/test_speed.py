import pytest

from args import parse_args


@pytest.fixture
def flags(tmp_path) -> list[str]:
    return [
        "--pretrained_model_name_or_path",
        "o/m",
        "--data_root",
        str(tmp_path),
        "--output_dir",
        str(tmp_path / "o"),
    ]


def parse(*argv: str):
    return parse_args(argv, task="text-to-video", method="lora")


def error_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    return line


def test_nothing_is_compiled_or_recorded_unless_it_is_asked_for(flags):
    args = parse(*flags)
    assert (args.speed.compile, args.speed.profile, args.speed.allow_tf32) == (False, False, False)
    assert (args.speed.attention_backend, args.speed.validation_attention_backend) == (None, None)


def test_sage_is_for_sampling_alone(flags, capsys):
    line = error_of(capsys, *flags, "--attention_backend", "sage")
    assert "no backward pass" in line
    assert "--validation_attention_backend sage" in line
    args = parse(*flags, "--validation_attention_backend", "SAGE", "--validation_prompt", "a rabbit")
    assert args.speed.validation_attention_backend == "sage"


def test_a_backend_of_the_validation_needs_one(flags, capsys):
    line = error_of(capsys, *flags, "--validation_attention_backend", "flash")
    assert line.startswith("error: --validation_attention_backend: no video is sampled; add --validation_prompt")


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (["--stream_blocks"], "--stream_blocks"),
        (["--offload_checkpoints", "--checkpoint_scope", "feed-forward"], "use --checkpoint_scope block"),
    ],
)
def test_what_moves_within_blocks_is_not_compiled(flags, capsys, others, reason):
    line = error_of(capsys, *flags, "--compile", "--gradient_checkpointing", *others)
    assert line.startswith("error: --compile: ")
    assert reason in line
    assert parse(*flags, "--compile", "--gradient_checkpointing").speed.compile


@pytest.fixture
def launch(monkeypatch):
    """Stand for one of so many processes, launched with a parallelism_config or without."""

    def launch(num_processes: int, **sizes: int) -> None:
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


@pytest.mark.parametrize(
    ("num_processes", "sizes", "others", "expected"),
    [
        (
            1,
            {},
            ["--context_parallel_size", "2"],
            "size 2: does not divide the number of processes (1); ",
        ),
        (6, {}, ["--context_parallel_size", "4"], "size 4: does not divide the number of processes (6); "),
        (
            4,
            {"cp_size": 4},
            ["--context_parallel_size", "2"],
            "size 2: parallelism_config_cp_size in the ac",
        ),
        (4, {"cp_size": 4, "dp_shard_size": 2}, [], "dp_shard_size 2 x cp_size 4) than the 4 launched; set dp_shard_"),
        (4, {"tp_size": 4}, [], "parallelism_config_tp_size: not supported; use parallelism_config_cp_size"),
        (4, {"sp_size": 4}, [], "parallelism_config_sp_size: not supported; use parallelism_config_cp_size"),
        (
            4,
            {"cp_size": 4, "cp_comm_strategy": "alltoall"},
            [],
            "strategy alltoall: not supported; set it to all",
        ),
        (2, {}, ["--context_parallel_size", "2", "--compile"], "--compile: blocks that gather keys"),
        (
            2,
            {},
            ["--context_parallel_size", "2", "--memory_budget_gb", "24"],
            "--memory_budget_gb: not with divided samples",
        ),
    ],
)
def test_samples_that_cannot_be_divided_are_refused(flags, launch, capsys, num_processes, sizes, others, expected):
    launch(num_processes, **sizes)
    assert expected in error_of(capsys, *flags, *others)


def test_a_model_compiled_by_the_launch_configuration_is_refused(flags, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert "pass --compile to the script" in error_of(capsys, *flags)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as accelerate launch says it
    assert parse(*flags).speed.compile is False
