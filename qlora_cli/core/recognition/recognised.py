"""What recognition finds: the formatting of a data set, the rules for its rows, and that in one sentence."""

import shlex
from dataclasses import dataclass, field

from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.core.records.rules import RowRules
from qlora_cli.settings.groups import DataSettings


@dataclass(frozen=True)
class Recognised:
    """What the data is.

    Attributes:
        formatting: How its rows are formatted.
        train_on: Which tokens are trained.
        sentence: Both, to be read.
        remarks: What deserves to be known besides, a sentence each.
        used: Columns that have a part in it.
        rules: What is left out of rows, or unwrapped in them, before.
        rejected: The column of answers that those trained are preferred to.
        unused: Columns that have no part in it.
        columns: Names of those in which the first rows hold something, by which it was found, and of those used.
    """

    formatting: Formatting
    train_on: str
    sentence: str
    remarks: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    rules: RowRules = field(default_factory=RowRules)
    rejected: str | None = None
    unused: tuple[str, ...] = ()
    columns: frozenset[str] = frozenset()


def describe_trained(train_on: str) -> str:
    """Which tokens are trained, in words."""
    return {"all": "every token trained", "completion": "answers trained", "last": "the last answer trained"}[train_on]


def are_named(settings: DataSettings) -> bool:
    """Whether flags say which columns are read, or that these are tokens."""
    named = (settings.text_column, settings.messages_column, settings.prompt_column, settings.completion_column)
    return any(named) or bool(settings.template) or settings.format == "tokens"


def name_columns(formatting: Formatting) -> str:
    """The flags that say what was recognised."""
    if formatting.format == "tokens":
        return "--format tokens"
    if formatting.format == "text":
        return f"--text-column {shlex.quote(str(formatting.column))}"
    own = formatting.conversation
    if own and own.messages and not own.answer:
        return f"--messages-column {shlex.quote(own.messages)}"
    prompt = own.messages or own.prompt if own else formatting.prompt_column
    answer = own.answer if own else formatting.completion_column
    flags = {"--prompt-column": prompt, "--completion-column": answer}
    return " ".join(f"{flag} {shlex.quote(column)}" for flag, column in flags.items() if column)
