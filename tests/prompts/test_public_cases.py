"""Faults that users of other trainers reported, as a table; and each rule that mends one is needed: without it the table fails."""

import pytest

from qlora_cli.core.prompts.chat import check, control_marks, parts, plan, printer, renderer, skeleton, thoughts
from qlora_cli.core.prompts.chat.printer import RenderError
from qlora_cli.core.prompts.chat.renderer import ChatRenderer, Request
from qlora_cli.core.records.conversation import ConversationColumns, read_conversation
from qlora_cli.core.records.record import BadField

CONTROLS = ["<|s|>", "<|e|>", "<|call|>", "<|return|>", "<|user|>", "<|assistant|>", "<|tool|>", "</call>"]
ASK = "{% if add_generation_prompt %}{{ '<|s|>assistant\n' }}{% endif %}"
TURN = "{% for m in messages %}{{ '<|s|>' + m.role + '\n' + m.content + '<|e|>\n' }}{% endfor %}"
PLAIN = TURN + ASK
CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|s|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + (c.function.arguments | tojson) + '</c>' }}{% endfor %}"
    "{{ '<|e|>\n' }}{% endfor %}" + ASK
)
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ '<|s|>system\n' + messages[0].content + '<|e|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role in ('user', 'assistant') %}{{ '<|s|>' + m.role + '\n' + m.content + '<|e|>\n' }}{% endif %}{% endfor %}"
    + ASK
)
LATE_SYSTEM = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '<|s|>' + (messages[0].content + '|' if loop.last and messages[0].role == 'system' else '') + m.content + '<|e|>' }}"
    "{% else %}{{ ' ' + m.content + '<|return|>' }}{% endif %}{% endfor %}"
)
FORGETS = (
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1].strip() if not loop.last else m.content %}"
    "{{ '<|s|>' + m.role + '\n' + text + '<|e|>\n' }}{% endfor %}" + ASK
)
UNCLOSED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{% endfor %}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else '' }}"
)
MARK_OF_CALLS = CALLS.replace("'<|e|>\n'", "'<|call|>' if m.tool_calls else '<|e|>\n'")
RETURNS = TURN.replace("'<|e|>\n'", "('<|return|>' if loop.last and m.role == 'assistant' else '<|e|>\n')") + ASK
LAST_MARK = TURN.replace("'<|e|>\n'", "('<|return|>' if loop.last else '<|e|>\n')") + ASK
TWO_PARTS = (
    "{% for m in messages %}{% if m.thinking %}{{ '<|s|>assistant think\n' + m.thinking + '<|e|>' }}{% endif %}"
    "{{ '<|s|>' + m.role + ' says\n' + m.content + '<|e|>' }}{% endfor %}{{ '<|s|>assistant ' if add_generation_prompt else '' }}"
)
OWN_BLOCK = (
    "{% for m in messages %}{{ '<|s|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}"
    "{% endif %}{{ m.content + '<|e|>\n' }}{% endfor %}" + ASK
)
OPENED = (
    "{% for m in messages %}{{ '<|s|>' + m.role + '\n' }}{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' %}{% if '<think>' in text and '</think>' in text %}{% set thought = text.split('</think>')[0][7:] %}"
    "{% set text = text.split('</think>')[1].strip() %}{% endif %}{{ '<think>\n' + thought.strip() + '\n</think>\n\n' }}{% endif %}"
    "{{ text + '<|e|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|s|>assistant\n<think>\n' }}{% endif %}"
)
WRAPPED = CALLS.replace(
    "m.content or ''", "'<result>' + m.content + '</result>' if m.role == 'tool' else m.content or ''"
)
NO_THINKING = (
    TURN
    + ASK
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
)
TEXT_ARGUMENTS = CALLS.replace("(c.function.arguments | tojson)", "c.function.arguments")
LOOKS_AT_WORDS = TURN.replace("m.content +", "(m.content if 'secret' not in m.content else 'SECRET') +") + ASK
JSON = (
    "{{ tools | tojson(true) ~ tools | tojson(separators=(',', ':')) ~ tools | tojson(sort_keys=true) ~ documents }}"
    + PLAIN
)


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(arguments, name="depth"):
    return {"id": "call-1234", "type": "function", "function": {"name": name, "arguments": arguments}}


CALL = says(None, tool_calls=[call({"lake": "Chiemsee", "n": 1})])
RESULT = {"role": "tool", "content": "73 m"}
TOOL = {"type": "function", "function": {"name": "depth", "description": "Deep", "parameters": {}}}
THINKS = [user("2?"), says("<think>add</think>Four."), user("3?"), says("<think>again</think>Six.")]
NAMED = [user("2?"), says("Four.", reasoning="add"), user("3?"), says("Six.", reasoning="again")]

# what · template · record · thoughts · each row, trained parts in brackets, or what is said
CASES = [
    ("a call ends in its own mark, and the result is not trained", MARK_OF_CALLS, [user("?"), CALL, RESULT, says("73.")], "keep",
     ['<|s|>user\n?<|e|>\n<|s|>assistant\n[[<call>depth{"lake": "Chiemsee", "n": 1}</c><|call|>]]<|s|>tool\n73 m<|e|>\n<|s|>assistant\n[[73.<|e|>]]']),
    ("the stop that has to be said is the next header", UNCLOSED, [user("?"), CALL, RESULT, says("73."), user("!"), says("x")], "keep",
     ['<|user|>?<|assistant|>[[<call>depth{"lake": "Chiemsee", "n": 1}</call><|tool|>]]73 m<|assistant|>[[73.<|user|>]]!<|assistant|>[[x]]']),
    ("so it is at the end", UNCLOSED, [user("?"), CALL], "keep",
     ['<|user|>?<|assistant|>[[<call>depth{"lake": "Chiemsee", "n": 1}</call><|tool|>]]']),
    ("the last answer ends otherwise than earlier ones do", RETURNS, [user("?"), says("a"), user("!"), says("b")], "keep",
     ["<|s|>user\n?<|e|>\n<|s|>assistant\n[[a<|return|>]]",
      "<|s|>user\n?<|e|>\n<|s|>assistant\na<|e|>\n<|s|>user\n!<|e|>\n<|s|>assistant\n[[b<|return|>]]"]),
    ("the prompt ends otherwise than the question does before its answer", LAST_MARK, [user("?"), says("a")], "keep",
     ["<|s|>user\n?<|return|><|s|>assistant\n[[a<|return|>]]"]),
    ("an answer in two parts", TWO_PARTS, NAMED, "keep",
     ["<|s|>user says\n2?<|e|><|s|>assistant [[think\nadd<|e|><|s|>assistant says\nFour.<|e|>]]<|s|>user says\n3?<|e|><|s|>assistant "
      "[[think\nagain<|e|><|s|>assistant says\nSix.<|e|>]]"]),
    ("the conversation opens with the assistant", FIRST_SYSTEM, [says("Hello."), user("?"), says("x")], "keep",
     ["<|s|>assistant\n[[Hello.<|e|>]]\n<|s|>user\n?<|e|>\n<|s|>assistant\n[[x<|e|>]]"]),
    ("two answers in a row", TURN.replace("'<|s|>' + m.role + '\n'", "('<|s|>user\n' if m.role == 'user' else '')").replace(
        "'<|e|>\n'", "'<|e|>\n' + ('<|s|>assistant\n' if m.role == 'user' else '')"), [user("?"), says("a"), says("b")], "keep",
     ["<|s|>user\n?<|e|>\n<|s|>assistant\n[[a<|e|>]]\n[[b<|e|>]]"]),
    ("system words before the last question only", LATE_SYSTEM, [{"role": "system", "content": "Be"}, user("?"), says("x")], "keep",
     ["<|s|>Be|?<|e|>[[ x<|return|>]]"]),
    ("a developer's turn", FIRST_SYSTEM, [{"role": "developer", "content": "Be"}, user("?"), says("x")], "keep",
     ["moved", "<|s|>system\nBe<|e|>\n<|s|>user\n?<|e|>\n<|s|>assistant\n[[x<|e|>]]"]),
    ("a later system turn", FIRST_SYSTEM, [user("?"), says("x"), {"role": "system", "content": "Be"}, user("!"), says("y")], "keep",
     ["moved", "<|s|>user\n?<|e|>\n<|s|>assistant\n[[x<|e|>]]\n<|s|>user\nBe\n\n!<|e|>\n<|s|>assistant\n[[y<|e|>]]"]),
    ("earlier thoughts are not printed", FORGETS, THINKS, "keep",
     ["<|s|>user\n2?<|e|>\n<|s|>assistant\n[[<think>add</think>Four.<|e|>]]",
      "<|s|>user\n2?<|e|>\n<|s|>assistant\nFour.<|e|>\n<|s|>user\n3?<|e|>\n<|s|>assistant\n[[<think>again</think>Six.<|e|>]]"]),
    ("the last thought is wanted", PLAIN, THINKS, "last",
     ["<|s|>user\n2?<|e|>\n<|s|>assistant\n[[Four.<|e|>]]\n<|s|>user\n3?<|e|>\n<|s|>assistant\n[[<think>again</think>Six.<|e|>]]"]),
    ("no thoughts are wanted", CALLS, NAMED, "drop",
     ["<|s|>user\n2?<|e|>\n<|s|>assistant\n[[Four.<|e|>]]\n<|s|>user\n3?<|e|>\n<|s|>assistant\n[[Six.<|e|>]]"]),
    ("no thought is printed", FORGETS.replace("not loop.last", "true"), THINKS[:2], "keep", "leaves out the thought of message 2"),
    ("a thought under another name", CALLS, NAMED[:2], "keep", ["<|s|>user\n2?<|e|>\n<|s|>assistant\n[[<think>add</think>Four.<|e|>]]"]),
    ("a thought in the text, under a template with a block of its own", OWN_BLOCK, THINKS[:2], "keep",
     ["<|s|>user\n2?<|e|>\n<|s|>assistant\n[[<think>add</think>Four.<|e|>]]"]),
    ("a thought whose opening tag the prompt has, under a template that looks for both tags", OPENED, [user("2?"), says("add\n</think>\n\nFour.")],
     "keep", ["<|s|>user\n2?<|e|>\n<|s|>assistant\n<think>\n[[add\n</think>\n\nFour.<|e|>]]"]),
    ("so it is where the template takes no thought by name", OPENED.replace("m.reasoning_content", "m.none"),
     [user("2?"), says("add\n</think>\n\nFour.")], "keep", "writes an empty thought before the thought of message 2"),
    ("an empty thought before an answer that has none", OWN_BLOCK, [user("?"), says("x")], "keep",
     ["hollow", "<|s|>user\n?<|e|>\n<|s|>assistant\n[[<think></think>x<|e|>]]"]),
    ("an empty thought that the data has", PLAIN, [user("?"), says("<think>\n</think>x")], "keep",
     ["<|s|>user\n?<|e|>\n<|s|>assistant\n[[<think>\n</think>x<|e|>]]"]),
    ("a result in the wrapper that the template puts around it", WRAPPED, [user("?"), CALL, {**RESULT, "content": "<result>73 m</result>"}, says("x")],
     "keep", "writes <result> once more around the text of message 3"),
    ("a question that begins with that twice", WRAPPED, [user("<result><result>"), says("x")], "keep",
     ["<|s|>user\n<result><result><|e|>\n<|s|>assistant\n[[x<|e|>]]"]),
    ("the empty thought is of the prompt", NO_THINKING, {"messages": [user("?"), says("x")], "set": {"enable_thinking": False}}, "keep",
     ["<|s|>user\n?<|e|>\n<|s|>assistant\n<think></think>[[x<|e|>]]"]),
    ("calls are not printed", PLAIN, [user("?"), CALL, RESULT, says("73.")], "keep", "leaves out argument 'lake' of call 1 (depth) of message 2"),
    ("tools are not printed", PLAIN, {"messages": [user("?"), says("x")], "tools": [TOOL]}, "keep", "leaves out the name 'depth' of tool 1 (depth)"),
    ("text or calls, not both", CALLS.replace("in m.tool_calls or []", "in (m.tool_calls or [] if not m.content else [])"),
     [user("?"), says("See.", tool_calls=[call({})])], "keep", "leaves out the name of call 1 (depth) of message 2"),
    ("the first call only", CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
     [user("?"), says("", tool_calls=[call({"a": "x"}), call({"a": "y"})])], "keep", "leaves out argument 'a' of call 2 (depth) of message 2"),
    ("a number is not printed", CALLS.replace("c.function.arguments |", "c.function.arguments.lake |"), [user("?"), CALL], "keep",
     "leaves out argument 'n' of call 1 (depth) of message 2"),
    ("arguments as text", CALLS, [user("?"), says(None, tool_calls=[call('{"lake": "x"}')])], "keep",
     ['<|s|>user\n?<|e|>\n<|s|>assistant\n[[<call>depth{"lake": "x"}</c><|e|>]]']),
    ("no arguments", CALLS, [user("?"), says(None, tool_calls=[call("")])], "keep", ["<|s|>user\n?<|e|>\n<|s|>assistant\n[[<call>depth{}</c><|e|>]]"]),
    ("arguments that are no object", CALLS, [user("?"), says(None, tool_calls=[call('["x"]')])], "keep", "message 2"),
    ("a template that wants text", TEXT_ARGUMENTS, [user("?"), CALL], "keep",
     ['<|s|>user\n?<|e|>\n<|s|>assistant\n[[<call>depth{"lake": "Chiemsee", "n": 1}</c><|e|>]]']),
    ("a result without a call", PLAIN, [user("?"), RESULT, says("x")], "keep", ["<|s|>user\n?<|e|>\n<|s|>tool\n73 m<|e|>\n<|s|>assistant\n[[x<|e|>]]"]),
    ("no calls in a list", CALLS, [user("?"), says("x", tool_calls=[])], "keep", ["<|s|>user\n?<|e|>\n<|s|>assistant\n[[x<|e|>]]"]),
    ("the same words", PLAIN, [user("y"), says("y"), user("y"), says("y")], "keep",
     ["<|s|>user\ny<|e|>\n<|s|>assistant\n[[y<|e|>]]\n<|s|>user\ny<|e|>\n<|s|>assistant\n[[y<|e|>]]"]),
    ("white space is stripped", PLAIN.replace("m.content", "m.content | trim"), [user("?"), says("  x\n")], "keep",
     ["<|s|>user\n?<|e|>\n<|s|>assistant\n[[x<|e|>]]"]),
    ("a text is printed twice", PLAIN.replace("m.content", "m.content * 2"), [user("?"), says("x")], "keep", "prints twice the text of message 1"),
    ("texts out of order", "{% for m in messages if m.role == 'tool' %}{{ m.content }}{% endfor %}"
     "{% for m in messages if m.role != 'tool' %}" + PLAIN.split("%}", 1)[1], [user("?"), RESULT, says("x")], "keep",
     "prints the text of message 1 after that of a later message"),
    ("words that the template looks at", LOOKS_AT_WORDS, [user("a secret"), says("x")], "keep", "leaves out the text of message 1"),
    ("words that look like marks", CALLS, {"messages": [user("Zq1q"), says("x")], "tools": [{"name": "Zq0q"}]}, "keep",
     ['[{"name": "Zq0q"}]<|s|>user\nZq1q<|e|>\n<|s|>assistant\n[[x<|e|>]]']),
    ("a short word is lost beside what looks like a mark", CALLS.replace("| tojson) + '</c>'", "| join(' ')) + '</c>'"),
     {"messages": [user("?"), says("", tool_calls=[call({"lake": "e"})])], "tools": [{"name": "Zq0q"}]}, "keep",
     "leaves out argument 'lake' of call 1 (depth) of message 2"),
    ("json as transformers writes it", JSON, {"messages": [user("?"), says("x")], "tools": [{"b": "ä<", "a": 1}]}, "keep",
     ['[{"b": "\\u00e4<", "a": 1}][{"b":"ä<","a":1}][{"a": 1, "b": "ä<"}]None<|s|>user\n?<|e|>\n<|s|>assistant\n[[x<|e|>]]']),
]  # fmt: skip


def rows_of(template, record, wanted):
    """Each row with its trained parts in brackets; or what is wrong. "moved" stands before rows with moved system turns,
    "hollow" before those with empty thoughts that the template writes."""
    record = record if isinstance(record, dict) else {"messages": record}
    try:
        talk = read_conversation(record, ConversationColumns(messages="messages", tools="tools", settings="set"))
        messages = [thoughts.share_names(message) for message in talk.messages]
        answers = tuple(range(sum(message["role"] == "assistant" for message in messages)))
        rendered = ChatRenderer(template, {}, CONTROLS, None).render(
            Request(messages, talk.tools, talk.settings, answers, thoughts=wanted)
        )
    except (BadField, RenderError) as reason:
        return str(reason)
    if rendered.faults:
        return "; ".join(sentence for _, sentence in rendered.faults)
    rows = ["moved"] * rendered.moved + ["hollow"] * rendered.hollow
    for spans, trained in rendered.rows:
        text, inside = "", -1
        while spans[-1][2] != trained[-1]:
            spans.pop()
        for part, _, turn in [*spans, ("", False, -1)]:
            turn = turn if turn in trained else -1
            text += (
                ("]]" if inside >= 0 and turn != inside else "") + ("[[" if turn >= 0 and turn != inside else "") + part
            )
            inside = turn
        rows.append(text)
    return rows


@pytest.mark.parametrize(
    ("template", "record", "wanted", "right"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_a_reported_fault_is_not_ours(template, record, wanted, right):
    found = rows_of(template, record, wanted)
    if isinstance(right, str):
        assert right in found
    else:
        assert found == right


def is_one_wrong():
    """Whether the outcome of some case is not the right one; the rest is not looked at then."""
    for _, template, record, wanted, right in CASES:
        try:
            found = rows_of(template, record, wanted)
        except Exception:  # whatever a broken rule does
            found = None
        if found is None or not (right in found if isinstance(right, str) else found == right):
            return True
    return False


def nothing(*_, **__):
    return None


RULES = {  # rule → where it stands, and what stands there without it
    "parts are looked for": (check, "_check_parts", lambda *_: iter(())),
    "order is looked at": (check, "_check_order", lambda *_: iter(())),
    "names, keys and numbers are looked for": (check, "_holds", lambda *_: True),
    "tools are looked for": (check, "plain_of_tools", lambda tools: []),
    "an answer starts where the prompt ends, or after the header": (plan.Planner, "_find_start", nothing),
    "a greeting's header is found": (plan.Planner, "_gap_before", lambda *_: (0, 0)),
    "an answer ends with its own rendering": (plan.Planner, "_find_end", lambda self, s, t, start, upto: self._first_control(s.text, start)),
    "a stop mark may be the next header": (plan.Planner, "_with_next_control", lambda self, text, mark, end: end),
    "a call at the end gets its stop": (plan.Planner, "_missing_stop", nothing),
    "a closing tag is no stop mark": (plan.Planner, "_is_closed", lambda self, tail: bool(self._printer.control.search(tail))),
    "a prompt printed otherwise is put before its answer": (plan.Planner, "_align", nothing),
    "developers become system": (plan, "name_system", lambda messages: list(messages)),
    "system turns are merged": (plan, "merge_instructions", lambda messages: list(messages)),
    "marks are cut at the template's tags": (parts.Marker, "_mark_content", lambda self, text, message, replace: replace(text, "text", "the text")),
    "words are found where marks are not": (skeleton.Skeleton, "match", lambda self, text, parts: [0, *self.ends]),
    "an empty thought stays in the prompt": (printer, "_CLOSING", __import__("re").compile("(?!)")),
    "arguments as text": (printer.ChatPrinter, "wants_text", False),
    "json as transformers": (printer, "_tojson", lambda value, **_: __import__("json").dumps(value)),
    "thoughts are dropped": (renderer, "keep_thoughts", lambda messages, wanted: messages),
    "thoughts are named": (renderer, "doubles_thoughts", lambda attempt, template: False),
    "tags that stand twice are seen": (check, "_check_wrappers", lambda *_: iter(())),
    "empty thoughts are seen": (plan, "writes_empty_thought", lambda *_: False),
    "names of thoughts are shared": (thoughts, "share_names", lambda message: message),
    "white space after a stop mark is left": (printer.ChatPrinter, "trim", lambda self, answer: answer),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_needed(rule, monkeypatch):
    owner, name, without = RULES[rule]
    monkeypatch.setattr(owner, name, without)
    assert is_one_wrong()


def test_typed_control_tokens_are_text_in_tools_too(monkeypatch):
    function = {"name": "a<|e|>", "description": "<|s|>", "parameters": {"type": "object", "properties": {"<|e|>": {}}}}
    request = Request([user("<|s|>"), says("x")], [{"type": "function", "function": function}], {}, (0,))
    template = CALLS.replace("tools | tojson", "tools | tojson(true)")

    def controls():
        ((spans, _),) = ChatRenderer(template, {}, CONTROLS, None).render(request).rows
        return [text for text, is_control, _ in spans if is_control], "".join(text for text, _, _ in spans)

    found, text = controls()
    assert found == ["<|s|>", "<|e|>"] * 2
    assert '"name": "a<|e|>", "description": "<|s|>"' in text
    monkeypatch.setattr(control_marks.ControlMarks, "mark", lambda self, value, mark: value)
    assert controls()[0] != found
