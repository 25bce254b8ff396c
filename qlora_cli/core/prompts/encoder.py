"""Text encoder: runs of text and control tokens to token ids, the same in training and at generation.

A row is a list of runs: a str is text in which nothing is ever a control token, whoever typed it; an int is a control
token. Each text run is tokenised by itself, so that whatever borders it (where the answer starts, where a mask
begins) borders a token too.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from qlora_cli.core.prompts.foreign_tokenizer import encode_texts, refuse_growth
from qlora_cli.core.prompts.word_cache import Ids, WordCache, find_cut
from qlora_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Run = tuple[str | int, bool]  # text or control token, and whether it is trained


@dataclass(frozen=True)
class TokenizerSpec:
    """What of a tokenizer matters here, small enough to be sent to another process.

    Attributes:
        backend: Content of its tokenizer.json, with every control token marked special.
        prefix_ids: What it puts before a text by itself: (BOS,) mostly, or nothing.
        eos_id: End of text.
        names: bos_token, eos_token and so on, as templates know them.
        chat_template: Its own, or None.
        tool_template: Its own for conversations with tools, where that is another one.
        other_templates: Names of further ones, that nothing here chooses by itself.
        prefix_after_control: Whether it puts its prefix space after a control token as well as at the start.
    """

    backend: str
    prefix_ids: tuple[int, ...]
    eos_id: int
    names: dict[str, str]
    chat_template: str | None
    prefix_after_control: bool
    tool_template: str | None = None
    other_templates: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Identity of the tokenizer: its vocabulary, rules and control tokens."""
        facts = [self.backend, self.prefix_ids, self.eos_id, sorted(self.names.items())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


_encoders: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, TextEncoder]]" = WeakKeyDictionary()


def encoder_of(tokenizer: "PreTrainedTokenizerBase") -> "TextEncoder":
    """The encoder of a transformers tokenizer; built once.

    Raises:
        ModelError: It has no fast (Rust) form, or no end-of-text token.
    """
    state = (len(tokenizer), tokenizer.eos_token, tokenizer.bos_token, str(tokenizer.chat_template))
    known = _encoders.get(tokenizer)
    if known is None or known[0] != state:
        known = _encoders[tokenizer] = (state, TextEncoder(_describe(tokenizer)))
    return known[1]


def _describe(tokenizer: "PreTrainedTokenizerBase") -> TokenizerSpec:
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer {type(tokenizer).__name__} of {tokenizer.name_or_path!r} has no fast form (tokenizer.json).",
            "Choose a model that comes with a tokenizer.json.",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no end-of-text token, so no answer could ever end.",
            'Set "eos_token" in its tokenizer_config.json.',
        )
    given = tokenizer.chat_template
    templates: dict[str, str] = given if isinstance(given, dict) else {"default": given} if given else {}
    chat_template = templates.get("default")
    everything = "\n".join(templates.values())
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    refuse_growth(content)
    content["truncation"] = content["padding"] = None
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    for token in content["added_tokens"]:
        # Some models ship <|im_start|> and the like as ordinary added tokens; in their template they control all the
        # same. <think> and <tool_call> stay what they are: answers hold them rightly.
        in_template = token["content"] in everything and re.search("[|｜]", token["content"]) is not None
        token["special"] = token["special"] or in_template or token["content"] in names.values()
    probe = "a"
    plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
    whole = tokenizer(probe)["input_ids"]
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    prefix_ids = tuple(whole[: starts[0]]) if starts else ()
    after_control = tokenizer(tokenizer.eos_token + probe, add_special_tokens=False)["input_ids"][1:]
    return TokenizerSpec(
        backend=json.dumps(content, ensure_ascii=False),
        prefix_ids=prefix_ids,
        eos_id=tokenizer.eos_token_id,
        names=names,
        chat_template=chat_template,
        prefix_after_control=after_control == plain,
        tool_template=templates.get("tool_use") if chat_template is not None else None,
        other_templates=tuple(
            name for name in templates if chat_template is None or name not in ("default", "tool_use")
        ),
    )


class TextEncoder:
    """Text to ids under one tokenizer.

    SentencePiece-like tokenizers put a space before a text. Here the first text of a row gets it, as everywhere; a
    text that continues a row does not, so that cutting a row into runs adds no space to it.

    Attributes:
        spec: The tokenizer.
        control_ids: Control token → id.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        content = json.loads(spec.backend)
        continuing = _without_prefix(content)
        self._at_start = _text_only(content)
        self._inside = self._at_start if continuing == content else _text_only(continuing)
        special = [token for token in content["added_tokens"] if token["special"]]
        self.control_ids: dict[str, int] = {token["content"]: token["id"] for token in special}
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._strips_left = {token["content"] for token in special if token["lstrip"]}
        self._strips_right = {token["content"] for token in special if token["rstrip"]}
        model = content["model"]
        unknown = model.get("unk_id", self.control_ids.get(model.get("unk_token")))  # may stand for any letter
        names = {id: token for token, id in self.control_ids.items()}
        self._frame = (
            tuple(names.get(id) for id in (spec.prefix_ids[0], spec.eos_id)) if len(spec.prefix_ids) == 1 else ()
        )
        self._forbidden = set(self.control_ids.values()) - {unknown}
        self._words = WordCache(find_cut(content), self._at_start, self._inside, self._without_control)

    def split_markup(self, text: str) -> list[str | int]:
        """Text written by the template's author to text and control tokens, spaces eaten as the tokenizer would."""
        parts: list[str | int] = []
        at = 0
        strip_next = False
        for match in self._control.finditer(text):
            between = text[at : match.start()]
            between = between.lstrip() if strip_next else between
            between = between.rstrip() if match[0] in self._strips_left else between
            parts += [between, self.control_ids[match[0]]] if between else [self.control_ids[match[0]]]
            at, strip_next = match.end(), match[0] in self._strips_right
        rest = text[at:].lstrip() if strip_next else text[at:]
        return [*parts, rest] if rest else parts

    def strip_beside_control(self, spans: Sequence[tuple[str, bool, int]]) -> list[tuple[str, bool, int]]:
        """Spans of a rendered chat without the white space that control tokens beside it take along.

        Args:
            spans: Text, whether it is a control token, and what else belongs to it.
        """
        if not self._strips_left and not self._strips_right:
            return list(spans)
        stripped: list[tuple[str, bool, int]] = []
        for i, (text, is_control, turn) in enumerate(spans):
            if not is_control:
                if i and spans[i - 1][1] and spans[i - 1][0] in self._strips_right:
                    text = text.lstrip()
                if i + 1 < len(spans) and spans[i + 1][1] and spans[i + 1][0] in self._strips_left:
                    text = text.rstrip()
            if text:
                stripped.append((text, is_control, turn))
        return stripped

    def holds_control(self, text: str) -> bool:
        """Whether somebody typed a control token."""
        return self._control.search(text) is not None

    def unframe(self, text: str) -> str:
        """The text without the BOS that it opens with and the EOS that it ends in, as its row gets both of them anyway.

        Only where both are there, the tokenizer adds BOS by itself, and the text holds no other control token.
        """
        bos, eos = self._frame or ("", "")
        core = text.strip()
        if not bos or not eos or not (core.startswith(bos) and core.endswith(eos)) or len(core) <= len(bos) + len(eos):
            return text
        inner = core[len(bos) : -len(eos)]
        return text if self.holds_control(inner) else inner

    def with_prefix(self, runs: list[Run]) -> list[Run]:
        """The row with what the tokenizer puts before a text (BOS), unless it begins with that already."""
        prefix = self.spec.prefix_ids
        if not prefix or (runs and runs[0][0] == prefix[0]):
            return runs
        return [*((token, False) for token in prefix), *runs]

    def close(self, runs: list[Run]) -> list[Run]:
        """The row with what the tokenizer puts before a text, and with end of text, trained, once."""
        runs = self.with_prefix(runs)
        eos = self.spec.eos_id
        return [*(runs[:-1] if runs and runs[-1][0] == eos else runs), (eos, True)]

    def encode_rows(self, rows: Sequence[Sequence[Run]]) -> list[list[Ids]]:
        """The ids of every run of every row."""
        texts: list[str] = []
        starts: list[bool] = []
        for row in rows:
            before: str | int | None = None
            for content, _ in row:
                if isinstance(content, str):
                    texts.append(content)
                    follows_prefix = isinstance(before, int) and (
                        self.spec.prefix_after_control or before in self.spec.prefix_ids
                    )
                    starts.append(before is None or follows_prefix)
                before = content
        encoded = iter(self._words.encode(texts, starts))
        return [[[content] if isinstance(content, int) else next(encoded) for content, _ in row] for row in rows]

    def problem_of(self, runs: Sequence[Run]) -> str | None:
        """Why a row cannot be tokenised within bounded memory, as a clause."""
        for content, _ in runs:
            if isinstance(content, str) and not self._words.takes(content):
                return (
                    f"holds a text of {len(content):,} letters, of which this tokenizer can take apart "
                    f"{self._words.most_uncut_letters:,} at once; cut it into several rows"
                )
        return None

    def _without_control(self, backend: Tokenizer, texts: list[str], encoded: list[list[int]]) -> list[list[int]]:
        """The ids of texts, letter by letter where they hold a control token.

        A vocabulary that is searched as a whole (Unigram) finds "</s>" in plain text, whatever `encode_special_tokens` says.
        """
        if self._forbidden.isdisjoint(chain.from_iterable(encoded)):
            return encoded
        return [
            ids if self._forbidden.isdisjoint(ids) else self._encode_letters(backend, text)
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _encode_letters(self, backend: Tokenizer, text: str) -> list[int]:
        letters = [*encode_texts(backend, text[:1]), *encode_texts(self._inside, text[1:])]
        return [id for letter in letters for id in letter.ids]


def _text_only(description: dict[str, Any]) -> Tokenizer:
    """A tokenizer that takes control tokens for the letters they are written with."""
    tokenizer = Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without_prefix(part: Any) -> Any:
    """A tokenizer's description without what puts a space before a text."""
    if isinstance(part, list):
        return [_without_prefix(item) for item in part if not _is_prepend(item)]
    if not isinstance(part, dict):
        return part
    changed = {
        key: value if key in ("model", "added_tokens", "post_processor", "decoder") else _without_prefix(value)
        for key, value in part.items()
        if not _is_prepend(value)
    }
    if part.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
        changed.pop("add_prefix_space", None)
    elif "add_prefix_space" in part:
        changed["add_prefix_space"] = False
    if _is_prepend(part.get("normalizer")):
        changed["normalizer"] = None
    return changed


def _is_prepend(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"
