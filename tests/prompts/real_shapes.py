"""Chat templates in the shapes that models ship with, written for the tests, and conversations to print with them.

Every shape differs from the others in what a reader of templates may trip over: what opens and closes a turn, where
system words, tools, calls and thoughts stand, and what is dropped once another turn follows.
"""

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
JSON_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + ({'name': c.function.name, 'arguments': c.function.arguments}"
    " | tojson) + '\n</tool_call>' }}{% endfor %}"
)
TOOLS_FIRST = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' + (tools | tojson(indent=2)) + '<|im_end|>\n' }}{% endif %}"
)
THOUGHT = "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"

SHAPES = {
    "chatml": "{% for m in messages %}" + HEADER + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + ASK,
    # Contents stripped, BOS first, two line ends after each header.
    "headers": "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}",
    # The user's words between brackets, the answer closed by EOS; system words within the first question.
    "brackets": "{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "brackets_stripped": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content | trim + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content | trim + eos_token }}{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}",
    # A turn is closed by what opens the next one; calls as keys and values.
    "unclosed": "{{ '[gMASK]' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|assistant|>\n' + m.content }}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name }}"
    "{% for k, v in c.function.arguments | items %}{{ '\n<key>' ~ k ~ '</key><value>' ~ (v if v is string else v | tojson) ~ '</value>' }}{% endfor %}"
    "{{ '</tool_call>' }}{% endfor %}{% elif m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}{% else %}{{ '<|system|>\n' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # Calls end in another mark than answers.
    "call_mark": "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.tool_calls %}{{ ' to=' + m.tool_calls[0].function.name + '\n' + m.content + "
    "(m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}{% else %}{{ '\n' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    # An answer in two parts, each with the stop mark; the last one with another.
    "channels": LAST_USER + "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.index0 > ns.last %}"
    "{{ '<|start|>assistant analysis\n' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant final\n' + m.content + ('<|return|>' if loop.last else '<|end|>') }}{% else %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant ' }}{% endif %}",
    "tools_json": TOOLS_FIRST + "{% for m in messages %}" + HEADER + "{{ m.content }}" + JSON_CALLS + "{{ '<|im_end|>\n' }}{% endfor %}" + ASK,
    # Thoughts of answers before the last question are dropped, also where they stand in the text.
    "hybrid": TOOLS_FIRST + LAST_USER + "{% for m in messages %}{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}" + HEADER + "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text }}" + JSON_CALLS + "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
    + "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "always_thinking": "{% for m in messages %}" + HEADER + "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASK + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}",
    "thoughts_by_name": "{% for m in messages %}" + HEADER + THOUGHT + "{{ m.content }}" + JSON_CALLS + "{{ '<|im_end|>\n' }}{% endfor %}" + ASK,
    # Refuses system turns; another name for the assistant.
    "no_system": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<|start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}",
    # Drops system turns without a word.
    "deaf_to_system": "{% for m in messages %}{% if m.role != 'system' %}{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>\n' + m.content + '<|end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # System words and tools stand before the last question only.
    "at_last_user": LAST_USER + "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{% if loop.index == messages | selectattr('role', 'ne', 'system')"
    " | list | length or messages[-1].role != 'user' and m == messages[ns.last] %}{% if tools %}{{ '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST]' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') + m.content + '[/INST]' }}{% else %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% endif %}{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}{% else %}{{ m.content }}{% if m.tool_calls %}{{ '[CALLS]' + "
    "(m.tool_calls | map(attribute='function') | list | tojson) }}{% endif %}{{ eos_token }}{% endif %}{% endfor %}",
    # Joins arguments to its own words, and so wants them as text.
    "text_arguments": "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% for c in m.tool_calls or [] %}{{ '<tool>' + c.function.name + '\n' + "
    "c.function.arguments + '</tool>' }}{% endfor %}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "parts": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}{{ p.text }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK,
    # Python-like calls.
    "pythonic": "{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>' + m.content }}{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + '(' }}"
    "{% for k, v in c.function.arguments.items() %}{{ k ~ '=' ~ (\"'\" ~ v ~ \"'\" if v is string else v) ~ (', ' if not loop.last else '') }}{% endfor %}{{ ')]' }}"
    "{% endfor %}{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>' }}{% endif %}",
    "vicuna": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% elif m.role == 'tool' %}"
    "{{ 'TOOL: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "headings": "{% for m in messages %}{{ '### ' + m.role | capitalize + ':\n' + m.content + '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}",
    # A default system turn where none is given.
    "default_system": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}{% for m in messages %}" + HEADER
    + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + ASK,
    # Marks what the assistant says.
    "marked": "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}" + JSON_CALLS
    + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + ASK,
    "marked_thoughts": "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}{% generation %}" + THOUGHT + "{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + ASK,
    # Tool results within a user turn, opened and closed by looking at the neighbours.
    "grouped_results": "{% for m in messages %}{% if m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}" + HEADER + "{{ m.content }}" + JSON_CALLS + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + ASK,
}  # fmt: skip


def _call(number, **arguments):
    return {"id": f"call0000{number}", "type": "function", "function": {"name": "depth", "arguments": arguments}}


def _user(content):
    return {"role": "user", "content": content}


def _answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def _tool(number, content):
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "depth", "content": content}


PARAMETERS = {
    "type": "object",
    "properties": {"lake": {"type": "string"}, "unit": {"type": "number"}},
    "required": ["lake"],
}
TOOLS = [
    {"type": "function", "function": {"name": "depth", "description": 'Depth "in" m: <ä>', "parameters": PARAMETERS}}
]
CALLED = [_user("How deep?"), _answer("I see.", tool_calls=[_call(1, lake="Königssee", unit=1.5)]), _tool(1, "190 m")]

CONVERSATIONS = {
    "single": [_user("Name a lake."), _answer("Chiemsee.")],
    "system": [{"role": "system", "content": "Be kind."}, _user("Hi."), _answer("Hello."), _user("A lake?"), _answer("Chiemsee.")],
    "three turns": [_user("one"), _answer("first"), _user("two"), _answer("second"), _user("three"), _answer("third")],
    "white space": [_user("  def f():\n"), _answer("    return 1\n\n"), _user("\tagain "), _answer(" x\n")],
    "empty": [_user("Hi."), _answer(""), _user("Well?"), _answer("Yes.")],
    "same words": [_user("yes"), _answer("yes"), _user("yes"), _answer("yes")],
    "thoughts by name": [_user("2+2?"), _answer("Four.", reasoning_content="add them"), _user("3+3?"), _answer("Six.", reasoning_content="again")],
    "thoughts in text": [_user("2+2?"), _answer("<think>\nadd them\n</think>\n\nFour."), _user("3+3?"), _answer("<think>\nagain\n</think>\n\nSix.")],
    "call": [*CALLED, _answer("190 metres.")],
    "two calls": [_user("Depths?"), _answer("", tool_calls=[_call(1, lake="Ammersee"), _call(2, lake='"q" \\ é')]), _tool(1, "81 m"), _tool(2, "73 m"), _answer("Told.")],
    "call after thought": [_user("How deep?"), _answer("", reasoning_content="look", tool_calls=[_call(1, lake="Walchensee")]), _tool(1, "190 m"), _answer("190.", reasoning_content="done")],
    "assistant first": [_answer("Hello, what can I do?"), _user("A lake?"), _answer("Chiemsee.")],
}  # fmt: skip
