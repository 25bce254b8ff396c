"""Memory of preparation: all its processes together, whatever a row holds and however many processes there are."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.prompts.small_tokenizers import byte_level

MOST_BYTES = 1_500_000_000
LINE_BYTES = 2**24 - 2**10  # just below what a line may be
CODE = (
    "import sys; from pathlib import Path; from transformers import AutoTokenizer\n"
    "from qlora_cli.config import PrepareConfig; from qlora_cli.core.data.prepare import prepare_rows\n"
    "config = PrepareConfig(data=sys.argv[1], template='{question} {answer}', on_bad_row='skip')\n"
    "tokenizer = AutoTokenizer.from_pretrained('tokenizer')\n"
    "made = prepare_rows(config, tokenizer, None, Path('prepared'), lambda event: None, workers=8)\n"
    "print(made.manifest['rows'], made.manifest['bad_rows'])"
)
VALUES = {  # what takes the most memory for each of its letters: parsed, as text, tokenised
    "lists": "[" + "[]," * (LINE_BYTES // 3) + "1]",
    "objects": "[" + '{"":0},' * (LINE_BYTES // 7) + "1]",
    "text": json.dumps("the fox, (sees) 123 dogs " * (LINE_BYTES // 25)),
    "wide letters": json.dumps("🙂 東 " * (LINE_BYTES // 9), ensure_ascii=False),
}
UNCUT = "wide letters"  # millions of them without a place to cut at are a bad row


def shared_out(pid: int) -> int:
    """Bytes of a process and those below it, each shared page divided among those who share it."""
    total = 0
    with suppress(OSError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        total = int(found[1]) * 1024 if found else 0
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += shared_out(int(child))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
@pytest.mark.parametrize("kind", VALUES)
def test_hostile_rows_are_prepared_within_a_bound_by_eight_processes(tmp_path, kind, ending):
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system does not say what processes share")
    byte_level().save_pretrained(tmp_path / "tokenizer")
    column = "extra" if kind in ("lists", "objects") else "answer"
    short = [json.dumps({"question": f"What is {i}?", "answer": f"It is {i + 1}."}) for i in range(12_000)]
    rest = "" if column == "answer" else '"answer": "a", '
    long = [f'{{"question": "{i}", {rest}"{column}": {VALUES[kind]}}}' for i in range(2)]
    rows = short + long + short
    text = "\n".join(rows) + "\n" if ending == ".jsonl" else "[" + ",\n".join(rows) + "]"
    (tmp_path / f"rows{ending}").write_text(text, encoding="utf-8")
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", CODE, f"rows{ending}"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, shared_out(process.pid))
        time.sleep(0.02)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said.split() == (["24000", "2"] if kind == UNCUT else ["24002", "0"])
    print(f"{kind}{ending}: {peak / 1e9:.2f} GB")
    assert 0 < peak < MOST_BYTES
