"""Rendered rows against transformers' own apply_chat_template: templates of every real shape, conversations of every kind.

Text, ids and, where a template marks what the assistant says, masks are the same but for what ARGUED lists.
"""

import ast
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_cli.core.prompts.chat.printer import RenderError
from qlora_cli.core.prompts.chat.renderer import ChatRenderer, Request
from qlora_cli.core.prompts.chat.thoughts import share_names
from qlora_cli.core.prompts.encoder import encoder_of
from tests.prompts.real_shapes import CONVERSATIONS, SHAPES, TOOLS
from tests.prompts.small_tokenizers import byte_level

CONTROLS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|end|>",
    "<|eot|>",
    "<|call|>",
    "<|return|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|tool|>",
    "<|observation|>",
    "[gMASK]",
    "<s>",
    "</s>",
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
INSTALLED = [  # in transformers itself; read from its source at test time, as importing these modules takes seconds
    ("llama4/processing_llama4.py", "chat_template"),
    ("smolvlm/processing_smolvlm.py", "DEFAULT_CHAT_TEMPLATE"),
    ("qwen2_audio/processing_qwen2_audio.py", "default_chat_template"),
]
# (template, conversation) → why the text is another one. A star stands for every conversation.
ARGUED = {
    ("no_system", "system"): "the template refuses system turns: their words go into the question, which is said",
    ("brackets_stripped", "system"): "the same",
    ("deaf_to_system", "system"): "the template drops system turns: their words go into the question, which is said",
    ("thoughts_by_name", "thoughts in text"): "one by name is one",
    (
        "at_last_user",
        "system",
    ): "each answer after the prompt that it was given to: the system words before the last question",
    ("at_last_user", "three turns"): "the same",
}


def tokenizer_of():
    tokenizer = byte_level.__wrapped__()
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROLS[2:]})
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def found_templates():
    found = dict(SHAPES)
    models = Path(transformers.__file__).parent / "models"
    for file, name in INSTALLED:
        if (models / file).is_file():
            for node in ast.walk(ast.parse((models / file).read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    value = next(part.value for part in node.body if isinstance(part, ast.Return))
                elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
                    value = node.value
                else:
                    continue
                found[file.partition("/")[0]] = ast.literal_eval(value)
    return found


def reference(template, messages, tools, *, generation=False, marks=False):
    """transformers' text, and (start, end) of what a template marks as the assistant's."""
    texts, marked = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        add_generation_prompt=generation,
        return_assistant_tokens_mask=marks,
        **NAMES,
    )
    return texts[0], marked[0] if marks else None


def in_form_of(template, messages):
    """What the template is given by somebody who knows it: arguments as text, contents as parts, thoughts by every name."""
    messages = [share_names(message) for message in messages]
    if template == SHAPES["text_arguments"]:
        messages = json.loads(json.dumps(messages))
        for message in messages:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    for content in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        shaped = [{**message, "content": content(message["content"])} for message in messages]
        try:
            if "Certainly" in reference(template, [{"role": "user", "content": content("Certainly")}], None)[0]:
                return shaped
        except Exception:  # the other form is the one
            continue
    return messages


def turns_of(spans):
    """(start, end) of each turn, and the whole text."""
    text, places = "", {}
    for part, _, turn in spans:
        if turn >= 0:
            places[turn] = (places.get(turn, (len(text), 0))[0], len(text) + len(part))
        text += part
    return text, list(places.values())


def compare(name, template, renderer, encoder, tokenizer, kind, messages):
    """What was compared, for counting; fails where a difference is not argued."""
    tools = TOOLS if "call" in kind else None
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    given = in_form_of(template, messages)
    request = Request([share_names(m) for m in messages], tools, {}, tuple(range(len(answers))))
    try:
        rendered = renderer.render(request)
    except RenderError:
        with pytest.raises(Exception):  # noqa: B017 - transformers refuses it too, in whatever way the template fails
            reference(template, given, tools)
        return "refused by both"
    if (name, kind) in ARGUED:
        return "argued"
    assert not rendered.moved
    for spans, trained in rendered.rows:
        if not trained:
            continue  # an answer of which the template prints nothing
        upto = messages[: answers[trained[-1]] + 1] if rendered.unfolded else messages
        wanted, marked = reference(template, given[: len(upto)], tools, marks="{% generation %}" in template)
        text, turns = turns_of(spans)
        stop = text[len(wanted) :] if text.startswith(wanted) else ""
        prompt = reference(template, given[: len(upto) - 1], tools, generation=True)[0] if upto[:-1] else ""
        if rendered.unfolded and not wanted.startswith(text[: turns[-1][0]]):
            assert text.startswith(prompt)  # the prompt as at generation, and the answer as it ends the whole
            assert wanted.rstrip().endswith(text[len(prompt) :].strip())
            continue
        assert text.rstrip() == wanted.rstrip() or (stop in CONTROLS and messages[len(upto) - 1].get("tool_calls"))
        if marked is not None:
            assert [tuple(place) for place in marked] == turns
        borders = sorted({0, len(text), *(place for turn in turns for place in turn)})
        apart = [text[a:b] for a, b in pairwise(borders)]
        ids = [
            i
            for runs in encoder.encode_rows([[(encoder.control_ids[p] if c else p, False) for p, c, _ in spans]])[0]
            for i in runs
        ]
        pieces = [i for piece in apart for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]
        assert ids == pieces  # transformers' ids; a token never reaches across where an answer starts or ends
        assert tokenizer.decode(ids) == text
    return "unfolded" if rendered.unfolded else "the same"


def test_rows_are_what_transformers_prints():
    tokenizer = tokenizer_of()
    templates = found_templates()
    assert len(SHAPES) >= 20
    outcomes = Counter()
    for name, template in templates.items():
        tokenizer.chat_template = template
        encoder = encoder_of(tokenizer)
        renderer = ChatRenderer(template, NAMES, list(encoder.control_ids), None)
        for kind, messages in CONVERSATIONS.items():
            try:
                outcomes[compare(name, template, renderer, encoder, tokenizer, kind, messages)] += 1
            except Exception as error:
                raise AssertionError(f"{name}, {kind}: {error}") from error
    assert outcomes["the same"] + outcomes["unfolded"] > 0.95 * outcomes.total()
    assert outcomes["argued"] == len(ARGUED)
