"""Rows as people have them, and what becomes of each: the tokens of every row with the trained ones marked, or why not.

Each case stands for a kind of fault in public reports on tools for fine-tuning. ⟦ ⟧ encloses what is trained.
"""

import json
import subprocess
import sys
from copy import deepcopy
from itertools import pairwise

import pytest

from qlora_cli.config import PrepareConfig
from qlora_cli.core.data.dataset import PreparedRows
from qlora_cli.core.data.prepare import SAMPLE_RECORDS, prepare_rows
from qlora_cli.errors import QloraError
from qlora_cli.events import Caution, Notice
from tests.prompts.small_tokenizers import byte_level, sentencepiece_like

ASK, ANSWER = {"role": "user", "content": "A lake?"}, {"role": "assistant", "content": "Chiemsee."}
BAD = {"role": "assistant", "content": "Zugspitze."}
CALL = {"type": "function", "function": {"name": "depth", "arguments": {"of": "Chiemsee"}}}
HILL = {"type": "function", "function": {"name": "depth", "arguments": {"of": "Zugspitze"}}}
TURN = "<|im_start|>user\nA lake?<|im_end|>\n<|im_start|>assistant\n⟦Chiemsee.<|im_end|>⟧"
CONTEXT = "<|im_start|>user\nA lake?<|im_end|>\n<|im_start|>assistant\nZugspitze.<|im_end|>\n"
HEADED = "### Prompt:\nA lake?\n\n### Completion:\n⟦Chiemsee.<|im_end|>⟧"
ASKED = "### Question:\nA lake?\n\n### Answer:\n⟦Chiemsee.<|im_end|>⟧"


def marked(rows, tokenizer):
    """Each row as text, with its trained tokens in ⟦brackets⟧."""
    texts = []
    for index in range(len(rows)):
        ids, trained = rows[index]
        text, inside = "", False
        parts = [[0]]
        for at in range(1, len(ids)):
            if trained[at] != trained[at - 1]:
                parts.append([])
            parts[-1].append(at)
        for part in parts:
            inside = bool(trained[part[0]])
            words = tokenizer.decode(ids[part], clean_up_tokenization_spaces=False)
            text += f"⟦{words}⟧" if inside else words
        texts.append(text)
    return texts


def prepared(tmp_path, content, tokenizer, name="a.jsonl", **settings):
    """Rows with their marks, and all that was said; or the error."""
    path = tmp_path / name
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_text(content, encoding="utf-8")
    events = []
    config = PrepareConfig(data=str(path), **settings)
    try:
        summary = prepare_rows(config, tokenizer, None, tmp_path / "out", events.append, workers=1)
    except QloraError as error:
        return None, f"{error.message} {error.hint}"
    said = " ".join(event.text for event in events if isinstance(event, Notice | Caution))
    return marked(PreparedRows(summary.directory), tokenizer), said


# name: (rows, settings, marked rows or None for a refusal, words that are said)
CASES = {
    "prompt and completion that are messages": (
        [{"prompt": [ASK], "completion": [ANSWER]}, {"prompt": [ASK], "completion": [ANSWER]}], {}, [TURN, TURN], "'prompt' and 'completion'",
    ),
    "a context of several turns before the completion": (
        [{"prompt": [ASK, BAD, ASK], "completion": [ANSWER]}], {},
        [CONTEXT + TURN], "",
    ),
    "messages under other names of question and answer": (
        [{"question": [ASK, BAD, ASK], "answer": [ANSWER]}], {}, [CONTEXT + TURN], "'question' and 'answer'",
    ),
    "messages under the names of prompt and response": (
        [{"prompt": [ASK], "response": [ANSWER]}], {}, [TURN], "'prompt' and 'response'",
    ),
    "messages that end in a question beside text named like an answer": (
        [{"source": "x", "messages": [ASK, BAD, ASK], "response": "Chiemsee."}], {}, [CONTEXT + TURN], "'messages' and 'response'",
    ),
    "messages that end in a question beside answers that stand alone": (
        [{"talk": [ASK, BAD, ASK], "reply": [ANSWER]}], {}, [CONTEXT + TURN], "'talk' and 'reply'",
    ),
    "messages where the context of question and answer belongs": (
        [{"context": [ASK, BAD], "question": "A lake?", "answer": "Chiemsee."}], {}, [CONTEXT + TURN], "'context'",
    ),
    "text where the context of messages belongs": (
        [{"context": "Lakes.", "question": [ASK], "answer": "Chiemsee."}], {}, [TURN], "not used: 'context'",
    ),
    "messages that end in a question beside what may be its answer": (
        [{"messages": [ASK, BAD, ASK], "reference_answer": "Chiemsee."}], {}, None, "'reference_answer' may hold it",
    ),
    "messages that end in a question beside text of whatever kind": (
        [{"messages": [ASK, ANSWER, ASK], "label": "Zugspitze."}], {}, [TURN], "--prompt-column messages --completion-column COLUMN",
    ),
    "messages that end in a question beside two answers": (
        [{"messages": [ASK, BAD, ASK], "first": [ANSWER], "second": [BAD]}], {}, None, "'first', 'second' may hold it",
    ),
    "messages that end in an answer beside another": (
        [{"problem": "?", "solution": "!", "answer": "4", "messages": [ASK, ANSWER]}], {}, [TURN], "not used: 'problem'",
    ),
    "answers as messages whose question nobody knows": (
        [{"topic": "A lake?", "reply": [ANSWER]}], {}, None, "--prompt-column COLUMN --completion-column reply",
    ),
    "messages that end in a question beside two numbered answers": (
        [{"context": [ASK, BAD, ASK], "response1": "Chiemsee.", "response2": "Zugspitze."}], {}, None,
        "'response1', 'response2' may hold it",
    ),
    "messages before a list of answers, of which the first counts": (
        [{"prompt": [ASK, BAD, ASK], "response": ["Chiemsee.", "Zugspitze."]}], {}, [CONTEXT + TURN], "several answers, the first is trained",
    ),
    "messages that end in a question beside a number for its answer": (
        [{"messages": [ASK, BAD, ASK], "answer": 4}], {}, None, "'answer' may hold it",
    ),
    "messages that end in an answer beside a preferred text": (
        [{"messages": [ASK, ANSWER], "chosen": "Chiemsee.", "rejected": "Zugspitze."}], {}, [TURN], "not used: 'chosen'",
    ),
    "a whole conversation beside its question": ([{"prompt": [ASK], "full": [ASK, ANSWER]}], {}, [TURN], "not used: 'prompt'"),
    "two conversations of names that nobody knows": (
        [{"conversation_a": [ASK, ANSWER], "conversation_b": [ASK, BAD], "winner": "a"}], {}, None, "--messages-column conversation_a",
    ),
    "two conversations beside a text that is named": (
        [{"a": [ASK, ANSWER], "b": [ASK, BAD], "note": "Chiemsee."}], {"text_column": "note"}, ["C⟦hiemsee.<|im_end|>⟧"], "not used: 'a'",
    ),
    "two conversations beside tokens": (
        [{"a": [ASK, ANSWER], "b": [ASK, BAD], "input_ids": [70, 71, 72]}], {}, ["e⟦fg<|im_end|>⟧"], "not used: 'a'",
    ),
    "examples beside question and answer": (
        [{"question": "A lake?", "answer": "Chiemsee.", "examples": [{"input": "A hill?", "output": "Brocken."}]}], {}, [ASKED],
        "not used: 'examples'",
    ),
    "questions and answers beside what they may be about": (
        [{"instruction": "Name one.", "instances": [{"input": "A lake?", "output": "Chiemsee."}]}], {}, None,
        "'instruction' what they may be about",
    ),
    "a list of texts written as JSON under another name than a conversation's": (
        [{"question": "Sort.", "solutions": json.dumps(["a long one", "another"])}], {}, None, "--completion-column solutions",
    ),
    "a conversation of which the chosen one is another version": (
        [{"conversation": [{"input": "A lake?", "output": "Zugspitze."}], "chosen": [ASK, ANSWER], "rejected": [ASK, BAD]}], {}, [TURN],
        "'chosen' are trained",
    ),
    "a text beside its summary": (
        [{"article": "A lake is deep and wide.", "highlights": "A lake."}], {}, None, "--prompt-column article --completion-column highlights",
    ),
    "inputs and targets": (
        [{"inputs": "A lake?", "targets": "Chiemsee.", "language": "a language"}], {},
        ["### Inputs:\nA lake?\n\n### Targets:\n⟦Chiemsee.<|im_end|>⟧"], "'inputs', completion in 'targets'",
    ),
    "rejected answers without those preferred to them": (
        [{"question": "A lake?", "answer": "Chiemsee.", "rejected": [ASK, BAD]}], {}, [ASKED], "not used: 'rejected'",
    ),
    "rejected answers beside questions alone": (
        [{"messages": [ASK], "rejected": [BAD]}], {}, None, "none is left to train on (1 no answer)",
    ),
    "a system text in a list where the conversation has it too": (
        [{"messages": [{"role": "system", "content": "Short."}, ASK, ANSWER], "system": ["Short."]}], {},
        ["<|im_start|>system\nShort.<|im_end|>\n" + TURN], "",
    ),
    "a history of something else than talk": (
        [{"question": "A lake?", "answer": "Chiemsee.", "medical_history": ["asthma", "flu"]}], {},
        [ASKED], "not used: 'medical_history'",
    ),
    "a history of talk that is one text": (
        [{"question": "A lake?", "answer": "Chiemsee.", "chat_history": "Hi. Hello."}], {}, [ASKED], "not used: 'chat_history'",
    ),
    "a history under a longer name": (
        [{"question": "A lake?", "answer": "Chiemsee.", "chat_history": [["Hi", "Hello"]]}], {},
        ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n" + TURN], "'chat_history'",
    ),
    "preference rows of messages": ([{"rejected": [ASK, BAD], "chosen": [ASK, ANSWER]}], {}, [TURN], "'chosen' are trained"),
    "preference rows of messages after a prompt": (
        [{"prompt": [ASK], "chosen": [ANSWER], "rejected": [BAD]}], {}, [TURN], "'rejected' is left out",
    ),
    "preference rows whose answers repeat the prompt": (
        [{"prompt": "A lake?", "chosen": [ASK, ANSWER], "rejected": [ASK, BAD]}], {}, [TURN], "'chosen' are trained",
    ),
    "preference rows that repeat a prompt with an answer in it": (
        [{"prompt": [ASK, BAD, ASK], "chosen": [ASK, BAD, ASK, ANSWER], "rejected": [ASK, BAD, ASK, BAD]}], {},
        [CONTEXT + TURN], "",
    ),
    "preference rows of text, the rejected one longer": (
        [{"prompt": "A lake?", "rejected": "Zugspitze is a lake, and a deep and wide one.", "chosen": "Chiemsee."}], {},
        ["### Prompt:\nA lake?\n\n### Chosen:\n⟦Chiemsee.<|im_end|>⟧"], "'chosen' are trained",
    ),
    "preference rows under longer names, as messages": (
        [{"prompt": [ASK], "rejected_response": [BAD], "chosen_response": [ANSWER]}], {}, [TURN], "'rejected_response' is left out",
    ),
    "preference rows under longer names, as text": (
        [{"prompt": "A lake?", "rejected_response": "Zugspitze is a lake, and a deep one.", "chosen_response": "Chiemsee."}], {},
        ["### Prompt:\nA lake?\n\n### Chosen response:\n⟦Chiemsee.<|im_end|>⟧"], "'chosen_response' are trained",
    ),
    "preferred answers whose question nobody knows": (
        [{"input": {"messages": [ASK]}, "preferred_output": [ANSWER], "non_preferred_output": [BAD]}], {}, None,
        "The answers in 'preferred_output' stand alone",
    ),
    "a conversation twice, as messages and as the chosen one": (
        [{"prompt": "A lake?", "messages": [ASK, ANSWER], "chosen": [ASK, ANSWER], "rejected": [ASK, BAD]}], {}, [TURN], "'chosen' are trained",
    ),
    "a question beside answers that have no known name": (
        [{"prompt": "A lake?", "winner": "Chiemsee.", "loser": "Zugspitze is a lake, and a deep one."}], {}, None,
        "'prompt' is named like a question",
    ),
    "a question beside an answer with a longer name": (
        [{"problem": "A lake?", "domain": "about lakes and hills", "deepseek_solution": "Chiemsee."}], {}, None,
        "--completion-column deepseek_solution",
    ),
    "preference rows of whole texts": (
        [{"chosen": "Q: A lake? A: Chiemsee.", "rejected": "Q: A lake? A: Zugspitze, which is very high."}], {},
        ["Q⟦: A lake? A: Chiemsee.<|im_end|>⟧"], "'chosen' are trained",
    ),
    "ranking rows: a conversation, then one message each": (
        [{"conversations": [{"from": "human", "value": "A lake?"}], "chosen": {"from": "gpt", "value": "Chiemsee."},
          "rejected": {"from": "gpt", "value": "Zugspitze."}}], {}, [TURN], "'chosen' are trained",
    ),
    "feedback that says false of an answer": (
        [{"prompt": "A lake?", "completion": "Chiemsee.", "label": True}, {"prompt": "A lake?", "completion": "Zugspitze.", "label": False}],
        {}, [HEADED], "1 of 2 rows was left out: 'label' is false",
    ),
    "feedback on conversations, in words": (
        [{"messages": [ASK, ANSWER], "label": "True"}, {"messages": [ASK, BAD], "label": "false"}], {}, [TURN], "'label' is false",
    ),
    "a label that is none of feedback": (
        [{"prompt": "A lake?", "completion": "Chiemsee.", "label": False}, {"prompt": "A lake?", "completion": "Chiemsee.", "label": True}],
        {"format": "prompt"}, [HEADED] * 2, "What column 'label' says of rows does nothing beside --format prompt",
    ),
    "feedback on questions that are put into the chat template": (
        [{"prompt": "A lake?", "completion": "Chiemsee.", "label": True}, {"prompt": "A lake?", "completion": "Zugspitze.", "label": False}],
        {"format": "chat"}, [TURN], "Rows whose column 'label' is false are left out; under another name it does nothing",
    ),
    "feedback beside a system text": (
        [{"system": "Be brief.", "prompt": "A lake?", "completion": "Chiemsee.", "label": label} for label in (True, False)], {},
        ["<|im_start|>system\nBe brief.<|im_end|>\n" + TURN], "are left out; --format chat trains them too",
    ),
    "a label that is a class": (
        [{"prompt": "A lake?", "completion": "Chiemsee.", "label": "geography"}], {}, [HEADED], "not used: 'label'",
    ),
    "a conversation as text": (
        [{"text": "### Human: A lake?### Assistant: Chiemsee."}], {}, ["#⟦## Human: A lake?### Assistant: Chiemsee.<|im_end|>⟧"],
        "The texts look like conversations ('### Human:', '### Assistant:'), of which the questions are trained, too. "
        "The answers alone, under the chat template: --messages-column text",
    ),
    "a conversation as text that ends in the end of text": (
        [{"text": "### Human: A lake?### Assistant: Chiemsee.<|im_end|>"}], {}, ["#⟦## Human: A lake?### Assistant: Chiemsee.<|im_end|>⟧"],
        "of which the questions are trained, too.",
    ),
    "a completion of conversations as text": (
        [{"text": "### Human: A lake?### Assistant: Chiemsee."}], {"train_on": "completion"}, None, "have the conversations in them read: --messages-column text",
    ),
    "its answers alone": (
        [{"text": "### Human: A lake?### Assistant: Zugspitze.### Human: A lake?### Assistant: Chiemsee."}], {"messages_column": "text"},
        [CONTEXT.replace("Zugspitze.<|im_end|>", "⟦Zugspitze.<|im_end|>⟧") + TURN], "chat messages in column 'text'",
    ),
    "preferred conversations as text": (
        [{"chosen": "\n\nHuman: A lake?\n\nAssistant: Chiemsee.", "rejected": "\n\nHuman: A lake?\n\nAssistant: Zugspitze."}], {},
        ["\n⟦\nHuman: A lake?\n\nAssistant: Chiemsee.<|im_end|>⟧"], "--messages-column chosen",
    ),
    "the answers of preferred conversations alone": (
        [{"chosen": "\n\nHuman: A lake?\n\nAssistant: Chiemsee.", "rejected": "\n\nHuman: A lake?\n\nAssistant: Zugspitze."}],
        {"messages_column": "chosen"}, [TURN], "'rejected' is left out",
    ),
    "a conversation as text that calls a function": (
        [{"chat": "USER: A lake?\n\n\nASSISTANT: Find.\n\n\nFUNCTION RESPONSE: {}\n\n\nASSISTANT: Chiemsee.\nUSER: is a word."}], {"messages_column": "chat"},
        [TURN.replace("Chiemsee.", "Find.") + "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n⟦Chiemsee.<|im_end|>⟧"],
        "1 conversation ends in messages without an answer",
    ),
    "text of few conversations": ([{"text": "Q: A lake?\nA: Chiemsee."}, {"text": "Lakes."}], {}, ["Q⟦: A lake?\nA: Chiemsee.<|im_end|>⟧", "L⟦akes.<|im_end|>⟧"], ""),
    "text that is no conversation in a column that is named so": (
        [{"text": "Lakes."}], {"messages_column": "text"}, None, "nor turns under names like 'Human:' and 'Assistant:'",
    ),
    "messages beside the export that they come from": (
        [{"mapping": {"a": {"message": None, "parent": None}}, "current_node": "a", "messages": [ASK, ANSWER]}], {}, [TURN], "not used: 'mapping'",
    ),
    "completions that begin with their prompts": (
        [{"prompt": "A lake?", "completion": "A lake? Chiemsee."}], {}, [HEADED.replace("⟦", "⟦A lake? ")],
        "Every completion begins with its prompt, which so stands there twice and is trained, too. The completions alone, as they are: "
        "--text-column completion",
    ),
    "a long text beside an answer": (
        [{"context": "The largest lake of Bavaria?", "answer": "Chiemsee."}], {}, None, "--prompt-column context --completion-column answer",
    ),
    "nothing that was printed as text": (
        [{"instruction": "A lake?", "input": "nan", "output": "Chiemsee.", "system": "null", "history": "None"}], {},
        ["### Instruction:\nA lake?\n\n### Input:\nnan\n\n### Response:\n⟦Chiemsee.<|im_end|>⟧"],
        "Column 'input' holds nan in 1 of the first 1 row, which is taken for its text.",
    ),
    "nothing that was printed where no text belongs": (
        [{"messages": [ASK, {**ANSWER, "tool_calls": "null"}], "tools": "null", "system": "None", "chat_template_kwargs": "null"}], {}, [TURN], "",
    ),
    "messages as JSON text": ([{"id": "row-one", "messages": json.dumps([ASK, ANSWER])}], {}, [TURN], "not used: 'id'"),
    "messages as a list of JSON texts": ([{"id": "row-one", "messages": [json.dumps(ASK), json.dumps(ANSWER)]}], {}, [TURN], ""),
    "messages as Python prints them": ([{"id": "row-one", "messages": repr([ASK, ANSWER])}], {}, [TURN], ""),
    "messages as text that is neither": ([{"messages": "[{'role': 'user' 'content': oops}]"}], {}, None, "'messages' seems to hold messages as text"),
    "texts in turn": ([{"id": "talk-0", "data": ["A lake?", "Chiemsee."]}], {}, [TURN], "not used: 'id'"),
    "pairs in a list": ([{"conversation_id": "n1", "conversation": [{"human": "A lake?", "assistant": "Chiemsee."}]}], {}, [TURN], ""),
    "turns under numbered keys": (
        [{"chat": {"turn_2": {"human": "A lake?", "assistant": "Chiemsee."}, "turn_1": {"human": "A lake?", "assistant": "Zugspitze.", "weight": 0}}}],
        {}, [CONTEXT + TURN], "",
    ),
    "speakers whose names say which is the assistant": (
        [{"dialogue": [{"speaker": "User", "utterance": "A lake?"}, {"speaker": "Bot", "utterance": "Chiemsee."}]}], {}, [TURN], "",
    ),
    "speakers whose names do not say it": (
        [{"dialogue": [{"speaker": "A", "text": "A lake?"}, {"speaker": "B", "text": "Chiemsee."}]}], {}, None, "--role a=user --role b=assistant",
    ),
    "speakers of whom flags say it": (
        [{"dialogue": [{"speaker": "A", "text": "A lake?"}, {"speaker": "B", "text": "Chiemsee."}]}], {"role": ("A=user", "B=assistant")}, [TURN], "",
    ),
    "an export of chats": (
        [{"chat_messages": [{"sender": "human", "text": "A lake?", "content": [{"type": "text", "text": "A lake?"}]},
                            {"sender": "assistant", "text": "Chiemsee.", "content": [{"type": "text", "text": "Chiemsee."}]}]}], {}, [TURN], "",
    ),
    "messages of LangChain": ([{"messages": [{"type": "human", "content": "A lake?"}, {"type": "ai", "content": "Chiemsee."}]}], {}, [TURN], ""),
    "a text beside the content": ([{"messages": [ASK, {**ANSWER, "text": "Brocken."}]}], {}, [TURN], "Keys of messages that are not used: 'text'"),
    "keys that nobody knows, in a later row": (
        [{"messages": [ASK, ANSWER]}] * SAMPLE_RECORDS
        + [{"messages": [ASK, {**ANSWER, "masked": False, "refusal": None, "weight": 1, "id": "7"}]}], {}, [TURN] * (SAMPLE_RECORDS + 1),
        "Keys of messages that are not used: 'masked' (in 1 conversation).",
    ),
    "a key that nobody knows, of a question with its answer": (
        [{"conversation": [{"question": "A lake?", "answer": "Chiemsee.", "score": 3}]}], {}, [TURN], "not used: 'score' (in 1 conversation)",
    ),
    "names of those who ask": ([{"messages": [{**ASK, "name": "Ann"}, ANSWER]}], {}, [TURN], "Keys of messages that are not used: 'name'"),
    "a system that answers": (
        [{"turns": [{"speaker": "USER", "utterance": "A lake?"}, {"speaker": "SYSTEM", "utterance": "Chiemsee."}]}], {}, None,
        "--role system=assistant",
    ),
    "who spoke in a recording beside its text": (
        [{"text": "Lakes.", "segments": [{"speaker": "A", "text": "Lakes."}]}], {}, ["L⟦akes.<|im_end|>⟧"], "not used: 'segments'",
    ),
    "a question and its answer beside what may be of either": (
        [{"messages": [{"question": "A lake?", "answer": "Chiemsee.", "content": "Bavaria."}]}], {}, None, "'question', 'answer', 'content'",
    ),
    "who is played beside a conversation": ([{"role": "Holmes", "talk": [ASK, ANSWER]}], {}, [TURN], "not used: 'role'"),
    "a source beside preferred conversations": (
        [{"from": "wikipedia", "text": "Lakes.", "chosen": [ASK, ANSWER], "rejected": [ASK, BAD]}], {}, [TURN], "not used: 'from', 'text'",
    ),
    "a log beside its text": (
        [{"text": "Lakes.", "log": [{"type": "system", "content": "Up."}]}], {}, ["L⟦akes.<|im_end|>⟧"], "not used: 'log'",
    ),
    "a number beside question and answer": (
        [{"messages": [{"question": "A lake?", "answer": "Chiemsee.", "value": 0.9}]}], {}, [TURN], "not used: 'value'",
    ),
    "what people said beside a question about it": (
        [{"dialogue": [{"speaker": "A", "text": "Where?"}, {"speaker": "B", "text": "There."}], "question": "A lake?", "answer": "Chiemsee."}], {}, [ASKED],
        "not used: 'dialogue'",
    ),
    "what people said beside the text of it": (
        [{"turns": [{"speaker": "A", "text": "Lakes."}, {"speaker": "B", "text": "Ah."}], "text": "Lakes."}], {}, ["L⟦akes.<|im_end|>⟧"], "not used: 'turns'",
    ),
    "posts of a thread": ([{"author": "Ann", "text": "Lakes.", "thread_id": 1}], {}, None, "--text-column text trains each by itself"),
    "an answer that is an object of a list and a text": (
        [{"question": "A lake?", "answer": {"aliases": ["Bavarian Sea"], "value": "Chiemsee."}}], {}, None, "--completion-column answer.value",
    ),
    "an answer that is an object": (
        [{"instruction": "A lake?", "output": {"name": "Chiemsee."}}], {}, None, "--prompt-column instruction --completion-column output.name",
    ),
    "answers that differ in a call alone": (
        [{"prompt": [ASK, {**BAD, "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "73 m"}, ASK],
          "chosen": [ASK, {**BAD, "content": "", "tool_calls": [HILL]}, {"role": "tool", "content": "3 km"}, ANSWER], "rejected": [ASK, BAD]}],
        {"on_lost_content": "warn"},
        ["<|im_start|>user\nA lake?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\n3 km<|im_end|>\n<|im_start|>assistant\n⟦Chiemsee.<|im_end|>⟧"],
        "",
    ),
    "a struct of lists": ([{"conversation": {"from": ["human", "gpt"], "value": ["A lake?", "Chiemsee."]}}], {}, [TURN], ""),
    "rows that are lists of messages": (json.dumps([ASK, ANSWER]) + "\n" + json.dumps([ASK, ANSWER]) + "\n", {}, [TURN, TURN], ""),
    "the first conversation is empty": (
        [{"id": "a", "messages": []}, {"id": "b", "messages": [ASK, ANSWER]}], {"on_bad_row": "skip"}, [TURN], "1 of 2 rows is bad",
    ),
    "half of the rows are of another kind": (
        [{"messages": [ASK, ANSWER]}, {"words": "A text that stands for itself."}], {}, None, "in 1 of the first 2 rows only",
    ),
    "an answer that is a number": ([{"question": "2+2?", "answer": 4}], {}, None, "named like question and answer"),
    "a role of ones own": ([{"messages": [ASK, {**ANSWER, "role": "bard"}]}], {}, None, "--role bard=assistant"),
    "a role that is mapped": ([{"messages": [ASK, {**ANSWER, "role": "bard"}]}], {"role": ("bard=assistant",)}, [TURN], ""),
    "a map of roles that is none": ([{"messages": [ASK, ANSWER]}], {"role": ("bard",)}, None, "--role bard is no NAME=ROLE"),
    "each row is one message": ([{"role": "prompter", "text": "A lake?"}, {"role": "assistant", "text": "Chiemsee."}], {}, None, "one message with a role"),
    "a column of thoughts": (
        [{"question": "A lake?", "reasoning": "Think of Bavaria.", "answer": "Chiemsee."}], {}, [ASKED], "not used: 'reasoning'. A template",
    ),
    "a system column beside messages": (
        [{"system": "Be brief.", "messages": [ASK, ANSWER]}], {}, ["<|im_start|>system\nBe brief.<|im_end|>\n" + TURN], "system text in 'system'",
    ),
    "a system column beside question and answer": (
        [{"system_prompt": "Be brief.", "question": "A lake?", "response": "Chiemsee."}], {},
        ["<|im_start|>system\nBe brief.<|im_end|>\n" + TURN], "system text in 'system_prompt'",
    ),
    "a system column that --format prompt leaves out": (
        [{"system_prompt": "Be brief.", "question": "A lake?", "answer": "Chiemsee."}], {"format": "prompt"}, [ASKED], "not used: 'system_prompt'",
    ),
    "a history beside question and answer": (
        [{"instruction": "A lake?", "input": "", "output": "Chiemsee.", "history": [["Hi", "Hello"]]}], {},
        ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n" + TURN], "'history' and 'instruction'",
    ),
    "histories that are empty": (
        [{"question": "A lake?", "answer": "Chiemsee.", "history": []}], {}, [ASKED], "not used: 'history'",
    ),
    "question and answer as a conversation, if asked for": ([{"question": "A lake?", "answer": "Chiemsee."}], {"format": "chat"}, [TURN], ""),
    "an answer inside a list": (
        [{"context": "", "question": "A lake?", "answers": {"text": ["Chiemsee."], "answer_start": [3]}}], {},
        ["### Question:\nA lake?\n\n### Answers:\n⟦Chiemsee.<|im_end|>⟧"], "",
    ),
    "a turn that is not to be trained": (
        [{"messages": [ASK, {**BAD, "weight": 0}, ASK, ANSWER]}], {},
        [CONTEXT + TURN], "",
    ),
    "a column that says which rows are trained": (
        [{"question": "A lake?", "answer": "Chiemsee.", "weight": 1}, {"question": "A hill?", "answer": "Zugspitze.", "weight": 0}], {}, [ASKED],
        "1 of 2 rows was left out: 'weight' is 0",
    ),
    "a column that says which messages are trained": (
        [{"messages": [ASK, BAD, ASK, ANSWER], "loss_mask": [0, 0, 0, 1]}, {"messages": [ASK, BAD, ASK, ANSWER], "loss_mask": [0, 1]}], {},
        [CONTEXT + TURN] * 2, "Column 'loss_mask' says which messages are trained",
    ),
    "a column that says it of another number of messages": (
        [{"messages": [ASK, ANSWER], "loss_mask": [0, 0, 1]}], {}, None, "3 entries, but the conversation has 2 messages, 1 of them answers",
    ),
    "a column that weighs rows": (
        [{"messages": [ASK, ANSWER], "weight": 0.5}, {"messages": [ASK, ANSWER], "weight": 2}], {}, None, "--format chat",
    ),
    "a column that weighs rows beside a named one": (
        [{"messages": [ASK, ANSWER], "weight": 0.5}], {"messages_column": "messages"}, [TURN], "not used: 'weight'",
    ),
    "a list of what is trained as JSON text": (
        [{"messages": [ASK, BAD, ASK, ANSWER], "loss_mask": "[0, 1]"}], {}, [CONTEXT + TURN], "Column 'loss_mask' says which messages are trained",
    ),
    "a weight of something else, beside a system text": (
        [{"system_prompt": "Be brief.", "question": "A lake?", "response": "Chiemsee.", "weight": 70.5}], {}, None, "train on all of them alike: --format chat",
    ),
    "so it is read where the format is stated": (
        [{"system_prompt": "Be brief.", "question": "A lake?", "response": "Chiemsee.", "weight": 70.5}], {"format": "chat"},
        ["<|im_start|>system\nBe brief.<|im_end|>\n" + TURN], "not used: 'weight'",
    ),
    "0 and 1 that say nothing of training": (
        [{"question": "A lake?", "answer": "Chiemsee.", "weight": 0}] * 2, {"format": "prompt"}, [ASKED] * 2, "What column 'weight' says is trained or is not does nothing",
    ),
    "0 and 1 beside a named column": (
        [{"messages": [ASK, ANSWER], "loss_mask": [0, 0]}], {"messages_column": "messages"}, [TURN], "What column 'loss_mask' says is trained or is not does nothing",
    ),
    "weights that only later rows have": (
        [{"question": "A lake?", "answer": "Chiemsee.", "weight": 1}] * SAMPLE_RECORDS + [{"question": "A lake?", "answer": "Chiemsee.", "weight": 0.5}], {}, None,
        "'weight' is 0.5; a row is trained (1) or is not (0). Train on all rows alike: --format prompt",
    ),
    "nothing where 0 or 1 stands in other rows": (
        json.dumps([{"question": "A lake?", "answer": "Chiemsee.", "weight": weight} for weight in ("", "1", "0")]), {}, [ASKED] * 2, "1 of 3 rows was left out",
    ),
    "weights of tokens": ([{"input_ids": [70, 71], "weights": [0.0, 1.0]}], {}, None, "into a column 'loss_mask'"),
    "a list that says every turn is trained": (
        [{"messages": [ASK, ANSWER], "loss_mask": [1, 1]}], {}, [TURN], "of turns that are no answers that they are trained, which does nothing: --train-on all",
    ),
    "weights of questions that only later rows have": (
        [{"messages": [ASK, ANSWER]}] * SAMPLE_RECORDS + [{"messages": [{**ASK, "weight": 1}, {**ANSWER, "weight": 1}]}],
        {}, [TURN] * (SAMPLE_RECORDS + 1), "1 conversation says of turns that are no answers",
    ),
    "what is trained beside null roles": (
        [{"messages": [{"role": None, "from": "human", "value": "A lake?"}, {"role": None, "from": "gpt", "value": "Chiemsee."}], "loss_mask": [1]}], {}, [TURN], "",
    ),
    "a column of losses": ([{"messages": [ASK, ANSWER], "loss": 2.3}], {}, [TURN], "not used: 'loss'"),
    "no turn that is to be trained": ([{"messages": [ASK, {**ANSWER, "train": False}]}], {}, None, "no answer that the data lets be trained"),
    "ids are no text": ([{"doc_id": "row one"}], {}, None, "No column holds text"),
    "something nested holds more than the text": (
        [{"name": "row one", "pages": [{"body": "Once upon a time there was a lake."}]}], {}, None, "Column 'pages' holds most of the rows",
    ),
    "answers of conversations that all end in the end of a turn": (
        [{"messages": [{**ASK, "content": "A <|im_end|>?"}, {**ANSWER, "content": "Chiemsee.<|im_end|>\n"}]}], {},
        [TURN.replace("A lake?", "A <|im_end|>?")], "ends in <|im_end|>, which is taken for the end",
    ),
    "answers that all end in the end of a turn, after a context whose do not": (
        [{"question": [ASK, BAD, ASK], "answer": [{**ANSWER, "content": "Chiemsee.<|im_end|>"}]}], {}, [CONTEXT + TURN],
        "Every answer ends in <|im_end|>",
    ),
    "answers of conversations of which some end in the end of a turn": (
        [{"messages": [ASK, {**ANSWER, "content": "Chiemsee.<|im_end|>"}]}, {"messages": [ASK, ANSWER]}], {},
        [TURN.replace("Chiemsee.", "Chiemsee.<|im_end|>"), TURN], "typed in answers are kept as plain text",
    ),
    "text that ends in the end of text": (
        [{"text": "A lake.<|im_end|>"}, {"text": "A hill.<|im_end|>\n"}], {},
        ["A⟦ lake.<|im_end|>⟧", "A⟦ hill.<|im_end|>⟧"], "formatted beforehand",
    ),
    "text that holds the template's tokens": (
        [{"text": "Chat. <|im_start|>user\nHi"}, {"text": "Talk. <|im_start|>user\nHo"}], {},
        ["C⟦hat. <|im_start|>user\nHi<|im_end|>⟧", "T⟦alk. <|im_start|>user\nHo<|im_end|>⟧"], "formatted beforehand",
    ),
    "control tokens here and there": ([{"text": "A lake.<|im_end|>"}, {"text": "A hill."}], {}, ["A⟦ lake.<|im_end|><|im_end|>⟧", "A⟦ hill.<|im_end|>⟧"], "1 of the first 2 rows"),
    "completions that end in the end of text": (
        [{"question": "A lake?", "answer": "Chiemsee.<|im_end|>"}], {}, [ASKED], "ends in <|im_end|>",
    ),
    "completions that end in another control token": (
        [{"question": "A lake?", "answer": "Chiemsee.<|im_start|>"}], {},
        ["### Question:\nA lake?\n\n### Answer:\n⟦Chiemsee.<|im_start|><|im_end|>⟧"], "ends in <|im_start|>",
    ),
    "prompts formatted beforehand": (
        [{"prompt": "<|im_start|>user\nA lake?<|im_end|>\n<|im_start|>assistant\n", "completion": "Chiemsee.<|im_end|>"}], {}, [TURN], "without headings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "object.json"])
def test_a_key_that_stands_twice_in_an_object_is_named_where_its_values_differ(name, tmp_path):
    rows = [
        '{"question": "A lake?", "answer": "Zugspitze.", "answer": "Chiemsee.", "id": 1, "id": 1}',
        '{"question": "A lake?", "answer": "Chiemsee.", "by": {"who": "a", "who": "b"}}',
    ]
    content = {
        "a.jsonl": "\n".join(rows),
        "array.json": f"[{','.join(rows)}]",
        "object.json": f'{{"rows": [{",".join(rows)}]}}',
    }
    got, said = prepared(tmp_path, content[name], byte_level(), name)
    assert got == [ASKED] * 2
    assert "different values: 'answer' (in 1 object), 'who' (in 1 object). The last value" in said


@pytest.mark.parametrize("name", CASES)
def test_rows_become_what_was_meant(name, tmp_path):
    rows, settings, expected, said = CASES[name]
    found, words = prepared(tmp_path, rows, byte_level(), **settings)
    assert found == expected, words
    assert said in words


THREAD = [
    {"id": "1", "parent": None, "role": "prompter", "text": "A lake?"},
    {"id": "2", "parent": "1", "role": "assistant", "text": "Chiemsee."},
    {"id": "3", "parent": "1", "role": "assistant", "text": "Zugspitze."},
]
TREE = {**THREAD[0], "replies": [THREAD[1], {**THREAD[2], "replies": []}]}
OTHER = TURN.replace("Chiemsee", "Zugspitze")
SAID = {"ask": "A lake?", "reply": "Chiemsee."}


def linked(id, parent, role=None, text=""):
    message = role and {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}
    return {id: {"id": id, "parent": parent, "message": message, "children": []}}


LINKED = (
    linked("r", None)
    | linked("s", "r", "system")
    | linked("q", "s", "user", "A lake?")
    | linked("w", "q", "assistant", "Zugspitze.")
)
LINKED |= linked("t", "q", "tool", "{}") | linked("a", "t", "assistant", "Chiemsee.")
CHATGPT = {"title": "Lakes", "mapping": LINKED, "current_node": "a"}
JOINED = {
    "rows that name the message before": (THREAD, [TURN, OTHER]),
    "rows of a conversation": ([{"dialogue_id": 1, "speaker": role, "utterance": text} for role, text in (("user", "A lake?"), ("bot", "Chiemsee."))], [TURN]),
    "rows that are trees": ([TREE], [TURN, OTHER]),
    "trees in a column": ([{"tree_id": 1, "prompt": TREE}], [TURN, OTHER]),
    "an export of ChatGPT's": (json.dumps([CHATGPT, {**CHATGPT, "current_node": "s"}, CHATGPT]), [TURN, TURN]),
    "what was sent to an API and came back": (
        [{"request": {"model": "m", "messages": [ASK]}, "response": {"choices": [{"message": ANSWER}]}, "ms": 3}] * 2, [TURN, TURN],
    ),
    "bodies of what was sent and came back": (
        [{"request": {"body": {"messages": [ASK]}}, "response": {"body": {"choices": [{"message": ANSWER}]}}}] * 2, [TURN, TURN],
    ),
    "messages and what an API sent back": ([{"messages": [ASK], "response": {"choices": [{"message": ANSWER}]}}] * 2, [TURN, TURN]),
    "a question and what an API sent back": ([{"prompt": ASK["content"], "response": {"choices": [{"message": ANSWER}]}}] * 2, [TURN, TURN]),
    "nulls among messages": ([{"messages": [None, ASK, ANSWER], "id": 1}, {"messages": [ASK, None, ANSWER]}], [TURN, TURN]),
    "turns in fields that nobody knows": ([{"chat": {"turn_1": SAID}}, {"chat": {"turn_1": SAID}}], [TURN, TURN]),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINED)
def test_the_command_that_joins_messages_gives_rows_that_are_read(name, tmp_path):
    rows, expected = JOINED[name]
    found, said = prepared(
        tmp_path, rows, byte_level(), name="DATA.jsonl" if isinstance(rows, list) else "conversations.json"
    )
    assert found is None
    command = said[said.index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert prepared(tmp_path, (tmp_path / "joined.jsonl").read_text(), byte_level(), name="joined.jsonl")[0] == expected


def test_answers_of_a_batch_are_joined_to_the_batch_that_was_sent(tmp_path):
    sent = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [ASK]}}
    came = {
        "custom_id": "a",
        "response": {"body": {"choices": [{"message": {**ANSWER, "refusal": None}}]}},
        "error": None,
    }
    failed = {"custom_id": "b", "response": {"body": {"error": {}}}}
    (tmp_path / "BATCH.jsonl").write_text(json.dumps(sent))
    found, said = prepared(tmp_path, [came] * 9 + [failed], byte_level(), name="DATA.jsonl")
    assert found is None and "in the batch that was sent" in said
    command = said[said.index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (
        prepared(tmp_path, (tmp_path / "joined.jsonl").read_text(), byte_level(), name="joined.jsonl")[0] == [TURN] * 9
    )


def test_fields_of_objects_are_named_like_columns(tmp_path):
    """As datasets' `flatten` calls them. What stands beside them counts by its own name, and what is left out is told."""
    tokenizer, places = byte_level(), (tmp_path / str(number) for number in range(12))

    def read(content, **settings):
        (place := next(places)).mkdir()
        return prepared(place, content, tokenizer, **settings)

    pair = {"id": 1, "translation": {"en": "A lake?", "fr": "Chiemsee.", "de": "Ein See?"}}
    rows, said = read([pair])
    assert rows is None and said.endswith("--prompt-column translation.en --completion-column translation.fr")
    named = {"prompt_column": "translation.en", "completion_column": "translation.fr"}
    for record in (pair, pair | {"translation": json.dumps(pair["translation"])}):
        rows, said = read([record], **named)
        assert rows == ["### En:\nA lake?\n\n### Fr:\n⟦Chiemsee.<|im_end|>⟧"]
        assert "not used: 'id', 'translation.de'." in said
    rows, said = read([pair | {"translation.en": "Own?"}], **named)
    assert rows == ["### En:\nOwn?\n\n### Fr:\n⟦Chiemsee.<|im_end|>⟧"]
    rows, said = read([pair], prompt_column="translation.it", completion_column="translation.fr")
    assert (
        "no column 'translation.it'; the data has 'id', 'translation.en', 'translation.fr', 'translation.de'." in said
    )
    deep = {"row": {"text": {"en": "A lake?", "fr": "Chiemsee."}, "note": "n"}}
    rows, said = read([deep], prompt_column="row.text.en", completion_column="row.text.fr")
    assert rows == ["### En:\nA lake?\n\n### Fr:\n⟦Chiemsee.<|im_end|>⟧"] and "not used: 'row.note'." in said
    template = "{translation.en} {translation.fr}"
    rows, said = read([pair], template=template, completion_column="translation.fr")
    assert rows == ["A lake?⟦ Chiemsee.<|im_end|>⟧"]
    (tmp_path / "template.txt").write_text(template)
    assert read([pair], template=str(tmp_path / "template.txt"))[0] == rows
    asked = {
        "input": {"messages": [ASK], "system": "Short."},
        "preferred_output": [ANSWER],
        "non_preferred_output": [BAD],
    }
    rows, said = read([asked])
    assert "--prompt-column input.messages --completion-column preferred_output" in said
    named = {"prompt_column": "input.messages", "completion_column": "preferred_output"}
    assert read([asked], **named)[0] == ["<|im_start|>system\nShort.<|im_end|>\n" + TURN]


def test_a_text_between_beginning_and_end_of_its_own_has_them_once(tmp_path):
    texts = ["A lake.", "<s>A hill.</s>\n", "<s>A sea.</s><s>A fen.</s>", "<s>A lake."]
    found, said = prepared(tmp_path, [{"text": text} for text in texts], sentencepiece_like())
    assert [text.replace("⟦", "").replace("⟧", "") for text in found] == [
        "<s>A lake.</s>", "<s>A hill.</s>", "<s><s>A sea.</s><s>A fen.</s></s>", "<s><s>A lake.</s>",
    ]  # fmt: skip
    ids = [PreparedRows(tmp_path / "out")[index][0].tolist() for index in range(4)]
    assert all((row.count(1), row.count(2)) == (1, 1) for row in ids)
    assert "1 of the first 4 texts stand between the tokens of beginning and end" in said
    assert "2 of the first 4 rows hold some" in said


def test_rows_that_a_column_keeps_from_training_are_said_wherever_they_stand(tmp_path):
    rows = [{"prompt": "A lake?", "completion": f"{i}.", "split": "train"} for i in range(SAMPLE_RECORDS)]
    held = [{**rows[0], "split": "Test"}, {**rows[0], "split": "validation"}]
    _, said = prepared(tmp_path, [*rows, *held], byte_level())
    assert "Rows that 'split' keeps from training are trained with the others: 'Test' (in 1 row), 'validation'" in said
    command = said[said.index("grep") :].split("\n")[0].replace("DATA.jsonl", "a.jsonl")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == SAMPLE_RECORDS
    for alike in (rows[:2], held):
        assert "keeps from training" not in prepared(tmp_path, alike, byte_level(), name="b.jsonl")[1]


def test_columns_of_later_rows_alone_are_named(tmp_path):
    """What a row holds is not passed over because none of those by which the format was recognised has it."""
    rows = [{"messages": [ASK, ANSWER]}] * SAMPLE_RECORDS
    later = {"messages": [ASK, ANSWER], "system": "Be brief.", "tools": [], "chat_template_kwargs": {"a": 1}}
    found, said = prepared(tmp_path, [*rows, later, later], byte_level())
    assert len(found) == SAMPLE_RECORDS + 2
    assert "the first rows hold nothing are not used: 'system' (in 2 rows). To" in said
    (tmp_path / "again").mkdir()
    assert "system text in 'system'" in prepared(tmp_path / "again", [later, *rows], byte_level())[1]
    (tmp_path / "null").mkdir()
    rated = [
        {"question": "A lake?", "answer": "Chiemsee.", "weight": weight} for weight in [None] * SAMPLE_RECORDS + [0.5]
    ]
    found, said = prepared(tmp_path / "null", rated, byte_level())
    assert len(found) == SAMPLE_RECORDS + 1 and "hold nothing are not used: 'weight' (in 1 row). To" in said
    (tmp_path / "rejected").mkdir()
    pairs = [{"prompt": "A lake?", "chosen": "Chiemsee.", "rejected": bad} for bad in [None] * SAMPLE_RECORDS + ["No."]]
    found, said = prepared(tmp_path / "rejected", pairs, byte_level())
    assert len(found) == SAMPLE_RECORDS + 1 and "'rejected' is left out" in said and "hold nothing" not in said


@pytest.mark.parametrize("rows", [1, 2])
def test_a_template_that_prints_no_tools_is_refused_with_flags_that_go_on(tmp_path, rows):
    tool = {"type": "function", "function": {"name": "depth", "parameters": {"properties": {"of": {}}}}}
    rows = [{"messages": [ASK, ANSWER], "tools": [tool]}] * rows
    found, said = prepared(tmp_path, rows, byte_level())
    assert (
        found is None and "--chat-template FILE" in said and "--on-lost-content warn" in said and "column" not in said
    )
    template = tmp_path / "tools.jinja"
    template.write_text("{{ tools | tojson }}" + str(byte_level().chat_template))
    assert prepared(tmp_path, rows, byte_level(), chat_template=str(template))[0] == [json.dumps([tool]) + TURN] * len(
        rows
    )
    (tmp_path / "again").mkdir()
    assert prepared(tmp_path / "again", rows, byte_level(), on_lost_content="warn")[0] == [TURN] * len(rows)


def test_a_template_for_tools_is_taken_where_there_are_tools(tmp_path):
    tokenizer = deepcopy(byte_level())
    with_tools = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls else '' }}{% endfor %}"
    )
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": with_tools + tokenizer.chat_template}
    tool = {"type": "function", "function": {"name": "depth", "parameters": {"properties": {"of": {}}}}}
    rows = [
        {"messages": [ASK, ANSWER], "tools": [tool]},
        {"messages": [ASK, ANSWER], "tools": []},
        {"messages": [ASK, ANSWER], "tools": None},
    ]
    found, said = prepared(tmp_path, rows, tokenizer)
    assert found == [json.dumps([tool]) + TURN, TURN, TURN], said


@pytest.mark.parametrize("prints_ids", [True, False])
def test_results_of_calls_stand_in_their_order_where_no_ids_are_printed(prints_ids, tmp_path):
    """Tools that are called at once answer when they are done, and a template without ids goes by the order."""
    tokenizer = deepcopy(byte_level())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
        "{{ m.tool_call_id if m.role == 'tool' else '' }}<|im_end|>{% endfor %}"
        "{{ '<|im_start|>assistant' if add_generation_prompt }}"
    ).replace("m.tool_call_id", "m.tool_call_id" if prints_ids else "''")
    calls = [{"id": f"call-{n}", "function": {"name": n, "arguments": {}}} for n in ("depth", "height")]
    results = [{"role": "tool", "tool_call_id": f"call-{n}", "content": n} for n in ("height", "depth")]
    calling = {"role": "assistant", "content": "", "tool_calls": calls}
    found, said = prepared(tmp_path, [{"messages": [ASK, calling, *results, ANSWER]}], tokenizer)
    (row,) = found
    assert (row.index("toolheight") < row.index("tooldepth")) == prints_ids, row
    assert ("1 conversation has results of tools in another order" in said) == (not prints_ids)


def test_control_tokens_that_are_ordinary_added_tokens_are_letters_where_they_are_typed(tmp_path):
    tokenizer = deepcopy(byte_level())
    tokenizer.add_tokens(["<｜User｜>", "<｜Assistant｜>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ ('<｜User｜>' if m.role == 'user' else '<｜Assistant｜>') + m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '<｜Assistant｜>' if add_generation_prompt }}"
    )
    typed = {"role": "user", "content": "A lake?<｜Assistant｜>Yes.<｜User｜>Go on."}
    found, said = prepared(tmp_path, [{"messages": [typed, ANSWER]}], tokenizer)
    assert found == ["<｜User｜>A lake?<｜Assistant｜>Yes.<｜User｜>Go on.<｜Assistant｜>⟦Chiemsee.<|im_end|>⟧"], said
    ids = PreparedRows(tmp_path / "out")[0][0].tolist()
    control = tokenizer.convert_tokens_to_ids(["<｜User｜>", "<｜Assistant｜>"])
    assert [ids.count(token) for token in control] == [1, 1]


@pytest.mark.parametrize(
    ("texts", "rows"),
    [
        (["<s>[INST] A lake? [/INST] Chiemsee. </s>", "<s>[INST] A lake? [/INST] Chiemsee."], 2),
        (["<s>[INST] A lake? [/INST] Chiemsee."], 1),
    ],
)
def test_text_whose_every_row_begins_with_a_control_token_holds_each_of_them_once(tmp_path, texts, rows):
    tokenizer = sentencepiece_like()
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    summary = prepare_rows(PrepareConfig(data=str(path)), tokenizer, None, tmp_path / "out", print, workers=1)
    prepared_rows = PreparedRows(summary.directory)
    assert len(prepared_rows) == rows
    for index in range(rows):
        ids = prepared_rows[index][0].tolist()
        assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)


TOKENS = {
    "a completion mask": ([{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}], [[7, 8, None]]),
    "masks of the assistant": ([{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]}], [[6, 8, None]]),
    "labels and a mask": (
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "completion_mask": [0, 0, 1]}],
        [[7, None]],
    ),
    "padding that no mask tells of": (
        [{"input_ids": [0, 0, 5, 6, 0]}, {"input_ids": [5, 0, 6]}],
        [[6, None], [0, 6, None]],
    ),
    "labels of padding that a mask leaves out": (
        [{"input_ids": [5, 6, 0], "labels": [-100, 6, 1], "attention_mask": [1, 1, 0]}],
        [[6, None]],
    ),
    "a mask of true and false": ([{"input_ids": [5, 6, 7], "loss_mask": [False, True, True]}], [[6, 7, None]]),
    "labels that mask the last words": ([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, -100]}], [[6, 7]]),
    "rows packed beforehand": (
        [{"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1]}],
        [[6, 7, None], [9, None]],
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_masks_that_the_data_gives_are_obeyed(name, tmp_path):
    rows, expected = TOKENS[name]
    tokenizer = byte_level()
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = prepare_rows(PrepareConfig(data=str(path)), tokenizer, None, tmp_path / "out", print, workers=1)
    prepared_rows = PreparedRows(summary.directory)
    found = [prepared_rows[index] for index in range(len(prepared_rows))]
    eos = tokenizer.eos_token_id
    assert [ids[trained].tolist() for ids, trained in found] == [
        [eos if t is None else t for t in row] for row in expected
    ]


def test_padding_by_end_tokens_is_taken_off_either_end(tmp_path):
    tokenizer = deepcopy(byte_level())
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    rows = [{"input_ids": ids} for ids in ([end, end, 5, 6, end], [end, 5, 6, end], [5, 6, end, end])]
    found, said = prepared(tmp_path, rows, tokenizer)
    assert [row.count("<|im_end|>") for row in found] == [1, 2, 1] and "2 of 3 rows were filled up with padding" in said


def test_rows_of_one_record_keep_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"word {n} " * count}) + "\n" for n, count in enumerate((9, 0, 1, 30))))
    config = PrepareConfig(data=str(path), max_length=16, overlong="split")
    summary = prepare_rows(config, byte_level(), None, tmp_path / "out", print, workers=1)
    rows = PreparedRows(summary.directory)
    assert sorted(set(rows.records.tolist())) == [0, 2, 3]  # the empty one has no rows
    assert rows.records.tolist() == sorted(rows.records.tolist())
    for record in (0, 2, 3):
        assert all(
            str(record) in byte_level().decode(rows[i][0]) for i in range(len(rows)) if rows.records[i] == record
        )


LAKES = [{"question": "A lake?", "answer": "Chiemsee."}, {"question": "A hill?", "answer": "Brocken."}]
PLACES = [ASKED, "### Question:\nA hill?\n\n### Answer:\n⟦Brocken.<|im_end|>⟧"]
FILES = {
    "a.json, pandas' index": (json.dumps(dict(enumerate(LAKES))), PLACES),
    "a.json, pandas' columns": (
        '{"question":{"0":"A lake?","1":"A hill?"},"answer":{"0":"Chiemsee.","1":"Brocken."}}', PLACES,
    ),
    "a.json, pandas' split": (
        '{"columns":["question","answer"],"index":[0,1],"data":[["A lake?","Chiemsee."],["A hill?","Brocken."]]}', PLACES,
    ),
    "a.json, a list for each column": ('{"question":["A lake?","A hill?"],"answer":["Chiemsee.","Brocken."]}', PLACES),
    "a.json, rows under a version": (json.dumps({"version": "1.1", "data": LAKES}), PLACES),
    "a.json, one row with a nested list": (
        json.dumps({"instruction": "A lake?", "output": "Chiemsee.", "tags": [{"name": "geo"}, {"name": "easy"}]}),
        ["### Instruction:\nA lake?\n\n### Response:\n⟦Chiemsee.<|im_end|>⟧"],
    ),
    "a.json, one conversation": (json.dumps({"id": 1, "dialogue": [ASK, ANSWER]}), [TURN]),
    "a.json, paragraphs and their questions": (
        json.dumps({"version": "2.0", "data": [{"title": "Lakes", "paragraphs": [{"context": "", "qas": [
            {"id": "1", "question": "A lake?", "answers": [{"text": "Chiemsee.", "answer_start": 0}]}]}]}]}),
        ["### Question:\nA lake?\n\n### Answers:\n⟦Chiemsee.<|im_end|>⟧"],
    ),
    "a.csv, the index that pandas saves": (",question,answer\n0,A lake?,Chiemsee.\n1,A hill?,Brocken.\n", PLACES),
    "a.csv, tabs": ("question\tanswer\nA lake?\tChiemsee.\nA hill?\tBrocken.\n", PLACES),
    "a.csv, words that mean nothing": ("question,answer\nA lake?,null\n", [ASKED.replace("Chiemsee.", "null")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_hold_the_rows_that_were_meant(name, tmp_path):
    text, expected = FILES[name]
    found, words = prepared(tmp_path, text, byte_level(), name=name.partition(",")[0])
    assert found == expected, words


def test_the_index_that_pandas_saves_is_named_as_unused(tmp_path):
    text, expected = FILES["a.csv, the index that pandas saves"]
    assert prepared(tmp_path, text, byte_level(), name="a.csv") == (
        expected,
        f"{tmp_path / 'a.csv'}: prompt in column 'question', completion in 'answer', answers trained. "
        "Columns that are not used: one without a name.",
    )


def test_what_arrow_pads_objects_with_is_left_out_and_maps_and_json_are_objects(tmp_path):
    import pyarrow as pa

    from qlora_cli.core.reading.arrow_reader import records_of

    rows = [{"tools": [{"name": "a", "hill": "x"}, {"name": "b"}], "n": None}]
    types = pa.schema(
        [("tools", pa.list_(pa.struct([("name", pa.string()), ("hill", pa.string())]))), ("n", pa.int64())]
    )
    assert records_of(pa.RecordBatch.from_pylist(rows, types)) == rows
    mapped = pa.array([[("lake", "Chiemsee")]], pa.map_(pa.string(), pa.string()))
    assert records_of(pa.RecordBatch.from_arrays([mapped], ["m"])) == [{"m": {"lake": "Chiemsee"}}]
    as_json = pa.array(['{"until": null}', '"words"'], pa.json_())
    assert records_of(pa.RecordBatch.from_arrays([as_json], ["j"])) == [{"j": {"until": None}}, {"j": "words"}]


def test_an_object_is_bounded_before_it_is_held(tmp_path):
    import gzip

    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wb") as stream:
        stream.write(b'{"question": "x", "pad": "')
        for _ in range(9):
            stream.write(b"a" * 2**20)
        stream.write(b'", "answer": "y"}')
    with pytest.raises(QloraError, match="more than 4194304 bytes"):
        prepare_rows(
            PrepareConfig(data=str(path), max_line_bytes=2**20), byte_level(), None, tmp_path / "out", print, workers=1
        )


def test_a_folder_says_which_files_it_leaves_out_and_takes_no_metadata_for_data(tmp_path):
    for name in ("train", "lakes"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(LAKES[0]) + "\n")
    for name in ("more.xlsx", "rows", "README.md", ".hidden", "License.txt"):  # the first two may hold data
        (tmp_path / name).write_text("a")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    (tmp_path / "dataset_info.json").write_text('{"lakes": {"file_name": "lakes.json"}}')
    events = []
    prepare_rows(PrepareConfig(data=str(tmp_path)), byte_level(), None, tmp_path / "out", events.append, workers=1)
    assert events[0].text.endswith("left out, as by their names they tell of the data: License.txt.")
    assert events[1].text.endswith("left out, as their kind is not known by their names: more.xlsx, rows.")
    assert "1 of 2 files" in events[2].text and "lakes.jsonl" in events[2].text


def test_several_data_sets_each_with_its_share_and_format(tmp_path):
    (tmp_path / "lakes.jsonl").write_text("".join(json.dumps(LAKES[0]) + "\n" for _ in range(10)))
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": [ASK, ANSWER]}) + "\n" for _ in range(4)))
    names = (f"{tmp_path}/lakes.jsonl:0.3", f"{tmp_path}/talks.jsonl")

    def prepare_sets(out, data, **settings):
        events = []
        config = PrepareConfig(data=data, **settings)
        summary = prepare_rows(config, byte_level(), None, tmp_path / out, events.append, workers=1)
        return summary, " ".join(event.text for event in events if isinstance(event, Notice))

    summary, said = prepare_sets("out", names)
    rows = PreparedRows(summary.directory)
    assert marked(rows, byte_level()) == [ASKED] * 3 + [TURN] * 4
    assert rows.records.tolist() == list(range(7))
    assert [(part["share"], part["records"], part["rows"]) for part in summary.manifest["data_sets"]] == [
        (0.3, 3, 3),
        (1, 4, 4),
    ]
    assert "3 records (the share 0.3 of all) became 3 rows" in said and "named first" in said
    assert prepare_sets("again", names)[0].manifest["digest"] == summary.manifest["digest"]
    other = prepare_sets("other", (f"{tmp_path}/lakes.jsonl:0.4", names[1]))[0]
    assert other.manifest["digest"] != summary.manifest["digest"]
    assert prepare_sets("few", names, limit=2)[0].manifest["rows"] == 4
    alone = prepare_sets("alone", (names[1],))[0]
    assert alone.manifest["digest"] == prepare_sets("plain", names[1])[0].manifest["digest"]
    for wrong, message in (((names[1], names[1]), "given twice"), ((f"{names[1]}:1.5",), "the share 1.5")):
        with pytest.raises(QloraError, match=message):
            prepare_sets("wrong", wrong)


@pytest.mark.parametrize("share", [0.3, 0.5, 1 / 3, 0.999, 0.01])
@pytest.mark.parametrize("sizes", [[100], [1] * 100, [7, 0, 93]])
def test_a_share_is_spread_evenly_however_rows_are_cut_into_chunks(share, sizes):
    from qlora_cli.core.data.data_sets import DataSet
    from qlora_cli.core.reading.chunks import Chunk

    numbers = iter(range(100))
    chunks = [
        Chunk("x", records=[{"n": n} for n in (next(numbers) for _ in range(size))], lines=[0] * size) for size in sizes
    ]
    taken = [record["n"] for chunk in DataSet("x", share).take(chunks, 100) for record in chunk.records]
    assert len(taken) == int(100 * share)
    gaps = {after - before for before, after in pairwise(taken)}
    assert not gaps or max(gaps) - min(gaps) <= 1
