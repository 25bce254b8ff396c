"""Events that a command reports while it works; what becomes of them is up to the `Report` that receives them."""

from collections.abc import Callable

from qlora_cli.frozen import frozen


@frozen
class Vram:
    """Memory of one CUDA device, in bytes: allocated now, the highest since the start, and the card's total."""

    now_bytes: int
    peak_bytes: int
    total_bytes: int


@frozen
class Event:
    """Base of every event."""


@frozen
class Notice(Event):
    """A decision or fact the user should read once, as one sentence."""

    text: str


@frozen
class Caution(Event):
    """Something that is probably not what the user wants, though the work goes on."""

    text: str


@frozen
class Progress(Event):
    """`done` of `total` units of a task; total None while it is unknown. The task ends when they are equal."""

    task: str
    done: int
    total: int | None
    unit: str = "rows"  # "bytes" is drawn as GiB


@frozen
class RunStarted(Event):
    """Training begins (or goes on) at `first_step` of `total_steps`."""

    first_step: int
    total_steps: int
    trainable_parameters: int
    total_parameters: int
    device: str
    engine: str  # one line: which fast paths are in use


@frozen
class StepLogged(Event):
    """One optimizer step. `loss` is nats per trained token; `tokens` are real tokens, no padding."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    step_seconds: float
    tokens_per_second: float
    vram: Vram | None  # of the main rank's card; None on CPU
    cards: tuple[Vram, ...] = ()  # of every card, by rank


@frozen
class EvaluationLogged(Event):
    """Held-out loss in nats per trained token, and its exponential."""

    step: int
    eval_loss: float
    perplexity: float


@frozen
class SampleAnswered(Event):
    """What the model answers to a sample prompt after `step` steps of its training; 0 before them."""

    step: int
    prompt: str
    answer: str


@frozen
class CheckpointSaved(Event):
    """A verified checkpoint stands at `path`."""

    step: int
    path: str
    total_bytes: int
    seconds: float


@frozen
class RowShown(Event):
    """One prepared row to be shown: pieces of text, each with whether it is trained on.

    Attributes:
        origin: Where its turns come from, in words.
        most_lines: Lines that it may take on the screen; None for all of it.
        sources: For each piece the messages (number and role) or columns that begin in it; empty where that is not known.
        left_out: What the chat template leaves out of its record.
    """

    index: int
    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    trained_tokens: int
    origin: str = ""
    most_lines: int | None = None
    sources: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@frozen
class TextGenerated(Event):
    """A piece of the answer, in order; `final` closes one answer."""

    text: str
    final: bool = False


Report = Callable[[Event], None]


def report_nothing(event: Event) -> None:
    """The report of whoever has no reader, such as a rank that is not the main one."""
