"""What a second card brings: speed, memory, the same losses, and what is left when a rank is killed.

    python benchmarks/ranks.py --folder /tmp/bench --json ranks.json                 # two GPUs of one host
    ACCELERATE_USE_CPU=1 python benchmarks/ranks.py --folder /tmp/bench --size tiny       # the same on two CPU ranks

Every run is `qlora train` in processes of its own, on a base of random 4-bit weights of a real architecture (see
random_base.py). Tokens per second are real tokens of all cards over the time of the steps after the first `--warm`.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
from models import CONFIGS, write_rows

ALL = ["--rank", "16", "--alpha", "32", "--optimizer", "paged_adamw_8bit"]
# part → (architecture, steps, flags, cards, environment)
ONE_STEP = ["--gradient-accumulation-steps", "2", "--batch-size"]
PARTS: dict[str, tuple[str, int, list[str], int]] = {
    "one": ("llama-7b", 20, [*ONE_STEP, "2"], 1),
    "two": ("llama-7b", 20, [*ONE_STEP, "2"], 2),
    # The same rows a step in other micro-batches: the same mathematics, rounded otherwise.
    "rounded": ("llama-7b", 20, ["--gradient-accumulation-steps", "4", "--batch-size", "1"], 1),
    "whole": ("neox-20b", 10, [*ONE_STEP, "4"], 2),
    "spread": ("neox-20b", 10, [*ONE_STEP, "4", "--shard"], 2),
    "offloaded": ("neox-20b", 6, [*ONE_STEP, "4", "--shard-offload"], 2),
}
KILLED_AT_STEP = 5
SMALLER = {"llama-7b": "pythia-410m", "neox-20b": "neox-20b-half"}


class Bench:
    """Runs of one folder.

    Args:
        folder: Models, rows and runs.
        size: full, small (see SMALLER), or tiny, for two CPU ranks, to try the script.
        warm: Steps left out at the start.
        timeout_s: For one run.
        extra: More flags for every run.
    """

    def __init__(self, folder: Path, size: str, warm: int, timeout_s: float, extra: list[str]) -> None:
        self.folder, self.size, self.warm, self.timeout_s, self.extra = folder, size, warm, timeout_s, extra
        self.tiny = size == "tiny"
        self.results: dict[str, dict] = {}
        here = Path(__file__).resolve().parents[1]
        self.environment = {
            **os.environ,
            "QLORA_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(here), str(here / "benchmarks"), os.environ.get("PYTHONPATH", "")]),
        }

    def architecture(self, name: str) -> str:
        """What stands for an architecture at this size."""
        return {"full": name, "small": SMALLER[name], "tiny": "tiny-llama"}[self.size]

    def lay_bases(self, names: set[str]) -> None:
        """Makes the models, all at once, each on a card of its own."""
        made = []
        for card, name in enumerate(sorted(names)):
            kind = ["float32", "cpu"] if self.tiny else ["bfloat16", "cuda"]
            environment = self.environment if self.tiny else {**self.environment, "CUDA_VISIBLE_DEVICES": str(card)}
            command = [
                sys.executable,
                "-m",
                "random_base",
                self.architecture(name),
                self.folder / name,
                *kind,
            ]
            made.append(subprocess.Popen(list(map(str, command)), env=environment))
        started = time.time()
        for process in made:
            assert process.wait(self.timeout_s) == 0
        print(f"bases laid in {time.time() - started:.0f} s", flush=True)

    def command(self, part: str, name: str) -> list[str]:
        """The command line of a part, for a run directory `name`."""
        architecture, steps, flags, cards = PARTS[part]
        length = 128 if self.tiny else 2048
        rows = self.folder / f"{architecture}.jsonl"
        if not rows.exists():
            vocabulary = CONFIGS[self.architecture(architecture)][1]["vocab_size"]
            write_rows("fixed", rows, rows=96, vocab_size=vocabulary, max_length=length)
        command = [sys.executable, "-m", "qlora_cli", "train", "--model", self.folder / architecture, "--data", rows]
        command += [
            "--output",
            self.folder / name,
            "--max-steps",
            steps,
            "--max-length",
            length,
            "--overwrite",
            "--json",
        ]
        command += [
            *ALL,
            *flags,
            *self.extra,
            "--save-every",
            KILLED_AT_STEP,
            *(["--gpus", cards] if cards > 1 else []),
        ]
        return list(map(str, command))

    def train(self, part: str, *, card: int | None = None) -> subprocess.Popen:
        """Starts a part."""
        environment = self.environment if card is None else {**self.environment, "CUDA_VISIBLE_DEVICES": str(card)}
        return subprocess.Popen(
            self.command(part, part), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self, part: str, process: subprocess.Popen) -> None:
        """Waits for a part and keeps its figures, or what went wrong."""
        started = time.time()
        try:
            out, said = process.communicate(timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            time.sleep(3)
            process.kill()
            out, said = process.communicate()
            said += f"\nstopped after {self.timeout_s} s"
        (self.folder / f"{part}.log").write_text(said)
        if process.returncode:
            self.results[part] = {"error": f"exit {process.returncode}", "log": said[-1500:]}
            print(part, self.results[part]["error"], said[-3000:], flush=True)
            return
        result, lines = json.loads(out), self.metrics(part)
        steps = [line for line in lines if "tokens" in line][self.warm :]
        self.results[part] = {
            "tokens_per_second": round(sum(s["tokens"] for s in steps) / sum(s["step_seconds"] for s in steps), 1),
            "median_step_ms": round(1000 * statistics.median(s["step_seconds"] for s in steps), 1),
            "base_vram_bytes": result["base_vram_bytes"],
            "loading_vram_bytes": result["loading_vram_bytes"],
            "peak_vram_bytes": result["peak_vram_bytes"],
            "losses": [line["loss"] for line in lines if "loss" in line],
            "waited_s": round(time.time() - started, 1),
            "engine": next((line for line in said.splitlines() if "engine:" in line), "")[-300:],
        }
        print(part, json.dumps({k: v for k, v in self.results[part].items() if k != "losses"}), flush=True)

    def metrics(self, name: str) -> list[dict]:
        """Lines of a run's metrics."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def kill_a_rank(self) -> None:
        """Kills rank 1 of two once there is a checkpoint, and goes on with one card."""
        name = "killed"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        process = subprocess.Popen(
            self.command("two", name), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.time() + self.timeout_s
        while not list((self.folder / name / "checkpoints").glob("step-*")):
            if process.poll() is not None or time.time() > deadline:
                process.kill()
                self.results[name] = {"error": process.communicate()[1][-1500:]}
                return
            time.sleep(0.02)
        ranks = psutil.Process(process.pid).children()
        victim = next(rank.pid for rank in ranks if rank.environ().get("RANK") == "1")
        os.kill(victim, signal.SIGKILL)
        killed = time.time()
        _, said = process.communicate(timeout=self.timeout_s)
        seconds = time.time() - killed
        told = [line for line in said.splitlines() if line.startswith(("error:", "→"))]
        left = [rank.pid for rank in ranks if rank.is_running()]
        command = [word for word in self.command("one", name) if word != "--overwrite"]
        resumed = subprocess.run(
            [*command, "--resume"], env=self.environment, capture_output=True, text=True, timeout=self.timeout_s
        )
        self.results[name] = {
            "others_ended_after_s": round(seconds, 1),
            "exit": process.returncode,
            "told": told,
            "left": left,
            "resumed_exit": resumed.returncode,
            "resumed": next((line for line in resumed.stderr.splitlines() if "Going on after" in line), ""),
            "losses": [line["loss"] for line in self.metrics(name) if "loss" in line],
        }
        if resumed.returncode:
            self.results[name]["log"] = resumed.stderr[-1500:]
        print(name, json.dumps({k: v for k, v in self.results[name].items() if k != "losses"}), flush=True)

    def reduce_alone(self) -> None:
        """How long adding up the gradients of r 16 on every linear of a 7B model takes by itself."""
        code = (
            "import os,time,torch,torch.distributed as d\n"
            "cuda=torch.cuda.is_available()\n"
            "cuda and torch.cuda.set_device(int(os.environ['LOCAL_RANK']))\n"
            "d.init_process_group('nccl' if cuda else 'gloo')\n"
            "x=torch.ones(40_000_000 if cuda else 40_000,device='cuda' if cuda else 'cpu')\n"
            "times=[]\n"
            "for i in range(12):\n"
            "    cuda and torch.cuda.synchronize(); d.barrier(); t=time.perf_counter(); d.all_reduce(x)\n"
            "    cuda and torch.cuda.synchronize(); times.append(time.perf_counter()-t)\n"
            "d.get_rank() or print('REDUCE', 1000*sorted(times[2:])[5])\n"
            "d.destroy_process_group()\n"
        )
        script = self.folder / "reduce.py"
        script.write_text(code)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "--master-port",
                "29611",
                str(script),
            ],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
        found = [line for line in done.stdout.splitlines() if line.startswith("REDUCE")]
        self.results["reduce"] = (
            {"milliseconds": float(found[0].split()[1])} if found else {"error": done.stderr[-800:]}
        )
        print("reduce", self.results["reduce"], flush=True)


def largest_difference(left: list[float], right: list[float]) -> float:
    """Of two loss curves."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def main() -> None:
    """Runs the chosen parts and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=[*PARTS, "killed", "reduce"], help="repeat; default all")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qlora-ranks"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one run")
    parser.add_argument("--size", choices=["full", "small", "tiny"], default="full")
    parser.add_argument("--extra", default="", help="more flags for qlora train")
    arguments = parser.parse_args()
    parts = arguments.part or [*PARTS, "killed", "reduce"]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.folder, arguments.size, arguments.warm, arguments.timeout, arguments.extra.split())
    bench.lay_bases(
        {PARTS[part][0] for part in parts if part in PARTS} | ({"llama-7b"} if "killed" in parts else set())
    )

    def keep() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(bench.results, indent=1))

    if "one" in parts and "rounded" in parts:  # side by side, a card each
        pair = [(part, bench.train(part, card=card)) for card, part in enumerate(("one", "rounded"))]
        for part, process in pair:
            bench.finish(part, process)
        keep()
    for part in parts:
        if part in ("one", "rounded") and part in bench.results:
            continue
        if part in PARTS:
            bench.finish(part, bench.train(part))
        elif part == "killed":
            bench.kill_a_rank()
        else:
            bench.reduce_alone()
        keep()
    found = bench.results

    def both(left: str, right: str, key: str) -> bool:
        return all(key in found.get(name, {}) for name in (left, right))

    if both("one", "two", "tokens_per_second"):
        print("two / one tok/s:", round(found["two"]["tokens_per_second"] / found["one"]["tokens_per_second"], 3))
    if both("whole", "spread", "tokens_per_second"):
        print(
            "spread / whole tok/s:",
            round(found["spread"]["tokens_per_second"] / found["whole"]["tokens_per_second"], 3),
        )
        if found["whole"]["base_vram_bytes"]:
            print(
                "spread / whole base:", round(found["spread"]["base_vram_bytes"] / found["whole"]["base_vram_bytes"], 3)
            )
    for left, right in (("one", "two"), ("one", "rounded"), ("one", "killed"), ("whole", "spread")):
        if both(left, right, "losses") and len(found[left]["losses"]) == len(found[right]["losses"]):
            print(
                f"largest loss difference {left} - {right}:",
                largest_difference(found[left]["losses"], found[right]["losses"]),
            )


if __name__ == "__main__":
    main()
