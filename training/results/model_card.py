"""Write the model card of a result: description, samples, usage and training settings."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from common.files import slug
from common.hub_token import without_tokens
from common.run_folder import PICTURE_FILE
from data.buckets import Bucket
from validation.grid import GRID_FILE
from video.condition_frames import ENDS, FIRST, given_frames, is_context


# Flags that name local paths, or that the card shows elsewhere.
_OWN = ("pretrained_model_name_or_path", "data_root", "dataset_file", "dataset_name", "dataset_mix", "output_dir")
_OWN += ("validation_dataset_file", "validation_images", "validation_controls", "validation_prompt", "lora_weights")
_OWN += ("logging_dir", "resume_from_checkpoint", "cache_dir", "tracker_name", "report_to", "regularization_data_root")

# Of a task: the pipeline, what loads its condition, the argument for it, the line that loads it.
_CONDITIONS = {
    "text-to-video": ("CogVideoXPipeline", "", "", []),
    "image-to-video": (
        "CogVideoXImageToVideoPipeline",
        "load_image",
        "image=image, ",
        ['image = load_image("first-frame.png")'],
    ),
    "control-to-video": (
        "CogVideoXDDIMScheduler, CogVideoXFunControlPipeline",
        "load_video",
        "control_video=control, ",
        ['control = load_video("control.mp4")  # as many frames as the video'],
    ),
}


@dataclass(frozen=True)
class CardFacts:
    """Facts of a run for its card."""

    base_model: str  # a hub id or a local folder
    task: str  # text-to-video, image-to-video, control-to-video
    adapter: str | None  # LoRA, LoKr or LoHa; None after full fine-tuning
    usage: Callable[[str, str], str]  # repository and name of the base model -> code that loads the result
    settings: Mapping[str, object]  # flags that differ from the defaults
    prompts: list[str]  # of the validation videos
    size: Bucket  # of the validation videos
    fps: int  # of the validation videos
    last_step: int


def write_card(folder: Path, repo_id: str, facts: CardFacts) -> None:
    """Write `README.md` into a run's folder, which is uploaded to `repo_id`, `owner/name`."""
    is_local = Path(facts.base_model).exists()  # the hub refuses local paths, and they are private
    samples = [
        (prompt, video.relative_to(folder).as_posix())
        for video in sorted((folder / "validation" / f"step-{facts.last_step}").glob("*.mp4"))
        if (prompt := _prompt_of(video, facts.prompts)) is not None
    ]
    adapter_tags = [facts.adapter.lower()] if facts.adapter else []
    data = ModelCardData(
        base_model=None if is_local else facts.base_model,
        base_model_relation=None if is_local else "adapter" if facts.adapter else "finetune",
        library_name="diffusers",
        license="other",
        pipeline_tag=facts.task.replace("control", "video"),  # the hub's name
        tags=[facts.task, *adapter_tags, "diffusers", "diffusers-training", "cogvideox"],
        widget=[{"text": prompt, "output": {"url": url}} for prompt, url in samples] or None,
    )
    base = Path(facts.base_model).resolve().name if is_local else facts.base_model
    text = _body(folder, repo_id, base, facts, samples)
    ModelCard(without_tokens(f"---\n{data.to_yaml()}\n---\n\n{text}")).save(folder / "README.md")


def _body(folder: Path, repo_id: str, base: str, facts: CardFacts, samples: list[tuple[str, str]]) -> str:
    what = f"A {facts.adapter} for" if facts.adapter else "The transformer, fully fine-tuned from"
    parts = [f"# {repo_id}", f"{what} {base} ({facts.task}), made with CogVideoX Factory in {facts.last_step} steps."]
    if samples:
        links = [f"- [{_escaped(prompt)}]({url})" for prompt, url in samples]
        parts += ["## Samples", "<Gallery />", "\n".join(links)]
    elif facts.prompts:
        parts += ["## Validation prompts", "\n".join(f"- {_escaped(prompt)}" for prompt in facts.prompts)]
    if (folder / "validation" / GRID_FILE).is_file():
        parts += ["Samples from the same noise in the course of training:", f"![steps](validation/{GRID_FILE})"]
    parts += ["## Use it", f"```python\n{example(facts, base, repo_id)}\n```", "## Training"]
    settings = {name: value for name, value in facts.settings.items() if name not in _OWN}
    dumped = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=float("inf"))
    parts += [f"Flags that differ from the defaults, for `--config`:\n\n```yaml\n{dumped}```"]
    if (folder / PICTURE_FILE).is_file():
        parts += [f"![loss]({PICTURE_FILE})"]
    return "\n\n".join(parts) + "\n"


def example(facts: CardFacts, base: str, repo_id: str) -> str:
    """Return code that samples a video with the result."""
    pipeline, loader, argument, condition = _CONDITIONS[facts.task]
    frames = facts.settings.get("condition_frames", FIRST)
    if frames == ENDS:
        condition = ['image = [load_image("first-frame.png"), load_image("last-frame.png")]']
    elif is_context(frames):
        loader, num_given = "load_video", len(given_frames(frames, 0))
        condition = [f'image = load_video("clip.mp4")[-{num_given}:]  # the end of the video to continue']
    if kind := facts.settings.get("compute_control"):
        condition = [f"{line}, which show {kind} of a clip" for line in condition]
    names = [pipeline]
    names += [] if facts.adapter else ["CogVideoXTransformer3DModel"]
    prompt = facts.prompts[0] if facts.prompts else "A panda plays a guitar"
    sizes = facts.size._asdict()
    if facts.task == "control-to-video":
        sizes.pop("num_frames")  # those of the control
    size = ", ".join(f"{name}={value}" for name, value in sizes.items())
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {', '.join(names)}",
            f"from diffusers.utils import export_to_video{loader and f', {loader}'}",
            "",
            facts.usage(repo_id, base),
            *condition,
            f"video = pipe({argument}prompt={prompt!r}, {size}).frames[0]",
            f'export_to_video(video, "video.mp4", fps={facts.fps})',
        ]
    )


def _prompt_of(video: Path, prompts: list[str]) -> str | None:
    """Return the prompt of a validation video, whose name starts with the number and the slug of its prompt.

    None for other files, such as those from before a resume with other prompts.
    """
    match = re.fullmatch(r"(\d+)-\d+-?(.*)", video.stem)
    if match is None or int(match[1]) >= len(prompts) or slug(prompts[int(match[1])]) != match[2]:
        return None
    return " ".join(prompts[int(match[1])].split())


def _escaped(prompt: str) -> str:
    """Return a prompt on one line with Markdown and HTML escaped."""
    return re.sub(r"[\\`*_\[\]<>~|#]|^[-+=]", r"\\\g<0>", " ".join(prompt.split()))
