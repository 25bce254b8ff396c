"""What a second card brings: speed, memory, the same losses, and what is left when a rank is killed.

    python benchmarks/ranks.py --folder /tmp/bench --json ranks.json                 # two GPUs of one host
    ACCELERATE_USE_CPU=1 python benchmarks/ranks.py --folder /tmp/bench --size tiny       # the same on two CPU ranks

Every run is `qlora train` in processes of its own, on a base of random 4-bit weights of a real architecture (see
support/random_base.py), or a peer through `accelerate launch` (ranks_peer.py) on a 16-bit checkpoint of the same shape. Tokens per
second are real tokens of all cards over the time of the steps after the first `--warm`. Results are written after each
part, whose failure does not end the others; one that takes too long says where it is.
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
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from support.models import CONFIGS, write_rows

ALL = ["--rank", "16", "--alpha", "32", "--optimizer", "paged_adamw_8bit"]
ONE_STEP = ["--gradient-accumulation-steps", "2", "--batch-size"]
KILLED_AT_STEP = 5
SMALLER = {"llama-7b": "pythia-410m", "neox-20b": "neox-20b-half"}
LEAST_S = 40  # a part is not begun with less time than that


@dataclass(frozen=True)
class Part:
    """One run of `qlora train`, or of a peer (no flags)."""

    architecture: str
    steps: int
    flags: tuple[str, ...]
    cards: int
    limit_s: float = 80.0


PARTS = {
    "one": Part("llama-7b", 20, (*ONE_STEP, "2"), 1),
    "two": Part("llama-7b", 20, (*ONE_STEP, "2"), 2),
    # The same rows a step in other micro-batches: the same mathematics, rounded otherwise.
    "rounded": Part("llama-7b", 20, ("--gradient-accumulation-steps", "4", "--batch-size", "1"), 1),
    "whole": Part("neox-20b", 10, (*ONE_STEP, "4"), 2, 90),
    "sharded": Part("neox-20b", 10, (*ONE_STEP, "4", "--shard"), 2, 90),
    "offloaded": Part("neox-20b", 6, (*ONE_STEP, "4", "--shard-offload"), 2, 90),
    # Micro-batches of 2 rows, steps of 4 rows, as in "one" and "two".
    "peer-one": Part("llama-7b", 10, (), 1),
    "peer-two": Part("llama-7b", 10, (), 2),
}
OTHERS = {"killed": 120.0, "reduce": 60.0}  # seconds at most


class Bench:
    """Runs of one folder.

    Args:
        folder: Models, rows and runs.
        size: full, small (see SMALLER), or tiny, for two CPU ranks, to try the script.
        warm: Steps left out at the start.
        total_s: For everything; a part for which too little is left is not begun.
        extra: More flags for every run.
        peer_site: Folder of the peer's packages, in front of all others for it alone.
    """

    def __init__(
        self, folder: Path, size: str, warm: int, total_s: float, extra: list[str], peer_site: str | None
    ) -> None:
        self.folder, self.size, self.warm, self.extra = folder, size, warm, extra
        self.deadline = time.monotonic() + total_s
        self.tiny = size == "tiny"
        self.results: dict[str, dict] = {}
        self.made: dict[str, subprocess.Popen] = {}
        here = Path(__file__).resolve().parents[1]
        path = [str(here), str(here / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            **os.environ,
            "QLORA_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONFAULTHANDLER": "1",  # one that hangs prints where, see `end`
            "PYTHONPATH": os.pathsep.join(path),
        }
        self.peer_path = os.pathsep.join([*filter(None, [peer_site]), *path])

    def left_s(self, limit_s: float) -> float:
        """Seconds that a part may take."""
        return min(limit_s, self.deadline - time.monotonic())

    def architecture(self, name: str) -> str:
        """What stands for an architecture at this size."""
        return {"full": name, "small": SMALLER[name], "tiny": "tiny-llama"}[self.size]

    def start(self, name: str, command: list, *, card: int | None = None, **environment: str) -> subprocess.Popen:
        """A process whose words go to files; on one card, or on all."""
        if card is not None and not self.tiny:
            environment["CUDA_VISIBLE_DEVICES"] = str(card)
        with (self.folder / f"{name}.out").open("w") as out, (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                list(map(str, command)), env={**self.environment, **environment}, stdout=out, stderr=log
            )

    def log_of(self, name: str) -> str:
        """What a process wrote to stderr."""
        return (self.folder / f"{name}.log").read_text()

    def end(self, process: subprocess.Popen) -> None:
        """Ends a process that takes too long with its ranks, each of which says where it is; their sessions are others."""
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for number in (signal.SIGABRT, signal.SIGKILL):
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.send_signal(number)
            time.sleep(2)
        process.wait()

    def begin_making(self, parts: list[str]) -> None:
        """Starts to make what the parts need, all at once, over both cards."""
        names = {PARTS[part].architecture for part in parts if part in PARTS and PARTS[part].flags}
        names |= {"llama-7b"} if "killed" in parts else set()
        for card, name in enumerate(sorted(names, reverse=True)):  # the large one has a card to itself
            kind = ["float32", "cpu"] if self.tiny else ["bfloat16", "cuda"]
            # The disk is not waited for: what is read back comes from memory.
            code = "import os, runpy; os.fsync = lambda descriptor: None; runpy.run_module('support.random_base', None, '__main__')"
            command = [sys.executable, "-c", code, self.architecture(name), self.folder / name, *kind]
            self.made[name] = self.start(f"made-{name}", command, card=card)
        for name in {PARTS[part].architecture for part in parts if part in PARTS and not PARTS[part].flags}:
            command = [sys.executable, "-m", "support.models", self.architecture(name), self.folder / f"peer-{name}"]
            self.made[f"peer-{name}"] = self.start(f"made-peer-{name}", command, card=1)

    def begin_beside(self, command: str) -> None:
        """Starts something else that has to be over before anything is measured, such as tests."""
        self.made["beside"] = self.start("made-beside", ["bash", "-c", command], PYTHONFAULTHANDLER="")

    def wait_for(self, names: Iterable[str], limit_s: float) -> None:
        """Waits until these are made; what is not in time is given up, so that it disturbs nothing."""
        for name in names:
            if name not in self.made:
                continue
            process = self.made[name]
            try:
                code = process.wait(max(1.0, self.left_s(limit_s)))
            except subprocess.TimeoutExpired:
                self.end(process)
                code = process.returncode
            if code or name == "beside":
                out = (self.folder / f"made-{name}.out").read_text()
                print(name, "ended with", code, out[-3000:], self.log_of(f"made-{name}")[-2000:], flush=True)
            del self.made[name]
            print(f"{name} made or given up, {self.deadline - time.monotonic():.0f} s left", flush=True)

    def rows(self, architecture: str) -> Path:
        """The file of its rows, all of one length."""
        path = self.folder / f"{architecture}.jsonl"
        if not path.exists():
            vocabulary = CONFIGS[self.architecture(architecture)][1]["vocab_size"]
            write_rows("fixed", path, rows=96, vocab_size=vocabulary, max_length=self.length)
        return path

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return 128 if self.tiny else 2048

    def command(self, name: str, run: str) -> list:
        """The command line of a part, for a run directory."""
        part = PARTS[name]
        if not part.flags:
            launch = ["-m", "accelerate.commands.launch", "--num_processes", part.cards, "--num_machines", "1"]
            launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
            launch += ["--multi_gpu", "--main_process_port", "29612"] if part.cards > 1 else []
            script = [Path(__file__).with_name("ranks_peer.py"), "--checkpoint", self.folder / "peer-llama-7b"]
            script += ["--rows", self.rows(part.architecture), "--json", self.folder / f"{name}.json"]
            script += ["--max-length", self.length, "--batch-size", "2", "--step-rows", "4"]
            return [sys.executable, *launch, *script, "--steps", part.steps, "--warm", self.warm]
        command = [sys.executable, "-m", "qlora_cli", "train", "--model", self.folder / part.architecture]
        command += ["--data", self.rows(part.architecture), "--output", self.folder / run, "--overwrite", "--json"]
        command += ["--max-steps", part.steps, "--max-length", self.length, "--save-every", KILLED_AT_STEP]
        return [*command, *ALL, *part.flags, *self.extra, *(["--gpus", part.cards] if part.cards > 1 else [])]

    def train(self, name: str, *, card: int | None = None) -> subprocess.Popen:
        """Starts a part."""
        paths = {} if PARTS[name].flags else {"PYTHONPATH": self.peer_path}
        return self.start(name, self.command(name, name), card=card, **paths)

    def finish(self, name: str, process: subprocess.Popen) -> None:
        """Waits for a part and keeps its figures, or what went wrong."""
        started, limit_s = time.monotonic(), self.left_s(PARTS[name].limit_s)
        late = ""
        try:
            process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            self.end(process)
            late = f", stopped after {limit_s:.0f} s"
        waited_s = round(time.monotonic() - started, 1)
        if process.returncode or late:
            said = self.log_of(name)
            self.results[name] = {"error": f"exit {process.returncode}{late}", "log": said[-6000:]}
            print(name, self.results[name]["error"], said[-6000:], flush=True)
            return
        found = self.figures(name) if PARTS[name].flags else json.loads((self.folder / f"{name}.json").read_text())
        self.results[name] = {**found, "waited_s": waited_s}
        print(name, json.dumps({k: v for k, v in self.results[name].items() if k != "losses"}), flush=True)

    def figures(self, name: str) -> dict:
        """What a run of ours came to."""
        result, lines = json.loads((self.folder / f"{name}.out").read_text()), self.metrics(name)
        steps = [line for line in lines if "tokens" in line][self.warm :]
        return {
            "tokens_per_second": round(sum(s["tokens"] for s in steps) / sum(s["step_seconds"] for s in steps), 1),
            "median_step_ms": round(1000 * statistics.median(s["step_seconds"] for s in steps), 1),
            "base_vram_bytes": result["base_vram_bytes"],
            "loading_vram_bytes": result["loading_vram_bytes"],
            "peak_vram_bytes": result["peak_vram_bytes"],
            "losses": [line["loss"] for line in lines if "loss" in line],
            "engine": next((line for line in self.log_of(name).splitlines() if "fast:" in line), "")[-300:],
        }

    def metrics(self, name: str) -> list[dict]:
        """Lines of a run's metrics."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def kill_a_rank(self) -> None:
        """Kills rank 1 of two once there is a checkpoint, and goes on with one card."""
        name = "killed"
        deadline = time.monotonic() + self.left_s(OTHERS[name])
        shutil.rmtree(self.folder / name, ignore_errors=True)
        process = self.start(name, self.command("two", name))
        while not list((self.folder / name / "checkpoints").glob("step-*")):
            if process.poll() is not None or time.monotonic() > deadline:
                if process.returncode is None:
                    self.end(process)
                self.results[name] = {
                    "error": f"exit {process.returncode} before it was killed: {self.log_of(name)[-6000:]}"
                }
                print(name, self.results[name]["error"], flush=True)
                return
            time.sleep(0.02)
        ranks = psutil.Process(process.pid).children()
        victim = next(rank.pid for rank in ranks if rank.environ().get("RANK") == "1")
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        try:
            process.wait(max(5.0, deadline - killed))
        except subprocess.TimeoutExpired:
            self.end(process)
        seconds = time.monotonic() - killed
        found: dict = {
            "others_ended_after_s": round(seconds, 1),
            "exit": process.returncode,
            "reported": [line for line in self.log_of(name).splitlines() if line.startswith(("error:", "→"))],
            "left": [rank.pid for rank in ranks if rank.is_running()],
        }
        self.results[name] = found
        print(name, json.dumps(found), flush=True)
        if not found["reported"]:
            found["log"] = self.log_of(name)[-6000:]
        command = [word for word in self.command("one", name) if word != "--overwrite"]
        resumed = self.start("resumed", [*command, "--resume"], card=0)
        try:
            resumed.wait(max(5.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end(resumed)
        said = self.log_of("resumed")
        found["resumed_exit"] = resumed.returncode
        found["resumed"] = next((line for line in said.splitlines() if "Going on after" in line), "")
        found["losses"] = [line["loss"] for line in self.metrics(name) if "loss" in line]
        if resumed.returncode:
            found["resumed_log"] = said[-3000:]
        print(name, json.dumps({k: v for k, v in found.items() if k != "losses"}), flush=True)

    def run(self, group: list[str]) -> None:
        """Parts that run at once, a card each, or one on all cards."""
        if group == ["killed"]:
            self.kill_a_rank()
        elif group == ["reduce"]:
            self.reduce_alone()
        else:
            one_card = PARTS[group[0]].cards == 1
            started = [(name, self.train(name, card=card if one_card else None)) for card, name in enumerate(group)]
            for name, process in started:
                self.finish(name, process)

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
                *["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"],
                str(script),
            ],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=max(1.0, self.left_s(OTHERS["reduce"])),
        )
        found = [line for line in done.stdout.splitlines() if line.startswith("REDUCE")]
        self.results["reduce"] = (
            {"milliseconds": float(found[0].split()[1])} if found else {"error": done.stderr[-800:]}
        )
        print("reduce", self.results["reduce"], flush=True)


def in_turn(parts: list[str]) -> list[list[str]]:
    """Parts in order; two that follow one another and take one card each run side by side."""
    groups: list[list[str]] = []
    for name in parts:
        alone = name not in PARTS or PARTS[name].cards > 1
        beside = groups and len(groups[-1]) == 1 and groups[-1][0] in PARTS and PARTS[groups[-1][0]].cards == 1
        if beside and not alone:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def main() -> None:
    """Runs the chosen parts and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=[*PARTS, *OTHERS], help="repeat, in order; default all")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qlora-ranks"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--total", type=float, default=1200, help="seconds for everything")
    parser.add_argument("--size", choices=["full", "small", "tiny"], default="full")
    parser.add_argument("--extra", default="", help="more flags for qlora train")
    parser.add_argument("--beside", help="shell command to run while bases are made, at most 150 s")
    parser.add_argument("--peer-site", help="folder of the peer's packages, in front of PYTHONPATH for it alone")
    arguments = parser.parse_args()
    parts = arguments.part or [*PARTS, *OTHERS]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        arguments.folder, arguments.size, arguments.warm, arguments.total, arguments.extra.split(), arguments.peer_site
    )
    bench.begin_making(parts)
    if arguments.beside:
        bench.begin_beside(arguments.beside)
    try:
        for group in in_turn(parts):
            # What is killed need not wait until the other things are made; what is measured does.
            bench.wait_for(["llama-7b"] if group == ["killed"] else list(bench.made), bench.left_s(150))
            if bench.left_s(LEAST_S) < LEAST_S:
                bench.results |= {name: {"error": "no time was left"} for name in group}
                print(*group, "not begun: no time was left", flush=True)
                continue
            try:
                bench.run(group)
            except Exception as error:  # one part's failure is not that of the others
                bench.results |= {name: {"error": repr(error)} for name in group if name not in bench.results}
                print(*group, traceback.format_exc(), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(bench.results, indent=1))
    finally:
        bench.wait_for(list(bench.made), 1)
    found = bench.results

    def both(left: str, right: str, key: str) -> bool:
        return all(key in found.get(name, {}) for name in (left, right))

    pairs = [("two", "one"), ("peer-two", "peer-one"), ("one", "peer-one"), ("two", "peer-two")]
    for left, right in (*pairs, ("sharded", "whole"), ("offloaded", "whole")):
        for key in ("tokens_per_second", "base_vram_bytes", "peak_vram_bytes"):
            if both(left, right, key) and found[left][key] and found[right][key]:
                print(f"{left} / {right} {key}:", round(found[left][key] / found[right][key], 3))
    for left, right in (("one", "two"), ("one", "rounded"), ("one", "killed"), ("whole", "sharded")):
        if both(left, right, "losses") and len(found[left]["losses"]) == len(found[right]["losses"]):
            losses = zip(found[left]["losses"], found[right]["losses"], strict=True)
            print(f"largest loss difference {left} - {right}:", max(abs(a - b) for a, b in losses))


if __name__ == "__main__":
    main()
