"""Where the card waits in steps of `qlora train`: the gaps between its kernels, and what the host did meanwhile.

    python benchmarks/step_gaps.py --work llama-free --folder /tmp/bench [--cached-base] [--json gaps.json]

The work of train_speed.py in this process, three of its warm steps under torch's profiler. A step's time is that
between the ends of two waits; gaps are counted over all streams, so that copies beside kernels fill them.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import train_speed
from train_speed import WORKS, add_arguments

FIRST, STEPS = 14, 3  # steps before, and under the profiler
LONG_US = 20.0
SHOWN = 14


def find_gaps(events: list, host: list) -> list[dict]:
    """Times without anything on the device, longest first.

    Args:
        events: (begin, end, name) in µs of all that ran on the device.
        host: The same of the host's calls.
    """
    gaps = []
    busy_until, before = None, ""
    for begin, end, name in sorted(events):
        if busy_until is not None and begin > busy_until:
            gap = {"us": begin - busy_until, "after": before[:60], "before": name[:60]}
            if gap["us"] >= LONG_US:
                calls: dict[str, float] = {}
                for host_begin, host_end, call in host:
                    inside = min(host_end, begin) - max(host_begin, busy_until)
                    if inside > 0:
                        calls[call] = calls.get(call, 0.0) + inside
                longest = sorted(calls.items(), key=lambda item: -item[1])[:8]
                gap["host"] = {call[:50]: round(us, 1) for call, us in longest}
            gaps.append(gap)
        if busy_until is None or end > busy_until:
            busy_until, before = end, name
    return sorted(gaps, key=lambda gap: -gap["us"])


def watch(work: str, folder: Path, cached: bool, extra: list[str]) -> dict:
    """Trains the work and returns what the profiler saw."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from qlora_cli.cli.app import main
    from qlora_cli.core.training import trainer as watched

    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    own_take, own_read = watched.Trainer.take_step, watched.read_sums
    number, last = 0, FIRST + STEPS

    def take(self, step, batches):
        nonlocal number
        number = step.number
        if number == FIRST:
            profiler.start()
        return own_take(self, step, batches)

    def read(sums):
        if not FIRST <= number <= last:
            return own_read(sums)
        with record_function("read_sums"):
            found = own_read(sums)
        if number == last:
            profiler.stop()
        return found

    watched.Trainer.take_step, watched.read_sums = take, read
    command = train_speed.our_command(work, folder, steps=last + 3, extra=extra, cached=cached)
    main(command[3:])
    events = profiler.profiler.kineto_results.events()
    device, host, waits = [], [], []
    for event in events:
        begin, end = event.start_ns() / 1e3, (event.start_ns() + event.duration_ns()) / 1e3
        if str(event.device_type()).endswith("CUDA"):
            if not event.name().startswith(("read_sums", "gpu_user")):
                device.append((begin, end, event.name()))
        else:
            host.append((begin, end, event.name()))
            if event.name() == "read_sums":
                waits.append(end)
    begins, ends = min(waits), max(waits)
    device = [event for event in device if begins <= event[0] < ends]
    gaps = find_gaps(device, host)
    steps = len(waits) - 1
    return {
        "work": work,
        "step ms": (ends - begins) / 1e3 / steps,
        "busy ms": (ends - begins - sum(gap["us"] for gap in gaps)) / 1e3 / steps,
        "long gaps ms": sum(g["us"] for g in gaps if g["us"] >= LONG_US) / 1e3 / steps,
        "short gaps ms": sum(g["us"] for g in gaps if g["us"] < LONG_US) / 1e3 / steps,
        "launches": len(device) / steps,
        "longest": gaps[:SHOWN],
    }


def main() -> None:
    """Watches the chosen works and prints the longest gaps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=sorted(WORKS), required=True)
    add_arguments(parser)
    arguments = parser.parse_args()
    sys.path.insert(0, str(train_speed.HERE.parent))
    os.environ |= train_speed.our_environment(arguments.folder, cached=arguments.cached_base)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    train_speed.write_model(arguments.work, arguments.folder, cached=arguments.cached_base)
    train_speed.write_work_rows(arguments.work, arguments.folder)
    found = watch(arguments.work, arguments.folder, arguments.cached_base, arguments.extra.split())
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    for name, value in found.items():
        if not isinstance(value, list):
            print(f"{name:16} {value:.3f}" if isinstance(value, float) else f"{name:16} {value}")
    for gap in found["longest"]:
        print(f"{gap['us']:9.1f} us  {gap['after']}  ->  {gap['before']}\n           {gap.get('host', '')}")


if __name__ == "__main__":
    main()
