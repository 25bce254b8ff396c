"""Tool data: descriptions of tools and calls of them, in the one form that chat templates are given.

Descriptions are a list of objects, a call is `{"type": "function", "function": {"name", "arguments"}}` or what the data
has instead, and arguments are an object, however they were stored: as JSON text, as a list of JSON texts, or padded.
"""

import json
from typing import Any

from qlora_cli.core.records.record import BadField, Record, decode_nested, describe_type, problem_of_value, says_nothing


def read_tools(value: Any, column: str) -> list[Record] | None:
    """Descriptions of tools from a list of objects, of JSON texts, from one object, or from JSON text; None where there
    are none.

    In the column `functions` they are OpenAI's former ones, without the object around each; Anthropic's and Google's are
    read in any.

    Raises:
        BadField: It is no JSON, or no list of objects.
    """
    if isinstance(value, str):
        value = _parse(value, f"field {column!r}") if not says_nothing(value) else None
    if isinstance(value, dict):
        value = value["tools"] if isinstance(value.get("tools"), list) else _tools_in(value, column)
    if value is None:
        return None
    if not isinstance(value, list):
        raise BadField(f"field {column!r} is {describe_type(value)}, not a list")
    tools = [_parse(tool, f"field {column!r}") if isinstance(tool, str) else tool for tool in value]
    for tool in tools:
        if not isinstance(tool, dict):
            raise BadField(f"field {column!r} holds {describe_type(tool)} where the description of a tool belongs")
    tools = [described for tool in tools for described in _as_functions(tool, column)]
    if column.lower() == "functions":
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tools or None


def _tools_in(value: Record, column: str) -> list[Record]:
    """The tool that an object describes, or those that it describes under their names."""
    if not value or value.keys() & {"name", "function", "functionDeclarations", "function_declarations"}:
        return [value] if value else []
    tools = []
    for name, described in value.items():
        if described is None:  # another row's, once Arrow's
            continue
        if not isinstance(described, dict) or not described.keys() & {"description", "parameters", "function", "name"}:
            raise BadField(f"field {column!r} is an object that describes no tool, nor tools under their names")
        own = described if described.keys() & {"function", "name"} else {"name": name, **described}
        tools.append(own if "function" in own else {"type": "function", "function": own})
    return tools


def _as_functions(tool: Record, column: str) -> list[Record]:
    """Google's declarations and Anthropic's descriptions as chat templates expect them; others as they are."""
    declared = tool.get("functionDeclarations", tool.get("function_declarations"))
    if declared is not None:
        if not isinstance(declared, list) or not all(isinstance(function, dict) for function in declared):
            raise BadField(f"field {column!r} holds declarations of functions that are no list of objects")
        return [{"type": "function", "function": function} for function in declared]
    if tool.get("type") == "function" and "function" not in tool and "name" in tool:  # of OpenAI's Responses
        return [{"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}]
    if "input_schema" not in tool:
        return [tool]
    kept = {key: value for key, value in tool.items() if key not in ("input_schema", "type", "cache_control")}
    return [{"type": "function", "function": {**kept, "parameters": tool["input_schema"]}}]


def without_padding(tools: list[Record], messages: list[Record]) -> tuple[list[Record], list[Record]]:
    """Tools and messages without the nulls that rows which were once Arrow's have for other tools' keys.

    A null in a schema is none of JSON Schema but as `default` or `const`; of a call's arguments, those that are null and
    that its tool does not describe are left out.
    """
    tools = [_schema_without_nulls(tool) for tool in tools]
    functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]
    described: dict[Any, Record] = {}
    for function in functions:
        schema = function.get("parameters")
        if isinstance(function.get("name"), str) and isinstance(schema, dict):
            described[function["name"]] = schema.get("properties") or {}
    cleaned = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": [_call_without_nulls(call, described) for call in calls]}
        cleaned.append(message)
    return tools, cleaned


def _schema_without_nulls(value: Any, *, names: bool = False) -> Any:
    if isinstance(value, list):
        return [_schema_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    values = () if names else ("default", "const")  # which may be anything
    return {
        key: item if key in values else _schema_without_nulls(item, names=key == "properties" and not names)
        for key, item in value.items()
        if item is not None or key in values
    }


def _call_without_nulls(call: Record, described: dict[Any, Record]) -> Record:
    function = call["function"] if isinstance(call.get("function"), dict) else call
    known, arguments = described.get(function.get("name")), function.get("arguments")
    if known is None or not isinstance(arguments, dict):
        return call
    kept = {name: value for name, value in arguments.items() if value is not None or name in known}
    cleaned = {**function, "arguments": kept}
    return {**call, "function": cleaned} if function is not call else cleaned


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


def in_call_order(messages: list[Record]) -> list[Record]:
    """Messages with the results of several calls in the order of these, where ids say which is whose."""
    ordered = list(messages)
    for number, message in enumerate(messages):
        called = [call.get("id") for call in message.get("tool_calls", [])]
        turns = messages[number + 1 : number + 1 + len(called)]
        ids = [str(turn.get("tool_call_id")) for turn in turns if turn["role"] == "tool"]
        if len(set(ids)) == len(called) > 1 and set(ids) == set(map(str, called)):
            ordered[number + 1 : number + 1 + len(called)] = [turns[ids.index(str(id))] for id in called]
    return ordered


def calls_in(text: Any) -> list[Any]:
    """The calls that a text is, written as JSON: an object or a list of objects with name and arguments, and no more."""
    value = decode_nested(text) if isinstance(text, str) else None
    calls: list[Any] = value if isinstance(value, list) else [value]
    are_calls = all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in calls)
    return [wrap_call(call) for call in calls] if are_calls else []


def _read_call(call: Any, number: int) -> Record:
    if not isinstance(call, dict):
        raise BadField(f"message {number}: a call is {describe_type(call)}, not an object")
    if isinstance(call.get("args"), dict) and not {"function", "arguments"} & call.keys():  # LangChain's
        about = {key: item for key, item in call.items() if key not in ("name", "args", "type")}
        call = {**about, "type": "function", "function": {"name": call.get("name"), "arguments": call["args"]}}
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
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(value := decode_nested(text), str):  # nor what Python prints
            raise BadField(f"{where} is no JSON ({error})") from None
    if "\\u" in text and (problem := problem_of_value(value, where)):
        raise BadField(problem)
    return value
