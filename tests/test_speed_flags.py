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
    assert (args.compile, args.profile, args.allow_tf32) == (False, False, False)
    assert (args.attention_backend, args.validation_attention_backend) == (None, None)


def test_sage_is_for_sampling_alone(flags, capsys):
    line = error_of(capsys, *flags, "--attention_backend", "sage")
    assert "no backward pass" in line
    assert "--validation_attention_backend sage" in line
    args = parse(*flags, "--validation_attention_backend", "SAGE", "--validation_prompt", "a rabbit")
    assert args.validation_attention_backend == "sage"


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
    assert parse(*flags, "--compile", "--gradient_checkpointing").compile


def test_a_model_compiled_by_the_launch_configuration_is_refused(flags, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert "give the script --compile" in error_of(capsys, *flags)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as accelerate launch says it
    assert parse(*flags).compile is False
