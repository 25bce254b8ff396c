"""Messages of a conversation: every way in which data sets write turns, read into one list of role and content.

Read are lists of `{"role", "content"}` and of ShareGPT's `{"from", "value"}`, one message alone, a struct of lists
(how Arrow stores lists of objects sometimes), a list of texts in turn, a list of question and answer pairs, of pairs of
role and text or of speaker and utterance, LangChain's messages, an object whose keys count its turns, and all of these
as JSON text or as Python prints them. Content may be made of parts (parts.py).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_cli.core.records.parts import are_parts, is_item, plain_turns, turns_of_items
from qlora_cli.core.records.record import NOTHING, NULLS, BadField, Record, decode_nested, describe_type
from qlora_cli.core.records.tools import read_calls, wrap_call

Message = dict[str, Any]

KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
CALL = "tool call"  # a turn of its own in ShareGPT's and Swift's tool data; becomes part of an assistant's turn
PLAIN_ROLES = ("user", "assistant", "system")  # neither mapped nor looked into
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": CALL,
    "tool_call": CALL,
    "tool_calls": CALL,
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text", "utterance", "message")
# Of transcripts, which may be of no assistant at all, and of exports of chats.
SPEAKERS = ("speaker", "sender", "author", "participant")
NAMING_KEYS = (*ROLE_KEYS, *SPEAKERS)
TYPES = ("human", "ai", "system", "tool")  # of LangChain's messages
PART_KEYS = (*CONTENT_KEYS, "parts")  # of which the first that is there counts; the last is Google's
ASKED = ("human", "user", "question", "instruction", "prompt", "input", "query", "q")
ANSWERED = ("assistant", "gpt", "bot", "answer", "response", "output", "completion", "a")
CALL_KEYS = ("tool_calls", "function_call")
TRAINED_KEYS = ("weight", "train", "training", "loss", "loss_mask")  # what says that a turn is trained, or is not


def turns_of(value: Any) -> list[Any] | None:
    """The turns that a value of any of these forms holds, each an object with a role; None if it is of none of them.

    Only the form is looked at: what an object's role or content is may still be wrong. An empty list has no turns.
    """
    if isinstance(value, str):
        decoded = decode_nested(value)
        return None if isinstance(decoded, str) else turns_of(decoded)
    if isinstance(value, dict):
        return _turns_of_object(value)
    if not isinstance(value, list):
        return None
    items = [decode_nested(item) if isinstance(item, str) and item[:1] == "{" else item for item in value]
    if items and all(isinstance(item, str) for item in items):
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(items)]
    if (said := _turns_of_pairs(items)) is not None:
        return said
    if any(map(is_item, items)) and all(is_item(item) or isinstance(item, dict) for item in items):
        items = turns_of_items(items)
    turns: list[Any] = []
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("role"), str):
            turns.append(item)
            continue
        found = _turns_of_object(item) if isinstance(item, dict) else _pair_of(item)
        if found is None:
            return None
        turns += found
    return turns


def is_transcript(value: Any) -> bool:
    """Whether a value is turns of speakers, or a struct of lists of these."""
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict) and _role_key(item) not in (None, *ROLE_KEYS) for item in items)


def _role_key(turn: Record) -> str | None:
    """The key that says whose a turn is, if there is one."""
    for key in NAMING_KEYS:
        if key in turn:
            return key
    return "type" if "content" in turn and turn.get("type") in TYPES else None


def role_of(turn: Record, roles: Mapping[str, str]) -> str | None:
    """Whose a turn is, under the name that chat templates know if there is one; None where it does not say."""
    for key in ROLE_KEYS:
        if isinstance(name := turn.get(key), str):
            name = name.strip()
            return roles.get(name) or roles.get(name.lower()) or ROLES.get(name.lower(), name.lower())
    return None


def holds_messages(value: Any) -> bool:
    """Whether a value is messages beyond doubt: each of its turns says whose it is.

    A question that happens to be JSON, or a list of texts, does not.
    """
    value = decode_nested(value) if isinstance(value, str) else value
    items = (
        [decode_nested(item) if isinstance(item, str) else item for item in value] if isinstance(value, list) else []
    )
    if isinstance(value, dict):
        return bool(turns_of(value)) and any(isinstance(value.get(key), str | list) for key in ROLE_KEYS)
    return bool(items) and all(
        is_item(item)
        or (isinstance(item, dict) and (any(isinstance(item.get(key), str) for key in ROLE_KEYS) or _unwrapped(item)))
        for item in items
    )


def _pair_of(value: Any) -> list[Message] | None:
    """Question and answer written as a list of two texts."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value):
        return [{"role": "user", "content": value[0]}, {"role": "assistant", "content": value[1]}]
    return None


def _turns_of_pairs(items: list[Any]) -> list[Message] | None:
    """Turns written as lists of role and text; None where not every list begins with a role, one with the assistant's."""
    if len(items) < 2 or not all(map(_pair_of, items)):
        return None
    names = [name.strip().lower() for name, _ in items]
    roles = [ROLES.get(name, name) for name in names]
    if "assistant" not in roles or not {*roles} <= {*KNOWN_ROLES, CALL}:
        return None
    return [{"role": name, "content": text} for name, text in items]


def numbered_items(value: Record) -> list[Any]:
    """What an object holds whose keys count it (`turn_1`, `turn_2`), in that order; nothing where they do not."""
    if not str(next(iter(value), ""))[-1:].isdecimal():  # most turns of most data are done here
        return []
    counted = [re.fullmatch(r"(\D*)(\d+)", str(key)) for key in value]
    found = sorted((key for key in counted if key), key=lambda key: int(key[2]))
    if len(found) < len(value) or len({key[1] for key in found}) != 1:
        return []
    return [value[key[0]] for key in found if value[key[0]] is not None]


def _unwrapped(turn: Record) -> Record | None:
    """The message that LangChain wrote into `data` beside its type, or into `kwargs` beside its class; None for others."""
    if isinstance(turn.get("data"), dict):
        named, inner = turn.get("type"), turn["data"]
    elif isinstance(turn.get("kwargs"), dict) and isinstance(turn.get("id"), list) and turn["id"]:
        named, inner = turn["id"][-1], turn["kwargs"]
    else:
        return None
    kind = str(named).lower().removesuffix("chunk").removesuffix("message")
    if kind not in (*TYPES, "function", "chat"):
        return None
    if kind == "chat":  # of whom it says itself
        kind = inner.get("role")
    more = inner.get("additional_kwargs")  # thoughts, and calls of tools, as the provider gave them
    said = {key: item for key, item in inner.items() if item not in NOTHING or key == "content"}
    more = more if isinstance(more, dict) else {}
    return {**more, **said, "additional_kwargs": None, "type": None, "role": kind}


def _turns_of_object(value: Record) -> list[Any] | None:
    value = _unwrapped(value) or value
    if (items := numbered_items(value)) and all(isinstance(item, dict) for item in items):
        return turns_of(items)
    role = _role_key(value)
    if role is not None and isinstance(value[role], list):
        lists = {key: items for key, items in value.items() if isinstance(items, list)}
        if len({len(items) for items in lists.values()}) > 1:
            return None
        return turns_of([dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)])
    if role is not None and role not in ROLE_KEYS:
        said = [item for key in CONTENT_KEYS if (item := value.get(key)) and (isinstance(item, str) or are_parts(item))]
        words = {item for item in said if isinstance(item, str)}
        if not said or not isinstance(value[role], str) or len(words) > 1:
            return None
        rest = {key: item for key, item in value.items() if key not in (role, *CONTENT_KEYS)}
        return [
            {
                **rest,
                "role": value[role],
                "content": next((item for item in said if not isinstance(item, str)), said[0]),
            }
        ]
    if role is not None:
        return [value]
    texts = {key.lower(): key for key, item in value.items() if isinstance(item, str)}
    asked = [texts[name] for name in ASKED if name in texts]
    answered = next((texts[name] for name in ANSWERED if name in texts), None)
    if not asked or answered is None or len(value) > 4:
        return None
    system = value.get("system")
    turns = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    question = "\n".join(text for key in asked if (text := value[key]).strip())
    # What else the pair says, such as a weight or a thought, is of its answer; what else is text may be of either.
    rest = {key: item for key, item in value.items() if key not in (*asked, answered, "system")}
    if any(rest.get(key) and isinstance(rest[key], str | list) for key in PART_KEYS):
        return None
    return [*turns, {"role": "user", "content": question}, {**rest, "role": "assistant", "content": value[answered]}]


def read_messages(value: Any, roles: Mapping[str, str], first: int = 1) -> tuple[list[Message], list[bool | None]]:
    """Messages as `role` and `content`, and of each whether the data says that it is trained, or says nothing (None).

    Calls that stand in turns of their own become `tool_calls` of the assistant's turn before them, or of a new one.
    Keys whose value says nothing (null, no calls) are left out.

    Args:
        value: See `turns_of`.
        roles: Names of roles in this data → names that chat templates know, beside ROLES.
        first: Number of the first message, as errors name it.

    Raises:
        BadField: It is no list of messages, or a message has no role, or no text.
    """
    turns = turns_of(value)
    if turns is None:
        if isinstance(value, list):
            index, item = next((i, v) for i, v in enumerate(value) if not isinstance(v, dict) or turns_of([v]) is None)
            what = "has no role" if isinstance(item, dict) else f"is {describe_type(item)}, not an object"
            raise BadField(f"message {first + index} {what}")
        raise BadField(f"is {describe_type(value)}, no list of messages")
    messages: list[Message] = []
    trained: list[bool | None] = []
    are_texts = all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns)  # as most are
    for number, turn in enumerate(turns, start=first) if are_texts else _plain(turns, first):
        message, is_trained = _read_message(turn, number, roles)
        if message["role"] == CALL:
            calls = [wrap_call(call) for call in read_calls(decode_nested(message["content"]), number)]
            if messages and messages[-1]["role"] == "assistant" and (is_trained is False) == (trained[-1] is False):
                messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", []), *calls]}
                continue
            message = {"role": "assistant", "content": "", "tool_calls": calls}
        messages.append(message)
        trained.append(is_trained)
    return messages, trained


def _plain(turns: list[Any], first: int) -> Iterator[tuple[int, Any]]:
    """Each turn with its number, those that are made of parts as what they stand for."""
    names: dict[str, str] = {}  # of calls, by their ids
    for number, turn in enumerate(turns, start=first):
        key = next((key for key in PART_KEYS if turn.get(key) is not None), None) if isinstance(turn, dict) else None
        for plain in plain_turns(turn, key, number, names) if key and are_parts(turn[key]) else [turn]:
            yield number, plain


def _read_message(turn: Any, number: int, roles: Mapping[str, str]) -> tuple[Message, bool | None]:
    if not isinstance(turn, dict):
        raise BadField(f"message {number} is {describe_type(turn)}, not an object")
    if len(turn) == 2 and turn.get("role") in PLAIN_ROLES and isinstance(turn.get("content"), str) and not roles:
        return turn, None  # most turns of most data
    role_key = next((key for key in ROLE_KEYS if isinstance(turn.get(key), str)), None)
    if role_key is None:
        raise BadField(f"message {number} has no role")
    content_key = next((key for key in CONTENT_KEYS if key in turn), "content" if role_key == "role" else "value")
    role = role_of(turn, roles)
    message = {
        key: item
        for key, item in turn.items()
        if key not in (role_key, content_key, *TRAINED_KEYS)
        and item is not None
        and not (key in CALL_KEYS and item in NULLS)
    }
    calls = message.pop("tool_calls", None)
    if former := message.pop("function_call", None):
        calls = [wrap_call(call) for call in read_calls(former, number)]
    if calls and (read := read_calls(calls, number)):
        message["tool_calls"] = read
    content = turn.get(content_key)
    if content is None and ("tool_calls" in message or role == CALL):
        content = ""
    if not isinstance(content, str):
        raise BadField(f"the {content_key!r} of message {number} is {describe_type(content)}, not text")
    return {**message, "role": role, "content": content}, _is_trained(turn, number)


def _is_trained(turn: Record, number: int) -> bool | None:
    """Whether the data says that a turn is trained; None where it says nothing.

    Raises:
        BadField: It says neither yes nor no.
    """
    wanted = None
    for key in TRAINED_KEYS:
        if (value := turn.get(key)) is None:
            continue
        if (says := yes_or_no(value)) is None:
            raise BadField(f"the {key!r} of message {number} is {value!r}; a turn is trained (1) or is not (0)")
        wanted = says and wanted is not False
    return wanted


def yes_or_no(value: Any) -> bool | None:
    """What a value says of whether something is trained, as a boolean, a number or in words; None where it is neither."""
    value = (
        {"true": True, "false": False}.get(value.strip().lower(), number_in(value)) if isinstance(value, str) else value
    )
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def number_in(value: Any) -> float | None:
    """A number, also one that is text, as all of a CSV file is; None for what is none."""
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None


def with_flags(value: Any, flags: Any, column: str, roles: Mapping[str, str]) -> Any:
    """The turns of a conversation, each with what a list beside it says of whether it is trained: of each turn, or of each
    answer. They are what they were where there is no list.

    Raises:
        BadField: The list has another length than these.
    """
    turns, flags = turns_of(value), decode_nested(flags) if isinstance(flags, str) else flags
    if flags in (None, "") or turns is None or not all(isinstance(turn, dict) for turn in turns):
        return value
    answers = [i for i, turn in enumerate(turns) if role_of(turn, roles) in ("assistant", CALL)]
    flags = flags if isinstance(flags, list) else [flags] * len(answers)
    if len(flags) not in (len(turns), len(answers)):
        raise BadField(
            f"field {column!r} has {len(flags)} entries, but the conversation has {len(turns)} messages, "
            f"{len(answers)} of them answers",
            "Train every answer: --format chat.",
        )
    said = dict(zip(range(len(turns)) if len(flags) == len(turns) else answers, flags, strict=True))
    key = next((key for key in TRAINED_KEYS if not any(key in turn for turn in turns)), TRAINED_KEYS[0])
    return [{**turn, key: said[i]} if i in said else turn for i, turn in enumerate(turns)]
