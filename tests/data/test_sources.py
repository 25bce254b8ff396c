"""What --data may name: files, globs, folders, saved datasets, and hub datasets from the local cache alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_cli.core.data import sources
from qlora_cli.core.data.data_sets import read_data_sets
from qlora_cli.core.data.sources import resolve_source
from qlora_cli.core.reading.chunks import parse_chunk
from qlora_cli.errors import DataError, ModelError, UsageError
from qlora_cli.settings.groups import DataSettings

QUOTE = {"quote": "Be yourself; everyone else is already taken.", "author": "Oscar Wilde", "tags": ["be-yourself"]}


def resolve(data, split="train", revision=None):
    return resolve_source(str(data), DataSettings(split=split, revision=revision), lambda event: None)


def rows(source):
    found = []
    for chunk in source.chunks(2**20):
        parse_chunk(chunk, 2**20)
        assert not chunk.bad_rows
        found += chunk.records
    return found


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(source):
    return [row["text"] for row in rows(source)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(repository, {file: content})`: lays a dataset down in a hub cache of its own, as a download would."""
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"

    def lay_down(repository, content):
        folder = tmp_path / "hub" / f"datasets--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        for name, text in content.items():
            path = folder / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(text, bytes):
                path.write_bytes(text)
            else:
                path.write_text(text)
        return commit

    return lay_down


def test_a_file_a_glob_and_a_folder(tmp_path, monkeypatch):
    write(tmp_path / "data" / "b.jsonl", "b")
    write(tmp_path / "data" / "a.jsonl", "a")
    write(tmp_path / "data" / "deep" / "c.jsonl", "c")
    (tmp_path / "data" / "README.md").write_text("# About")
    (tmp_path / "data" / ".cache").mkdir()
    write(tmp_path / "data" / ".cache" / "hidden.jsonl", "hidden")
    write(tmp_path / ".cache" / "a.jsonl", "kept")
    assert texts(resolve(tmp_path / "data" / "b.jsonl")) == ["b"]
    assert texts(resolve(tmp_path / "data")) == ["a", "b", "c"]
    assert texts(resolve(tmp_path / "data" / "*.jsonl")) == ["a", "b"]
    monkeypatch.chdir(tmp_path)
    assert texts(resolve("data/**/*.jsonl")) == ["a", "b", "c"]
    assert texts(resolve(".cache/*.jsonl")) == ["kept"]
    assert texts(resolve(tmp_path / ".cache")) == ["kept"]
    assert texts(resolve("data/[ab].jsonl")) == ["a", "b"]


def test_a_local_path_wins_over_a_hub_name(tmp_path, monkeypatch, hub):
    hub("org/name", {"train.jsonl": json.dumps({"text": "from the hub"})})
    assert texts(resolve("org/name")) == ["from the hub"]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "org" / "name" / "rows.jsonl", "from here")
    assert texts(resolve("org/name")) == ["from here"]


def test_a_folder_with_splits_gives_the_one_asked_for(tmp_path):
    write(tmp_path / "train-00000.jsonl", "a")
    write(tmp_path / "my_train_2.jsonl", "b")
    write(tmp_path / "dev" / "rows.jsonl", "c")
    assert texts(resolve(tmp_path)) == ["b", "a"]
    assert texts(resolve(tmp_path, split="validation")) == ["c"]
    with pytest.raises(UsageError, match="no split 'test'; it has ") as error:
        resolve(tmp_path, split="test")
    assert "--split " in error.value.hint


def test_the_readme_of_a_folder_names_configurations(tmp_path):
    write(tmp_path / "easy" / "x.jsonl", "easy")
    write(tmp_path / "hard" / "x.jsonl", "hard")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: hard/*.jsonl\n---\n"
    )
    assert texts(resolve(tmp_path)) == ["hard"]


@pytest.mark.parametrize("together", [True, False])
def test_a_saved_dataset(tmp_path, together):
    import datasets

    datasets.disable_progress_bars()
    train = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}, {"text": "c"}])
    if together:
        datasets.DatasetDict(train=train, test=train.select([0])).save_to_disk(tmp_path / "saved")
        assert texts(resolve(tmp_path / "saved", split="test")) == ["a"]
        with pytest.raises(UsageError, match="no split 'validation'; it has train, test"):
            resolve(tmp_path / "saved", split="validation")
    else:
        train.filter(lambda row: row["text"] != "b").save_to_disk(tmp_path / "saved")
    source = resolve(tmp_path / "saved")
    assert texts(source) == (["a", "b", "c"] if together else ["a", "c"])
    assert source.identify(lambda event: None)["files"]
    (tmp_path / "saved" / ("dataset_dict.json" if together else "state.json")).write_text("{")
    with pytest.raises(DataError, match=r"saved dataset .* cannot be read"):
        resolve(tmp_path / "saved")


def test_a_hub_dataset_needs_the_local_cache_only(hub):
    commit = hub(
        "Abirate/english_quotes", {"quotes.jsonl": json.dumps(QUOTE) + "\n", "README.md": "---\nlicense: mit\n---\n"}
    )
    source = resolve("Abirate/english_quotes")
    assert rows(source) == [QUOTE]
    assert source.facts == {"split": "train", "revision": commit}
    assert [name for _, name in source.files] == ["Abirate/english_quotes/quotes.jsonl"]
    assert rows(resolve("Abirate/english_quotes", revision=commit)) == [QUOTE]


def test_a_hub_dataset_in_parquet_with_splits(hub, tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "b.parquet")
    hub(
        "org/set",
        {
            "data/train-00000-of-00001.parquet": (tmp_path / "a.parquet").read_bytes(),
            "data/test-00000-of-00001.parquet": (tmp_path / "b.parquet").read_bytes(),
        },
    )
    assert texts(resolve("org/set")) == ["a"]
    assert texts(resolve("org/set", split="test")) == ["b"]
    with pytest.raises(UsageError, match="org/set has no split 'dev'; it has train, test"):
        resolve("org/set", split="dev")


CONFIGS = """---
configs:
- config_name: easy
  data_files: easy.jsonl
- config_name: hard
  data_files:
  - split: train
    path: hard/*.csv
---
"""


def test_a_hub_dataset_with_configurations(hub):
    hub("org/set", {"easy.jsonl": '{"text": "a"}', "hard/x.csv": "text\nb\n", "README.md": CONFIGS})
    assert texts(resolve("org/set:easy")) == ["a"]
    assert texts(resolve("org/set:hard")) == ["b"]
    with pytest.raises(UsageError, match="has several configurations: easy, hard") as error:
        resolve("org/set")
    assert error.value.hint == "Choose: --data org/set:easy"
    with pytest.raises(UsageError, match="'medium' not found") as error:
        resolve("org/set:medium")
    assert error.value.hint == "Choose: --data org/set:easy"


def test_a_hub_dataset_that_only_datasets_can_read(hub):
    readme = "---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  sep: '|'\n---\n"
    hub("org/set", {"rows.csv": "text|n\na|1\nb|2\n", "README.md": readme})
    source = resolve("org/set")
    assert source.table is not None
    assert texts(source) == ["a", "b"]


def test_a_hub_dataset_with_nothing_to_read(hub):
    hub("org/script", {"script.py": "import datasets", "README.md": "# x"})
    with pytest.raises(DataError, match="org/script holds no data that can be read") as error:
        resolve("org/script")
    assert "give --data a path" in error.value.hint


def test_a_hub_dataset_that_is_not_there(hub):
    hub("org/set", {"rows.jsonl": "{}"})
    with pytest.raises(DataError, match="org/other is not in the local hub cache and HF_HUB_OFFLINE is set") as error:
        resolve("org/other")
    assert "--data a local path" in error.value.hint
    with pytest.raises(DataError, match="org/set is not in the local hub cache"):
        resolve("org/set", revision="v2")


@pytest.mark.parametrize("message", ["Access to the dataset org/set is gated and this account has not been let in."])
def test_what_stops_a_download_is_reported_in_one_sentence(monkeypatch, message):
    def refuse(*_, **__):
        raise ModelError(message, "Ask for access on its hub page.")

    monkeypatch.setattr(sources, "download_snapshot", refuse)
    with pytest.raises(DataError) as error:
        resolve("org/set")
    assert error.value.message == message
    assert error.value.hint == "Ask for access on its hub page. A local path works too."


def test_online_only_the_files_of_the_split_are_downloaded(monkeypatch, tmp_path):
    """The hub is played by a folder; what is asked of it is the point."""
    from types import SimpleNamespace

    import datasets

    asked = []
    remote = {"train": ["hf://datasets/org/set@abc/data/train.jsonl"], "test": ["hf://datasets/org/set@abc/t.jsonl"]}
    real = datasets.load_dataset_builder

    def builder(path, *arguments, **keywords):
        if path == "org/set":
            return SimpleNamespace(config=SimpleNamespace(data_files=remote))
        return real(path, *arguments, **keywords)

    def download(repository, revision, patterns, *, kind, report):
        asked.append((repository, revision, patterns, kind))
        write(tmp_path / "data" / "train.jsonl", "a")
        return tmp_path

    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(sources, "download_snapshot", download)
    assert texts(resolve("org/set", revision="v1")) == ["a"]
    assert asked == [("org/set", "v1", ["README.md", "data/train.jsonl"], "dataset")]


def test_a_hub_dataset_that_the_disk_has_no_room_for_is_read_as_it_comes_with_a_limit(monkeypatch, tmp_path):
    """The hub is played by a folder that datasets streams."""
    import datasets

    write(tmp_path / "train.jsonl", "a", "b")
    said, asked = [], []
    real = datasets.load_dataset

    def load(path, config, *, split, revision, streaming):
        asked.append((path, config, split, revision, streaming))
        return real("json", data_files=str(tmp_path / "train.jsonl"), split=split, streaming=True)

    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "_remote_files", lambda *_: ["*"])
    monkeypatch.setattr(sources, "missing_bytes", lambda *_, **__: ("abc", 2**60))
    monkeypatch.setattr(sources, "download_snapshot", lambda *_, **__: pytest.fail("it was downloaded"))
    monkeypatch.setattr(datasets, "load_dataset", load)

    def resolve(name, limit=5):
        return resolve_source(name, DataSettings(limit=limit), said.append)

    source = resolve("org/set:part")
    assert texts(source) == ["a", "b"]
    assert asked == [("org/set", "part", "train", "abc", True)]
    assert "the first 5 rows are read from the hub as they come" in said[0].text
    assert source.identify(print)["sha256"] != resolve("org/other").identify(print)["sha256"]
    with pytest.raises(pytest.fail.Exception, match="it was downloaded"):
        resolve("org/set", limit=None)


def test_a_hub_dataset_may_be_named_like_a_file(tmp_path, monkeypatch):
    def download(repository, *_, **__):
        assert repository == "org/docs.jsonl"
        write(tmp_path / "train.jsonl", "a")
        return tmp_path

    monkeypatch.setattr(sources, "download_snapshot", download)
    assert texts(resolve("org/docs.jsonl")) == ["a"]
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)  # org/ is here now, so that a file is meant
    with pytest.raises(DataError, match=r"There is no file or folder org/docs\.jsonl"):
        resolve("org/docs.jsonl")


@pytest.mark.parametrize(
    "data", ["absent.jsonl", "no/such/folder/rows.jsonl", "./absent", "/absent", "a b c", "x/*.jsonl"]
)
def test_what_is_not_there_is_reported(data):
    with pytest.raises(DataError, match=r"There is no file or folder|No file matches"):
        resolve(data)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "paper.pdf").write_bytes(b"%PDF")
    with pytest.raises(UsageError, match=r"paper\.pdf is not known by its name") as error:
        resolve(tmp_path / "paper.pdf")
    assert ".jsonl" in error.value.hint
    with pytest.raises(DataError, match="holds no data files"):
        resolve(tmp_path)


def test_the_identity_is_of_the_content(tmp_path):
    def identity(path):
        return resolve(path).identify(lambda event: None)["sha256"]

    first, second = write(tmp_path / "a.jsonl", "a"), write(tmp_path / "b" / "c.jsonl", "a")
    assert identity(first) == identity(second)
    os.utime(first, (0, 0))
    assert identity(first) == identity(second)
    write(first, "other")
    assert identity(first) != identity(second)


def test_the_tokenising_processes_load_no_heavy_library():
    code = "import sys, qlora_cli.core.data.tokenize; print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    root = str(Path(__file__).resolve().parents[2])
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout.strip() == "[]"


def test_what_is_no_share_behind_a_file_is_no_name_of_a_hub_dataset(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    for share in ("abc", "50%", "0,3", "-0.5", ""):
        with pytest.raises(UsageError, match=f"is a file, and '{share}' is no share of its rows"):
            read_data_sets(f"{path}:{share}")
    odd = tmp_path / "rows.jsonl:odd"
    odd.write_text('{"text": "a"}\n')
    assert read_data_sets(str(odd))[0].name == str(odd)
