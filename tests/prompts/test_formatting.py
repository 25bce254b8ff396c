"""Formatting: what is trained, where rows end, and the same prompt in training and at generation, for every shape."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.core.prompts.chat_template import FALLBACK_TEMPLATE
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.prompts.formatting import (
    Blank,
    Formatting,
    RowFormatter,
    default_formatting,
    format_prompt,
    template_to_serve,
)
from qlora_cli.core.prompts.prompt_template import BadField, PromptTemplate
from qlora_cli.errors import DataError, UsageError
from tests.prompts import chat_templates
from tests.prompts.small_tokenizers import CHATML, KINDS, byte_level, sentencepiece_like

PAIR = Formatting(
    format="prompt",
    prompt_column="question",
    completion_column="answer",
    template="### Question:\n{question}\n\n### Answer: {answer}",
)
TEXT = Formatting(format="text", column="text")
CHAT = Formatting(format="chat", column="messages", template=FALLBACK_TEMPLATE)

# Letters, spaces at either end, line ends, other scripts, and control tokens that somebody typed.
TYPED = st.lists(
    st.sampled_from(
        [
            "word",
            "a",
            " ",
            "  ",
            "\n",
            "7",
            "é",
            "東",
            "🙂",
            "</s>",
            "<s>",
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
        ]
    ),
    max_size=8,
).map("".join)
FILLED = TYPED.filter(lambda text: text.strip())


def row_of(formatting, tokenizer, record, train_on="completion"):
    """(ids, trained) of one record."""
    encoder = encoder_of(tokenizer)
    rows = RowFormatter(formatting, encoder).format_records([record], train_on)[0]
    assert isinstance(rows, list), rows
    (runs,) = rows
    encoded = encoder.encode_rows([runs])[0]
    ids = [token for run in encoded for token in run]
    trained = [flag for run, (_, flag) in zip(encoded, runs, strict=True) for _ in run]
    return ids, trained


def trained_text(tokenizer, ids, trained):
    return tokenizer.decode([token for token, flag in zip(ids, trained, strict=True) if flag])


def check_row(tokenizer, ids, trained):
    encoder = encoder_of(tokenizer)
    assert ids[-1] == encoder.spec.eos_id
    assert trained[-1]
    prefix = list(encoder.spec.prefix_ids)
    assert ids[: len(prefix)] == prefix
    assert not prefix or prefix[0] not in ids[1:]  # exactly one BOS


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(question=TYPED, answer=FILLED)
def test_prompt_rows_train_the_answer_and_share_their_prompt_with_generation(kind, question, answer):
    tokenizer = KINDS[kind]()
    record = {"question": question, "answer": answer}
    ids, trained = row_of(PAIR, tokenizer, record)
    check_row(tokenizer, ids, trained)
    prompt = format_prompt(question, PAIR, tokenizer)
    assert prompt == format_prompt({"question": question}, PAIR, tokenizer)
    assert ids[: len(prompt)] == prompt
    assert trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    ids_all, trained_all = row_of(PAIR, tokenizer, record, "all")
    assert ids_all == ids  # the boundary stays where generation needs it
    assert sum(trained_all) == len(ids) - len(encoder_of(tokenizer).spec.prefix_ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(text=FILLED)
def test_text_rows_train_everything_and_share_their_ids_with_generation(kind, text):
    tokenizer = KINDS[kind]()
    ids, trained = row_of(TEXT, tokenizer, {"text": text}, "all")
    check_row(tokenizer, ids, trained)
    assert format_prompt(text, TEXT, tokenizer) == ids[:-1]
    assert sum(trained) == len(ids) - len(encoder_of(tokenizer).spec.prefix_ids)


@pytest.mark.parametrize("kind", ["llama", "llama_legacy", "byte_level", "neox"])
@settings(max_examples=20, deadline=None)
@given(contents=st.lists(st.tuples(TYPED, FILLED), min_size=1, max_size=3), system=st.none() | FILLED)
def test_chats_train_every_answer_and_share_every_prompt_with_generation(kind, contents, system):
    tokenizer = KINDS[kind]()
    encoder = encoder_of(tokenizer)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in contents:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    template = CHATML if kind == "byte_level" else FALLBACK_TEMPLATE
    formatting = replace(CHAT, template=template)
    ids, trained = row_of(formatting, tokenizer, {"messages": messages})
    check_row(tokenizer, ids, trained)
    expected = [False] * len(ids)
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = format_prompt(messages[:position], formatting, tokenizer)
            assert ids[: len(prompt)] == prompt
            end = ids.index(encoder.spec.eos_id, len(prompt)) + 1
            expected[len(prompt) : end] = [True] * (end - len(prompt))
            if kind in ("byte_level", "neox"):
                assert tokenizer.decode(ids[len(prompt) : end - 1]) == message["content"]
    assert trained == expected
    last = row_of(formatting, tokenizer, {"messages": messages}, "last")
    assert last[0] == ids
    assert last[1] == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_sharegpt_and_plain_messages_are_the_same():
    tokenizer = byte_level()
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    given_ = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    assert row_of(CHAT, tokenizer, {"messages": plain}) == row_of(CHAT, tokenizer, {"messages": given_})
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, plain[1]]
    assert row_of(CHAT, tokenizer, {"messages": plain}) == row_of(CHAT, tokenizer, {"messages": parts})


def test_spaces_before_an_answer_belong_to_the_answer():
    """' Paris' is a token models know; ' ' and 'Paris' are not how they were pretrained."""
    tokenizer = sentencepiece_like()
    encoder = encoder_of(tokenizer)
    record = {"question": "Where?", "answer": "the fox"}
    (runs,) = RowFormatter(PAIR, encoder).format_records([record], "completion")[0]
    assert runs[-2:] == [(" the fox", True), (encoder.spec.eos_id, True)]
    assert runs[-3] == ("### Question:\nWhere?\n\n### Answer:", False)


def test_an_empty_optional_column_takes_its_heading_along():
    formatting = Formatting(
        format="prompt",
        prompt_column="instruction",
        completion_column="output",
        optional_column="input",
        template="{instruction}\nWith: {input}\n> {output}",
        template_without_optional="{instruction}\n> {output}",
    )
    tokenizer = byte_level()
    for value in ("", "  ", None):
        ids, trained = row_of(formatting, tokenizer, {"instruction": "Add", "input": value, "output": "3"})
        assert tokenizer.decode(ids) == "Add\n> 3<|im_end|>"
        assert format_prompt("Add", formatting, tokenizer) == ids[: trained.index(True)]
    ids, trained = row_of(formatting, tokenizer, {"instruction": "Add", "input": "1 2", "output": "3"})
    assert tokenizer.decode(ids) == "Add\nWith: 1 2\n> 3<|im_end|>"
    assert format_prompt({"instruction": "Add", "input": "1 2"}, formatting, tokenizer) == ids[: trained.index(True)]


def test_control_tokens_of_the_template_itself_are_control_tokens_and_come_once():
    tokenizer = sentencepiece_like()
    formatting = replace(PAIR, template="<s>[INST] {question} [/INST] {answer} </s>\n")
    ids, trained = row_of(formatting, tokenizer, {"question": "a </s>", "answer": "b <s>"})
    check_row(tokenizer, ids, trained)
    assert ids.count(encoder_of(tokenizer).spec.eos_id) == 1
    assert tokenizer.decode(ids) == "<s> [INST] a </s> [/INST] b <s> </s>"


def test_texts_formatted_beforehand_keep_their_control_tokens():
    tokenizer = sentencepiece_like()
    formatting = replace(TEXT, markup=True)
    text = "<s>[INST] fox [/INST] dog </s><s>[INST] a [/INST] b </s>"
    ids, _ = row_of(formatting, tokenizer, {"text": text}, "all")
    assert ids.count(1) == 2
    assert ids.count(2) == 2
    assert ids[-1] == 2
    prompt = "<s>[INST] fox [/INST] dog </s>"
    assert format_prompt(prompt, formatting, tokenizer) == ids[: ids.index(2) + 1]


def test_markup_prompts_keep_their_last_line_end():
    tokenizer = byte_level()
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = format_prompt(prompt, replace(TEXT, markup=True), tokenizer)
    assert tokenizer.decode(ids) == prompt


@pytest.mark.parametrize(
    ("template", "column", "message"),
    [
        ("{question}", "answer", r"must hold the completion \{answer\} once"),
        ("{answer} {answer}", "answer", "once"),
        ("{answer", "answer", "malformed"),
        ("{} {answer}", "answer", "no plain column name"),
        ("{question!r} {answer}", "answer", "no plain column name"),
        ("{question:>8} {answer}", "answer", "no plain column name"),
    ],
)
def test_faulty_templates_are_refused(template, column, message):
    with pytest.raises(UsageError, match=message) as error:
        PromptTemplate(template, column, encoder_of(byte_level()))
    assert "--template" in error.value.hint


def test_braces_can_be_written():
    tokenizer = byte_level()
    ids, _ = row_of(replace(PAIR, template="{{{question}}} -> {answer}"), tokenizer, {"question": "q", "answer": "a"})
    assert tokenizer.decode(ids) == "{q} -> a<|im_end|>"


@pytest.mark.parametrize(
    ("formatting", "record", "message"),
    [
        (PAIR, {"question": "q"}, "field 'answer' is missing (it has 'question')"),
        (PAIR, {"question": None, "answer": "a"}, "field 'question' is null, not text"),
        (PAIR, {"question": "q", "answer": 4}, "field 'answer' is a number, not text"),
        (PAIR, {"question": ["q"], "answer": "a"}, "field 'question' is a list, not text"),
        (TEXT, {"text": True}, "field 'text' is true or false, not text"),
        (TEXT, {"text": {"a": 1}}, "field 'text' is an object, not text"),
        (
            CHAT,
            {"messages": "hi"},
            "field 'messages': is text, no list of messages, nor turns under names like 'Human:' and 'Assistant:'",
        ),
        (CHAT, {"messages": []}, "field 'messages': has no messages"),
        (CHAT, {"messages": [1]}, "field 'messages': message 1 is a number, not an object"),
        (CHAT, {"messages": [{"content": "hi"}]}, "field 'messages': message 1 has no role"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]},
            "field 'messages': the 'content' of message 2 is null, not text",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "field 'messages': message 1 holds a part of the type 'image', which is no text",
        ),
        (CHAT, {"other": 1}, "field 'messages' is missing (it has 'other')"),
    ],
)
def test_wrong_fields_are_named_with_what_they_hold(formatting, record, message):
    reason = RowFormatter(formatting, encoder_of(byte_level())).format_records([record], "completion")[0]
    assert isinstance(reason, BadField)
    assert str(reason) == message


@pytest.mark.parametrize(
    ("formatting", "record", "reason"),
    [
        (PAIR, {"question": "q", "answer": " \n"}, "empty completion"),
        (TEXT, {"text": ""}, "empty text"),
        (CHAT, {"messages": [{"role": "user", "content": "q"}]}, "no answer"),
        (CHAT, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, "no answer"),
    ],
)
def test_rows_with_nothing_to_train_say_why(formatting, record, reason):
    blank = RowFormatter(formatting, encoder_of(byte_level())).format_records([record], "completion")[0]
    assert isinstance(blank, Blank)
    assert str(blank) == reason


def test_messages_that_nobody_answers_are_left_out_and_counted():
    formatter = RowFormatter(CHAT, encoder_of(byte_level()))
    answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    more = {"messages": [*answered, {"role": "user", "content": "c"}]}
    assert formatter.format_records([more], "completion") == formatter.format_records(
        [{"messages": answered}], "completion"
    )
    assert formatter.counts["unanswered"] == 1


def test_a_formatting_survives_json():
    formatting = Formatting(format="chat", column="messages", template=chat_templates.DATED, date="2024-02-29")
    assert Formatting.from_dict(json.loads(json.dumps(formatting.to_dict()))) == formatting
    assert Formatting.from_dict({**TEXT.to_dict(), "new": 1}) == TEXT


def test_without_a_record_the_models_own_template_is_used_or_raw_text():
    assert default_formatting(byte_level()) == Formatting(format="chat", column="messages", template=CHATML)
    assert default_formatting(sentencepiece_like()) == TEXT
    ids = format_prompt("Hi", default_formatting(byte_level()), byte_level())
    assert byte_level().decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(None), sentencepiece_like()])
def test_others_write_a_prompt_as_it_was_trained_by_the_template_that_goes_with_the_model(tokenizer):
    asked = [{"role": "user", "content": "Why?"}]
    own = default_formatting(tokenizer)
    assert template_to_serve(own, tokenizer) is template_to_serve(PAIR, tokenizer) is None
    served = template_to_serve(CHAT, tokenizer)
    ids = tokenizer.apply_chat_template(asked, chat_template=served, add_generation_prompt=True, return_dict=False)
    assert ids == format_prompt("Why?", CHAT, tokenizer)
    assert template_to_serve(replace(CHAT, template="{{ bos_token }}{{ messages }}"), tokenizer).count("bos_token") == 1
    style = {"style": 'It\'s "plain".', "thinks": False, "depth": None}
    said = replace(CHAT, template="\n{{ style }}{{ thinks }}{{ depth }}" + FALLBACK_TEMPLATE, template_settings=style)
    served = template_to_serve(said, tokenizer)
    ids = tokenizer.apply_chat_template(asked, chat_template=served, add_generation_prompt=True, return_dict=False)
    assert ids == format_prompt("Why?", said, tokenizer)
    given = tokenizer.apply_chat_template(asked, chat_template=served, tokenize=False, style="Other.")
    assert "Other." in given and "plain" not in given
    if own.format == "chat":
        told = template_to_serve(replace(own, template_settings={"enable_thinking": False}), tokenizer)
        assert "set enable_thinking = false" in told and told.endswith(own.template)


@pytest.mark.parametrize(
    ("formatting", "prompt", "message"),
    [
        (PAIR, [{"role": "user", "content": "q"}], "conversation"),
        (PAIR, {"text": "q"}, "'question' is missing"),
        (replace(PAIR, template="{context} {question} {answer}"), "q", "several fields.*'context', 'question'"),
        (CHAT, {"text": "q"}, "no 'messages'"),
        (TEXT, "a \udcff", "UTF-8"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(formatting, prompt, message):
    with pytest.raises(DataError, match=message):
        format_prompt(prompt, formatting, byte_level())


def test_a_conversation_that_ends_in_its_answer_is_asked_without_it():
    """As rows of the data do: the answer in columns of their own is not given to the model either."""
    tokenizer = byte_level()
    question, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    asked = format_prompt([question, answer, question], CHAT, tokenizer)
    assert format_prompt([question, answer, question, answer, answer], CHAT, tokenizer) == asked
    with pytest.raises(DataError, match="has no question"):
        format_prompt([answer], CHAT, tokenizer)


def test_an_object_may_call_its_prompt_prompt():
    tokenizer = byte_level()
    for formatting in (PAIR, TEXT, CHAT):
        assert format_prompt({"prompt": "hi"}, formatting, tokenizer) == format_prompt("hi", formatting, tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    assert format_prompt({"prompt": messages}, CHAT, tokenizer) == format_prompt(messages, CHAT, tokenizer)


def test_a_prompt_of_tokens_is_taken_as_it_is():
    tokenizer = sentencepiece_like()
    tokens = Formatting(format="tokens", column="input_ids")
    assert format_prompt({"input_ids": [1, 300, 301]}, tokens, tokenizer) == [1, 300, 301]
    assert format_prompt("the fox", tokens, tokenizer) == format_prompt("the fox", TEXT, tokenizer)


def test_a_raw_prompt_with_variables_of_a_chat_template_is_refused():
    from qlora_cli.core.generation.session import RAW, GenerationSession  # torch, which the others do without

    def formatting(*given):
        settings = SimpleNamespace(raw=True, template_setting=given or None)
        return GenerationSession.formatting(SimpleNamespace(settings=settings), None)

    assert formatting() == RAW
    with pytest.raises(UsageError, match="--template-setting is for chats"):
        formatting("enable_thinking=false")


def test_a_variable_that_the_template_does_not_read_is_said_once_of_generation_too():
    from qlora_cli.core.generation.session import GenerationSession  # torch, which the others do without

    said, chat = [], Formatting(format="chat", template="{{ messages }}{{ enable_thinking }}")
    session = SimpleNamespace(
        settings=SimpleNamespace(raw=False, template_setting=("enable_thinkin=false", "enable_thinking=true")),
        source=lambda _: SimpleNamespace(formatting=chat),
        tokenizer_of=lambda _: None,
        report=lambda event: said.append(event.text),
        _said=set(),
    )
    for _ in range(2):
        assert GenerationSession.formatting(session, "out").template_settings["enable_thinking"] is True
    assert said == ["The chat template reads no 'enable_thinkin': that --template-setting does nothing."]
