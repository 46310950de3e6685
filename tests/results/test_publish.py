"""A finished run uploads its card and weights and nothing private.

Calls that would reach the hub are replaced by ones that note their arguments or answer as the hub does.
"""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import yaml
from httpx import Request, Response
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from common.errors import UserError
from common.hub_token import HubToken
from data.buckets import Bucket
from methods.full import FullFinetune
from methods.lora import Lora
from results import publish
from results.model_card import CardFacts


TOKEN = HubToken("hf_a_secret")
PROMPTS = ["a red circle moves over a blue background", "a {{ curly }} square: 50% & more"]
FACTS = CardFacts(
    base_model="THUDM/CogVideoX-5b",
    task="text-to-video",
    adapter="LoRA",
    usage=lambda repo_id, model: "\n".join(Lora(8, 8).usage("CogVideoXPipeline", model, repo_id)),
    settings={"rank": 8, "learning_rate": 1e-4, "data_root": "/home/me/clips", "output_dir": "/home/me/out"},
    prompts=PROMPTS,
    size=Bucket(17, 64, 96),
    fps=8,
    last_step=20,
)


@pytest.fixture
def hub(monkeypatch) -> dict[str, dict]:
    calls: dict[str, dict] = {}

    def create_repo(repo_id, **options):
        calls["create_repo"] = {"repo_id": repo_id, **options}
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"owner/{repo_id}")

    def upload_folder(**options):
        calls["upload_folder"] = options

    monkeypatch.setattr(publish, "create_repo", create_repo)
    monkeypatch.setattr(publish, "upload_folder", upload_folder)
    return calls


def push(folder: Path, repo_id: str | None = "owner/circles", **others) -> str:
    publish.push_to_hub(folder, repo_id, TOKEN, replace(FACTS, **others))
    return (folder / "README.md").read_text(encoding="utf-8")


def kept_by(hub: dict[str, dict], names: list[str]) -> list[str]:
    """Return the names that the upload does not ignore, by the hub library's own filter."""
    return list(filter_repo_objects(names, ignore_patterns=hub["upload_folder"]["ignore_patterns"]))


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)\n```", card, flags=re.DOTALL)
    return code


def test_the_card_has_the_base_model_tags_and_the_settings_without_folders(hub, tmp_path):
    card = push(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    found = (data.base_model, data.base_model_relation, data.pipeline_tag)
    assert found == ("THUDM/CogVideoX-5b", "adapter", "text-to-video")
    assert {"text-to-video", "lora", "cogvideox"} <= set(data.tags)
    (settings,) = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    assert yaml.safe_load(settings) == {"rank": 8, "learning_rate": 1e-4}
    assert "/home/me" not in card


def test_the_code_on_the_card_loads_the_result_from_the_hub(hub, tmp_path):
    code = code_of(push(tmp_path))
    compile(code, "card", "exec")
    assert 'pipe.load_lora_weights("owner/circles")' in code
    assert f"prompt={PROMPTS[0]!r}, num_frames=17, height=64, width=96" in code

    def usage(repo_id: str, model: str) -> str:
        return "\n".join(FullFinetune(save_pipeline=True).usage("CogVideoXImageToVideoPipeline", model, repo_id))

    tuned = code_of(push(tmp_path, task="image-to-video", adapter=None, usage=usage))
    compile(tuned, "card", "exec")
    assert 'from_pretrained("owner/circles", subfolder="transformer"' in tuned
    assert "import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel" in tuned
    assert "pipe(image=image, prompt=" in tuned


@pytest.mark.parametrize("adapter", ["LoRA", "LoKr"])
def test_the_card_names_the_adapter(hub, tmp_path, adapter):
    card = push(tmp_path, adapter=adapter)
    assert f"A {adapter} for THUDM/CogVideoX-5b" in card
    assert f"- {adapter.lower()}\n" in card


def test_the_card_shows_the_last_videos_and_the_pictures(hub, tmp_path):
    shown = ["00-00-a-red-circle-moves-over-a-blue-backgroun.mp4", "01-00-a-curly-square-50-more.mp4"]
    others = ["00-00-of-another-prompt.mp4", "02-00-of-more-prompts.mp4", "mine.mp4"]  # from before a resume
    for name in ("step-10/00-00-old.mp4", *(f"step-20/{name}" for name in (*shown, *others)), "progress.png"):
        (tmp_path / "validation" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "validation" / name).touch()
    (tmp_path / "loss.png").touch()
    card = push(tmp_path)
    urls = [f"validation/step-20/{name}" for name in shown]
    widget = ModelCard.load(tmp_path / "README.md").data.widget
    assert [(entry["text"], entry["output"]["url"]) for entry in widget] == list(zip(PROMPTS, urls, strict=True))
    assert "<Gallery />" in card
    assert all(f"[{prompt}]({url})" in card for prompt, url in zip(PROMPTS, urls, strict=True))
    assert "![steps](validation/progress.png)" in card
    assert "![loss](loss.png)" in card
    assert "step-10" not in card


def test_without_videos_the_card_lists_the_prompts_as_escaped_text_on_one_line_each(hub, tmp_path):
    card = push(tmp_path, prompts=["a [link](b) | <img src=x>\n\n# title `code`", "- *item* _b_", "兔子"])
    lines = card.split("## Validation prompts\n\n")[1].split("\n\n")[0].splitlines()
    assert lines == [r"- a \[link\](b) \| \<img src=x\> \# title \`code\`", r"- \- \*item\* \_b\_", "- 兔子"]
    assert "Gallery" not in card and "![" not in card


def test_the_folder_goes_to_the_created_repository_and_the_token_only_to_the_hub(hub, tmp_path):
    card = push(tmp_path)
    created, uploaded = hub["create_repo"], hub["upload_folder"]
    assert created["token"] == uploaded["token"] == TOKEN.value
    assert created["repo_id"] == uploaded["repo_id"] == "owner/circles"
    assert created["exist_ok"]
    assert Path(uploaded["folder_path"]) == tmp_path
    assert TOKEN.value not in card
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_checkpoints_caches_partial_files_and_records_of_trackers_are_not_uploaded(hub, tmp_path):
    push(tmp_path)
    published = ["README.md", "pytorch_lora_weights.safetensors", "validation/step-2/00-00-a-circle.mp4"]
    private = [
        "checkpoint-4/optimizer.bin",
        "checkpoint-4/pytorch_lora_weights.safetensors",
        "prompt_embeds/0123.safetensors",
        "validation/step-2/pytorch_lora_weights.safetensors",
        "validation/step-2/transformer/config.json",
        ".partial.checkpoint-5/optimizer.bin",
        ".123.partial.pytorch_lora_weights.safetensors",
        "skipped_clips.csv",
        "held_out_clips.csv",
        "profile/steps-5-7.json.gz",
        "logs/wandb/offline-run-1/run-1.wandb",
        "logs/wandb/offline-run-1/files/wandb-metadata.json",  # with the command line, the machine's name and folders
        *("logs/wandb_run_id", "logs/comet_ml_run_id", "logs/trackio_run_id"),
        *("report.html", "run_facts.json", "run_notes.jsonl", "validation/targets/00.mp4"),  # folders, training clips
    ]
    assert kept_by(hub, [*published, *private]) == published


def test_without_a_name_the_repository_has_that_of_the_folder(hub, tmp_path, monkeypatch):
    folder = tmp_path / "my-lora"
    folder.mkdir()
    monkeypatch.chdir(folder)
    push(Path("."), repo_id=None)
    assert hub["create_repo"]["repo_id"] == "my-lora"
    assert hub["upload_folder"]["repo_id"] == "owner/my-lora"


def test_a_local_base_model_is_not_written_as_a_hub_id(hub, tmp_path):
    """The hub refuses a card whose base_model is a path, and with it the upload."""
    model = tmp_path / "models" / "my-cogvideox"
    model.mkdir(parents=True)
    card = push(tmp_path, base_model=str(model))
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
    assert 'from_pretrained("my-cogvideox"' in card
    assert str(tmp_path) not in card


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_uploads_the_files_and_code_of_its_card(hub, tiny_models, demo_clips, tmp_path, monkeypatch):
    import cogvideox_text_to_video_lora

    monkeypatch.setattr(publish, "whoami", lambda token: who())
    argv = ["--pretrained_model_name_or_path", str(tiny_models("5b")), "--data_root", str(demo_clips)]
    argv += ["--caption_column", "prompts.txt", "--max_samples", "1", "--train_batch_size", "1", "--rank", "4"]
    argv += ["--height", "64", "--width", "96", "--frame_buckets", "17", "--max_num_frames", "17", "--seed", "0"]
    argv += ["--validation_prompt", "a rabbit", "--num_inference_steps", "1", "--max_train_steps", "1"]
    argv += ["--push_to_hub", "--hub_model_id", "me/rabbit", "--output_dir", str(tmp_path / "out")]
    cogvideox_text_to_video_lora.main(argv)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card
    shown = re.findall(r"\]\(([^)]*)\)", card)
    assert shown == ["validation/step-1/00-00-a-rabbit.mp4", "validation/progress.png", "loss.png"]
    assert kept_by(hub, shown) == shown
    assert all((tmp_path / "out" / name).is_file() for name in shown)
    # With the folders instead of the two repositories, the code runs.
    code = code_of(card).replace('"me/rabbit"', repr(str(tmp_path / "out"))).replace('.to("cuda")', "")
    code = code.replace(f'"{tiny_models("5b").name}"', repr(str(tiny_models("5b")))).replace("bfloat16", "float32")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("pipe(prompt", "pipe(num_inference_steps=1, prompt"), {})
    assert (tmp_path / "video.mp4").stat().st_size > 0


@pytest.mark.parametrize("call", ["create_repo", "upload_folder", "write_card"])
def test_a_failed_upload_logs_the_command_to_do_it_later(hub, tmp_path, monkeypatch, caplog, call):
    error = HfHubHTTPError(f"403 Forbidden for {TOKEN.value}", response=Response(403, request=Request("POST", "/")))
    monkeypatch.setattr(publish, call, Mock(side_effect=error))
    publish.push_to_hub(tmp_path, None, TOKEN, FACTS)
    title, command = caplog.records[-1].getMessage().splitlines()
    assert title.startswith("error: the result was not uploaded (HfHubHTTPError: 403 Forbidden")
    assert f"it is complete in {tmp_path}" in title
    words = shlex.split(command)
    assert words[:5] == ["hf", "upload", tmp_path.name, str(tmp_path), "."]
    assert words[5:7] == ["--exclude", "checkpoint-*"]


# The check before training


def who(role="write", **others):
    orgs = [{"name": "studio", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}]
    return {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": role, **others}}}


def scopes(*permissions):
    return {"scoped": [{"entity": {"type": "user", "name": "me"}, "permissions": list(permissions)}]}


@pytest.mark.parametrize("repo_id", [None, "circles", "me/circles", "studio/circles"])
@pytest.mark.parametrize("answer", [who(), who("fineGrained", fineGrained=scopes("repo.content.read", "repo.write"))])
def test_a_token_with_write_access_is_accepted(monkeypatch, tmp_path, repo_id, answer):
    asked_with = []
    monkeypatch.setattr(publish, "whoami", lambda token: asked_with.append(token) or answer)
    publish.check_access(tmp_path / "circles", repo_id, TOKEN)
    assert asked_with == [TOKEN.value]


@pytest.mark.parametrize(
    ("answer", "repo_id", "reason"),
    [
        (who("read"), None, "the token of me is read-only"),
        (who("fineGrained", fineGrained=scopes("repo.content.read")), None, "the token of me cannot write"),
        (who(), "somebody/circles", "me is not a member of somebody"),
        (who(), "museum/circles", "me has read-only access to museum"),
    ],
)
def test_a_token_without_write_access_is_refused_before_training(monkeypatch, tmp_path, answer, repo_id, reason):
    monkeypatch.setattr(publish, "whoami", lambda token: answer)
    with pytest.raises(UserError, match=f"^--push_to_hub: {reason}.*; pass a token with write access"):
        publish.check_access(tmp_path, repo_id, TOKEN)


class TransportError(Exception):
    """An error of an unknown HTTP library."""


@pytest.mark.parametrize(
    "error",
    [
        LocalTokenNotFoundError("Token is required, but no token found. You must log in."),
        HfHubHTTPError("Invalid user token.", response=Response(401, request=Request("GET", "/"))),
        TransportError("[Errno -2] Name or service not known"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_does_not_answer_is_one_line_before_training(monkeypatch, tmp_path, error):
    monkeypatch.setattr(publish, "whoami", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"^--push_to_hub: the upload to 'circles' would fail: ") as caught:
        publish.check_access(tmp_path / "circles", None, TOKEN)
    assert len(str(caught.value).splitlines()) == 1
    assert TOKEN.value not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("circles", ".*offline"),
        ("two--dashes", r"Cannot have -- or \.\. in repo_id"),
        ("Some Words", "Repo id must use alphanumeric"),
    ],
)
def test_no_network_and_invalid_names_are_found_before_training(tmp_path, name, reason):
    with pytest.raises(UserError, match=rf"^--push_to_hub: the upload to '{name}' would fail: {reason}"):
        publish.check_access(tmp_path / name, None, TOKEN)
