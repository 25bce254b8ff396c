"""The decoding kernels on the GPU: error against float64, and achieved bandwidth against the card's copy rate.

    python benchmarks/decode_gemv.py --json decode_gemv.json [--part correctness --part one --part few --part attention]

Times are of kernels inside a CUDA graph, over so many copies of each weight that none is found in the second-level
cache. Bandwidth counts the packed weights, their statistics and the adapter. Parts fail alone; the table comes last.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import multiprocessing
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch

from qlora_cli.kernels.decode import attention as decode_attention
from qlora_cli.kernels.decode import gemv
from qlora_cli.kernels.decode.gemv import ROW_UNIT, StackedAdapter, Tiling
from qlora_cli.kernels.decode.pointwise import rms_norm, rotate
from qlora_cli.kernels.weights import FrozenWeight

# name → (rows, columns, weights stacked)
SHAPES = {
    "llama qkv": (12288, 4096, 3),
    "llama o": (4096, 4096, 1),
    "llama gate+up": (22016, 4096, 2),
    "llama down": (4096, 11008, 1),
    "llama3 qkv": (6144, 4096, 3),
    "llama3 gate+up": (28672, 4096, 2),
    "llama3 down": (4096, 14336, 1),
    "neox qkv": (18432, 6144, 1),
    "neox dense": (6144, 6144, 1),
    "neox up": (24576, 6144, 1),
    "neox down": (6144, 24576, 1),
}
COLD_BYTES = 150e6  # of weights in a graph: several times the second-level cache
TABLE: list[tuple[str, str]] = []
RESULTS: dict[str, object] = {}
BEST: dict[str, dict[str, list]] = {}  # shape → tokens → tiling: what decode_speed.py --tilings reads


def note(name: str, value: object) -> None:
    """Keeps one figure and shows it."""
    RESULTS[name] = value
    TABLE.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    print(f"{name}: {TABLE[-1][1]}", flush=True)


def make_stack(rows: int, columns: int, count: int, rank: int = 16):
    """A random stack with an adapter, and bitsandbytes' own form of it as one weight."""
    dense = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02
    packed, state = bnb_functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    second = state.state2
    weight = FrozenWeight(
        rows,
        columns,
        None,
        packed.flatten(),
        state.absmax,
        state.code,
        second.absmax,
        second.code,
        state.offset.expand(second.absmax.numel()).contiguous(),
    )
    first = torch.arange(count, device="cuda", dtype=torch.int32).repeat_interleave(rows // count // ROW_UNIT) * rank
    adapter = StackedAdapter(
        torch.randn(count * rank, columns, device="cuda", dtype=torch.bfloat16) * 0.02,
        torch.full((count * rank,), 2.0, device="cuda"),
        torch.randn(rows, rank, device="cuda", dtype=torch.bfloat16) * 0.02,
        first,
    )
    return weight, adapter, packed, state


def bytes_of(weight: FrozenWeight, adapter: StackedAdapter | None) -> int:
    """What one product has to read."""
    tensors = [weight.packed, weight.absmax, weight.nested_absmax, weight.offset]
    tensors += [adapter.a, adapter.b] if adapter is not None else []
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def graph_seconds(calls, repeats: int = 5) -> float:
    """Seconds of one call, of several captured in a graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = float("inf")
    for _ in range(3):  # the quickest: others may be at work on the card
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end))
    return best / 1e3 / repeats / len(calls)


def copies(rows: int, columns: int, count: int) -> list:
    """So many stacks that they do not fit a cache."""
    number = max(2, int(COLD_BYTES / (rows * columns / 2)) + 1)
    return [make_stack(rows, columns, count) for _ in range(number)]


def copy_rate() -> float:
    """Bytes a second that a copy reads and writes."""
    x = torch.zeros(2**30, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    return 4 * x.numel() / graph_seconds([lambda: torch.neg(x, out=y)])


def correctness() -> None:
    """Relative error against float64, beside that of dequantise + matmul."""
    for name, (rows, columns, count) in SHAPES.items():
        weight, adapter, packed, state = make_stack(rows, columns, count)
        values = bnb_functional.dequantize_4bit(packed, state)
        rank = adapter.b.shape[1]
        delta = torch.cat(
            [
                2.0 * b.double() @ adapter.a[i * rank : (i + 1) * rank].double()
                for i, b in enumerate(adapter.b.split(rows // count))
            ]
        )
        for tokens in (1, 8, 16, 64):
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            truth = x.double() @ (values.double() + delta).T
            parts = [
                x @ v.T + ((x @ adapter.a[i * rank : (i + 1) * rank].T) * 2.0) @ b.T
                for i, (v, b) in enumerate(
                    zip(values.split(rows // count), adapter.b.split(rows // count), strict=True)
                )
            ]
            eager = (torch.cat(parts, 1).double() - truth).norm() / truth.norm()
            ours = (gemv.multiply(x, weight, adapter).double() - truth).norm() / truth.norm()
            note(f"{name} x{tokens} error / eager's", (ours / eager).item())
        del values, delta, truth
        torch.cuda.empty_cache()


def warm(work: tuple[list[int], int, Tiling]) -> None:
    """Compiles what a sweep will use, into Triton's cache; in a process of its own."""
    widths, tokens, tiling = work
    for columns in widths:
        weight, adapter, _, _ = make_stack(256, columns, 1)
        x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        with contextlib.suppress(Exception):  # the sweep names it
            gemv.multiply(x, weight, adapter, tiling=tiling)
            gemv.multiply(x, weight, tiling=tiling)


def compile_all(parts: list[str]) -> None:
    """Compiles all that the parts will sweep over, many at a time."""
    widths = sorted({columns for _, columns, _ in SHAPES.values()})
    work = [(widths, tokens, t) for part in parts for tokens, t in itertools.product(*SWEEPS.get(part, ((), ())))]
    if work:
        with concurrent.futures.ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(warm, work))


def check_overlap() -> None:
    """Whether products that get ready during the launch before them are the same bits, replayed from a graph."""
    weight, adapter, _, _ = make_stack(4096, 4096, 1)
    z = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    overlaps = gemv.overlaps
    try:
        gemv.multiply(z * 1.5, weight, adapter)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = gemv.multiply(z * 1.5, weight, adapter)
        for _ in range(20):
            z.normal_()
            graph.replay()
            gemv.overlaps = lambda device: False
            expected = gemv.multiply(z * 1.5, weight, adapter)
            gemv.overlaps = overlaps
            assert torch.equal(found, expected), "another result"
        RESULTS["overlap"] = True
    except Exception as error:
        note("overlap FAILED", f"{type(error).__name__}: {str(error)[:200]}")
        gemv.overlaps = lambda device: False
        RESULTS["overlap"] = False


def sweep(tokens_list, tilings) -> None:
    """Time of every tiling with an adapter, the best of each shape beside the tiling in use and others' ways."""
    check_overlap()
    rate = copy_rate()
    note("copy TB/s", rate / 1e12)
    for name, (rows, columns, count) in SHAPES.items():
        stacks = copies(rows, columns, count)
        for tokens in tokens_list:
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            values = bnb_functional.dequantize_4bit(*stacks[0][2:])
            expected = (x @ values.T).float()
            timed: dict[str, float] = {}

            def seconds(tiling=None, adapted=True, x=x, stacks=stacks):
                return graph_seconds(
                    [
                        lambda w=w, a=a: gemv.multiply(x, w, a if adapted else None, tiling=tiling)
                        for w, a, _, _ in stacks
                    ]
                )

            for tiling in tilings:
                try:
                    found = gemv.multiply(x, stacks[0][0], tiling=tiling).float()
                    error = ((found - expected).norm() / expected.norm()).item()
                    assert error < 0.01, f"relative error {error:.3g}"
                    timed[json.dumps(list(tiling))] = seconds(tiling) * 1e6
                except Exception as error:  # a tiling that does not fit the card
                    print(name, tokens, tiling, type(error).__name__, str(error)[:100], flush=True)
            ranking = dict(sorted(timed.items(), key=lambda item: item[1]))
            RESULTS[f"{name} x{tokens} tilings us"] = ranking
            note(f"{name} x{tokens} top", "  ".join(f"{k}={v:.1f}" for k, v in list(ranking.items())[:6]))
            if ranking:
                best = json.loads(next(iter(ranking)))
                BEST.setdefault(f"{rows}x{columns}", {})[str(tokens)] = best
                bare = seconds(Tiling(*best), adapted=False) * 1e6
                note(f"{name} x{tokens} best, no adapter us", bare)
                note(f"{name} x{tokens} share of copy rate", bytes_of(stacks[0][0], None) / bare * 1e6 / rate)
                overlaps, gemv.overlaps = gemv.overlaps, lambda device: False
                note(f"{name} x{tokens} best, no overlap us", seconds(Tiling(*best)) * 1e6)
                gemv.overlaps = overlaps
            note(f"{name} x{tokens} in use us", seconds() * 1e6)
            if tokens == 1:
                y = x[None]
                theirs = graph_seconds(
                    [lambda p=p, s=s, y=y: bnb.matmul_4bit(y, p.t(), quant_state=s) for _, _, p, s in stacks]
                )
                note(f"{name} x{tokens} bitsandbytes us", theirs * 1e6)
            if tokens >= 16:
                frozen = [w._replace(offset=s.offset) for w, _, _, s in stacks]
                whole = graph_seconds([lambda f=f, x=x: x @ f.values(x.dtype).t() for f in frozen])
                note(f"{name} x{tokens} dequantised whole us", whole * 1e6)
        del stacks
        torch.cuda.empty_cache()


ONE = [(1, 4, 4, 128), (2, 4, 4, 128), (1, 8, 2, 128), (2, 4, 3, 168), (2, 2, 4, 128), (4, 2, 4, 128), (4, 2, 2, 224)]
ONE += [(1, 4, 3, 168), (1, 2, 4, 128), (2, 4, 2, 224), (1, 8, 2, 96), (1, 8, 3, 80)]
FEW = [(1, 8, 2, 128), (1, 4, 4, 128), (2, 4, 2, None), (2, 4, 4, 128)]
# part → (tokens, tilings). 1 and 8 tokens are the same program; 64 are two launches of 32.
SWEEPS = {
    "one": ((1, 8), [Tiling(*size) for size in ONE]),
    "few": ((16, 64), [Tiling(*size) for size in FEW]),
}


def attention() -> None:
    """Attention of one new token against torch's, and the small kernels."""
    for rows, heads, key_heads, size, capacity, length in (
        (1, 32, 32, 128, 256, 160),
        (1, 32, 32, 128, 4096, 160),
        (1, 32, 32, 128, 4096, 4000),
        (8, 32, 32, 128, 256, 160),
        (8, 32, 8, 128, 4096, 2000),
        (1, 64, 64, 96, 256, 160),
    ):
        name = f"attention {rows}x{heads}/{key_heads}x{size} {length} of {capacity}"
        q = torch.randn(rows, heads, 1, size, device="cuda", dtype=torch.bfloat16)
        new = [torch.randn(rows, key_heads, 1, size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        cache = [torch.randn(rows, key_heads, capacity, size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        at = torch.full((rows,), length - 1, device="cuda")
        ours = graph_seconds([lambda: decode_attention.attend(q, *new, *cache, at, scale=0.1)] * 20)  # noqa: B023
        mask = torch.zeros(rows, 1, 1, capacity, device="cuda", dtype=torch.bfloat16)
        mask[..., length:] = -torch.inf
        wide = [c.repeat_interleave(heads // key_heads, 1) for c in cache]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        theirs = graph_seconds([lambda: sdpa(q, *wide, attn_mask=mask, scale=0.1)] * 20)  # noqa: B023
        note(f"{name} us", ours * 1e6)
        note(f"{name} torch us", theirs * 1e6)
    x = torch.randn(1, 1, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    note("rms_norm 4096 us", graph_seconds([lambda: rms_norm(x, weight, 1e-5)] * 20) * 1e6)
    q, k = (torch.randn(1, 1, 32, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    cos = torch.randn(1, 1, 128, device="cuda", dtype=torch.bfloat16)
    note("rotate 32+32x128 us", graph_seconds([lambda: rotate(q, k, cos, cos)] * 20) * 1e6)
    add = graph_seconds([lambda: x + x] * 20)
    note("an addition us", add * 1e6)


PARTS = {"correctness": correctness, "attention": attention} | {
    part: functools.partial(sweep, *work) for part, work in SWEEPS.items()
}


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, default=Path("decode_gemv.json"))
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    arguments = parser.parse_args()
    for name in set(SHAPES) - set(arguments.shape or SHAPES):
        del SHAPES[name]
    note("card", torch.cuda.get_device_name())
    note("versions", f"torch {torch.__version__}, triton {__import__('triton').__version__}")
    parts = arguments.part or list(PARTS)
    compile_all(parts)
    for part in parts:
        started = time.time()
        try:
            PARTS[part]()
        except Exception:
            traceback.print_exc()
            note(f"{part} FAILED", traceback.format_exc().strip().splitlines()[-1][:300])
        note(f"{part} seconds", round(time.time() - started))
        arguments.json.write_text(json.dumps({**RESULTS, "best": BEST}, indent=1))
    print("\n" + "\n".join(f"{name:60} {value}" for name, value in TABLE))


if __name__ == "__main__":
    main()
