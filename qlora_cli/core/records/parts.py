"""Content that is a list of parts, as the interfaces of Anthropic, OpenAI and Google write it, read into plain turns.

What OpenAI's Responses write as items beside messages (a call, its result, a thought) is read as parts of turns, and texts
in a list as parts that are text.

Text joins into text, thoughts become the turn's thought, calls its `tool_calls`, and results of tools turns of their own,
which stand before what else the turn says, as they do there. Chat templates print a turn's thought, its text and its
calls in that order; parts in another order are refused.
"""

import json
from typing import Any

from qlora_cli.core.records.record import BadField, Record, decode_nested, describe_type

# Types of parts, which Google's leave out.
TEXTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
THOUGHTS = ("thinking", "reasoning", "thought")
THOUGHT_KEY = "reasoning_content"  # as chat templates call it
CALLS = ("tool_use", "function_call", "functionCall")
RESULTS = ("tool_result", "function_response", "functionResponse", "function_call_output")
ITEMS = {"function_call": "assistant", "reasoning": "assistant", "function_call_output": "tool"}  # type → whose it is
ORDER = (THOUGHTS, TEXTS, CALLS)
UNSAID = (
    "text",
    "thought",
    "thoughtSignature",
    "thought_signature",
    "cache_control",
)  # of a part, beside what it holds


def are_parts(content: Any) -> bool:
    """Whether content is a list of parts."""
    return isinstance(content, list) and all(isinstance(part, dict | str) for part in content)


def is_item(value: Any) -> bool:
    """Whether a value is what Responses write beside messages."""
    return isinstance(value, dict) and str(value.get("type")) in ITEMS and value.get("role", value.get("from")) is None


def turns_of_items(items: list[Any]) -> list[Any]:
    """Messages and items as turns: what the assistant thinks, says and calls in a row is one turn of these parts, unless
    messages in it say different things of themselves, such as whether they are trained."""
    turns: list[Any] = []
    for item in items:
        role = ITEMS[item["type"]] if is_item(item) else item.get("role")
        content = [item] if is_item(item) else item.get("content")
        own = {} if is_item(item) else {name: said for name, said in item.items() if name not in ("id", "status")}
        turn = {**own, "role": role, "content": [content] if isinstance(content, str) else content}
        before = turns[-1] if turns else {}
        agree = all(before.get(name, said) == said for name, said in own.items() if name != "content")
        if (
            role == before.get("role") == "assistant"
            and agree
            and are_parts(turn["content"])
            and are_parts(before["content"])
        ):
            turns[-1] = {**before, **turn, "content": before["content"] + turn["content"]}
        else:
            turns.append(turn)
    return turns


def text_of(content: Any, where: str) -> Any:
    """The text of parts that are all text; other content as it is.

    Raises:
        BadField: A part is no text; `where` says of what it is one.
    """
    if not are_parts(content):
        return content
    found = [_kind_of(part, where) for part in content]
    if wrong := next((kind for kind, _ in found if kind not in TEXTS), None):
        raise BadField(f"{where} holds a part of the type {wrong!r}, which is no text")
    return "".join(text or "" for _, text in found)


def system_text(value: Any, where: str) -> Any:
    """The text of a system turn that stands by itself: text, parts of text, or Google's object of parts.

    Raises:
        BadField: See `text_of`.
    """
    return text_of(value.get("parts") if isinstance(value, dict) and "parts" in value else value, where)


def plain_turns(turn: Record, key: str, number: int, names: dict[str, str]) -> list[Record]:
    """The turns that one with a list of parts in `key` stands for.

    Args:
        turn: With a role.
        key: Of its content.
        number: Of the message, as errors name it.
        names: Of calls, by their ids; those of this turn are added. Results that have no name get it from there.

    Raises:
        BadField: A part is no text, thought, call or result, or they stand in an order that no template prints.
    """
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Record] = []
    results: list[Record] = []
    last = 0
    for part in turn[key]:
        kind, value = _kind_of(part, f"message {number}")
        if kind in RESULTS:
            if calls or "".join([*thoughts, *texts]).strip():  # a call's: it comes before what the turn says after that
                behind = f"behind {_named(last)}; it belongs in a turn of its own"
                raise BadField(f"message {number} has a tool's result {behind}")
            results.append(_read_result(part, value, number, names))
            continue
        place = next(i for i, kinds in enumerate(ORDER) if kind in kinds)
        if place < last and isinstance(value, str) and value.strip():
            where = f"{_named(place)} behind {_named(last)}"
            raise BadField(f"message {number} has {where}, where no chat template prints it")
        last = max(last, place) if kind in CALLS or value else last
        if kind in CALLS:
            calls.append(_read_call(part, value, names))
        else:
            (thoughts if place == 0 else texts).append(value or "")
    rest = {name: item for name, item in turn.items() if name != key and (name, item) != ("type", "message")}
    said = {**rest, key if key != "parts" else "content": "".join(texts)}
    if thoughts:
        said[THOUGHT_KEY] = "".join(thoughts)
    if calls:
        said["tool_calls"] = calls
    marks = {name: item for name, item in rest.items() if name not in ("role", "from")}
    plain = [{**marks, **result} for result in results]
    return [*plain, said] if not results or "".join(texts).strip() or thoughts or calls else plain


def _kind_of(part: Record | str, where: str) -> tuple[str, Any]:
    """The type of a part and what it holds under that."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type")
    if not isinstance(kind, str | None):
        raise BadField(f"{where} holds a part whose type is {describe_type(kind)}, not text")
    if kind is None:
        kind = next((name for name in (*CALLS[1:], *RESULTS[1:]) if part.get(name) is not None), "text")
        if kind == "text" and part.get("text") is None:  # whatever else there is, which has no type to name it by
            kind = next((name for name, held in part.items() if held is not None and name not in UNSAID), kind)
        kind = "thought" if kind == "text" and part.get("thought") is True else kind
    if kind in TEXTS or kind == "thought":
        value = part.get("text")
    elif kind in THOUGHTS:
        held = _first(part, kind, "text") or part.get("content") or part.get("summary")  # the last two are Responses'
        value = text_of(held, where)  # Mistral's are parts themselves
    else:
        value = part.get(kind)
    known = kind in (*TEXTS, *THOUGHTS) and isinstance(value, str | None)
    if not known and kind not in (*CALLS, *RESULTS):
        raise BadField(f"{where} holds a part of the type {kind!r}, which is no text")
    return kind, value


def _named(place: int) -> str:
    return ("a thought", "text", "a call")[place]


def _first(held: Record, *keys: str) -> Any:
    """What stands under the first of these keys, of which rows that were once Arrow's have others as null."""
    return next((held[key] for key in keys if held.get(key) is not None), None)


def _read_call(part: Record, value: Any, names: dict[str, str]) -> Record:
    """A call of a tool in the form of `tool_calls`."""
    call = value if isinstance(value, dict) else part
    arguments = _first(call, "input", "arguments", "args")
    name, identity = call.get("name"), call.get("call_id") or call.get("id") or part.get("id")
    if isinstance(identity, str) and isinstance(name, str):
        names[identity] = name
    function = {"name": name, "arguments": arguments}
    return {**({"id": identity} if identity else {}), "type": "function", "function": function}


def _read_result(part: Record, value: Any, number: int, names: dict[str, str]) -> Record:
    """A turn of what a tool gave."""
    result = value if isinstance(value, dict) else part
    identity = result.get("tool_use_id") or result.get("call_id") or result.get("id")
    name = result.get("name") or (names.get(identity) if isinstance(identity, str) else None)
    content = _first(result, "content", "response", "output")
    content = decode_nested(content) if isinstance(content, str) and content[:2] == "[{" else content
    content = text_of(content, f"message {number}")
    if isinstance(content, dict):  # Google's always are
        content = json.dumps(content, ensure_ascii=False)
    turn = {"role": "tool", "content": "" if content is None else content}
    return turn | ({"tool_call_id": identity} if identity else {}) | ({"name": name} if name else {})
