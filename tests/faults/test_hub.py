"""A hub that drops, truncates, stalls and refuses: downloads are tried again, or end in one clear sentence."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from qlora_cli.core.models import hub as module
from qlora_cli.core.storage import disk_space
from qlora_cli.errors import QloraError
from qlora_cli.sizes import format_bytes
from tests.hub import PROJECT

from .conftest import Outcome, count
from .hub_server import Hub

ATTEMPTS = 5


@pytest.fixture
def download(hub, zygote, tmp_path) -> Callable[..., Outcome]:
    """Resolves org/model into an empty cache while the hub has a fault."""

    def run(fault: str, times: int = 10**9, only: str = "") -> Outcome:
        hub[0].fault, hub[0].times, hub[0].only = fault, times, only
        hub[0].requests.clear()
        arguments = {"model": "org/model", "cache": str(tmp_path / "cache"), "patience": 3 if fault == "stall" else 60}
        outcome = zygote.run("tests.faults.victims:download", **arguments)
        assert "hf_secret" not in outcome.said
        return outcome

    return run


def whole(cache: Path, served: Path) -> bool:
    """Whether every file that matters is there, byte for byte."""
    found = {path.name: path.read_bytes() for path in cache.glob("models--org--model/snapshots/*/*")}
    wanted = ("config.json", "model.safetensors", "tokenizer.json")
    return all(found.get(name) == (served / name).read_bytes() for name in wanted)


@pytest.mark.parametrize("fault", ["drop", "truncate", "damage", "status:500", "status:503", "status:429", "stall"])
def test_a_fault_that_passes_is_outlasted(download, hub, tmp_path, fault):
    done = download(fault, times=1 if fault == "stall" else 2, only="model.safetensors")
    good = done.code == 0 and whole(tmp_path / "cache", hub[0].directory)
    count("hub that drops, truncates, stalls, fails, then recovers", downloads=1, failed=int(not good))
    assert good, done.said


@pytest.mark.parametrize("fault", ["drop", "truncate", "damage", "status:500"])
def test_a_fault_that_stays_ends_in_one_sentence_and_no_half_file(download, hub, tmp_path, fault):
    done = download(fault, only="model.safetensors")
    assert done.code == 1 and f"could not be downloaded after {ATTEMPTS} attempts" in done.said, done.said
    assert "Traceback" not in done.said
    assert not list((tmp_path / "cache").glob("models--org--model/snapshots/*/model.safetensors"))
    again = download("")
    assert again.code == 0 and whole(tmp_path / "cache", hub[0].directory)


@pytest.mark.parametrize(
    ("fault", "only", "sentence"),
    [
        ("status:403:GatedRepo", "", "is gated"),
        ("status:401:RepoNotFound", "", "no model org/model on the hub, or it is private"),
        ("status:404:RepoNotFound", "", "no model org/model on the hub, or it is private"),
        ("status:404:RevisionNotFound", "", "has no revision"),
        ("status:403", "model.safetensors", "refuses the model"),
    ],
)  # fmt: skip
def test_a_refusal_is_said_at_once(download, hub, fault, only, sentence):
    done = download(fault, only=only)
    count("hub that refuses: gated, missing, unauthorised", refusals=1, not_said=int(sentence not in done.said))
    assert done.code == 1 and sentence in done.said and "Traceback" not in done.said, done.said
    assert "attempts" not in done.said


def test_a_hub_out_of_reach_is_said_and_what_is_cached_still_works(download, hub, tmp_path):
    for fault in ("drop", "status:503"):
        unreachable = download(fault)
        assert unreachable.code == 1 and "could not be downloaded" in unreachable.said, unreachable.said
    assert download("").code == 0
    cached = download("status:503")
    assert cached.code == 0 and whole(tmp_path / "cache", hub[0].directory), cached.said


@pytest.mark.parametrize(
    ("number", "free_bytes", "code", "said"),
    [
        (errno.EROFS, 10**9, 1, "cannot be written: Read-only file system"),
        (errno.EACCES, 10**9, 1, "cannot be written: Permission denied"),
        (errno.ENOSPC, 10**9, 74, "The disk is full"),
        (0, 99_999, 74, "97.7 KiB are needed for"),
    ],
)  # fmt: skip
def test_a_cache_that_takes_no_download_is_said_at_once_with_where_else_it_may_go(
    monkeypatch, tmp_path, number, free_bytes, code, said
):
    asked = []

    def download(*arguments: Any, **keywords: Any) -> str:
        asked.append(arguments)
        raise OSError(number, os.strerror(number))

    begun = tmp_path / "models--org--model" / "blobs" / "a.incomplete"  # which is there, and needs no room
    begun.parent.mkdir(parents=True)
    begun.write_bytes(bytes(100))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_list_files", lambda *_: ("c" * 40, {"model.safetensors": 100_100}))
    monkeypatch.setattr(module, "snapshot_download", download)
    monkeypatch.setattr(disk_space, "free_disk_bytes", lambda path: free_bytes)
    with pytest.raises(QloraError, match=said) as caught:
        module.download_snapshot("org/model", None, ["*"], kind="model", report=lambda event: None)
    assert len(asked) == (1 if number else 0) and str(tmp_path) in caught.value.message
    assert "export HF_HUB_CACHE=" in (caught.value.hint or "") and caught.value.exit_code == code


@contextmanager
def black_hole() -> Iterator[int]:
    """A port of the loopback at which nothing arrives: its queue of connections is full, and more are dropped."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(listener.getsockname())
        yield listener.getsockname()[1]


def test_an_address_that_swallows_everything_is_said_after_one_wait(tmp_path):
    script = """
import json, sys
from qlora_cli.core.models import hub
from qlora_cli.core.models.hub import READ_FILES, download_snapshot
def report(event):
    print(json.dumps([patience_seconds, event.text]))
    sys.exit(0)
patience_seconds, hub.ANSWER_SECONDS = hub.ANSWER_SECONDS, 0.5  # nothing comes, however long it is waited for
download_snapshot("org/model", None, READ_FILES, kind="model", report=report)
"""
    with black_hole() as port:
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        environment = {**os.environ, **environment, "PYTHONPATH": str(PROJECT)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    patience_seconds, said = json.loads(done.stdout)
    assert said.startswith("The hub does not answer") and "attempt 2 of 5 for org/model follows" in said
    assert patience_seconds <= 10


def test_a_download_is_announced_and_its_bytes_are_counted_to_the_end(download, hub, tmp_path):
    events = [line for line in download("").said.splitlines() if "Downloading org/model" in line]
    notices = [line for line in events if line.startswith("Notice")]
    tokenizer, weights = (sum(path.stat().st_size for path in hub[0].directory.glob(p)) for p in ("*.json", "*.saf*"))
    assert "files" in notices[0] and f" {format_bytes(tokenizer)}." in notices[0], notices
    assert f"model.safetensors, {format_bytes(weights)}." in notices[1] and len(notices) == 2, notices
    for total_bytes in (tokenizer, weights):
        done = [int(n) for n in re.findall(rf"done=(\d+), total={total_bytes}, unit='bytes'", "\n".join(events))]
        assert done == sorted(done) and done[-1] == total_bytes and len(done) > 1, events
    again = download("")
    assert again.code == 0 and "Downloading" not in again.said


def test_a_download_that_was_broken_off_is_no_model_while_the_hub_is_out_of_reach(download, hub, tmp_path):
    assert download("").code == 0
    (snapshot,) = (tmp_path / "cache").glob("models--org--model/snapshots/*")
    lost = next(path for path in snapshot.iterdir() if path.name.startswith("tokenizer"))
    lost.resolve().unlink()
    lost.unlink()
    refused = download("status:503")
    assert refused.code == 1 and lost.name in refused.said, refused.said  # by the library or, offline, by us
    assert download("").code == 0 and download("status:503").code == 0


def test_a_model_s_code_and_further_chat_templates_come_along_and_no_other_folder(download, hub, tmp_path, monkeypatch):
    shutil.copytree(hub[0].directory, tmp_path / "served")
    monkeypatch.setattr(hub[0], "directory", tmp_path / "served")
    kept = ["modeling_own.py", "chat_template.json", "additional_chat_templates/tool_use.jinja"]
    left = ["awq/model.safetensors", "additional/config.json", "onnx/modeling_own.py"]
    for name in kept + left:
        (tmp_path / "served" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "served" / name).write_text("{}")
    done = download("")
    assert done.code == 0, done.said
    (snapshot,) = (tmp_path / "cache").glob("models--org--model/snapshots/*")
    assert [name for name in kept + left if (snapshot / name).exists()] == kept


def test_what_is_here_already_is_said(download, hub, tmp_path):
    assert download("").code == 0
    lost = next((tmp_path / "cache").glob("models--org--model/snapshots/*/config.json"))
    lost_bytes = lost.stat().st_size
    lost.resolve().unlink()
    lost.unlink()
    said = download("").said
    total_bytes = sum(path.stat().st_size for path in hub[0].directory.glob("*.json"))
    assert (
        f"{format_bytes(total_bytes)}, of which {format_bytes(total_bytes - lost_bytes)} are here already." in said
    ), said


def looked_up(hub: Hub) -> dict[str, int]:
    """How often each file was asked for, by method and name; and how often the API about the model."""
    counts: dict[str, int] = {}
    for request in hub.requests:
        method, _, path = request.partition(" ")
        if "/resolve/" in path or "/api/models/" in path:  # the library asks for /api/agent-harnesses by itself
            what = f"{method} {path.rsplit('/', 1)[-1]}" if "/resolve/" in path else "api"
            counts[what] = counts.get(what, 0) + 1
    hub.requests.clear()
    return counts


def test_train_and_generate_look_each_hub_file_up_once(hub, zygote, tmp_path):
    """A HEAD and a GET of each file that is not here, and of none that is; a dry run asks for no weights."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"Row {i} of a few."}) + "\n" for i in range(8)))
    train = {"model": "org/model", "data": str(data), "max_steps": 1, "batch_size": 2}
    names = {path.name for path in hub[0].directory.iterdir()}
    hub[0].fault = ""
    hub[0].requests.clear()

    def run(function: str, cache: str, **options: Any) -> dict[str, int]:
        done = zygote.run(f"tests.faults.victims:{function}", options=options, cache=str(tmp_path / cache))
        assert done.code == 0, done.said
        return looked_up(hub[0])

    dry = run("train_from_hub", "dry", **train, output=str(tmp_path / "dry-out"), dry_run=True)
    assert {name.split()[1] for name in dry if name != "api"} == names - {"model.safetensors"}
    for function, options in (
        ("train_from_hub", {**train, "output": str(tmp_path / "out")}),
        ("generate_from_hub", {"model": "org/model"}),
    ):
        cold = run(function, function, **options)
        api = cold.pop("api")
        assert {name.split()[1] for name in cold} == names
        assert set(cold.values()) == {1}, cold
        options = {**options, "overwrite": True} if "output" in options else options
        warm = run(function, function, **options)
        assert warm == {"api": 2}, warm  # the commit of the name, and of that commit which weights there are
        assert api <= 6, api  # the library asks too before it downloads


def test_a_run_trains_on_a_base_that_came_in_pieces_and_says_where_from(hub, zygote, tmp_path):
    """The card names the hub's base; nothing else of this machine, nor the token, is in any file of the run."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"Row {i} of a few."}) + "\n" for i in range(8)))
    output = tmp_path / "out"
    hub[0].fault, hub[0].times, hub[0].only = "truncate", 2, "model.safetensors"
    options = {"model": "org/model", "data": str(data), "output": str(output), "max_steps": 2, "batch_size": 2}
    done = zygote.run("tests.faults.victims:train_from_hub", options=options, cache=str(tmp_path / "cache"))
    assert done.code == 0, done.said
    assert "base_model: org/model" in (output / "README.md").read_text()
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/model"
    for path in output.rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path
    assert str(tmp_path) not in (output / "README.md").read_text()
