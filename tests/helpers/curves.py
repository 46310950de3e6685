"""What a run logged, read from its TensorBoard files."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def curve(output: Path, name: str) -> dict[int, float]:
    """The values of a run by step."""
    (folder,) = (path for path in (output / "logs").iterdir() if path.is_dir())
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars(name)}
