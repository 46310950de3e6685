"""The flags of generate.py: what they settle, and one line for every mistake before anything heavy is imported."""

from pathlib import Path

import pytest

from args import parse_generate_args
from checks.generation import sampling_memory_advice
from common.run_folder import LORA_FILE, MANIFEST


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "lora", "full/transformer", "stopped/checkpoint-20", "stopped/checkpoint-100", "there"):
        Path(folder).mkdir(parents=True)
    for file in ("model/model_index.json", f"lora/{LORA_FILE}", "mine.safetensors", "mine.bin", "rabbit.png"):
        Path(file).touch()
    Path("folder.mp4").mkdir()
    Path("full/transformer/config.json").touch()
    for step in (20, 100):
        Path(f"stopped/checkpoint-{step}/{MANIFEST}").touch()
    Path("there/00-a-cat-seed-42.mp4").touch()
    Path("there/cat-base.mp4").touch()
    Path("empty.txt").write_text("\n \n")
    Path("prompts.txt").write_text("a cat\r\n\r\n  a dog\u2028asleep  \r\n", encoding="utf-8-sig")
    Path("latin.txt").write_bytes("Käfer".encode("latin-1"))
    return tmp_path


def parse(*flags: object, prompt: bool = True):
    prompts = ["--prompt", "a cat"] if prompt else []
    return parse_generate_args(["--model_path", "model", *prompts, *map(str, flags)])


def test_by_default_the_model_chooses_and_sampling_is_that_of_validation():
    args = parse()
    assert set(vars(args.sampling).values()) == {(42,), 1, None}
    assert (args.output.fps, args.memory.dtype, args.memory.enable_tiling, args.loras) == (None, "auto", True, ())
    assert vars(args.guidance) == {
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": False,
        "sampling_scheduler": "model",
        "sampling_cache": "none",
    }
    assert (args.content.negative_prompt, args.result.transformer) == ("", None)
    assert [str(video.file) for video in args.videos] == ["generated/00-a-cat-seed-42.mp4"]
    assert not Path("generated").exists()


def test_loras_and_transformers_are_files_run_folders_or_ids():
    args = parse("--lora", "lora", "mine.safetensors", "owner/style", "--lora_scale", "1", "-0.5", "0")
    assert args.loras == ((f"lora/{LORA_FILE}", 1.0), ("mine.safetensors", -0.5), ("owner/style", 0.0))
    for given in ("full", "full/transformer"):
        assert parse("--transformer", given).result.transformer == "full"
    assert parse("--transformer", "owner/tuned").result.transformer == "owner/tuned"


def test_each_prompt_of_a_file_is_sampled_with_each_seed():
    args = parse("--prompts_file", "prompts.txt", "--seed", 3, 1, "--output_dir", "out", prompt=False)
    assert args.content.prompt == ("a cat", "a dog\u2028asleep")
    names = [(0, "00-a-cat"), (1, "01-a-dog-asleep")]
    expected = [(number, seed, f"{name}-seed-{seed}.mp4") for number, name in names for seed in (3, 1)]
    assert [(video.number, video.seed, video.file.name) for video in args.videos] == expected
    assert [video.seed for video in parse("--num_videos", 3, "--seed", 7).videos] == [7, 8, 9]


def test_processes_share_the_videos_out(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(parse("--prompts_file", "prompts.txt", "--seed", 3, 1, 2, prompt=False).videos)
    assert [[(video.number, video.seed) for video in share] for share in shares] == [
        [(0, 3), (0, 2), (1, 1)],
        [(0, 1), (1, 3), (1, 2)],
    ]
    with pytest.raises(SystemExit, match=r"^2$"):
        parse()
    assert "2 processes were launched for 1 videos; launch at most as many" in capsys.readouterr().err


def test_files_that_are_there_are_written_over_only_when_that_is_said():
    assert parse("--output_dir", "there", "--overwrite").videos
    assert parse("--output_file", "there/cat.mp4").videos  # its companion is written by --compare alone


SEQUENTIAL = "--enable_sequential_cpu_offload"


@pytest.mark.parametrize(
    ("flags", "flag", "reason"),
    [
        ("--height 100", "--height", "not divisible by 16; nearest valid sizes are 96 and 112"),
        ("--num_frames 50", "--num_frames", "not 4k or 4k+1; nearest valid counts are 49 and 52"),
        ("--seed 1 1", "--seed", "given twice"),
        ("--seed 1 --seed 2", "--seed", "passed twice; pass all values after one --seed"),
        (f"--seed {2**64}", "--seed", f"goes beyond the largest, {2**64 - 1}"),
        (f"--seed {2**64 - 1} --num_videos 2", "--seed", f"goes beyond the largest, {2**64 - 1}"),
        ("--num_inference_steps 1001", "--num_inference_steps", "1001 is too large; pass a whole number up to 1000"),
        ("--negative_prompt \udcb0", "--negative_prompt", "not UTF-8"),
        ("--seed 1 2 --num_videos 2", "--num_videos", "several in --seed"),
        ("--prompts_file prompts.txt", "--prompts_file", "omit one of them"),
        ("--negative_prompt blue --guidance_scale 1", "--negative_prompt", "no effect without guidance"),
        ("--image nowhere.png", "--image", "no file 'nowhere.png'"),
        ("--image rabbit.png rabbit.png", "--image", "2 for 1 prompts"),
        ("--lora nowhere.safetensors", "--lora", "no file 'nowhere.safetensors'"),
        ("--lora mine.bin", "--lora", "others may run code"),
        ("--lora full", "--lora", "pass it as --transformer"),
        ("--lora stopped", "--lora", "the run has not ended; pass its checkpoint 'stopped/checkpoint-100'"),
        ("--lora model", "--lora", "pass the output folder of a run, or its checkpoint-N"),
        ("--lora lora --lora_scale 1 2", "--lora_scale", "2 for 1 in --lora"),
        ("--lora_scale 1", "--lora_scale", "there is no --lora"),
        ("--transformer lora", "--transformer", "pass it as --lora"),
        ("--transformer ./nowhere", "--transformer", "no folder './nowhere'"),
        ("--compare", "--compare", "nothing to compare"),
        ("--as_dataset --overwrite", "--as_dataset", "not with --overwrite"),
        ("--as_dataset --output_file a.mp4", "--as_dataset", "not with --output_file"),
        ("--as_dataset --lora lora --compare", "--as_dataset", "not with --compare"),
        (f"--enable_model_cpu_offload {SEQUENTIAL}", SEQUENTIAL, "omit one of them"),
        (f"{SEQUENTIAL} --quantize_base int8", SEQUENTIAL, "not with --q"),
        ("--output_dir there", "--output_dir", "there/00-a-cat-seed-42.mp4 already exists"),
        ("--lora lora --output_file there/cat.mp4 --compare", "--output_file", "there/cat-base.mp4 already exists"),
        ("--output_file a.gif", "--output_file", "must end in .mp4"),
        ("--output_file a.mp4 --seed 1 2", "--output_file", "there are 2 videos"),
        ("--output_file a.mp4 --output_dir out", "--output_file", "omit one of them"),
        ("--output_dir rabbit.png", "--output_dir", "not a folder"),
        ("--output_file rabbit.png/a.mp4", "--output_file", "not a folder"),
        ("--output_file folder.mp4 --overwrite", "--output_file", "folder.mp4 is a folder"),
        ("--model_path nowhere", "--pretrained_model_name_or_path", "no folder 'nowhere'"),
        (
            "--model_path full",
            "--pretrained_model_name_or_path",
            "a transformer: pass its base model, and this to generate",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(flags, flag, reason, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        parse(*flags.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {flag}: ")
    assert reason in line


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "--prompt or --prompts_file: required"),
        (["--prompt", "a c\udcb0t"], "--prompt: the text is not UTF-8"),
        (["--prompt", "a cat", " "], "--prompt: prompt 2 of 2 is empty"),
        (["--prompts_file", "empty.txt"], "--prompts_file: 'empty.txt' is empty"),
        (["--prompts_file", "latin.txt"], "--prompts_file: latin.txt is not UTF-8 text"),
        (["--prompts_file", "nowhere.txt"], "--prompts_file: nowhere.txt cannot be read: No such file"),
    ],
)
def test_there_are_prompts(flags, reason, capsys):
    with pytest.raises(SystemExit):
        parse(*flags, prompt=False)
    assert capsys.readouterr().err.startswith(f"error: {reason}")


def test_a_gpu_that_is_too_small_is_told_what_is_left_to_save():
    assert "--enable_model_cpu_offload" in sampling_memory_advice(parse().memory)
    saving = parse("--enable_sequential_cpu_offload", "--text_encoder_8bit").memory
    assert sampling_memory_advice(saving) == ["smaller --height and --width, or fewer --num_frames"]


def test_captions_of_a_data_set_are_prompts_each_once():
    Path("table.csv").write_text("file,text\na.mp4,a cat\nb.mp4,a dog\nc.mp4,a cat\nd.mp4,\n")
    Path("clips").mkdir()
    for name in ("a", "b"):
        Path(f"clips/{name}.mp4").touch()
        Path(f"clips/{name}.txt").write_text(f"a {name}\n")
    assert parse("--prompts_file", "table.csv", prompt=False).content.prompt == ("a cat", "a dog")
    assert parse("--prompts_file", "clips", prompt=False).content.prompt == ("a a", "a b")


def test_a_data_set_keeps_the_videos_that_are_there():
    left = parse("--as_dataset", "--output_dir", "there", "--num_videos", 2).videos
    assert [video.file.name for video in left] == ["00-a-cat-seed-43.mp4"]
    assert parse("--as_dataset", "--output_dir", "there").videos == ()
