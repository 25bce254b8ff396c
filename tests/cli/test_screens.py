"""Screens of results at 40, 80 and 120 columns: the answer first, as text that is looked at when it changes."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from qlora_cli.cli.live_view import LiveView
from qlora_cli.cli.results import draw_row
from qlora_cli.cli.screens import screen_of
from qlora_cli.cli.screens.drawing import draw_screen
from qlora_cli.cli.screens.runs import of_a_run, of_a_training
from qlora_cli.core.generation.chat import HELP
from qlora_cli.events import (
    Caution,
    CheckpointSaved,
    EvaluationLogged,
    Notice,
    RowShown,
    RunStarted,
    StepLogged,
    TextGenerated,
    Vram,
)

HERE = Path(__file__).parent
RESULTS = json.loads((HERE / "screens.json").read_text(encoding="utf-8"))
WIDTHS = (40, 80, 120)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def draw(result, width, *, verbose=False) -> str:
    """A screen as text, as on a terminal of so many columns without colour."""
    stream = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        draw_screen(stream, result, verbose=verbose, width=width)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


GIGABYTE = 10**9
CARD = Vram(5 * GIGABYTE, 7 * GIGABYTE, 80 * GIGABYTE)
STEPS = [StepLogged(n, 200, n / 100, 4 - n**0.25, 2e-4, 0.5, 4096, 0.5, 8192.0, CARD) for n in range(1, 201)]
# What is seen while a command works, before its result.
COURSES = {
    "prepare": [
        Notice("rows.jsonl: prompt in column 'question', completion in 'answer', answers trained."),
        RowShown(
            0, (("### Question:\nWhat is 3 + 4?\n\n### Answer:\n", False), ("It is 7.<|endoftext|>", True)), 28, 9, "prompt, completion", 12
        ),
    ],
    "train": [
        Notice("Loading EleutherAI/pythia-410m in 4 bits (nf4, arithmetic in bfloat16). 99.9 % of the base is in 4 bits."),
        RunStarted(1, 200, 8_650_752, 410_000_000, "cuda", "fast: 96 fused linears, packed rows, chunked loss"),
        *STEPS,
        EvaluationLogged(200, 1.4877, 4.43),
        CheckpointSaved(200, "out/checkpoints/step-00000200", 34_000_000, 0.4),
        STEPS[-1],
    ],
    "generate": [
        Notice("The base is EleutherAI/pythia-410m, as out recorded it."),
        Caution("The adapter was trained with quant_type nf4; fp4 was asked for."),
        TextGenerated("len() returns the number of items "),
        TextGenerated("of an object: of a sequence or a collection.", final=True),
    ],
    "chat": [
        Notice("Training in out has not ended: the adapter is that of its newest checkpoint, after step 120."),
        Notice("Type a question, or /help. Ctrl-C stops an answer, Ctrl-D leaves."),
        "> /help\n",
        *(Notice(f"{typed}: {meaning}") for typed, meaning in HELP),
        "> What does len() return?\n",
        TextGenerated("len() returns the number of items.", final=True),
        "> /undo\n",
        Notice("Taken back: What does len() return?"),
    ],
}  # fmt: skip


def play(course, width) -> str:
    """What a terminal of so many columns holds once these events have come; texts are lines that were typed."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, highlight=False)
    view = LiveView(console)
    for event in course:
        match event:
            case str():
                stream.write(event)
            case TextGenerated(text, final):
                stream.write(text + "\n" * final)
            case RowShown():
                draw_row(console, event)
            case _:
                view.show(event)
    view.close()
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def all_screens() -> str:
    """Every screen at every width, one after another."""
    results = [(name, width, draw(result, width)) for name, result in RESULTS.items() for width in WIDTHS]
    courses = [(f"qlora {name}", width, play(course, width)) for name, course in COURSES.items() for width in WIDTHS]
    return "\n".join(f"======== {name}, {width} columns\n{text}" for name, width, text in results + courses)


def test_screens_are_those_that_were_looked_at():
    """Write them anew, and look at them, with: python -m tests.cli.test_screens"""
    assert all_screens() == (HERE / "screens.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_screen_begins_with_a_sentence_and_fits_its_columns(name, width):
    lines = draw(RESULTS[name], width).splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(lines).startswith(screen_of(RESULTS[name]).sentences[0].split(" ")[0])
    assert len(lines) <= 30 or width < 80


@pytest.mark.parametrize("name", COURSES)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_seen_while_a_command_works_fits_its_columns(name, width):
    typed = [event.text for event in COURSES[name] if isinstance(event, TextGenerated)]  # the terminal breaks it
    lines = play(COURSES[name], width).splitlines()
    assert all(len(line) <= width or any(text in line for text in typed) for line in lines if name != "prepare")


def test_verbose_shows_every_fact():
    text = draw(RESULTS["model"], 120, verbose=True)
    assert "flops per token" in text and "activation" in text
    assert "flops per token" not in draw(RESULTS["model"], 120)


def test_a_merge_says_what_became_of_its_gguf_file():
    file = {"name": "model.gguf", "total_bytes": 3 * 2**20, "tensors_checked": 272}
    assert "model.gguf, 3.00 MiB, 272 tensors read back" in draw({**RESULTS["merge"], "gguf": file}, 120)


def test_one_is_no_plural():
    training = {"steps": 1, "total_steps": 1, "output": "out", "seconds": 1.0, "final_loss": None, "tokens": 9}
    parameters = {"trainable_parameters": 1, "total_parameters": 2, "trainable_percent": 50.0}
    assert of_a_training(training | parameters).sentences[0] == "The adapter is in out: 1 step in 1.0 s."


def test_an_adapter_of_experts_is_shown_with_them():
    experts = {"target_parameters": ["mlp.experts.down_proj"], "rank_pattern": {"down_proj": 2}}
    run = {"directory": "out", "kind": "run", "rank": 4, "alpha": 32.0, "target_modules": ["q_proj"]}
    shown = dict(of_a_run(run | experts).facts)["adapter"]
    assert shown == "rank 4, alpha 32 on q_proj, mlp.experts.down_proj · rank pattern"


def test_the_held_out_loss_of_a_run_is_that_of_the_adapter_it_kept():
    run = {"directory": "out", "kind": "run", "progress": {"steps": 4, "last_loss": 2.0, "last_eval_loss": 3.0}}
    kept = run | {"training": {"total_steps": 4, "eval_loss": 2.5}}
    assert of_a_run(kept).sentences[0].endswith("held-out loss 2.5000.")
    assert of_a_run(kept | {"kind": "checkpoint"}).sentences[0].endswith("held-out loss 3.0000.")
    assert of_a_run(run).sentences[0].endswith("held-out loss 3.0000.")


def test_what_a_card_does_not_hold_is_said_and_where_it_is():
    settings = {"streamed_layers": 4, "waiting_states": 0.5, "context_parallel": 2}
    model = RESULTS["model"]
    held = screen_of({**model, "settings": model["settings"] | settings}).sentences[2:]
    assert held == [
        "The weights of 4 layers stream from host memory as they are used.",
        "50% of the optimizer's state waits in host memory for each update.",
        "2 cards share the tokens of each row.",
    ]
    assert len(screen_of(model).sentences) == 2


if __name__ == "__main__":
    (HERE / "screens.txt").write_text(all_screens(), encoding="utf-8")
