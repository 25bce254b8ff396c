"""What recognition finds: the formatting of a data set, the rules for its rows, and that in one sentence."""

from dataclasses import dataclass, field

from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.core.records.rules import RowRules


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
    """

    formatting: Formatting
    train_on: str
    sentence: str
    remarks: tuple[str, ...] = ()
    used: tuple[str, ...] = ()
    rules: RowRules = field(default_factory=RowRules)
    rejected: str | None = None
    unused: tuple[str, ...] = ()


def describe_trained(train_on: str) -> str:
    """Which tokens are trained, in words."""
    return {"all": "every token trained", "completion": "answers trained", "last": "the last answer trained"}[train_on]
