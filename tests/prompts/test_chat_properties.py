"""Random conversations under random templates: what is said stands in the row, and each answer is trained whole.

A template is built from parts, so that it is known what a row must be; the renderer sees its source alone.
"""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.core.prompts.chat.printer import RenderError
from qlora_cli.core.prompts.chat.renderer import ChatRenderer, Request
from qlora_cli.core.prompts.chat.thoughts import share_names

CONTROLS = ["<|a|>", "<|b|>", "<|c|>", "<|end|>", "<|call|>", "<|last|>"]
WORDS = st.lists(
    st.sampled_from(["yes", "no", " ", "\n", "<|end|>", "<think>", "é", "{{ x }}", "Zq0q", '"q"', "a"]), max_size=5
).map("".join)
TEXTS = WORDS.filter(lambda text: text.strip() and "<think>" not in text)


@st.composite
def templates(draw):
    """(source, facts) of a template."""
    header = draw(st.sampled_from(["<|a|>{}\n", "<|a|>{}<|b|>\n\n", "### {}:\n", "<|{}|>"]))
    if header == "<|{}|>":
        header = "<|c|>{}"
    facts = {
        "header": header,
        "stop": draw(st.sampled_from(["<|end|>", "<|end|>\n", "\n\n", "<|end|><|b|>\n"])),
        "call_stop": draw(st.sampled_from([None, "<|call|>"])),
        "last_stop": draw(st.sampled_from([None, "<|last|>"])),
        "strips": draw(st.booleans()),
        "thoughts": draw(st.sampled_from(["all", "last", "none"])),
        "system": draw(st.sampled_from(["turn", "first", "dropped", "refused"])),
        "opens": draw(st.sampled_from(["", "<think>\n"])),
        "calls": draw(st.sampled_from(["all", "first", "none"])),
    }

    def printed(text):
        return text.replace("\n", "\\n")

    before, after = (printed(part) for part in header.split("{}"))
    content = "(m.content | trim)" if facts["strips"] else "m.content"
    thought = {"all": "m.role == 'assistant'", "last": "m.role == 'assistant' and loop.last", "none": "false"}
    system = {
        "turn": "",
        "first": "{% if m.role == 'system' and not loop.first %}{% continue %}{% endif %}",
        "dropped": "{% if m.role == 'system' %}{% continue %}{% endif %}",
        "refused": "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    }
    calls = {"all": "m.tool_calls or []", "first": "(m.tool_calls or [])[:1]", "none": "[]"}
    stop = f"'{printed(facts['stop'])}'"
    if facts["last_stop"]:
        stop = f"('<|last|>' if loop.last and m.role == 'assistant' else {stop})"
    if facts["call_stop"]:
        stop = f"('<|call|>' if m.tool_calls else {stop})"
    source = (
        "{% for m in messages %}"
        + system[facts["system"]]
        + f"{{{{ '{before}' + m.role + '{after}' }}}}"
        + f"{{% if {thought[facts['thoughts']]} and m.reasoning_content %}}{{{{ '<t>' + m.reasoning_content + '</t>' }}}}{{% endif %}}"
        + f"{{{{ {content} }}}}"
        + f"{{% for c in {calls[facts['calls']]} %}}{{{{ '[' + c.function.name + (c.function.arguments | tojson) + ']' }}}}{{% endfor %}}"
        + f"{{{{ {stop} }}}}{{% endfor %}}"
        + f"{{% if add_generation_prompt %}}{{{{ '{before}assistant{after}{printed(facts['opens'])}' }}}}{{% endif %}}"
    )
    return source, facts


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        answer = {"role": "assistant", "content": draw(TEXTS)}
        if draw(st.booleans()):
            answer["reasoning"] = draw(TEXTS)
        if draw(st.integers(0, 3)) == 0:
            arguments = st.dictionaries(st.sampled_from(["k", "n"]), WORDS | st.integers(0, 9), max_size=2)
            answer["tool_calls"] = [
                {"type": "function", "function": {"name": f"f{i}", "arguments": draw(arguments)}}
                for i in range(draw(st.integers(1, 2)))
            ]
        messages.append(answer)
        if draw(st.integers(0, 3)) == 0:
            messages.append({"role": "system", "content": draw(TEXTS)})
            messages.append({"role": "user", "content": draw(WORDS)})
            messages.append({"role": "assistant", "content": draw(TEXTS)})
    return [share_names(message) for message in messages]


def expected_answer(message, facts):
    """What has to be trained of an answer, but for its stop mark."""
    text = message["content"].strip() if facts["strips"] else message["content"]
    if facts["thoughts"] != "none" and message.get("reasoning_content"):
        text = f"<t>{message['reasoning_content']}</t>{text}"
    printed = {"all": 9, "first": 1, "none": 0}[facts["calls"]]
    for call in message.get("tool_calls", [])[:printed]:
        text += f"[{call['function']['name']}{json.dumps(call['function']['arguments'], ensure_ascii=False)}]"
    return text


def lost_kinds(messages, facts):
    """Kinds of content that a template of these facts does not print."""
    answers = [m for m in messages if m["role"] == "assistant"]
    lost = set()
    if facts["thoughts"] == "none" and any(m.get("reasoning_content") for m in answers):
        lost.add("thought")
    calls = [len(m.get("tool_calls", [])) for m in answers]
    if max(calls) > {"all": 9, "first": 1, "none": 0}[facts["calls"]]:
        lost.add("call")
    return lost


@settings(max_examples=40, deadline=None, derandomize=True)
@given(template=templates(), messages=conversations())
def test_what_is_said_is_in_its_row_and_answers_are_trained_whole(template, messages):
    check_row(template, messages)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(template=templates(), messages=conversations())
def test_it_is_so_for_many_templates_and_conversations(template, messages):
    check_row(template, messages)


def check_row(template, messages):
    source, facts = template
    renderer = ChatRenderer(source, {}, CONTROLS, None)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        rendered = renderer.render(Request(messages, None, {}, tuple(range(len(answers)))))
    except RenderError as error:
        assert "no system" in str(error)
        return
    assert {kind for kind, _ in rendered.faults} == lost_kinds(messages, facts)
    assert rendered.moved == (any(m["role"] == "system" for m in messages) and not _prints_systems(messages, facts))
    trained = []
    for spans, numbers in rendered.rows:
        text = "".join(part for part, _, _ in spans)
        assert not re.search("[\ufdd0-\ufdef]", text)
        held = {number: "".join(part for part, _, turn in spans if turn == number) for number in range(len(answers))}
        trained += numbers
        last = max(number for number, content in held.items() if content)
        for message in messages[: answers[last] + 1]:
            if message["role"] != "assistant":
                assert message["content"].strip() in text
        for number in numbers:
            message = messages[answers[number]]
            own = expected_answer(message, facts)
            assert held[number].startswith(own)
            assert re.fullmatch(r"(\s|<\|\w+\|>)*", held[number][len(own) :])  # nothing but the stop mark follows
            stops = [part for part, control, turn in spans if turn == number and control]
            if "<|" in facts["stop"]:
                assert stops
            if facts["call_stop"] and message.get("tool_calls"):
                assert stops == ["<|call|>"]
            elif facts["last_stop"]:
                assert stops == ["<|last|>"]
    void = {n for n, i in enumerate(answers) if not messages[i]["content"].strip()}
    assert set(trained) | void == set(range(len(answers)))
    assert len(trained) == len(set(trained))


def _prints_systems(messages, facts):
    systems = [i for i, message in enumerate(messages) if message["role"] == "system"]
    return facts["system"] == "turn" or (facts["system"] == "first" and systems == [0])


@settings(max_examples=16, deadline=None, derandomize=True)
@given(template=templates(), messages=conversations())
def test_a_conversation_of_a_known_shape_is_rendered_as_a_new_one(template, messages):
    source, _ = template
    other = [{**m, "content": m["content"].replace("yes", "no")} if "yes" in m["content"] else m for m in messages]
    answers = tuple(range(sum(message["role"] == "assistant" for message in messages)))
    warm, cold = ChatRenderer(source, {}, CONTROLS, None), ChatRenderer(source, {}, CONTROLS, None)
    try:
        warm.render(Request(messages, None, {}, answers))
    except RenderError:
        return
    assert warm.render(Request(other, None, {}, answers)) == cold.render(Request(other, None, {}, answers))


@pytest.mark.parametrize("mode", ["rows", "prompt"])
def test_the_prompt_of_an_answer_is_the_beginning_of_its_row(mode):
    source = "{% for m in messages %}{{ '<|a|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}{% endfor %}{{ '<|a|>assistant\\n' if add_generation_prompt else '' }}"
    renderer = ChatRenderer(source, {}, CONTROLS, None)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ((spans, _),) = renderer.render(Request(messages, None, {}, (0,))).rows
    ((prompt, _),) = renderer.render(Request(messages[:1], mode="prompt")).rows
    assert spans[: len(prompt)] == prompt
