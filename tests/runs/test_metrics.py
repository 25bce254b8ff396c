"""metrics.jsonl: each line at once, none twice, a torn one mended; and the picture of the loss."""

import errno
import io
import json
import math
import shutil
import threading

import pytest

from qlora_cli.artifacts import LOSS_CURVE, METRICS, read_metrics
from qlora_cli.core.runs import tracking
from qlora_cli.core.runs.metrics import MetricsFile, as_metrics, draw_loss_curve
from qlora_cli.core.runs.tracking import logging_report
from qlora_cli.errors import RunError
from qlora_cli.events import Caution, EvaluationLogged, StepLogged, Vram


def step(number: int, loss: float = 1.0, vram: Vram | None = None) -> StepLogged:
    return StepLogged(number, 9, 0.5, loss, 1e-4, 0.1 + 0.2, 100, 0.5, 200.0, vram)


def test_a_line_is_there_as_soon_as_it_is_written_and_exact(tmp_path):
    metrics = MetricsFile(tmp_path, last_step=0)
    metrics.write(step(1, loss=0.1 + 0.7))
    (line,) = read_metrics(tmp_path)
    assert line["loss"] == 0.1 + 0.7 and line["grad_norm"] == 0.1 + 0.2 and line["peak_vram_bytes"] is None
    metrics.write(EvaluationLogged(1, 2.0, math.exp(2.0)))
    assert read_metrics(tmp_path)[1] == {"step": 1, "eval_loss": 2.0, "perplexity": math.exp(2.0)}
    metrics.close()


def test_what_is_not_finite_is_null_and_vram_is_its_peak():
    line = as_metrics(step(1, loss=math.nan, vram=Vram(5, 7, 9)))
    assert line["loss"] is None and line["peak_vram_bytes"] == 7
    assert json.loads(json.dumps(as_metrics(EvaluationLogged(1, math.nan, math.inf)), allow_nan=False)) == {
        "step": 1, "eval_loss": None, "perplexity": None,
    }  # fmt: skip


def test_going_on_removes_later_lines_and_a_torn_one(tmp_path):
    metrics = MetricsFile(tmp_path, last_step=0)
    for number in range(1, 6):
        metrics.write(step(number))
        metrics.write(EvaluationLogged(number, 1.0, 2.0))
    metrics.close()
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 3, "lo')
    metrics = MetricsFile(tmp_path, last_step=3)
    metrics.write(step(4))
    metrics.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 1, 2, 2, 3, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_a_line_that_could_not_be_written_is_written_when_that_can_be(tmp_path):
    """The state after its step may be saved meanwhile: no resumed run would write that line again."""

    class Failing(io.FileIO):
        def write(self, line):
            if failures:
                raise failures.pop()
            return super().write(line[:7])  # a part at a time

    failures = [OSError(errno.EIO, "Input/output error")]

    metrics = MetricsFile(tmp_path, last_step=0)
    metrics.write(step(1))
    metrics.stream = Failing(tmp_path / METRICS, "a+")
    with pytest.raises(RunError, match="Input/output error"):
        metrics.write(step(2))
    metrics.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_what_is_no_line_of_metrics_is_left_out(tmp_path):
    (tmp_path / METRICS).write_bytes(b'{"step": 1}\n5\n[1]\n{"loss": 1}\n{"step": "x"}\n\xff\n' + b"\0" * 9)
    MetricsFile(tmp_path, last_step=3).close()
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.fixture(scope="module", autouse=True)
def curves():
    """Drawn for each run."""


@pytest.mark.parametrize("count", [0, 1, 40])
def test_the_curve_is_a_picture_whatever_there_is_to_draw(tmp_path, count):
    metrics = MetricsFile(tmp_path, last_step=0)
    for number in range(1, count + 1):
        metrics.write(step(number, loss=math.nan if number == 7 else 1 / number))
        metrics.write(EvaluationLogged(number, 1.0, 2.0))
    metrics.close()
    draw_loss_curve(tmp_path, title="Loss of $m on a_b")
    picture = (tmp_path / LOSS_CURVE).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 2000


def test_a_run_directory_that_was_removed_is_said_at_once_and_no_line_is_lost(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    metrics = MetricsFile(output, last_step=0)
    metrics.write(step(1))
    (output / METRICS).unlink()  # the file alone is made anew
    metrics.write(step(2))
    (output / METRICS).unlink()
    (output / METRICS).write_text('{"step": 0}\n')  # or added to, where there is another
    metrics.write(step(3))
    assert [line["step"] for line in read_metrics(output)] == [0, 3]
    shutil.rmtree(output)
    with pytest.raises(RunError, match=r"out was removed") as caught:
        metrics.write(step(4))
    assert [line["step"] for line in read_metrics(output)] == [0, 3, 4] and "--resume" in caught.value.hint
    shutil.rmtree(output)
    output.mkdir()  # another run's
    (output / METRICS).write_text('{"step": 9}\n')
    with pytest.raises(RunError, match=r"replaced"):
        metrics.write(step(5))
    metrics.close()
    assert [line["step"] for line in read_metrics(output)] == [9]


class Tracker:
    """A tracker whose server is gone, now or at the end."""

    def __init__(self, finish) -> None:
        self.finish = finish


def test_a_tracker_that_fails_costs_one_caution(tmp_path, monkeypatch):
    def gone():
        raise ConnectionError("the server\nis gone")

    class Accelerator:
        def __init__(self, finish):
            self.trackers, self.log_with = [Tracker(finish)], ["tensorboard"]

        def log(self, values, step):
            if step == 2:
                gone()

        def end_training(self):
            assert not self.trackers

    events = []
    metrics = MetricsFile(tmp_path, last_step=0)
    log = logging_report(events.append, metrics, Accelerator(gone))
    for number in range(1, 5):
        log(step(number))
    assert len(read_metrics(tmp_path)) == 4
    (caution,) = [event for event in events if isinstance(event, Caution)]
    assert "failed at step 2" in caution.text and METRICS in caution.text
    for finish in (gone, threading.Event().wait):
        monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
        events.clear()
        with tracking.closing_tracker(Accelerator(finish), events.append):
            pass
        assert "could not be closed" in events[0].text and len(events) == 1
