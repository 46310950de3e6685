"""A model that training would refuse is refused before clips are encoded for it."""

import shutil

import gradio as gr
import pytest

from repository import ROOT
from studio.actions import Actions
from studio.jobs import Jobs
from studio.models import HUB_MODELS


IMAGE_MODEL, TEXT_MODEL = "THUDM/CogVideoX-5b-I2V", "THUDM/CogVideoX1.5-5B"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Press Train for a model, a choice of what is given, a size and flags of training."""
    no_weights = shutil.ignore_patterns("*.safetensors")
    # It has learned positions for 17x64x96.
    shutil.copytree(ROOT / "assets/models/tiny-cogvideox", tmp_path / "tiny", ignore=no_weights)
    (tmp_path / "clips").mkdir()
    monkeypatch.chdir(tmp_path)
    jobs = Jobs(tmp_path)
    monkeypatch.setattr(jobs, "start", lambda kind, *_: kind)

    def start(model, given, frames=17, flags="", kind="train"):
        training = "fp32", "fit the card", 2, 1e-4, "out"
        return Actions(tmp_path, jobs).start(
            kind, model, "clips", given, 3, "tile", "", 64, 96, frames, *training, "", flags
        )

    return start


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (TEXT_MODEL, "first frame", "first frame: needs a model for image-to-video; .*-5B is for text-to-video"),
        ("tiny", "first K frames", "tiny is for text-to-video"),
        (IMAGE_MODEL, "text only", "text only: needs a model for text-to-video"),
        (
            IMAGE_MODEL,
            "control video",
            "needs a model for text-to-video or control-to-video; .* is for image-to-video",
        ),
    ],
)
def test_a_model_of_another_kind_is_refused_before_clips_are_encoded(start, model, given, message):
    for kind in ("try", "train"):
        with pytest.raises(gr.Error, match=message):
            start(model, given, kind=kind)
    start(model, given, kind="plan")


@pytest.mark.parametrize(
    ("model", "given"),
    [
        *((model, "first frame" if "I2V" in model else "text only") for model in HUB_MODELS),
        *((model, "control video") for model in (TEXT_MODEL, "tiny")),
        *(("owner/unknown", given) for given in ("text only", "first frame", "control video")),
    ],
)
def test_a_model_that_fits_or_is_unknown_is_accepted(start, model, given):
    assert start(model, given).selected == "run"


def test_a_size_without_learned_positions_is_refused(start):
    for given in ("text only", "control video"):
        with pytest.raises(gr.Error, match=r"only 17x64x96 \(frames x height x width\); choose it"):
            start("tiny", given, frames=9)
