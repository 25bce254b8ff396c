"""The whole road on a small model: base → answers → train → answers → inspect → merge → the same answers.

    make demo

All of it happens in demo/, on the CPU and without the network: the base is built here (see demo_base.py), the rows
are examples/data/python_questions.jsonl. It fails if training did not teach the answers, or if the merged model
answers otherwise than base and adapter.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = Path("examples/data/python_questions.jsonl")
QUESTIONS = ["What does len() return?", "What does KeyError mean?", "What does the json module do?"]
BOLD, DIM, PLAIN = (
    ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("",) * 3
)


def say(heading: str, text: str) -> None:
    """A heading and a sentence."""
    print(f"\n{BOLD}━━ {heading} {'━' * max(0, 74 - len(heading))}{PLAIN}\n{text}\n", flush=True)


def qlora(line: str) -> None:
    """Runs one command of the program as a user types it."""
    print(f"{DIM}$ qlora {line}{PLAIN}", flush=True)
    done = subprocess.run([sys.executable, "-m", "qlora_cli", *shlex.split(line)], cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"qlora {line.split()[0]} ended with exit code {done.returncode}")


def ask(source: str, name: str) -> list[str]:
    """The greedy answers of a model to the questions, printed beside them."""
    answers = ROOT / "demo" / f"{name}.jsonl"
    answers.unlink(missing_ok=True)
    line = f"generate {source} --input demo/questions.jsonl --output demo/{name}.jsonl --temperature 0"
    qlora(f"{line} --max-new-tokens 40")
    return show([json.loads(row)["answer"] for row in answers.read_text(encoding="utf-8").splitlines()])


def show(answers: list[str]) -> list[str]:
    """Prints each question with its answer."""
    for question, text in zip(QUESTIONS, answers, strict=True):
        print(f"  {BOLD}{question}{PLAIN}\n    {' '.join(text.split())}", flush=True)
    return [text.strip() for text in answers]


def main() -> None:
    """Walks the road; exits with a sentence where it does not hold."""
    started = time.monotonic()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small are slower on two threads
    os.environ.setdefault("QLORA_CACHE", str(ROOT / "demo" / "cache"))
    (ROOT / "demo").mkdir(exist_ok=True)
    (ROOT / "demo" / "questions.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))

    say("A base model", "A small llama and its tokenizer, trained here on the help topics that ship with Python.")
    if (ROOT / "demo" / "base" / "model.safetensors").is_file():
        print("demo/base is there already.", flush=True)
    else:
        quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        subprocess.run([sys.executable, "examples/demo_base.py", "demo/base"], cwd=ROOT, env=quiet, check=True)

    say("Before", "It has read about Python, but never a question.")
    before = ask("--model demo/base", "before")

    say("Training", f"An adapter on its 4-bit weights, with the questions and answers of {ROWS}.")
    qlora(
        f"train --model demo/base --data {ROWS} --template 'Q: {{question}} A: {{answer}}' --output demo/run "
        "--overwrite --rank 64 --alpha 64 --epochs 25 --batch-size 16 --gradient-accumulation-steps 1 "
        "--learning-rate 6e-3"
    )
    say("After", "The same questions, the same base, with the adapter.")
    after = ask("--adapter demo/run", "after")

    say("What came of it", "Read from the run's directory.")
    qlora("inspect --adapter demo/run")

    say("Merging", "Base and adapter become one plain transformers checkpoint.")
    qlora("merge --adapter demo/run --output demo/merged --overwrite")
    merged = ask("--model demo/merged", "merged")

    rows = map(json.loads, (ROOT / ROWS).read_text(encoding="utf-8").splitlines())
    taught = {row["question"]: row["answer"] for row in rows}
    learned = sum(text == taught[question] for question, text in zip(QUESTIONS, after, strict=True))
    if before == after or learned < len(QUESTIONS) - 1:
        sys.exit(f"Training taught {learned} of {len(QUESTIONS)} answers.")
    if merged != after:
        sys.exit(f"The merged model answers otherwise: {merged} instead of {after}")
    say("Done", f"The merged model gives the same answers, in {time.monotonic() - started:.0f} s from start to end.")


if __name__ == "__main__":
    main()
