"""What the buttons of the page do; each method takes and returns the values of components."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from markupsafe import Markup, escape

from common.errors import UserError, listing
from common.remote import default_cache_folder
from common.run_folder import LORA_FILE, REPORT_FILE
from planning.plan import data_sources
from studio.captions import Captioned, read_captions, save_caption
from studio.commands import Form, check_command, prepare_command, sample_command, shown, train_command
from studio.given import BEGINNING, CONTROL, FILES, TEXT, Given, find_run, given_of
from studio.jobs import Job, Jobs
from studio.models import HUB_MODELS, check_model
from studio.places import inside, list_data, list_media, list_models, list_runs, list_videos


_STATE = Markup(
    "<p><b>{}</b>: {}</p><p>Result in <code>{}</code>, log in <code>{}/log.txt</code>. A job continues when this page "
    "or the app is closed.</p>"
)
_RESULTS = {
    LORA_FILE: Markup('<p><a href="{}" download>Download the LoRA</a></p>'),
    REPORT_FILE: Markup(
        '<p><a href="{0}" target="_blank">Open the report</a></p>'
        '<iframe class="report" sandbox title="Report" src="{0}"></iframe>'
    ),
}
_PLAYED = {".mp4", ".m4v", ".mov", ".webm"}  # by browsers, mostly


def _told(action: Callable) -> Callable:
    """Show a UserError of an action as a message of the page, as text."""

    @functools.wraps(action)
    def act(*values: Any) -> Any:
        try:
            return action(*values)
        except UserError as error:
            text = Markup("<br>").join(str(error).splitlines())
            raise gr.Error(text, duration=None, title="", print_exception=False) from None

    return act


class Actions:
    """The actions on the data, the models and the jobs in `root`, which is the current folder."""

    def __init__(self, root: Path, jobs: Jobs):
        self.root = root
        self.jobs = jobs

    # Clips

    @_told
    def show_clips(self, *form: Any) -> tuple[list[Any], list[Captioned], None, Markup, Markup, str]:
        """Read the clips: the rows of the table, the clips, none chosen, the bad rows, no video, no caption."""
        settings = check_command(*self._commands("plan", form), self.root)
        clips, bad = [], []
        control = settings.control if settings.preparation.save_control_latents else None
        for source in data_sources(settings.sources, control, settings.masks):
            more, unusable = read_captions(source, default_cache_folder() / "media")
            clips, bad = clips + more, bad + unusable
        note = listing(f"{len(clips)} clips; cannot be changed here:", bad) if bad else f"{len(clips)} clips"
        return self._rows(clips), clips, None, Markup('<p class="lines">{}</p>').format(note), Markup(), ""

    @_told
    def choose_clip(self, clips: list[Captioned], chosen: int | None, caption: str, event: gr.SelectData) -> tuple:
        """Save the caption that was edited, if it was, and show another clip."""
        saved = self.save(clips, chosen, caption) if _is_edited(clips, chosen, caption) else (gr.skip(), gr.skip())
        number = int(event.row_value[0])
        clip = clips[number - 1]
        media = Markup().join(_media(self.root, file) for file in (clip.video, *clip.beside) if file)
        return *saved, number, media, clip.text

    @_told
    def save(self, clips: list[Captioned], chosen: int | None, caption: str) -> tuple[list[Any], list[Captioned]]:
        """Save the caption of the chosen clip, and return the rows of the table and the clips."""
        if chosen is None:
            raise UserError("choose a clip first")
        if _is_edited(clips, chosen, caption):
            clips[chosen - 1] = save_caption(clips[chosen - 1], caption, self.root)
            gr.Info("Saved; the former file is kept.", duration=3)
        return self._rows(clips), clips

    def _rows(self, clips: list[Captioned]) -> list[Any]:
        return [[number, _name(self.root, clip.video), clip.text] for number, clip in enumerate(clips, 1)]

    # Runs

    def preview(self, kind: str, *values: Any) -> str:
        """Return the commands of a job, or why there are none."""
        try:
            return shown(self._commands(kind, values), self.root)
        except UserError as error:
            return f"# {error}"

    @_told
    def start(self, kind: str, *values: Any) -> gr.Tabs:
        """Start a job: plan shows what the model would see of the clips, try trains two steps, train trains."""
        prepare, *others = self._commands(kind, values)
        prepared = check_command(prepare, self.root)
        result = prepared.preparation.output_dir
        inside(self.root, result).mkdir(parents=True, exist_ok=True)  # training requires that it exists
        for command in others:
            trained = check_command(command, self.root)
            result = trained.training.output_dir
            check_model(_form(values).given, prepared, trained)
        self.jobs.start(kind, [prepare, *others], result, values)
        return gr.Tabs(selected="run")

    def _commands(self, kind: str, values: Sequence[Any]) -> list[list[str]]:
        values = ["" if value is None else value for value in values]
        if kind == "sample":
            model, lora, prompts, given, latents, control, *others = values
            return [sample_command(model, lora, prompts, Given(given, latents, control), *others)]
        form = _form(values)
        if kind == "plan":
            return [prepare_command(form, "--dry_run")]
        return [prepare_command(form), train_command(form, *["--dry_run"] * (kind == "try"))]

    # Samples

    def ask_files(self, kind: str) -> gr.Dropdown:
        """Ask for the files that a choice of `Given` needs."""
        choices = list_media(self.root, are_videos=kind in (BEGINNING, CONTROL))
        return gr.Dropdown(choices=choices, label=FILES.get(kind), visible=kind != TEXT)

    def fit_given(self, lora: str | None) -> list[Any]:
        """Return the choice of `Given` that a LoRA was trained with; text only if it is unknown."""
        run = find_run(self.root, lora)
        return list(astuple(given_of(run) if run else Given()))

    @_told
    def sample(self, *values: Any) -> gr.Tabs:
        """Sample videos."""
        commands, before = self._commands("sample", values), self.jobs.latest()
        settings = check_command(commands[0], self.root)
        if not settings.videos:
            raise UserError(f"all videos of {settings.output.output_dir} are there already")
        self.jobs.start("sample", commands, str(settings.videos[0].file.parent), before.form if before else ())
        return gr.Tabs(selected="run")

    # The job

    def look(self, seen: list[Any]) -> list[Any]:
        """Return state, log, result and stop button of the latest job, as far as they changed, and all of them."""
        job, current = self.jobs.latest(), ["<p>Nothing was started yet.</p>", "", "", False]
        if job is not None:
            state = _STATE.format(job.kind, job.state, job.result, job.folder.relative_to(self.root))
            log = Markup('<div class="log"><pre>{}</pre></div>').format(job.log())
            current = [str(state), str(log), str(self._result(job)), job.is_running]
        values, before = [*current[:3], gr.Button(visible=current[3])], seen or [None] * 4
        changed = [gr.skip() if old == new else value for value, new, old in zip(values, current, before, strict=True)]
        return [*changed, current]

    def stop(self) -> None:
        """Let the job save and end; pressed again, it ends at once."""
        self.jobs.stop()
        gr.Info("The run saves and ends. Press again to end it at once.", duration=5)

    def _result(self, job: Job) -> Markup:
        folder = self.root / job.result
        there = [(folder / name, html) for name, html in _RESULTS.items() if (folder / name).is_file()]
        parts = [html.format(_address(self.root, file)) for file, html in there]
        figures = [
            Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(_media(self.root, video), video.name)
            for video in list_videos(folder)
        ]
        return Markup("{}<div class='videos'>{}</div>").format(Markup().join(parts), Markup().join(figures))

    # At the start

    def restore(self) -> list[Any]:
        """Return the tab, the settings of the latest job, and what can be chosen."""
        job = self.jobs.latest()
        tab = gr.Tabs(selected="run") if job and job.is_running else gr.skip()
        form = list(job.form) if job and len(job.form) == len(fields(Form)) else [gr.skip()] * len(fields(Form))
        for index, choices in enumerate(([*list_models(self.root), *HUB_MODELS], list_data(self.root))):
            value = {} if isinstance(form[index], dict) else {"value": form[index]}
            form[index] = gr.Dropdown(choices=choices, **value)
        return [tab, *form]

    def runs(self, chosen: str | None) -> gr.Dropdown:
        """Return the LoRAs to sample from; the newest is chosen if nothing was."""
        found = list_runs(self.root)
        value = chosen if chosen is not None else next(iter(found), "")
        return gr.Dropdown(choices=[("none: the base model", ""), *found], value=value)


def _form(values: Sequence[Any]) -> Form:
    form = Form(*values)
    unused = {"latents": form.given != BEGINNING, "control": form.given != CONTROL}  # and hidden
    for item in fields(Form):
        is_needed = item.name not in ("id_token", "prepare_flags", "train_flags") and not unused.get(item.name)
        if is_needed and getattr(form, item.name) == "":
            tab = "Clips" if item.name == "clips" else "Train"
            name = "K" if item.name == "latents" else item.name.replace("_", " ")
            raise UserError(f"{name}: nothing is chosen; choose or type it in the tab {tab}")
    return form


def _is_edited(clips: list[Captioned], chosen: int | None, caption: str) -> bool:
    return chosen is not None and caption.strip() != clips[chosen - 1].text.strip()


def _name(root: Path, file: Path) -> str:
    file = file.absolute()
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _address(root: Path, file: Path) -> str:
    return f"file/{quote(_name(root, file))}?{file.stat().st_mtime_ns}"


def _media(root: Path, file: Path) -> Markup:
    """Return a picture, or a video to play, if the page may show the file."""
    try:
        inside(root, file.absolute())
        address, suffix = _address(root, file), file.suffix.lower()
    except (UserError, OSError):
        return Markup("<p>{} is not inside the root, and not shown.</p>").format(file.name)
    if suffix in (".png", ".jpg", ".jpeg", ".webp", ".gif"):
        return Markup('<img class="picture" alt="{}" src="{}">').format(file.name, address)
    if suffix in _PLAYED:
        return Markup('<video controls loop muted preload="metadata" src="{}"></video>').format(address)
    return Markup("<p>Browsers do not play {} files; Plan shows how the model sees it.</p>").format(escape(suffix))
