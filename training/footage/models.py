"""Measures that need a model: how much of a picture is text, and a rating by the user's own model."""

import importlib.util
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from common.errors import UserError, first_line


_USUAL_SIDE = 224  # pixels that CLIP takes; for models that take any


def check_models(text: bool, rating_model: Path | None) -> None:
    """Raise UserError if the packages or the user's model for the measures that are wanted cannot be used."""
    for flag, is_wanted, package in (
        ("--text", text, "rapidocr-onnxruntime"),
        ("--aesthetic_model", rating_model is not None, "onnxruntime"),
    ):
        if is_wanted and importlib.util.find_spec(package.replace("-", "_")) is None:
            raise UserError(f"{flag}: needs the package {package}; pip install {package}")
    if rating_model is not None:
        _check_rating_model(rating_model)


def text_share(frames: np.ndarray) -> float:
    """Return the share of the picture that readable lines of text cover, 0 to 1, as the mean over frames.

    Args:
        frames: uint8 [F, H, W, 3], RGB; letters need a height of about 8 pixels to be found.

    Source: PP-OCRv4, with the weights in the wheel of rapidocr-onnxruntime. What its detector takes for text but its
    recognizer cannot read is not counted: blurred edges look like text to the former.
    """
    return float(np.mean([_text_share(frame) for frame in frames]))


def _text_share(frame: np.ndarray) -> float:
    import cv2

    lines, _ = _text_reader()(np.ascontiguousarray(frame[..., ::-1]), use_cls=False)
    mask = np.zeros(frame.shape[:2], np.uint8)
    for box, *_ in lines or []:
        cv2.fillPoly(mask, [np.asarray(box, np.int32)], 1)
    return float(mask.mean())


@cache
def _text_reader() -> Any:
    from rapidocr_onnxruntime import RapidOCR

    # max: small pictures are not enlarged, in which it would see text that is not there
    return RapidOCR(intra_op_num_threads=1, det_limit_type="max")


def aesthetic(frames: np.ndarray, model: Path) -> float:
    """Return the mean rating of frames, uint8 [F, H, W, 3], by the user's model, in its unit.

    The middle of each frame is cropped to the model's shape, or to 224x224 if it takes any.
    """
    rate, height, width = _load_rating(model)
    fitted = [ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.BICUBIC) for frame in frames]
    return float(np.mean(rate(np.stack(fitted).transpose(0, 3, 1, 2).astype(np.float32) / 255)))


def _check_rating_model(model: Path) -> None:
    if not model.is_file():
        raise UserError(f"--aesthetic_model: {model} does not exist; pass an ONNX model")
    try:
        aesthetic(np.full((1, _USUAL_SIDE, _USUAL_SIDE, 3), 128, np.uint8), model)
    except Exception as error:  # onnxruntime has a class for every kind of error, all derived from Exception
        wanted = "it must map RGB pictures [N, 3, H, W] of float32 from 0 to 1 to N numbers"
        raise UserError(f"--aesthetic_model: {model} cannot be used ({first_line(error)}); {wanted}") from error


@cache
def _load_rating(model: Path) -> tuple[Any, int, int]:
    """Return a function from pictures, float32 [N, 3, H, W], to N numbers, and the H and W that it takes."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised too
    session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (pictures,) = session.get_inputs()
    height, width = (side if isinstance(side, int) else _USUAL_SIDE for side in pictures.shape[2:])
    return partial(_rate, session, pictures.name), height, width


def _rate(session: Any, name: str, pictures: np.ndarray) -> np.ndarray:
    # One by one, because some models are exported for a batch of one.
    ratings = np.array([np.ravel(session.run(None, {name: picture[None]})[0]) for picture in pictures], float)
    if ratings.shape != (len(pictures), 1) or not np.isfinite(ratings).all():
        raise ValueError(f"it returns {ratings.shape[1]} numbers for a picture, not one")
    return ratings[:, 0]
