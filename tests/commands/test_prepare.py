"""`prepare`, the stage: from a model's name and data to a directory and rows shown for the eye."""

import json
import shutil
from dataclasses import replace

import pytest

from qlora_cli.commands.prepare import prepare, show_rows
from qlora_cli.config import PrepareConfig
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import Notice, RowShown
from tests.conftest import SHARED_DATA
from tests.prompts.small_tokenizers import byte_level, neox, sentencepiece_like

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"{2 * i}."} for i in range(5)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_rows_are_prepared_for_a_model_and_shown(tiny_model, data, tmp_path):
    events = []
    config = PrepareConfig(model=str(tiny_model("gpt_neox")), data=data, output=str(tmp_path / "out"), show=2)
    summary = prepare(config, events.append)
    assert summary.to_dict()["rows"] == len(PreparedRows(tmp_path / "out")) == 5
    assert summary.manifest["max_length"] == 512  # the model's context
    shown = [event for event in events if isinstance(event, RowShown)]
    assert [row.index for row in shown] == [0, 1]
    assert shown[1].pieces == (
        ("### Question:\nWhat is 1 + 1?\n\n### Answer:\n", False),
        ("2.<|endoftext|>", True),
    )
    assert shown[1].tokens == PreparedRows(tmp_path / "out").lengths[1]
    assert any("question" in event.text and "answer" in event.text for event in events if isinstance(event, Notice))
    assert prepare(config, events.append).cache_hit


def test_a_screen_holds_a_long_row_and_what_became_of_the_data(tiny_model, tmp_path, capsys, monkeypatch):
    from qlora_cli.cli.app import main

    monkeypatch.setenv("COLUMNS", "80")
    turns = [{"role": role, "content": f"{role} says " + "a word or two " * 8} for role in ("user", "assistant")] * 6
    rows = [{"id": "a", "messages": turns}, {"id": "b", "messages": []}, {"id": "c", "messages": turns[:1]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["prepare", "--model", str(tiny_model("gpt_neox")), "--data", str(tmp_path / "rows.jsonl")]
    line += ["--output", str(tmp_path / "out"), "--on-bad-row", "skip", "--show", "1"]
    monkeypatch.chdir(tmp_path)
    assert main(line) == 0
    shown = capsys.readouterr()
    assert sum(1 + max(0, len(text) - 1) // 80 for text in shown.out.splitlines()) <= 24
    for words in (
        "record 1: turns from 'messages'",
        "1 row of 3 records",
        "1 row: no answer",
        "1 bad row",
        "columns 'id'",
    ):
        assert words in shown.out, words
    assert main([*line, "--verbose"]) == 0
    shown = capsys.readouterr().out
    assert "rows sha256" in shown and " letters … " not in shown


def test_each_part_shown_says_which_message_or_column_it_is(tiny_model, tmp_path, capsys):
    from qlora_cli.cli.app import main

    def shown(rows, *more):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = ["prepare", "--model", str(tiny_model("gpt_neox")), "--data", str(tmp_path / "rows.jsonl")]
        assert main([*line, "--output", str(tmp_path / "out"), "--overwrite", "--show", "2", *more]) == 0
        return capsys.readouterr()

    talk = [("system", "Be brief."), ("user", "One?"), ("assistant", "1."), ("user", "Two?"), ("assistant", "2.")]
    messages = [{"role": role, "content": content} for role, content in talk]
    out = shown([{"messages": messages}, {"messages": messages[1:3]}], "--verbose").out
    assert "‹1 system, 2 user› " in out and "⟦‹3 assistant› " in out
    assert "‹4 user› " in out and "⟦‹5 assistant› " in out and "⟦‹2 assistant› " in out
    assert "‹question› " in shown(ROWS).out
    drops_system = tmp_path / "template.jinja"
    drops_system.write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages[2]["reasoning_content"] = "One is first."
    flags = ["--chat-template", str(drops_system), "--on-lost-content", "warn"]
    printed = shown([{"messages": messages[1:3]}], *flags)
    assert "left out by the chat template: " in printed.out and "thought" in printed.out
    assert "thoughts of trained answers (or prints an empty one before them) of 1" in printed.out
    assert "in 1 of 1 conversation" in printed.err
    dropped = shown([{"messages": messages[1:3]}], "--chat-template", str(drops_system), "--thoughts", "drop")
    assert "thoughts of answers (--thoughts drop)" in dropped.out


def test_pieces_shown_lose_no_space(tmp_path):
    """A SentencePiece-like tokenizer drops the first space of whatever it decodes by itself."""
    from qlora_cli.core.data.prepare import prepare_rows

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "the fox", "a": "lazy dog"}))
    config = PrepareConfig(data=str(path), template="{q} is a {a}")
    tokenizer = sentencepiece_like()
    summary = prepare_rows(config, tokenizer, None, tmp_path / "out", lambda event: None)
    events = []
    show_rows(PreparedRows(summary.directory), tokenizer, replace(config, show=3), events.append)
    assert events[0].pieces == (("<s> the fox is a", False), (" lazy dog</s>", True))


def test_a_letter_of_which_a_part_is_trained_is_shown_whole(tmp_path):
    from qlora_cli.core.data.prepare import prepare_rows

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "🙂 fox"}))  # of four tokens, the first of which has nothing before it
    config = PrepareConfig(data=str(path), show=1)
    summary = prepare_rows(config, byte_level(), None, tmp_path / "out", lambda event: None)
    events = []
    show_rows(PreparedRows(summary.directory), byte_level(), config, events.append)
    assert events[0].pieces == (("", False), ("🙂 fox<|im_end|>", True))


def test_a_token_without_an_embedding_is_refused_before_all_is_read(tiny_model, data, tmp_path):
    model = shutil.copytree(tiny_model("gpt_neox"), tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    config = json.loads((model / "config.json").read_text())
    vocabulary = len(json.loads((model / "tokenizer.json").read_text())["model"]["vocab"])
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|fin|>"}))
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": vocabulary}))
    with pytest.raises(ModelError, match="the model has embeddings for"):
        prepare(PrepareConfig(model=str(model), data=data, output=str(tmp_path / "out")), lambda event: None)
    assert not (tmp_path / "out").exists()


def test_gsm8k_is_readable_at_a_glance(tiny_model, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    settings = json.loads((tiny_model("gpt_neox") / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "vocab_size": len(neox())}))
    neox().save_pretrained(model)
    events = []
    config = PrepareConfig(
        model=str(model), data=str(SHARED_DATA / "gsm8k_train.jsonl"), limit=50, show=3, output=str(tmp_path / "out")
    )
    summary = prepare(config, events.append)
    assert summary.manifest["rows"] == 50
    shown = [event for event in events if isinstance(event, RowShown)]
    source = [json.loads(line) for line in (SHARED_DATA / "gsm8k_train.jsonl").read_text().splitlines()[:3]]
    for row, record in zip(shown, source, strict=True):
        assert row.pieces == (
            (f"### Question:\n{record['question']}\n\n### Answer:\n", False),
            (f"{record['answer']}<|endoftext|>", True),
        )


def test_what_is_missing_is_asked_for(tmp_path, data, tiny_model):
    with pytest.raises(UsageError, match="No model was given") as error:
        prepare(PrepareConfig(data=data), lambda event: None)
    assert "--model" in error.value.hint
    with pytest.raises(UsageError, match="No data was given"):
        prepare(PrepareConfig(model=str(tiny_model("gpt_neox")), output=str(tmp_path / "out")), lambda event: None)
    with pytest.raises(ModelError):
        prepare(PrepareConfig(model=str(tmp_path / "absent"), data=data), lambda event: None)
    assert not (tmp_path / "out").exists()
