"""Layouts of conversations that are not read, and for each the command that writes it as one that is.

What stands in a row of its own, branches, or does not say which of its texts is the answer, can be meant in more ways
than one; the command says which of them it takes.
"""

import json
import shlex
from functools import partial
from itertools import chain, pairwise
from typing import Any

from qlora_cli.core.recognition.columns import CONVERSATIONS, PAIRS, Columns, list_names
from qlora_cli.core.records.messages import (
    ANSWERED,
    ASKED,
    CALL,
    CONTENT_KEYS,
    KNOWN_ROLES,
    ROLE_KEYS,
    ROLES,
    SPEAKERS,
    holds_messages,
    numbered_items,
    turns_of,
)
from qlora_cli.core.records.record import Record
from qlora_cli.errors import DataError

OWNERS = ("conversation_id", "conv_id", "dialogue_id", "dialog_id", "thread_id", "session_id", "chat_id")
PARENTS, NAMES = ("parent_id", "parent"), ("message_id", "id")  # of a message before, and of each message
ROWS = 'map(json.loads,open("DATA.jsonl"))'
EACH_WAY = ", each way from a first message to a last one a conversation (--train-on last trains the last answer of each alone)"


def refuse_messages_as_rows(columns: Columns) -> None:
    """Refuses rows of which each is one message, instead of a whole conversation.

    Raises:
        DataError: They are.
    """
    role, text = columns.find((*ROLE_KEYS, *SPEAKERS)), columns.find(CONTENT_KEYS)
    if role is None or text is None or not columns.is_text(role) or not columns.is_text(text):
        return
    parent, name, owner = columns.find(PARENTS), columns.find(NAMES), columns.find(OWNERS)
    if not (columns.are_messages() or (role.lower() in SPEAKERS and owner)):
        return
    message = _message(role, text)
    if parent and name:
        code = (
            f"m={{r[{_quoted(name)}]:r for r in {ROWS}}}; up=lambda r:r.get({_quoted(parent)}); "
            f"path=lambda r:(path(m[up(r)]) if up(r) in m else [])+[{message}]; "
            "ends=m.keys()-set(map(up,m.values())); "
            '[print(json.dumps({"messages":path(m[i])})) for i in m if i in ends]'
        )
    elif owner:
        code = (
            f"t={{}}; [t.setdefault(r[{_quoted(owner)}],[]).append({message}) for r in {ROWS}]; "
            '[print(json.dumps({"messages":c})) for c in t.values()]'
        )
    else:
        code = ""
    alone = f"--text-column {shlex.quote(text)}"
    raise DataError(
        f"Each row is one message with a role, not a conversation; the data has {columns.listed}."
        + (
            f" As JSON lines they are joined by the command below{EACH_WAY if parent and name else ''}. {alone} trains each "
            "by itself."
            if code
            else ""
        ),
        _command(code)
        if code
        else "Join the messages of a conversation into one row, a list of role and content in a column 'messages', or train "
        f"each by itself: {alone}",
    )


def refuse_trees(columns: Columns) -> None:
    """Refuses messages that hold the replies to them: of several it is not known which are meant.

    Raises:
        DataError: Rows are such, or a column holds them.
    """
    for name in (None, *columns.names):
        values = columns.records if name is None else [v for v in columns.values(name) if isinstance(v, dict)]
        if found := next(filter(None, map(_replies_of, values)), None):
            role, text, reply = found
            root = "json.loads(l)" + (f"[{_quoted(name)}]" if name else "")
            message = _message(role, text)
            code = (
                f"walk=lambda r,b:[p for n in r.get({_quoted(reply)}) or [] for p in walk(n,b+[{message}])] or "
                f'[b+[{message}]]; [print(json.dumps({{"messages":p}})) for l in open("DATA.jsonl") for p in walk({root},[])]'
            )
            raise DataError(
                f"{f'Column {name!r} holds' if name else 'Each row is'} a tree of messages, of which {reply!r} answer each. "
                f"As JSON lines it is taken apart by the command below{EACH_WAY}.",
                _command(code),
            )


def refuse_exports(columns: Columns) -> None:
    """Refuses ChatGPT's export, whose conversations are messages by their ids, of which each names the one before.

    Raises:
        DataError: A column holds such.
    """
    for name in columns.names:
        if columns.holds(name, _are_linked):
            text = '"".join(p for p in m["content"].get("parts") or [] if isinstance(p,str))'
            code = (
                'up=lambda t,i:[[t[i],i:=t[i].get("parent")][0] for _ in t if i in t][::-1]; '
                f'said=lambda m:{text} if m and m["author"]["role"] in ("user","assistant") else ""; '
                '[print(json.dumps({"messages":turns})) for c in json.load(open("conversations.json")) '
                'if (turns:=[{"role":n["message"]["author"]["role"],"content":s} for n in '
                f'up(c[{_quoted(name)}],c["current_node"]) if (s:=said(n["message"]))])]'
            )
            raise DataError(
                f"Column {name!r} holds messages by their ids, each with its parent, as ChatGPT exports conversations. Of its "
                "conversations.json the command below takes the way to 'current_node', and what user and assistant say on it.",
                _command(code),
            )


def refuse_null_turns(columns: Columns) -> None:
    """Refuses conversations that are lists of messages and nulls.

    Raises:
        DataError: A column holds such.
    """
    for name in columns.names:
        for number, value in enumerate((row.get(name) for row in columns.records), start=1):
            if not isinstance(value, list) or None not in value:
                continue
            if holds_messages([turn for turn in value if turn is not None]):
                code = f"[print(json.dumps({{**r,{_quoted(name)}:[t for t in r[{_quoted(name)}] or [] if t]}})) for r in {ROWS}]"
                raise DataError(
                    f"Column {name!r} holds nulls among the messages, in row {number} message {value.index(None) + 1}. Of "
                    "JSON lines, the command below leaves them out.",
                    _command(code),
                )


def refuse_logged_calls(columns: Columns) -> None:
    """Refuses what was sent to the API of a model and what it sent back, alone or a row of both.

    Raises:
        DataError: A column holds answers of one.
    """
    for name in columns.names:
        inner = next((key for key in ("", "body") if columns.holds(name, partial(_has_choices, inner=key))), None)
        asked = _what_was_sent(columns)
        if inner is None or (asked is None and "custom_id" not in columns.names):
            continue
        came = f"(r.get({_quoted(name)}) or {{}})" + (f".get({_quoted(inner)},{{}})" if inner else "")
        sent = asked[1] if asked else 'm[r["custom_id"]]'
        code = (
            "" if asked else 'm={r["custom_id"]:r["body"]["messages"] for r in map(json.loads,open("BATCH.jsonl"))}; '
        )
        code += (
            f'[print(json.dumps({{"messages":{sent}+[c[0]["message"]]}})) for r in {ROWS} '
            f'if (c:={came}.get("choices"))]'
        )
        raise DataError(
            f"Column {name!r} holds what the API of a model sent back. Of JSON lines, the command below joins each first answer to "
            + (f"what {asked[0]!r} holds." if asked else "its messages in the batch that was sent, BATCH.jsonl."),
            _command(code),
        )


def _has_choices(value: Any, *, inner: str) -> bool:
    value = value.get(inner) if inner and isinstance(value, dict) else value
    choices = value.get("choices") if isinstance(value, dict) else None
    return isinstance(choices, list) and bool(choices) and isinstance(choices[0], dict) and "message" in choices[0]


def _what_was_sent(columns: Columns) -> tuple[str, str] | None:
    """The column of what an API was asked, and its messages, of a row `r` in Python."""
    for name in columns.names:
        for keys in ((), ("messages",), ("body", "messages")):
            if columns.holds(name, partial(_has_messages, keys=keys)):
                return name, "r" + "".join(f"[{_quoted(key)}]" for key in (name, *keys))
    asked = columns.find(name for name, _, _ in PAIRS)
    is_text = asked is not None and columns.is_text(asked)
    return (asked, f'[{{"role":"user","content":r[{_quoted(asked)}]}}]') if asked and is_text else None


def _has_messages(value: Any, *, keys: tuple[str, ...]) -> bool:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return holds_messages(value)


def _are_linked(value: Any) -> bool:
    nodes = list(value.values()) if isinstance(value, dict) else []
    return bool(nodes) and all(isinstance(node, dict) and {"message", "parent"} <= node.keys() for node in nodes)


def refuse_without_answers(columns: Columns, name: str) -> None:
    """Refuses conversations of which no turn is the assistant's, but one that may be called otherwise.

    Raises:
        DataError: They are such.
    """
    talks = list(map(columns.roles_of, columns.values(name)))
    roles = list(dict.fromkeys(filter(None, chain.from_iterable(talks))))
    if not roles or {"assistant", CALL} & {*roles}:
        return
    replying = (
        reply
        for talk in talks
        for role, reply in pairwise(talk)
        if role == "user" and reply not in ("user", "tool", "")
    )
    strangers = [role for role in roles if role not in KNOWN_ROLES]
    if reply := next(replying, None):
        flags = f"--role {shlex.quote(f'{reply}=assistant')}"
    elif "user" not in roles and len(strangers) > 1:
        flags = " ".join(
            f"--role {shlex.quote(f'{w}={r}')}" for w, r in zip(strangers, ("user", "assistant"), strict=False)
        )
    else:
        return
    raise DataError(
        f"No turn of column {name!r} is the assistant's; they are of {list_names(roles)}.",
        f"Say whose the answers are, such as: {flags}",
    )


def refuse_unnamed_turns(columns: Columns) -> None:
    """Refuses turns in a column named like a conversation's whose fields do not say which is question and which answer.

    Raises:
        DataError: It holds such.
    """
    for name in (n for n in columns.names if n.lower() in CONVERSATIONS):
        values = [value for value in columns.values(name) if isinstance(value, list | dict)]
        listed = [numbered_items(value) if isinstance(value, dict) else value for value in values]
        turns = [turn for items in listed for turn in items]
        if not turns or not all(isinstance(turn, dict) for turn in turns) or turns_of(turns) is not None:
            continue
        texts = [key for key in turns[0] if isinstance(turns[0][key], str)]
        if len(texts) < 2 or any(key in turn for turn in turns for key in (*ROLE_KEYS, *SPEAKERS, "type")):
            continue
        asked = next((key for key in texts if key.lower() in ASKED), texts[0])
        others = [key for key in texts if key != asked]
        said = next((key for key in others if key.lower() in ANSWERED), others[-1])
        inside = ".values()" if isinstance(values[0], dict) else ""
        code = (
            f'[print(json.dumps({{"messages":[{{"role":w,"content":t[k]}} for t in r[{_quoted(name)}]{inside} for w,k in '
            f'(("user",{_quoted(asked)}),("assistant",{_quoted(said)}))]}})) for r in {ROWS}]'
        )
        raise DataError(
            f"The turns in column {name!r} have the fields {list_names(list(turns[0]))}, and not all of them are known for "
            f"a question, its answer or a role. Of JSON lines, the command below takes {asked!r} for the question, "
            f"{said!r} for its answer, and nothing else.",
            _command(code),
        )


def _replies_of(message: Record) -> tuple[str, str, str] | None:
    """The keys of a message's role, its text, and the list of messages like it that answer it. The name of a character
    beside what is said to it, or of a source beside its conversations, is no role."""
    role = next((key for key in ROLE_KEYS if str(message.get(key)).lower() in {*ROLES, *KNOWN_ROLES}), None)
    text = next((key for key in CONTENT_KEYS if isinstance(message.get(key), str)), None)
    if role is None or text is None:
        return None
    lists = ((key, value) for key, value in message.items() if isinstance(value, list) and value)
    replies = (
        key
        for key, items in lists
        if key.lower() not in CONVERSATIONS and all(isinstance(i, dict) and {role, text} <= i.keys() for i in items)
    )
    return next(((role, text, reply) for reply in replies), None)


def _message(role: str, text: str) -> str:
    return f'{{"role":r[{_quoted(role)}],"content":r[{_quoted(text)}]}}'


def _quoted(name: str) -> str:
    return json.dumps(name)


def _command(code: str) -> str:
    return f"python -c {shlex.quote(f'import json; {code}')} > joined.jsonl"
