"""Measure how well split_scenes.py finds cuts, on drawn films whose cuts are known.

    PYTHONPATH=training:assets/scripts python benchmarks/scene_cuts.py

A cut counts as found only at its exact frame.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from flags.footage import DETECTORS
from footage.cuts import make_detector, survey_video
from make_footage import make_footage
from video.probe import probe_video


@dataclass(frozen=True)
class Score:
    """How cuts that were found agree with those of the films."""

    cuts: int
    missed: int
    false: int
    frames: int
    cpu_seconds: float

    @property
    def precision(self) -> float:
        """The share of cuts found that are cuts."""
        found = self.cuts - self.missed
        return found / max(1, found + self.false)

    @property
    def recall(self) -> float:
        """The share of cuts that are found."""
        return 1 - self.missed / max(1, self.cuts)


def score_detector(name: str, folder: Path, true_cuts: dict[str, set[int]]) -> Score:
    """Find the cuts of all films with a detector at its usual threshold."""
    missed = false = frames = 0
    started = time.process_time()
    for film, cuts in true_cuts.items():
        info = probe_video(folder / film)
        survey = survey_video(folder / film, info, make_detector(name, DETECTORS[name]), glance_every=12)
        missed += len(cuts - set(survey.cuts))
        false += len(set(survey.cuts) - cuts)
        frames += info.num_frames
    return Score(sum(map(len, true_cuts.values())), missed, false, frames, time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=6, help="number of films (default: 6)")
    parser.add_argument("--minutes", type=float, default=10, help="minutes of each (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the first film (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "films")
        planned = make_footage(folder, args.films, args.minutes, args.seed)
        true_cuts = {film: {shot.start for shot in shots[1:]} for film, shots in planned.items()}
        print("detector  cuts  missed  false  precision  recall  frames/CPU s")
        for name in DETECTORS:
            score = score_detector(name, folder, true_cuts)
            rate = score.frames / score.cpu_seconds
            print(
                f"{name:8}  {score.cuts:4}  {score.missed:6}  {score.false:5}  {score.precision:9.4f}  "
                f"{score.recall:6.4f}  {rate:12.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
