"""Promises of `generate`: formatted as in training, the right base, text as it comes, files that resume, plain errors."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from qlora_cli.artifacts import MERGE_RECORD, RUN_RECORD
from qlora_cli.commands.generate import converse, generate, settings_fingerprint
from qlora_cli.config import GenerateConfig
from qlora_cli.core.decoding.decoder import Decoder
from qlora_cli.core.generation.session import GenerationSession
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.errors import AdapterError, DataError, ModelError, RunError, UsageError
from qlora_cli.events import Caution, Notice, Progress, TextGenerated
from tests.commands.generation_case import CHAT, write_run

PAIR = Formatting(format="prompt", prompt_column="q", completion_column="a", template="Question: {q}\nAnswer: {a}")


@pytest.fixture(scope="module")
def make_run(tiny_model, tmp_path_factory):
    """`make_run(seed, formatting)`: a run directory whose adapter gives answers of its own."""
    built = {}

    def make(seed=0, formatting=None, **identity):
        key = (seed, formatting, tuple(identity.items()))
        if key not in built:
            run = tmp_path_factory.mktemp("run")
            built[key] = write_run(run, tiny_model("llama"), seed=seed, formatting=formatting, **identity)
        return built[key]

    return make


def ask(prompts, *, input=None, **settings):
    """Result and events of one call."""
    events = []
    options = {"max_new_tokens": 12, "temperature": 0.0, "base_cache": False, **settings}
    return generate(GenerateConfig(input=input, **options), prompts, events.append), events


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, TextGenerated))


def test_an_answer_streams_and_is_counted(make_run, tiny_model):
    run = make_run(formatting=PAIR)
    result, events = ask(["What?"], adapter=str(run), verbose=True)
    (answer,) = result.answers
    assert answer["answer"] == text_of(events) and answer["answer"]
    assert [event for event in events if isinstance(event, TextGenerated)][-1] == TextGenerated("", final=True)
    named = next(event.text for event in events if isinstance(event, Notice))
    assert str(tiny_model("llama")) in named and str(run) in named
    content = json.loads(json.dumps(result.to_dict()))
    assert content["new_tokens"] == answer["new_tokens"] == 12
    assert content["tokens_per_second"] > 0 and 0 < content["first_token_seconds"] <= content["generate_seconds"]
    assert any("Decoded by" in event.text for event in events if isinstance(event, Notice))


def test_several_prompts_are_answered_together_as_each_alone_and_their_texts_come_in_order(make_run, monkeypatch):
    run, prompts = str(make_run()), ["The quick", "A much longer question, all of it", "b", "The end of"]
    alone = ask(prompts, adapter=run, batch_size=1)[0].answers
    taken = []
    plain = GenerationSession.answer
    monkeypatch.setattr(GenerationSession, "answer", lambda self, r, *a: taken.append(len(r)) or plain(self, r, *a))
    result, events = ask(prompts, adapter=run, batch_size=2)
    assert taken == [4] and result.answers == alone
    pieces = [event for event in events if isinstance(event, TextGenerated)]
    ends = [place for place, piece in enumerate(pieces) if piece.final]
    texts = ["".join(p.text for p in pieces[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert texts == [answer["answer"] for answer in alone] and len(ends) == len(prompts)


def test_what_was_said_before_rows_had_to_be_given_up_is_not_said_again(make_run, monkeypatch):
    run, prompts = str(make_run()), ["The quick", "b"]
    plain, steps = Decoder.step, []

    def step(self):
        steps.append(self.cache.rows)
        if len(steps) == 5:
            raise torch.OutOfMemoryError("injected")
        return plain(self)

    monkeypatch.setattr(Decoder, "step", step)
    result, events = ask(prompts, adapter=run)
    assert {2, 1} == set(steps) and all(answer["new_tokens"] == 12 for answer in result.answers)
    assert text_of(events) == "".join(answer["answer"] for answer in result.answers)
    assert any("going on with 1" in event.text for event in events if isinstance(event, Caution))


def test_a_prompt_is_formatted_as_in_training_unless_it_is_raw(make_run):
    formatted, _ = ask(["What?"], adapter=str(make_run(formatting=PAIR)))
    raw, _ = ask(["What?"], adapter=str(make_run(formatting=PAIR)), raw=True)
    by_hand, _ = ask(["Question: What?\nAnswer:"], adapter=str(make_run(formatting=PAIR)), raw=True)
    assert formatted.answers[0]["answer"] == by_hand.answers[0]["answer"].lstrip() != raw.answers[0]["answer"]
    assert formatted.prompt_tokens == by_hand.prompt_tokens


def test_the_base_alone_and_each_adapter_answer_differently(make_run, tiny_model):
    base = str(tiny_model("llama"))
    texts = {
        ask(["The quick brown"], **source)[0].answers[0]["answer"]
        for source in ({"model": base}, {"adapter": str(make_run(0))}, {"adapter": str(make_run(1))})
    }
    assert len(texts) == 3


def test_an_adapter_meets_only_the_base_it_was_trained_on(make_run, tiny_model, tmp_path):
    run = str(make_run())
    sibling = tiny_model("llama", seed=1)
    with pytest.raises(AdapterError, match="different weights"):
        ask(["a"], adapter=run, model=str(sibling))
    with pytest.raises(AdapterError, match="different configuration"):
        ask(["a"], adapter=run, model=str(tiny_model("llama", hidden_size=32)))
    changed = shutil.copytree(run, tmp_path / "changed")
    record = json.loads((changed / RUN_RECORD).read_text())
    record["base"]["model"] = str(sibling)  # as if its weights had been exchanged since
    (changed / RUN_RECORD).write_text(json.dumps(record))
    with pytest.raises(AdapterError, match="now that has different weights") as caught:
        ask(["a"], adapter=str(changed), model=f"{sibling.parent}/../{sibling.parent.name}/{sibling.name}")
    assert "Put back" in caught.value.hint
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_model("llama"))
    assert ask(["a"], adapter=run, model=str(moved))[0].answered == 1


def test_the_base_is_held_as_in_training(make_run):
    run = make_run(quant_type="fp4", double_quant=False)
    _, events = ask(["a"], adapter=str(run))
    assert any("fp4" in event.text for event in events if isinstance(event, Notice))
    _, events = ask(["a"], adapter=str(make_run()), quant_type="fp4")
    assert any("trained with quant_type nf4; fp4" in event.text for event in events if isinstance(event, Caution))


def test_bad_input_is_reported_in_one_sentence_before_anything_is_loaded(make_run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "qlora_cli.core.generation.base_loading.load_base", lambda *a, **k: pytest.fail("the model was loaded")
    )
    base = str(tiny_model("llama"))
    with pytest.raises(UsageError, match="needs a model"):
        ask(["a"])
    with pytest.raises(AdapterError, match="no adapter in"):
        ask(["a"], adapter=str(tmp_path))
    with pytest.raises(ModelError, match="No model directory"):
        ask(["a"], model="/nowhere")
    with pytest.raises(DataError, match="tokens and the model reads at most 512"):
        ask(["word " * 600], model=base)
    for prompt in ("", " \n"):
        with pytest.raises(DataError, match="prompt is empty"):
            ask([prompt], model=base)
        with pytest.raises(DataError, match="prompt is empty"):
            ask([prompt], adapter=str(make_run(formatting=PAIR)))
    with pytest.raises(DataError, match="no file"):
        ask([], model=base, input=str(tmp_path / "none"), output=str(tmp_path / "out"))
    with pytest.raises(UsageError, match="go together"):
        ask([], model=base, input=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="- is no file"):
        ask([], model=base, input=str(tmp_path / "none"), output="-")
    for flag in ("max_new_tokens", "batch_size"):
        with pytest.raises(UsageError, match=flag.replace("_", "-")):
            ask(["a"], model=base, **{flag: 0})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"fine"\n{"prompt": "a", "adapter": "/none"}\n')
    with pytest.raises(AdapterError, match="no adapter in /none"):
        ask([], model=base, input=str(prompts), output=str(tmp_path / "out"))
    prompts.write_text('"fine"\n' + json.dumps("word " * 600))
    with pytest.raises(DataError, match="prompt 2: The prompt has"):
        ask([], model=base, input=str(prompts), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- files


@pytest.fixture
def prompt_file(tmp_path, make_run):
    rows = [{"prompt": f"The {'quick ' * (i % 5)}fox {i}"} for i in range(11)]
    rows[3]["adapter"] = rows[7]["adapter"] = str(make_run(1))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}])
def test_a_file_is_answered_as_each_prompt_alone_with_its_own_adapter(prompt_file, make_run, tmp_path, sampling):
    target = tmp_path / "answers.jsonl"
    result, events = ask(
        [], adapter=str(make_run(0)), input=str(prompt_file), output=str(target), batch_size=3, **sampling
    )
    rows = rows_of(target)
    assert [row["index"] for row in rows] == list(range(11))
    assert result.answered == 11 and result.new_tokens == sum(row["new_tokens"] for row in rows)
    assert [e.done for e in events if isinstance(e, Progress)] == list(range(1, 12))
    assert not any(isinstance(event, TextGenerated) for event in events)
    if sampling["temperature"] == 0:
        for index, adapter in ((2, make_run(0)), (3, make_run(1))):
            alone, _ = ask([rows[index]["prompt"]], adapter=str(adapter))
            assert alone.answers[0]["answer"] == rows[index]["answer"]
    other = tmp_path / "again.jsonl"
    ask([], adapter=str(make_run(0)), input=str(prompt_file), output=str(other), batch_size=11, **sampling)
    assert [row["answer"] for row in rows_of(other)] == [row["answer"] for row in rows]


def test_a_stopped_file_goes_on(prompt_file, make_run, tmp_path):
    target = tmp_path / "answers.jsonl"
    arguments = {"adapter": str(make_run(0)), "input": str(prompt_file), "output": str(target)}
    ask([], **arguments)
    whole = target.read_bytes()
    lines = whole.splitlines(keepends=True)
    target.write_bytes(b"".join(lines[4:9]) + lines[1][:20])
    result, events = ask([], **arguments)
    assert result.answered == 6 and target.read_bytes() == whole
    assert any("5 of 11" in event.text for event in events if isinstance(event, Notice))
    again, _ = ask([], **arguments)
    assert again.answered == 0 and target.read_bytes() == whole
    with pytest.raises(RunError, match="other settings"):
        ask([], **arguments, top_k=3)
    assert target.read_bytes() == whole


def first_fingerprint(model, revision, quant_type, **changes):
    """That of the first version's answer files: what decided an answer then, under the names of then."""
    base = {"model": model, "revision": revision, "quant_type": quant_type, "double_quant": True}
    base |= {"compute_dtype": "torch.float32", "device": None, "trust_remote_code": False, "cache": None}
    sampling = {"repetition_penalty": 1.0, "temperature": 0.0, "top_k": 0, "top_p": 0.95, "min_p": 0.0}
    answers = {"sampling": sampling, "seed": None, "max_new_tokens": 12, "batch_size": None, "stop": [], "raw": False}
    facts = [base, {**answers, "engine": None, **changes}, None]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def test_a_file_goes_on_when_the_hub_has_a_newer_commit_unless_a_revision_was_typed(tiny_model, tmp_path, monkeypatch):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('"a"\n"b"\n')
    arguments = {"model": "org/model", "input": str(source), "output": str(target)}
    for commit, answered in (("a" * 40, 2), ("b" * 40, 0)):
        snapshot = tmp_path / commit
        snapshot.symlink_to(tiny_model("llama"))
        monkeypatch.setattr("qlora_cli.core.models.files.download_snapshot", lambda *_, found=snapshot, **__: found)
        assert ask([], **arguments)[0].answered == answered
    assert {row["settings"] for row in rows_of(target)} == {first_fingerprint("org/model", None, "nf4")}
    with pytest.raises(RunError, match="other settings"):
        ask([], **arguments, model_revision="v1")
    target.unlink()
    ask([], **arguments, model_revision="v1", seed=3)
    assert {row["settings"] for row in rows_of(target)} == {first_fingerprint("org/model", "v1", "nf4", seed=3)}


def test_a_line_end_written_as_two_letters_in_a_stop_string_is_said(tiny_model):
    for stop, said in (("\\n", True), ("\\n###", True), ("\n", False), ("\\nabla", False)):
        _, events = ask(["a"], model=str(tiny_model("llama")), stop=(stop,), max_new_tokens=1)
        assert any("backslash" in event.text for event in events if isinstance(event, Caution)) is said


def test_answers_under_other_variables_of_the_template_are_not_mixed():
    def settings_of(*given):
        config = GenerateConfig(model="org/model", template_setting=given or None)
        return settings_fingerprint(config, torch.float32)

    on, off = "enable_thinking=true", "enable_thinking=false"
    assert len({settings_of(), settings_of(on), settings_of(off)}) == 3
    assert settings_of(off) == settings_of("enable_thinking=False")


def test_double_quantisation_tells_no_files_apart_where_nothing_is_quantised(tiny_model, tmp_path):
    merged = tmp_path / "merged"
    shutil.copytree(tiny_model("llama"), merged)
    (merged / MERGE_RECORD).write_text("{}")
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('"a"\n')
    arguments = {"model": str(merged), "input": str(source), "output": str(target)}
    assert ask([], **arguments)[0].answered == 1
    assert ask([], **arguments, double_quant=False)[0].answered == 0
    assert rows_of(target)[0]["settings"] == first_fingerprint(str(merged), None, None)
    with pytest.raises(RunError, match="other settings"):
        ask([], **{**arguments, "model": str(tiny_model("llama"))}, double_quant=False)


# ---------------------------------------------------------------- conversations


def talk(lines, *, report=None, **settings):
    """Result and events of a conversation in which these lines are typed; an exception is raised where it stands."""
    events, script = [], iter(lines)

    def read_line(prompt):
        line = next(script, None)
        if isinstance(line, BaseException):
            raise line
        return line

    config = GenerateConfig(chat=True, max_new_tokens=10, temperature=0.0, base_cache=False, **settings)

    def listen(event):
        events.append(event)
        if report is not None:
            report(event)

    return converse(config, listen, read_line), events


def test_a_conversation_remembers_switches_and_leaves_the_adapter_out(make_run, tiny_model):
    first, second = str(make_run(0, CHAT)), str(make_run(1, CHAT))
    result, events = talk(
        [
            "Hello",
            "And now?",
            "/base",
            f"/adapter {second}",
            "Hello",
            "/reset",
            "Hello",
            KeyboardInterrupt(),
            EOFError(),
        ],
        adapter=first,
    )
    hello, now, base, _, fresh = (row["answer"] for row in result.answers)
    assert [row["base"] for row in result.answers] == [False, False, True, False, False]
    assert base != now
    assert result.answers[1]["prompt_tokens"] > result.answers[0]["prompt_tokens"]
    assert result.answers[4]["prompt_tokens"] == result.answers[0]["prompt_tokens"]
    assert fresh == ask(["Hello"], adapter=second, max_new_tokens=10)[0].answers[0]["answer"] != hello
    assert result.adapter == second
    assert any("Ctrl-D" in event.text for event in events if isinstance(event, Notice))


def test_a_mistake_or_an_interruption_ends_an_answer_and_not_the_conversation(make_run):
    def interrupt(event, seen=[]):  # noqa: B006 - counts over the calls
        if isinstance(event, TextGenerated) and not event.final:
            seen.append(event)
            if len(seen) == 3:
                raise KeyboardInterrupt

    result, events = talk(
        ["Tell me", "Go on", "/adapter /none", "x " * 600, "/nonsense", "/exit", "never read"],
        adapter=str(make_run(0, CHAT)),
        report=interrupt,
    )
    assert [row["prompt"][-1]["content"] for row in result.answers] == ["Go on"]
    assert len(result.answers[0]["prompt"]) == 3  # the interrupted answer is part of the history
    cautions = [event.text for event in events if isinstance(event, Caution)]
    assert len([text for text in cautions if "no adapter in /none" in text]) == 1
    assert len([text for text in cautions if "reads at most 512" in text]) == 1
    assert len([text for text in cautions if "/nonsense is no command" in text]) == 1


def test_that_a_model_of_single_prompts_remembers_nothing_and_that_answers_were_cut_is_said(make_run):
    run = str(make_run(formatting=PAIR))
    result, events = talk(["Hello", "Hello"], adapter=run)
    assert result.answers[0]["prompt_tokens"] == result.answers[1]["prompt_tokens"]
    assert any("without those before" in event.text for event in events if isinstance(event, Notice))
    result, events = ask(["x " * 235], adapter=run, max_new_tokens=100)
    (answer,) = result.answers
    assert answer["finish"] == "length" and answer["new_tokens"] < 100
    assert any(event.text.startswith("1 answer ended where") for event in events if isinstance(event, Notice))


def test_an_empty_answer_is_said_to_be_one(make_run, monkeypatch):
    monkeypatch.setattr(GenerationSession, "end_ids", lambda *_: set(range(512)))
    result, events = ask(["Hello"], adapter=str(make_run(formatting=PAIR)))
    assert result.answers[0]["answer"] == ""
    assert "1 answer is empty: the model ended before it said anything." in [
        event.text for event in events if isinstance(event, Notice)
    ]
