"""Upload the result of a run to the Hugging Face hub with a model card; check before training that this will work."""

import logging
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, upload_folder, whoami
from huggingface_hub.utils import validate_repo_id

from common.errors import UserError, one_line
from common.hub_token import HubToken
from common.run_folder import CONFIG_FILE, FACTS_FILE, NOTES_FILE, REPORT_FILE, TARGETS_FOLDER
from planning.describe import HELD_OUT_FILE, SKIPPED_FILE
from results.model_card import CardFacts, write_card


logger = logging.getLogger(__name__)

# Trackers and profiles record the machine's name and folders; the flags, the run's page and the lists of clips name
# folders, and the page shows training clips.
PRIVATE = ("checkpoint-*", "prompt_embeds/*", "pipeline/*", ".*", "*wandb/*", "*_run_id")
PRIVATE += ("*events.out.tfevents.*", "*hparams.yml", CONFIG_FILE, "config-step-*.yaml", "profile/*")
PRIVATE += (SKIPPED_FILE, HELD_OUT_FILE, FACTS_FILE, NOTES_FILE, REPORT_FILE, f"{TARGETS_FOLDER}/*")
PRIVATE += ("validation/*.safetensors", "validation/*/transformer/*")  # diffusers finds the only LoRA of a repository


def check_access(output_dir: Path, repo_id: str | None, token: HubToken | None) -> None:
    """Check that the upload at the end will be allowed, without creating anything; arguments as of `push_to_hub`."""
    name = repo_id or output_dir.resolve().name
    try:
        validate_repo_id(name)
        who = whoami(token=_value(token))
    except Exception as error:  # the errors depend on the HTTP library of the hub's client
        reason = re.split(r"(?<!\.)\. ", one_line(error))[0]  # the first sentence
        raise UserError(
            f"--push_to_hub: the upload to {name!r} would fail: {reason}; log in with `hf auth login`, pass a valid "
            "--hub_token and --hub_model_id, or omit --push_to_hub and upload later"
        ) from error
    if problem := _refusal(who, name):
        raise UserError(f"--push_to_hub: {problem}; pass a token with write access, or another --hub_model_id")


def _refusal(who: Mapping[str, Any], repo_id: str) -> str | None:
    """Return why a token cannot write to a repository, from the hub's answer on the token; None if it can."""
    owner = repo_id.partition("/")[0] if "/" in repo_id else who["name"]
    organizations = {one["name"]: one.get("roleInOrg") for one in who.get("orgs", [])}
    access = who.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        return f"the token of {who['name']} is read-only"
    scopes = access.get("fineGrained", {}).get("scoped", []) if access.get("role") == "fineGrained" else None
    if scopes is not None and not any("repo.write" in scope.get("permissions", []) for scope in scopes):
        return f"the token of {who['name']} cannot write to repositories"
    if owner != who["name"] and owner not in organizations:
        return f"{who['name']} is not a member of {owner}"
    if organizations.get(owner) == "read":
        return f"{who['name']} has read-only access to {owner}"
    return None


def _value(token: HubToken | None) -> str | None:
    return None if token is None else token.value


def push_to_hub(output_dir: Path, repo_id: str | None, token: HubToken | None, facts: CardFacts) -> None:
    """Upload `output_dir`, without checkpoints and caches, to the hub; if that fails, log how to do it later.

    Args:
        repo_id: `owner/name`, or a name under the token's owner; None for the folder's name.
        token: None for the one of `hf auth login` or HF_TOKEN.
        facts: for the card, which replaces an existing one.
    """
    wanted = repo_id or output_dir.resolve().name
    try:
        made = create_repo(wanted, token=_value(token), exist_ok=True).repo_id
        write_card(output_dir, made, facts)
        upload_folder(
            repo_id=made,
            folder_path=output_dir,
            token=_value(token),
            commit_message="Upload the fine-tuned weights",
            ignore_patterns=list(PRIVATE),
        )
    except Exception as error:  # the result is on disk: a failed upload must not end the run with a traceback
        problem = f"{type(error).__name__}: {one_line(error, 300)}"
        message = "error: the result was not uploaded (%s); it is complete in %s. Upload it later:\n%s"
        logger.error(message, problem, output_dir, shlex.join(upload_command(wanted, output_dir)))
    else:
        logger.info("uploaded to %s", made)


def upload_command(repo_id: str, output_dir: Path) -> list[str]:
    """Return the words of the command that uploads the result in a run's folder."""
    excluded = (word for pattern in PRIVATE for word in ("--exclude", pattern))
    return ["hf", "upload", repo_id, str(output_dir), ".", *excluded]
