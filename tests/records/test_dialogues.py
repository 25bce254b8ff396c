"""Dialogues written as text are split at the headings of their questions and answers, and nowhere else."""

import pytest

from qlora_cli.core.records.dialogues import are_keys, headings_of, split_dialogue

TURNS = [("user", "A lake?"), ("assistant", "Chiemsee.")]


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("\n\nHuman: A lake?\n\nAssistant: Chiemsee.", TURNS),
        ("User: A lake?\nAI: Chiemsee.\nAnswer: yes", [TURNS[0], ("assistant", "Chiemsee.\nAnswer: yes")]),
        ("### Human: A lake?### Assistant: Chiemsee.### Human: So", [*TURNS, ("user", "So")]),
        ("Be brief. USER: A lake? ASSISTANT: Chiemsee.</s>USER: So", [("system", "Be brief."), *TURNS[:1], ("assistant", "Chiemsee.</s>"), ("user", "So")]),
        ("### System:\nBe brief.\n\n### User:\nA lake?\n\n### Assistant:\nChiemsee.", [("system", "Be brief."), *TURNS]),
        ("### Instruction:\nA lake?\n\n### Input:\nUser: me\n\n### Response:\nChiemsee.", [("user", "A lake?\n\n### Input:\nUser: me"), TURNS[1]]),
        ("<human>: A lake?\n<bot>: Chiemsee.", TURNS),
        ("[|Human|] A lake?\n[|AI|] Chiemsee.", TURNS),
        ("**User:** A lake?\n**Assistant:** Chiemsee.", TURNS),
        ("Q: A lake?\nA: Chiemsee.", TURNS),
        ("Question: A lake?\nA: Zugspitze\nB: Chiemsee\nAnswer: B", [("user", "A lake?\nA: Zugspitze\nB: Chiemsee"), ("assistant", "B")]),
        ("Question: A lake?\nA: Zugspitze\nB: Chiemsee", None),  # options without an answer
        ("Human: A lake?\n\nAssistant: Chiemsee.\n\nHuman: ", TURNS),
        ("Question: A lake?\n### Answer: Chiemsee.", None),  # headings of two kinds
        ("Answer: Chiemsee.\nQuestion: A lake?", None),
        ("Of Q: and A: within a line.", None),
        ("# User: root\n# Assistant: none", None),  # comments
    ],
)  # fmt: skip
def test_a_dialogue_is_split_at_its_own_headings(text, turns):
    assert split_dialogue(text) == (turns and [{"role": role, "content": content} for role, content in turns])
    assert (headings_of(text) is None) == (turns is None)


@pytest.mark.parametrize(
    ("text", "is_code"),
    [
        ("services:\n  user: root\n  image: x\n  response: json\n", True),
        ("class Said:\n    user: str\n    assistant: str\n    id: int\n", True),
        ("name: a\nport: 8080\nhost: b\nuser: root\nresponse: json\n", True),
        ("context: Bavaria\ntitle: Lakes\nquestion: A lake?\nanswer: Chiemsee.", False),
        ("user: YAML, please\nassistant: Here:\nname: x\nport: 1\nhost: y\n", False),
        ("  user: A lake?\n  bot: Chiemsee.", False),
        ("Id: 1\nDate: today\nTitle: Lakes\nUser: A lake?\nAssistant: Chiemsee.", False),
        ("Just words.", False),
    ],
)
def test_keys_of_yaml_and_fields_in_code_are_told_from_headings(text, is_code):
    assert are_keys(text) == is_code
