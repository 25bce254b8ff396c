"""What a user would answer with instead: seconds to load, tokens a second, and the first token of prompts.

    python benchmarks/decode_peers.py --peer unsloth --peer hf --model llama-7b --folder /tmp/bench --json peers.json

The same checkpoint shape, adapter and lengths as decode_speed.py, through each library's `generate`, greedy, in a process
each with a time limit. Decoding is the second whole call, and so is a first token, which is `generate` of one token. A
random checkpoint is written once. A peer that is not installed is reported as such.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from support.generate import generate_greedily
from support.models import CONFIGS, write_checkpoint
from train_peers import LLAMA, load_plain, load_unsloth

ADAPTERS = {"neox-20b": (8, ["query_key_value"]), "falcon-7b": (16, ["query_key_value"])}
NEW, PROMPT = 128, 32
PROMPTS = ((1, 32), (1, 512), (1, 1900), (8, 512))  # rows and tokens


def measure(peer: str, checkpoint: Path, model_name: str, batches: list[int], path: Path) -> None:
    """Writes one peer's figures, each as soon as it is known."""
    rank, targets = ADAPTERS.get(model_name, (16, LLAMA))
    flags = argparse.Namespace(rank=rank, alpha=32, dropout=0.0, target_modules=targets, max_length=2048 + NEW)
    started = time.perf_counter()
    model, _ = (load_unsloth if peer == "unsloth" else load_plain)(str(checkpoint), flags, False)
    import torch  # not before Unsloth, which changes what follows

    if peer == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    model.eval()
    cuda = torch.cuda.is_available()
    figures: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        figures[name] = value
        print(f"{peer} {name}: {value:.4g}", flush=True)
        path.write_text(json.dumps(figures))

    def seconds(rows: int, tokens: int, new: int) -> float:
        """Of the second call."""
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=generator).to(model.device)
        for _ in range(2):
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            generate_greedily(model, ids, new_tokens=new)
            if cuda:
                torch.cuda.synchronize()
        return time.perf_counter() - began

    note("load seconds", time.perf_counter() - started)
    for rows, tokens in PROMPTS:
        note(f"prefill {rows} x {tokens} ms", 1000 * seconds(rows, tokens, 1))
    for batch in batches:
        note(f"batch {batch} tok/s", batch * NEW / seconds(batch, PROMPT, NEW))
    note("peak GiB", torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0)


def main() -> None:
    """Starts a process a peer and prints what each came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", choices=("hf", "unsloth"))
    parser.add_argument("--model", default="llama-7b", choices=list(CONFIGS))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qlora-bench"), help="where checkpoints are")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--json", type=Path, default=Path("decode_peers.json"))
    parser.add_argument("--limit", type=int, default=200, help="seconds for one peer")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    checkpoint, batches = arguments.folder / arguments.model, arguments.batch or [1, 8, 64]
    if arguments.inside:
        measure(arguments.peer[0], checkpoint, arguments.model, batches, arguments.inside)
        return
    if not (checkpoint / "tokenizer.json").is_file():
        write_checkpoint(arguments.model, checkpoint)
    results = {}
    for peer in arguments.peer or ("hf", "unsloth"):
        part = arguments.json.with_name(f".{peer}.{arguments.json.name}")
        part.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--inside", str(part), "--peer", peer, "--model", arguments.model]
        command += ["--folder", str(arguments.folder), *(f"--batch={batch}" for batch in batches)]
        try:
            done = subprocess.run(command, timeout=arguments.limit, capture_output=True, text=True, check=False)
            error = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            error = [f"stopped after {arguments.limit} s"]
        results[peer] = json.loads(part.read_text()) if part.exists() else {}
        part.unlink(missing_ok=True)
        if error:
            results[peer]["error"] = error[0]
        arguments.json.write_text(json.dumps(results, indent=1))
        for name, value in results[peer].items():
            print(f"{peer:8} {name:24} {value:.4g}" if isinstance(value, float) else f"{peer:8} {name:24} {value}")


if __name__ == "__main__":
    main()
