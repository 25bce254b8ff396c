"""Lock on a directory: one process at a time, released however the holder ends."""

import os
import signal
import subprocess
import sys

import pytest

from qlora_cli.core.storage.lock import locked
from qlora_cli.errors import RunError

HOLDER = """
import sys, time
from pathlib import Path
from qlora_cli.core.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


def test_a_directory_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path):
    directory = tmp_path / "made" / "here"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(directory)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        match = rf"\({holder.pid}\) is writing to the-output\."
        with pytest.raises(RunError, match=match) as caught, locked(directory, output="the-output"):
            pytest.fail("two processes hold it")
        assert "--output" in caught.value.hint
        os.kill(holder.pid, signal.SIGKILL)
    with locked(directory):
        pass
    with locked(directory):
        pass


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), locked(tmp_path / "file" / "below"):
        pass
