"""Standard streams that cannot be written: nothing raises, and what was lost on the way out is in the exit code."""

import io
import os
import subprocess
import sys

import pytest

from qlora_cli.cli.streams import open_standard_descriptors

WRITE = """
import os, sys
from qlora_cli.cli.streams import UnwrittenOutput, open_standard_descriptors, tolerant_streams
open_standard_descriptors()
with tolerant_streams() as results:
    for number in range(3000):
        print("a line of a log, long enough to fill a pipe soon", file=sys.stderr)
        print("result", number)
    sys.stderr.flush()
    opened = os.open(os.devnull, os.O_RDONLY)
    results.flush()
    code = UnwrittenOutput(results.failure).exit_code if results.failure else 0
assert opened > 2, "a file got the number of a standard stream"
sys.exit(code)
"""


def run(redirections: str) -> subprocess.CompletedProcess:
    line = f'"{sys.executable}" -c "$0" {redirections}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(["bash", "-c", line, WRITE], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("redirections", "code", "results"),
    [
        ("", 0, 3000),
        ("2>&-", 0, 3000),
        ("2>/dev/full", 0, 3000),
        ("2>&1 >/dev/null | true", 0, 0),  # the reader of standard error has gone
        (">&- 2>&-", 0, 0),
        ("0<&- >&- 2>&-", 0, 0),
        (">/dev/full", 74, 0),
        ("2>/dev/null | head -1", 141, 1),
    ],
)
def test_a_stream_that_cannot_be_written_never_ends_the_work(redirections, code, results):
    done = run(redirections)
    assert (done.returncode, len(done.stdout.splitlines())) == (code, results), done.stderr[-300:]


def test_a_full_pipe_that_does_not_block_costs_lines_and_no_more():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    done = subprocess.run([sys.executable, "-c", WRITE], stderr=writing, stdout=subprocess.PIPE, text=True)
    os.close(writing)
    os.close(reading)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3000


def test_what_is_read_and_is_no_utf_8_comes_as_in_arguments(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff"), encoding="utf-8"))
    open_standard_descriptors()
    assert sys.stdin.read() == os.fsdecode(b"a \xff")
