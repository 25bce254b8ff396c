"""`qlora generate`: answers to prompts, streamed; to a file of prompts, written to a file; or a conversation."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.config import GenerateConfig
from qlora_cli.core.adapters.adapter_record import AdapterRecord, find_adapter, read_adapter_record, read_merge_record
from qlora_cli.core.generation.batch_file import AnswerFile, fingerprint, read_prompts
from qlora_cli.core.generation.chat import Conversation, read_question, run_line
from qlora_cli.core.generation.requests import ENDED, LENGTH, Request
from qlora_cli.core.generation.session import UNQUANTIZED, GenerationSession
from qlora_cli.core.models.files import ModelFiles, resolve_model
from qlora_cli.core.prompts.formatting import parse_template_settings
from qlora_cli.core.runs.validate import check, report_idle
from qlora_cli.core.storage.content_digest import content_digests
from qlora_cli.core.storage.ownership import may_write_file
from qlora_cli.errors import DataError, QloraError
from qlora_cli.events import Caution, Notice, Progress, Report, TextGenerated
from qlora_cli.interrupts import take_signal
from qlora_cli.settings.ranges import parse_rope_scaling
from qlora_cli.sizes import format_count


@dataclass(frozen=True)
class GenerateResult:
    """What was answered, and how fast.

    Attributes:
        path: How the model was decoded.
        answers: Each with prompt, answer, finish, prompt_tokens and new_tokens; empty when they went to a file.
        output: The file of answers.
        load_seconds: From the start of the command to a loaded model.
        first_token_seconds: From a loaded model to the first piece of text; None without any.
        generate_seconds: From a loaded model to the last token.
    """

    model: str
    adapter: str | None
    path: str | None
    seed: int
    answers: list[dict[str, Any]]
    output: str | None
    answered: int
    prompt_tokens: int
    new_tokens: int
    load_seconds: float
    first_token_seconds: float | None
    generate_seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def generate(config: GenerateConfig, prompts: Sequence[str], report: Report) -> GenerateResult:
    """Answers prompts, or a file of them.

    Args:
        config: The settings; `input` and `output` for a file.
        prompts: Texts to answer when there is no `input`.
        report: Receives the answers' text as it comes, progress and notices.

    Raises:
        QloraError: In one sentence, before the model is loaded wherever that is possible.
    """
    started = time.perf_counter()
    check(config)
    if config.input is not None and config.output is not None:
        named = [name for name in (config.input, config.adapter, config.model) if name]
        may_write_file(Path(config.output), [Path(name).expanduser() for name in named])
    config, session = open_session(config, report)
    if config.input is None or config.output is None:
        rows = answer_prompts(session, config.adapter, prompts, report)
    else:
        rows = answer_file(session, config, Path(config.input), Path(config.output), report)
    return finish(session, config, config.adapter, rows, started, report)


def converse(config: GenerateConfig, report: Report, read_line: Callable[[str], str | None]) -> GenerateResult:
    """Holds a conversation until the input ends.

    Ctrl-C (KeyboardInterrupt) stops an answer and not the conversation; a mistake is reported and the next line read.

    Args:
        config: The settings.
        report: Receives the answers' text as it comes, and what went wrong.
        read_line: Given a prompt to show, the next line; None or EOFError at the end.
    """
    started = time.perf_counter()
    check(config)
    config, session = open_session(config, report)
    conversation = Conversation(session, config.adapter, lambda piece: report(TextGenerated(piece)))
    report(Notice("Type a question, or /help. Ctrl-C stops an answer, Ctrl-D leaves."))
    if session.formatting(config.adapter).format != "chat":
        report(Notice("This model was trained on single prompts: it answers each question without those before."))
    while True:
        try:
            line = read_question(read_line)
        except EOFError:
            break
        except KeyboardInterrupt:
            take_signal()
            report(Notice("Ctrl-D or /exit leaves."))
            continue
        if line is None or line.strip() in ("/exit", "/quit"):
            break
        try:
            run_line(conversation, line.strip(), report)
        except QloraError as error:
            report(Caution(f"{error.message} {error.hint or ''}".strip()))
        except KeyboardInterrupt:
            take_signal()
            report(TextGenerated("", final=True))
    return finish(session, config, conversation.adapter, conversation.rows, started, report)


# ---------------------------------------------------------------- the model


def open_session(config: GenerateConfig, report: Report) -> tuple[GenerateConfig, GenerationSession]:
    """The settings with base and adapter decided, and a session under them.

    The base is held as in the adapter's training unless a flag says otherwise.

    Raises:
        UsageError: Neither a model nor an adapter is given, or a flag is out of range.
        AdapterError: No adapter there, or one trained on another base.
    """
    source = None
    report_idle(config, report)
    for text in config.stop or ():
        if re.search(r"\\[nrt](?![a-z])", text):
            report(Caution(f"--stop {text} holds a backslash and a letter: bash takes $'\\n' for the end of a line."))
    if config.adapter is not None:
        directory = find_adapter(Path(config.adapter), report)
        source = read_adapter_record(directory, report)
        if directory != Path(config.adapter):
            config = replace(config, adapter=str(directory))
    if config.model is not None:
        model, revision = config.model, config.model_revision
    else:
        assert source is not None  # `check`
        model, revision = source.name_base()
        revision = config.model_revision or revision
        report(Notice(f"The base is {model}, as {source.directory} recorded it."))
    rope_scaling = config.rope_scaling or (source.rope_scaling if source is not None else None)
    files = resolve_model(
        model, revision, trust_remote_code=config.trust_remote_code, rope_scaling=rope_scaling, report=report
    )
    held = choose_quantization(config, files, source, report)
    config = replace(config, model=model, model_revision=revision, rope_scaling=rope_scaling, **held)
    session = GenerationSession(config, report, files=files)
    if config.adapter is not None:
        session.source(config.adapter)
    return config, session


def choose_quantization(
    config: GenerateConfig, files: ModelFiles, source: AdapterRecord | None, report: Report
) -> dict[str, Any]:
    """`quant_type`, `double_quant` and `compute_dtype` of the base, by name."""
    trained = source.base if source is not None else None
    chosen: dict[str, Any] = {"compute_dtype": config.compute_dtype or getattr(trained, "compute_dtype", None)}
    for name in ("quant_type", "double_quant"):
        asked, recorded = getattr(config, name), getattr(trained, name, getattr(config, name))
        chosen[name] = recorded if asked == getattr(GenerateConfig, name) else asked
        if chosen[name] != recorded:
            report(Caution(f"The adapter was trained with {name} {recorded}; {asked} was asked for."))
    if source is None and chosen["quant_type"] == GenerateConfig.quant_type:
        merged, _ = read_merge_record(files.directory)
        if merged and getattr(files.config, "quantization_config", None) is None:
            # 4 bits again would lose much of what was learned; without them there is nothing to quantise twice.
            chosen |= {"quant_type": UNQUANTIZED, "double_quant": GenerateConfig.double_quant}
    return chosen


# ---------------------------------------------------------------- prompts


def answer_prompts(
    session: GenerationSession, adapter: str | None, prompts: Sequence[str], report: Report
) -> list[dict[str, Any]]:
    """Answers prompts, so many at once as a file's; returns a row for each.

    The text of the first that is not finished is reported as it comes, and what is there of the next one behind it.
    """
    requests = [session.request(index, prompt, adapter) for index, prompt in enumerate(prompts)]
    session.select(adapter)
    rows: dict[int, dict[str, Any]] = {}
    waiting: list[list[str]] = [[] for _ in prompts]
    shown = 0  # whose text is reported

    def say(index: int, piece: str) -> None:
        if index == shown:
            report(TextGenerated(piece))
        else:
            waiting[index].append(piece)

    for answer in session.answer(requests, session.end_ids(adapter), say):
        rows[answer.index] = answer.to_row(prompts[answer.index])
        while shown in rows:
            report(TextGenerated("", final=True))
            shown += 1
            for piece in waiting[shown] if shown < len(prompts) else ():
                report(TextGenerated(piece))
    return [rows[index] for index in range(len(prompts))]


def answer_file(
    session: GenerationSession, config: GenerateConfig, source: Path, target: Path, report: Report
) -> list[dict[str, Any]]:
    """Answers a file of prompts into a file, adapter by adapter, going on where an earlier call stopped.

    Returns:
        A row for each prompt answered now.
    """
    prompts = read_prompts(source)
    requests: dict[str | None, list[Request]] = {}
    for prompt in prompts:
        adapter = prompt.adapter or config.adapter
        try:
            requests.setdefault(adapter, []).append(session.request(prompt.index, prompt.prompt, adapter))
        except DataError as error:
            raise DataError(f"{source}, prompt {prompt.index + 1}: {error.message}", error.hint) from error
    rows = []
    target = may_write_file(target, [source])
    settings = settings_fingerprint(config, session.compute_dtype)
    made_by = {prompt.adapter: digest_weights(session, prompt.adapter or config.adapter) for prompt in prompts}
    with AnswerFile(target, prompts, settings, made_by, report) as answers:
        if answers.finished:
            report(Notice(f"{target} holds {len(answers.finished):,} of {len(prompts):,} answers already."))
        left = {a: [r for r in group if r.index not in answers.finished] for a, group in requests.items()}
        for adapter in sorted((a for a in left if left[a]), key=lambda a: a or ""):
            session.select(adapter)
            for answer in session.answer(left[adapter], session.end_ids(adapter)):
                prompt = prompts[answer.index]
                rows.append(answer.to_row(prompt.prompt, prompt.adapter))
                answers.write(answer.index, rows[-1])
                report(Progress("Answering", len(answers.finished), len(prompts), "prompts"))
        answers.put_in_order()
    return rows


def digest_weights(session: GenerationSession, adapter: str | None) -> tuple[str, float]:
    """Digest of an adapter's files, and of a base that lies in a directory of the user's; when they last changed."""
    place = session.source(adapter).directory if adapter else Path()
    paths = [place / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)] if adapter else []
    facts, files = content_digests(paths, session.report), session.files
    if files is not None and files.commit is None:
        facts.append(files.weights_sha256)
        paths += files.weights.glob("*.safetensors")
    return fingerprint(*facts), max((path.stat().st_mtime for path in paths), default=0.0)


def settings_fingerprint(config: GenerateConfig, compute_dtype: torch.dtype) -> str:
    """Stands for all that decides an answer beside its prompt; what does not is None, as in files written before.

    Args:
        config: As decided by `open_session`: model and revision as typed, or as the adapter's run recorded them.
        compute_dtype: Of the base.
    """
    base: dict[str, Any] = {
        "model": config.model,
        "revision": config.model_revision,
        "quant_type": None if config.quant_type == UNQUANTIZED else config.quant_type,
        "double_quant": config.double_quant,
        "compute_dtype": compute_dtype,
        "trust_remote_code": config.trust_remote_code,
        "device": None,
        "cache": None,
    }
    if config.rope_scaling is not None:
        base["rope_scaling"] = parse_rope_scaling(config.rope_scaling)
    if config.template_setting:  # decides prompts, of which the file knows what was typed
        base["template_setting"] = parse_template_settings(config.template_setting)
    sampling = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
    answers = {
        "sampling": {name: getattr(config, name) for name in sampling},
        "seed": config.seed,
        "max_new_tokens": config.max_new_tokens,
        "stop": config.stop or (),
        "raw": config.raw,
        "batch_size": None,
        "engine": None,
    }
    return fingerprint(base, answers, config.adapter)


# ---------------------------------------------------------------- the result


def finish(
    session: GenerationSession,
    config: GenerateConfig,
    adapter: str | None,
    rows: list[dict[str, Any]],
    started: float,
    report: Report,
) -> GenerateResult:
    """The result of the rows answered now, and what is reported of it."""
    assert config.model is not None
    now = time.perf_counter()
    loaded = session.loaded_at or now
    new_tokens = sum(row["new_tokens"] for row in rows)
    result = GenerateResult(
        model=config.model,
        adapter=adapter,
        path=session.path,
        seed=session.seed,
        answers=[] if config.output else rows,
        output=config.output,
        answered=len(rows),
        prompt_tokens=sum(row["prompt_tokens"] for row in rows),
        new_tokens=new_tokens,
        load_seconds=loaded - started,
        first_token_seconds=None if session.first_text_at is None else session.first_text_at - loaded,
        generate_seconds=now - loaded,
        tokens_per_second=new_tokens / (now - loaded) if now > loaded else 0.0,
    )
    if empty := sum(row["finish"] == ENDED and not row["answer"] for row in rows):
        verb = "is" if empty == 1 else "are"
        report(Notice(f"{format_count(empty, 'answer')} {verb} empty: the model ended before it said anything."))
    cut = [row for row in rows if row["finish"] == LENGTH]
    by_context = [row for row in cut if row["new_tokens"] < config.max_new_tokens]
    if by_context:
        report(Notice(f"{format_count(len(by_context), 'answer')} ended where the model's context ends, unfinished."))
    if len(cut) > len(by_context) and config.max_new_tokens == GenerateConfig.max_new_tokens:
        count = format_count(len(cut) - len(by_context), "answer")
        report(Notice(f"{count} ended unfinished after {config.max_new_tokens} tokens; --max-new-tokens allows more."))
    speed = f"{result.new_tokens:,} tokens, {result.tokens_per_second:,.0f} a second"
    if config.output is not None and rows:
        report(Notice(f"{config.output} holds the answers: {speed}."))
    if config.verbose:
        report(Notice(f"Decoded by {result.path}: {speed}."))
    return result
