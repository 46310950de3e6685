"""Measure what pictures of a clip show: motion, sharpness, light, stillness. Pure functions of frames."""

from collections.abc import Sequence

import cv2
import imagehash
import numpy as np
from PIL import Image


cv2.setNumThreads(1)  # clips are scored in parallel

_FLOW_SIDE = 256  # pixels of the longer side
_SAME = 6  # of 255: encoders change a picture that stands still by less
_NEAR_END = 2  # of 255: what encoders leave of black and white
_BLACK_LUMA, _BLACK_SHARE = 25.5, 0.98  # the defaults of FFmpeg's blackdetect


def to_luma(frames: np.ndarray) -> np.ndarray:
    """Convert frames, uint8 [F, H, W, 3] RGB, to their luma (BT.601), uint8 [F, H, W]."""
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def motion(before: np.ndarray, after: np.ndarray, seconds: Sequence[float]) -> float:
    """Return how fast the picture moves, in per cent of its diagonal per second: 0 stands still.

    It depends on neither size nor frame rate. The median over pairs of frames ignores a cut. Speeds above about 40
    are underestimated.

    Args:
        before, after: luma, uint8 [P, H, W], of the two frames of each pair.
        seconds: between the two.

    Source: the mean length of the flow vectors of DIS optical flow (Kroeger et al. 2016, arXiv:1603.03590).
    """
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    speeds = []
    for first, second, duration in zip(shrink(before), shrink(after), seconds, strict=True):
        length = np.linalg.norm(flow.calc(first, second, None), axis=-1).mean()
        speeds.append(100 * length / np.hypot(*first.shape) / duration)
    return float(np.median(speeds))


def still(before: np.ndarray, after: np.ndarray) -> float:
    """Return the share of frames that equal the one about 1/8 second before: 1 is a photograph, near 1 a slide show.

    Two frames are equal if no pixel changes visibly at a longer side of 256 pixels. Takes pairs as `motion` does.
    """
    changes = [cv2.absdiff(*pair).max() for pair in zip(shrink(before), shrink(after), strict=True)]
    return float(np.mean(np.array(changes) <= _SAME))


def shrink(luma: np.ndarray) -> list[np.ndarray]:
    """Shrink pictures, uint8 [F, H, W], to the size for optical flow; sides of 16 pixels are the smallest it takes."""
    scale = _FLOW_SIDE / max(luma.shape[1:])
    height, width = (max(round(side * scale), 16) for side in luma.shape[1:])
    return [cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA) for picture in luma]


def sharpness(luma: np.ndarray) -> float:
    """Return the median over frames, uint8 [F, H, W], of the variance of the Laplacian: 0 and more, no unit.

    It depends on the size of the pictures, which is that of `scoring.FRAME_SIDE` here; and on what they show: fog is
    less sharp than grass.

    Source: Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy: a comparative study".
    """
    return float(np.median([cv2.Laplacian(picture, cv2.CV_32F).var() for picture in luma]))


def exposure(luma: np.ndarray) -> float:
    """Return the mean luma of frames, uint8 [F, H, W]: 0 is black, 255 white."""
    return float(luma.mean())


def clipping(luma: np.ndarray) -> float:
    """Return the share of pixels of frames, uint8 [F, H, W], that are black or white, where detail is lost: 0 to 1."""
    return float(((luma <= _NEAR_END) | (luma >= 255 - _NEAR_END)).mean())


def black(luma: np.ndarray) -> float:
    """Return the share of frames, uint8 [F, H, W], that are black: 0 to 1.

    Source: 98% of the pixels have at most a tenth of full luma, as in FFmpeg's filter blackdetect.
    """
    return float(((luma <= _BLACK_LUMA).mean(axis=(1, 2)) >= _BLACK_SHARE).mean())


def perceptual_hash(frame: np.ndarray) -> int:
    """Return the perceptual hash of a frame, uint8 [H, W, 3]: 64 bits, of which re-encoding changes a few.

    Source: the `phash` of ImageHash: which of the 64 lowest frequencies of a 32x32 picture are above their median.
    """
    bits = imagehash.phash(Image.fromarray(frame)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
