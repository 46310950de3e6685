"""What is said about a plan before anything is loaded, and the files that list held-out and skipped clips."""

import csv
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.bars import tqdm
from common.files import atomic_write
from data.buckets import count_tokens, native_fps
from data.clips import BadClip
from data.sampler import BucketBatchSampler
from data.token_budget import BatchSize, TokenBudget
from flags.data import SourceFlags
from flags.settings import PreparationSettings, TrainingSettings
from planning.advice import recommend
from planning.report import PlanTable, plan_table, regularization_note
from planning.samples import PreparedData, RawData, TrainingData, caption_dropouts


SKIPPED_FILE = "skipped_clips.csv"
HELD_OUT_FILE = "held_out_clips.csv"


def advise(data: RawData, settings: TrainingSettings | PreparationSettings, config: Mapping[str, Any]) -> str | None:
    """Return a line with the flags that keep more clips of the data, for a transformer of this config."""
    is_training = isinstance(settings, TrainingSettings)
    ignores = is_training and settings.image.ignore_learned_positional_embeddings
    controls = settings.task == "control-to-video" if is_training else settings.preparation.save_control_latents
    infos = [sample.info for sample in data.clips if sample.part == sample.caption_number == 0]
    return recommend(
        [*infos, *(clip.info for clip in data.bad if clip.info)],
        settings.clips,
        config,
        skip_start=settings.sources.skip_frames_start,
        skip_end=settings.sources.skip_frames_end,
        is_fixed=bool(config.get("use_learned_positional_embeddings")) and not ignores,
        frames_rest=0 if controls and config.get("patch_size_t") is not None else 1,  # as in `ControlToVideo`
        given=settings.given,
    )


def advise_early(data: RawData, settings: TrainingSettings | PreparationSettings, model: str) -> str | None:
    """Do the same before torch is imported; None if the config of the model cannot be read, an error of its own."""
    try:
        return advise(data, settings, read_config(settings, model))
    except (OSError, ValueError, KeyError):
        return None


def read_config(settings: TrainingSettings | PreparationSettings, model: str) -> dict[str, Any]:
    """Return the config of the model's transformer, without an import of torch."""
    file = Path(model) / "transformer/config.json"
    if not os.path.isdir(model):
        from huggingface_hub import hf_hub_download

        where = {"revision": settings.model.revision, "cache_dir": settings.model.cache_dir}
        file = Path(hf_hub_download(model, "transformer/config.json", **where))
    return json.loads(file.read_text(encoding="utf-8"))


def describe_plan(
    data: TrainingData,
    settings: TrainingSettings | PreparationSettings,
    model: Any,
    configs: Any,
    *,
    batch_size: int | BatchSize | TokenBudget,
    num_ranks: int = 1,
) -> str:
    """Return the plan for a `ModelSource` and its `ModelConfigs` as a table; `batch_size` is that of one rank.

    Its last line has the flags that keep more clips, if there are any.
    """
    if isinstance(data, PreparedData):
        lines = [
            f"{bucket}: {count} prepared samples of {count_tokens(configs.transformer, bucket)} tokens"
            for bucket, count in data.buckets.counts.items()
        ]
        lines += [data.held_out_note] if data.held_out_note else []
        if data.num_captions is not None:
            several = int((data.num_captions > 1).sum())
            lines.append(f"{several} of these are the captions of clips that have several: they take turns")
        if data.regularization is not None:
            sampler = BucketBatchSampler.of(data, batch_size, seed=0)
            lines.append(regularization_note(sampler, int(data.regularization.sum())))
        return "\n".join(filter(None, [*lines, _dropout_note(data, settings)]))
    table = tabulate(data, settings, model, configs, batch_size=batch_size, num_ranks=num_ranks)
    dropped = f"{len(data.dropped)} of {data.num_listed} clips are dropped by --keep" if data.dropped else None
    notes = [
        dropped,
        _tags_note(data, settings.sources),
        _mask_note(data, settings),
        _dropout_note(data, settings),
        data.held_out_note,
    ]
    return "\n".join(filter(None, [str(table), *notes, advise(data, settings, configs.transformer)]))


def _tags_note(data: RawData, flags: SourceFlags) -> str | None:
    """Return a line on clips without tags to shuffle, if that was asked for and there are any."""
    clips = [one.clip for one in data.clips if flags.shuffle_tags and one.part == one.caption_number == 0]
    captions = (clip.captions or (clip.caption,) for clip in clips)
    without = sum(not any(len(caption.strip(" ,").split(",")) > 1 for caption in one) for one in captions)
    if not without:
        return None
    return f"--shuffle_tags has no effect on {without} of {len(clips)} clips, whose captions are not tags with commas"


def _mask_note(data: RawData, settings: TrainingSettings | PreparationSettings) -> str | None:
    """Return a line on samples whose loss is not weighted, if others are."""
    clips = data.trained.clips if settings.masks.use_masks else ()
    without = sum(planned.mask is None for planned in clips)
    return f"{without} of {len(clips)} samples have no mask: they count fully everywhere" if without else None


def _dropout_note(data: TrainingData, settings: TrainingSettings | PreparationSettings) -> str | None:
    """Return a line on data sets that drop captions otherwise than the flag says; None if none does."""
    if not isinstance(settings, TrainingSettings):
        return None
    dropouts = caption_dropouts(data, settings.objective.caption_dropout)
    if dropouts is None:
        return None
    counts = Counter(dropouts.tolist())
    return f"captions are dropped from {', '.join(f'{p:.3g} of {counts[p]} samples' for p in sorted(counts))}"


def tabulate(
    data: RawData,
    settings: TrainingSettings | PreparationSettings,
    model: Any,
    configs: Any,
    *,
    batch_size: int,
    num_ranks: int = 1,
) -> PlanTable:
    """Return the plan of clips for a `ModelSource` and its `ModelConfigs`, without the recommended flags."""
    tokens = configs.transformer["max_text_seq_length"]
    return plan_table(
        data.clips,
        batch_size=batch_size,
        num_ranks=num_ranks,
        tokens_of=partial(count_tokens, configs.transformer),
        long_captions=model.find_long_captions(data.captions, tokens),
        unknown_captions=model.find_unknown_captions(data.captions),
        max_caption_tokens=tokens,
        model_fps=native_fps(configs.transformer),
        reshape_mode=settings.clips.video_reshape_mode,
        id_token=settings.sources.id_token,
    )


def report_held_out(data: TrainingData, folder: Path) -> None:
    """Write the clips held out of the training data to `held_out_clips.csv` in the output folder, if there are any."""
    if not data.held_out_fraction:
        return
    is_raw = isinstance(data, RawData)
    clips = [(one.clip.video, one.clip.source) if is_raw else (one.name, "") for one in data.held_out.clips]
    with (
        atomic_write(folder / HELD_OUT_FILE) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([("clip", "source"), *clips])


def report_skipped(bad: Sequence[BadClip], folder: Path, dropped: Sequence[BadClip] = ()) -> None:
    """Write the skipped clips to `skipped_clips.csv` in the output folder and say so; remove the file if none are.

    Those that --keep dropped follow the unusable ones.
    """
    path = folder / SKIPPED_FILE
    if not bad and not dropped:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("clip", "source", "reason"))
        table.writerows((clip.what, clip.source, clip.reason) for clip in (*bad, *dropped))
    # Not logged, because in a preparation only the first rank logs.
    if bad:
        tqdm.write(f"{len(bad)} of the clips cannot be used and are skipped: see {path}")
    if dropped:
        tqdm.write(f"{len(dropped)} of the clips are dropped by --keep: see {path}")
