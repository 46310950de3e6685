"""Compute the control of a video from its frames, and check what belongs to it frame by frame.

opencv is imported when it is used, so that flags can name KINDS.
"""

from collections.abc import Callable
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np

    from video.probe import VideoInfo

CANNY_THRESHOLDS = 100, 200  # of the brightness gradient; edges above the second one, and what continues them
TILES = 12  # on the shorter side
BLUR = 40  # the shorter side in standard deviations
INPAINT = "inpaint"  # the kind that needs masks
HIDDEN = 128  # grey value of what a model is to fill in


def compute_control(frames: "np.ndarray", kind: str, masks: "np.ndarray | None" = None) -> "np.ndarray":
    """Compute the control of each frame, at the size of the model's input.

    Args:
        frames: uint8 `[F, H, W, 3]`, RGB.
        kind: one of KINDS.
        masks: for INPAINT, likewise: white where frames become grey.

    Returns:
        uint8 `[F, H, W, 3]`; canny and grey have three equal channels.
    """
    import numpy as np

    inputs = zip(frames, masks, strict=True) if kind == INPAINT else zip(frames, strict=True)
    return np.stack([KINDS[kind](*map(np.ascontiguousarray, of_frame)) for of_frame in inputs])


def check_companion(own: "VideoInfo", clip: "VideoInfo", where: str, *, may_be_still: bool = False) -> None:
    """Check that a control or a mask has the frames, the size and the rate of its clip; raises ValueError."""
    is_still = may_be_still and own.num_frames == 1
    sizes = [f"{one.height}x{one.width}" for one in (own, clip)]
    has_rate = is_still or isclose(own.fps, clip.fps, rel_tol=0.01)
    for what, one, wanted, fits in (
        ("frames", own.num_frames, clip.num_frames, is_still or own.num_frames == clip.num_frames),
        ("pixels", *sizes, sizes[0] == sizes[1]),
        ("frames per second", f"{own.fps:g}", f"{clip.fps:g}", has_rate),
    ):
        if not fits:
            raise ValueError(f"{where}has {one} {what}, its clip {wanted}; export it again with those of the clip")


def find_mask(video: Path) -> Path:
    """Return the mask beside a video, a.mask.mp4 or a.mask.png of a.mp4; raises ValueError unless there is one."""
    found = sorted(file for file in video.parent.iterdir() if file.stem == f"{video.stem}.mask")
    if len(found) != 1:
        what = f"several masks ({', '.join(file.name for file in found)})" if found else "no mask"
        raise ValueError(
            f"has {what} beside it; add {video.stem}.mask.mp4 or {video.stem}.mask.png, or omit "
            f"--compute_control {INPAINT} for a clip that is grey where it is to be filled"
        )
    return found[0]


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


def _inpaint(frame: "np.ndarray", mask: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return np.where(mask.mean(axis=2, keepdims=True) >= HIDDEN, np.uint8(HIDDEN), frame)


KINDS: dict[str, Callable[..., "np.ndarray"]] = {
    "canny": _canny,
    "grey": _grey,
    "blur": _blur,
    "tile": _tile,
    INPAINT: _inpaint,
}
