"""A base that streams from the disk, with less host memory than the base takes, against the disk's own reading rate.

    python benchmarks/streaming_disk.py --json streaming_disk.json [--architecture llama-70b] [--directory /on/an/nvme]

The base is random, in 4 bits, each layer with weights of its own; it is built on the card and written to a file, which
is then read by as many threads in pieces as large as training reads it, past the page cache: the disk's rate, before and
after the steps. The process is in a control group whose memory limit is below the file, its page cache counted; where none
can be made, the file's pages are dropped twice a second instead. Steps are of four rows of 2,048 random ids; how many
layers and steps there are goes by the disk's rate, tried out on a GiB first, unless an architecture is named. Said is how
many bytes of weights a second the steps used, how many the disk gave for them (/proc/self/io), and each as a share of the
disk's rate. All that is known is written to the JSON file as soon as it is.
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
FAST, SLOW = (
    4e9,
    7e8,
)  # bytes a second: from the one on steps have few tokens, as arithmetic would take longer than reading


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
    """Bytes a second that threads read of a file, past the page cache, one piece each at a time; where the file system has
    no such reading, after its pages were dropped."""
    flags = os.O_RDONLY | os.O_DIRECT
    try:
        os.close(os.open(path, flags))
    except OSError as error:
        print(f"    read through the page cache: {error}", flush=True)
        flags = os.O_RDONLY
        drop(path)
    descriptor = os.open(path, flags)
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


def try_disk(path: Path, threads: int, piece_bytes: int) -> tuple[float, float]:
    """Bytes a second that the disk takes and gives, by a GiB of random ones."""
    piece, started = os.urandom(64 * MIB), time.perf_counter()
    with path.open("wb") as stream:
        for _ in range(16):
            stream.write(piece)
        os.fsync(stream.fileno())
    taken = GIB / (time.perf_counter() - started)
    drop(path)
    given = reading_rate(path, threads, piece_bytes)
    path.unlink()
    return taken, given


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


class Disk:
    """What is known of a run, printed and written as it comes.

    Attributes:
        result: That.
    """

    def __init__(self, json_path: Path, limit_s: float) -> None:
        self.result: dict = {}
        self.started, self.json_path, self.limit_s = time.time(), json_path, limit_s

    def left(self) -> float:
        """Seconds that there are for it yet."""
        return self.limit_s - (time.time() - self.started)

    def say(self, what: object = "", **found: object) -> None:
        """Prints and writes."""
        self.result |= found
        print(f"    {time.time() - self.started:6.1f} s  {what} {found or ''}", flush=True)
        self.json_path.write_text(json.dumps(self.result, indent=1))


def choose_setting(taken: float, given: float, tokens: int, limit_gib: float) -> Setting:
    """What a disk of those rates is written to and read from often enough in the time, and does not outrun."""
    architecture = "llama-70b-sixth" if given > SLOW and taken > SLOW / 4 else "llama-70b-tenth"
    rows, tokens = (1, min(tokens, 1024)) if given > FAST else (4, tokens)
    return Setting(architecture, ALL16, limit_gib, rows, tokens)


def run(disk: Disk, setting: Setting, path: Path, host_gib: float, device: str, steps: int) -> None:
    """Everything, one after another."""
    import torch

    from qlora_cli.core.device import limit_memory
    from qlora_cli.core.engine.decoder_layers import find_layers
    from qlora_cli.core.models.structure import find_decoder
    from qlora_cli.core.planning.memory_estimate import CONTEXT_BYTES
    from qlora_cli.core.streaming.disk_source import PIECE_BYTES, THREADS
    from qlora_cli.core.streaming.streamed_base import stream_base

    cuda = device == "cuda"
    if not setting.architecture:
        taken, given = try_disk(path, THREADS, PIECE_BYTES)
        disk.say("a GiB", disk_takes_gb_s=round(taken / 1e9, 3), disk_gives_gb_s=round(given / 1e9, 3))
        setting = choose_setting(taken, given, setting.tokens, setting.limit_gib)
    if cuda:
        limit_memory(torch.device("cuda", 0), torch.cuda.get_device_properties(0).total_memory)
    plan = plan_of(setting, False, matmul="bf16", stream=True)
    disk.say(architecture=setting.architecture, rows=setting.rows, row_tokens=setting.tokens, plan=str(plan.measures))
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
    disk.say(f"wrote {path}", file_gib=round(file_bytes / GIB, 3))
    streamed = stream_base(
        bench.base, layers, bench.device, streamed=len(layers), report=lambda event: disk.say(event.text)
    )
    if cuda:
        torch.cuda.empty_cache()
        limit_memory(bench.device, int(setting.limit_gib * GIB) - CONTEXT_BYTES)
    engine = bench.install(plan.token_budget, **same)  # its trials find the file in the page cache yet
    disk.say(f"{streamed.describe()}; ready")
    group = limit_host(int(host_gib * GIB))
    ended = threading.Event()
    if group is None:

        def keep_dropping() -> None:
            while not ended.wait(0.5):
                drop(path)

        threading.Thread(target=keep_dropping, daemon=True).start()
    drop(path)
    disk.say(host_limit_gib=host_gib, limited_by="control group" if group else "dropping the file's pages")
    rates = [reading_rate(path, THREADS, PIECE_BYTES)]
    disk.say(disk_gb_s=[round(rate / 1e9, 3) for rate in rates])
    started = time.perf_counter()
    gradients = bench.gradients(engine, plan.token_budget)
    micro_batches = setting.rows * setting.tokens / plan.token_budget
    step_s = (time.perf_counter() - started) * micro_batches
    disk.say(**{"streamed and whole": difference(whole[0], gradients), "two equal passes": difference(*whole)})
    again = difference(gradients, bench.gradients(engine, plan.token_budget))
    disk.say(**{"two equal streamed passes": again, "a step takes about": step_s})
    bench.steps = int(max(1, min(steps, disk.left() // step_s - 1))) - 1  # beside the first one, which counts here
    before, copies = disk_bytes(), streamed.ring.copies
    trained = bench.train(engine, plan.token_budget)
    used = (streamed.ring.copies - copies) * streamed.layer_bytes
    seconds = sum(trained["step_s"])
    disk.say(
        step_s=trained["step_s"],
        tok_s=setting.rows * setting.tokens * len(trained["step_s"]) / seconds,
        predicted_tok_s=trained["predicted_tok_s"],
        peak_gib=trained["peak_gib"],
        used_gb_s=used / seconds / 1e9,
        read_gb_s=(disk_bytes() - before) / seconds / 1e9,
        host_peak_gib=host_peak_bytes() / GIB,
        engine=trained["engine"],
    )
    rates.append(reading_rate(path, THREADS, PIECE_BYTES))
    rate = max(1.0, sum(rates) / len(rates))
    shares = {f"{name} / disk": disk.result[f"{name}_gb_s"] * 1e9 / rate for name in ("used", "read")}
    disk.say(disk_gb_s=[round(rate / 1e9, 3) for rate in rates], **shares)
    if group is not None and (group / "memory.peak").is_file():
        disk.say(group_peak_gib=int((group / "memory.peak").read_text()) / GIB)
    ended.set()
    engine.close()


def main() -> None:
    """Runs it and prints what decides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="", help="by the disk's rate, if none is named")
    parser.add_argument("--host-gib", type=float, default=4.0)
    parser.add_argument("--limit-gib", type=float, default=10.0, help="of the card")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=90, help="begins no step that would end after that")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, default=Path("streaming_disk.json"))
    arguments = parser.parse_args()
    setting = Setting(arguments.architecture, ALL16, arguments.limit_gib, 4, arguments.tokens)
    path = arguments.directory / f"streaming-benchmark-{os.getpid()}.bin"
    disk = Disk(arguments.json, arguments.limit_s)
    try:
        run(disk, setting, path, arguments.host_gib, arguments.device, arguments.steps)
    finally:
        path.unlink(missing_ok=True)
        for key, value in disk.result.items():
            print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
