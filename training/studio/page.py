"""The page of the app, from top to bottom: clips and captions, the settings of a run, the job, sampling."""

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from studio.actions import Actions
from studio.commands import BY_CARD, MEMORY, PRECISIONS, USUAL_FLAGS
from studio.given import BEGINNING, CHOICES, CONTROL, CONTROLS, TEXT
from studio.jobs import Jobs
from studio.models import HUB_MODELS


# Fonts of the system: Gradio's own themes fetch theirs from elsewhere.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
THEME.set(block_info_text_color="*neutral_500")  # theirs is too pale to read
CSS = """
video { width: 100% }
video + video { margin-top: .6rem }
video, img.picture { max-width: 100%; max-height: 24rem; border-radius: 6px; background: #0002 }
iframe.report { width: 100%; height: 75vh; border: 1px solid #8886; border-radius: 6px }
.log { display: flex; flex-direction: column-reverse; max-height: 20rem; overflow: auto } /* opens at its end */
.log { border: 1px solid #8886; border-radius: 6px; padding: .6rem }
.log pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; line-height: 1.35 }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
.videos figure { margin: 0 }
.videos figcaption, .lines, code { overflow-wrap: anywhere; white-space: pre-wrap }
"""
_CODE = {"label": "The same in a shell", "language": "shell", "lines": 2, "wrap_lines": True, "interactive": False}
_SECONDS = 2.0  # between two looks at the job
_EVENT = {"api_visibility": "private"}
_QUIET = _EVENT | {"show_progress": "hidden"}
_PREVIEW = _QUIET | {"trigger_mode": "always_last"}  # while one is typing


def build_page(root: Path, jobs: Jobs) -> gr.Blocks:
    """Return the page on the data, the models and the jobs in `root`, which is the current folder."""
    actions = Actions(root, jobs)
    with gr.Blocks(title="CogVideoX Factory", analytics_enabled=False) as page:
        gr.HTML(Markup("<h1>CogVideoX Factory</h1><p>Clips, models and results in <code>{}</code></p>").format(root))
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Clips"):
                data = gr.Dropdown(label="Clips: a folder or a table", allow_custom_value=True)
                show = gr.Button("Show clips")
                clips = _captions(actions)
            with gr.Tab("Train", id="train") as train:
                form = _settings(data)
                command = gr.Code(**_CODE)
                with gr.Row():
                    buttons = {"plan": gr.Button("Plan"), "try": gr.Button("Try two steps")}
                    buttons["train"] = gr.Button("Train", variant="primary")
            with gr.Tab("Run", id="run"):
                look = _job(actions)
            with gr.Tab("Sample") as tab:
                _sampling(actions, form[0], tab, tabs, look)
        gr.on([show.click, data.input], actions.show_clips, form, clips, **_EVENT)
        # At each look at the tab, too: a run that was stopped in the meantime is resumed.
        shown = [page.load, train.select, *(one.change for one in form)]
        gr.on(shown, partial(actions.preview, "train"), form, command, **_PREVIEW)
        for kind, button in buttons.items():
            button.click(partial(actions.start, kind), form, tabs, **_EVENT).success(**look)
        page.load(actions.restore, None, [tabs, *form], **_QUIET).then(**look)
        gr.Timer(_SECONDS).tick(**look)
    return page


def _captions(actions: Actions) -> list[Any]:
    """Add the table of clips and the editor, and return what `Actions.show_clips` changes."""
    note, clips, chosen = gr.HTML(), gr.State([]), gr.State(None)
    with gr.Row():
        with gr.Column(scale=3):
            table = gr.Dataframe(
                headers=["#", "clip", "caption"],
                column_widths=["10%", "35%", "55%"],
                interactive=False,
                wrap=True,
                show_search="filter",
                label="Choose a clip",
            )
        with gr.Column(scale=2):
            player = gr.HTML()
            info = "Saved by the button, or when you choose another clip"
            caption = gr.Textbox(label="Caption", lines=5, info=info)
            save = gr.Button("Save caption")
    editor = [clips, chosen, caption]
    table.select(actions.choose_clip, editor, [table, clips, chosen, player, caption], **_QUIET)
    save.click(actions.save, editor, [table, clips], **_QUIET)
    return [table, clips, chosen, note, player, caption]


def _given() -> list[Any]:
    """Add the choice of what is given, and what shows with it; return the components of a `Given`, in its order."""
    info = "Besides the prompt. Frames need an image-to-video model, the others a text-to-video model"
    kind = gr.Radio(CHOICES, value=TEXT, label="What is given", info=info)
    info_k = "Latent frames: 3 are the first 9 frames (4K-3)"
    latents = gr.Number(3, label="K", info=info_k, precision=0, minimum=2, visible=False)
    info = "Computed from the clips (inpaint: with their masks), or your own, as a.control.mp4 beside a.mp4"
    control = gr.Dropdown(CONTROLS, label="Control", info=info, visible=False)
    shown = {latents: BEGINNING, control: CONTROL}
    kind.change(lambda kind: [gr.update(visible=kind == its) for its in shown.values()], kind, [*shown], **_QUIET)
    return [kind, latents, control]


def _settings(data: gr.Dropdown) -> list[Any]:
    """Add the settings of a run, and return the components of a `Form`, in its order."""
    with gr.Row():
        model = gr.Dropdown(HUB_MODELS, value=HUB_MODELS[1], label="Model", allow_custom_value=True, min_width=280)
        output = gr.Textbox("outputs/my-lora", label="Output folder", min_width=280)
    given = _given()
    token = gr.Textbox(label="Id token", info="A rare word before every caption; begin prompts with it")
    with gr.Row():
        frames = gr.Number(49, label="Frames", precision=0, minimum=1)
        height = gr.Number(480, label="Height", precision=0, minimum=16)
        width = gr.Number(720, label="Width", precision=0, minimum=16)
        steps = gr.Number(1000, label="Steps", precision=0, minimum=1)
        rate = gr.Number(1e-4, label="Learning rate", minimum=0)
    with gr.Row():
        memory = gr.Dropdown(MEMORY, value=BY_CARD, label="Memory", info="Settings that fit the card, or this much")
        precision = gr.Dropdown(list(PRECISIONS), value="bf16", label="Precision", info="fp16 for CogVideoX-2b")
    with gr.Accordion("More flags, as in a shell", open=False):
        prepare_flags = gr.Textbox(label="of prepare_dataset.py", placeholder="--caption_column text --fps 8")
        train_flags = gr.Textbox(USUAL_FLAGS, label="of training")
    sizes, training = [height, width, frames], [precision, memory, steps, rate, output]
    return [model, data, *given, token, *sizes, *training, prepare_flags, train_flags]


def _job(actions: Actions) -> dict[str, Any]:
    """Add what is shown of the latest job, and return the event that updates it."""
    state = gr.HTML()
    stop = gr.Button("Stop: save and end", variant="stop", visible=False)
    log, result, seen = gr.HTML(), gr.HTML(), gr.State([])
    stop.click(actions.stop, **_QUIET)
    return {"fn": actions.look, "inputs": seen, "outputs": [state, log, result, stop, seen], **_QUIET}


def _sampling(actions: Actions, model: gr.Dropdown, tab: gr.Tab, tabs: gr.Tabs, look: dict[str, Any]) -> None:
    """Add the settings of sampling."""
    info = "Sampled with the base model and at the size of its run; without one, with the model of Train"
    run = gr.Dropdown(label="LoRA: a run or a checkpoint", info=info, allow_custom_value=True)
    prompts = gr.Textbox(label="Prompts, one a line", lines=3, placeholder="ID_TOKEN a rabbit yawns")
    given = _given()
    files = gr.Dropdown([], multiselect=True, allow_custom_value=True, visible=False)
    with gr.Row():
        steps = gr.Number(50, label="Denoising steps", precision=0, minimum=1)
        guidance = gr.Number(6.0, label="Guidance scale", minimum=0)
        seed = gr.Number(42, label="Seed", precision=0, minimum=0)
    more = gr.Textbox(label="More flags of generate.py", placeholder="--compare --num_frames 49")
    command = gr.Code(**_CODE)
    inputs = [model, run, prompts, *given, files, steps, guidance, seed, more]
    gr.on([one.change for one in inputs], partial(actions.preview, "sample"), inputs, command, **_PREVIEW)
    tab.select(actions.runs, run, run, **_QUIET)
    run.change(actions.fit_given, run, given, **_QUIET)
    gr.on([given[0].change, files.focus], actions.ask_files, given[0], files, **_QUIET)
    given[0].change(lambda: [], None, files, **_QUIET)
    button = gr.Button("Sample", variant="primary")
    button.click(actions.sample, inputs, tabs, **_EVENT).success(**look)
