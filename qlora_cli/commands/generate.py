"""A base, maybe with adapters, and prompts in; answers out: streamed, written to a file, or as a conversation."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_cli.config import GenerateConfig, QuantizationSettings
from qlora_cli.core.decoding.sampling import Sampling
from qlora_cli.core.device import choose_device, resolve_compute_dtype
from qlora_cli.core.generation.batch_file import AnswerFile, FilePrompt, answer_row, fingerprint, read_prompts
from qlora_cli.core.generation.chat import COMMANDS, Conversation, obey
from qlora_cli.core.generation.requests import Request
from qlora_cli.core.generation.session import AnswerSettings, BaseSettings, GenerationSession
from qlora_cli.core.models.adapter_record import read_merge_record, read_source
from qlora_cli.core.models.files import resolve_model
from qlora_cli.errors import DataError, QloraError, UsageError
from qlora_cli.events import Caution, Notice, Progress, Report, TextGenerated


class Clock:
    """When the model was loaded, and when the first piece of text came."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._loaded: float | None = None
        self._first: float | None = None

    def loaded(self) -> None:
        """The model is there; only the first call counts."""
        self._loaded = self._loaded or time.perf_counter()

    def heard(self) -> None:
        """A piece of text has come; only the first call counts."""
        self._first = self._first or time.perf_counter()

    def seconds(self) -> tuple[float, float | None, float]:
        """Seconds to the loaded model, from there to the first piece of text, and from there to now."""
        now = time.perf_counter()
        loaded = self._loaded or now
        return loaded - self._began, None if self._first is None else self._first - loaded, now - loaded


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

    @classmethod
    def of(
        cls,
        session: GenerationSession,
        adapter: str | None,
        rows: list[dict[str, Any]],
        clock: Clock,
        output: str | None = None,
    ) -> "GenerateResult":
        """The result of the rows answered now."""
        load_seconds, first_token_seconds, generate_seconds = clock.seconds()
        new_tokens = sum(row["new_tokens"] for row in rows)
        return cls(
            model=session.base.files.name,
            adapter=adapter,
            path=session.path,
            seed=session.settings.seed,
            answers=[] if output else rows,
            output=output,
            answered=len(rows),
            prompt_tokens=sum(row["prompt_tokens"] for row in rows),
            new_tokens=new_tokens,
            load_seconds=load_seconds,
            first_token_seconds=first_token_seconds,
            generate_seconds=generate_seconds,
            tokens_per_second=new_tokens / generate_seconds if generate_seconds else 0.0,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)

    def describe_speed(self) -> str:
        """Tokens and their rate, for a sentence."""
        return f"{self.new_tokens:,} tokens, {self.tokens_per_second:,.0f} a second"


def generate(config: GenerateConfig, prompts: Sequence[str], report: Report) -> GenerateResult:
    """Answers prompts, or a file of them.

    Args:
        config: The settings; `input` and `output` for a file.
        prompts: Texts to answer one after another when there is no `input`.
        report: Receives the answers' text as it comes, progress and notices.

    Raises:
        QloraError: In one sentence, before the model is loaded wherever that is possible.
    """
    if (config.input is None) != (config.output is None):
        raise UsageError("--input and --output go together.", "Give both, or a prompt on the command line.")
    clock = Clock()
    session = open_session(config, report)
    if config.input is None or config.output is None:
        rows = answer_texts(session, prompts, config.adapter, clock, report)
    else:
        rows = answer_file(session, config, Path(config.input), Path(config.output), clock, report)
    result = GenerateResult.of(session, config.adapter, rows, clock, config.output)
    if config.output is not None and rows:
        report(Notice(f"{config.output} holds the answers: {result.describe_speed()}."))
    if config.verbose:
        report(Notice(f"Decoded by {result.path}: {result.describe_speed()}."))
    return result


def converse(config: GenerateConfig, report: Report, read_line: Callable[[str], str | None]) -> GenerateResult:
    """Holds a conversation until the input ends.

    Ctrl-C (KeyboardInterrupt) stops an answer and not the conversation; a mistake is told and the next line read.

    Args:
        config: The settings.
        report: Receives the answers' text as it comes, and what went wrong.
        read_line: Given a prompt to show, the next line; None or EOFError at the end.
    """
    clock = Clock()
    backend = SessionBackend(open_session(config, report), config.adapter, clock)
    conversation = Conversation(backend, lambda piece: report(TextGenerated(piece)))
    if config.verbose:
        report(Notice(f"Decoding by {backend.session.path}."))
    report(Notice(f"Type a question, or {COMMANDS}. Ctrl-C stops an answer, Ctrl-D leaves."))
    while True:
        try:
            line = read_line("> ")
        except EOFError:
            break
        except KeyboardInterrupt:
            report(Notice("Ctrl-D or /exit leaves."))
            continue
        if line is None or line.strip() in ("/exit", "/quit"):
            break
        try:
            obey(conversation, line.strip(), report)
        except QloraError as error:
            report(Caution(f"{error.message} {error.hint or ''}".strip()))
        except KeyboardInterrupt:
            report(TextGenerated("", final=True))
    return GenerateResult.of(backend.session, backend.adapter, backend.rows, clock)


class SessionBackend:
    """A `ChatBackend` of a conversation that speaks by a `GenerationSession`; keeps what was said for the result."""

    def __init__(self, session: GenerationSession, adapter: str | None, clock: Clock) -> None:
        self.session, self.adapter, self.clock = session, adapter, clock
        self.rows: list[dict[str, Any]] = []
        session.select(adapter)
        clock.loaded()

    def remembers(self) -> bool:
        """See `ChatBackend.remembers`."""
        return self.session.formatting(self.adapter).format == "chat"

    def fits(self, prompt: Any) -> bool:
        """See `ChatBackend.fits`: the answer may take at least half of what --max-new-tokens allows."""
        try:
            request = self.session.request(0, prompt, self.adapter)
        except DataError:  # no room at all; the question alone tells the user so when it is asked
            return False
        return 2 * request.max_new_tokens >= self.session.settings.max_new_tokens

    def say(self, prompt: Any, *, turn: int, base: bool, tell: Callable[[str], None]) -> None:
        """See `ChatBackend.say`."""
        request = self.session.request(turn, prompt, self.adapter)

        def hear(index: int, piece: str) -> None:
            self.clock.heard()
            tell(piece)

        for answer in self.session.answer([request], self.adapter, hear, base=base):
            self.rows.append({**answer_row(FilePrompt(turn, prompt, None), answer), "base": base})

    def switch(self, directory: str) -> None:
        """See `ChatBackend.switch`."""
        self.session.select(directory)
        self.adapter = directory


def open_session(config: GenerateConfig, report: Report) -> GenerationSession:
    """The base and settings that a configuration names; the base is held as in training unless a flag says otherwise.

    Raises:
        UsageError: Neither a model nor an adapter is given, or a flag is out of range.
        AdapterError: No adapter there, or one trained on another base.
    """
    settings = AnswerSettings(
        sampling=Sampling(config.repetition_penalty, config.temperature, config.top_k, config.top_p, config.min_p),
        seed=secrets.randbits(31) if config.seed is None else config.seed,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        stop=config.stop or (),
        raw=config.raw,
        engine=config.engine,
    )
    source = read_source(Path(config.adapter)) if config.adapter is not None else None
    if config.model is not None:
        model, revision = config.model, config.model_revision
    elif source is not None:
        model, revision = source.name_base()
        revision = config.model_revision or revision
        report(Notice(f"The base is {model}, as {source.directory} recorded it."))
    else:
        raise UsageError("generate needs a model.", "Add --adapter DIR of a run, or --model ID for the bare base.")
    trained = source.base if source is not None else None
    files = resolve_model(model, revision, trust_remote_code=config.trust_remote_code, report=report)
    held: dict[str, Any] = {}
    for name in ("quant_type", "double_quant"):
        asked, recorded = getattr(config, name), getattr(trained, name, getattr(config, name))
        held[name] = recorded if asked == getattr(GenerateConfig, name) else asked
        if held[name] != recorded:
            report(Caution(f"The adapter was trained with {name} {recorded}; {asked} was asked for."))
    if source is None and held["quant_type"] == GenerateConfig.quant_type:
        merged, _ = read_merge_record(files.directory)
        if merged and getattr(files.config, "quantization_config", None) is None:
            held["quant_type"] = None  # 4 bits again would lose much of what was learned
    device = choose_device()
    dtype = config.compute_dtype or (trained.compute_dtype if trained is not None else None)
    base = BaseSettings(
        files=files,
        quantization=QuantizationSettings(**held, base_cache=config.base_cache) if held["quant_type"] else None,
        compute_dtype=resolve_compute_dtype(dtype, device),
        device=device,
    )
    session = GenerationSession(base, settings, report)
    if config.adapter is not None:
        session.source(config.adapter)
    return session


def describe_base(base: BaseSettings) -> dict[str, Any]:
    """What of the base decides the answers, under the names that earlier files of answers have."""
    held = base.quantization or QuantizationSettings()
    return {
        "model": base.files.name,
        "revision": base.files.commit,
        "quant_type": base.quantization.quant_type if base.quantization else None,
        "double_quant": held.double_quant,
        "compute_dtype": base.compute_dtype,
        "device": None,
        "trust_remote_code": base.files.trust_remote_code,
        "cache": None,
    }


def answer_texts(
    session: GenerationSession, prompts: Sequence[str], adapter: str | None, clock: Clock, report: Report
) -> list[dict[str, Any]]:
    """Answers prompts one after another, streaming."""
    requests = [session.request(index, prompt, adapter) for index, prompt in enumerate(prompts)]
    session.select(adapter)
    clock.loaded()
    rows = []

    def tell(index: int, piece: str) -> None:
        clock.heard()
        report(TextGenerated(piece))

    for prompt, request in zip(prompts, requests, strict=True):
        for answer in session.answer([request], adapter, tell):
            rows.append(answer_row(FilePrompt(answer.index, prompt, None), answer))
        report(TextGenerated("", final=True))
    return rows


def answer_file(
    session: GenerationSession, config: GenerateConfig, source: Path, target: Path, clock: Clock, report: Report
) -> list[dict[str, Any]]:
    """Answers a file of prompts into a file, adapter by adapter, going on where an earlier call stopped."""
    prompts = read_prompts(source)
    requests: dict[str | None, list[Request]] = {}
    for prompt in prompts:
        adapter = prompt.adapter or config.adapter
        try:
            requests.setdefault(adapter, []).append(session.request(prompt.index, prompt.prompt, adapter))
        except DataError as error:
            raise DataError(f"{source}, prompt {prompt.index + 1}: {error.message}", error.hint) from error
    settings = fingerprint(
        describe_base(session.base),
        asdict(session.settings) | {"batch_size": None, "engine": None, "seed": config.seed},
        config.adapter,
    )
    rows = []
    with AnswerFile(target, prompts, settings) as answers:
        if answers.finished:
            report(Notice(f"{target} holds {len(answers.finished):,} of {len(prompts):,} answers already."))
        left = {a: [r for r in group if r.index not in answers.finished] for a, group in requests.items()}
        for adapter in sorted((a for a in left if left[a]), key=lambda a: a or ""):
            session.select(adapter)
            clock.loaded()
            for answer in session.answer(left[adapter], adapter, lambda index, piece: clock.heard()):
                rows.append(answer_row(prompts[answer.index], answer))
                answers.write(answer.index, rows[-1])
                report(Progress("Answering", len(answers.finished), len(prompts), "prompts"))
        answers.put_in_order()
    return rows
