"""Loss curves of runs in 8 bits beside those in bf16: how far apart those of one seed are, and those of two seeds.

    python examples/small_model.py /tmp/smollm2
    python benchmarks/quality.py --model /tmp/smollm2 --set gsm8k=../shared/data/gsm8k_train.jsonl --methods ours,ours-fp8 \
        --seeds 0,1 --steps 500 --out /tmp/curves
    python benchmarks/matmul_curves.py /tmp/curves

Reads what quality.py leaves: the losses of each run's steps, its loss on held-out rows, and what the gate said. Losses are
averaged over `--window` steps; two seeds see the rows in another order, so that their distance is the rows' noise.
"""

import argparse
import json
from itertools import combinations
from pathlib import Path
from statistics import mean


def read_run(path: Path) -> dict:
    """Method, seed, held-out loss, record of the choice and losses by step of one run's figures."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    folder = path.with_suffix("") / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "tokens" in line]
    record = json.loads((folder / "qlora.json").read_text(encoding="utf-8")).get("matmul")
    return {
        "fp8": facts["method"] == "ours-fp8",
        "seed": facts["seed"],
        "held": facts["tuned"],
        "losses": losses,
        "record": record,
    }


def distance(left: list[float], right: list[float], window: int) -> tuple[float, float]:
    """Mean and largest absolute difference of two curves, averaged over windows."""
    pairs = [
        (mean(left[i : i + window]), mean(right[i : i + window])) for i in range(0, len(left) - window + 1, window)
    ]
    apart = [abs(a - b) for a, b in pairs]
    return mean(apart), max(apart)


def main() -> None:
    """Prints a line for each pair of runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what quality.py was given as --out")
    parser.add_argument("--window", type=int, default=20, help="steps")
    arguments = parser.parse_args()
    runs = [read_run(path) for path in sorted(arguments.folder.glob("*-ours*.json"))]
    for run in runs:
        kind = "fp8" if run["fp8"] else "bf16"
        last = mean(run["losses"][-arguments.window :])
        print(
            f"{kind} seed {run['seed']}: {len(run['losses'])} steps, last loss {last:.4f}, held out {run['held']:.4f}"
        )
        if run["record"]:
            print(f"    {run['record']}")
    for left, right in combinations(runs, 2):
        same = left["seed"] == right["seed"]
        if same == (left["fp8"] == right["fp8"]):  # one thing differs
            continue
        found, most = distance(left["losses"], right["losses"], arguments.window)
        what = f"seed {left['seed']}, fp8 and bf16" if same else f"{'fp8' if left['fp8'] else 'bf16'}, two seeds"
        print(f"{what}: curves {found:.4f} apart, at most {most:.4f}; held out {abs(left['held'] - right['held']):.4f}")


if __name__ == "__main__":
    main()
