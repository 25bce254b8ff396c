"""Downloads from the Hugging Face hub into its local cache: announced, with their progress in bytes, and retried."""

import json
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects
from tqdm.auto import tqdm

from qlora_cli.artifacts import (
    ADAPTER_CONFIG,
    MERGE_RECORD,
    TEMPLATES,
    TOKENIZER_FILES,
    cache_root,
    describe_place,
    find_near,
    write_json,
)
from qlora_cli.core.storage.content_digest import content_digests, was_written_since
from qlora_cli.core.storage.disk_space import describe_place_refused, is_closed_or_full, require_space
from qlora_cli.core.storage.temporaries import heal, sweep
from qlora_cli.errors import ModelError, first_line
from qlora_cli.events import Caution, Notice, Progress, Report, report_nothing
from qlora_cli.settings.ranges import HUB_ID, or_of_the_hub, way_from_address
from qlora_cli.sizes import format_bytes

CONFIG_FILES = ["config.json", "generation_config.json", MERGE_RECORD]
OLD_CHAT_TEMPLATE = "chat_template.json"  # of processors alone
# Of images and sound, which a merged checkpoint keeps.
PROCESSOR_FILES = ["*processor_config.json", OLD_CHAT_TEMPLATE]
CODE_FILES = ["*.py"]  # of a model that comes with its code: run where that was asked for, kept in a merged checkpoint
READ_FILES = CONFIG_FILES + TOKENIZER_FILES + PROCESSOR_FILES + CODE_FILES
# Every folder but that one, as patterns that know no "but": by the first letter in which a name differs, and shorter names.
OTHER_FOLDERS = [f"{TEMPLATES[:end]}[!{TEMPLATES[end]}]*/*" for end in range(len(TEMPLATES))]
OTHER_FOLDERS += [f"{TEMPLATES[:end]}/*" for end in range(len(TEMPLATES))]
BLOB = re.compile("[0-9a-f]{64}")  # how the hub's cache calls a large file: by its SHA-256
ANOTHER_CACHE = "Have downloads kept where there is room: export HF_HUB_CACHE=/another/directory"  # the token stays
ATTEMPTS = 5
ANSWER_SECONDS = 5.0  # that the hub has to answer a question, so that it is said within ten where it cannot be reached
FIRST_PAUSE_SECONDS = 2.0  # doubled after each further failure
# What asking again does not mend: the library's error → what is wrong, and what to do. The first that fits counts.
REFUSALS: tuple[tuple[type[Exception], str, str], ...] = (
    (
        hub_errors.GatedRepoError,
        "Access to the {kind} {repository} is gated and this account has not been let in.",
        "Ask for access on its hub page, then run: hf auth login, and the command again.",
    ),
    (
        hub_errors.RepositoryNotFoundError,
        "There is no {kind} {repository} on the hub, or it is private.",
        "Check the spelling, give a local path, or run: hf auth login",
    ),
    (
        hub_errors.RevisionNotFoundError,
        "The {kind} {repository} has no revision {revision}.",
        "Check the revision's name.",
    ),
    (hub_errors.HFValidationError, "{repository} is neither a local path nor a hub id.", "Check {flag}."),
)


_early: dict[tuple[str, str | None, tuple[str, ...]], "Future[Path]"] = {}  # look-ups that were begun ahead


def find_directory(model: str) -> Path | None:
    """The directory that --model names; None for a hub id.

    Raises:
        ModelError: It is neither, or the directory holds no model.
    """
    directory = Path(model).expanduser()
    heal(directory)
    if (directory / "config.json").is_file():
        if (directory / ADAPTER_CONFIG).is_file() and not any(directory.glob("model*.safetensors")):
            found, way = describe_place(directory) or ("", "")
            raise ModelError(f"{model} is no model: {found}.", way)
        return directory
    near = find_near(directory, "config.json")
    meant = f"Type: --model {shlex.quote(str(near))}" if near else None
    if not directory.is_dir():
        if directory.is_file():
            raise ModelError(f"{model} is a file.", meant or "Give --model the directory of a transformers checkpoint.")
        if directory.is_symlink():
            raise ModelError(
                f"{model} is a link that leads nowhere.", "Mend the link, or give --model the directory itself."
            )
        if not HUB_ID.fullmatch(model):
            way = way_from_address("--model", model, "Check the path, or give a hub id such as org/name.")
            raise ModelError(f"No model directory at {model}.", way)
        return None
    otherwise = f"Give --model a transformers checkpoint{or_of_the_hub(model)}."
    found, way = describe_place(directory) or ("", meant or otherwise)
    if not found and any(directory.glob("*.gguf")):
        found, way = (
            "it holds GGUF, which is not trained on",
            "Give --model the 16-bit checkpoint that it was made from.",
        )
    raise ModelError(f"{model} is a directory without config.json{found and ': '}{found}.", way)


def look_up_early(model: str, revision: str | None, report: Report) -> None:
    """Begins to fetch a hub model's configuration and tokenizer in a thread, while libraries are imported.

    `download_snapshot` of the same files waits for it, and raises what it raised. Of a directory nothing is done.

    Raises:
        ModelError: As `find_directory`.
    """
    if find_directory(model) is not None or hub_constants.HF_HUB_OFFLINE:
        return
    future: Future[Path] = Future()
    _early[model, revision, tuple(READ_FILES)] = future

    def fetch() -> None:
        try:
            future.set_result(_fetch_snapshot(model, revision, READ_FILES, kind="model", report=report))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=fetch, name="hub", daemon=True).start()


def download_snapshot(repository: str, revision: str | None, patterns: list[str], *, kind: str, report: Report) -> Path:
    """A snapshot of a hub repository in the local cache, named after its commit; missing files are downloaded.

    huggingface_hub itself tries again when a connection breaks, and goes on where it was; a server's 5xx ends its
    download (http_get of 1.3 and 2.4 retries 429 alone), hence the attempts here.

    Args:
        repository: Hub id.
        revision: Commit, branch or tag.
        patterns: File names wanted, for models at the top of the repository, but for chat templates.
        kind: "model" or "dataset".
        report: Receives what is downloaded, its progress, and failed attempts.

    Raises:
        ModelError: It is not there, gated, unauthorised or out of reach.
    """
    begun = _early.pop((repository, revision, tuple(patterns)), None) if kind == "model" else None
    if begun is not None:
        return begun.result()
    return _fetch_snapshot(repository, revision, patterns, kind=kind, report=report)


def _fetch_snapshot(repository: str, revision: str | None, patterns: list[str], *, kind: str, report: Report) -> Path:
    words = {"kind": kind, "repository": repository, "revision": revision}
    words["flag"] = "--model" if kind == "model" else "--data"
    wanted: dict[str, Any] = {
        "repo_type": kind,
        "allow_patterns": patterns,
        "ignore_patterns": ["consolidated*", *OTHER_FOLDERS] if kind == "model" else None,
    }
    if hub_constants.HF_HUB_OFFLINE:
        try:
            found = Path(snapshot_download(repository, revision=revision, local_files_only=True, **wanted))
        except (hub_errors.LocalEntryNotFoundError, hub_errors.RevisionNotFoundError) as error:
            raise ModelError(
                f"The {kind} {repository} is not in the local hub cache and HF_HUB_OFFLINE is set.",
                "Unset HF_HUB_OFFLINE to download it, or give {flag} a local path.".format(**words),
            ) from error
        return _require_whole(found, repository, wanted)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _download(repository, revision, wanted, report, announced=attempt > 1)
        except (hub_errors.HFValidationError, hub_errors.HTTPError, OSError) as error:
            for refusal, message, hint in REFUSALS:
                if isinstance(error, refusal):
                    raise ModelError(message.format(**words), hint.format(**words)) from error
            # A refused file comes as "not in the cache", caused by the refusal.
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            status = getattr(response, "status_code", None)
            if status in (401, 403):
                raise ModelError(
                    f"The hub refuses the {kind} {repository} to this account (HTTP {status}).", "Run: hf auth login"
                ) from error
            if is_closed_or_full(error):  # asking again would download all of it again, to the same end
                raise describe_place_refused(error, Path(hub_constants.HF_HUB_CACHE), ANOTHER_CACHE) from error
            reason = _reason(error)
            if attempt == ATTEMPTS:
                raise ModelError(
                    f"The {kind} {repository} could not be downloaded after {attempt} attempts: {reason}",
                    "Check the connection and run the command again: finished files are kept. If it is a directory, name it "
                    f"as it lies from here: {Path.cwd()} has none of that name.",
                ) from error
            silent = isinstance(error, hub_errors.HTTPError) and response is None
            what = "The hub does not answer" if silent else f"Download of {repository} failed"
            report(Notice(f"{what} ({reason}); attempt {attempt + 1} of {ATTEMPTS} for {repository} follows."))
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _download(
    repository: str, revision: str | None, wanted: dict[str, Any], report: Report, *, announced: bool
) -> Path:
    """One attempt: downloads what the cache lacks, if anything."""
    try:
        commit, sizes = _list_files(repository, revision, wanted)
    except (hub_errors.HTTPError, OSError) as error:
        if getattr(error, "response", None) is None:  # no answer at all: asking once more would take as long again
            return _take_cached(repository, revision, wanted, report, error)
        # snapshot_download falls back to the cache, or says what is wrong
        found = Path(snapshot_download(repository, revision=revision, **wanted))
        return _require_whole(found, repository, wanted)
    _keep_listing(repository, wanted["repo_type"], commit, sizes)
    where = {"revision": commit, "repo_type": wanted["repo_type"]}
    missing = [name for name in sizes if not isinstance(try_to_load_from_cache(repository, name, **where), str)]
    if sizes and not missing:
        return Path(snapshot_download(repository, revision=commit, local_files_only=True, **wanted))
    total_bytes = sum(sizes.values())
    cached_bytes = total_bytes - sum(sizes[name] for name in missing)
    task = f"Downloading {repository}"
    if not announced and missing:
        files = f"{len(sizes)} files" if len(sizes) > 1 else missing[0]
        here = f", of which {format_bytes(cached_bytes)} are here already" if cached_bytes else ""
        report(Notice(f"{task}: {files}, {format_bytes(total_bytes)}{here}."))
    folder = Path(hub_constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type=wanted["repo_type"]))
    begun_bytes = sum(path.stat().st_size for path in folder.glob("blobs/*.incomplete"))
    require_space(folder, total_bytes - cached_bytes - begun_bytes, ANOTHER_CACHE)

    def progress(arrived_bytes: int) -> None:
        report(Progress(task, min(cached_bytes + arrived_bytes, total_bytes - 1), total_bytes, "bytes"))

    directory = Path(snapshot_download(repository, revision=revision, tqdm_class=byte_counter(progress), **wanted))
    _verify_blobs(directory, missing)
    report(Progress(task, total_bytes, total_bytes, "bytes"))
    return directory


def missing_bytes(repository: str, revision: str | None, patterns: list[str], *, kind: str) -> tuple[str, int] | None:
    """The commit of a hub repository, and the bytes of these files that the local cache lacks; None if the hub does not say."""
    wanted = {"repo_type": kind, "allow_patterns": patterns, "ignore_patterns": None}
    try:
        commit, sizes = _list_files(repository, revision, wanted)
    except (hub_errors.HTTPError, OSError):
        return None
    where = {"revision": commit, "repo_type": kind}
    return commit, sum(
        size for name, size in sizes.items() if not isinstance(try_to_load_from_cache(repository, name, **where), str)
    )


def _verify_blobs(directory: Path, names: list[str]) -> None:
    """Compares what arrived with the SHA-256 that the hub's cache names large files by: the library compares sizes.

    Raises:
        OSError: A file is another one; it is removed, so that the next attempt downloads it.
    """
    arrived = [(directory / name, (directory / name).resolve()) for name in names]
    named = [(link, blob) for link, blob in arrived if BLOB.fullmatch(blob.name)]
    found = content_digests([blob for _, blob in named], report_nothing)
    damaged = [paths for paths, digest in zip(named, found, strict=True) if digest != paths[1].name]
    for path in {path for paths in damaged for path in paths}:
        path.unlink()
    if damaged:
        raise OSError(f"{len(damaged)} of {len(names)} files arrived damaged.")


def check_blobs(paths: Sequence[Path], repository: str, report: Report, *, all_of_them: bool = False) -> None:
    """Compares files in the hub's cache with the SHA-256 that it names large ones by.

    Args:
        paths: The files, or links to them.
        repository: Hub id.
        report: Receives the progress.
        all_of_them: Those too of which nothing says that they were written to since they arrived: they may have been
            fetched by others, and are read once.

    Raises:
        ModelError: One is not what arrived.
    """
    blobs = [blob for blob in (path.resolve() for path in paths) if BLOB.fullmatch(blob.name)]
    wanted = [blob for blob in blobs if all_of_them or was_written_since(blob)]
    for blob, digest in zip(wanted, content_digests(wanted, report), strict=True):
        if digest != blob.name:
            raise ModelError(
                f"A file of {repository} in the hub's cache was changed or damaged since it was downloaded: {blob}",
                "Remove that file and run the command again: it is downloaded anew.",
            )


def _take_cached(
    repository: str, revision: str | None, wanted: dict[str, Any], report: Report, error: Exception
) -> Path:
    """The snapshot in the cache, where the hub does not answer.

    Raises:
        Exception: `error`, where there is none.
    """
    try:
        found = Path(snapshot_download(repository, revision=revision, local_files_only=True, **wanted))
    except (hub_errors.HTTPError, OSError):
        raise error from None
    directory = _require_whole(found, repository, wanted)
    report(Caution(f"The hub cannot be reached ({_reason(error)}): {repository} is taken from the cache."))
    return directory


def _reason(error: Exception) -> str:
    """An error's first line without the query of any URL in it: tokens travel there."""
    return re.sub(r"\?\S*", "", first_line(error))


def _list_files(repository: str, revision: str | None, wanted: dict[str, Any]) -> tuple[str, dict[str, int]]:
    """The commit of a revision, and the wanted files with their bytes; one request."""
    info = HfApi().repo_info(
        repository,
        repo_type=wanted["repo_type"],
        revision=revision,
        files_metadata=True,
        timeout=ANSWER_SECONDS,
    )
    sizes = {file.rfilename: file.size or 0 for file in getattr(info, "siblings", None) or ()}
    return str(info.sha), {name: sizes[name] for name in _wanted_of(sizes, wanted)}


def _wanted_of(names: Iterable[str], wanted: dict[str, Any]) -> list[str]:
    return list(
        filter_repo_objects(names, allow_patterns=wanted["allow_patterns"], ignore_patterns=wanted["ignore_patterns"])
    )


def _listing_path(repository: str, kind: str, commit: str) -> Path:
    """Where the names and bytes of the files wanted of a commit are kept, so that a broken download is known offline."""
    return cache_root() / "hub" / f"{repo_folder_name(repo_id=repository, repo_type=kind)}@{commit}.json"


def _keep_listing(repository: str, kind: str, commit: str, sizes: dict[str, int]) -> None:
    path = _listing_path(repository, kind, commit)
    with suppress(OSError):  # without it a broken download is only known while the hub is in reach
        known = _read_listing(path)
        if known | sizes != known:
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            write_json(path, known | sizes)


def _read_listing(path: Path) -> dict[str, int]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _require_whole(directory: Path, repository: str, wanted: dict[str, Any]) -> Path:
    """The snapshot that the cache holds where the hub is out of reach, unless a download of it was broken off.

    Raises:
        ModelError: A file of the listing kept when it was begun is missing, or has another size.
    """
    sizes = _read_listing(_listing_path(repository, wanted["repo_type"], directory.name))
    names = _wanted_of(sizes, wanted)
    paths = {name: directory / name for name in names}  # of a size that is 0 the hub has not said it
    here = [name for name, path in paths.items() if path.is_file() and sizes[name] in (0, path.stat().st_size)]
    if lacking := sorted(set(names) - set(here)):
        raise ModelError(
            f"{len(here)} of {len(names)} files of {repository} are in the hub cache, {lacking[0]} is not, and the hub is "
            "out of reach.",
            "Run the command again when it is in reach: finished files are kept.",
        )
    return directory


def byte_counter(on_bytes: Callable[[int], None]) -> type[tqdm]:
    """A progress bar class for huggingface_hub that draws nothing and passes on how many bytes have arrived.

    Several threads move a bar. Since huggingface_hub 2 there are two of bytes, received and written: the farther one
    counts.
    """
    lock, farthest = threading.Lock(), 0

    class ByteCounter(tqdm):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **{**keywords, "disable": True})
            self.counts_bytes = keywords.get("unit") == "B"  # the third bar counts files

        def update(self, n: float | None = 1) -> None:
            nonlocal farthest
            if not self.counts_bytes:
                return
            with lock:
                self.n += n or 0
                if self.n > farthest:
                    farthest = int(self.n)
                    on_bytes(farthest)

    return ByteCounter
