"""--config run.yaml: a file sets flags as if they had been typed, and the command line overrides it."""

from pathlib import Path

import pytest

from args import parse_args, parse_prepare_args


BASE = "pretrained_model_name_or_path: a/b\ndata_root: .\n"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, *flags: str, method: str = "lora"):
    Path("run.yaml").write_text(BASE + text, encoding="utf-8")
    return parse_args(["--config", "run.yaml", *flags], task="text-to-video", method=method)


def typed(*flags: str):
    argv = ["--pretrained_model_name_or_path", "a/b", "--data_root", ".", *flags]
    return parse_args(argv, task="text-to-video", method="lora")


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("learning_rate: 1e-4", "--learning_rate 1e-4"),
        ("rank: 1_6", "--rank 16"),
        ("mixed_precision: no", "--mixed_precision no"),
        ("optimizer: AdamW\nadam_beta1: 0.8", "--optimizer adamw --beta1 0.8"),
        ("frame_buckets: [17, 49]\nwidth_buckets: 64", "--frame_buckets 17 49 --width_buckets 64"),
        ("lora_target_modules:\n  - to_q\n  - 'to_k'  # a comment", "--lora_target_modules to_q to_k"),
        ("gradient_checkpointing: true\npin_memory: off", "--gradient_checkpointing --no-pin_memory"),
        ("logit_mean: -0.5\ntimestep_sampling: logit_normal", "--logit_mean=-0.5 --timestep_sampling logit_normal"),
        ("height: 64\nwidth: 96", "--height 64 --width 96"),
    ],
)
def test_a_file_sets_what_the_same_flags_set(text, flags):
    from_file, from_line = vars(read(text)), vars(typed(*flags.split()))
    assert from_file.pop("given") - {"config"} == from_line.pop("given")
    assert from_file == from_line


def test_a_text_may_have_lines_and_begin_with_a_dash():
    args = read('validation_prompt: "- a rabbit:::a dog"\nvalidation_steps: 5\nid_token: |-\n  BW\n  STYLE')
    assert args.validation.prompts == ("- a rabbit", "a dog")
    assert args.sources.id_token == "BW\nSTYLE"


def test_the_command_line_overrides_the_file():
    text = "rank: 4\nframe_buckets: [17, 49]\ngradient_checkpointing: true\nadam_beta1: 0.5\nuse_ema: true"
    line = ("--rank", "8", "--frame_buckets", "33", "--no-gradient_checkpointing", "--beta1", "0.7")
    args = read(text, *line)
    assert (args.lora.rank, args.clips.frame_buckets, args.optimizer.beta1) == (8, (33,), 0.7)
    assert not args.memory.gradient_checkpointing
    assert args.objective.use_ema
    assert {"rank", "gradient_checkpointing", "use_ema"} <= args.given


def test_preparation_and_full_fine_tuning_read_one_too():
    Path("run.yaml").write_text("data_root: .\noutput_dir: prepared\nsave_latents_and_embeddings: true\nfps: 8\n")
    args = parse_prepare_args(["--config", "run.yaml", "--fps", "16"])
    assert args.preparation.save_latents_and_embeddings
    assert (args.preparation.output_dir, args.clips.fps) == ("prepared", 16)
    assert read("save_pipeline: yes", method="sft").full.save_pipeline


def test_a_file_may_have_only_comments():
    Path("run.yaml").write_text("# rank: 4\n")
    assert typed("--config", "run.yaml").lora.rank == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1e-4", "line 3: lerning_rate: unknown flag; did you mean learning_rate?"),
        ("rank: 0", "line 3: --rank: 0 is too small; pass a whole number of 1 or more"),
        ("\nrank: high", "line 4: --rank: 'high' is not a whole number"),
        ("rank: 8.0", "line 3: --rank: '8.0' is not a whole number"),
        ("rank: [8, 16]", "line 3: rank: takes one value, not a list"),
        ("rank: {of: lora}", "line 3: rank: must be a value or a list of values"),
        ("rank:", "line 3: rank: has no value; add one, or remove the line"),
        ("rank: 8\nseed: 1\nrank: 16", "line 5: rank: already set in line 3"),
        ("beta1: 0.5\nadam_beta1: 0.7", "line 4: adam_beta1: already set in line 3, under another name"),
        ("optimizer: sgd", "line 3: --optimizer: invalid choice 'sgd'; choose from adam, adamw,"),
        ("use_ema: maybe", "line 3: use_ema: must be true or false, not 'maybe'"),
        ("validate_first: 3", "line 3: validate_first: must be true or false, not '3'"),
        ("no-validate_first: true", "line 3: no-validate_first: unknown flag; did you mean validate_first?"),
        ("frame_buckets: []", "line 3: --frame_buckets: expected at least one argument"),
        ("frame_buckets: [-4]", "line 3: --frame_buckets: -4 is too small"),
        ("lora_target_modules: [to_q, -k]", "line 3: lora_target_modules: '-k' is not a value for it"),
        ("config: other.yaml", "line 3: config: only on the command line"),
        ("- rank", "line 3: not valid YAML: "),
        ("rank: 'a", "not valid YAML: "),
        ("rank: \x07", "not valid YAML: "),
        ("rank: " + "[" * 5000, "lists are nested too deep"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_line(text, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(text)
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("error: --config: run.yaml")
    assert message in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other.yaml", "--config: no file 'other.yaml'"),
        (".", "--config: '.' cannot be read"),
        ("list.yaml", "line 1: a flag's name and a colon are missing; write lines such as"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(name, message, capsys):
    Path("list.yaml").write_text("rank 4\n")
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--config", name], task="text-to-video", method="lora")
    assert message in capsys.readouterr().err


def test_a_contradiction_with_other_flags_is_named_by_the_flag(capsys):
    with pytest.raises(SystemExit, match="2"):
        read("height: 500")
    assert "--height: 500 is not divisible by 16" in capsys.readouterr().err
