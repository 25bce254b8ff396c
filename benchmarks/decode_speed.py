"""Decoding, prefill and where a step's time goes, on random 4-bit models of the real sizes with an adapter attached.

    python benchmarks/decode_speed.py --json decode_speed.json [--model llama-7b --model neox-20b] [--skip-peer]

Each model is a process of its own with a time limit. It is built and quantised on the GPU; no checkpoint touches the
disk. Decoding takes 128 new tokens after 32, greedily; tokens per second are those of the whole call, as a user waits
for it: prefill, and in the first call capture, included. The peer is transformers' generate of the same 4-bit model
with the same PEFT adapter, in the same process.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.generate import generate_greedily

MODELS = {
    "llama-7b": {"rank": 16, "target_modules": None},
    "llama3-8b": {"rank": 16, "target_modules": None},
    "neox-20b": {"rank": 8, "target_modules": ("query_key_value",)},
    "falcon-7b": {"rank": 16, "target_modules": ("query_key_value",)},
    "pythia-410m": {"rank": 16, "target_modules": None},
    "qwen3-30b-a3b": {"rank": 16, "target_modules": None},
    "qwen3-30b-a3b-quarter": {"rank": 16, "target_modules": None},
    "qwen3.5-9b": {"rank": 16, "target_modules": None},
    "tiny-llama": {"rank": 8, "target_modules": None},
}
NEW, PROMPT = 128, 32
BATCHES = [1, 8, 64]
NEVER = 10**9  # an end token that never comes


class Words:
    """A tokenizer as far as an answer needs one: ids as words."""

    def decode(self, ids, **_):
        """Ids as text."""
        return "".join(f" {i}" for i in ids)


class Bench:
    """One model, and the figures it gave."""

    def __init__(self, name: str, device: str) -> None:
        import torch
        from support.models import build

        from qlora_cli.core.adapters.lora import attach_adapter
        from qlora_cli.settings.groups import LoraSettings

        self.name, self.device, self.figures = name, device, {}
        started = time.time()
        base = build(name, device)
        self.model = attach_adapter(base, LoraSettings(alpha=32, **MODELS[name])).eval()
        generator = torch.Generator(device).manual_seed(0)
        for parameter_name, parameter in self.model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.normal_(0, 0.01, generator=generator)
        self.vocabulary = base.config.vocab_size
        self.note("build seconds", time.time() - started)
        self.note("weights GiB", torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0)

    def note(self, name: str, value: object) -> None:
        """Keeps one figure and shows it."""
        self.figures[name] = value
        print(
            f"{self.name} {name}: {value:.4g}" if isinstance(value, float) else f"{self.name} {name}: {value}",
            flush=True,
        )

    def wait(self) -> None:
        """Until the device is done."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def prompts(self, count: int, length: int = PROMPT) -> list[list[int]]:
        """Random ids, the same in every call."""
        import torch

        generator = torch.Generator().manual_seed(length)
        return torch.randint(5, self.vocabulary, (count, length), generator=generator).tolist()

    # -------------------------------------------------------- parts

    def peer(self) -> None:
        """transformers' own generate, before anything is taken over."""
        import torch

        self.expected = {}
        for count in [count for count in BATCHES if count <= 8]:
            ids = torch.tensor(self.prompts(count), device=self.device)
            for new in (4, 64):
                self.wait()
                started = time.time()
                output = generate_greedily(self.model, ids, new_tokens=new)
                self.wait()
            self.note(f"peer batch {count} tok/s", count * 64 / (time.time() - started))
            self.expected[count] = output[:, PROMPT:].tolist()

    def decode(self) -> None:
        """Tokens per second of whole calls, and of steps alone."""
        import torch

        from qlora_cli.core.generation.requests import Request
        from qlora_cli.core.generation.session import GenerationSession
        from qlora_cli.settings.generation import GenerationSettings

        self.settings = GenerationSettings(temperature=0.0, seed=0, batch_size=max(BATCHES))
        session = GenerationSession(self.settings, print, model=self.model, tokenizer=Words())
        for count in BATCHES:
            requests = [Request(i, ids, NEW) for i, ids in enumerate(self.prompts(count))]
            for attempt in ("first", "second", "third"):
                self.wait()
                started = time.time()
                answers = list(session.answer(requests, [NEVER]))
                self.wait()
                seconds = time.time() - started
                self.note(f"batch {count} {attempt} call tok/s", count * NEW / seconds)
            found = {answer.index: list(answer.ids) for answer in answers}
            if count in getattr(self, "expected", {}):
                same = [
                    next((i for i, (a, b) in enumerate(zip(found[r], row, strict=False)) if a != b), len(row))
                    for r, row in enumerate(self.expected[count])
                ]
                self.note(f"batch {count} tokens equal to the peer's", f"{min(same)}-{max(same)} of 64")
            decoder = session.decoder
            self.fast = getattr(decoder, "fast", None)
            self.note(f"batch {count} path", session.path)
            self.note(f"batch {count} step ms", self.step_seconds(decoder) * 1e3)
            if count in (1, 8):
                self.profile(decoder, count)
            del decoder
        if self.device == "cuda":
            self.note("peak GiB", torch.cuda.max_memory_allocated() / 2**30)

    def step_seconds(self, decoder, steps: int = 50) -> float:
        """Seconds of one step, the device kept busy."""
        from qlora_cli.core.decoding.decoder import Prompt

        rows = decoder.cache.rows
        decoder.reset()
        decoder.prefill(range(rows), [Prompt(ids) for ids in self.prompts(rows)])
        for _ in range(5):
            decoder.step()
        self.wait()
        started = time.time()
        for _ in range(steps):
            pending = decoder.step()
        pending.wait()
        self.wait()
        return (time.time() - started) / steps

    def profile(self, decoder, count: int) -> None:
        """Kernels of a step by the time they take."""
        from torch.profiler import ProfilerActivity, profile

        if self.device != "cuda":
            return
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(10):
                decoder.step()
            self.wait()
        rows = sorted(seen.key_averages(), key=lambda row: -row.device_time_total)
        kernels = [(row.key[:70], row.count / 10, row.device_time_total / 10) for row in rows if row.device_time_total]
        self.note(f"batch {count} kernels a step", sum(calls for _, calls, _ in kernels))
        self.note(f"batch {count} kernel ms a step", sum(us for _, _, us in kernels) / 1e3)
        self.figures[f"batch {count} profile"] = kernels[:30]
        for key, calls, us in kernels[:16]:
            print(f"    {us:8.1f} us {calls:6.1f} x  {key}", flush=True)

    def prefill(self) -> None:
        """Seconds to the first token: launched one by one, captured where the shape comes again, and as a graph."""
        if self.device != "cuda":
            return
        from qlora_cli.core.decoding.decoder import Prompt
        from qlora_cli.core.decoding.graph_decoder import GraphDecoder

        for count, length in ((1, 32), (1, 512), (1, 1900), (8, 512)):
            decoder = GraphDecoder(self.fast, rows=count, capacity=2048, sampling=self.settings)
            prompts = [Prompt(ids) for ids in self.prompts(count, length)]
            for call in ("first", "second", "third"):
                self.wait()
                started = time.time()
                decoder.prefill(range(count), prompts).wait()
                seconds = time.time() - started
                self.note(f"prefill {count} x {length} {call} call ms", seconds * 1e3)
            self.note(f"prefill {count} x {length} tok/s", count * length / seconds)
            if decoder.prefill_graphs.reason is not None:
                self.note(f"prefill {count} x {length} not captured", decoder.prefill_graphs.reason)


def use_tilings(path: Path) -> None:
    """Divides products as decode_gemv.py found best; shapes it has not seen as its first."""
    from qlora_cli.kernels.decode import gemv

    reported = json.loads(path.read_text())
    best, chosen = reported["best"], gemv.choose_tiling
    if not reported.get("overlap", True):
        gemv.overlaps = lambda device: False

    def choose(tokens: int, rows: int, columns: int):
        few = 1 if tokens == 1 else 8 if tokens <= 8 else 16 if tokens <= 16 else 64
        found = {**next(iter(best.values()), {}), **best.get(f"{rows}x{columns}", {})}.get(str(few))
        return gemv.Tiling(*found) if found else chosen(tokens, rows, columns)

    gemv.choose_tiling = choose


def run(name: str, skip_peer: bool, device: str) -> dict:
    """All parts of one model; each fails alone."""
    bench = Bench(name, device)
    for part in ("peer", "decode", "prefill"):
        if part == "peer" and skip_peer:
            continue
        try:
            getattr(bench, part)()
        except Exception:
            traceback.print_exc()
            bench.note(f"{part} FAILED", traceback.format_exc().strip().splitlines()[-1][:300])
        Path(f"decode_speed.{name}.part.json").write_text(json.dumps(bench.figures))
    return bench.figures


def main() -> None:
    """Starts a process a model and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, default=Path("decode_speed.json"))
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=int, default=280, help="seconds for one model")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--tilings", type=Path, help="what decode_gemv.py wrote")
    parser.add_argument("--batch", type=int, action="append")
    arguments = parser.parse_args()
    if arguments.inside:
        if arguments.tilings:
            use_tilings(arguments.tilings)
        BATCHES[:] = arguments.batch or BATCHES
        run(arguments.inside, arguments.skip_peer, arguments.device)
        return
    results = {}
    for name in arguments.model or ("llama-7b", "neox-20b"):
        part = Path(f"decode_speed.{name}.part.json")
        part.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--inside", name, "--device", arguments.device]
        command += ["--skip-peer"] if arguments.skip_peer else []
        command += ["--tilings", str(arguments.tilings)] if arguments.tilings else []
        command += [f"--batch={batch}" for batch in arguments.batch or ()]
        try:
            subprocess.run(command, timeout=arguments.limit, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {arguments.limit} s", flush=True)
        if part.exists():
            results[name] = json.loads(part.read_text())
            part.unlink()
        arguments.json.write_text(json.dumps(results, indent=1))
    for name, figures in results.items():
        for key, value in figures.items():
            if not isinstance(value, list):
                print(f"{name:12} {key:40} {value:.4g}" if isinstance(value, float) else f"{name:12} {key:40} {value}")


if __name__ == "__main__":
    main()
