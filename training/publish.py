"""Upload the result of a run to the Hugging Face hub, with a model card."""

import logging
from pathlib import Path

from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, upload_folder


logger = logging.getLogger(__name__)


def push_to_hub(
    output_dir: Path,
    repo_id: str | None,
    token: str | None,
    base_model: str,
    usage: str,
    prompts: list[str],
    tags: list[str],
) -> None:
    """Upload `output_dir`, without checkpoints and caches, to the hub.

    Args:
        repo_id: `owner/name`; None for the folder's name under the token's owner.
        token: None for the one of `hf auth login`.
        usage: code that loads the result, for the card.
        prompts: of the validation videos, for the card.
        tags: that tell the task and the method, for the card.
    """
    repo_id = create_repo(repo_id or output_dir.resolve().name, token=token, exist_ok=True).repo_id
    samples = "".join(f"- {prompt}\n" for prompt in prompts)
    card = load_or_create_model_card(
        repo_id_or_path=repo_id,
        from_training=True,
        license="other",
        base_model=None if Path(base_model).exists() else base_model,  # the hub takes no local paths here
        model_description=f"# {repo_id}\n\nFine-tuned from {base_model} with CogVideoX Factory.\n\n"
        f"```python\n{usage}\n```\n\nValidation prompts:\n\n{samples}",
        inference=True,
    )
    populate_model_card(card, tags=[*tags, "diffusers-training", "diffusers", "cogvideox"])
    card.save(output_dir / "README.md")
    upload_folder(
        repo_id=repo_id,
        folder_path=output_dir,
        token=token,
        commit_message="Upload the fine-tuned weights",
        # Trackers record the command line, and with it a token given there.
        ignore_patterns=["checkpoint-*", "prompt_embeds/*", "pipeline/*", ".*", "*wandb/*"],
    )
    logger.info("uploaded to %s", repo_id)
