"""Promises of prompt and answer files: every line is named when it is wrong, and a stopped run goes on where it was."""

import errno
import json

import pytest

from qlora_cli.core.generation.batch_file import AnswerFile, FilePrompt, read_prompts
from qlora_cli.errors import DataError, DiskFull, RunError

PROMPTS = [FilePrompt(i, f"question {i}", None) for i in range(4)]


def test_every_form_of_a_prompt_is_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "d"}]
    lines = [
        "a",
        {"prompt": "b"},
        {"messages": chat},
        {"question": "e", "context": "f"},
        {"prompt": "g", "adapter": "x"},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    found = read_prompts(path)
    assert [(p.index, p.prompt, p.adapter) for p in found] == [
        (0, "a", None),
        (1, "b", None),
        (2, chat, None),
        (3, {"question": "e", "context": "f"}, None),
        (4, "g", "x"),
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no prompts"),
        (b'"a"\n{"prompt": ', "line 2: truncated JSON"),
        (b"7", "line 1 holds no prompt"),
        (b'{"prompt": ""}\n', "line 1 holds no prompt"),
        (b'{"prompt": "a", "adapter": 3}', "line 1: its adapter"),
        (b'"\xff"', "line 1: invalid JSON"),
        (b"[" * 100_000, "line 1: JSON nested too deeply"),
        (b'"' + b"a" * (16 * 2**20 + 1) + b'"', "longer than"),
    ],
)
def test_a_bad_file_is_described_in_one_sentence(tmp_path, content, complaint):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        read_prompts(path)


def test_a_missing_file_and_a_directory_are_reported(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path)


def test_a_stopped_file_goes_on_and_ends_in_order(tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    with AnswerFile(path, PROMPTS, "s") as answers:
        answers.write(2, {"answer": "two"})
        answers.write(0, {"answer": "zéro"})
    whole = path.read_bytes()
    for cut in (0, *range(whole.index(b"\n") + 1, len(whole) + 1)):  # stopped after any byte behind the first line
        path.write_bytes(whole[:cut])
        with AnswerFile(path, PROMPTS, "s") as answers:
            assert answers.finished == {
                index for index, end in ((2, whole.index(b"\n") + 1), (0, len(whole))) if cut >= end
            }
            for index in set(range(4)) - answers.finished:
                answers.write(index, {"answer": str(index)})
            answers.put_in_order()
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [entry.name for entry in path.parent.iterdir()] == ["answers.jsonl"]


def test_answers_to_something_else_are_not_mixed(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, PROMPTS, "s") as answers:
        answers.write(1, {"answer": "a"})
    before = path.read_bytes()
    changed = [*PROMPTS[:1], FilePrompt(1, "another", None), *PROMPTS[2:]]
    for prompts, settings, what in (
        (changed, "s", "another prompt"),
        (PROMPTS, "t", "other settings"),
        (PROMPTS[:1], "s", "no answer"),
    ):
        with pytest.raises(RunError, match=what):
            AnswerFile(path, prompts, settings)
    for notes, match in (("my notes\n", "line 1"), ('{"important": true}', "something else"), ("\n", "line 1")):
        path.write_text(notes)
        with pytest.raises(RunError, match=match):
            AnswerFile(path, PROMPTS, "s")
        assert path.read_text() == notes
    path.write_bytes(before)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, PROMPTS, "s") as answers:
        answers.write(0, {"answer": "a"})
        whole = path.read_bytes()

        class FullDisk:
            def __init__(self, stream):
                self.stream = stream
                self.room = 7

            def write(self, data):
                if not self.room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                written, self.room = self.stream.write(data[: self.room]), 0
                return written

            def __getattr__(self, name):
                return getattr(self.stream, name)

        answers._stream = FullDisk(answers._stream)
        with pytest.raises(DiskFull):
            answers.write(1, {"answer": "b"})
    assert path.read_bytes() == whole


def test_two_writers_of_one_file_never_mix(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, PROMPTS, "s") as answers:
        answers.write(0, {"answer": "a"})
        with pytest.raises(RunError, match="is writing to"):
            AnswerFile(path, PROMPTS, "s")
        answers.write(1, {"answer": "b"})
        answers.put_in_order()
    assert len(path.read_text().splitlines()) == 2 and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_answers_of_other_weights_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    old, new = ({prompt.adapter: (digest, 0.0) for prompt in PROMPTS} for digest in ("old", "new"))
    with AnswerFile(path, PROMPTS, "s", old) as answers:
        answers.write(0, {"answer": "a"})
    with AnswerFile(path, PROMPTS, "s", old) as answers:
        assert answers.finished == {0}
    with pytest.raises(RunError, match="line 1 was answered by other weights"):
        AnswerFile(path, PROMPTS, "s", new)
    path.write_text(path.read_text().replace(', "made_by": "old"', ""))  # of a version that did not say
    with AnswerFile(path, PROMPTS, "s", new) as answers:
        assert answers.finished == {0}
    later = {name: ("new", path.stat().st_mtime + 1) for name in new}
    with pytest.raises(RunError, match="by other weights"):
        AnswerFile(path, PROMPTS, "s", later)
