"""The format of data is recognised and named, or taken from flags; what cannot be recognised is asked for."""

import json
import shlex
import subprocess
from copy import deepcopy

import pytest

from qlora_cli.config import PrepareConfig
from qlora_cli.core.prompts.chat_template import FALLBACK_TEMPLATE
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.core.recognition.pairs import read_template
from qlora_cli.core.recognition.recognise import recognise
from qlora_cli.core.records.record import BadField
from qlora_cli.errors import DataError, UsageError
from tests.prompts.small_tokenizers import CHATML, byte_level, sentencepiece_like

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def recognised(records, tokenizer=None, **settings):
    records = records if isinstance(records, list) else [records]
    return recognise(records, PrepareConfig(**settings), encoder_of(tokenizer or sentencepiece_like()))


@pytest.mark.parametrize(
    ("record", "column"),
    [
        ({"text": "a", "id": 3}, "text"),
        ({"quote": "Be", "author": "Oscar Wilde", "tags": ["x"]}, "quote"),
        ({"Text": "a", "title": "longer than that"}, "Text"),
        ({"lyrics": "la " * 30, "title": "Song", "year": 1999}, "lyrics"),
        ({"only": "a"}, "only"),
        ({"question": "a", "text": "b"}, "text"),
    ],
)
def test_text_is_found(record, column):
    found = recognised(record)
    assert found.formatting == Formatting(format="text", column=column)
    assert found.train_on == "all"
    assert repr(column) in found.sentence


@pytest.mark.parametrize(
    ("columns", "prompt", "optional", "completion"),
    [
        (["question", "answer"], "question", None, "answer"),
        (["Completion", "Question"], "Question", None, "Completion"),
        (["instruction", "input", "output"], "instruction", "input", "output"),
        (["instruction", "context", "response", "category"], "instruction", "context", "response"),
        (["prompt", "completion"], "prompt", None, "completion"),
        (["prompt", "response"], "prompt", None, "response"),
        (["query", "response"], "query", None, "response"),
        (["input", "output"], "input", None, "output"),
        (["problem", "solution"], "problem", None, "solution"),
        (["text", "question", "answer"], "question", None, "answer"),
    ],
)
def test_prompt_and_completion_are_found(columns, prompt, optional, completion):
    found = recognised(dict.fromkeys(columns, "words"))
    formatting = found.formatting
    assert (formatting.prompt_column, formatting.optional_column, formatting.completion_column) == (
        prompt,
        optional,
        completion,
    )
    assert formatting.template.endswith(f"{{{completion}}}")
    assert found.train_on == "completion"
    assert (formatting.template_without_optional is not None) == (optional is not None)


def test_the_plain_templates_name_their_parts():
    assert recognised({"question": "q", "answer": "a"}).formatting.template == (
        "### Question:\n{question}\n\n### Answer:\n{answer}"
    )
    alpaca = recognised({"instruction": "q", "input": "i", "output": "a"}).formatting
    assert alpaca.template == "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
    assert alpaca.template_without_optional == "### Instruction:\n{instruction}\n\n### Response:\n{output}"


@pytest.mark.parametrize(
    ("record", "column"),
    [
        ({"messages": MESSAGES, "prompt": "q", "prompt_id": "1"}, "messages"),
        ({"conversations": SHAREGPT, "id": "1"}, "conversations"),
        ({"dialog": MESSAGES}, "dialog"),
        ({"turns": SHAREGPT, "text": "x"}, "turns"),
    ],
)
def test_chats_are_found(record, column):
    found = recognised(record)
    assert (found.formatting.format, found.formatting.template) == ("chat", FALLBACK_TEMPLATE)
    assert found.formatting.conversation.messages == found.formatting.column == column
    assert found.train_on == "completion"
    assert "a plain template (the model has none)" in found.sentence


def test_chats_take_the_models_template_or_the_users(tmp_path):
    assert recognised({"messages": MESSAGES}, byte_level()).formatting.template == CHATML
    path = tmp_path / "mine.jinja"
    path.write_text("{{ 'é' }}", encoding="utf-8")
    found = recognised({"messages": MESSAGES}, byte_level(), chat_template=str(path))
    assert found.formatting.template == "{{ 'é' }}"
    assert str(path) in found.sentence
    with pytest.raises(UsageError, match="cannot be read"):
        recognised({"messages": MESSAGES}, chat_template=str(tmp_path / "absent.jinja"))


def test_a_setting_that_the_chat_template_does_not_read_is_said(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% if enable_thinking %}{{ messages }}{% endif %}", encoding="utf-8")
    given = ("enable_thinkin=false", "enable_thinking=false")
    found = recognised({"messages": MESSAGES}, chat_template=str(path), template_setting=given)
    assert found.remarks == ("The chat template reads no 'enable_thinkin': that --template-setting does nothing.",)


def test_what_every_answer_ends_in_is_its_end_only_if_it_is_a_token_of_the_template_or_of_the_tokenizers_names(
    tmp_path,
):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages }}", encoding="utf-8")
    for typed, is_end in (("<|im_end|>", True), ("<|endoftext|>", True), ("<|im_start|>", False)):
        turns = [MESSAGES[0], {"role": "assistant", "content": f"b{typed}"}]
        found = recognised({"messages": turns}, byte_level(), chat_template=str(path)).formatting.conversation
        assert found.ending == (typed if is_end else None)


def test_tokens_are_found():
    found = recognised({"input_ids": [1, 2], "labels": [-100, 2], "text": "x"})
    assert found.formatting == Formatting(format="tokens", column="input_ids")
    assert "trained where labels are not -100" in found.sentence
    assert "every token trained" in recognised({"input_ids": [1, 2], "labels": [1, 2]}, train_on="all").sentence


def test_a_first_row_in_the_place_of_a_header_is_remarked():
    assert "'A lake is water.': where the file has no header" in recognised({"A lake is water.": "Hills."}).remarks[0]
    assert recognised({"What is a lake? (long)": "Water."}).remarks == ()


def test_texts_formatted_beforehand_are_told_from_typed_tokens():
    ready = [{"text": "<s>[INST] q [/INST] a </s>"}, {"text": "<s>[INST] r [/INST] b </s>\n"}]
    found = recognised(ready)
    assert found.formatting.markup
    assert "formatted beforehand" in found.remarks[0]
    typed = recognised([*ready, {"text": "HTML knows <s>struck</s> words"}])
    assert not typed.formatting.markup
    assert "2 of the first 3 texts stand between" in typed.remarks[0]
    assert "kept as plain text (1 of" in typed.remarks[1]
    assert recognised({"text": "plain"}).remarks == ()


@pytest.mark.parametrize(
    ("row", "marks"),
    [
        ({"text": "<s>[INST] q [/INST] a </s>\n"}, "'<s>', '</s>'"),
        ({"instruction": "q", "output": "a<|eot_id|>"}, "'<|eot_id|>'"),
        ({"instruction": "q", "output": "a<｜end▁of▁sentence｜>"}, "'<｜end▁of▁sentence｜>'"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": "a<end_of_turn>"}]}, "'<end_of_turn>'"),
        ({"prompt": "<start_of_turn>q<end_of_turn>", "completion": "a"}, "'<start_of_turn>', '<end_of_turn>'"),
    ],
)
def test_control_tokens_of_other_models_are_said_to_be_letters(row, marks, tmp_path):
    (said,) = recognised([row, {**row, **dict.fromkeys(row.keys() - {"messages"}, "plain")}], byte_level()).remarks
    asks = "<start_of_turn>" in marks
    assert f"begin or end in {marks}, which this tokenizer does not have" in said
    assert ("lists of messages" in said) == asks and ("sed 's#" in said) == (not asks)
    if not asks:
        lines = [json.dumps(row), json.dumps(row, ensure_ascii=False), json.dumps(row).replace("/", r"\/")]  # as pandas
        (tmp_path / "DATA.jsonl").write_text("\n".join(lines))
        subprocess.run(said[said.index("sed '") :], shell=True, check=True, cwd=tmp_path)
        clean = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
        assert len(clean) == 3 and recognised(clean, byte_level()).remarks == ()


@pytest.mark.parametrize(
    ("row", "said", "clean"),
    [
        (
            {"messages": [{"role": "user", "content": "<image>\nWhat?"}, MESSAGES[1]]},
            "begin or end in '<image>', of",
            0,
        ),
        ({"question": r"One.\nTwo", "answer": r"- a\n- b\n\nC"}, r"hold line ends as two letters, \n, and none", 1),
        ({"prompt": "q", "completion": "a", "label": 0}, "Column 'label' holds 0 and 1", None),
    ],
)
def test_letters_that_stand_for_something_else_are_remarked(row, said, clean, tmp_path):
    (remark,) = (remark for remark in recognised([row, {**row, "label": 1}]).remarks if said in remark)
    if clean is not None:
        (tmp_path / "DATA.jsonl").write_text(json.dumps(row) + "\n")
        command = remark[max(remark.find("sed '"), remark.find("grep -v")) :]
        subprocess.run(command, shell=True, check=bool(clean), cwd=tmp_path)
        rows = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
        assert len(rows) == clean and not any(said in remark for row in rows for remark in recognised(row).remarks)


@pytest.mark.parametrize("answer", [r"""printf("%d\n"); s.split('\n')""", r'{"a": "One.\nTwo"}'])
def test_line_ends_in_code_and_json_are_no_remark(answer):
    assert recognised({"question": "Print.", "answer": answer}).remarks == ()


def test_a_heading_at_the_end_of_prompts_is_remarked_where_the_answer_follows_it():
    row = {"instruction": "Q: A lake?\nA:", "input": "", "output": "Chiemsee."}
    assert "Every prompt ends like 'A:'" in recognised(row).remarks[0]
    assert recognised([row, {**row, "input": "Of Bavaria."}]).remarks == ()


@pytest.mark.parametrize(
    "prompt", ["Human: q\n\nAssistant:", "### Instruction:\nq\n\n### Response:\n", "[INST] q [/INST]"]
)
def test_prompts_that_end_in_the_heading_of_their_answer_can_stand_as_they_are(prompt):
    record = {"prompt": prompt, "chosen": " a", "rejected": " b"}
    found = recognised(record, byte_level())
    remark = next(remark for remark in found.remarks if "as if formatted beforehand" in remark)
    flag = shlex.split(remark[remark.index("--template") :])[1]
    assert recognised(record, byte_level(), template=flag).formatting.template == "{prompt}{chosen}"
    plain = recognised({**record, "prompt": "Which response: a or b?"}, byte_level()).remarks
    assert [other for other in found.remarks if other != remark] == [*plain]


@pytest.mark.parametrize(
    "texts",
    [[r"$\nabla \neq \nu$"], [r"printf '%s\n' a", "ls", "cd", "pwd"], ["a\nb", r"One.\nTwo"], ["An <image> tag"]],
)
def test_formulas_commands_and_tags_are_not_remarked(texts):
    assert recognised([{"text": text} for text in texts]).remarks == ()


def test_marks_of_the_models_own_template_and_within_texts_are_not_remarked(tmp_path):
    named = recognised({"q": "x", "a": "y"}, template="<|im_start|>user\n{q}<|im_end|>\n{a}<|im_end|>").remarks
    assert "The template prints '<|im_start|>', '<|im_end|>', which" in named[0]
    (tmp_path / "chatml.jinja").write_text(CHATML)
    flags = {"chat_template": str(tmp_path / "chatml.jinja")}
    assert "prints '<|im_start|>', '<|im_end|>', which" in recognised({"messages": MESSAGES}, **flags).remarks[0]
    assert recognised({"messages": MESSAGES}, byte_level(), **flags).remarks == ()
    for text in ("HTML strikes <s>words</s> so", "<|begin_of_thought|>a<|end_of_thought|>"):
        assert recognised({"text": text}, byte_level()).remarks == ()
    zephyr = deepcopy(byte_level())
    zephyr.chat_template = "{{ '<|user|>' + messages[0].content }}"
    assert recognised({"text": "<|user|>q"}, zephyr).remarks == ()


def test_flags_state_the_shape():
    record = {"question": "q", "answer": "a", "text": "t", "chat": MESSAGES, "input_ids": [1]}
    assert recognised(record, text_column="answer").formatting == Formatting(format="text", column="answer")
    assert recognised(record, messages_column="chat").formatting.column == "chat"
    assert recognised(record, format="text").formatting.column == "text"
    assert recognised(record, format="tokens").formatting.column == "input_ids"
    pair = recognised(record, prompt_column="text", completion_column="question").formatting
    assert pair.template == "### Text:\n{text}\n\n### Question:\n{question}"
    assert recognised(record, format="prompt").formatting.prompt_column == "question"
    assert recognised(record, completion_column="text").formatting.prompt_column == "question"


def test_a_template_states_columns():
    record = {"title": "t", "body": "b", "answer": "a"}
    template = "{title}: {body}\\n> {answer}"
    found = recognised(record, template=template).formatting
    assert found.template == "{title}: {body}\n> {answer}"
    assert (found.prompt_column, found.completion_column) == ("title", "answer")
    named = recognised(record, template="{answer} {body}", completion_column="answer").formatting
    assert (named.prompt_column, named.completion_column) == ("body", "answer")
    assert recognised(record, template="{answer} {title}").formatting.completion_column == "title"


def test_a_template_may_be_a_file(tmp_path):
    path = tmp_path / "qa.txt"
    path.write_text("Q: {q}\\\nA: {a}\n", encoding="utf-8")
    assert read_template(str(path)) == "Q: {q}\\\nA: {a}"
    assert read_template("Q: {q}\\n\\tA: {a}") == "Q: {q}\n\tA: {a}"


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"text_column": "qeustion"}, "no column 'qeustion'; the data has 'question', 'answer', 'n'", "--text-column question"),
        ({"text_column": "zzz"}, "no column 'zzz'", "Choose one of them for --text-column"),
        ({"prompt_column": "Question"}, "no column 'Question'", "--prompt-column question"),
        ({"completion_column": "answers"}, "no column 'answers'", "--completion-column answer"),
        ({"messages_column": "x"}, "no column 'x'", "--messages-column"),
        ({"template": "{question} {anwser}"}, "no column 'anwser'", "answer"),
        ({"template": "no field"}, "no {column} field", "'question', 'answer'"),
        ({"format": "tokens"}, "no column 'input_ids'", None),
        ({"text_column": "answer", "prompt_column": "question"}, "--text-column and --prompt-column contradict", "one format"),
        ({"format": "chat", "template": "{answer}"}, "--format and --template contradict", None),
        ({"text_column": "answer", "train_on": "completion"}, "--train-on completion needs a completion", "--prompt-column"),
        ({"prompt_column": "n", "completion_column": "n"}, "are not recognised", "--prompt-column and --completion-column"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_say_what_to_type(settings, message, hint):
    with pytest.raises(UsageError) as error:
        recognised({"question": "q", "answer": "a", "n": 1}, **settings)
    assert message in error.value.message
    assert hint is None or hint in error.value.hint


def test_what_cannot_be_told_is_asked_for():
    with pytest.raises(DataError, match="Several columns could be the text: 'left', 'right'") as error:
        recognised({"left": "words and words", "right": "words, words"})
    assert "--text-column left" in error.value.hint
    long_questions = {"prompt": "words and words and words", "my answer": "words", "id": "4"}
    with pytest.raises(DataError, match="named like a question"):
        recognised({"Question ": "words and words and words", "Answer ": "words"})
    with pytest.raises(
        DataError, match="'prompt' is named like a question, and no other like its answer: 'my answer'"
    ) as error:
        recognised(long_questions)
    assert "--prompt-column prompt --completion-column 'my answer'" in error.value.hint
    for settings in ({"format": "text"}, {"text_column": "prompt"}):
        assert recognised(long_questions, **settings).formatting.column == "prompt"
    with pytest.raises(DataError, match="No column holds text; the data has 'n'"):
        recognised({"n": 1})
    for text, reason in (
        ("[{'a': {1}}]", "neither JSON nor a Python list"),
        ('[{"a": "b"}]', "something else"),
        ('["\\ud83d"]', "half a surrogate pair"),
    ):
        with pytest.raises(DataError, match=f"'messages' seems to hold messages as text, which .*{reason}"):
            recognised({"messages": text})
    with pytest.raises(UsageError, match="No column holds chat messages"):
        recognised({"n": 1}, format="chat")
    with pytest.raises(UsageError, match="--train-on last is for chats"):
        recognised({"input_ids": [1]}, train_on="last")


PICTURE = {"bytes": "iVBORw0KGgo", "path": "cat.png"}  # as `datasets` stores it


@pytest.mark.parametrize(
    ("record", "what", "flags"),
    [
        ({"messages": MESSAGES, "images": [PICTURE]}, "'images' holds an image", "--messages-column messages"),
        ({"text": "A cat.", "shown": {"bytes": b"\x89PNG\r\n"}}, "'shown' holds an image", "--text-column text"),
        ({"text": "A cat.", "file_name": "train/0001.jpg"}, "'file_name' holds an image", "--text-column text"),
        ({"conversations": SHAREGPT, "image": "coco/1.jpg"}, "'image' holds an image", "--messages-column conversations"),
        ({"question": "q", "answer": "a", "video_path": "clips/one"}, "'video_path' holds a video",
         "--prompt-column question --completion-column answer"),
        ({"text": "Good day.", "audio": {"array": [0.1], "sampling_rate": 8000}}, "'audio' holds a sound", "--text-column"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:], "Image": "data:image/png;base64,iVBORw0KGgo"},
         "'Image' holds an image", "--prompt-column prompt --completion-column completion"),
        ({"input_ids": [1, 2], "pixel_values": [[0.1, 0.2]]}, "'pixel_values' holds an image", "--format tokens"),
    ],
)  # fmt: skip
def test_images_beside_the_text_are_refused_unless_the_text_is_named(record, what, flags):
    with pytest.raises(DataError) as error:
        recognised(record)
    assert error.value.message == f"Column {what} beside the text, and only text is read."
    assert flags in error.value.hint and "--on-bad-row skip" in error.value.hint
    given = flags.replace("--text-column", "--text-column text").replace("text text", "text").split()
    named = {flag[2:].replace("-", "_"): name for flag, name in zip(given[::2], given[1::2], strict=True)}
    assert not recognised(record, **named).rules.media


def test_rows_that_hold_an_image_are_told_from_those_that_hold_none():
    none = {"text": "A lake.", "image": None, "images": [], "image_count": 2, "image_caption": "water", "img_id": "7"}
    found = recognised([none, none])
    assert found.rules.apply(none) is none
    with pytest.raises(BadField, match="field 'images' holds an image, and only text is read"):
        found.rules.apply(none | {"images": [PICTURE]})
    skipped = recognised([none | {"image": "a.png"}, none], on_bad_row="skip")
    with pytest.raises(BadField, match="field 'image' holds an image"):
        skipped.rules.apply(none | {"image": "a.png"})
