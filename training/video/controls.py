"""Compute the control of a video from its frames. opencv is imported when it is used, so that flags can name KINDS."""

from collections.abc import Callable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np

CANNY_THRESHOLDS = 100, 200  # of the brightness gradient; edges above the second one, and what continues them
TILES = 12  # on the shorter side
BLUR = 40  # the shorter side in standard deviations


def compute_control(frames: "np.ndarray", kind: str) -> "np.ndarray":
    """Compute the control of each frame, at the size of the model's input.

    Args:
        frames: uint8 `[F, H, W, 3]`, RGB.
        kind: one of KINDS.

    Returns:
        uint8 `[F, H, W, 3]`; canny and grey have three equal channels.
    """
    import numpy as np

    return np.stack([KINDS[kind](np.ascontiguousarray(frame)) for frame in frames])


def _canny(frame: "np.ndarray") -> "np.ndarray":
    import cv2

    return cv2.cvtColor(cv2.Canny(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), *CANNY_THRESHOLDS), cv2.COLOR_GRAY2RGB)


def _grey(frame: "np.ndarray") -> "np.ndarray":
    import cv2

    return cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _blur(frame: "np.ndarray") -> "np.ndarray":
    import cv2

    return cv2.GaussianBlur(frame, (0, 0), min(frame.shape[:2]) / BLUR)


def _tile(frame: "np.ndarray") -> "np.ndarray":
    import cv2

    height, width = frame.shape[:2]
    size = [max(round(side * TILES / min(height, width)), 1) for side in (width, height)]
    tiles = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.resize(tiles, (width, height), interpolation=cv2.INTER_NEAREST)


KINDS: dict[str, Callable[["np.ndarray"], "np.ndarray"]] = {
    "canny": _canny,
    "grey": _grey,
    "blur": _blur,
    "tile": _tile,
}
