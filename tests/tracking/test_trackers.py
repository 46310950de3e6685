"""A tracker that fails is a warning, and a resumed run continues the runs of its trackers."""

import importlib
import sys
import time
from pathlib import Path

import pytest
import wandb
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.hub_token import HubToken
from tracking.trackers import SteadyTracker, plain_settings, run_id_file, start_trackers
from validation.trackers import ValidationVideo, log_videos


TOKEN = "hf_" + "Secret0" * 5
pytestmark = pytest.mark.usefixtures("fresh_accelerator", "fresh_wandb")


@pytest.fixture
def fresh_wandb():
    """Make W&B read the environment, which it does once in a process."""
    wandb.teardown()
    yield
    wandb.teardown()


class Broken(GeneralTracker):
    name = "broken"
    requires_logging_directory = False
    tracker = None

    def fail(self, *arguments, **options) -> None:
        raise ConnectionError(f"no route to host, with {TOKEN}")

    store_init_configuration = log = log_images = finish = fail


class Working(GeneralTracker):
    name = "working"
    requires_logging_directory = False
    tracker = "the run"

    def __init__(self):
        super().__init__()
        self.logged = []

    def log(self, values, step=None, **options):
        self.logged.append((values, step))


def started(folder: Path, *kinds: str, resumed_at: int | None = None, **flags) -> Accelerator:
    """Return an accelerator with trackers, whose libraries accelerate need not find."""
    accelerator = Accelerator(cpu=True)
    accelerator.log_with = kinds
    start_trackers(accelerator, "run", folder / "logs", flags, resumed_at=resumed_at)
    return accelerator


def test_a_tracker_never_raises_and_the_others_get_everything(caplog):
    accelerator, working = Accelerator(cpu=True), Working()
    accelerator.trackers = [SteadyTracker(Broken()), SteadyTracker(working)]
    for tracker in accelerator.trackers:
        tracker.store_init_configuration({})
    accelerator.log({"loss": 1.0}, step=3)
    accelerator.trackers[0].log_images({"frame": []}, step=3)
    accelerator.end_training()
    assert working.logged == [({"loss": 1.0}, 3)]
    assert accelerator.get_tracker("working", unwrap=True) == "the run"


def test_repeated_failures_are_warned_of_ever_more_rarely(caplog):
    tracker = SteadyTracker(Broken())
    for step in range(150):
        tracker.log({"loss": 1.0}, step=step)
    first, *more = [record.getMessage() for record in caplog.records]
    assert first.startswith("warning: broken failed (ConnectionError: no route to host")
    assert [line.split(" times")[0] for line in more] == ["warning: broken failed 10", "warning: broken failed 100"]


@pytest.mark.parametrize("report_to", ["tensorboard", "wandb"])
def test_a_tracker_that_cannot_be_started_is_skipped_with_a_warning(tmp_path, monkeypatch, caplog, report_to):
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("WANDB_MODE", "neither on nor off")
    (tmp_path / "logs/run").write_text("a file instead of TensorBoard's folder")
    run_id_file("wandb", tmp_path / "logs").mkdir()
    accelerator = started(tmp_path, report_to)
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.end_training()
    assert accelerator.trackers == []
    assert f"warning: {report_to} cannot be started (" in caplog.text
    assert f"warning: training continues without {report_to}" in caplog.text


def test_wandb_without_its_server_keeps_its_files(tmp_path, monkeypatch, caplog):
    for name, value in {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)  # so that it fails before it asks for anything
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    accelerator = started(tmp_path, "wandb")
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.end_training()
    assert "warning: wandb cannot be started (" in caplog.text
    assert "send them with `wandb sync`" in caplog.text
    assert list((tmp_path / "logs/wandb").glob("offline-run-*/*.wandb"))


def wandb_runs(folder: Path) -> list[str]:
    return [path.stem.removeprefix("run-") for path in sorted((folder / "logs/wandb").glob("offline-run-*/*.wandb"))]


def test_a_resumed_run_continues_its_wandb_run_and_a_new_one_starts_another(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    ids = []
    for resumed_at in (None, 2, None):
        accelerator = started(tmp_path, "wandb", resumed_at=resumed_at)
        ids.append(accelerator.get_tracker("wandb", unwrap=True).id)
        accelerator.end_training()
        assert run_id_file("wandb", tmp_path / "logs").read_text().strip() == ids[-1]
    assert ids[0] == ids[1] != ids[2]
    assert set(wandb_runs(tmp_path)) == set(ids)


def test_the_environment_sets_the_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    started(tmp_path, "wandb").end_training()
    assert wandb_runs(tmp_path) == ["chosen"]


# The parts of each library that accelerate's tracker needs, as the libraries may not be installed.
STAND_INS = {
    "trackio": """
config, calls = {}, []
class Run:
    def log(self, values, step=None): calls.append((values, step))
    def finish(self): pass
def init(**options):
    calls.append(options)
    return Run()
def Video(value, caption): return ("video", value, caption)
def Image(value): return ("image", value)
""",
    "comet_ml": """
__version__, calls = "3.58.8", []
class Experiment:
    def log_parameters(self, values): pass
    def set_step(self, step): pass
    def log_metric(self, name, value, step): calls.append(({name: value}, step))
    def end(self): pass
def start(**options):
    calls.append(options)
    return Experiment()
""",
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "libraries")

    def stand_in(name: str):
        (tmp_path / "libraries").mkdir()
        (tmp_path / "libraries" / f"{name}.py").write_text(STAND_INS[name])
        monkeypatch.delitem(sys.modules, name, raising=False)
        library = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, library)  # removed after the test
        return library

    return stand_in


@pytest.mark.parametrize(("kind", "key"), [("trackio", "name"), ("comet_ml", "experiment_key")])
def test_a_resumed_run_continues_the_run_of_other_trackers(tmp_path, monkeypatch, stand_in, kind, key):
    library = stand_in(kind)
    monkeypatch.delenv("COMET_EXPERIMENT_KEY", raising=False)
    for resumed_at in (None, 2, None):
        accelerator = started(tmp_path / "my-run", kind, resumed_at=resumed_at)
        accelerator.log({"loss": 1.0}, step=3)
        accelerator.end_training()
    first, logged, again, _, new, _ = library.calls
    assert logged == ({"loss": 1.0}, 3)
    assert first[key] == again[key] != new[key]
    assert first == {"project" if kind == "trackio" else "project_name": "run", key: first[key]} | (
        {"resume": "allow"} if kind == "trackio" else {"mode": "get_or_create"}
    )
    assert first[key].startswith("my-run-") if kind == "trackio" else 32 <= len(first[key]) <= 50


def test_the_environment_sets_the_comet_experiment(tmp_path, monkeypatch, stand_in):
    library = stand_in("comet_ml")
    monkeypatch.setenv("COMET_EXPERIMENT_KEY", "c" * 32)  # which Comet reads itself
    started(tmp_path, "comet_ml")
    assert library.calls[0]["experiment_key"] is None


def test_trackio_gets_the_settings_and_the_videos(tmp_path, stand_in):
    library = stand_in("trackio")
    accelerator = started(tmp_path, "trackio", rank=4)
    assert library.config["rank"] == 4
    video = ValidationVideo(0, "00-00-a", "a rabbit", tmp_path / "a.mp4", [])
    log_videos(accelerator.trackers, [video], tmp_path / "sheet.png", step=5)
    shown = {
        "validation/00-00-a": ("video", str(tmp_path / "a.mp4"), "a rabbit"),
        "validation/contact_sheet": ("image", str(tmp_path / "sheet.png")),
    }
    assert library.calls[-1] == (shown, 5)


def test_a_resumed_run_replaces_the_later_steps_in_its_tensorboard_folder(tmp_path):
    for resumed_at, losses in ((None, [1.0, 2.0, 3.0]), (1, [20.0])):
        time.sleep(1.1)  # TensorBoard reads files in the order of their names, which begin with the second
        accelerator = started(tmp_path, "tensorboard", resumed_at=resumed_at)
        for step, loss in enumerate(losses, start=(resumed_at or 0) + 1):
            accelerator.log({"loss": loss}, step=step)
        accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "logs/run")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_the_token_is_in_no_file_of_any_tracker(tmp_path, monkeypatch):
    """W&B notes the command line and what is logged, TensorBoard the settings."""
    monkeypatch.setattr("sys.argv", ["train.py", "--hub_token", TOKEN, f"--hub_token={TOKEN}"])
    monkeypatch.setenv("HF_TOKEN", "another-secret-token")
    prompt = "a rabbit; another-secret-token"
    kinds = ("tensorboard", "wandb")
    accelerator = started(tmp_path, *kinds, hub_token=HubToken(TOKEN), seed=1, validation_prompt=prompt)
    assert tuple(tracker.name for tracker in accelerator.trackers) == kinds
    accelerator.end_training()
    contents = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"a rabbit; (hidden)" in content for content in contents)
    assert not any(secret in content for content in contents for secret in (TOKEN.encode(), b"another-secret"))


def test_settings_are_numbers_and_texts():
    settings = plain_settings({"rank": 4, "use_ema": True, "fps": None, "frame_buckets": (49,), "hub_token": None})
    assert settings == {"rank": 4, "use_ema": True, "fps": "None", "frame_buckets": "[49]"}
