"""Memory and time of `merge` beside a plain copy of the same bytes: a random checkpoint of several files in, a table out.

    python benchmarks/merge_stream.py --model llama-7b --layers 8 --shard-bytes 500000000 --work /tmp/merge
    python benchmarks/merge_stream.py --model llama-7b --work /mnt/disk/merge        # the whole 7B

The merge runs in a process of its own without verification; its resident peak is VmHWM of that process, everything
counted (interpreter, torch, transformers, bitsandbytes). The bound is the bytes of the two largest files + 1 GiB.
Source files are dropped from the page cache before each run, and every run ends with fsync. A round is a copy, a merge, a
copy and the other merge, so that a slow spell of the disk meets all: a merge is held against the copy just before it.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.models import CONFIGS, make_config, write_tokenizer
from transformers import AutoModelForCausalLM

from qlora_cli.core.merge.checkpoint_files import write_index
from qlora_cli.core.models.structure import linear_names
from qlora_cli.core.storage.safetensors_file import bytes_of, make_header

BLOCK_ELEMENTS = 2**24
GIB = 2**30
CLOCKS = ("user", "system")

CHILD = """
import json, resource, sys, time
from qlora_cli.config import MergeConfig
from qlora_cli.commands.merge import merge
imported = time.perf_counter()
def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
result = merge(MergeConfig(**json.loads(sys.argv[1])), lambda event: None).to_dict()
seconds = time.perf_counter() - imported
used = resource.getrusage(resource.RUSAGE_SELF)
result |= {"user_seconds": used.ru_utime, "system_seconds": used.ru_stime}
print(json.dumps({"peak_bytes": peak(), "imported_bytes": before, "seconds": seconds, **result}))
"""


def write_checkpoint(directory: Path, config, shard_bytes: int) -> None:
    """A random bfloat16 checkpoint, written tensor by tensor: it may be larger than memory."""
    directory.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    block = (torch.randn(BLOCK_ELEMENTS) * 0.02).bfloat16()
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    for file_name, group in zip(names, groups, strict=True):
        header = make_header([(name, torch.bfloat16, shapes[name]) for name in group])
        with (directory / file_name).open("wb") as stream:
            stream.write(header.content)
            for name in group:
                left = prod(shapes[name])
                while left:
                    stream.write(bytes_of(block[: min(left, BLOCK_ELEMENTS)]))
                    left -= min(left, BLOCK_ELEMENTS)
            os.fsync(stream.fileno())
    config.dtype = torch.bfloat16
    config.architectures = [CONFIGS_ARCHITECTURE[type(config).__name__]]
    config.save_pretrained(directory)
    write_index(directory, names)
    write_tokenizer(directory, config.vocab_size)


CONFIGS_ARCHITECTURE = {
    "LlamaConfig": "LlamaForCausalLM",
    "GPTNeoXConfig": "GPTNeoXForCausalLM",
    "FalconConfig": "FalconForCausalLM",
}


def write_adapter(directory: Path, base: Path, config, rank: int) -> None:
    """A random adapter on every linear layer."""
    directory.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors, names = {}, linear_names(model)
    for name in names:
        rows, columns = model.get_submodule(name).weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns) * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": leaves}
    (directory / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": str(base)}))


def forget(directory: Path) -> None:
    """Drops the files from the page cache, so that reading them is reading the disk."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> dict:
    """What a plain copy of all weight files takes, flushed to the disk."""
    forget(source)
    target.mkdir()
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as stream:
            os.fsync(stream.fileno())
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    shutil.rmtree(target)
    processor = {name: getattr(after, f"ru_{name[0]}time") - getattr(before, f"ru_{name[0]}time") for name in CLOCKS}
    return {"seconds": seconds, "load": os.getloadavg()[0], **{f"{name}_seconds": processor[name] for name in CLOCKS}}


def run_merge(source: Path, adapter: Path, target: Path, method: str) -> dict:
    """One merge in its own process."""
    forget(source)
    settings = {"model": str(source), "adapter": str(adapter), "output": str(target), "base": method}
    settings |= {"verify": False, "overwrite": True}
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(settings)], env=environment, check=True, stdout=subprocess.PIPE
    )
    shutil.rmtree(target)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Writes what is missing under --work, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b", choices=CONFIGS)
    parser.add_argument("--layers", type=int, help="Use fewer layers than the architecture has.")
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = make_config(arguments.model)
    if arguments.layers:
        config.num_hidden_layers = arguments.layers
    base, adapter = arguments.work / "base", arguments.work / "adapter"
    if not (base / "tokenizer.json").exists():
        shutil.rmtree(arguments.work, ignore_errors=True)
        write_checkpoint(base, config, arguments.shard_bytes)
        write_adapter(adapter, base, config, arguments.rank)
    sizes = sorted((path.stat().st_size for path in base.glob("*.safetensors")), reverse=True)
    bound = sum(sizes[:2]) + GIB
    print(f"{arguments.model}, {config.num_hidden_layers} layers: {len(sizes)} files, {sum(sizes) / 1e9:.2f} GB")
    print(f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, {os.cpu_count()} cores")
    results: dict = {"bound_bytes": bound, "total_bytes": sum(sizes), "files": len(sizes), "copy": [], "merge": {}}
    for _ in range(arguments.repeat):
        for method in ("dequantized", "original"):
            plain = copy(base, arguments.work / "copied")
            results["copy"].append(plain)
            figures = run_merge(base, adapter, arguments.work / "merged", method)
            figures |= {"load": os.getloadavg()[0], "copies": figures["merge_seconds"] / plain["seconds"]}
            results["merge"].setdefault(method, []).append(figures)
            print(
                f"copy: {plain['seconds']:.1f} s ({plain['system_seconds']:.1f} s in the system); then merge into "
                f"{method}: {figures['seconds']:.1f} s (files {figures['merge_seconds']:.1f} s = "
                f"{figures['copies']:.2f} copies, CPU {figures['user_seconds']:.1f} s + "
                f"{figures['system_seconds']:.1f} s in the system), peak {figures['peak_bytes'] / GIB:.2f} GiB of "
                f"{bound / GIB:.2f} allowed ({figures['imported_bytes'] / GIB:.2f} GiB before it began), load "
                f"{figures['load']:.1f}",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
    for method, runs in results["merge"].items():
        copies, peak = [run["copies"] for run in runs], max(run["peak_bytes"] for run in runs)
        spread = f"{min(copies):.2f} to {max(copies):.2f}"
        print(
            f"{method}: median {statistics.median(copies):.2f} x the copy ({spread}), peak {peak / bound:.0%} of the bound"
        )


if __name__ == "__main__":
    main()
