"""What is drawn: units, plain lines, the live view, rows, results; and which stream it goes to."""

import io
import itertools
import json
import math
import os
import sys

import pexpect
import pytest
from rich.console import Console as RichConsole

from qlora_cli.cli.console import Console, to_json
from qlora_cli.cli.line_view import LineView
from qlora_cli.cli.live_view import LiveView
from qlora_cli.cli.results import draw_result, draw_row, draw_tables
from qlora_cli.cli.screens.curve import chart, sparkline
from qlora_cli.cli.units import format_duration, format_value
from qlora_cli.events import (
    Caution,
    CheckpointSaved,
    EvaluationLogged,
    Notice,
    Progress,
    RowShown,
    RunStarted,
    StepLogged,
    TextGenerated,
    Vram,
)
from tests.cli.conftest import Answer

GIB = 2**30


def step(number, total=20, loss=1.5, vram=None):
    return StepLogged(number, total, number / total, loss, 2e-4, 0.7, 4096, 0.3, 14233.4, vram)


@pytest.mark.parametrize(("seconds", "text"), [(3, "0:03"), (760, "12:40"), (3723, "1:02:03"), (90061, "1 d 1:01:01")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("peak_vram_bytes", 6 * GIB, "6.00 GiB"),
        ("trainable_percent", 0.0421, "0.0421 %"),
        ("seconds", 3.21, "3.2 s"),
        ("total_parameters", 8650752, "8,650,752"),
        ("loss", 1.2345678, "1.2346"),
        ("loss", math.nan, "nan"),
        ("seed", 1234, "1234"),
        ("best", None, "–"),
        ("tokens_per_second", 14233.4, "14,233"),
        ("weights_sha256", "0123456789abcdef" * 4, "0123456789ab…"),
        ("fits", True, "yes"),
        ("targets", ["q", "v"], "q, v"),
    ],
)
def test_a_value_is_drawn_by_the_unit_in_its_key(key, value, text):
    assert format_value(key, value) == text


def lines_of(*events, seconds=()):
    """Lines that the plain view writes of events that come at these seconds, or all at once."""
    stream = io.StringIO()
    view = LineView(stream, clock=itertools.chain(seconds, itertools.repeat(0)).__next__)
    for event in events:
        view.show(event)
    return stream.getvalue().splitlines()


def test_a_short_run_prints_every_step_and_a_long_one_about_fifty():
    assert len(lines_of(*(step(n, 20) for n in range(1, 21)))) == 20
    lines = lines_of(*(step(n, 5000) for n in range(1, 5001)))
    assert 50 <= len(lines) <= 52
    assert lines[0].startswith("step 1/5000") and lines[-1].startswith("step 5000/5000")


def test_a_step_line_holds_every_figure():
    (line,) = lines_of(step(1, vram=Vram(5 * GIB, 6 * GIB, 140 * GIB)))
    for part in ("loss 1.5000", "14,233 tokens/s", "learning rate 2.00e-04", "5.00 GiB now, 6.00 GiB peak of 140 GiB"):
        assert part in line
    assert "VRAM" not in lines_of(step(1))[0]


def test_other_events_are_one_line_each():
    assert lines_of(
        Notice("The text column is quote."),
        Caution("Odd."),
        RunStarted(1, 20, 100, 10_000, "cpu", "plain"),
        RunStarted(21, 20, 100, 10_000, "cpu", "plain"),
        EvaluationLogged(5, 2.0, 7.389),
        CheckpointSaved(5, "out/checkpoints/5", 35 * 2**20, 0.31),
    ) == [
        "The text column is quote.",
        "warning: Odd.",
        "Training 100 of 10,000 parameters (1 %) on cpu, steps 1 to 20; engine: plain.",
        "All 20 steps are done already.",
        "step 5: evaluation loss 2.0000, perplexity 7.39",
        "step 5: checkpoint out/checkpoints/5 (35.0 MiB, 0.3 s)",
    ]


def test_the_time_left_leaves_out_the_first_step():
    lines = lines_of(RunStarted(5, 20, 1, 10, "cpu", "plain"), *(step(n) for n in (5, 10, 20)), seconds=[100, 110, 130])
    assert "ETA" not in lines[1] and lines[2].endswith("ETA 0:20") and "ETA" not in lines[3]


def test_quick_progress_writes_nothing_and_slow_progress_a_line():
    assert lines_of(*(Progress("Reading", n * 100, 300) for n in range(4)), seconds=[0, 4, 10, 15]) == [
        "Reading: 200 rows of 300 (67 %), 20 rows/s, ETA 0:05",
        "Reading: 300 rows in 15.0 s",
    ]
    assert lines_of(Progress("Reading", 0, 3), Progress("Reading", 3, 3), seconds=[0, 0.5]) == []


def screen(width, *events):
    """The last frame of the live view after these events, as text."""
    console = RichConsole(file=io.StringIO(), width=width, height=40, force_terminal=True, _environ={})
    view = LiveView(console)
    for event in events:
        view.show(event)
    with console.capture() as captured:
        console.print(view)
    view.close()
    return captured.get()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_live_view_shows_every_figure_and_keeps_to_the_width(width):
    shown = screen(
        width,
        *(step(n, 40, loss=3 - n / 20, vram=Vram(5 * GIB, 6 * GIB, 140 * GIB)) for n in range(1, 31)),
        EvaluationLogged(20, 2.0, 7.389),
        CheckpointSaved(20, "out/checkpoints/step-20", 1, 0.1),
    )
    plain = "".join(piece.partition("m")[2] for piece in ("m" + shown).split("\x1b["))
    for part in (
        "step 30 of 40",
        "1.5000",
        "14,233",
        "2.00e-04",
        "5.00 GiB",
        "6.00 GiB",
        "140 GiB",
        "7.39",
        "ETA",
        "█",
    ):
        assert part in plain
    assert max(len(line) for line in plain.splitlines()) <= width


def test_the_live_view_shows_a_task_only_while_it_lasts():
    half = Progress("Downloading", GIB, 2 * GIB, "bytes")
    assert "Downloading" in screen(80, half) and "1.00 GiB" in screen(80, half)
    assert "Downloading" not in screen(80, half, Progress("Downloading", 2 * GIB, 2 * GIB, "bytes"))


def test_a_narrower_terminal_keeps_no_piece_of_the_last_frame():
    stream = io.StringIO()
    console = RichConsole(file=stream, width=100, height=40, force_terminal=True, _environ={})
    view = LiveView(console)
    view.show(step(1))
    view.show(Notice("A fact."))
    drawn = stream.getvalue().partition("A fact.")[2].count("\n")
    stream.truncate(0)
    console.width = 40  # where each line of 100 columns takes three
    view.show(Notice("Another."))
    back = stream.getvalue().partition("Another.")[0]
    view.close()
    assert back.count("\x1b[1A") == 3 * drawn - 1 > drawn


def test_sparkline_falls_with_the_loss():
    assert sparkline([4, 3, 2, 1], 4) == "█▆▃▁"
    assert sparkline(list(range(100)), 10) == "▁▂▃▃▄▅▆▆▇█"
    assert sparkline([1.0], 10) == "▁" and sparkline([], 10) == ""


def test_a_chart_has_an_axis_and_fits_its_width():
    lines = chart([4.0, 3.0, 2.0, 1.0], 40, 2)
    assert lines == ["4.000 █▃  ", "1.000 ██▆▁"]
    assert chart([2.5], 40, 2) == ["2.500  ", "2.500 ▁"] and chart([], 40, 2) == []
    assert max(map(len, chart([float(n) for n in range(1000)], 40, 5))) == 40


ROW = RowShown(0, (("Why?\n", False), ("Because", True), (".", True), ("<|endoftext|>", True)), 9, 3)


def drawn_row(**options):
    stream = io.StringIO()
    draw_row(RichConsole(file=stream, width=80, _environ={}, **options), ROW)
    return stream.getvalue()


def test_a_row_marks_what_is_trained_with_and_without_colour():
    assert drawn_row() == "Row 0: 9 tokens, 3 trained\nWhy?\n⟦Because.<|endoftext|>⟧\n\n"
    coloured = drawn_row(force_terminal=True, color_system="truecolor")
    assert "\x1b[2mWhy?↵" in coloured and "\x1b[1;32mBecause.<|endoftext|>\x1b[0m" in coloured


def test_a_long_row_is_shown_within_its_lines_and_says_what_it_leaves_out():
    turns = [("<|user|>" + "Why? " * 300 + "\n" * 9, False), ("Because. " * 200, True)] * 20
    for most_lines in (3, 6, 12):
        stream = io.StringIO()
        row = RowShown(4, tuple(turns), 9000, 3000, "record 5: turns from 'messages'", most_lines)
        draw_row(RichConsole(file=stream, width=80, _environ={}), row)
        head, *lines = stream.getvalue().splitlines()
        assert head == "Row 4: 9,000 tokens, 3,000 trained; record 5: turns from 'messages'"
        assert sum(1 + len(line) // 80 for line in lines if line) <= max(most_lines, 6)
        assert "letters …" in stream.getvalue() and " … " in stream.getvalue()


def test_a_result_is_facts_and_tables():
    stream = io.StringIO()
    table = {"title": "By module", "columns": ["module", "base_bytes"], "rows": [["query_key_value", 3 * GIB]]}
    facts = {"total_parameters": 1234567, "best": {"loss": 1.5, "step": None}, "template": "[INST] {prompt} [/INST]"}
    draw_result(RichConsole(file=stream, width=80), {"kind": "base_model", **facts, "tables": [table]})
    lines = stream.getvalue().splitlines()
    assert lines[:5] == [
        "base model",
        "total parameters  1,234,567",
        "best",
        "  loss            1.5",
        "template          [INST] {prompt} [/INST]",
    ]
    for part in ("By module", "query_key_value", "3.00 GiB"):
        assert any(part in line for line in lines[5:])
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [30, 60, 80])
def test_a_number_in_a_table_is_never_broken(width):
    stream = io.StringIO()
    rows = [["post_attention_layernorm", "FourBitQwen3MoeExperts, nf4", 28_991_029_248, 13 * GIB]]
    table = {"title": None, "columns": ["module", "kind", "parameters", "held_bytes"], "rows": rows}
    draw_tables(RichConsole(file=stream, width=width), [table])
    assert "28,991,029,248" in stream.getvalue() and "13.0 GiB" in stream.getvalue()


def test_json_has_null_where_a_number_is_not_finite():
    assert json.loads(to_json({"loss": math.nan, "rows": [math.inf, 1]})) == {"loss": None, "rows": [None, 1]}


def chatty(config, *rest):
    report = rest[-1]
    report(Notice("loading"))
    report(ROW)
    report(TextGenerated("Hello"))
    report(TextGenerated(" there", final=True))
    return Answer({"text": "Hello there"})


def test_generated_text_alone_goes_to_stdout(run_with, capsys):
    def only_text(config, prompts, report):
        report(Notice(f"prompt {prompts[0]}"))
        report(TextGenerated("Hello"))
        report(TextGenerated(" there", final=True))
        return Answer({"text": "Hello there"})

    assert run_with(["generate", "hi"], only_text) == 0
    assert capsys.readouterr() == ("Hello there\n", "prompt hi\n")


def test_with_json_stdout_holds_one_object(run_with, capsys):
    assert run_with(["generate", "hi", "--json"], chatty) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"text": "Hello there"}
    assert "Row 0" in err


def test_only_the_first_rank_talks(run_with, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_with(["generate", "hi", "--json"], chatty) == 0
    assert capsys.readouterr() == ("", "")


def test_the_prompt_comes_from_stdin(run_with, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("from\na pipe\n"))
    run_with(["generate", "-"], lambda config, prompts, report: seen.extend(prompts) or Answer())
    assert seen == ["from\na pipe"]  # the last newline is the shell's


REHEARSAL = """
from qlora_cli.cli.console import Console
from qlora_cli.events import Notice
with Console(as_json=False) as console:
    console.report(Notice("a fact"))
    print("got", repr(console.read_line("you> ")))
"""


@pytest.mark.parametrize(("no_color", "marks"), [("", "• "), ("1", "")])
def test_a_terminal_gets_the_live_view_unless_no_color_is_set(no_color, marks):
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm-256color"}
    child = pexpect.spawn(sys.executable, ["-c", REHEARSAL], env=environment, encoding="utf-8", timeout=None)
    child.expect("a fact")
    assert ("•" in child.before) == bool(marks)
    assert ("\x1b[" in child.before) == bool(marks)
    child.expect("you> ")
    child.sendline("helo\x1b[Dl")  # the left arrow moves the cursor: lines are edited
    child.expect("got 'hello'")
    child.close()


HALF_AN_ANSWER = """
from qlora_cli.cli.console import Console, show_error
from qlora_cli.errors import QloraError
from qlora_cli.events import TextGenerated
with Console(as_json=False) as console:
    console.report(TextGenerated("half an ans"))
show_error(QloraError("It broke."), as_json=False)
"""


def test_what_ends_an_answer_is_told_on_a_line_of_its_own():
    environment = {**os.environ, "NO_COLOR": "1"}
    child = pexpect.spawn(sys.executable, ["-c", HALF_AN_ANSWER], env=environment, encoding="utf-8", timeout=None)
    child.expect(pexpect.EOF)
    child.close()
    assert child.before.splitlines() == ["half an ans", "error: It broke."]


def test_commands_to_type_are_printed_in_one_piece_beside_the_result(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    command = "qlora train --model org/model --data DATA --gradient-checkpointing on --max-length 512"
    with Console(as_json=False) as console:
        console.show_result({"kind": "model", "fits": False, "next": [command]})
    streams = capsys.readouterr()
    assert f"→ {command}\n" in streams.err and "qlora" not in streams.out
    with Console(as_json=True) as console:
        console.show_result({"kind": "model", "next": [command]})
    streams = capsys.readouterr()
    assert json.loads(streams.out)["next"] == [command] and not streams.err


def test_the_merge_to_type_next_goes_where_nothing_stands(run_with, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("merged", "merged-2", "merged-3"):
        assert run_with(["train", "--model", "m", "--data", "d"], lambda config, report: Answer()) == 0
        assert f"→ qlora merge --adapter out --output {name}\n" in capsys.readouterr().err
        (tmp_path / name).mkdir()
