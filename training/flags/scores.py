"""The flags of score_clips.py beside those on clips."""

from dataclasses import dataclass

from cli.schema import flag
from cli.types import DuplicateBits, FilePath, NonNegativeInt


SCORES_FILE = "scores.csv"


@dataclass(frozen=True)
class ScoreFlags:
    """What is measured, and where the scores go."""

    output_file: FilePath | None = flag(
        None,
        "Table to write, .csv; a page with histograms and examples is written beside it, .html.",
        shown=f"{SCORES_FILE} in --data_root, or else next to --dataset_file",
    )
    text: bool = flag(
        False, "Also measure which share of the picture is text. Needs rapidocr-onnxruntime; about 0.3 s a clip."
    )
    aesthetic_model: FilePath | None = flag(
        None,
        "Also rate clips with your own ONNX model, which takes RGB pictures [N, 3, H, W] from 0 to 1 and returns a "
        "number for each. Needs onnxruntime.",
    )
    duplicate_bits: DuplicateBits = flag(
        16, "Clips whose 256 bits of perceptual hashes differ in at most this many are near-duplicates."
    )
    num_workers: NonNegativeInt = flag(
        0, "Processes that score clips; 0 uses one per CPU core, 1 scores in the main process."
    )
