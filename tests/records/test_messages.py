"""Every way in which data sets write turns and calls is read into one form, or refused with the message's number."""

import json

import pytest

from qlora_cli.core.records.conversation import ConversationColumns, read_conversation
from qlora_cli.core.records.messages import holds_messages, read_messages, turns_of
from qlora_cli.core.records.record import BadField, decode_nested
from qlora_cli.core.records.tools import read_tools

ASK, ANSWER = {"role": "user", "content": "A lake?"}, {"role": "assistant", "content": "It's Chiemsee."}
FUNCTION = {"name": "get_depth", "arguments": {"lake": "Chiemsee"}}
CALL = {"type": "function", "function": FUNCTION}
AS_TEXT = {"type": "function", "function": {**FUNCTION, "arguments": json.dumps(FUNCTION["arguments"])}}


@pytest.mark.parametrize(
    "value",
    [
        [ASK, ANSWER],
        [{"from": "human", "value": "A lake?"}, {"from": "gpt", "value": "It's Chiemsee."}],
        [{"role": "Prompter", "text": "A lake?"}, {"role": "model", "text": "It's Chiemsee."}],
        {"from": ["human", "gpt"], "value": ["A lake?", "It's Chiemsee."]},
        [
            {"type": "human", "data": {"content": "A lake?", "additional_kwargs": {}, "type": "human", "name": None}},
            {"type": "ai", "data": {"content": "It's Chiemsee.", "tool_calls": []}},
        ],
        [
            {"lc": 1, "id": ["langchain", "messages", "HumanMessage"], "kwargs": {"content": "A lake?"}},
            {"lc": 1, "id": ["langchain", "messages", "AIMessageChunk"], "kwargs": {"content": "It's Chiemsee."}},
        ],
        [
            {"type": "chat", "data": {"content": "A lake?", "role": "user", "type": "chat"}},
            {"lc": 1, "id": ["langchain", "ChatMessage"], "kwargs": {"content": "It's Chiemsee.", "role": "assistant"}},
        ],
        [{"type": "HumanMessage", "data": {"content": "A lake?"}}, {"type": "AIMessageChunk", "data": ANSWER}],
        ["A lake?", "It's Chiemsee."],
        [["A lake?", "It's Chiemsee."]],
        [["human", "A lake?"], ["Assistant ", "It's Chiemsee."]],
        [{"Human": "A lake?", "Assistant": "It's Chiemsee."}],
        [{"question": "A lake?", "answer": "It's Chiemsee."}],
        json.dumps([ASK, ANSWER]),
        repr([ASK, ANSWER]),
        repr([("A lake?", "It's Chiemsee.")]),
        repr([{"role": ("user",)[0], "content": ({"type": "text", "text": "A lake?"},)}, ANSWER]),
        [json.dumps(ASK), json.dumps(ANSWER)],
        [ASK, {**ANSWER, "tool_calls": [], "name": None, "function_call": None}],
        [ASK, {**ANSWER, "tool_calls": ""}],
        [ASK, {**ANSWER, "tool_calls": "null", "function_call": "None"}],
        [{"role": "user", "content": [{"type": "text", "text": "A lake?"}, {"type": "text", "text": None}]}, ANSWER],
        [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "A lake?"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It's Chiemsee."}]},
        ],
        [
            {"role": "user", "parts": [{"text": "A lake?"}]},
            {"role": "model", "parts": [{"text": "It's "}, {"text": "Chiemsee."}]},
        ],
        [{"role": "user", "content": ["A lake?"]}, {"role": "assistant", "content": ["It's ", "Chiemsee."]}],
    ],
)
def test_every_form_of_turns_is_the_same_conversation(value):
    assert read_messages(value, {}) == ([ASK, ANSWER], [None, None])


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [{"role": "assistant", "content": "", "tool_calls": [AS_TEXT]}],
        [{"role": "assistant", "content": None, "tool_calls": json.dumps([AS_TEXT])}],
        [{"role": "assistant", "content": None, "tool_calls": [json.dumps(CALL)]}],
        [{"role": "assistant", "content": None, "function_call": AS_TEXT["function"]}],
        [{"from": "function_call", "value": json.dumps(FUNCTION)}],
        [{"from": "function_call", "value": json.dumps([FUNCTION])}],
        [ANSWER, {"role": "tool_call", "content": json.dumps(FUNCTION)}],
        [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "tool_call", "name": "get_depth", "args": {"lake": "Chiemsee"}}],
            }
        ],
        [{"type": "ai", "data": {"content": "", "tool_calls": [], "additional_kwargs": {"tool_calls": [AS_TEXT]}}}],
        [{"type": "ai", "data": {"content": "", "tool_calls": [CALL], "additional_kwargs": {"tool_calls": [AS_TEXT]}}}],
    ],
)
def test_every_form_of_a_call_is_the_assistants_turn_with_arguments_as_an_object(turns):
    messages, _ = read_messages([ASK, *turns, {"from": "observation", "value": "73 m"}], {})
    content = ANSWER["content"] if turns[0] is ANSWER else ""
    assert messages == [
        ASK,
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": "73 m"},
    ]


def test_calls_in_a_row_are_one_turn_and_arguments_may_be_empty():
    turns = [{"role": "tool_call", "content": json.dumps({"name": name, "arguments": ""})} for name in ("a", "b")]
    messages, _ = read_messages([ASK, *turns], {})
    assert [call["function"] for call in messages[1]["tool_calls"]] == [
        {"name": "a", "arguments": {}},
        {"name": "b", "arguments": {}},
    ]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"content": "x"}, "message 2 has no role"),
        ({"role": "assistant", "content": 3}, "the 'content' of message 2 is a number, not text"),
        ({"role": "assistant", "content": [{"type": "image"}]}, "message 2 holds a part of the type 'image'"),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}, "message 2: a call has no name"),
        ({"role": "user", "content": [{"type": "image", "source": {}}]}, "message 2 holds a part of the type 'image'"),
        (
            {"role": "user", "parts": [{"text": "x"}, {"text": None, "inlineData": {"data": "aGk="}}]},
            "message 2 holds a part of the type 'inlineData'",
        ),
        (
            {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image", "source": {}}]}]},
            "message 2 holds a part of the type 'image'",
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "x"}],
            },
            "message 2 has text behind a call",
        ),
        (
            {"role": "assistant", "content": [{"type": ["text"], "text": "x"}]},
            "message 2 holds a part whose type is a list, not text",
        ),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "thinking", "thinking": "y"}]},
            "message 2 has a thought behind text",
        ),
        (
            {
                "role": "model",
                "parts": [
                    {"functionCall": {"name": "f", "args": {}}},
                    {"functionResponse": {"name": "f", "response": "x"}},
                ],
            },
            "message 2 has a tool's result behind a call",
        ),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}, "message 2: a call has no name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '"Beijing"'}}]},
            "message 2: the arguments of f are text, not an object",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{'a"}}]},
            "message 2: the arguments of f is no JSON",
        ),
        ({"role": "function_call", "content": "depth of Chiemsee"}, "message 2: a call is no JSON"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "the 'weight' of message 2 is 0.5"),
    ],
)
def test_what_is_wrong_with_a_turn_is_said_with_its_number(turn, reason):
    with pytest.raises(BadField) as error:
        read_messages([ASK, turn], {})
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("said", "is_trained"),
    [
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"loss": "false"}, False),
        ({"loss": True, "weight": None}, True),
        ({"loss_mask": 0}, False),
        ({"weight": 1, "train": False}, False),
    ],
)
def test_a_turn_says_whether_it_is_trained_and_the_template_does_not_see_it(said, is_trained):
    assert read_messages([ASK, {**ANSWER, **said}], {}) == ([ASK, ANSWER], [None, is_trained])


def test_a_pair_keeps_its_system_text_its_input_and_what_it_says_of_its_answer():
    pair = {"system": "Be brief.", "instruction": "A lake?", "input": "In Bavaria.", "output": "It's Chiemsee."}
    asked = {"role": "user", "content": "A lake?\nIn Bavaria."}
    assert read_messages([pair], {})[0] == [{"role": "system", "content": "Be brief."}, asked, ANSWER]
    thought = {"question": "A lake?", "answer": "It's Chiemsee.", "reasoning_content": "Think.", "weight": 0}
    assert read_messages([thought], {}) == ([ASK, {**ANSWER, "reasoning_content": "Think."}], [None, False])
    words = [["model", "a small car"], ["tool", "a hammer"]]  # questions that happen to be names of roles
    assert read_messages(words[1:], {})[0][0] == {"role": "user", "content": "tool"}


def test_a_thought_that_langchain_keeps_beside_calls_is_the_turns():
    said = {"content": "", "tool_calls": [CALL], "additional_kwargs": {"reasoning_content": "Deep."}}
    (message,), _ = read_messages([{"type": "ai", "data": said}], {})
    assert (message["reasoning_content"], message["tool_calls"]) == ("Deep.", [CALL])


def test_roles_of_ones_own_are_mapped():
    turns = [{"from": "customer", "value": "A lake?"}, {"from": "Bard", "value": "It's Chiemsee."}]
    assert read_messages(turns, {"customer": "user", "bard": "assistant"})[0] == [ASK, ANSWER]
    assert read_messages(turns, {})[0][1]["role"] == "bard"


@pytest.mark.parametrize("value", ["words", "[1, 2]", [1], {"a": [1]}, 3, None, [["a"]], [{"human": "a", "score": 1}]])
def test_what_is_no_conversation_has_no_turns(value):
    assert turns_of(value) is None


def test_only_messages_with_roles_are_messages_beyond_doubt():
    assert holds_messages([{"type": "human", "data": {"content": "q"}}])
    assert holds_messages(json.dumps([ASK]))
    assert holds_messages([json.dumps(ASK)])
    assert not any(map(holds_messages, ['["a", "b"]', '{"role": 1}', ["a", "b"], [], "a", None]))


def test_nested_text_is_read_as_json_or_as_python_prints_it():
    assert decode_nested(' {"a": null} ') == {"a": None}
    assert decode_nested("{'a': None}") == {"a": None}
    assert decode_nested("null ") is decode_nested("None") is None
    assert decode_nested("[very good]") == "[very good]"
    assert decode_nested("{1, 2}") == "{1, 2}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (repr([{("role", "x"): "user"}, ANSWER]), "is text that is neither JSON nor a Python list of what JSON holds"),
        (repr([{**ASK, "content": {"A lake?"}}, ANSWER]), "is neither JSON nor a Python list of what JSON holds"),
        (json.dumps([{**ASK, "content": "A lake \ud83d"}, ANSWER]), r"holds half a surrogate pair (\ud83d)"),
        (repr([{**ASK, "content": "A lake\0"}, ANSWER]), "holds a NUL character"),
        (json.dumps([{"A\ud83d": 1, **ASK}, ANSWER]), r"holds half a surrogate pair (\ud83d)"),
        ([ASK, {"role": "function_call", "content": json.dumps({"name": "f\ud83d"})}], "half a surrogate pair"),
    ],
)
def test_text_of_messages_that_cannot_be_used_is_refused(text, reason):
    with pytest.raises(BadField) as error:
        read_conversation({"messages": text}, ConversationColumns(messages="messages"))
    assert reason in str(error.value) and str(error.value).startswith("field 'messages': ")


TOOL = {"type": "function", "function": {"name": "get_depth"}}
DESCRIBED = {"type": "function", "function": {"name": "get_depth", "description": "Of a lake."}}


@pytest.mark.parametrize(
    ("value", "column", "tools"),
    [
        ([TOOL], "tools", [TOOL]),
        (json.dumps([TOOL]), "tools", [TOOL]),
        ([json.dumps(TOOL)], "tool_defs", [TOOL]),
        (repr([TOOL]), "tools", [TOOL]),
        ([TOOL["function"]], "functions", [TOOL]),
        ({"tools": [TOOL]}, "tools", [TOOL]),
        (json.dumps(TOOL), "tools", [TOOL]),
        ({"get_depth": {"description": "Of a lake."}, "f": TOOL, "g": None}, "tools", [DESCRIBED, TOOL]),
        ([{"type": "function", **DESCRIBED["function"]}], "tools", [DESCRIBED]),
        *((empty, "tools", None) for empty in ("", " ", "[]", "{}", "null", "None", [], {}, None)),
    ],
)
def test_tools_are_read_from_every_form(value, column, tools):
    assert read_tools(value, column) == tools


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "is no JSON"),
        (3, "is a number"),
        ([3], "holds a number"),
        ({"get_depth": "Of a lake."}, "is an object that describes no tool"),
    ],
)
def test_tools_that_are_none_are_refused(value, reason):
    with pytest.raises(BadField, match=f"field 'tools' {reason}"):
        read_tools(value, "tools")


def read(record, **columns):
    conversation = read_conversation(record, ConversationColumns(**columns))
    return [(message["role"], message["content"]) for message in conversation.messages]


CHAT = [("user", "A lake?"), ("assistant", "It's Chiemsee.")]


def test_columns_are_joined_in_order():
    row = {"q": "A lake?", "a": "It's Chiemsee.", "s": "Be brief.", "h": [["Hi", "Hello"]], "i": "Big.", "m": [ASK]}
    assert read(row, prompt="q", answer="a") == CHAT
    assert read(row, prompt="q", answer="a", system="s") == [("system", "Be brief."), *CHAT]
    assert read(row, prompt="q", answer="a", history="h") == [("user", "Hi"), ("assistant", "Hello"), *CHAT]
    assert read(row, prompt="q", answer="a", addition="i")[0] == ("user", "A lake?\nBig.")
    assert read(row, messages="m", answer="a") == CHAT


@pytest.mark.parametrize("answer", [ANSWER, [ANSWER], [ASK, ANSWER], json.dumps([ASK, ANSWER])])
@pytest.mark.parametrize("prompt", ["A lake?", [ASK]])
def test_an_answer_that_repeats_the_question_is_the_whole(prompt, answer):
    assert read({"prompt": prompt, "chosen": answer}, prompt="prompt", answer="chosen") == CHAT


BRIEF, LONG = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be long."}


@pytest.mark.parametrize("before", [[BRIEF, ASK], [BRIEF, ASK, ANSWER]])
@pytest.mark.parametrize("whole", [[ASK, ANSWER], [BRIEF, ASK, ANSWER]])
def test_what_two_columns_both_hold_stands_there_once_and_its_answer_is_trained(before, whole):
    found = read_conversation({"m": before, "c": whole}, ConversationColumns(messages="m", answer="c"))
    assert found.messages == [BRIEF, ASK, ANSWER]
    assert found.trained == [None, None, None] and not found.asked[-1] and len(found.asked) == 3


def test_two_columns_whose_system_turns_differ_are_refused():
    with pytest.raises(BadField, match="'c' differs in its system turn"):
        read({"m": [BRIEF, ASK], "c": [LONG, ASK, ANSWER]}, prompt="m", answer="c")


def test_a_history_may_be_anything_that_is_a_conversation_and_of_half_a_pair_is_none():
    row = {"q": "A lake?", "a": "It's Chiemsee."}
    for history in ([["human", "Hi"], ["ai", "Hello"]], ["Hi", "Hello"], '[["Hi", "Hello"]]'):
        assert read({**row, "h": history}, prompt="q", answer="a", history="h")[:2] == [
            ("user", "Hi"),
            ("assistant", "Hello"),
        ]
    with pytest.raises(BadField, match="'h'"):
        read({**row, "h": [["Hi"]]}, prompt="q", answer="a", history="h")


def test_questions_that_are_json_stay_text():
    assert read({"q": '["a", "b"]', "a": "{}"}, prompt="q", answer="a") == [("user", '["a", "b"]'), ("assistant", "{}")]


def test_a_system_column_beside_a_system_turn():
    turns = [{"role": "system", "content": "Be brief."}, ASK, ANSWER]
    assert read({"m": turns, "s": "Be brief."}, messages="m", system="s")[0] == ("system", "Be brief.")
    assert read({"m": turns, "s": None}, messages="m", system="s")[0] == ("system", "Be brief.")
    with pytest.raises(BadField, match="differs from the system turn"):
        read({"m": turns, "s": "Be long."}, messages="m", system="s")


def test_settings_and_documents_of_a_row_travel_with_it():
    row = {"m": [ASK, ANSWER], "k": '{"enable_thinking": false}', "d": [{"title": "Lakes"}]}
    found = read_conversation(row, ConversationColumns(messages="m", settings="k", documents="d"))
    assert (found.settings, found.documents) == ({"enable_thinking": False}, [{"title": "Lakes"}])
    with pytest.raises(BadField, match="'k' is text"):
        read_conversation({**row, "k": "on"}, ConversationColumns(messages="m", settings="k"))


def test_nulls_of_other_tools_are_left_out_of_schemas_and_calls_and_those_that_mean_something_stay():
    def tool(name, properties):
        return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}

    def call(name, **arguments):
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    lake, unit = {"type": "string"}, {"type": ["string", "null"], "default": None}
    padded = [tool("depth", {"lake": lake, "unit": unit, "hill": None}), tool("height", {"lake": None, "hill": lake})]
    calls = [call("depth", lake="Chiemsee", unit=None, hill=None), call("height", lake=None, hill="Brocken")]
    record = {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": padded}
    found = read_conversation(record, ConversationColumns(messages="messages", tools="tools"))
    assert found.tools == [tool("depth", {"lake": lake, "unit": unit}), tool("height", {"hill": lake})]
    assert found.messages[1]["tool_calls"] == [
        call("depth", lake="Chiemsee", unit=None),
        call("height", hill="Brocken"),
    ]


CALLED = {
    "role": "assistant",
    "content": "I look.",
    "reasoning_content": "A tool knows.",
    "tool_calls": [{"id": "t1", **CALL}],
}
GAVE = {"role": "tool", "content": "73", "tool_call_id": "t1", "name": "get_depth"}
FROM_ANTHROPIC = [
    ASK,
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "A tool knows.", "signature": "x"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "get_depth", "input": {"lake": "Chiemsee"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "73"}]},
            {"type": "text", "text": "A lake?"},
        ],
    },
    ANSWER,
]
FROM_GOOGLE = [
    {"role": "user", "parts": [{"text": "A lake?"}]},
    {
        "role": "model",
        "parts": [
            {"text": "A tool knows.", "thought": True},
            {"text": "I look."},
            {"functionCall": {"id": "t1", "name": "get_depth", "args": {"lake": "Chiemsee"}}},
        ],
    },
    {
        "role": "user",
        "parts": [{"functionResponse": {"id": "t1", "name": "get_depth", "response": "73"}}, {"text": "A lake?"}],
    },
    {"role": "model", "parts": [{"text": "It's Chiemsee."}]},
]


FROM_RESPONSES = [
    {"role": "user", "content": "A lake?"},
    {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "A tool knows."}], "content": None},
    {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
    },
    {"type": "function_call", "id": "f", "call_id": "t1", **AS_TEXT["function"]},
    {"type": "function_call_output", "call_id": "t1", "output": "73"},
    {"role": "user", "content": [{"type": "input_text", "text": "A lake?"}]},
    {"type": "message", "role": "assistant", "content": "It's Chiemsee."},
]


def test_items_of_responses_are_turns_and_a_list_of_them_is_messages_beyond_doubt():
    assert read_messages(FROM_RESPONSES, {})[0] == [ASK, CALLED, GAVE, ASK, ANSWER]
    assert holds_messages(FROM_RESPONSES[1:3])
    assert turns_of([{"type": "web_search_call", "id": "w"}]) is None


def test_what_a_message_beside_items_says_of_itself_is_kept():
    question, thought = FROM_RESPONSES[:2]
    untrained, trained = ({"role": "assistant", "content": "Chiemsee.", "weight": weight} for weight in (0, 1))
    assert read_messages([question, thought, untrained, question, trained], {})[1] == [None, False, None, True]
    assert read_messages([question, thought, untrained, trained], {})[1] == [None, False, True]


@pytest.mark.parametrize("calls", [[FUNCTION], FUNCTION])
def test_an_answer_beside_tools_that_is_calls_written_as_json_is_these_calls(calls):
    columns = ConversationColumns(prompt="query", answer="answers", tools="tools")
    row = {"query": "A lake?", "answers": json.dumps(calls), "tools": json.dumps([TOOL])}
    assert read_conversation(row, columns).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    other = read_conversation({**row, "answers": '[{"name": "Chiemsee"}]'}, columns)
    assert other.messages[1]["content"] == '[{"name": "Chiemsee"}]'


def test_a_turn_may_describe_the_tools_and_no_others_than_the_column():
    row = {"messages": [{"role": "system", "content": "", "tools": [TOOL]}, ASK, ANSWER]}
    assert read_conversation(row, ConversationColumns(messages="messages")).tools == [TOOL]
    columns = ConversationColumns(messages="messages", tools="tools")
    assert read_conversation({**row, "tools": [TOOL]}, columns).tools == [TOOL]
    with pytest.raises(BadField, match="message 1 describes other tools"):
        read_conversation({**row, "tools": [DESCRIBED]}, columns)


@pytest.mark.parametrize("messages", [FROM_ANTHROPIC, FROM_GOOGLE])
def test_thoughts_calls_and_results_that_are_parts_are_those_of_turns(messages):
    assert read_messages(messages, {})[0] == [ASK, CALLED, GAVE, ASK, ANSWER]
    key = "content" if "content" in messages[2] else "parts"
    alone = [*messages[:2], {**messages[2], key: messages[2][key][:1]}]
    assert read_messages(alone, {})[0] == [ASK, CALLED, GAVE], "a result alone is no turn of the user"


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "get_depth", "description": "Of a lake.", "input_schema": {"type": "object"}},
        {
            "functionDeclarations": [
                {"name": "get_depth", "description": "Of a lake.", "parameters": {"type": "object"}}
            ]
        },
    ],
)
def test_descriptions_of_other_interfaces_are_those_that_templates_expect(tool):
    function = {"name": "get_depth", "description": "Of a lake.", "parameters": {"type": "object"}}
    assert read_tools([tool], "tools") == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    "system", ["Be brief.", [{"type": "text", "text": "Be brief."}], {"parts": [{"text": "Be brief."}]}]
)
def test_a_system_text_may_be_made_of_parts(system):
    columns = ConversationColumns(messages="contents", system="system")
    found = read_conversation({"contents": [ASK, ANSWER], "system": system}, columns)
    assert found.messages[0] == {"role": "system", "content": "Be brief."}


def test_what_is_trained_of_a_conversation_does_not_count_its_prompt():
    columns, row = ConversationColumns(messages="m", trained="t"), {"m": [ASK, ANSWER, ASK, ANSWER], "t": [0, 1]}
    assert read_conversation(row, columns).trained == [None, False, None, True]
    assert read_conversation({**row, "m": row["m"][:3]}, columns, is_prompt=True).messages == row["m"][:3]
