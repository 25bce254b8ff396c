"""Ranges of settings: which values of a number or a text mean anything. Each stands beside the default it belongs to."""

import json
import math
import re
import shlex
from typing import Any, Protocol

from qlora_cli.errors import UsageError
from qlora_cli.frozen import frozen

UNIT_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNIT_BYTES |= {
    unit: 2 ** (10 * power)
    for power, units in enumerate((("kib", "k"), ("mib", "m"), ("gib", "g"), ("tib", "t")), start=1)
    for unit in units
}
LEAST_SENSIBLE_BYTES = 2**20  # `--vram 12` is a forgotten unit, not 12 bytes
MOST_SENSIBLE_BYTES = 2**60

# The hub's address of a model or a data set, in which its id is the first group; those of old have one word for a name.
HUB_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?:datasets/)?"
    r"((?!(?:datasets|models|spaces|collections|papers|docs)(?:/|$))[^/?#]+"
    r"(?:/(?!(?:tree|blob|resolve|viewer|discussions)(?:/|$))[^/?#]+)?)(?:[/?#].*)?"
)
ADDRESS = re.compile(r"(\w+)://(.+)")
# What the hub takes for the name of a repository, with or without whose it is.
HUB_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))(?:\w(?:[\w.-]{0,94}\w)?/)?\w(?:[\w.-]{0,94}\w)?", re.ASCII)


def or_of_the_hub(name: str) -> str:
    """What else to do where a directory that is here bears the name of a repository, which it hides."""
    return f"; if the hub's {name} is meant, rename that directory" if "/" in name and HUB_ID.fullmatch(name) else ""


def way_from_address(flag: str, given: str, otherwise: str) -> str:
    """What to type where a flag was given an address, such as https://huggingface.co/org/name or file:///data/rows.jsonl.

    Args:
        flag: As --data.
        given: Its value.
        otherwise: What to type where that is no address.
    """
    if of_hub := HUB_ADDRESS.fullmatch(given):
        return f"Type: {flag} {of_hub[1]}"
    address = ADDRESS.fullmatch(given)
    if address is None:
        return otherwise
    if address[1] == "file":
        from urllib.parse import unquote

        return f"Type: {flag} {shlex.quote(unquote(address[2]))}"
    return f"Addresses are not read: download what is there. {otherwise}"


ROPE_KINDS: tuple[str, ...] = ("linear", "dynamic", "yarn", "llama3", "longrope")  # of scaling of rotary positions
ROPE_KINDS_BY_FACTOR: tuple[str, ...] = ("linear", "dynamic", "yarn")  # that a factor says all of
MOST_ROPE_FACTOR = 10_000


class Range(Protocol):
    """What a setting's value may be."""

    def allows(self, value: Any) -> bool:
        """Whether the value means anything."""

    @property
    def advice(self) -> str:
        """What to use instead of one that does not, as a sentence."""


@frozen
class Numbers:
    """Numbers from `low` to `high`, each end included unless it is open; never NaN."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def allows(self, value: Any) -> bool:
        """Whether the number lies in between."""
        above = self.low < value if self.open_low else self.low <= value
        return bool(above and (value < self.high if self.open_high else value <= self.high))

    @property
    def advice(self) -> str:
        """Both ends."""
        low, high = (f"{end:,}" for end in (self.low, self.high))
        if not (self.open_low or self.open_high):
            return f"Use {low} to {high}."
        start = f"a number above {low}" if self.open_low else f"{low}"
        return f"Use {start} {'to' if not self.open_low else 'and'} {'below' if self.open_high else 'at most'} {high}."


@frozen
class Words:
    """Text of at most `longest_bytes` in UTF-8, not empty, and without control characters. A name that is no UTF-8, which
    some file systems allow, cannot be recorded."""

    longest_bytes: int = 4096  # PATH_MAX
    lines: bool = False  # whether line ends and tabs may be in it

    def allows(self, value: Any) -> bool:
        """Whether the text can be a name."""
        text = str(value)
        plain = re.sub(r"[\n\r\t]", "", text) if self.lines else text
        try:
            size_bytes = len(text.encode())
        except UnicodeEncodeError:
            return False
        return 0 < size_bytes <= self.longest_bytes and not re.search(r"[\x00-\x1f\x7f-\x9f]", plain)

    @property
    def advice(self) -> str:
        """Its length."""
        return f"Use 1 to {self.longest_bytes:,} bytes of text in UTF-8 without control characters."


@frozen
class Memory:
    """An amount of memory, such as 12GiB."""

    def allows(self, value: Any) -> bool:
        """Whether it can be read as one."""
        try:
            parse_memory(value)
        except UsageError:
            return False
        return True

    @property
    def advice(self) -> str:
        """How it is written."""
        return "Write an amount of memory with its unit, as 12GiB, 12000MiB or 12GB."


@frozen
class WordOrNumber:
    """One of a few words, or a whole number from 0 to `high`."""

    words: tuple[str, ...]
    high: int

    def allows(self, value: Any) -> bool:
        """Whether it is one of them."""
        text = str(value)
        return text in self.words or (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= self.high)

    @property
    def advice(self) -> str:
        """All of them."""
        return f"Use {', '.join(self.words)}, or a number from 0 to {self.high:,}."


@frozen
class RopeScaling:
    """A scaling of rotary positions, such as yarn:4."""

    def allows(self, value: Any) -> bool:
        """Whether it can be read as one."""
        try:
            parse_rope_scaling(value)
        except UsageError:
            return False
        return True

    @property
    def advice(self) -> str:
        """How it is written."""
        kinds = f"{', '.join(ROPE_KINDS_BY_FACTOR[:-1])} or {ROPE_KINDS_BY_FACTOR[-1]}"
        return (
            f"Write KIND:FACTOR, as yarn:4 ({kinds}; the factor, by which the context grows, is at least 1), or as JSON "
            f"""what a config.json has: '{{"rope_type": "llama3", "factor": 8, ...}}' ({", ".join(ROPE_KINDS)})."""
        )


def parse_rope_scaling(text: str) -> dict[str, Any]:
    """Parameters of a scaling of rotary positions, `rope_type` and `factor` among them, from KIND:FACTOR or JSON.

    Raises:
        UsageError: It is neither, of no kind there is, or its factor means nothing.
    """
    advice = RopeScaling().advice
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--rope-scaling {text} is no JSON: {error}.", advice) from error
        found = {"rope_type": found.pop("type"), **found} if "type" in found else found
        kinds = ROPE_KINDS
    else:
        kind, _, factor = text.partition(":")
        try:
            found = {"rope_type": kind, "factor": float(factor)}
        except ValueError as error:
            raise UsageError(f"--rope-scaling {text} has no factor.", advice) from error
        kinds = ROPE_KINDS_BY_FACTOR
    kind, factor = found.get("rope_type"), found.get("factor")
    if kind not in kinds:
        raise UsageError(f"--rope-scaling is of kind {kind!r}.", advice)
    number = isinstance(factor, int | float) and not isinstance(factor, bool) and math.isfinite(factor)
    if not number or not 1 <= factor <= MOST_ROPE_FACTOR:
        raise UsageError(f"--rope-scaling has the factor {factor!r}.", advice)
    for name in ("original_max_position_embeddings", "max_position_embeddings"):
        if name in found and (type(found[name]) is not int or found[name] < 1):
            raise UsageError(f"--rope-scaling has {found[name]!r} for {name}.", f"Give {name} as a number of tokens.")
    return found


def parse_memory(text: str) -> int:
    """Bytes of a size such as 12GiB, 12GB, 12000MiB, 12G or 12884901888.

    GiB, MiB and the bare letters are powers of 1024; GB and MB are powers of 1000.

    Raises:
        UsageError: It is no size, or too small or too large to be one of a card.
    """
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    if match is None or match[2] not in UNIT_BYTES:
        raise UsageError(f"{text!r} is not an amount of memory.", "Write it as 12GiB, 12000MiB or 12GB.")
    total_bytes = int(float(match[1]) * UNIT_BYTES[match[2]])
    if total_bytes < LEAST_SENSIBLE_BYTES:
        raise UsageError(f"{text!r} is only {total_bytes} bytes.", f"Add the unit: {match[1]}GiB.")
    if total_bytes > MOST_SENSIBLE_BYTES:
        raise UsageError(f"{text!r} is more than any machine has.", "Write it as 12GiB, 12000MiB or 12GB.")
    return total_bytes
