"""What a finished run uploads: the card that a stranger reads, the weights, and nothing private.

The two calls that would reach the hub are replaced by ones that note their arguments.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

import publish


TOKEN = "hf_a_secret"
PROMPTS = ["a red circle moves over a blue background", "a {{ curly }} square: 50% & more"]
USAGE = 'pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b")\npipe.load_lora_weights("owner/circles")'


@pytest.fixture
def hub(monkeypatch) -> dict[str, dict]:
    """The arguments of the calls to the hub, by the function's name."""
    calls: dict[str, dict] = {}

    def create_repo(repo_id, **options):
        calls["create_repo"] = {"repo_id": repo_id, **options}
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"owner/{repo_id}")

    def upload_folder(**options):
        calls["upload_folder"] = options

    monkeypatch.setattr(publish, "create_repo", create_repo)
    monkeypatch.setattr(publish, "upload_folder", upload_folder)
    return calls


def push(folder: Path, repo_id: str | None = "owner/circles", base_model: str = "THUDM/CogVideoX-5b") -> str:
    """Push a run's folder; returns the card's text."""
    publish.push_to_hub(folder, repo_id, TOKEN, base_model, USAGE, PROMPTS, ["text-to-video", "lora"])
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_names_the_base_model_where_the_hub_looks_for_it(hub, tmp_path):
    push(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "THUDM/CogVideoX-5b"
    assert {"text-to-video", "lora", "cogvideox"} <= set(card.data.tags)


def test_the_card_holds_the_code_that_loads_the_result(hub, tmp_path):
    assert f"```python\n{USAGE}\n```" in push(tmp_path)


def test_the_card_lists_every_validation_prompt_as_it_was_given(hub, tmp_path):
    card = push(tmp_path)
    assert all(f"- {prompt}\n" in card for prompt in PROMPTS)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, tmp_path):
    card = push(tmp_path)
    assert hub["create_repo"]["token"] == hub["upload_folder"]["token"] == TOKEN
    assert TOKEN not in card
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_checkpoints_caches_and_partial_files_stay_at_home(hub, tmp_path):
    push(tmp_path)
    published = ["README.md", "pytorch_lora_weights.safetensors", "validation/step-2/00-00-a-circle.mp4"]
    private = [
        "checkpoint-4/optimizer.bin",
        "checkpoint-4/pytorch_lora_weights.safetensors",
        "prompt_embeds/0123.safetensors",
        ".partial.checkpoint-5/optimizer.bin",
        ".123.partial.pytorch_lora_weights.safetensors",
    ]
    ignored = hub["upload_folder"]["ignore_patterns"]
    # The library's own filter says what the patterns mean.
    assert list(filter_repo_objects([*published, *private], ignore_patterns=ignored)) == published


def test_what_wandb_records_stays_at_home(hub, tmp_path):
    """It keeps the command line, and with it a --hub_token, beside the machine's name and folders."""
    push(tmp_path)
    records = ["logs/wandb/offline-run-1/run-1.wandb", "logs/wandb/offline-run-1/files/wandb-metadata.json"]
    assert list(filter_repo_objects(records, ignore_patterns=hub["upload_folder"]["ignore_patterns"])) == []


def test_the_folder_is_uploaded_to_the_repository_that_was_made(hub, tmp_path):
    push(tmp_path)
    assert hub["create_repo"]["repo_id"] == hub["upload_folder"]["repo_id"] == "owner/circles"
    assert hub["create_repo"]["exist_ok"]
    assert Path(hub["upload_folder"]["folder_path"]) == tmp_path


def test_without_a_name_the_repository_is_called_after_the_folder(hub, tmp_path, monkeypatch):
    folder = tmp_path / "my-lora"
    folder.mkdir()
    monkeypatch.chdir(folder)
    push(Path("."), repo_id=None)
    assert hub["create_repo"]["repo_id"] == "my-lora"
    assert hub["upload_folder"]["repo_id"] == "owner/my-lora"


def test_a_local_base_model_is_not_given_as_a_hub_id(hub, tmp_path):
    """The hub refuses a card whose base_model is a path, and so the whole upload."""
    model = tmp_path / "models" / "my-cogvideox"
    model.mkdir(parents=True)
    push(tmp_path, base_model=str(model))
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None
