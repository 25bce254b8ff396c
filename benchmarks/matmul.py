"""Products in 8 bits beside bf16: time and error of each part, at the shapes of real models.

    python benchmarks/matmul.py [--model llama3-8b ...] [--tokens 8192] [--json matmul.json] [--variants]

Weights are random, in NF4 with nested scales; activations are normal, with some channels of 30 times the size. Times are
medians of CUDA events over inputs that change, replayed as a graph. Errors are relative to float64 products of what
NF4 stands for, beside what rounding to NF4 itself does to the product. `--variants` times other tiles of the kernels.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from qlora_cli.core.bnb import bitsandbytes
from qlora_cli.kernels import float8
from qlora_cli.kernels.triton import float8 as kernels
from qlora_cli.kernels.triton import gated_tiles, nf4
from qlora_cli.kernels.weights import FrozenWeight

# model → (out, in) of the linears of a layer
SHAPES = {
    "llama3-8b": {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)},
    "llama-7b": {"q": (4096, 4096), "gate": (11008, 4096), "down": (4096, 11008)},
    "neox-20b": {"qkv": (18432, 6144), "dense": (6144, 6144), "up": (24576, 6144), "down": (6144, 24576)},
    "tiny": {"q": (256, 128), "down": (128, 512)},
}
COUNTS = {  # how often a layer has the shape
    "llama3-8b": {"q": 2, "k": 2, "gate": 2, "down": 1},
    "llama-7b": {"q": 4, "gate": 2, "down": 1},
    "neox-20b": {"qkv": 1, "dense": 1, "up": 1, "down": 1},
    "tiny": {"q": 2, "down": 1},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16


def milliseconds(run, inputs, repeats: int = 12) -> float:
    """Median device time of `run` on one of the inputs after another, replayed as a graph, in which launches take none."""
    if DEVICE == "cpu":
        run(*inputs[0])
        return 0.0
    for given in inputs:
        run(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            run(*inputs[i % len(inputs)])
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times) / repeats


def activations(tokens: int, columns: int) -> torch.Tensor:
    """Normal, with one channel in 500 of 30 times the size."""
    x = torch.randn(tokens, columns, device=DEVICE)
    x[:, :: max(1, min(500, columns // 2))] *= 30
    return x.to(DTYPE)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((got.double() - exact).norm() / exact.norm())


def relative_errors(weight: FrozenWeight, original: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> dict:
    """Of the products on 512 tokens, both ways, for either kind of sums; and of NF4 against the weight it was made of."""
    x, grad = x[:512], grad[:512]
    dense, scaled = weight.values(torch.float32).double(), float8.with_codes(weight, resident=True)
    forward, backward = x.double() @ dense.t(), grad.double() @ dense
    found = {
        "nf4": error(x.double() @ original.double().t(), forward),
        "nf4 backward": error(grad.double() @ original.double(), backward),
        "bf16": error(x @ dense.to(DTYPE).t(), forward),
    }
    codes, scale = float8.quantise_rows(x)
    turned, turned_scale = float8.quantise_rows(grad)
    for name, fast in (("fast", True), ("slow", False)):
        y, x_ = x.new_empty(len(x), weight.rows), x.new_empty(len(x), weight.columns)
        float8.scaled_product(codes, scale, scaled.codes, scaled.row_scale, y, fast=fast)
        float8.scaled_product(turned, turned_scale, scaled.turned_codes, scaled.column_scale, x_, fast=fast)
        found |= {name: error(y, forward), f"{name} backward": error(x_, backward)}
    return found


def product_times(weight: FrozenWeight, x: list, grad: list) -> dict:
    """Milliseconds of the products alone and of what goes before them."""
    dense = weight.values(DTYPE)
    scaled = float8.with_codes(weight, resident=True)
    y, x_ = x[0].new_empty(len(x[0]), weight.rows), x[0].new_empty(len(x[0]), weight.columns)
    codes = [(*float8.quantise_rows(each),) for each in x]
    turned = [(*float8.quantise_rows(each),) for each in grad]
    times = {
        "bf16": milliseconds(lambda t: torch.mm(t, dense.t(), out=y), [(t,) for t in x]),
        "bf16 backward": milliseconds(lambda t: torch.mm(t, dense, out=x_), [(t,) for t in grad]),
        "round x": milliseconds(float8.quantise_rows, [(t,) for t in x]),
        "round grad": milliseconds(float8.quantise_rows, [(t,) for t in grad]),
    }
    for name, fast in (("fast", True), ("slow", False)):
        times[name] = milliseconds(
            lambda c, s, fast=fast: float8.scaled_product(c, s, scaled.codes, scaled.row_scale, y, fast=fast), codes
        )
        times[f"{name} backward"] = milliseconds(
            lambda c, s, fast=fast: float8.scaled_product(
                c, s, scaled.turned_codes, scaled.column_scale, x_, fast=fast
            ),
            turned,
        )
    if DEVICE == "cuda":
        one = torch.ones((), device=DEVICE)
        for name, fast in (("one scale, fast", True), ("one scale, slow", False)):
            times[name] = milliseconds(
                lambda c, s, fast=fast: torch._scaled_mm(
                    c, scaled.codes.t(), scale_a=one, scale_b=one, out_dtype=DTYPE, use_fast_accum=fast
                ),
                codes,
            )
        out = torch.empty_like(dense)
        times["unpack bf16"] = milliseconds(lambda: nf4.dequantize_4bit(weight, out), [()])
        for name, transposed in (("unpack", False), ("unpack turned", True)):
            room = torch.empty_like(scaled.turned_codes if transposed else scaled.codes)
            times[name] = milliseconds(
                lambda room=room, transposed=transposed: kernels.unpack(
                    weight,
                    scaled.column_scale if transposed else scaled.row_scale,
                    room,
                    0,
                    weight.rows,
                    transposed=transposed,
                ),
                [()],
            )
    return times


def gate_times(tokens: int, columns: int) -> dict:
    """Milliseconds of the gated unit, forward and backward, with other tiles."""
    times, kept = {}, (gated_tiles.ROWS, gated_tiles.COLUMNS, gated_tiles.WARPS)
    products = [(activations(tokens, columns), activations(tokens, columns)) for _ in range(2)]
    lefts = tuple(torch.randn(tokens, 16, device=DEVICE, dtype=DTYPE) for _ in range(2))
    rights = tuple(torch.randn(columns, 16, device=DEVICE, dtype=DTYPE) for _ in range(2))
    for tile in ((32, 64, 4), (16, 128, 4), (16, 256, 4), (32, 128, 4), (32, 128, 8), (64, 64, 4), (16, 512, 8)):
        gated_tiles.ROWS, gated_tiles.COLUMNS, gated_tiles.WARPS = tile
        times[f"gate {tile}"] = milliseconds(
            lambda *pair: gated_tiles.gate_products(pair, lefts, rights, "silu"), products
        )
        times[f"gate backward {tile}"] = milliseconds(
            lambda *pair: gated_tiles.gate_products_backward(products[0][0], pair, lefts, rights, "silu"), products
        )
    gated_tiles.ROWS, gated_tiles.COLUMNS, gated_tiles.WARPS = kept
    return times


def variant_times(weight: FrozenWeight, x: torch.Tensor) -> dict:
    """Milliseconds of the kernels with other tiles."""
    times, scales = {}, float8.side_scales(weight)
    for rows in (1, 2):
        for warps in (4, 8, 16):
            times[f"round {rows} rows {warps} warps"] = milliseconds(
                lambda r=rows, w=warps: kernels.quantise_rows(x, float8.LEAST_ROW, rows=r, warps=w), [()]
            )
    for transposed in (False, True):
        shape = (weight.columns, weight.rows) if transposed else (weight.rows, weight.columns)
        room = torch.empty(shape, dtype=torch.float8_e4m3fn, device=DEVICE)
        for tile in ((64, 64), (64, 128), (128, 64), (128, 128)) if transposed else ((4, 512), (8, 512), (1, 4096)):
            for warps in (4, 8):
                times[f"unpack {'turned ' * transposed}{tile} {warps} warps"] = milliseconds(
                    lambda t=tile, w=warps, room=room, turn=transposed: kernels.unpack(
                        weight, scales[turn], room, 0, weight.rows, transposed=turn, tile=t, warps=w
                    ),
                    [()],
                )
    return times


def measure(model: str, tokens: int, *, variants: bool) -> list[dict]:
    """A record for each shape."""
    results = []
    for name, (rows, columns) in SHAPES[model].items():
        original = torch.randn(rows, columns, device=DEVICE) * 0.02
        packed, state = bitsandbytes.functional.quantize_4bit(original, quant_type="nf4", compress_statistics=True)
        weight = FrozenWeight.of_state(state, packed.flatten())
        x = [activations(tokens, columns) for _ in range(3)]
        grad = [activations(tokens, rows) * 1e-4 for _ in range(3)]
        result = {"model": model, "shape": name, "rows": rows, "columns": columns, "tokens": tokens}
        result["count"] = COUNTS[model][name]
        result["errors"] = relative_errors(weight, original, x[0], grad[0])
        del original
        result["ms"] = product_times(weight, x, grad)
        if variants:
            result["variants"] = variant_times(weight, x[0])
            result["variants"] |= gate_times(tokens, rows) if name == "gate" else {}
        results.append(result)
        del weight, x, grad
    return results


def check_lengths() -> None:
    """Products of few and odd numbers of tokens, with poisoned outputs, against the emulation in fp32."""
    weight = torch.randn(1024, 512, device=DEVICE)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    scaled = float8.with_codes(FrozenWeight.of_state(state, packed.flatten()), resident=True)
    worst = 0.0
    for tokens in (1, 2, 7, 16, 31, 64, 100, 127, 129, 200, 255, 1000, 4097):
        x = activations(tokens, 512)
        codes, scale = float8.quantise_rows(x)
        y = torch.full((tokens, 1024), float("nan"), dtype=DTYPE, device=DEVICE)
        float8.scaled_product(codes, scale, scaled.codes, scaled.row_scale, y)
        exact = (codes.double() * scale) @ (scaled.codes.double() * scaled.row_scale[:, None]).t()
        worst = max(worst, error(y, exact))
    print(f"any number of tokens: worst error of a product of codes {worst:.2e}", flush=True)
    assert worst < 5e-3


def draw(results: list[dict]) -> str:
    """Two tables: errors, and milliseconds with the TFLOP/s of the products."""
    lines = [
        "| model | shape | NF4 | bf16 | 8 bits | fp32 sums | NF4 backward | 8 bits | fp32 sums |",
        "|" + "---|" * 9,
    ]
    for r in results:
        e = r["errors"]
        names = ("nf4", "bf16", "fast", "slow", "nf4 backward", "fast backward", "slow backward")
        lines.append(f"| {r['model']} | {r['shape']} | " + " | ".join(f"{100 * e[n]:.2f} %" for n in names) + " |")
    products = [n for n in results[0]["ms"] if not n.startswith(("round", "unpack"))]
    lines += [
        "",
        "| model | shape | " + " | ".join(results[0]["ms"]) + " |",
        "|" + "---|" * (2 + len(results[0]["ms"])),
    ]
    for r in results:
        flops = 2 * r["rows"] * r["columns"] * r["tokens"]
        cells = [
            f"{ms:.3f}" + (f" ({flops / ms / 1e9:.0f})" if ms and name in products else "")
            for name, ms in r["ms"].items()
        ]
        lines.append(f"| {r['model']} | {r['shape']} | " + " | ".join(cells) + " |")
    for model, tokens in dict.fromkeys((r["model"], r["tokens"]) for r in results):
        some = [r for r in results if (r["model"], r["tokens"]) == (model, tokens)]
        layer = {name: sum(r["count"] * r["ms"][name] for r in some) for name in results[0]["ms"]}
        lines.append(f"a layer of {model}, {tokens} tokens: " + ", ".join(f"{n} {ms:.3f}" for n, ms in layer.items()))
        sixteen = layer["bf16"] + layer["bf16 backward"]
        eight = sum(layer[name] for name in ("fast", "fast backward", "round x", "round grad"))
        lines.append(f"    both ways {sixteen:.3f} in bf16, {eight:.3f} in 8 bits: {sixteen / max(eight, 1e-9):.2f} x")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=SHAPES)
    parser.add_argument("--tokens", type=int, action="append", help="of a micro-batch; repeatable; 8192 by default")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    check_lengths()
    results = []
    for model in arguments.model or ["llama3-8b"]:
        for tokens in arguments.tokens or [8192]:
            results += measure(model, tokens, variants=arguments.variants and tokens == 8192)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
    for r in results:
        for name, ms in sorted(r.get("variants", {}).items()):
            print(f"{r['shape']:6} {name:40} {ms:.4f}")
    print(draw(results))


if __name__ == "__main__":
    main()
