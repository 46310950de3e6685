"""The app in a browser: from clips to a LoRA and a video."""

import re
import shutil
import sys

import httpx
import pytest

from make_demo_clips import make_demo_clips
from repository import ROOT
from studio.jobs import Jobs
from studio_app import running_app


HOSTILE = "<script>document.title='broken'</script><img src=x onerror=document.title='broken'> ${1+1} {{2}}"
# A job that ends when it is told to.
ENDLESS = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: exit(75))\nprint('<b>begun</b>')\nsignal.pause()"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("studio")
    make_demo_clips(root / "clips", count=3)
    shutil.copytree(root / "clips", root / "listed")
    for name in ("videos.txt", "prompts.txt"):
        with open(root / "listed" / name, "a") as file:
            file.write(f"../{HOSTILE.replace('/', '')}\n")
    shutil.copytree(ROOT / "assets/models/tiny-cogvideox", root / "model")
    return root


@pytest.fixture(scope="module")
def app(root, tmp_path_factory):
    with running_app(root, tmp_path_factory.mktemp("noted") / "connections") as app:
        yield app


@pytest.fixture
def page(app, browser):
    """The page, in which nothing may go wrong and which may load nothing from elsewhere."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, problems, urls = context.new_page(), [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    page.set_default_timeout(60_000)
    page.goto(app.url)
    page.get_by_role("tab", name="Clips", exact=True).wait_for()
    yield page
    assert page.title() == "CogVideoX Factory"
    context.close()
    assert problems == []
    assert [url for url in urls if not url.startswith((app.url, "data:", "blob:"))] == []
    assert app.connections() <= {"127.0.0.1", "None"}


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def choose(page, label, value):
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=value, exact=True).click()


def fill_settings(page, clips="clips"):
    choose(page, "Clips: a folder or a table", clips)
    open_tab(page, "Train")
    choose(page, "Model", "model")
    page.get_by_label("control video").locator("visible=true").click()
    choose(page, "Control", "tile")
    choose(page, "Precision", "fp32")
    for label, value in (("Frames", "17"), ("Height", "64"), ("Width", "96"), ("Steps", "2")):
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Id token").fill("TOK")


def finish_job(page, kind):
    page.get_by_text(re.compile(f"{kind}: (?!running)")).wait_for()
    assert page.get_by_text(f"{kind}: finished").is_visible(), page.locator(".log").inner_text()


def test_captions_are_shown_and_changed_as_text_and_mistakes_are_said_as_in_a_shell(root, page):
    fill_settings(page, "listed")
    page.get_by_text("prepared/listed-model-17x64x96-fp32-tile --mixed_precision no --max_train_steps 2").wait_for()
    open_tab(page, "Clips")
    page.get_by_text(HOSTILE.replace("/", "")).locator("visible=true").first.wait_for()  # a row that cannot be used
    page.get_by_text("clip-001.mp4").click()
    page.wait_for_function("document.querySelector('video')?.readyState >= 1")
    caption, lines = page.get_by_label("Caption Saved by"), (root / "listed/prompts.txt").read_text().splitlines()
    assert caption.input_value() == lines[1]
    caption.fill(HOSTILE)
    page.get_by_text("clip-002.mp4").click()  # saves, too
    page.get_by_role("grid").get_by_text(HOSTILE).locator("visible=true").wait_for()
    caption.fill("new")
    press(page, "Save caption")
    page.get_by_role("grid").get_by_text("new").locator("visible=true").wait_for()
    assert (root / "listed/prompts.txt").read_text().splitlines()[:3] == [lines[0], HOSTILE, "new"]
    open_tab(page, "Train")
    page.get_by_text("More flags, as in a shell").click()
    page.get_by_label("of training").fill("'--<b>x</b>'")
    press(page, "Train")
    page.get_by_text("--<b>x</b>: unknown flag").wait_for()


def test_the_command_is_that_of_a_stopped_run_once_there_is_one(root, page):
    choose(page, "Clips: a folder or a table", "clips")
    open_tab(page, "Train")
    page.get_by_label("Output folder").fill("outputs/stopped")
    page.get_by_text("--output_dir outputs/stopped").wait_for()
    (root / "outputs/stopped/checkpoint-5").mkdir(parents=True)
    (root / "outputs/stopped/checkpoint-5/manifest.json").touch()
    open_tab(page, "Run")
    open_tab(page, "Train")
    page.get_by_text("--output_dir outputs/stopped --resume_from_checkpoint latest").wait_for()


@pytest.mark.slow
def test_from_clips_to_a_lora_and_a_video(root, page):
    fill_settings(page)
    press(page, "Plan")
    finish_job(page, "plan")
    page.frame_locator("iframe.report").get_by_role("heading", name="Data set").wait_for()
    open_tab(page, "Train")
    press(page, "Train")
    finish_job(page, "train")
    lora = root / "outputs/my-lora/pytorch_lora_weights.safetensors"
    with page.expect_download() as download:
        page.get_by_text("Download the LoRA").click()
    assert download.value.path().read_bytes() == lora.read_bytes()
    open_tab(page, "Sample")
    page.get_by_label("Prompts, one").fill(f"TOK {HOSTILE}")
    choose(page, "Videos to follow", "clips/videos/clip-001.mp4")  # asked for, as the newest LoRA was trained so
    page.get_by_text("--lora outputs/my-lora --height 64 --width 96 --num_frames 17").wait_for()
    page.get_by_text("--control clips/videos/clip-001.mp4 --compute_control tile").wait_for()
    page.get_by_label("Denoising steps").fill("2")
    press(page, "Sample")
    finish_job(page, "sample")
    page.wait_for_function("document.querySelector('.videos video')?.readyState >= 1")


@pytest.fixture
def endless_job(root):
    (root / "endless.py").write_text(ENDLESS)
    jobs = Jobs(root)
    jobs.start("train", [[sys.executable, str(root / "endless.py")]], "out")
    while not jobs.latest().log().endswith("begun</b>\n"):
        pass
    yield jobs
    jobs.stop()
    while jobs.latest().is_running:
        pass


def test_a_running_job_is_found_and_stopped(endless_job, page):
    page.get_by_text("train: running").wait_for()
    assert page.locator(".log").inner_text() == endless_job.latest().log()
    press(page, "Stop: save and end")
    page.get_by_text("train: stopped").wait_for()


def test_closing_the_app_says_that_a_job_continues_and_nothing_of_pages_that_are_open(app, endless_job):
    with httpx.stream("GET", f"{app.url}/gradio_api/heartbeat/of-a-page"):
        said, process = app.close(), endless_job.latest().process
    assert re.sub(r"\s+", " ", said).startswith(f" train continues as process {process}, log: ")
    assert said.count("\n") == 3
    assert f"kill -TERM -- -{process}" in said
    assert endless_job.latest().is_running
