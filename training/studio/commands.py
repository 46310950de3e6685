"""The commands of the app's buttons: those that a shell would run, checked by the scripts' own parsers."""

import io
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from args import parse_args, parse_generate_args, parse_prepare_args
from checks.files import is_hub_id
from cli.schema import flag_values, path_values
from common.errors import UserError
from common.files import path_of_script, slug
from common.run_folder import LORA_FILE, list_checkpoints
from flags.settings import TrainingSettings, training_script
from studio.given import Given, find_run
from studio.places import inside
from video.condition_frames import split_files


BY_CARD = "fit the card"
MEMORY = (BY_CARD, "12 GB", "16 GB", "24 GB", "40 GB", "80 GB")
PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}  # of the prepared data; of training
USUAL_FLAGS = "--train_batch_size 1 --seed 42"
# They would lead out of the root or show a secret.
REFUSED = {
    "--config": "add its flags themselves",
    "--allow_outside_paths": "use this flag in a shell",
    "--hub_token": "every user of the machine can read it there; log in with `hf auth login`",
}
_MODEL_FLAGS = ("--model_path", "--pretrained_model_name_or_path")
_LISTS = ("validation_images", "validation_controls")

Command = list[str]
_parsing = threading.Lock()  # the parsers report on sys.stderr, which all threads share


@dataclass(frozen=True)
class Form:
    """What the page asks for a run, in its order."""

    model: str  # folder or hub id
    clips: str  # folder or table, below the root
    given: str  # this and the next two: of Given
    latents: int
    control: str
    id_token: str
    height: int
    width: int
    frames: int
    precision: str  # of PRECISIONS
    memory: str  # of MEMORY
    steps: int
    learning_rate: float
    output: str  # folder of the run
    prepare_flags: str  # more flags, as they are typed in a shell
    train_flags: str

    @property
    def prepared(self) -> str:
        """The folder of the prepared data, which runs with the same clips, model and sizes share."""
        clips, model = (slug(Path(one).name) or "all" for one in (self.clips, self.model))
        size = f"{self.frames}x{self.height}x{self.width}"
        return f"prepared/{clips}-{model}-{size}-{self.precision}{self.condition.name}"

    @property
    def condition(self) -> Given:
        """What videos are made from."""
        return Given(self.given, self.latents, self.control)


def prepare_command(form: Form, *more: str) -> Command:
    """Return the command that encodes the clips."""
    is_table = Path(form.clips).is_file()
    sizes = {"height_buckets": form.height, "width_buckets": form.width}
    sizes |= {"frame_buckets": form.frames, "max_num_frames": form.frames}
    flags = {"model_id": form.model, "dataset_file" if is_table else "data_root": form.clips}
    flags |= {"id_token": form.id_token, "output_dir": form.prepared, **sizes, "dtype": form.precision}
    fixed = ["--use_slicing", "--save_latents_and_embeddings", *form.condition.prepared]
    return [*_script("prepare_dataset.py"), *_words(flags), *fixed, *_split(form.prepare_flags), *more]


def train_command(form: Form, *more: str) -> Command:
    """Return the command that trains a LoRA on the prepared data; an unfinished run is resumed."""
    output = Path(form.output)
    resumes = form.output and list_checkpoints(output) and not (output / LORA_FILE).exists()
    flags = {
        "pretrained_model_name_or_path": form.model,
        "data_root": form.prepared,
        "mixed_precision": PRECISIONS[form.precision],
        "memory_budget_gb": "" if form.memory == BY_CARD else form.memory.removesuffix(" GB"),
        "max_train_steps": form.steps,
        "learning_rate": form.learning_rate,
        "output_dir": form.output,
        "resume_from_checkpoint": "latest" if resumes else "",
    }
    script = _script(training_script(form.condition.task, "lora"))
    frames = form.condition.detail if form.condition.task == "image-to-video" else []
    return [*script, *_words(flags), "--load_tensors", *frames, *_split(form.train_flags), *more]


def sample_command(
    model: str, lora: str, prompts: str, given: Given, files: list[str], steps: int, scale: float, seed: int, more: str
) -> Command:
    """Return the command that samples a video for each line of `prompts`.

    A LoRA is sampled with the base model and at the size of its run, if they are known; without one, `model` is.
    """
    run = find_run(Path.cwd(), lora)
    trained, switch = run.flags if run else {}, "ignore_learned_positional_embeddings"
    names_model = any(word.split("=")[0] in _MODEL_FLAGS for word in _split(more))
    base = {} if names_model else _base_of(trained, Path.cwd())
    flags = {"pretrained_model_name_or_path": model} | base | {"lora": lora}
    flags |= {"height": trained.get("height"), "width": trained.get("width")}
    flags |= {"num_frames": trained.get("max_num_frames"), "num_inference_steps": steps, "guidance_scale": scale}
    flags |= {"seed": seed, "output_dir": f"samples/{slug(lora or model)}"}
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not lines and "--prompts_file" not in more:
        raise UserError("prompts: nothing is typed; type one a line")
    # A space before a hyphen makes it no flag; generate.py removes it.
    words = [f" {line}" if line.startswith("-") else line for line in lines]
    words = ["--prompt", *words] if words else []
    switches = [f"--{switch}"] if trained.get(switch) else []
    return [*_script("generate.py"), *_words(flags), *words, *given.sampled(files), *switches, *_split(more)]


def _base_of(trained: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Return the flags of the base model that a run with these flags had; a UserError if it is not in `root`."""
    flags = {name: trained.get(name) for name in ("pretrained_model_name_or_path", "revision", "variant")}
    base = str(flags["pretrained_model_name_or_path"] or "")
    if not base:
        return {}
    if is_hub_id(base):
        return flags
    with suppress(UserError):
        if (folder := inside(root, base)).is_dir():
            return flags | {"pretrained_model_name_or_path": os.path.relpath(folder, root)}
    raise UserError(
        f"the LoRA's base model {base} is not in {root}; name its folder there by --model_path in More flags"
    )


def shown(commands: Sequence[Command], root: Path) -> str:
    """Return commands to paste into a shell, which does the same as the app."""
    return "\n".join([shlex.join(["cd", str(root)]), *map(shlex.join, commands)])


def check_command(command: Command, root: Path) -> Any:
    """Return the settings of a command, whose paths start from the current folder.

    Raises UserError with the message of the script's own parser, or if a path leads out of `root`.
    """
    for word in command:
        name = word.split("=")[0]
        if name in REFUSED:
            raise UserError(f"{name}: not in the app: {REFUSED[name]}")
    script = Path(command[1]).stem
    task = script.removeprefix("cogvideox_").removesuffix("_lora").replace("_", "-")
    own = {"prepare_dataset": parse_prepare_args, "generate": parse_generate_args}
    with _parsing, redirect_stderr(io.StringIO()) as said:
        try:
            settings = (own.get(script) or partial(parse_args, task=task, method="lora"))(command[2:])
        except SystemExit:
            lines = said.getvalue().strip().splitlines() or ["--help: not in the app; run the command in a shell"]
            raise UserError(lines[-1].removeprefix("error: ")) from None
    for name, path in _paths(settings):
        try:
            inside(root, path)
        except UserError as error:
            raise UserError(f"--{name}: {error}") from None
    return settings


def _paths(settings: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of each file and folder that a flag names; some name several, and columns may be files."""
    yield from ((name, path) for name, path in path_values(settings) if name not in _LISTS)
    if isinstance(settings, TrainingSettings):
        condition, validation = settings.image.condition_frames, settings.validation
        yield from (("validation_images", path) for one in validation.images for path in split_files(condition, one))
        yield from (("validation_controls", path) for path in validation.controls)
    flags = flag_values(settings)
    columns = {name: value for name, value in flags.items() if name.endswith("_column") and value}
    yield from ((name, os.path.join(flags["data_root"] or "", value)) for name, value in columns.items())


def _script(name: str) -> Command:
    return [sys.executable, path_of_script(name)]


def _words(flags: dict[str, object]) -> Command:
    """Return flags as words, without those whose value is empty; a value may begin with a hyphen."""
    words = []
    for name, value in flags.items():
        text = f"{value:g}" if isinstance(value, float) else str("" if value is None else value).strip()
        words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text] if text else []
    return words


def _split(flags: str) -> Command:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UserError(f"more flags: {error}; quote values as in a shell") from None
