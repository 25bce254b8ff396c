"""Held-out loss on a real model: `qlora train`, QLoRA by PEFT and by Unsloth, and LoRA on 16 bits by PEFT, on the same rows
and steps; with --answers also the greedy answers to held-out questions of GSM8K, scored.

    python examples/small_model.py /tmp/smollm2
    python benchmarks/quality.py --model /tmp/smollm2 --set gsm8k=../shared/data/gsm8k_train.jsonl --jobs 4 --out DIR

Sets: `gsm8k=FILE`, and `instructions` and `text`, which are made here of what ships with Python (docstrings as answers to
what a function does; help topics in pieces of 900 characters). Each run is a process of its own with its own time limit,
writes one JSON file, and is skipped where that file stands already. Figures: benchmarks/quality.md.
"""

import argparse
import importlib
import inspect
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

HELD_ROWS, BATCH_ROWS, ROW_TOKENS = 500, 16, 512
METHODS = ("ours", "ours-default", "peft-4bit", "peft-16bit")  # and "unsloth", where it is installed, and "ours-fp8"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ANSWER_TOKENS, ANSWERS_AT_ONCE = 320, 64
QUANTIZED = "quantized"  # of the merges: the one that is written in 4 bits again


# ---------------------------------------------------------------- rows


def write_rows(name: str, source: str | None, path: Path) -> None:
    """Writes one set as JSON Lines, its last rows those that are held out."""
    if name == "gsm8k":
        assert source, "--set gsm8k=FILE"
        rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
        rows = [{"messages": _turns(row["question"], row["answer"])} for row in rows]
    elif name == "instructions":
        rows = [{"messages": _turns(question, answer)} for question, answer in docstrings()]
    else:
        rows = [{"text": piece} for piece in help_topics()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def docstrings() -> list[tuple[str, str]]:
    """What functions and classes of the standard library do, by their docstrings."""
    found: dict[str, tuple[str, str]] = {}
    for module in sorted(sys.stdlib_module_names):
        if module.startswith("_") or module in ("antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter"):
            continue
        try:
            members = inspect.getmembers(importlib.import_module(module))
        except Exception:  # not on this platform
            continue
        for name, thing in members:
            if name.startswith("_") or not (inspect.isroutine(thing) or inspect.isclass(thing)):
                continue
            parts = [(name, thing)]
            if inspect.isclass(thing):
                parts += [(f"{name}.{part}", value) for part, value in vars(thing).items() if not part.startswith("_")]
            for label, value in parts:
                text = inspect.getdoc(value) or ""
                if 60 <= len(text) <= 1200:
                    found.setdefault(text, (f"What does {module}.{label} do in Python?", text))
    rows = sorted(found.values())
    random.Random(1).shuffle(rows)
    return rows


def help_topics() -> list[str]:
    """Python's help topics in pieces of some 900 characters; those held out are of topics of their own."""
    topics = sorted(importlib.import_module("pydoc_data.topics").topics.items())
    random.Random(1).shuffle(topics)
    pieces = []
    for _, text in topics:
        piece = ""
        for paragraph in text.split("\n\n"):
            if len(piece) + len(paragraph) > 900 and piece:
                pieces.append(piece)
                piece = ""
            piece += ("\n\n" if piece else "") + paragraph
        if len(piece) > 200:
            pieces.append(piece)
    return pieces


# ---------------------------------------------------------------- one run


def run_ours(arguments: argparse.Namespace, rows: Path, work: Path, keep: Callable[[dict], None]) -> dict:
    """Through `qlora train` and `qlora merge`; `keep` is given what there is after each."""
    from qlora_cli.commands.merge import merge
    from qlora_cli.commands.train import train
    from qlora_cli.config import MergeConfig, TrainConfig
    from qlora_cli.errors import QloraError
    from qlora_cli.events import Caution, Notice

    said: list[str] = []

    def report(event: object) -> None:
        if isinstance(event, Notice | Caution):
            said.append(event.text)

    started = time.monotonic()
    result = train(TrainConfig(**settings_of(arguments, rows), output=str(work / "run"), overwrite=True), report)
    figures = {"tuned": result.eval_loss, "peak_bytes": result.peak_vram_bytes, "seconds": time.monotonic() - started}
    record = json.loads((work / "run" / "qlora.json").read_text(encoding="utf-8"))
    figures["start"] = record.get("start")
    keep(figures)
    if arguments.answers:
        figures |= our_answers(arguments, rows, work, report)
        keep(figures)
    if arguments.merge:
        for kind in (QUANTIZED, "auto"):
            merging = MergeConfig(
                adapter=str(work / "run"),
                output=str(work / kind),
                overwrite=True,
                quantize=kind == QUANTIZED,
                min_kept=0.0,
            )
            began = time.monotonic()
            try:
                merged = merge(merging, report)
            except QloraError as error:  # a figure too
                figures[f"merge_{kind}_refused"] = error.message
                continue
            figures[f"merge_{kind}"] = {**merged.to_dict(), "output": None, "held_out": None}
            figures[f"merge_{kind}"]["whole_seconds"] = time.monotonic() - began
            figures[f"merge_{kind}"]["held_out"] = evaluate_checkpoint(work / kind, arguments, rows)
            keep(figures)
    return {**figures, "said": said}


def our_answers(arguments: argparse.Namespace, rows: Path, work: Path, report: Callable) -> dict:
    """Greedy answers by `qlora generate` to a file of questions, many at a time, scored."""
    from qlora_cli.commands.generate import generate
    from qlora_cli.config import GenerateConfig

    questions = held_questions(arguments, rows)
    asked, answered = work / "questions.jsonl", work / "answers.jsonl"
    asked.write_text("".join(json.dumps({"prompt": question}) + "\n" for question, _ in questions), encoding="utf-8")
    config = GenerateConfig(
        adapter=str(work / "run"),
        input=str(asked),
        output=str(answered),
        temperature=0.0,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=4 * ANSWERS_AT_ONCE,
    )
    result = generate(config, [], report)
    lines = [json.loads(line) for line in answered.read_text(encoding="utf-8").splitlines()]
    scored = score([line["answer"] for line in lines], questions)
    return {**scored, "answer_seconds": result.generate_seconds, "answer_tokens": result.new_tokens}


def held_questions(arguments: argparse.Namespace, rows: Path) -> list[tuple[str, str]]:
    """Held-out questions with their answers, in the order of the file."""
    trained, held, _ = read_rows(arguments, rows)
    lines = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(trained) + len(held), "a row was left out, so that rows and lines are numbered apart"
    numbers = sorted(int(held.indices[index]) for index in range(len(held)))[: arguments.answers]
    return [(lines[number][0]["content"], lines[number][1]["content"]) for number in numbers]


def score(answers: list[str], questions: list[tuple[str, str]]) -> dict[str, int]:
    """How many end in the right number, after the #### of GSM8K."""

    def final(text: str) -> str:
        return text.rpartition("####")[2].strip().replace(",", "").rstrip(".") if "####" in text else ""

    right = sum(
        bool(final(got)) and final(got) == final(wanted) for got, (_, wanted) in zip(answers, questions, strict=True)
    )
    return {"answered": len(answers), "right": right}


def settings_of(arguments: argparse.Namespace, rows: Path) -> dict:
    """Those of `qlora train`, which the other ways follow."""
    return {
        "model": arguments.model,
        "data": str(rows),
        "rank": arguments.rank,
        "alpha": 2 * arguments.rank,
        "learning_rate": arguments.learning_rate,
        "max_steps": arguments.steps,
        "batch_size": BATCH_ROWS,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 10,
        "max_length": ROW_TOKENS,
        "eval_rows": min(HELD_ROWS, arguments.held),
        "seed": arguments.seed,
        "init": "default" if arguments.method == "ours-default" else "calibrated",
        "optimizer": "adamw",
        "matmul": "fp8" if arguments.method == "ours-fp8" else "bf16",
    }


def read_rows(arguments: argparse.Namespace, rows: Path):
    """The rows as `qlora train` splits and orders them, and the sampler of its steps."""
    from qlora_cli.config import TrainConfig
    from qlora_cli.core.data.dataset import PreparedRows, split_rows
    from qlora_cli.core.data.prepare import prepare_rows
    from qlora_cli.core.data.sampler import BatchSampler
    from qlora_cli.core.distributed.process_group import ProcessGroup
    from qlora_cli.core.models.files import resolve_model

    files = resolve_model(arguments.model)
    config = TrainConfig(**settings_of(arguments, rows))
    prepared = PreparedRows(prepare_rows(config, files.tokenizer, files.config, None, lambda event: None).directory)
    trained, held = split_rows(prepared, fraction=0.0, count=config.eval_rows, seed=config.seed)
    sampler = BatchSampler(
        trained.lengths,
        batch_size=BATCH_ROWS,
        accumulation=1,
        packing=False,
        max_length=ROW_TOKENS,
        seed=config.seed,
        epochs=1.0,
        max_steps=config.max_steps,
        ranks=ProcessGroup(),
    )
    return trained, held, sampler


def loss_sum(model, batch, device):
    """Cross-entropy of the trained tokens in nats, summed, and how many there are."""
    import torch
    import torch.nn.functional as F

    ids, mask, labels = batch.to(device).padded()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    return loss, batch.trained_tokens


def evaluate(model, held, device) -> float:
    """Mean loss of the held-out rows in nats a token."""
    import torch

    from qlora_cli.core.data.packing import collate

    model.eval()
    total, tokens = 0.0, 0
    order = sorted(range(len(held)), key=lambda index: held.lengths[index])
    with torch.no_grad():
        for start in range(0, len(order), BATCH_ROWS):
            part = order[start : start + BATCH_ROWS]
            loss, count = loss_sum(model, collate([held[index] for index in part], part), device)
            total, tokens = total + float(loss), tokens + count
    model.train()
    return total / tokens


def evaluate_checkpoint(directory: Path, arguments: argparse.Namespace, rows: Path) -> float:
    """Held-out loss of a merged model as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", device_map={"": device})
    return evaluate(model, read_rows(arguments, rows)[1], device)


def peft_model(arguments: argparse.Namespace, device):
    """The base, on which its loss is measured first, and a function that puts the adapter on."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=dtype,
        device_map={"": device},
        quantization_config=four if arguments.method == "peft-4bit" else None,
    )
    lora = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    return model, lambda: get_peft_model(model, lora)


def unsloth_model(arguments: argparse.Namespace):
    """The same by Unsloth, which has to be imported before transformers is."""
    os.environ.update(UNSLOTH_RETURN_LOGITS="1", UNSLOTH_DISABLE_STATISTICS="1")
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        arguments.model, max_seq_length=ROW_TOKENS, dtype=torch.bfloat16, load_in_4bit=True
    )
    return model, lambda: FastLanguageModel.get_peft_model(
        model,
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing=False,
        random_state=arguments.seed,
        max_seq_length=ROW_TOKENS,
    )


def run_peer(arguments: argparse.Namespace, rows: Path) -> dict:
    """LoRA by PEFT or Unsloth in a plain loop, on a base in 16 bits or in bitsandbytes' 4."""
    import math

    if arguments.method == "unsloth":
        model, adapt = unsloth_model(arguments)
    import torch

    from qlora_cli.core.data.packing import collate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.method != "unsloth":
        model, adapt = peft_model(arguments, device)
    trained, held, sampler = read_rows(arguments, rows)
    figures = {}
    if arguments.method != "unsloth":  # the base in 4 bits is the same
        figures["base"] = evaluate(model, held, device)
    torch.manual_seed(arguments.seed)
    model = adapt()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.0)
    started = time.monotonic()
    for step in range(arguments.steps):
        progress = max(0.0, (step - 10) / max(1, arguments.steps - 10))
        factor = min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * factor
        indices = [index for batch in sampler.step(step + 1).micro_batches for index in batch]
        loss, count = loss_sum(model, collate([trained[index] for index in indices], indices), device)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    figures |= {"tuned": evaluate(model, held, device), "seconds": time.monotonic() - started}
    if arguments.answers and arguments.method != "unsloth":
        questions = held_questions(arguments, rows)
        figures |= score(peer_answers(model, arguments.model, [question for question, _ in questions]), questions)
    return figures


def peer_answers(model, name: str, questions: list[str]) -> list[str]:
    """Greedy answers by transformers' generate, under the tokenizer's own template."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.eval()
    answers: list[str] = []
    for start in range(0, len(questions), 4 * ANSWERS_AT_ONCE):
        turns = [[{"role": "user", "content": question}] for question in questions[start : start + 4 * ANSWERS_AT_ONCE]]
        texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            ids = model.generate(
                **inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=tokenizer.pad_token_id
            )
        answers += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


# ---------------------------------------------------------------- all runs


def run_one(arguments: argparse.Namespace) -> None:
    """One run in this process; its figures go to a file."""
    name, _, source = arguments.set[0].partition("=")
    work = Path(arguments.out) / f"{name}-{arguments.method}-r{arguments.rank}-s{arguments.seed}"
    work.mkdir(parents=True, exist_ok=True)
    rows = work / f"{name}.jsonl"
    write_rows(name, source, rows)
    arguments.answers = arguments.answers if name == "gsm8k" else 0
    facts = {"set": name, "method": arguments.method, "rank": arguments.rank, "seed": arguments.seed}

    def keep(figures: dict, unfinished: bool = True) -> None:
        """What there is by now, so that a run which is stopped later has lost nothing."""
        content = {**facts, **figures, **({"unfinished": True} if unfinished else {})}
        work.with_suffix(".json").write_text(json.dumps(content, default=str), encoding="utf-8")

    ours = arguments.method.startswith("ours")
    facts |= (figures := run_ours(arguments, rows, work, keep) if ours else run_peer(arguments, rows))
    keep(figures, unfinished=False)
    print("RESULT", json.dumps({key: value for key, value in facts.items() if key != "said"}, default=str), flush=True)


def run_all(arguments: argparse.Namespace) -> None:
    """Every run as a process, some at a time, and the table."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = [
        (name, method, rank, seed)
        for name in arguments.set
        for seed in arguments.seeds
        for rank in arguments.ranks
        for method in arguments.methods
    ]

    def start(run: tuple[str, str, int, int]) -> None:
        name, method, rank, seed = run
        label = f"{name.partition('=')[0]}-{method}-r{rank}-s{seed}"
        if (out / f"{label}.json").is_file() and "unfinished" not in json.loads((out / f"{label}.json").read_text()):
            return
        command = [sys.executable, __file__, "--one", "--model", arguments.model, "--set", name, "--out", str(out)]
        command += ["--method", method, "--rank", str(rank), "--seed", str(seed), "--steps", str(arguments.steps)]
        command += ["--learning-rate", str(arguments.learning_rate), "--held", str(arguments.held)]
        command += ["--answers", str(arguments.answers)]
        command += ["--merge"] if arguments.merge and method.startswith("ours") else []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "2"}
        environment["PYTORCH_CUDA_ALLOC_CONF"] = (
            "expandable_segments:True"  # rows of many lengths, several runs at a time
        )
        environment["QLORA_CACHE"] = str(out / f"cache-{label}")
        with (out / f"{label}.log").open("w") as log:
            try:
                subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=arguments.timeout)
            except subprocess.TimeoutExpired:
                print(f"{label}: stopped after {arguments.timeout} s", flush=True)
        last = (out / f"{label}.log").read_text(errors="replace").strip().splitlines()[-1:]
        print(label, *last, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(start, wanted))
    print_table(out)


def print_table(out: Path) -> None:
    """The figures in the form benchmarks/quality.md keeps them."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    keys = sorted({(fact["set"], fact["rank"], fact["method"]) for fact in found})
    print("\n| set | rank | method | held-out loss, mean | lowest to highest | seeds |\n|---|---|---|---|---|---|")
    for name, rank, method in keys:
        same = [f for f in found if (f["set"], f["rank"], f["method"]) == (name, rank, method) and f.get("tuned")]
        losses = [fact["tuned"] for fact in same]
        if losses:
            spread = f"{min(losses):.4f} to {max(losses):.4f}"
            print(f"| {name} | {rank} | {method} | {mean(losses):.4f} | {spread} | {len(losses)} |")
    for fact in found:
        if fact.get("answered"):
            print(
                f"{fact['set']} r{fact['rank']} {fact['method']} seed {fact['seed']}: {fact['right']} of {fact['answered']} right"
            )
        for kind in ("merge_auto", f"merge_{QUANTIZED}"):
            if merge := fact.get(kind):
                print(
                    f"{fact['set']} r{fact['rank']} {fact['method']} seed {fact['seed']} {kind}: base {merge['base']}, "
                    f"held out {merge['held_out']:.4f}, live {fact['tuned']:.4f}, losses {merge.get('base_losses')}"
                )


def main() -> None:
    """Reads the flags; with --one a single run, else all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--set", action="append", required=True, help="gsm8k=FILE, instructions or text; repeatable")
    parser.add_argument("--out", default="quality")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--held", type=int, default=HELD_ROWS, help="rows held out, at most 500")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[16])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--timeout", type=int, default=480, help="seconds of one run")
    parser.add_argument("--merge", action="store_true", help="merge ours too, plainly and in 4 bits, and measure it")
    parser.add_argument("--answers", type=int, default=0, help="held-out questions of gsm8k answered and scored")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--method", default="ours", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=16, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run_one(arguments) if arguments.one else run_all(arguments)


if __name__ == "__main__":
    main()
