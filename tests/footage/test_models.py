"""Text is found where it is, and a user's model rates the pictures that it says it takes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from common.errors import UserError
from footage.models import aesthetic, check_models, text_share
from onnx_models import mean_model


def test_the_share_of_text_is_that_of_its_lines():
    picture = Image.new("RGB", (320, 180), "#355070")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(24)
    plain = np.asarray(picture)
    box = draw.textbbox((20, 130), "A line of subtitles", font=font)
    draw.text((20, 130), "A line of subtitles", font=font, fill="white")
    share = (box[2] - box[0]) * (box[3] - box[1]) / (320 * 180)
    assert text_share(np.asarray(picture)[None]) == pytest.approx(share, rel=0.6)  # with the margin of a detector
    assert text_share(np.stack([np.asarray(picture), plain])) == pytest.approx(
        text_share(np.asarray(picture)[None]) / 2
    )


@pytest.mark.parametrize("package", ["rapidocr_onnxruntime", "onnxruntime"])
def test_a_missing_package_is_named(monkeypatch, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(UserError, match=f"pip install {package.replace('_', '-')}$"):
        check_models(True, Path("model.onnx"))


def test_the_rating_is_the_mean_over_frames_of_the_cropped_picture(tmp_path):
    frames = np.zeros((2, 40, 120, 3), np.uint8)
    frames[1, :, 40:80] = 255  # the middle square of the second
    assert aesthetic(frames, mean_model(tmp_path / "mean.onnx")) == pytest.approx(0.5, abs=1e-3)


def test_a_model_that_cannot_rate_is_refused_with_what_it_must_do(tmp_path):
    check_models(False, mean_model(tmp_path / "good.onnx"))
    (tmp_path / "text.onnx").write_text("not a model")
    for model, message in (
        (mean_model(tmp_path / "means.onnx", axes=(2, 3)), "it returns 3 numbers for a picture, not one"),
        (tmp_path / "text.onnx", "it must map RGB pictures"),
        (tmp_path / "missing.onnx", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            check_models(False, model)
