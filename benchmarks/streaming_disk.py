"""A base that streams from the disk, with less host memory than the base takes, against the disk's own reading rate.

    python benchmarks/streaming_disk.py --json streaming_disk.json [--architecture llama-70b] [--directory /on/an/nvme]

The base is random, in 4 bits, each layer with weights of its own; it is built on the card and written to a file, which
is then read by as many threads in pieces as large as training reads it, past the page cache: the disk's rate. The process
is in a control group whose memory limit is below the file, its page cache counted; where none can be made, the file's
pages are dropped twice a second instead. Steps are of four rows of 2,048 random ids. Said is how many bytes of weights a
second the steps used, how many the disk gave for them (/proc/self/io), and each as a share of the disk's rate.
"""

import argparse
import gc
import json
import mmap
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from streaming import GIB, Bench, Setting, difference, plan_of
from support.models import ALL16

MIB = 2**20
RATE_BYTES = 4 * GIB  # read to measure the disk


def limit_host(limit_bytes: int) -> Path | None:
    """Puts this process into a control group of so many bytes; the group, or None where none can be made."""
    for root in (Path("/sys/fs/cgroup"), Path("/tmp/cgroup-of-benchmark")):
        try:
            if not (root / "cgroup.controllers").is_file():
                root.mkdir(exist_ok=True)
                subprocess.run(["mount", "-t", "cgroup2", "none", str(root)], check=True, capture_output=True)
            (root / "cgroup.subtree_control").write_text("+memory")
            group = root / "streaming-benchmark"
            group.mkdir(exist_ok=True)
            (group / "memory.max").write_text(str(limit_bytes))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"    no control group in {root}: {error}", flush=True)
            continue
        return group
    return None


def drop(path: Path) -> None:
    """Has the system forget what it keeps of a file."""
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading_rate(path: Path, threads: int, piece_bytes: int) -> float:
    """Bytes a second that threads read of a file, past the page cache, one piece each at a time."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    most = min(RATE_BYTES, path.stat().st_size) // piece_bytes * piece_bytes
    local = threading.local()

    def read(start: int) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, piece_bytes)
        return os.preadv(descriptor, [local.buffer], start)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, range(0, most, piece_bytes)))
    os.close(descriptor)
    return total / (time.perf_counter() - started)


def write_base(base, layers, path: Path) -> int:
    """Writes what of the layers streams to a file, and has the base lie there."""
    from qlora_cli.core.models.quantized_cache import COPY
    from qlora_cli.core.streaming.streamed_base import ALIGNMENT_BYTES, _frozen_tensors
    from qlora_cli.core.weights.mapped_file import MappedFile

    places, start = [], 0
    with path.open("wb") as stream:
        for layer in layers:
            for module in layer.modules():
                for place in _frozen_tensors(module):
                    if not place.packed:
                        continue
                    stream.seek(start)
                    stream.write(place.tensor.cpu().contiguous().view(-1).numpy().view("u1"))
                    places.append((start, place.tensor.dtype, place.tensor.shape, place.bind))
                    start += -(-place.tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        stream.truncate(start)
        os.fsync(stream.fileno())
    copy = MappedFile(path)
    for first, dtype, shape, bind in places:
        bind(copy.tensor(first, dtype, shape))
    base.__dict__[COPY] = copy
    return start


def disk_bytes() -> int:
    """What this process has had read from disks."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def host_peak_bytes() -> int:
    """The most memory this process had, what it maps of files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def run(setting: Setting, path: Path, host_gib: float, device: str, steps: int) -> dict:
    """Everything, one after another."""
    import torch

    from qlora_cli.core.device import limit_memory
    from qlora_cli.core.engine.decoder_layers import find_layers
    from qlora_cli.core.models.structure import find_decoder
    from qlora_cli.core.planning.memory_estimate import CONTEXT_BYTES
    from qlora_cli.core.streaming.disk_source import PIECE_BYTES, THREADS
    from qlora_cli.core.streaming.streamed_base import stream_base

    started, cuda = time.time(), device == "cuda"

    def say(what: object) -> None:
        print(f"    {time.time() - started:6.1f} s  {what}", flush=True)

    if cuda:
        limit_memory(torch.device("cuda", 0), torch.cuda.get_device_properties(0).total_memory)
    plan = plan_of(setting, False, stream=True)
    bench = Bench(setting, device, steps, False)
    same = {
        "gradient_checkpointing": "on",
        "offload_activations": plan.measures.offload_activations and cuda,
        "offload_embeddings": plan.measures.offload_embeddings,
    }
    engine = bench.install(plan.token_budget, **same)
    whole = [bench.gradients(engine, plan.token_budget) for _ in range(2)]
    engine.close()
    del engine
    gc.collect()
    layers = find_layers(find_decoder(bench.base))
    file_bytes = write_base(bench.base, layers, path)
    say(f"wrote {file_bytes / GIB:.2f} GiB to {path}")
    result: dict = {"architecture": setting.architecture, "plan": str(plan.measures), "file_gib": file_bytes / GIB}
    group = limit_host(int(host_gib * GIB))
    ended = threading.Event()
    if group is None:

        def keep_dropping() -> None:
            while not ended.wait(0.5):
                drop(path)

        threading.Thread(target=keep_dropping, daemon=True).start()
    drop(path)
    result |= {"host_limit_gib": host_gib, "limited_by": "control group" if group else "dropping the file's pages"}
    rates = [reading_rate(path, THREADS, PIECE_BYTES) for _ in range(2)]
    result["disk_gb_s"] = [round(rate / 1e9, 3) for rate in rates]
    say(result)
    streamed = stream_base(bench.base, layers, bench.device, streamed=len(layers), report=lambda event: say(event.text))
    if cuda:
        torch.cuda.empty_cache()
        limit_memory(bench.device, int(setting.limit_gib * GIB) - CONTEXT_BYTES)
    engine = bench.install(plan.token_budget, **same)
    say(f"{streamed.describe()}; ready")
    result["streamed and whole"] = difference(whole[0], bench.gradients(engine, plan.token_budget))
    result["two equal passes"] = difference(*whole)
    bench.steps = steps - 1
    before, copies = disk_bytes(), streamed.ring.copies
    trained = bench.train(engine, plan.token_budget)
    used = (streamed.ring.copies - copies) * streamed.layer_bytes
    seconds = sum(trained["step_s"])
    result |= {
        "step_s": trained["step_s"],
        "tok_s": setting.rows * setting.tokens * steps / seconds,
        "peak_gib": trained["peak_gib"],
        "used_gb_s": used / seconds / 1e9,
        "read_gb_s": (disk_bytes() - before) / seconds / 1e9,
        "host_peak_gib": host_peak_bytes() / GIB,
        "engine": trained["engine"],
    }
    rate = max(1.0, sum(rates) / len(rates))
    result |= {"used / disk": result["used_gb_s"] * 1e9 / rate, "read / disk": result["read_gb_s"] * 1e9 / rate}
    if group is not None and (group / "memory.peak").is_file():
        result["group_peak_gib"] = int((group / "memory.peak").read_text()) / GIB
    ended.set()
    engine.close()
    return result


def main() -> None:
    """Runs it and prints what decides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="llama-70b-sixth")
    parser.add_argument("--host-gib", type=float, default=5.0)
    parser.add_argument("--limit-gib", type=float, default=10.0, help="of the card")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, default=Path("streaming_disk.json"))
    arguments = parser.parse_args()
    setting = Setting(arguments.architecture, ALL16, arguments.limit_gib, 4, arguments.tokens)
    path = arguments.directory / "streaming-benchmark.bin"
    try:
        result = run(setting, path, arguments.host_gib, arguments.device, arguments.steps)
    finally:
        path.unlink(missing_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1))
    for key, value in result.items():
        print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
