"""Recognition of prompts with completions: by the names of their columns, by flags, or under a template."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.core.prompts.encoder import TextEncoder
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.core.prompts.prompt_template import PromptTemplate
from qlora_cli.core.recognition.columns import PAIRS, Columns
from qlora_cli.core.recognition.letters import name_marks_of_template, remark_letters
from qlora_cli.core.recognition.recognised import Recognised, describe_trained
from qlora_cli.core.recognition.texts import common_ending, shows_markup
from qlora_cli.core.records.dialogues import opening_of
from qlora_cli.core.records.messages import holds_messages
from qlora_cli.core.records.rules import RowRules
from qlora_cli.errors import UsageError
from qlora_cli.settings.groups import DataSettings


@dataclass(frozen=True)
class Pair:
    """Columns that belong together as question and answer.

    Attributes:
        prompt: The question.
        optional: A column that may be empty.
        completion: The answer.
        is_conversational: Whether one of them holds messages.
        is_nested: Whether the answer lies in a list or an object.
        rejected: The column of answers that the others are preferred to.
    """

    prompt: str
    optional: str | None
    completion: str
    is_conversational: bool = False
    is_nested: bool = False
    rejected: str | None = None


def find_pair(columns: Columns, settings: DataSettings) -> Pair | None:
    """The question and answer columns, by flags or names; with preference rows, the answer is the chosen one."""
    chosen, rejected = columns.preference()
    named = _named_pair(columns, settings)
    if named is not None:
        return named
    for prompt, optionals, completions in PAIRS:
        question = columns.find([prompt])
        if question is None or not (columns.is_text(question) or columns.is_conversation(question)):
            continue
        for name in (chosen,) if chosen else completions:
            answer = columns.find([name])
            if answer is None or not _is_answer(columns, answer):
                continue
            return Pair(
                question,
                columns.find(optionals),
                answer,
                is_conversational=not columns.is_text(question)
                or any(_holds_messages(columns, name) for name in (question, answer, columns.find(optionals)) if name),
                is_nested=is_nested(columns, answer),
                rejected=rejected,
            )
    return None


def named_like_pair(columns: Columns) -> tuple[str, str, int] | None:
    """Columns with the names of question and answer, whatever they hold, and in how many rows both are text."""
    for prompt, _, completions in PAIRS:
        question, answer = columns.find([prompt]), columns.find(completions)
        if question and answer:
            both = [isinstance(row.get(question), str) and isinstance(row.get(answer), str) for row in columns.records]
            return question, answer, sum(both)
    return None


def _named_pair(columns: Columns, settings: DataSettings) -> Pair | None:
    """The pair of which both columns are named by flags, if one of them holds messages."""
    prompt, completion = settings.prompt_column, settings.completion_column
    if not prompt or not completion or not {prompt, completion} <= set(columns.names):
        return None
    if not (_holds_messages(columns, prompt) or _holds_messages(columns, completion)):
        return None
    return Pair(prompt, None, completion, is_conversational=True)


def _holds_messages(columns: Columns, name: str) -> bool:
    return columns.holds(name, holds_messages)


def is_nested(columns: Columns, name: str) -> bool:
    """Whether a column holds answers inside a list or an object, which are no messages."""
    return not columns.is_text(name) and not _holds_messages(columns, name) and columns.holds(name, _holds_text)


def _is_answer(columns: Columns, name: str) -> bool:
    return columns.is_text(name) or _holds_messages(columns, name) or is_nested(columns, name)


def _holds_text(value: Any) -> bool:
    """Whether a value is an answer inside a list or an object: `["a"]`, `{"text": ["a"]}`, `[{"text": "a"}]`."""
    if isinstance(value, dict):
        return "text" in value and isinstance(value["text"], str | list)
    return isinstance(value, list) and all(
        isinstance(item, str) or (isinstance(item, dict) and "text" in item) for item in value
    )


def recognise_pair(columns: Columns, settings: DataSettings, encoder: TextEncoder, pair: Pair | None) -> Recognised:
    """Prompt and completion under plain headings, or as they stand where they were formatted beforehand.

    Raises:
        UsageError: They are not recognised, or a flag names no column.
    """
    train_on = settings.train_on or "completion"
    prompt, answer = _columns_of(columns, settings, pair)
    if prompt is None or answer is None or prompt == answer:
        raise UsageError(
            f"Prompt and completion are not recognised among the columns {columns.listed}.",
            "Name both: --prompt-column and --completion-column.",
        )
    optional = pair.optional if pair and prompt == pair.prompt and pair.optional not in (prompt, answer) else None
    rules = RowRules(answers=answer if pair and pair.is_nested and answer == pair.completion else None)
    remarks: list[str] = []
    prompts, answers = ([v for v in columns.values(c) if isinstance(v, str) and v.strip()] for c in (prompt, answer))
    if how := shows_markup(prompts, encoder):
        remarks.append(
            f"Every prompt is {how}: the rows were formatted beforehand, so they stand without headings, and control "
            "tokens written in them are taken as such."
        )
        formatting = Formatting(
            format="prompt",
            prompt_column=prompt,
            completion_column=answer,
            template=f"{{{prompt}}}{{{answer}}}",
            markup=True,
        )
        optional = None
    else:
        ending = "" if rules.answers else common_ending(answers, encoder) or ""
        if ending:
            remarks.append(f"Every completion ends in {ending}, which is taken as the control token.")
            rules = RowRules(ended=(answer, ending))
        elif any(map(encoder.holds_control, [*prompts, *answers])):
            remarks.append(f"Control tokens typed in {prompt!r} or {answer!r} are kept as plain text.")
        template = _headings(prompt, optional, answer) + (
            ending if ending != encoder.spec.names.get("eos_token") else ""
        )
        short = _headings(prompt, None, answer) + template.partition(f"{{{answer}}}")[2] if optional else None
        formatting = Formatting(
            format="prompt",
            prompt_column=prompt,
            completion_column=answer,
            optional_column=optional,
            template=template,
            template_without_optional=short,
        )
    has_more = optional is not None and any(columns.values(optional))  # between what a prompt ends in and its answer
    remarks += _remark_pairs(columns, prompt, answer, encoder, has_headings=not (how or has_more))
    also = f" (and {optional!r} where it is not empty)" if optional else ""
    sentence = f"prompt in column {prompt!r}{also}, completion in {answer!r}, {describe_trained(train_on)}"
    rejected = pair.rejected if pair and answer == pair.completion else None
    used = tuple(name for name in (prompt, optional, answer) if name)
    return Recognised(formatting, train_on, sentence, tuple(remarks), used, rules, rejected)


def _remark_pairs(
    columns: Columns, prompt: str, answer: str, encoder: TextEncoder, *, has_headings: bool
) -> Iterator[str]:
    """What of the texts of prompts and completions is rather not meant as they are taken."""
    yield from remark_letters(
        [f"{row.get(prompt) or ''}{row.get(answer) or ''}" for row in columns.records], encoder, "rows"
    )
    openings = [opening_of(asked) for asked in columns.values(prompt) if isinstance(asked, str) and asked.strip()]
    if _repeats(columns, prompt, answer):
        yield (
            f"Every completion begins with its prompt, which so stands there twice and is trained, too. The completions alone, "
            f"as they are: --text-column {shlex.quote(answer)}"
        )
    elif has_headings and openings and all(openings):
        yield (
            f"Every prompt ends like {openings[0]!r}, as if formatted beforehand, and is put under a heading of its own. As they "
            f"stand: --template {shlex.quote(f'{{{prompt}}}{{{answer}}}')}"
        )


def _repeats(columns: Columns, prompt: str, answer: str) -> bool:
    """Whether every completion begins with its prompt."""
    both = [(row.get(prompt), row.get(answer)) for row in columns.records]
    texts = [(asked.strip(), said.strip()) for asked, said in both if isinstance(asked, str) and isinstance(said, str)]
    return bool(texts) and all(asked and said.startswith(asked) for asked, said in texts)


def _columns_of(columns: Columns, settings: DataSettings, pair: Pair | None) -> tuple[str | None, str | None]:
    """Prompt and completion, by flags first."""
    prompt, answer = (pair.prompt, pair.completion) if pair else (None, None)
    if settings.prompt_column:
        prompt = columns.require(settings.prompt_column, "--prompt-column")
    if settings.completion_column:
        answer = columns.require(settings.completion_column, "--completion-column")
    return prompt, answer


def _headings(prompt: str, optional: str | None, answer: str) -> str:
    """The plain template: each column under a heading of its name."""

    def heading(column: str) -> str:
        return (column.rpartition(".")[2] or column).replace("_", " ").strip().capitalize()

    opening = f"### {heading(prompt)}:\n{{{prompt}}}\n\n"
    middle = f"### {heading(optional)}:\n{{{optional}}}\n\n" if optional else ""
    answer_heading = "Response" if prompt.lower() == "instruction" else heading(answer)
    return f"{opening}{middle}### {answer_heading}:\n{{{answer}}}"


def recognise_template(columns: Columns, settings: DataSettings, encoder: TextEncoder, pair: Pair | None) -> Recognised:
    """Rows under the template that --template gives.

    Raises:
        UsageError: It is malformed, or names no column of the data.
    """
    train_on = settings.train_on or "completion"
    prompt, answer = _columns_of(columns, settings, pair)
    template = read_template(str(settings.template))
    fields = PromptTemplate.fields_of(template)
    for name in fields:
        columns.require(name, "--template with")
    if not fields:
        raise UsageError(f"The template {template!r} has no {{column}} field.", f"The data has {columns.listed}.")
    answer = answer if answer in fields else fields[-1]
    prompts = [name for name in fields if name != answer]
    formatting = Formatting(
        format="prompt",
        prompt_column=prompt if prompt in prompts else next(iter(prompts), None),
        completion_column=answer,
        template=template,
    )
    PromptTemplate(template, answer, encoder)  # complains of what is wrong with it
    nested = [name for name in fields if not columns.is_text(name) and columns.holds(name, _holds_text)]
    sentence = f"rows under the template {template!r}, completion in {answer!r}, {describe_trained(train_on)}"
    rules = RowRules(answers=answer if answer in nested else None)
    answers = [value for value in columns.values(answer) if isinstance(value, str)]
    remarks = (*name_marks_of_template(template, encoder), *remark_letters(answers, encoder, "answers"))
    return Recognised(formatting, train_on, sentence, remarks, tuple(fields), rules)


def read_template(given: str) -> str:
    r"""A --template: the content of a file of that name, or the text itself with \n and \t for line ends and tabs."""
    path = Path(given)
    if "\n" not in given and len(given) < 256 and path.is_file():
        return path.read_text(encoding="utf-8").removesuffix("\n")
    return given.replace("\\n", "\n").replace("\\t", "\t")
