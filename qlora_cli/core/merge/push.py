"""Upload of a merged model to the hub, private unless asked otherwise."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from qlora_cli.artifacts import MARK
from qlora_cli.errors import MergeError, UsageError
from qlora_cli.settings.ranges import HUB_ID


def check_upload(repository: str) -> None:
    """Raises UsageError unless it is ORG/NAME, and the hub may be asked."""
    if "/" not in repository or not HUB_ID.fullmatch(repository):
        raise UsageError(f"--push {repository} is no repository name.", "Write it as ORG/NAME.")
    if hub_constants.HF_HUB_OFFLINE:
        raise UsageError("--push uploads, and HF_HUB_OFFLINE is set.", "Unset HF_HUB_OFFLINE, or leave --push out.")


def push_model(directory: Path, repository: str, *, public: bool, api: HfApi | None = None) -> str:
    """Uploads a model directory in one commit, making the repository if need be.

    Args:
        public: Whether everyone may see it; a repository that exists keeps what it is, and is not uploaded to when it
            is public and this is False.
        api: The hub; by default the one HF_ENDPOINT names, with the token of `hf auth login`.

    Returns:
        The repository's address.

    Raises:
        MergeError: The hub refuses, cannot be reached, or the repository is public and that was not asked for.
    """
    api = api or HfApi()
    upload = f"{shlex.quote(str(directory))} --exclude {MARK}"
    upload += "" if public else " --private"  # else it makes a repository that everyone may see
    complete = f"The model is complete in {directory}; upload it later with: hf upload"
    again = f"{complete} {repository} {upload}"
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise MergeError(
                f"{repository} exists already and is public; nothing was uploaded.",
                f"Add --public, or name another repository. {complete} ORG/NAME {upload}",
            )
        api.upload_folder(
            repo_id=repository, folder_path=directory, commit_message="Upload merged model", ignore_patterns=[MARK]
        )
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        hint = "Run: hf auth login (with a token that may write)." if status in (401, 403) else "Try again later."
        raise MergeError(f"The hub refused {repository} (HTTP {status}).", f"{hint} {again}") from error
    except MergeError:
        raise
    except Exception as error:  # no token, offline, or an error of the HTTP library, which differs between versions
        reason = type(error).__name__
        raise MergeError(f"{repository} could not be uploaded ({reason}).", f"Run: hf auth login. {again}") from error
    return str(address)
