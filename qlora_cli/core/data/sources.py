"""Data sources: the files or tables that --data names by path, glob, saved dataset or hub dataset."""

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from qlora_cli.artifacts import describe_place, is_prepared, sha256_of
from qlora_cli.core.models.hub import download_snapshot, missing_bytes
from qlora_cli.core.reading.arrow_reader import chunks_of
from qlora_cli.core.reading.chunks import RECORDS_A_CHUNK, Chunk
from qlora_cli.core.reading.compressed import DECOMPRESS
from qlora_cli.core.reading.json_reader import SPLITS
from qlora_cli.core.reading.readers import CHUNK_BYTES, KINDS, kind_of, read_chunks
from qlora_cli.core.storage.disk_space import free_disk_bytes
from qlora_cli.errors import DataError, ModelError, UsageError, first_line
from qlora_cli.events import Caution, Notice, Progress, Report
from qlora_cli.settings.groups import DataSettings
from qlora_cli.settings.ranges import HUB_ID, or_of_the_hub, way_from_address
from qlora_cli.settings.setting import is_given
from qlora_cli.sizes import format_bytes

METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of datasets and others
ABOUT = ("README", "LICENSE")  # files that tell of the others
READABLE = ", ".join([*KINDS, *DECOMPRESS])


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        name: As the user gave it.
        files: Files that `readers` reads, each with the name shown in messages.
        table: A saved dataset, or a hub dataset in a format that only `datasets` reads.
        hashed: Files whose content is the identity of the data.
        facts: split, revision and configuration, where there are any.
    """

    name: str
    files: tuple[tuple[Path, str], ...] = ()
    table: Any = None
    hashed: tuple[Path, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int | None:
        """Size of the files, or None where that says nothing about progress."""
        return sum(path.stat().st_size for path, _ in self.files) if self.files else None

    def chunks(self, max_line_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
        """All rows in order; see `read_chunks`."""
        for path, name in self.files:
            yield from read_chunks(path, name, max_line_bytes, chunk_bytes)
        if self.table is not None:
            yield from self._table_chunks(max_line_bytes)

    def _table_chunks(self, max_line_bytes: int) -> Iterator[Chunk]:
        line = 1
        try:
            for batch in self.table.with_format("arrow").iter(RECORDS_A_CHUNK):
                for chunk in chunks_of(batch, self.name, line, max_line_bytes):
                    line += len(chunk.records) + len(chunk.bad_rows)
                    yield chunk
        except Exception as error:  # datasets' readers fail in every way
            yield Chunk(self.name).fail(line, f"cannot be read: {error}")

    def stamps(self) -> list[tuple[int, int, int]]:
        """Inode, size and time of change of the files: other ones mean other content."""
        found = [path.stat() for path in self.hashed if path.exists()]
        return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in found]

    def check_unchanged(self, stamps: list[tuple[int, int, int]]) -> None:
        """Raises DataError if a file was changed since `stamps` were taken: rows of it would go by the former content's name."""
        if self.stamps() != stamps:
            raise DataError(f"{self.name} was changed while it was read.", "Run the command again once it is finished.")

    def identify(self, report: Report) -> dict[str, Any]:
        """Name, split and SHA-256 of the data."""
        sizes = [path.stat().st_size for path in self.hashed]
        files, done = [], 0
        for path, size in zip(self.hashed, sizes, strict=True):
            files.append({"name": path.name, "bytes": size, "sha256": sha256_of(path)})
            done += size
            if sum(sizes) > 2**30:
                report(Progress("Checking the data", done, sum(sizes), "bytes"))
        # How a file is read depends on its kind, so the same bytes under .txt and .jsonl are two inputs.
        facts: list[Any] = [(kind_of(path), file["sha256"]) for path, file in zip(self.hashed, files, strict=True)]
        if not facts:  # read from the hub as it comes: the commit says what it is
            facts = [self.name, sorted(self.facts.items())]
        sha256 = hashlib.sha256(repr(facts).encode()).hexdigest()
        return {"source": self.name, **self.facts, "files": files, "sha256": sha256}


def require_data(data: str) -> None:
    """Checks that a --data is a file, a folder, a pattern, or may be a hub dataset, which is not asked for here.

    Raises:
        DataError: It is none.
    """
    path = Path(data).expanduser()
    if is_prepared(path):
        found, way = describe_place(path) or ("", "")
        raise DataError(f"{data} is no data to prepare: {found}.", way)
    if path.is_file() or path.is_dir():
        return
    if path.is_symlink():
        raise DataError(f"{data} is a link that leads nowhere.", "Mend the link, or give --data the file itself.")
    if path.exists():
        raise DataError(f"{data} is a pipe or a device, whose rows cannot be read twice.", "Write them to a file.")
    if _is_pattern(data):
        if not _matching_files(path):
            raise DataError(f"No file matches {data}.", "Check --data.")
        return
    # Some datasets are named like a file (ORG/docs.jsonl); in a folder that is here a file is meant, though.
    like_file = kind_of(path) is not None and ("/" not in data or path.parent.is_dir())
    name, colon, configuration = data.partition(":")
    if not HUB_ID.fullmatch(name) or (colon and not re.fullmatch(r"[\w.-]+", configuration)) or like_file:
        raise DataError(f"There is no file or folder {data}.", way_from_address("--data", data, "Check --data."))


def _is_pattern(data: str) -> bool:
    return any(letter in data for letter in "*?[")


def _matching_files(pattern: Path) -> list[Path]:
    found = Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
    return sorted(file for file in found if file.is_file() and not _is_hidden(file, pattern))


def resolve_source(data: str, settings: DataSettings, report: Report) -> Source:
    """Finds what one --data names; a local path wins over a hub dataset of the same name.

    A hub dataset is downloaded, or read from the hub as it comes where the disk has no room for it and a limit of rows is given.

    Raises:
        DataError: Nothing is there, or it cannot be reached.
        UsageError: The file's kind is unknown, or there is no such split or configuration.
    """
    require_data(data)
    path = Path(data).expanduser()
    if path.is_file():
        return _files_source(data, [path])
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved_source(data, path, settings.split)
        return _folder_source(data, path, settings.split, report)
    if _is_pattern(data):
        return _files_source(data, _matching_files(path))
    return _hub_source(data, settings, report)


def ignored_settings(settings: DataSettings, sources: Sequence[Source]) -> list[str]:
    """That --split or --revision does nothing where none of the sources has such, as sentences."""
    given = [option for option in fields(DataSettings) if option.name in ("split", "revision")]
    return [
        f"--{option.name} {getattr(settings, option.name)} does nothing: {listed} has no {option.name}s."
        for option in given
        if is_given(option, settings) and not any(option.name in source.facts for source in sources)
        for listed in [" and ".join(source.name for source in sources)]
    ]


def _files_source(data: str, files: list[Path], **facts: str) -> Source:
    unknown = [file for file in files if kind_of(file) is None]
    if unknown:
        raise UsageError(f"The kind of {unknown[0]} is not known by its name.", f"These are read: {READABLE}.")
    names = [str(file) for file in files]
    return Source(data, tuple(zip(files, names, strict=True)), hashed=tuple(files), facts=facts)


def _saved_source(data: str, folder: Path, split: str) -> Source:
    import datasets  # here, as in the functions below: a second, and a file of the user's needs none of it

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow's, json's and the file system's errors
        raise DataError(f"The saved dataset {data} cannot be read: {error}.", "Save it again.") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise _no_split(data, split, table)
        table, folder = table[split], folder / split
    hashed = tuple(sorted(folder.glob("*.arrow")))
    return Source(data, table=table, hashed=hashed, facts={"split": split})


def _no_split(data: str, split: str, splits: Iterable[Any]) -> UsageError:
    names = [str(name) for name in splits]
    return UsageError(f"{data} has no split {split!r}; it has {', '.join(names)}.", f"Choose: --split {names[0]}")


def _folder_source(data: str, folder: Path, split: str, report: Report) -> Source:
    readme = folder / "README.md"
    if readme.is_file() and re.search(r"^configs:", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        return _dataset_folder(data, folder, None, split, {"split": split})
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _is_hidden(file, folder)]
    files = [file for file in found if kind_of(file) and file.name not in METADATA]
    if not files:
        raise DataError(f"{data} holds no data files.", f"These are read: {READABLE}{or_of_the_hub(data)}.")
    about = [file for file in files if file.stem.upper() in ABOUT and kind_of(file) == "txt"]
    if about and any(kind_of(file) != "txt" for file in files):  # among texts they may be meant
        files = [file for file in files if file not in about]
        report(Caution(f"{data}: left out, as by their names they tell of the data: {_listed(about, folder)}."))
    if unread := [file for file in found if not kind_of(file) and file.stem.upper() not in ABOUT]:
        report(Caution(f"{data}: left out, as their kind is not known by their names: {_listed(unread, folder)}."))
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if set(by_split) == {""}:
        return _files_source(data, files)
    if split not in by_split:
        raise _no_split(data, split, filter(None, by_split))
    if unnamed := by_split.get(""):
        report(
            Caution(
                f"{data}: {len(by_split[split])} of {len(files)} files are named after the split {split!r}, the others are "
                f"left out: {_listed(unnamed, folder)}. Give --data a glob, such as '{data}/*', to take them all."
            )
        )
    return _files_source(data, by_split[split], split=split)


def _listed(files: list[Path], folder: Path) -> str:
    return ", ".join(str(file.relative_to(folder)) for file in files[:5]) + ", ..." * (len(files) > 5)


def _is_hidden(file: Path, asked: Path) -> bool:
    """Whether a file lies under a dotted name that the user did not write."""
    return any(part.startswith(".") and part not in asked.parts for part in file.parts)


def _split_of(path: Path) -> str:
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((split for split, names in SPLITS.items() if words & set(names)), "")


def _hub_source(data: str, settings: DataSettings, report: Report) -> Source:
    repository, _, config = data.partition(":")
    split, revision, limit = settings.split, settings.revision, settings.limit
    try:
        patterns = _remote_files(repository, config or None, split, revision)
        if limit is not None and not constants.HF_HUB_OFFLINE:
            needed = missing_bytes(repository, revision, patterns, kind="dataset")
            free_bytes = free_disk_bytes(Path(constants.HF_HUB_CACHE))
            if needed is not None and needed[1] > free_bytes:
                sizes = f"{format_bytes(needed[1])} to download, and the disk has {format_bytes(free_bytes)} free"
                report(Notice(f"{data} has {sizes}: the first {limit:,} rows are read from the hub as they come."))
                return _streamed_source(data, repository, config or None, split, needed[0])
        folder = download_snapshot(repository, revision, patterns, kind="dataset", report=report)
    except ModelError as error:
        hint = error.hint if "HF_HUB_OFFLINE" in error.message else f"{error.hint or ''} A local path works too."
        raise DataError(error.message, hint.strip() if hint else None) from error
    facts = {"split": split, "revision": folder.name}
    return _dataset_folder(data, folder, config or None, split, facts)


def _streamed_source(data: str, repository: str, config: str | None, split: str, commit: str) -> Source:
    import datasets

    try:
        table = datasets.load_dataset(repository, config, split=split, revision=commit, streaming=True)
    except Exception as error:  # datasets' readers and the hub's answers fail in every way
        raise DataError(f"{data} cannot be read from the hub: {first_line(error)}", "Check --split.") from error
    return Source(data, table=table, facts={"split": split, "revision": commit})


def _remote_files(repository: str, config: str | None, split: str, revision: str | None) -> list[str]:
    """Files of one split on the hub, so that not the whole repository is downloaded; all where that is not known."""
    if constants.HF_HUB_OFFLINE:
        return ["*"]
    import datasets

    try:
        builder = datasets.load_dataset_builder(repository, config, revision=revision)
        files = builder.config.data_files[split]
        return ["README.md", *(name.split("@", 1)[1].split("/", 1)[1] for name in files)]
    except Exception:  # whatever it is, the download that follows says it in one sentence
        return ["*"]


def _dataset_folder(data: str, folder: Path, config: str | None, split: str, facts: dict[str, str]) -> Source:
    """A folder in the hub's layout: configurations and splits by its README, or by file names."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            builder = datasets.load_dataset_builder(str(folder), config, cache_dir=cache)
        except ValueError as error:  # no such configuration, or several to choose from
            available = re.findall(r"'([^']+)'", str(error).partition("vailable")[2])
            raise UsageError(
                f"{data} has several configurations: {', '.join(available)}."
                if config is None and available
                else f"{data}: {first_line(error)}",
                f"Choose: --data {data.partition(':')[0]}:{available[0]}" if available else None,
            ) from error
        except Exception as error:  # no data files, a loading script, a faulty README
            raise DataError(
                f"{data} holds no data that can be read: {first_line(error)}",
                f"Download its files and give --data a path; these are read: {READABLE}.",
            ) from error
    settings: Any = builder.config
    splits = settings.data_files or {}
    if split not in splits:
        raise _no_split(data, split, splits)
    paths = [Path(name) for name in splits[split]]
    is_plain = getattr(settings, "sep", ",") in (",", "\t") and getattr(settings, "field", None) is None
    if is_plain and all(kind_of(path) for path in paths):
        names = [f"{data}/{path.relative_to(folder)}" for path in paths]
        return Source(data, tuple(zip(paths, names, strict=True)), hashed=tuple(paths), facts=facts)
    table = datasets.load_dataset(str(folder), config, split=split, streaming=True)
    return Source(data, table=table, hashed=tuple(paths), facts=facts)
