"""Preparing data: every format end to end, every row accounted for, the same rows found again, nothing half-written."""

import gzip
import json
import os
import subprocess
import time
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.artifacts import BAD_ROWS, PREPARED_MANIFEST, PREPARED_ROWS
from qlora_cli.config import PrepareConfig
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.core.data.prepare import (
    TASK,
    cache_directory,
    choose_max_length,
    prepare_cached_rows,
    prepare_rows,
)
from qlora_cli.core.data.tokenize import Tokeniser, TokeniserSettings
from qlora_cli.core.data.worker_pool import SMALL_BYTES, TokeniserPool, count_processes
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.prompts.formatting import Formatting, format_prompt
from qlora_cli.core.reading.chunks import Chunk
from qlora_cli.core.reading.readers import CHUNK_BYTES
from qlora_cli.errors import DataError, RunError, UsageError
from qlora_cli.events import Caution, Notice, Progress
from tests.prompts import chat_templates
from tests.prompts.small_tokenizers import KINDS, byte_level, neox, sentencepiece_like

MESSAGES = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}]
PAIRS = [{"question": f"What is {i}?", "answer": f"It is {i + 1}."} for i in range(30)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def prepare(
    directory,
    records,
    tokenizer=None,
    *,
    events=None,
    output="prepared",
    overwrite=False,
    workers=None,
    chunk_bytes=CHUNK_BYTES,
    **flags,
):
    """The rows and the summary."""
    data = records if isinstance(records, str) else write(directory / "rows.jsonl", records)
    config = PrepareConfig(data=data, **flags)
    events = [] if events is None else events
    tokenizer = tokenizer or byte_level()
    summary = prepare_rows(
        config,
        tokenizer,
        None,
        directory / output,
        events.append,
        overwrite=overwrite,
        workers=workers,
        chunk_bytes=chunk_bytes,
    )
    return PreparedRows(summary.directory), summary


def text(tokenizer, row, *, trained=None):
    ids, flags = row
    return tokenizer.decode(ids if trained is None else ids[flags == trained])


FORMATS = {
    "text": ({"text": "the quick fox </s>"}, "the quick fox </s>"),
    "prompt": ({"question": "the quick <s>?", "answer": "fox"}, {"question": "the quick <s>?"}),
    "optional": ({"instruction": "add", "input": "", "output": "fox"}, "add"),
    "chat": ({"messages": MESSAGES}, MESSAGES[:1]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a"),
}


@pytest.mark.parametrize("kind", ["llama", "llama_legacy", "byte_level", "neox"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_shares_its_prompts_with_generation(tmp_path, format, kind):
    """Through the manifest, as a run record keeps it: byte for byte the ids of the prepared row."""
    tokenizer = KINDS[kind]()
    record, prompt = FORMATS[format]
    rows, summary = prepare(tmp_path, [record], tokenizer)
    formatting = Formatting.from_dict(json.loads(json.dumps(summary.manifest["formatting"])))
    ids, trained = rows[0]
    prompt_ids = format_prompt(prompt, formatting, tokenizer)
    assert ids[: len(prompt_ids)].tolist() == prompt_ids
    encoder = encoder_of(tokenizer)
    assert ids[-1] == encoder.spec.eos_id
    assert trained[-1]
    assert not trained[0]
    if format != "text":
        assert not trained[: len(prompt_ids)].any()
        assert trained[len(prompt_ids) :].all()


def test_tokens_share_their_prompts_with_generation(tmp_path):
    tokenizer = sentencepiece_like()
    rows, summary = prepare(tmp_path, [{"input_ids": [1, 300, 301, 302], "labels": [-100, -100, 301, 302]}], tokenizer)
    formatting = Formatting.from_dict(summary.manifest["formatting"])
    prompt = format_prompt({"input_ids": [1, 300]}, formatting, tokenizer)
    assert rows[0][0].tolist() == [*prompt, 301, 302, 2]
    assert rows[0][1].tolist() == [False, False, True, True, True]


def test_tokens_get_the_ends_they_lack_and_lose_their_padding(tmp_path):
    tokenizer = sentencepiece_like()
    given_rows = [
        {"input_ids": [1, 300, 2], "labels": [-100, 300, -100]},  # the stock collator masks a real EOS
        {"input_ids": [300, 301]},
        {"input_ids": [1, 300, 2, 0, 0], "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": [], "labels": []},
        {"input_ids": [1, 300, 2], "labels": [-100, -100, -100]},
    ]
    events = []
    rows, summary = prepare(tmp_path, given_rows, tokenizer, events=events)
    assert [row[0].tolist() for row in rows] == [[1, 300, 2], [1, 300, 301, 2], [1, 300, 2]]
    assert [row[1].tolist() for row in rows] == [[False, True, True], [False, True, True, True], [False, True, True]]
    assert summary.manifest["dropped"] == {"no tokens": 1, "every token is masked": 1}
    assert Notice("2 rows were given the beginning or end token that they lacked.") in events


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"input_ids": "1 2"}, "field 'input_ids' is text, not a list of numbers"),
        ({"input_ids": [1, 2.5]}, "field 'input_ids' holds a number where a whole number belongs"),
        ({"input_ids": [1, None]}, "field 'input_ids' holds null where a whole number belongs"),
        ({"input_ids": [1, 999_999]}, "field 'input_ids' holds 999999, which is no token of this tokenizer"),
        ({"input_ids": [1, 2**70]}, "field 'input_ids' holds 1.18e+21, which is no token of any tokenizer"),
        ({"input_ids": [1, -1]}, "field 'input_ids' holds -1, which is no token of this tokenizer"),
        (
            {"input_ids": [1, 5, 6], "labels": [5, 6, -100]},
            "field 'labels' holds 5 where 'input_ids' holds 1; a label is the token itself, or -100 where it is not trained",
        ),
        ({"input_ids": [1, 2], "labels": [1]}, "field 'labels' has 1 entries, but 'input_ids' has 2"),
        ({"labels": [1]}, "field 'input_ids' is missing (it has 'labels')"),
    ],
)
def test_wrong_tokens_are_bad_rows(tmp_path, record, cause):
    with pytest.raises(DataError) as error:
        prepare(tmp_path, [{"input_ids": [1, 2]}, record])
    assert error.value.message == f"{tmp_path}/rows.jsonl:2: {cause}."


def test_what_is_trained_can_be_chosen(tmp_path):
    tokenizer = byte_level()
    chat = [*MESSAGES, {"role": "user", "content": "more"}, {"role": "assistant", "content": "end"}]
    expected = {"completion": "brown fox<|im_end|>end<|im_end|>", "last": "end<|im_end|>"}
    for train_on, trained in expected.items():
        rows, _ = prepare(tmp_path, [{"messages": chat}], tokenizer, train_on=train_on, output=train_on)
        assert text(tokenizer, rows[0], trained=True) == trained
    rows, summary = prepare(tmp_path, [{"messages": chat}], tokenizer, train_on="all", output="all")
    assert rows[0][1].tolist() == [False] + [True] * (summary.manifest["tokens"] - 1)


# ---------------------------------------------------------------- lengths


@lru_cache
def tokeniser(kind):
    tokenizer = KINDS[kind]()
    settings_ = TokeniserSettings(
        spec=encoder_of(tokenizer).spec,
        formatting=Formatting(format="prompt", prompt_column="q", completion_column="a", template="{q}: {a}"),
        train_on="completion",
        max_length=64,
        overlong="truncate",
        max_line_bytes=2**20,
        vocabulary_size=len(tokenizer),
    )
    return Tokeniser(settings_)


def rows_of(result):
    borders = np.cumsum(result.lengths)[:-1]
    return list(zip(np.split(result.input_ids, borders), np.split(result.trained, borders), strict=True))


WORDS = st.lists(st.sampled_from(["fox", "the", "dog.", "x", "é"]), max_size=25).map(" ".join)


@pytest.mark.parametrize("kind", ["llama", "byte_level", "neox"])
@settings(max_examples=20, deadline=None)
@given(records=st.lists(st.fixed_dictionaries({"q": WORDS, "a": WORDS}), max_size=8), limit=st.integers(4, 30))
def test_every_row_is_accounted_for_whatever_happens_to_long_ones(kind, records, limit):
    tokenizer = KINDS[kind]()
    eos, prefix = encoder_of(tokenizer).spec.eos_id, list(encoder_of(tokenizer).spec.prefix_ids)

    def run(overlong, max_length):
        chunk = Chunk("x", records=list(records), lines=list(range(1, len(records) + 1)))
        tokeniser(kind)._settings = replace(tokeniser(kind)._settings, overlong=overlong, max_length=max_length)
        result = tokeniser(kind).process(chunk)
        assert result.lengths.sum() == result.input_ids.size == result.trained.size
        assert result.counts["records"] == len(records)
        return result, rows_of(result) if result.lengths.size else []

    whole, whole_rows = run("truncate", 10**6)
    blank = sum(not record["a"].strip() for record in records)
    assert whole.dropped == Counter({"empty completion": blank} if blank else {})
    assert len(whole_rows) == len(records) - blank

    cut, cut_rows = run("truncate", limit)
    survivors = [(ids[:limit], flags[:limit]) for ids, flags in whole_rows if flags[:limit].any()]
    assert [ids.tolist() for ids, _ in cut_rows] == [ids.tolist() for ids, _ in survivors]
    assert [flags.tolist() for _, flags in cut_rows] == [flags.tolist() for _, flags in survivors]
    assert cut.counts["truncated"] == sum(len(ids) > limit and flags[:limit].any() for ids, flags in whole_rows)
    assert sum(cut.dropped.values()) == len(records) - len(cut_rows)
    assert all(ids[-1] == eos and flags[-1] for ids, flags in cut_rows if len(ids) < limit)

    dropped, dropped_rows = run("drop", limit)
    assert [ids.tolist() for ids, _ in dropped_rows] == [ids.tolist() for ids, _ in whole_rows if len(ids) <= limit]
    assert dropped.counts["truncated"] == 0
    assert dropped.dropped[f"longer than {limit} tokens"] == sum(len(ids) > limit for ids, _ in whole_rows)

    split, split_rows = run("split", limit)
    assert all(len(ids) <= limit for ids, _ in split_rows)
    assert all(ids[: len(prefix)].tolist() == prefix for ids, _ in split_rows)
    assert split.counts["truncated"] == 0
    assert split.counts["split"] == sum(len(ids) > limit for ids, _ in whole_rows)
    assert split.dropped == whole.dropped, "no row is lost, whatever its pieces are"
    assert sum(bool(ids[-1] == eos and flags[-1]) for ids, flags in split_rows) == len(whole_rows)
    lost_to_borders = sum(flags.sum() for _, flags in whole_rows) - sum(flags.sum() for _, flags in split_rows)
    pieces = sum(-(-max(len(ids) - limit, 0) // (limit - len(prefix))) for ids, _ in whole_rows)
    # Only a piece without BOS loses the label of its first token: nothing stands before it.
    assert 0 <= lost_to_borders <= (0 if prefix else pieces)


def test_long_rows_are_counted_and_shown(tmp_path):
    long = {"question": "q", "answer": "fox " * 100}
    endless = {"question": "the " * 100, "answer": "a"}
    events = []
    _, summary = prepare(tmp_path, [*PAIRS[:3], long, endless], max_length=64, events=events)
    assert summary.manifest["truncated"] == 1
    assert summary.manifest["dropped"] == {"nothing left to train within --max-length": 1}
    assert summary.manifest["rows"] == 4
    assert any(
        event.text.startswith("1 of 5 rows was cut at --max-length") for event in events if isinstance(event, Caution)
    )
    assert Caution("1 of 5 rows was left out: nothing left to train within --max-length.") in events
    _, summary = prepare(tmp_path, [*PAIRS[:3], long, endless], max_length=64, overlong="split", output="b")
    assert summary.manifest["split"] == 2
    assert summary.manifest["rows"] > 5
    _, summary = prepare(tmp_path, [*PAIRS[:3], long, endless], max_length=64, overlong="drop", output="c")
    assert summary.manifest["dropped"] == {"longer than 64 tokens": 2}


def test_no_row_left_is_an_error_that_says_why(tmp_path):
    blank = {"question": "q", "answer": ""}
    with pytest.raises(DataError) as error:
        prepare(tmp_path, [blank, blank, {"question": "q", "answer": "fox " * 90}], max_length=32, overlong="drop")
    assert "none is left to train on (2 empty completion; 1 longer than 32 tokens)" in error.value.message
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_where_every_row_is_bad_the_hint_is_about_what_they_have_in_common(tmp_path, on_bad_row):
    bad = {"messages": [{"role": "user", "content": 5}]}
    with pytest.raises(DataError) as error:
        prepare(tmp_path, [bad] * 3, on_bad_row=on_bad_row)
    assert "message 1 is a number" in error.value.message and "3 rows" in error.value.message
    assert "bad-row" not in error.value.hint and "--messages-column" in error.value.hint
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    if on_bad_row == "stop":
        with pytest.raises(DataError) as error:
            prepare(tmp_path, [bad, *[good] * 9])
        assert "--on-bad-row skip" in error.value.hint


@pytest.mark.parametrize(("on_bad_row", "hint"), [("stop", "take it out of --data"), ("skip", "Check --data")])
def test_a_file_that_is_bad_as_a_whole_is_no_bad_row(tmp_path, on_bad_row, hint):
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(b'{"text": "fox"}'))
    with pytest.raises(DataError) as error:
        prepare(tmp_path, str(tmp_path / "rows.jsonl"), on_bad_row=on_bad_row)
    assert "compressed; rename it rows.jsonl.gz" in error.value.message and hint in error.value.hint


def test_the_length_comes_from_the_model():
    events = []
    model = transformers.LlamaConfig(max_position_embeddings=1024)
    learned = transformers.GPT2Config(n_positions=1024)
    long = transformers.LlamaConfig(max_position_embeddings=131072)
    assert choose_max_length(None, None, events.append) == 2048
    assert choose_max_length(None, model, events.append) == 1024
    assert choose_max_length(None, long, events.append) == 2048
    assert choose_max_length(512, model, events.append) == 512
    assert not events
    assert choose_max_length(4096, model, events.append) == 4096
    assert events == [Caution("--max-length 4096 is past the model's context of 1024 tokens.")]
    with pytest.raises(UsageError, match="past the 1024 positions"):
        choose_max_length(4096, learned, events.append)


def test_settings_of_other_rows_are_said_to_do_nothing(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    events: list = []
    for _ in range(2):  # made, and found again
        events.clear()
        prepare(tmp_path, PAIRS, events=events, chat_template=str(tmp_path / "t.jinja"), split="test", thoughts="drop")
        assert {event.text for event in events if isinstance(event, Caution)} == {
            "--chat-template does nothing without --format chat.",
            "--thoughts does nothing without --format chat.",
            f"--split test does nothing: {tmp_path / 'rows.jsonl'} has no splits.",
        }
    events.clear()
    prepare(tmp_path, [{"messages": MESSAGES}], events=events, output="chats", thoughts="drop")
    assert not [event for event in events if isinstance(event, Caution)]


# ---------------------------------------------------------------- bad rows


def test_a_bad_row_stops_the_preparation(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + '\n{"question": "x", "answer": null}\n{"question"\n')
    with pytest.raises(DataError) as error:
        prepare(tmp_path, str(path))
    assert error.value.message == f"{path}:2: field 'answer' is null, not text."
    assert "--on-bad-row skip" in error.value.hint
    assert os.listdir(tmp_path) == ["rows.jsonl"]  # noqa: PTH208


def test_bad_rows_can_be_skipped_and_are_listed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question"\n' + json.dumps(PAIRS[0]) + '\n{"question": "x", "answer": null}\n')
    events = []
    rows, summary = prepare(tmp_path, str(path), on_bad_row="skip", events=events)
    assert len(rows) == 1
    assert summary.manifest["bad_rows"] == 2
    assert summary.manifest["records"] == 3
    listed = [json.loads(line) for line in (tmp_path / "prepared" / BAD_ROWS).read_text().splitlines()]
    assert listed == [
        {"file": str(path), "line": 1, "cause": "truncated JSON: the line ends at column 11 inside a value"},
        {"file": str(path), "line": 3, "cause": "field 'answer' is null, not text"},
    ]
    (caution,) = [event for event in events if isinstance(event, Caution)]
    assert caution.text.startswith("2 of 3 rows are bad and were skipped, listed in ")
    assert str(tmp_path / "prepared" / BAD_ROWS) in caution.text


def test_a_folder_with_one_bad_file(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", PAIRS[:2])
    (folder / "b.jsonl").write_text("<html><body>Too many requests</body></html>")
    with pytest.raises(DataError, match=r"b\.jsonl: this is an HTML page"):
        prepare(tmp_path, str(folder))
    rows, summary = prepare(tmp_path, str(folder), on_bad_row="skip")
    assert (len(rows), summary.manifest["bad_rows"]) == (2, 1)


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_data_without_any_row_is_an_error(tmp_path, on_bad_row):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "array.json").write_text("[]")
    for name in ("empty.jsonl", "array.json"):
        with pytest.raises(DataError, match=r"the file is empty|no row that can be read"):
            prepare(tmp_path, str(tmp_path / name), on_bad_row=on_bad_row)


def test_only_the_first_rows_can_be_taken(tmp_path):
    rows, summary = prepare(tmp_path, PAIRS, limit=7, chunk_bytes=256)
    assert len(rows) == summary.manifest["records"] == 7
    assert "It is 7." in text(byte_level(), rows[6])


# ---------------------------------------------------------------- many processes, the cache, interruptions


def test_many_processes_give_the_rows_of_one(tmp_path):
    records = [{"question": f"{i} " * (i % 9), "answer": f"fox {i}"} for i in range(200)]
    one, _ = prepare(tmp_path, records, workers=1, output="one", chunk_bytes=512)
    events = []
    two, summary = prepare(tmp_path, records, workers=2, output="two", events=events, chunk_bytes=512)
    assert (tmp_path / "one" / PREPARED_ROWS).read_bytes() == (tmp_path / "two" / PREPARED_ROWS).read_bytes()
    assert len(one) == len(two) == 200
    progress = [event for event in events if isinstance(event, Progress)]
    assert all(event.total is None or event.total > event.done for event in progress[:-1])
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert progress[-1] == Progress(TASK, 200, 200)
    assert len(progress) > 5
    assert summary.manifest["tokens"] == int(two.lengths.sum())


def test_chats_are_prepared_by_many_processes_too(tmp_path):
    records = [{"messages": [MESSAGES[0], {"role": "assistant", "content": f"fox {i}"}]} for i in range(20)]
    rows, _ = prepare(tmp_path, records, workers=2, chunk_bytes=512)
    assert [text(byte_level(), row, trained=True) for row in rows] == [f"fox {i}<|im_end|>" for i in range(20)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_template_that_has_to_be_stopped_stops_the_preparation(tmp_path, workers):
    path = tmp_path / "fill.jinja"
    path.write_text("{{ 'a' * 10 ** 12 }}")
    with pytest.raises(DataError, match="takes more than 512 MiB of memory"):
        prepare(tmp_path, [{"messages": MESSAGES}], chat_template=str(path), workers=workers)
    assert not (tmp_path / "prepared").exists()


def test_a_process_that_dies_is_reported(tmp_path):
    chunks = [Chunk("x", records=[{"q": "a", "a": "b"}], lines=[1])] * 4
    with TokeniserPool(tokeniser("byte_level")._settings, 2) as pool:
        assert [result.lengths.size for result in pool.process_all(chunks)] == [1] * 4
        for process, _ in pool._workers:
            process.kill()
            process.wait()
        with pytest.raises(DataError, match=r"tokenising process died \(exit code -9\)"):
            list(pool.process_all(chunks))
    assert all(process.poll() is not None for process, _ in pool._workers)


def test_the_same_input_is_a_hit_and_any_other_is_not(tmp_path):
    events = []
    _, first = prepare(tmp_path, PAIRS)
    written = (tmp_path / "prepared" / PREPARED_ROWS).stat()
    _, again = prepare(tmp_path, PAIRS, events=events)
    assert (first.cache_hit, again.cache_hit) == (False, True)
    assert again.manifest == first.manifest
    assert "prepared already" in events[-1].text
    assert (tmp_path / "prepared" / PREPARED_ROWS).stat().st_mtime_ns == written.st_mtime_ns
    renamed = write(tmp_path / "other_name.jsonl", PAIRS)
    assert prepare(tmp_path, renamed)[1].cache_hit
    changed = [
        {"records": PAIRS[1:]},
        {"tokenizer": sentencepiece_like()},
        {"max_length": 77},
        {"overlong": "drop"},
        {"train_on": "all"},
        {"template": "{question} {answer}"},
        {"limit": 3},
        {"on_bad_row": "skip"},
    ]
    digests = {first.manifest["digest"]}
    for change in changed:
        _, summary = prepare(tmp_path, **{"records": PAIRS, "overwrite": True, **change})
        assert not summary.cache_hit
        digests.add(summary.manifest["digest"])
    assert len(digests) == len(changed) + 1


def test_the_same_bytes_under_another_kind_are_no_hit(tmp_path):
    for suffix in ("jsonl", "txt"):
        path = tmp_path / f"rows.{suffix}"
        write(path, [{"text": "the fox"}])
        assert not prepare(tmp_path, str(path), overwrite=True)[1].cache_hit


def test_the_rows_digest_is_of_the_rows(tmp_path):
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(PAIRS, indent=2))
    digests = [
        prepare(tmp_path, records, output=str(i))[1].manifest["rows_sha256"]
        for i, records in enumerate((PAIRS, str(array), PAIRS[::-1]))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_changed_template_file_is_no_hit(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(chat_templates.CHATML)
    flags = {"records": [{"messages": MESSAGES}], "chat_template": str(path)}
    assert not prepare(tmp_path, **flags)[1].cache_hit
    assert prepare(tmp_path, **flags)[1].cache_hit
    path.write_text(chat_templates.WORDS)
    assert not prepare(tmp_path, **flags, overwrite=True)[1].cache_hit


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    config = PrepareConfig(data=write(tmp_path / "rows.jsonl", PAIRS))
    first = prepare_rows(config, byte_level(), None, None, lambda event: None)
    assert Path(first.directory).parent == tmp_path / "cache" / "prepared"
    assert prepare_rows(config, byte_level(), None, None, lambda event: None).cache_hit

    def flip(path):
        content = path.read_bytes()
        position = content.index(b"\0\0\0", len(content) // 4) - 1  # of an id, which stays one
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])

    whole = (Path(first.directory) / PREPARED_ROWS).read_bytes()
    damages = (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9]), flip)
    for name, damage in zip((PREPARED_MANIFEST, PREPARED_ROWS, PREPARED_ROWS), damages, strict=True):
        damage(Path(first.directory) / name)
        events = []
        repaired = prepare_rows(config, byte_level(), None, None, events.append)
        assert name == PREPARED_MANIFEST or "made anew" in events[0].text
        assert (Path(repaired.directory) / PREPARED_ROWS).read_bytes() == whole
        assert not repaired.cache_hit
        assert repaired.directory == first.directory
        assert len(PreparedRows(repaired.directory)) == 30
    monkeypatch.delenv("QLORA_CACHE")
    assert cache_directory() == Path.home() / ".cache" / "qlora" / "prepared"


def test_a_cache_that_takes_no_files_costs_time_and_never_the_run(tmp_path, monkeypatch):
    config = PrepareConfig(data=write(tmp_path / "rows.jsonl", PAIRS))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    for hit in (False, True):
        events = []
        found = prepare_cached_rows(config, byte_level(), None, tmp_path / "out" / ".rows", events.append)
        assert Path(found.directory) == tmp_path / "out" / ".rows" and found.cache_hit == hit
        assert len(PreparedRows(found.directory)) == 30
        assert [type(event) for event in events].count(Caution) == 1


def test_another_directory_is_not_written_over(tmp_path):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "thesis.tex").write_text("x")
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(RunError, match="which qlora did not write"):
            prepare(tmp_path, PAIRS, **flags)
    assert (tmp_path / "prepared" / "thesis.tex").read_text() == "x"
    (tmp_path / "prepared" / "thesis.tex").unlink()
    prepare(tmp_path, PAIRS)
    with pytest.raises(RunError, match="exists already") as error:
        prepare(tmp_path, PAIRS[:9])
    assert "--overwrite" in error.value.hint


def test_an_interruption_leaves_nothing_behind(tmp_path):
    prepare(tmp_path, PAIRS[:3])
    before = (tmp_path / "prepared" / PREPARED_ROWS).read_bytes()
    path = write(tmp_path / "rows.jsonl", PAIRS)

    def interrupt(event):
        if isinstance(event, Progress) and event.done > 10:
            raise KeyboardInterrupt

    for workers in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            prepare_rows(
                PrepareConfig(data=path),
                byte_level(),
                None,
                tmp_path / "prepared",
                interrupt,
                overwrite=True,
                workers=workers,
                chunk_bytes=256,
            )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["prepared", "rows.jsonl"]
    assert (tmp_path / "prepared" / PREPARED_ROWS).read_bytes() == before


@pytest.mark.parametrize("change", ["written on", "replaced", "removed"])
def test_a_file_that_changes_meanwhile_leaves_no_rows_under_its_former_name(tmp_path, monkeypatch, change):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    path = Path(write(tmp_path / "rows.jsonl", PAIRS))
    config = PrepareConfig(data=str(path))
    whole = path.read_bytes()

    def meddle(event):
        if isinstance(event, Progress) and event.done and path.exists() and path.read_bytes() == whole:
            if change == "written on":
                with path.open("ab") as stream:
                    stream.write(whole)
            elif change == "replaced":
                (tmp_path / "new").write_bytes(whole.replace(b"0", b"1"))
                (tmp_path / "new").replace(path)
            else:
                path.unlink()

    with pytest.raises(DataError, match="was changed while it was read"):
        prepare_rows(config, byte_level(), None, None, meddle, workers=1, chunk_bytes=256)
    assert not [entry for entry in cache_directory().iterdir() if entry.is_dir()]
    path.write_bytes(whole)
    summary = prepare_rows(config, byte_level(), None, None, print, workers=1)
    assert not summary.cache_hit and len(PreparedRows(summary.directory)) == len(PAIRS)


def test_a_kill_leaves_no_half_written_directory_and_no_process(tmp_path, zygote):
    write(tmp_path / "rows.jsonl", [{"text": "the fox " * 200}] * 3000)
    byte_level().save_pretrained(tmp_path / "tokenizer")
    mark = tmp_path / "group"
    arguments = {"directory": str(tmp_path), "mark": str(mark)}
    killed = zygote.run("tests.faults.victims:prepare", kill_when=(mark, 0), **arguments)
    assert killed.code == -9, killed.said
    assert not (tmp_path / "prepared").exists()
    while subprocess.run(["pgrep", "-g", mark.read_text()], capture_output=True, check=False).stdout:
        time.sleep(0.1)  # until its children see the pipe close


def test_the_manifest_says_what_the_rows_are(tmp_path):
    tokenizer = neox()
    rows, summary = prepare(tmp_path, PAIRS, tokenizer)
    manifest = summary.manifest
    assert rows.manifest == manifest
    assert json.loads(json.dumps(summary.to_dict()))["rows"] == 30
    assert manifest["tokens"] == rows.lengths.sum()
    assert manifest["trained_tokens"] == sum(int(trained.sum()) for _, trained in rows)
    assert manifest["lengths"]["max"] == rows.lengths.max()
    assert manifest["lengths"]["p50"] in rows.lengths
    assert manifest["formatting"]["format"] == "prompt"
    assert manifest["column"] == "answer"
    assert manifest["train_on"] == "completion"
    assert manifest["tokenizer"]["sha256"] == encoder_of(tokenizer).spec.sha256
    assert len(manifest["data"]["files"][0]["sha256"]) == 64


def test_no_data_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No data was given"):
        prepare_rows(PrepareConfig(), byte_level(), None, tmp_path, lambda event: None)


def test_small_input_starts_no_process():
    assert count_processes(SMALL_BYTES - 1, None, cores=4) == 1
    assert count_processes(SMALL_BYTES, None, cores=4) == 4
    assert count_processes(None, None, cores=4) == 4  # a table
    assert count_processes(SMALL_BYTES, None, cores=99) == 8
    assert count_processes(1, 3, cores=1) == 3


def test_a_directory_prepared_when_formats_were_called_shapes_is_the_same(tmp_path):
    _, summary = prepare(tmp_path, PAIRS)
    path = tmp_path / "prepared" / PREPARED_MANIFEST
    manifest = json.loads(path.read_text())
    manifest["formatting"]["shape"] = manifest["formatting"].pop("format")
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert prepare(tmp_path, PAIRS)[1].cache_hit
    found = Formatting.from_dict(PreparedRows(tmp_path / "prepared").manifest["formatting"])
    assert found == Formatting.from_dict(summary.manifest["formatting"])


def test_a_share_that_takes_no_row_is_refused(tmp_path):
    few, others = write(tmp_path / "few.jsonl", PAIRS), write(tmp_path / "others.jsonl", PAIRS)
    config = PrepareConfig(data=[f"{few}:0.03", others])
    with pytest.raises(DataError, match=r"few.jsonl:0.03 takes none of 30 rows") as error:
        prepare_rows(config, byte_level(), None, tmp_path / "prepared", lambda event: None)
    assert error.value.hint == "Take 0.033334 or more."
    config = PrepareConfig(data=[f"{few}:0.033334", others])
    summary = prepare_rows(config, byte_level(), None, tmp_path / "prepared", lambda event: None)
    assert [part["rows"] for part in summary.manifest["data_sets"]] == [1, 30]
