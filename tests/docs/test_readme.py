"""The README's commands, one after the other, with a tiny model instead of the released one."""

import runpy
from pathlib import Path

import pytest

import cogvideox_text_to_video_lora
import generate
import prepare_dataset
from doc_pages import flags_of, marked_blocks, noted_calls, read_page, script_flags, table_rows, value_of
from make_real_clips import make_real_clips
from make_tiny_model import make_tiny_model
from prepared_folders import rows_of
from repository import ROOT


README = read_page("README.md")
BLOCKS = marked_blocks(README)
TINY = {"MIXED_PRECISION": "no", "DTYPE": "fp32", "REPORT_TO": "none"}
TINY |= {"HEIGHT_BUCKETS": "64", "WIDTH_BUCKETS": "96", "FRAME_BUCKETS": "17", "MAX_NUM_FRAMES": "17"}
TINY |= {"HEIGHT": "64", "WIDTH": "96", "NUM_FRAMES": "17"}


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "a reader"
    make_tiny_model("5b", folder / "tiny")
    (folder / "my-clips").mkdir()
    for number, (clip, caption) in enumerate(make_real_clips(tmp_path / "cut")[:4]):
        clip.rename(folder / f"my-clips/{number}.mp4")
        (folder / f"my-clips/{number}.txt").write_text(caption)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    monkeypatch.chdir(folder)
    return folder


def block(name: str, *replaced: tuple[str, str]) -> str:
    code = BLOCKS[name]
    for old, new in [("THUDM/CogVideoX-5b", "./tiny"), *replaced]:
        assert old in code
        code = code.replace(old, new)
    return code


def test_clips_become_a_lora_that_is_sampled(reader, fresh_accelerator):
    for call in noted_calls(block("own clips"), reader, **TINY):
        prepare_dataset.main(script_flags(call))
    assert Path("my-prepared/plan.csv").read_text().count(",17x64x96,") == 4
    assert [row["caption"].startswith("MY_STYLE ") for row in rows_of(Path("my-prepared"))] == [True] * 4

    rehearsal, train = noted_calls(block("train", ("STEPS=1500", "STEPS=2")), reader, **TINY)
    assert flags_of(rehearsal).dry_run
    cogvideox_text_to_video_lora.main([*script_flags(train), "--num_inference_steps", "2", "--no-validate_first"])
    (run,) = Path("outputs").iterdir()
    assert len(list(run.glob("validation/step-2/*.mp4"))) == 2
    run.rename("outputs/my-lora")

    few_steps = ("num_inference_steps=50", "num_inference_steps=2")
    python = block("python", few_steps, ("torch.bfloat16", "torch.float32"), ("pipe.enable_model_cpu_offload()\n", ""))
    exec(python, {})
    assert Path("rabbit.mp4").stat().st_size > 0

    (call,) = noted_calls(block("generate"), reader)
    small = ("--num_inference_steps", "2", "--height", "64", "--width", "96", "--num_frames", "17")
    generate.main([*script_flags(call), *small])
    assert len(list(Path("generated").glob("00-my-style-a-rabbit-yawns-seed-42*"))) == 4

    (inference,) = noted_calls(marked_blocks(read_page("assets/docs/inference.md"))["check"], reader)
    words = [word.replace("THUDM/CogVideoX-5b", "./tiny") for word in script_flags(inference)]
    runpy.run_path("tests/test_lora_inference.py")["main"]([*words, "--num_inference_steps", "2"])
    assert Path("checked.mp4").stat().st_size > 0


def test_the_readme_names_the_folder_of_its_run_and_its_budget_reaches_the_script(tmp_path):
    *_, call = noted_calls(BLOCKS["train"], tmp_path)
    assert f"`{value_of(call, '--output_dir')}/`" in README
    (call,) = noted_calls(BLOCKS["budget"], tmp_path)
    assert value_of(call, "--memory_budget_gb") == "16"


def test_every_block_of_the_readme_is_tested():
    assert BLOCKS.keys() == {"own clips", "train", "generate", "python", "budget"}


def test_the_memory_table_has_the_figures_and_flags_of_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from memory_rows import ROWS

    flags_of_row = {row.name: set(row.flags) for row in ROWS}
    page = read_page("assets/docs/memory.md").split("## Parts of a training step")[0]
    of_page = {cells[0]: cells[-4:] for cells in table_rows(page) if cells[0] in flags_of_row}
    published = {cells[0]: cells[1] for cells in table_rows(page) if len(cells) == 6}
    shown = [cells for cells in table_rows(README) if cells[0] in flags_of_row]
    assert len(shown) == 7
    for name, flags, by_others, measured, calculated in shown:
        own, _, expected, _ = of_page[name]
        assert (measured, calculated) == (own, expected)
        assert by_others == published.get(name, "")
        of_all = {"--gradient_checkpointing", *(["--use_8bit"] if "full" in name else [])}
        assert of_all | set(flags.strip("`").split()) == flags_of_row[name]
