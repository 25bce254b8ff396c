"""Ours and the peers on one card in one run: all are started at once, and measured one after another.

    python benchmarks/train_beside.py --work llama-free --work pythia --folder /tmp/bench --json beside.json

Most of a short run is its start: imports, loading, quantising, compiling. Here these overlap. Each process works until
its warm steps are done and is then paused (SIGSTOP, see pausing.py); once all are, they are continued one at a time,
each with the card and the cores to itself, and ended after the steps that count. The step in which a process was
paused and the one after it are left out. Figures are those of train_speed.py and train_peers.py. A process that is not
warm when `--patience` is over is paused as it is and comes last; then it warms up alone.

A paused process keeps its memory, and each plans by what it finds free. So the peaks of all that a run is given, a GiB
for every process and the size of a checkpoint while it is written have to fit the card together; what does not is for
a second run. In GiB, ours + peers: llama-free 33 + 19, llama-least 6 + 5, llama-gsm8k 33 + 21, pythia 8 + 8,
falcon 7 + 32, neox-quotes 12 + 14 (TRL) + 12 (Unsloth). Works on one checkpoint share it; `--laid` spares ours a large
one, which the peers still have to read.
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import train_peers
import train_speed
from pausing import PausableProcess
from train_peers import PEERS
from train_speed import WORKS, our_environment
from turns import AFTER_PAUSE, SPARE, Bench, Contender


def line_up(arguments: argparse.Namespace) -> list[Contender]:
    """Ours and the chosen peers of each work, with its rows written and old runs removed."""
    folder: Path = arguments.folder.resolve()
    extra = shlex.split(arguments.extra)
    writers: dict[Path, PausableProcess] = {}
    contenders = []

    def writer(work: str, laid: bool) -> PausableProcess | None:
        command = train_speed.writer_of(work, folder, laid=laid)
        if command is None:
            return None
        path = train_speed.checkpoint_of(work, folder, laid=laid)
        environment = our_environment(folder, laid=laid)
        log = folder / f"{path.name}.log"
        return writers.setdefault(path, PausableProcess(command, environment=environment, directory=folder, log=log))

    def enter(work: str, who: str, needs: PausableProcess | None, steps: tuple[Path, int, int], **kind) -> None:
        steps_file, warm, counted = steps
        log = folder / f"{work}-{who.replace(' ', '-')}.log"
        process = PausableProcess(log=log, **kind)
        contenders.append(Contender(work, who, process, steps_file, needs, warm, counted, {"work": work, "who": who}))

    for work in dict.fromkeys(arguments.work):
        train_speed.write_work_rows(work, folder)
        shutil.rmtree(folder / f"run-{work}", ignore_errors=True)
        if not arguments.peers_only:
            warm = train_speed.warm_of(work, arguments.warm)
            counted = max(1, WORKS[work][3] - warm)
            steps = warm + AFTER_PAUSE + counted + SPARE
            enter(
                work,
                "ours",
                writer(work, arguments.laid),
                (folder / f"run-{work}" / "metrics.jsonl", warm, counted),
                command=train_speed.our_command(work, folder, steps=steps, extra=extra, laid=arguments.laid),
                environment=our_environment(folder, laid=arguments.laid),
                directory=folder,
            )
        for number in [] if arguments.no_peers else train_peers.chosen_peers(work, arguments.peer):
            path = train_peers.steps_file(work, number, folder)
            path.unlink(missing_ok=True)
            counted = PEERS[work][number][-1]
            steps = arguments.peer_warm + AFTER_PAUSE + counted + SPARE
            enter(
                work,
                train_peers.peer_name(work, number),
                writer(work, False),
                (path, arguments.peer_warm, counted),
                command=train_peers.peer_command(work, number, folder, steps=steps),
                environment=train_peers.peer_environment(work, number, folder, arguments.peer_site),
                directory=folder,
            )
    return contenders


def draw_table(results: list[dict]) -> str:
    """One line for each work and who did it, with how much faster ours is."""
    ours = {r["work"]: r.get("tokens_per_second") for r in results if r["who"] == "ours"}
    lines = ["| work | who | tok/s | step ms | peak GiB | ours / it |", "|---|---|---|---|---|---|"]
    for r in results:
        speed, own = r.get("tokens_per_second"), ours.get(r["work"])
        if speed is None:
            lines.append(f"| {r['work']} | {r['who']} | {r['error']} | | | |")
            continue
        ratio = f"{own / speed:.2f}" if own and r["who"] != "ours" else ""
        note = f" ({r['error']})" if "error" in r else ""
        lines.append(
            f"| {r['work']} | {r['who']} | {speed:,}{note} | {r['median_step_ms']} | {r['peak_gib']} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the chosen works side by side and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=sorted(WORKS), required=True, help="repeat for several")
    train_speed.add_arguments(parser)
    train_peers.add_arguments(parser)
    parser.add_argument("--peer-warm", type=int, default=3, help="steps of a peer left out at the start")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--peers-only", action="store_true", help="the peers alone")
    parser.add_argument("--at-once", type=int, default=99, help="processes that warm up at a time")
    parser.add_argument("--stagger", type=float, default=2, help="seconds between two starts")
    parser.add_argument("--patience", type=float, default=240, help="seconds for all to become warm")
    parser.add_argument("--turn", type=float, default=90, help="seconds for one to be measured, twice that if late")
    parser.add_argument("--timeout", type=float, default=540, help="seconds for all")
    arguments = parser.parse_args()
    ends_at = time.monotonic() + arguments.timeout
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # a process; all of them compile at the same time
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(line_up(arguments), arguments.json, ends_at)
    try:
        bench.warm_up(at_once=arguments.at_once, stagger_s=arguments.stagger, patience_s=arguments.patience)
        bench.measure_all(arguments.turn)
    finally:
        bench.close()
        for contender in bench.contenders:
            if "error" in contender.result:
                print(f"--- {contender.work} {contender.who}\n{contender.result['log']}", file=sys.stderr)
        print(draw_table([contender.result for contender in bench.contenders]), flush=True)
    sys.exit(1 if bench.stopping else 0)


if __name__ == "__main__":
    main()
