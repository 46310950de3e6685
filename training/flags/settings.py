"""What each script is run with: its groups of flags, checked and settled."""

from dataclasses import dataclass

from cli.schema import flag, group
from cli.types import FolderPath, Port
from flags.captions import CaptionFlags, CaptionFrameFlags, CaptionModelFlags
from flags.conversion import BaseModelFlags, ConvertedFlags, ConvertedOutputFlags, ReductionFlags
from flags.data import ClipFlags, ControlFlags, LoaderFlags, MaskFlags, PreparedFlags, RegularizationFlags, SourceFlags
from flags.footage import FootageFlags, SceneFlags
from flags.generation import ContentFlags, OutputFlags, PlannedVideo, ResultFlags, SamplingFlags, SamplingMemoryFlags
from flags.memory import MemoryFlags
from flags.model import EncoderFlags, ModelFlags, SampledModelFlags
from flags.optimizer import OptimizerFlags
from flags.preparation import EncodingFlags, FirstFrameFlags, PreparationFlags
from flags.scores import ScoreFlags
from flags.speed import SpeedFlags
from flags.tracking import ComparisonFlags, HubFlags, TrackingFlags
from flags.training import (
    CheckpointFlags,
    FullFlags,
    ImageFlags,
    LoraFlags,
    ObjectiveFlags,
    ScheduleFlags,
    TrainingFlags,
)
from flags.validation import GuidanceFlags, ValidationFlags


def training_script(task: str, method: str) -> str:
    """Return the file name of the script that trains a task ("text-to-video") by a method ("lora", "sft")."""
    return f"cogvideox_{task.replace('-', '_')}_{method}.py"


@dataclass(frozen=True)
class TrainingSettings:
    """A training script's settings."""

    task: str  # text-to-video, image-to-video, control-to-video
    method: str  # lora, sft
    given: frozenset[str]  # names of the flags that the user typed or put into the file of --config
    model: ModelFlags = group("model")
    sources: SourceFlags = group("data")
    clips: ClipFlags = group("data")
    control: ControlFlags = group("data")
    masks: MaskFlags = group("data")
    loader: LoaderFlags = group("data")
    prepared: PreparedFlags = group("data")
    regularization: RegularizationFlags = group("data")
    validation: ValidationFlags = group("validation")
    guidance: GuidanceFlags = group("validation")
    training: TrainingFlags = group("training")
    checkpoints: CheckpointFlags = group("training")
    objective: ObjectiveFlags = group("objective")
    schedule: ScheduleFlags = group("learning rate")
    lora: LoraFlags = group("lora")
    full: FullFlags = group("result")
    image: ImageFlags = group("image-to-video (no effect on text-to-video)")
    optimizer: OptimizerFlags = group("optimizer")
    memory: MemoryFlags = group("memory")
    speed: SpeedFlags = group("speed")
    tracking: TrackingFlags = group("configuration")
    hub: HubFlags = group("configuration")


@dataclass(frozen=True)
class PreparationSettings:
    """The settings of prepare_dataset.py."""

    given: frozenset[str]  # names of the flags that the user typed or put into the file of --config
    model: EncoderFlags = group("model")
    sources: SourceFlags = group("data")
    clips: ClipFlags = group("data")
    control: ControlFlags = group("data")
    masks: MaskFlags = group("data")
    loader: LoaderFlags = group("data")
    preparation: PreparationFlags = group("preparation")
    encoding: EncodingFlags = group("memory and speed")


@dataclass(frozen=True)
class CaptioningSettings:
    """The settings of caption_dataset.py."""

    sources: SourceFlags = group("data")
    model: CaptionModelFlags = group("model")
    frames: CaptionFrameFlags = group("what the model sees")
    captions: CaptionFlags = group("captions")


@dataclass(frozen=True)
class SplittingSettings:
    """The settings of split_scenes.py."""

    footage: FootageFlags = group("footage")
    scenes: SceneFlags = group("scenes")


@dataclass(frozen=True)
class ScoringSettings:
    """The settings of score_clips.py."""

    sources: SourceFlags = group("data")
    scores: ScoreFlags = group("scores")


@dataclass(frozen=True)
class FirstFrameSettings:
    """The settings of make_first_frames.py."""

    sources: SourceFlags = group("data")
    output: FirstFrameFlags = group("first frames")


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of generate.py."""

    model: SampledModelFlags = group("model")
    result: ResultFlags = group("result of training")
    content: ContentFlags = group("content")
    sampling: SamplingFlags = group("sampling")
    guidance: GuidanceFlags = group("sampling")
    memory: SamplingMemoryFlags = group("precision and memory")
    output: OutputFlags = group("output")
    loras: tuple[tuple[str, float], ...] = ()  # (file or hub id, scale)
    videos: tuple[PlannedVideo, ...] = ()


@dataclass(frozen=True)
class ConversionSettings:
    """The settings of convert_lora.py."""

    source: ConvertedFlags = group("input")
    model: BaseModelFlags = group("model")
    reduction: ReductionFlags = group("rank")
    output: ConvertedOutputFlags = group("output")
    loras: tuple[tuple[str, float], ...] = ()  # (file, scale)


@dataclass(frozen=True)
class AppFlags:
    """The app in a browser."""

    root: FolderPath = flag(".", "Folder of clips, models and results; the app reads and writes only below it.")
    host: str = flag(
        "127.0.0.1",
        "Address to listen on. Any other than that of this machine needs a token, which is generated and printed, or "
        "taken from $COGVIDEOX_FACTORY_APP_TOKEN.",
        metavar="ADDRESS",
    )
    port: Port = flag(7860, "Port to listen on; 0 takes a free one.")


@dataclass(frozen=True)
class AppSettings:
    """The settings of app.py."""

    app: AppFlags = group("app")


@dataclass(frozen=True)
class ComparisonSettings:
    """The settings of compare_runs.py."""

    comparison: ComparisonFlags = group("page")
