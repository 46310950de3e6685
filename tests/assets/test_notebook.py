"""The notebook: its commands are accepted for both machines, and it trains a LoRA and plays its videos."""

import os
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from browser import visit
from common.run_folder import LORA_FILE
from data.buckets import Bucket
from doc_pages import flags_of, noted_calls
from make_full_size_model import full_size_configs
from memory.accounting import account
from memory.facts import Workload, model_facts
from memory.ladder import choose, ladder, measure_or_calculate, usable_filter
from memory.settings import GB, memory_settings_of
from methods.lora import Lora
from repository import ROOT


FILE = ROOT / "assets" / "notebooks" / "first_lora.ipynb"
CELLS = nbformat.read(FILE, as_version=4).cells
CODE = {cell.id: cell.source for cell in CELLS if cell.cell_type == "code"}
SIZE = Bucket(49, 480, 720)
FREE_GPU = 14.5 * GB  # what a T4 of 16 GB leaves to CUDA


def test_it_is_valid_and_has_no_outputs():
    nbformat.validate(nbformat.read(FILE, as_version=nbformat.NO_CONVERT))
    assert [cell.id for cell in CELLS if cell.cell_type == "code" and (cell.outputs or cell.execution_count)] == []


def test_every_step_is_explained_in_one_sentence():
    texts = [re.sub(r"^#.*\n+", "", cell.source) for cell in CELLS if cell.cell_type == "markdown"]
    plain = [re.sub(r"\([^)]*\)|`[^`]*`", "", text) for text in texts]
    assert [text for text in plain if text.count(".") != 1 or text[-1] != "."] == []
    assert max(len(text.split()) for text in texts) <= 35
    assert all(len(source.splitlines()) <= 36 for source in CODE.values())


def commands(folder: Path, variables: str) -> list[SimpleNamespace]:
    """Return the flags of the dry run, the preparation, the training and the sampling with some variables."""
    names = {}
    for source in (CODE["variables"], variables, CODE["setup"], CODE["settings"]):
        exec(source, names)
    training = " ".join(re.search(r'\["(bash)", "(\w+\.sh)", \*os.environ\["TRAINING"\]', CODE["training"]).groups())
    of_sampling = f'set -- "$OUTPUT_ROOT/run"\n{CODE["sampling"].split(chr(10), 1)[1]}'
    lora = folder / names["settings"]["OUTPUT_ROOT"] / "run" / LORA_FILE
    lora.parent.mkdir(parents=True)
    lora.touch()
    for name in ("CLIPS", "PREPARED"):
        (folder / os.environ[name]).mkdir()
    code = [*(CODE[name].split("\n", 1)[1] for name in ("plan", "preparation")), f"{training} $TRAINING", of_sampling]
    return [flags_of(call) for call in noted_calls("\n".join(code), folder)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.syspath_prepend(ROOT)
    noted_calls(":", tmp_path)  # makes it look like the repository
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_clips_of_the_environment_stay_where_they_were_when_a_cell_runs_again(folder, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_CLIPS", "mine")
    names = {}
    for cell in ("variables", "setup", "setup", "settings"):
        exec(CODE[cell], names)
        if cell == "setup":
            names["os"].chdir(ROOT)
    assert os.environ["CLIPS"] == str(folder / "mine")


@pytest.mark.parametrize(
    ("variables", "model", "precision", "size"),
    [
        ("", "assets/models/tiny-cogvideox", "no", Bucket(17, 64, 96)),
        ("ON_GPU, CLIPS = True, 'mine'", "THUDM/CogVideoX-2b", "fp16", SIZE),
    ],
)
def test_the_commands_of_both_machines_are_accepted_and_fit_together(folder, variables, model, precision, size):
    plan, prepare, train, sample = commands(folder, variables)
    assert plan.dry_run and (plan.output_dir, plan.id_token) == (prepare.output_dir, prepare.id_token)
    sizes = (prepare.frame_buckets, prepare.height_buckets, prepare.width_buckets)
    assert sizes == tuple((number,) for number in (size.num_frames, size.height, size.width))
    assert {prepare.model_id, train.pretrained_model_name_or_path, sample.pretrained_model_name_or_path} == {model}
    assert (train.mixed_precision, prepare.dtype) == (precision, precision.replace("no", "fp32"))
    assert (train.data_root, train.load_tensors) == (prepare.output_dir, True)
    assert sample.compare and sample.settings.loras[0][0].startswith(train.output_dir.rpartition("/")[0])
    assert sample.prompt[0].startswith(f"{prepare.id_token} ")


def test_a_free_gpu_has_the_memory_by_calculation(folder):
    """The run chooses what it computes again by the free memory; the figures are those of the page."""
    _, prepare, train, sample = commands(folder, "ON_GPU, CLIPS = True, 'mine'")
    assert prepare.text_encoder_8bit and sample.text_encoder_8bit
    assert train.quantize_base == sample.quantize_base == "nf4"
    run, workload = train.settings, Workload(SIZE, 1, "fp16", SIZE)
    facts = model_facts(full_size_configs("2b"), Lora.from_flags(run.lora, run.memory.quantize_base))
    rungs = ladder(memory_settings_of(run), run.given, usable_filter(run, mixed_precision="fp16", has_gpu=True))
    choice = choose(
        FREE_GPU,
        rungs,
        lambda rung: measure_or_calculate(rung, None, lambda rung: account(facts, rung, workload).peak, []),
    )
    page = (ROOT / "assets/docs/training.md").read_text(encoding="utf-8")
    assert choice.needed < FREE_GPU
    assert f"{choice.needed / GB:.1f} GB" in page.split("## Notebook")[1].split("\n## ")[0]


def test_own_clips_are_needed_on_a_gpu(folder):
    with pytest.raises(ValueError, match="set CLIPS to the folder of your clips"):
        commands(folder, "ON_GPU = True")


# Run


QUICK = {"NOTEBOOK_MAX_TRAIN_STEPS": "2", "CPU_THREADS": "1"}
QUICK |= dict.fromkeys(("NOTEBOOK_TRAINING", "NOTEBOOK_SAMPLING"), "--num_inference_steps 2 --guidance_scale 2")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, list]:
    """The outputs of each cell of the notebook, run with few steps."""
    folder = tmp_path_factory.mktemp("notebook")
    noted_calls(":", folder)
    notebook = nbformat.read(FILE, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def text_of(outputs: list) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures_in(outputs: list) -> list[Image.Image]:
    shown = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [Image.open(BytesIO(b64decode(picture))) for picture in shown]


def videos_in(outputs: list) -> list[str]:
    pages = "".join(output.data.get("text/html", "") for output in outputs if "data" in output)
    return re.findall(r'src="(data:video/mp4;base64,[^"]+)"', pages)


@pytest.mark.slow
def test_it_shows_the_plan_the_losses_and_the_result(outputs):
    assert "17x64x96" in text_of(outputs["plan"]) and "prepared 24 samples" in text_of(outputs["preparation"])
    (sheet,), (curve,), (final,) = (pictures_in(outputs[name]) for name in ("sheet", "training", "learned"))
    assert all(np.asarray(picture.convert("RGB")).std() > 10 for picture in (sheet, curve, final))
    assert "saved notebook/tiny/outputs/" in text_of(outputs["training"])
    assert [len(videos_in(outputs[name])) for name in ("clips", "learned", "compare")] == [1, 2, 1]


@pytest.mark.slow
def test_its_videos_play_in_a_browser(outputs, browser, tmp_path):
    sources = [source for shown in outputs.values() for source in videos_in(shown)]
    page = tmp_path / "videos.html"
    page.write_text("".join(f'<video muted src="{source}"></video>' for source in sources))
    with visit(browser, page) as opened:
        sizes = opened.page.evaluate(
            """async () => Promise.all([...document.querySelectorAll("video")].map(async video => {
                await video.play()
                return [video.videoWidth, video.videoHeight]
            }))"""
        )
        assert sizes == [[96, 64]] * 3 + [[192, 64]]
        assert opened.errors == []
