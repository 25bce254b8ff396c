"""Letters in texts that were meant as something else: control tokens of other models, places of images, line ends."""

import json
import re
from collections.abc import Iterator, Sequence

from qlora_cli.core.prompts.encoder import TextEncoder
from qlora_cli.core.recognition.columns import list_names

# What models of many families write before a text, before a turn, and after either.
BEGINNINGS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>")
TURNS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|turn>", "<|user|>", "<|system|>", "<｜User｜>")
ENDS = (
    "</s>",
    "<eos>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|eot|>",
    "<|EOT|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
)
PLACEHOLDERS = ("<image>", "<video>", "<audio>")  # of what stands in another column, where data of such models is made
# A line end written as a backslash and an n. In formulas (\nabla) and paths a small letter follows, in code a quote.
_ESCAPED = re.compile(r"\\n(?![a-z\"'`])")


def remark_letters(texts: Sequence[str], encoder: TextEncoder, what: str) -> list[str]:
    """That texts hold as letters what was meant as something else, each with what to do."""
    return [*_foreign(texts, encoder, what), *_placeholders(texts, what), *_escaped(texts, what)]


def _placeholders(texts: Sequence[str], what: str) -> Iterator[str]:
    """That texts begin or end in the place of an image, which is not read."""
    framed = [text for text in map(str.strip, texts) if text.startswith(PLACEHOLDERS) or text.endswith(PLACEHOLDERS)]
    if held := [mark for mark in PLACEHOLDERS if any(mark in text for text in framed)]:
        patterns = "".join(f" -e '{mark}'" for mark in held)
        yield (
            f"{len(framed)} of the first {len(texts)} {what} begin or end in {list_names(held)}, of which only these letters are "
            f"read. Of JSON lines, this leaves out such rows: grep -v{patterns} DATA.jsonl > clean.jsonl"
        )


def _escaped(texts: Sequence[str], what: str) -> Iterator[str]:
    """That a quarter of texts and more hold line ends as two letters, and none a real one; some commands of shells do."""
    others = (
        text for text in map(str.strip, texts) if not text.startswith(("{", "[")) and not text.endswith(("}", "]"))
    )
    count = sum(_ESCAPED.search(text) is not None for text in others)  # but in JSON, which writes them so
    if count > len(texts) / 4 and not any("\n" in text for text in texts):
        yield (
            f"{count} of the first {len(texts)} {what} hold line ends as two letters, \\n, and none a real one. Of JSON lines, "
            r"this makes them real: sed 's/\\\\n/\\n/g' DATA.jsonl > clean.jsonl"
        )


def _foreign(texts: Sequence[str], encoder: TextEncoder, what: str) -> list[str]:
    """That texts begin or end in control tokens of other models, which for this one are letters, and what to do."""
    own = encoder.spec.chat_template or ""
    marks = _foreign_marks(texts, encoder, own)
    openings, ends = (tuple(mark for mark in marks if (mark in ENDS) == is_end) for is_end in (False, True))
    framed = [text for text in map(str.strip, texts) if text.startswith(openings) or text.endswith(ends)]
    if not (found := _foreign_marks(framed, encoder, own)):
        return []
    if any(mark in TURNS for mark in found):
        way = "Conversations written as lists of messages (role and content) get those of the chat template instead."
    else:
        way = f"Of JSON lines, this takes them off: sed '{';'.join(_removals(found))}' DATA.jsonl > clean.jsonl"
    return [f"{len(framed)} of the first {len(texts)} {what} begin or end in {_as_letters(found)} {way}"]


def _removals(marks: Sequence[str]) -> Iterator[str]:
    """Commands of sed that take control tokens off JSON lines, however these write a slash (pandas: \\/) and what is not
    ASCII (Python: \\uff5c)."""
    for mark in marks:
        for written in dict.fromkeys((mark, json.dumps(mark)[1:-1])):
            yield "s#" + written.replace("\\", "\\\\").replace("/", "\\\\*/") + "##g"


def name_marks_of_template(template: str, encoder: TextEncoder) -> list[str]:
    """That a template that the user gave prints control tokens of other models."""
    marks = _foreign_marks([template], encoder)
    return [f"The template prints {_as_letters(marks)}"] if marks else []


def _foreign_marks(texts: Sequence[str], encoder: TextEncoder, own: str = "") -> list[str]:
    """Control tokens of other models that stand in texts, and neither in the tokenizer nor in a template of its own."""
    unknown = [mark for mark in (*BEGINNINGS, *TURNS, *ENDS) if mark not in encoder.control_ids and mark not in own]
    found = [mark for mark in unknown if any(mark in text for text in texts)]
    ids = encoder.encode_rows([[(mark, True)] for mark in found])
    return [mark for mark, (letters,) in zip(found, ids, strict=True) if len(letters) > 1]


def _as_letters(marks: Sequence[str]) -> str:
    return f"{list_names(marks)}, which this tokenizer does not have and takes for letters."
