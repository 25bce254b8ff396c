"""Recognition of columns that say which rows, and which turns of conversations, are trained."""

from dataclasses import replace
from typing import Any

from qlora_cli.core.recognition.columns import Columns
from qlora_cli.core.recognition.recognised import Recognised, are_named
from qlora_cli.core.records.messages import TRAINED_KEYS, number_in, yes_or_no
from qlora_cli.core.records.record import decode_nested
from qlora_cli.errors import DataError
from qlora_cli.settings.groups import DataSettings

LABELS = ("label", "kto_tag")  # of unpaired feedback: whether an answer is a good one
TRAINED = (*TRAINED_KEYS, "weights", "loss_weight", "sample_weight")
# Of these, those whose numbers are no mere facts of a row.
WEIGHING = ("weight", "weights", "loss_weight", "sample_weight", "loss_mask")


def with_selection(
    columns: Columns, recognised: Recognised, settings: DataSettings, *, is_restated: bool
) -> Recognised:
    """Leaves out what the data calls bad, what it says is not trained, and other answers than the first.

    Args:
        columns: Of the data.
        recognised: What it is.
        settings: What the flags say.
        is_restated: Whether --format states what is recognised without it, and so can only mean that all rows are read.

    Raises:
        DataError: A column weighs rows, and no flag says what the data is.
    """
    if (answers := recognised.rules.answers) and any(map(_holds_several, columns.values(answers))):
        remark = f"Where column {answers!r} holds several answers, the first is trained."
        recognised = replace(recognised, remarks=(*recognised.remarks, remark))
    for name in filter(None, (columns.find([known]) for known in TRAINED)):
        if name not in recognised.used:
            recognised = _with_trained(columns, recognised, settings, name)
    label = columns.find(LABELS)
    if recognised.formatting.format not in ("prompt", "chat") or label is None:
        return recognised
    if not columns.is_yes_or_no(label):
        said = {str(value) for value in columns.values(label)}
        remark = f"Column {label!r} holds 0 and 1: where these say which answers are bad, write them as false and true."
        return replace(recognised, remarks=(*recognised.remarks, remark)) if said == {"0", "1"} else recognised
    if is_restated:
        remark = f"What column {label!r} says of rows does nothing beside --format {settings.format}."
        return replace(recognised, remarks=(*recognised.remarks, remark))
    way = (
        f"{_every_row(recognised)} trains them too"
        if settings.format == "auto"
        else "under another name it does nothing"
    )
    remark = f"Rows whose column {label!r} is false are left out; {way}."
    return _with_rule(recognised, label, remark, label=label)


def _every_row(recognised: Recognised) -> str:
    """The flag that reads what was recognised, without its selection."""
    return f"--format {recognised.formatting.format}"


def _holds_several(value: Any) -> bool:
    value = value.get("text") if isinstance(value, dict) else value
    return isinstance(value, list) and len({str(item) for item in value}) > 1


def _with_trained(columns: Columns, recognised: Recognised, settings: DataSettings, name: str) -> Recognised:
    """A column of yes and no for each row, or of a list of these for each conversation; others as before, and any where
    flags say what the data is."""
    every_row = _every_row(recognised)
    given = (decode_nested(value) if isinstance(value, str) else value for value in columns.values(name))
    values = [value for value in given if value != ""]  # as a CSV file holds nothing
    lists = [value for value in values if isinstance(value, list)]
    every = [item for value in values for item in (value if isinstance(value, list) else [value])]
    are_flags = bool(every) and all(yes_or_no(value) is not None for value in every)
    talk = recognised.formatting.conversation
    if are_named(settings) or settings.format != "auto":
        remark = (
            f"What column {name!r} says is trained or is not does nothing beside --format or flags that name columns."
        )
        return replace(recognised, remarks=(*recognised.remarks, remark)) if are_flags else recognised
    if are_flags and not lists:
        remark = f"Rows of which column {name!r} says no (0 or false) are left out; {every_row} trains them too."
        return _with_rule(recognised, name, remark, trained=(*recognised.rules.trained, (name, every_row)))
    if are_flags and talk and talk.messages and not (talk.answer or talk.trained):
        formatting = replace(recognised.formatting, conversation=replace(talk, trained=name))
        remark = f"Column {name!r} says which messages are trained; {every_row} trains every answer."
        return replace(_with_rule(recognised, name, remark), formatting=formatting)
    weighs = name.lower() in WEIGHING and bool(every) and all(number_in(value) is not None for value in every)
    if not weighs:
        return recognised
    shown = ", ".join(str(value)[:20] for value in list(dict.fromkeys(map(str, values)))[:3])
    is_mask = bool(lists) and recognised.formatting.format == "tokens"
    raise DataError(
        f"Column {name!r} holds {shown}, and a row or a message is trained (1) or is not (0).",
        ("Write 0 or 1 for each token into a column 'loss_mask'" if is_mask else "Write 0 or 1 for each row")
        + f", or train on all of them alike: {every_row}",
    )


def _with_rule(recognised: Recognised, name: str, remark: str, **rules: Any) -> Recognised:
    return replace(
        recognised,
        rules=replace(recognised.rules, **rules),
        remarks=(*recognised.remarks, remark),
        used=(*recognised.used, name),
    )
