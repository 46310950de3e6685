"""What follows from the training data for the validation videos: prompts, size and cut, and the id token."""

from dataclasses import fields, replace

from cli.schema import replace_flags
from common.errors import UserError
from data.buckets import Bucket
from flags.settings import TrainingSettings
from planning.plan import data_sources, prepared_flags
from planning.samples import PreparedData, TrainingData
from prepared.folder import read_prepared_settings
from video.frames import Cut


def with_data_defaults(settings: TrainingSettings, data: TrainingData) -> TrainingSettings:
    """Return the settings with what follows from the data for the validation videos.

    That is their size and, if the flags want captions, their prompts. Prepared clips also tell how they were cut and
    controls computed: what the videos follow must be made like it.
    """
    if isinstance(data, PreparedData):
        names = {one.name for one in fields(Cut)}
        names |= {"compute_control"} if settings.task == "control-to-video" else set()
        made_with = {name: value for name, value in prepared_flags(settings).items() if name in names}
        settings = replace_flags(settings, **made_with)
    data = data.trained
    size = choose_size(settings, data)
    settings = replace_flags(settings, max_num_frames=size.num_frames, height=size.height, width=size.width)
    if not settings.validation.uses_captions:
        return settings
    return replace(settings, validation=replace(settings.validation, prompts=choose_captions(data)))


def choose_size(settings: TrainingSettings, data: TrainingData) -> Bucket:
    """Return the size of most of the videos trained on; what the user typed overrides its parts."""
    flags, given = settings.clips, settings.given
    typed = {"num_frames": flags.max_num_frames} if "max_num_frames" in given else {}
    typed |= {side: getattr(flags, side) for side in ("height", "width") if side in given}
    counts = {bucket: count for bucket, count in data.buckets.counts.items() if bucket.num_frames > 1}
    if not counts:  # all are still images
        return Bucket(flags.max_num_frames, flags.height, flags.width)
    return min(counts, key=lambda bucket: (-counts[bucket], bucket))._replace(**typed)


def choose_captions(data: TrainingData) -> tuple[str, ...]:
    """Return the first and the last distinct caption; raise a UserError if prepared data has none on disk."""
    distinct = data.clips.captions if isinstance(data, PreparedData) else list(dict.fromkeys(data.captions))
    if not len(distinct):
        raise UserError("--validation_prompt: the prepared data has no list of its captions to sample; pass prompts")
    return tuple(dict.fromkeys((str(distinct[0]), str(distinct[-1]))))


def missing_token(settings: TrainingSettings, data: TrainingData) -> str | None:
    """Return a warning about prompts without the id token, if all captions begin with one."""
    if isinstance(data, PreparedData):
        recorded = (read_prepared_settings(folder).get("flags", {}) for folder in data.trained.folders)
        tokens = [flags.get("id_token") or settings.sources.id_token for flags in recorded]
    else:
        tokens = [source.id_token for source in data_sources(settings.sources) if not source.regularization]
    prompts = settings.validation.prompts
    without = [prompt for prompt in prompts if not any(token in prompt for token in tokens if token)]
    if not without or not all(tokens):
        return None
    words = " or ".join(dict.fromkeys(tokens))
    return (
        f"--validation_prompt: {len(without)} of {len(prompts)} prompts lack {words}, the id token that all captions "
        "begin with: their videos may not show what is learned"
    )
