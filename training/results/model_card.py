"""The card that goes to the hub with a result: what it is, samples, how to use it, how it was made."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from common.files import slug
from common.hub_token import without_tokens
from tracking.loss_curve import PICTURE_FILE
from validation.grid import GRID_FILE


# Flags that say where something lies here, or what the card says elsewhere.
_OWN = ("pretrained_model_name_or_path", "data_root", "dataset_file", "dataset_name", "dataset_mix", "output_dir")
_OWN += ("validation_dataset_file", "validation_images", "validation_prompt", "lora_weights", "logging_dir")
_OWN += ("resume_from_checkpoint", "cache_dir", "tracker_name", "report_to")


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a run."""

    base_model: str  # a hub id or a local folder
    task: str  # text-to-video, image-to-video
    is_lora: bool
    usage: Callable[[str, str], str]  # repository and name of the base model -> code that loads the result
    settings: Mapping[str, object]  # flags that were given, chosen or drawn
    prompts: list[str]  # of the validation videos
    num_frames: int  # of these
    height: int
    width: int
    fps: int
    last_step: int


def write_card(folder: Path, repo_id: str, facts: CardFacts) -> None:
    """Write `README.md` into a run's folder, beside what it shows.

    Args:
        folder: holds the last validation and the pictures, those of them that there are.
        repo_id: `owner/name`, where the folder goes.
    """
    is_local = Path(facts.base_model).exists()  # the hub takes no local paths, and they are nobody's business
    videos = sorted((folder / "validation" / f"step-{facts.last_step}").glob("*.mp4"))
    prompts = [_prompt_of(video, facts.prompts) for video in videos]
    samples = [
        (prompt, video.relative_to(folder).as_posix())
        for prompt, video in zip(prompts, videos, strict=True)
        if prompt is not None
    ]
    data = ModelCardData(
        base_model=None if is_local else facts.base_model,
        base_model_relation=None if is_local else "adapter" if facts.is_lora else "finetune",
        library_name="diffusers",
        license="other",
        pipeline_tag=facts.task,
        tags=[facts.task, *(["lora"] if facts.is_lora else []), "diffusers", "diffusers-training", "cogvideox"],
        widget=[{"text": prompt, "output": {"url": url}} for prompt, url in samples] or None,
    )
    base = Path(facts.base_model).resolve().name if is_local else facts.base_model
    text = _body(folder, repo_id, base, facts, samples)
    ModelCard(without_tokens(f"---\n{data.to_yaml()}\n---\n\n{text}")).save(folder / "README.md")


def _body(folder: Path, repo_id: str, base: str, facts: CardFacts, samples: list[tuple[str, str]]) -> str:
    what = "A LoRA for" if facts.is_lora else "All weights of the transformer, fine-tuned from"
    parts = [f"# {repo_id}", f"{what} {base} ({facts.task}), made with CogVideoX Factory in {facts.last_step} steps."]
    if samples:
        links = [f"- [{_escaped(prompt)}]({url})" for prompt, url in samples]
        parts += ["## Samples", "<Gallery />", "\n".join(links)]
    elif facts.prompts:
        parts += ["## Validation prompts", "\n".join(f"- {_escaped(prompt)}" for prompt in facts.prompts)]
    if (folder / "validation" / GRID_FILE).is_file():
        parts += ["The same noise at steps of the training, from left to right:", f"![steps](validation/{GRID_FILE})"]
    parts += ["## Use it", f"```python\n{example(facts, base, repo_id)}\n```", "## Training"]
    settings = {name: value for name, value in facts.settings.items() if name not in _OWN}
    dumped = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=float("inf"))
    parts += [f"Flags that differ from the defaults, as `--config` reads them:\n\n```yaml\n{dumped}```"]
    if (folder / PICTURE_FILE).is_file():
        parts += [f"![loss]({PICTURE_FILE})"]
    return "\n\n".join(parts) + "\n"


def example(facts: CardFacts, base: str, repo_id: str) -> str:
    """Code that samples a video with the result."""
    with_image = facts.task == "image-to-video"
    names = ["CogVideoXImageToVideoPipeline" if with_image else "CogVideoXPipeline"]
    names += [] if facts.is_lora else ["CogVideoXTransformer3DModel"]
    prompt = facts.prompts[0] if facts.prompts else "A panda plays a guitar"
    image = ['image = load_image("first-frame.png")'] if with_image else []
    size = f"num_frames={facts.num_frames}, height={facts.height}, width={facts.width}"
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {', '.join(names)}",
            f"from diffusers.utils import export_to_video{', load_image' if with_image else ''}",
            "",
            facts.usage(repo_id, base),
            *image,
            f"video = pipe({'image=image, ' if with_image else ''}prompt={prompt!r}, {size}).frames[0]",
            f'export_to_video(video, "video.mp4", fps={facts.fps})',
        ]
    )


def _prompt_of(video: Path, prompts: list[str]) -> str | None:
    """Of a validation video, whose name has the number and the beginning of its prompt.

    None for another file: of a run that had other prompts before it was resumed, or laid there by somebody.
    """
    match = re.fullmatch(r"(\d+)-\d+-?(.*)", video.stem)
    if match is None or int(match[1]) >= len(prompts) or slug(prompts[int(match[1])]) != match[2]:
        return None
    return " ".join(prompts[int(match[1])].split())


def _escaped(prompt: str) -> str:
    """A prompt on one line, in which Markdown and HTML find nothing of theirs."""
    return re.sub(r"[\\`*_\[\]<>~|#]|^[-+=]", r"\\\g<0>", " ".join(prompt.split()))
