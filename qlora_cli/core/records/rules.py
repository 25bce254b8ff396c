"""Rules of a data set that are applied to each of its rows before it is formatted: what is left out, what is unwrapped."""

from dataclasses import dataclass
from typing import Any

from qlora_cli.core.records.media import holds_some
from qlora_cli.core.records.messages import yes_or_no
from qlora_cli.core.records.record import BadField, Blank, Record, describe_type, with_fields

# Columns beside the tokens of a row, each with an entry a token.
GIVEN_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")  # 1 where a token is trained
BESIDE_IDS = ("attention_mask", "labels", *GIVEN_MASKS, "position_ids")

# Columns that say of a row whether it is for training, and what they call those that are not.
PARTS = ("split", "set", "subset", "partition")
TRAINING = ("train", "training")
HELD_OUT = (
    "test",
    "testing",
    "val",
    "valid",
    "validation",
    "dev",
    "eval",
    "evaluation",
    "holdout",
    "held_out",
    "heldout",
)


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """What the columns of a data set say about its rows.

    Attributes:
        media: Columns of images and the like, each with what its rows hold; only text is read.
        label: A column that says of each answer whether it is a good one; rows in which it is false are left out.
        trained: Columns that say of each row whether it is trained, each with the flag that trains all rows; rows of which
            one says no are left out.
        answers: A column that holds the answer inside a list or an object (SQuAD's `{"text": [...]}`); the first counts.
        fields: Dotted names of fields inside a column's objects, which are used like columns.
        ended: A column whose texts all end in a control token, and that token; it is taken off, as the template has it.
    """

    media: tuple[tuple[str, str], ...] = ()
    label: str | None = None
    trained: tuple[tuple[str, str], ...] = ()
    answers: str | None = None
    fields: tuple[str, ...] = ()
    ended: tuple[str, str] | None = None

    def apply(self, record: Record) -> Record:
        """The record as it is formatted.

        Raises:
            Blank: It is to be left out.
            BadField: A column does not hold what the others' do.
        """
        record = with_fields(record, self.fields) if self.fields else record
        for name, kind in self.media:
            if holds_some(record.get(name)):
                raise BadField(f"field {name!r} holds {kind}, and only text is read")
        if self.label is not None and is_false(record.get(self.label)):
            raise Blank(f"{self.label!r} is false")
        for name, every_row in self.trained:
            if (value := record.get(name)) in (None, ""):
                continue
            if (says := yes_or_no(value)) is None:
                raise BadField(
                    f"field {name!r} is {str(value)[:40]}; a row is trained (1) or is not (0)",
                    f"Train on all rows alike: {every_row}.",
                )
            if not says:
                raise Blank(f"{name!r} is {value}")
        if self.answers is not None:
            record = {**record, self.answers: first_text(record.get(self.answers), self.answers)}
        if self.ended is not None and isinstance(text := record.get(self.ended[0]), str):
            record = {**record, self.ended[0]: text.rstrip().removesuffix(self.ended[1])}
        return record

    def __bool__(self) -> bool:
        return self != RowRules()


def part_of(record: Record) -> str | None:
    """The column by which a row is for training or kept from it, and what it says, as `column=value`."""
    for name in PARTS:
        if isinstance(value := record.get(name), str) and value.strip().lower() in (*TRAINING, *HELD_OUT):
            return f"{name}={value}"
    return None


def is_false(value: Any) -> bool:
    """Whether a label says no, as a boolean or in words."""
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def first_text(value: Any, column: str) -> str:
    """The first text of a list, of an object's list `text`, or the text itself; empty where there is none.

    Raises:
        BadField: It holds something else.
    """
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, list):
        value = value[0] if value else ""
        return first_text(value, column) if isinstance(value, dict) else first_text(value or "", column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadField(f"field {column!r} is {describe_type(value)}, not text")
    return value
