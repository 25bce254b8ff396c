"""Ours and the peers on one card, in turn: each peer, and then ours on the same checkpoint and rows.

    python benchmarks/train_beside.py --work llama-free --work pythia --folder /tmp/bench --json beside.json

What is compared stands a minute apart on the same card, each with the card and the cores to itself. Figures are those of
train_speed.py and train_peers.py; the last column is the speed of ours over that of the peer just before it.
"""

import argparse
import json
import shlex

import train_peers
import train_speed


def main() -> None:
    """Runs the chosen works in turn and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=sorted(train_peers.PEERS), required=True, help="repeat")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one run")
    train_speed.add_arguments(parser)
    train_peers.add_arguments(parser)
    arguments = parser.parse_args()
    folder, cached = arguments.folder, arguments.cached_base
    folder.mkdir(parents=True, exist_ok=True)
    results: list[dict] = []

    def add(result: dict) -> None:
        results.append(result)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))

    for work in dict.fromkeys(arguments.work):
        train_speed.write_model(work, folder)
        train_speed.write_work_rows(work, folder)
        for number in train_peers.chosen_peers(work, arguments.peer):
            add(train_peers.run_peer(work, number, folder, arguments))
            extra = shlex.split(arguments.extra)
            add(train_speed.run_work(work, folder, extra, arguments.warm, arguments.timeout, cached=cached))
    print(train_speed.draw_table(results))


if __name__ == "__main__":
    main()
