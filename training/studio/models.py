"""What the app knows of a model before a job loads it: by its name, or from its configs if it is a folder."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.buckets import make_buckets, native_size
from flags.settings import PreparationSettings, TrainingSettings


HUB_MODELS = ["THUDM/CogVideoX-2b", "THUDM/CogVideoX-5b", "THUDM/CogVideoX-5b-I2V"]
HUB_MODELS += ["THUDM/CogVideoX1.5-5B", "THUDM/CogVideoX1.5-5B-I2V"]
_KINDS = {"text-to-video": ["text"], "image-to-video": ["image"], "control-to-video": ["text", "control"]}


def check_model(choice: str, prepared: PreparationSettings, trained: TrainingSettings) -> None:
    """Raise a UserError if training would refuse the model, which it would say only after the clips are encoded.

    Of models of the hub, only the kind of HUB_MODELS is known.
    """
    model, kinds = trained.model.pretrained_model_name_or_path, _KINDS[trained.task]
    config, index = (_read(Path(model) / name) for name in ("transformer/config.json", "model_index.json"))
    if not config and model not in HUB_MODELS:
        return
    takes_condition = config.get("in_channels", 16) != config.get("out_channels", 16) if config else "I2V" in model
    is_control = "Control" in index.get("_class_name", "")
    kind = "text" if not takes_condition else "control" if is_control else "image"
    if kind not in kinds:
        wanted = " or ".join(f"{one}-to-video" for one in kinds)
        raise UserError(f"{choice}: needs a model for {wanted}; {model} is for {kind}-to-video; choose another")
    can_drop, drops = trained.task == "image-to-video", trained.image.ignore_learned_positional_embeddings
    if config.get("use_learned_positional_embeddings") and not (can_drop and drops):
        clips, native = prepared.clips, native_size(config)
        if native not in make_buckets(clips.frame_buckets, clips.height_buckets, clips.width_buckets):
            advice = ", or add --ignore_learned_positional_embeddings to the flags of training" if can_drop else ""
            raise UserError(
                f"{model} has learned positions for only {native} (frames x height x width); choose it{advice}"
            )


def _read(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    return {}
