"""Folders of runs that nobody trained: their numbers, notes and videos are written as a run writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.run_folder import FACTS_FILE, METRICS_FILE, NOTES_FILE, TARGETS_FOLDER
from video.io import write_video


PROMPT = "<script>alert('x')</script> a red circle"
CAPTION = "a red circle & <b>more</b>"


def noted(step: int = 0, minute: int = 0, **note: object) -> dict[str, object]:
    return {"time": f"2026-01-02T03:{minute:02d}:00+00:00", "step": step, **note}


def write_run(
    folder: Path,
    validation: Mapping[int, float] = {0: 1.0, 20: 0.8, 40: 0.7},
    losses: Sequence[float] = (0.9, 0.7) * 20,
    notes: Sequence[Mapping[str, object]] = (),
    facts: Mapping[str, object] | None = None,
    video_steps: Sequence[int] = (),
    size: tuple[int, int] = (48, 64),
) -> Path:
    """Write a run; one with `video_steps` has a video of these sizes (height, width) at each, and a target."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": step, "validation_loss": loss, "validation_loss/t=100": loss} for step, loss in validation.items()
    ]
    rows += [{"step": step, "loss": loss, "lr": 1e-3} for step, loss in enumerate(losses, 1)]
    rows += [{"step": 40, "throughput/step_seconds": 3.0, "throughput/samples_per_second": 2.0}]
    rows += [{"step": 40, "memory/peak_host_gb": 1.5}]
    write_rows(folder / METRICS_FILE, sorted(rows, key=lambda row: row["step"]))
    write_rows(folder / NOTES_FILE, notes)
    videos = [{"prompt": PROMPT, "target": {"caption": CAPTION, "file": f"{TARGETS_FOLDER}/00.mp4"}}]
    if facts is not None:
        write_rows(folder / FACTS_FILE, [{"total_steps": 100, "videos": videos, "output_dir": str(folder)} | facts])
    files = [folder / f"validation/step-{step}/00-00-script-alert-x-script-a-red-circle.mp4" for step in video_steps]
    for file in [*files, *([folder / TARGETS_FOLDER / "00.mp4"] if files else [])]:
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 255, (5, *size, 3), dtype=np.uint8)
        write_video(file, noise, 8)
    return folder


def write_rows(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
