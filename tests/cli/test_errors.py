"""Every failure is one sentence, a hint and its exit code; a traceback only where it was asked for."""

import errno
import json
import subprocess
import sys

import pytest

from qlora_cli.errors import DataError, DiskFull, DoesNotFit, Interrupted, ModelError, UsageError, first_line
from tests.cli.conftest import Answer


def test_a_reason_is_told_without_the_number_that_the_system_gives_it():
    refused = OSError(errno.EROFS, "Read-only file system", "/cache")
    assert first_line(refused) == "Read-only file system: '/cache'"
    assert first_line(ValueError(f"no answer ({refused})")) == "no answer (Read-only file system: '/cache')"


def failing(error):
    def command(*_):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("Row 3 of x.jsonl holds no text.", "Name another column with --text-column."), 1),
        (ModelError("There is no model x."), 1),
        (UsageError("Both were given."), 2),
        (DoesNotFit("31 GiB are needed.", "Try --batch-size 1."), 3),
        (DiskFull("The disk is full."), 74),
        (Interrupted("Stopped after step 3.", 2), 130),
        (Interrupted("Stopped after step 3.", 15), 143),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 74),
        (KeyError("position"), 1),
    ],
)
def test_exit_code_and_sentence(run_with, capsys, error, code):
    assert run_with(["train"], failing(error)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and "Traceback" not in err
    hint = getattr(error, "hint", None)
    if hint:
        assert err.splitlines()[1] == f"→ {hint}"


def test_the_unexpected_is_named_and_points_to_debug(run_with, capsys):
    run_with(["train"], failing(ZeroDivisionError("division\nby zero")))
    assert capsys.readouterr().err.splitlines() == [
        "error: Unexpected ZeroDivisionError: division by zero",
        "→ Run again with --debug for the traceback.",
    ]


def test_debug_shows_the_traceback(run_with, capsys):
    assert run_with(["train", "--debug"], failing(DataError("No rows."))) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.rstrip().endswith("error: No rows.")


def test_an_interrupt_is_130(run_with, capsys):
    assert run_with(["train"], failing(KeyboardInterrupt())) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_json_errors_are_one_object(run_with, capsys):
    assert run_with(["train", "--json"], failing(DataError("No rows.", "Look at x."))) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "No rows.", "hint": "Look at x.", "exit_code": 1}
    assert "error: No rows." in err


def test_what_does_not_fit_is_printed_and_exits_3(run_with, capsys):
    assert run_with(["inspect", "--json"], lambda *_: {"kind": "model", "fits": False}) == 3
    assert json.loads(capsys.readouterr().out) == {"kind": "model", "fits": False}
    assert run_with(["inspect"], lambda *_: {"kind": "model", "fits": True}) == 0


def test_a_closed_pipe_is_quiet():
    script = "from qlora_cli.cli.app import main; import sys; sys.exit(main(['train', '--help']))"
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{script}" | head -1'], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("Usage: qlora train")


def test_libraries_stay_silent_and_off_stdout_unless_debug(run_with, capsys):
    def noisy(*_):
        import logging
        import warnings

        print("printed")
        logging.getLogger("bitsandbytes.cextension").warning("logged")
        warnings.warn("warned", UserWarning, stacklevel=1)
        return Answer({"steps": 3})

    assert run_with(["train", "--json"], noisy) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"steps": 3}
    assert "logged" not in err and "warned" not in err

    with pytest.warns(UserWarning, match="warned"):
        run_with(["train", "--debug"], noisy)
    assert "printed" in capsys.readouterr().out
