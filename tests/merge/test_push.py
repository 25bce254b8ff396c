"""Uploading to a hub: everything arrives, private unless asked otherwise, refusals in one sentence."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import close_session

from qlora_cli.artifacts import MARK
from qlora_cli.core.merge.push import check_upload, push_model
from qlora_cli.errors import MergeError, UsageError
from tests.commands.merge_case import make_case

TOKEN = "hf_a_token_for_the_stand_in"
COMMIT = "b" * 40


class Hub(ThreadingHTTPServer):
    """A stand-in on the loopback that speaks as much of the hub's HTTP as one commit of small files takes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.visibility: dict[str, bool] = {}  # repository → private
        self.files: dict[str, bytes] = {}
        self.refusal: int | None = None
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Silent."""

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        self.server.requests.append(f"GET {self.path}")
        repository = self.path.removeprefix("/api/models/").partition("?")[0].partition("/revision")[0]
        if repository not in self.server.visibility:
            return self.answer({"error": "no such repository"}, 404)
        private = self.server.visibility[repository]
        return self.answer({"id": repository, "modelId": repository, "sha": COMMIT, "private": private, "siblings": []})

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        body = self.read_body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or self.server.refusal:
            return self.answer({"error": "not allowed"}, self.server.refusal or 401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.server.visibility:
                return self.answer({"error": "exists", "url": f"{self.server.endpoint}/{name}"}, 409)
            private = wanted.get("private", wanted.get("visibility") == "private")
            self.server.visibility[name] = bool(private)
            return self.answer({"url": f"{self.server.endpoint}/{name}"})
        if "/validate-yaml" in self.path:
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            url = f"{self.server.endpoint}/{repository}/commit/{COMMIT}"
            return self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.answer({"error": f"unexpected {self.path}"}, 500)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def api(hub, monkeypatch) -> HfApi:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    close_session()  # its offline mode is fixed when it is made
    yield HfApi(endpoint=hub.endpoint, token=TOKEN)
    monkeypatch.undo()
    close_session()


@pytest.fixture
def model(tmp_path) -> Path:
    directory = tmp_path / "merged"
    directory.mkdir()
    (directory / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return directory


def test_a_model_arrives_whole_in_a_private_repository(hub, api, model) -> None:
    address = push_model(model, "someone/tuned", public=False, api=api)
    assert address == f"{hub.endpoint}/someone/tuned"
    assert hub.visibility == {"someone/tuned": True}
    assert hub.files == {path.name: path.read_bytes() for path in model.iterdir()}


def test_public_is_public_and_again_is_the_same(hub, api, model) -> None:
    push_model(model, "someone/tuned", public=True, api=api)
    assert hub.visibility == {"someone/tuned": False}
    (model / "config.json").write_text('{"a": 1}')
    push_model(model, "someone/tuned", public=True, api=api)
    assert hub.files["config.json"] == b'{"a": 1}'


def test_nothing_goes_to_a_public_repository_unasked(hub, api, model) -> None:
    hub.visibility["someone/tuned"] = False
    with pytest.raises(MergeError, match="exists already and is public; nothing was uploaded") as caught:
        push_model(model, "someone/tuned", public=False, api=api)
    assert "hf upload someone/tuned" not in caught.value.hint
    assert not hub.files


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_way_in_and_no_token(hub, api, model, status) -> None:
    hub.refusal = status
    with pytest.raises(MergeError) as caught:
        push_model(model, "someone/tuned", public=False, api=api)
    assert "hf auth login" in caught.value.hint
    assert f"hf upload someone/tuned {model} " in caught.value.hint  # the merge is not lost
    assert caught.value.hint.endswith(" --private")
    assert TOKEN not in caught.value.message + caught.value.hint


def test_a_hub_out_of_reach_is_one_sentence(model, api, hub) -> None:
    hub.server_close()
    away = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    with pytest.raises(MergeError, match="could not be uploaded"):
        push_model(model, "someone/tuned", public=False, api=away)
    spaced = model.rename(model.with_name("my model"))
    with pytest.raises(MergeError) as caught:
        push_model(spaced, "someone/tuned", public=True, api=away)
    assert caught.value.hint.endswith(f"hf upload someone/tuned '{spaced}' --exclude .qlora.json")


@pytest.mark.parametrize("public", [False, True])
def test_a_merge_pushes_all_it_made(hub, api, tiny_model, tmp_path, monkeypatch, public) -> None:
    case = make_case(tiny_model("llama"), tmp_path, target_modules=["q_proj"])
    monkeypatch.setattr("qlora_cli.core.merge.push.HfApi", lambda: api)
    result = case.merge(push="someone/tuned", public=public)
    assert result.pushed_to == f"{hub.endpoint}/someone/tuned"
    assert hub.visibility == {"someone/tuned": not public}
    assert hub.files == {path.name: path.read_bytes() for path in case.output.iterdir() if path.name != MARK}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)


@pytest.mark.parametrize("name", ["tuned", "a/b/c", "/x", "a b/c", "../x/y", "-a/b", "a--b/c"])
def test_what_is_no_repository_name_is_refused(name) -> None:
    with pytest.raises(UsageError, match="no repository name"):
        check_upload(name)


def test_without_a_hub_nothing_is_merged_to_be_uploaded() -> None:
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):  # as it is in tests
        check_upload("someone/tuned")
