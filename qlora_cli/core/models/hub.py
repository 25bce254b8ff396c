"""Model and data set files on the Hugging Face hub or in a directory: which are needed, and their download."""

import os
import re
import time
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download

from qlora_cli.artifacts import MERGE_RECORD
from qlora_cli.errors import ModelError, first_line
from qlora_cli.events import Notice, Report

DOWNLOAD_ATTEMPTS = 5
CONFIG_FILES = ["config.json", "generation_config.json", MERGE_RECORD]
TOKENIZER_FILES = [
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
]
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]


def resolve_model(
    model: str, revision: str | None = None, *, weights: bool = True, report: Report | None = None
) -> Path:
    """The local directory of a model, downloading what is missing.

    Args:
        model: Directory or hub id.
        revision: Commit, branch or tag of a hub model.
        weights: Whether the safetensors files are needed, or the configuration and tokenizer only.
        report: Told when a download is about to happen.

    Raises:
        ModelError: It is not there, gated, unauthorised, out of reach, or has no safetensors weights.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelError(f"{model} is a directory without config.json.", "Give --model a transformers checkpoint.")
        if weights:
            _require_safetensors(directory, model)
        return directory
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith((".", "/", "~")):
        raise ModelError(f"No model directory at {model}.", "Check the path, or give a hub id such as org/name.")
    patterns = CONFIG_FILES + TOKENIZER_FILES + (WEIGHT_FILES if weights else [])
    directory = download_snapshot(model, revision, patterns, kind="model", report=report)
    if not (directory / "config.json").is_file():
        raise ModelError(f"{model} has no config.json.", "Give --model a transformers model.")
    if weights:
        _require_safetensors(directory, model)
    return directory


def download_snapshot(
    repository: str, revision: str | None, patterns: list[str], *, kind: str, report: Report | None = None
) -> Path:
    """A snapshot of a hub repository in the local cache, retried when the network fails.

    Args:
        repository: Hub id.
        revision: Commit, branch or tag.
        patterns: File names wanted, at the top of the repository for models.
        kind: "model" or "dataset".
        report: Told when the network is used.

    Raises:
        ModelError: One sentence on what stands in the way.
    """
    flag = "--model" if kind == "model" else "--data"
    ignore = ["consolidated*", "*/*"] if kind == "model" else None

    def fetch(local: bool) -> Path:
        return Path(
            snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=ignore,
                local_files_only=local,
            )
        )

    if hub_constants.HF_HUB_OFFLINE:
        try:
            return fetch(local=True)
        except (hub_errors.LocalEntryNotFoundError, hub_errors.RevisionNotFoundError) as error:
            raise ModelError(
                f"The {kind} {repository} is not in the local hub cache and HF_HUB_OFFLINE is set.",
                f"Unset HF_HUB_OFFLINE to download it, or give {flag} a local path.",
            ) from error
    pause_seconds = float(os.environ.get("QLORA_RETRY_SECONDS", "2"))
    for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
        try:
            return fetch(local=False)
        except hub_errors.GatedRepoError as error:
            raise ModelError(
                f"Access to the {kind} {repository} is gated and this account has not been let in.",
                f"Ask for access on its hub page, then run: hf auth login, and the command again ({error.__class__.__name__}).",
            ) from error
        except hub_errors.RepositoryNotFoundError as error:
            raise ModelError(
                f"There is no {kind} {repository} on the hub, or it is private.",
                "Check the spelling, give a local path, or run: hf auth login",
            ) from error
        except hub_errors.RevisionNotFoundError as error:
            raise ModelError(
                f"The {kind} {repository} has no revision {revision}.", "Check the revision's name."
            ) from error
        except hub_errors.HFValidationError as error:
            raise ModelError(f"{repository} is neither a local path nor a hub id.", f"Check {flag}.") from error
        except (hub_errors.LocalEntryNotFoundError, hub_errors.HTTPError, OSError) as error:
            # A refused file comes as "not in the cache", caused by the refusal.
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            status = getattr(response, "status_code", None)
            if status in (401, 403):
                raise ModelError(
                    f"The hub refuses the {kind} {repository} to this account (HTTP {status}).", "Run: hf auth login"
                ) from error
            if attempt == DOWNLOAD_ATTEMPTS:
                raise ModelError(
                    f"The {kind} {repository} could not be downloaded after {attempt} attempts: {_reason(error)}",
                    "Check the connection and run the command again: finished files are kept.",
                ) from error
            if report:
                report(Notice(f"Download of {repository} failed ({_reason(error)}); attempt {attempt + 1} follows."))
            time.sleep(pause_seconds * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _reason(error: Exception) -> str:
    """An exception's first line, without the query of any URL in it (tokens travel there)."""
    return re.sub(r"\?\S*", "", first_line(error))[:200]


def _require_safetensors(directory: Path, model: str) -> None:
    if any(directory.glob("*.safetensors")):
        return
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise ModelError(
            f"{model} holds pickle weights only, which can run code when they are read.",
            "Give --model a revision with safetensors files, or convert it once in a place you trust.",
        )
    raise ModelError(f"{model} holds no safetensors weights.", "Check the directory, or download the model again.")


def commit_of(directory: Path) -> str | None:
    """The commit hash when the directory is a snapshot in the hub cache."""
    name = directory.resolve().name if directory.parent.name != "snapshots" else directory.name
    return name if directory.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", name) else None
