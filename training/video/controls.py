"""Compute the control of a video from its frames, and check what belongs to it frame by frame.

Heavy libraries are imported when they are used, so that flags can name KINDS.
"""

from collections.abc import Callable, Iterable
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
NOWHERE_WHITE = "is nowhere white (255) in these frames; labels of 0 and 1 must become 0 and 255"


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
    """Check that a control or a mask has the frames and the size of its clip; raises ValueError.

    Frames belong together by their number, so that the rates may differ, as they do for clips of a variable rate.
    """
    counts = [own.num_frames, own.num_frames if may_be_still and own.num_frames == 1 else clip.num_frames]
    sizes = [f"{one.height}x{one.width}" for one in (own, clip)]
    for what, (one, wanted) in (("frames", counts), ("pixels", sizes)):
        if one != wanted:
            raise ValueError(f"{where}has {one} {what}, its clip {wanted}; export it again with those of the clip")


def has_white(masks: "Iterable[np.ndarray]") -> bool:
    """Return whether uint8 masks `[H, W, 3]` are at least half white anywhere, where INPAINT hides the frame."""
    return any((mask.mean(axis=2) >= HIDDEN).any() for mask in masks)


def find_mask(video: Path) -> Path:
    """Return the mask beside a video, a.mask.mp4 or a.mask.png of a.mp4; raises ValueError unless there is one."""
    from video.media import is_clip

    found = sorted(file for file in video.parent.iterdir() if file.stem == f"{video.stem}.mask" and is_clip(file))
    if not found:
        raise ValueError(f"has no mask beside it; add {video.stem}.mask.mp4 or {video.stem}.mask.png")
    if len(found) > 1:
        raise ValueError(f"has several masks beside it, {', '.join(file.name for file in found)}; keep one")
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
