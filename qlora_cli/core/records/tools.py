"""Tool data: descriptions of tools and calls of them, in the one form that chat templates are given.

Descriptions are a list of objects, a call is `{"type": "function", "function": {"name", "arguments"}}` or what the data
has instead, and arguments are an object, however they were stored: as JSON text, as a list of JSON texts, or padded.
"""

import json
from typing import Any

from qlora_cli.core.records.record import BadField, Record, describe_type


def read_tools(value: Any, column: str) -> list[Record] | None:
    """Descriptions of tools from a list of objects, of JSON texts, or from JSON text; None where there are none.

    In the column `functions` they are OpenAI's former ones, without the object around each.

    Raises:
        BadField: It is no JSON, or no list of objects.
    """
    if isinstance(value, str):
        value = _parse(value, f"field {column!r}") if value.strip() else None
    if isinstance(value, dict) and not isinstance(value.get("tools"), list):
        value = [value]
    elif isinstance(value, dict):
        value = value["tools"]
    if value is None:
        return None
    if not isinstance(value, list):
        raise BadField(f"field {column!r} is {describe_type(value)}, not a list")
    tools = [_parse(tool, f"field {column!r}") if isinstance(tool, str) else tool for tool in value]
    for tool in tools:
        if not isinstance(tool, dict):
            raise BadField(f"field {column!r} holds {describe_type(tool)} where the description of a tool belongs")
    if column.lower() == "functions":
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tools or None


def read_calls(value: Any, number: int) -> list[Record]:
    """The calls of message `number`, from a list of objects or JSON texts, or from JSON text.

    Raises:
        BadField: They are no JSON or no objects, or arguments are none.
    """
    where = f"message {number}: a call"
    if isinstance(value, str):
        value = _parse(value, where) if value.strip() else []
    calls = value if isinstance(value, list) else [value]
    return [_read_call(_parse(call, where) if isinstance(call, str) else call, number) for call in calls]


def _read_call(call: Any, number: int) -> Record:
    if not isinstance(call, dict):
        raise BadField(f"message {number}: a call is {describe_type(call)}, not an object")
    function = call.get("function")
    if isinstance(function, str) and "arguments" not in call:
        function = _parse(function, f"message {number}: a call")
    if isinstance(function, dict):
        return {**call, "function": _with_object(function, number)}
    return _with_object(call, number)


def wrap_call(call: Record) -> Record:
    """A call that is only name and arguments, in the form of `tool_calls`."""
    return call if isinstance(call.get("function"), dict) else {"type": "function", "function": call}


def _with_object(function: Record, number: int) -> Record:
    """A function's name and arguments, the arguments as an object."""
    if not isinstance(function.get("name"), str):
        raise BadField(f"message {number}: a call has no name")
    if "arguments" not in function:
        return function
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = (
            _parse(arguments, f"message {number}: the arguments of {function['name']}") if arguments.strip() else {}
        )
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        found = describe_type(arguments)
        raise BadField(f"message {number}: the arguments of {function['name']} are {found}, not an object")
    return {**function, "arguments": arguments}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadField(f"{where} is no JSON ({error})") from None
