"""The whole road on a CUDA GPU: a Pythia-410M-sized base trains, answers and merges; Falcon-7B loads in 4 bits.

    python benchmarks/gpu_road.py --json gpu_road.json

Weights are random (see models.py). It fails when a command does, when no VRAM is shown, or when Falcon is not 4-bit.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from models import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
FALCON_LIMIT_GIB = 4.6
LOAD = """
import sys, time, torch
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import four_bit_linears
started = time.time()
base, _ = load_base(sys.argv[1], compute_dtype=torch.bfloat16, device=torch.device("cuda", 0), cache=False)
print(torch.cuda.memory_allocated() / 2**30, sum(1 for _ in four_bit_linears(base)), time.time() - started)
"""


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    """Runs a command in the repository and stops at a failure."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done


def main() -> None:
    """Walks the road and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qlora-bench"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    qlora = ["-m", "qlora_cli"]
    pythia = str(write_checkpoint("pythia-410m", folder / "pythia-410m"))
    out, merged = str(folder / "road"), str(folder / "road-merged")
    train = f"train --model {pythia} --data examples/data/python_questions.jsonl --output {out} --max-steps 40"
    trained = run([*qlora, *train.split(), "--optimizer", "paged_adamw_8bit", "--learning-rate", "1e-3", "--overwrite"])
    metrics = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "loss" in line]
    question = ["--temperature", "0", "--max-new-tokens", "32", "--json", "What does len() return?"]
    answer = json.loads(run([*qlora, "generate", "--adapter", out, *question]).stdout)
    merge = json.loads(run([*qlora, "merge", "--adapter", out, "--output", merged, "--overwrite", "--json"]).stdout)
    inspected = json.loads(run([*qlora, "inspect", "--adapter", out, "--json"]).stdout)
    falcon = write_checkpoint("falcon-7b", folder / "falcon-7b")
    gib, linears, seconds = run(["-c", LOAD, str(falcon)]).stdout.split()
    result = {
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "peak_vram_bytes": steps[-1]["peak_vram_bytes"],
        "vram_line": next((line for line in trained.stderr.splitlines() if "VRAM" in line), None),
        "trainable_parameters": inspected["trainable_parameters"],
        "answer": answer["answers"][0]["answer"] if "answers" in answer else answer,
        "merge": merge.get("verification"),
        "falcon_gib": float(gib),
        "falcon_4bit_linears": int(linears),
        "falcon_load_seconds": float(seconds),
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    assert result["vram_line"] and result["peak_vram_bytes"], "no VRAM was shown"
    assert result["last_loss"] < result["first_loss"], "the loss did not fall"
    assert result["falcon_gib"] <= FALCON_LIMIT_GIB, "Falcon is not held in 4 bits"


if __name__ == "__main__":
    main()
