"""Times of the training step's kernels on the GPU, and of variants of each; tests/kernels checks what they compute.

    python benchmarks/step_kernels.py --json step_kernels.json [--part dequantise --part linear ...]

Parts fail alone. Times are medians of CUDA events; the last lines are a table.
"""

# ruff: noqa: B023 - every closure here is called before its loop goes on

import argparse
import json
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bitsandbytes.functional as bnb
import torch
from triton.testing import do_bench

from qlora_cli.kernels import attention, cross_entropy, linear, lora_products
from qlora_cli.kernels.triton import dropout, nf4
from qlora_cli.kernels.weights import FrozenWeight

DEVICE = "cuda"
SHAPES = {
    "4096x4096": (4096, 4096),
    "11008x4096": (11008, 4096),
    "24576x6144": (24576, 6144),
    "4672x4544": (4672, 4544),
}
TABLE: list[tuple[str, str]] = []
RESULTS: dict[str, object] = {}


def note(name: str, value: object) -> None:
    """Keeps one figure and shows it."""
    RESULTS[name] = value
    TABLE.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    print(f"{name}: {TABLE[-1][1]}", flush=True)


def microseconds(function) -> float:
    """Median time of one call."""
    return do_bench(function, warmup=10, rep=40, return_mode="median") * 1e3


def quantised(rows: int, columns: int):
    """A random weight in NF4 with double quantisation: as FrozenWeight, and as bitsandbytes' (packed, state)."""
    packed, state = bnb.quantize_4bit(
        torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16) * 0.02,
        quant_type="nf4",
        compress_statistics=True,
    )
    weight = FrozenWeight(
        rows,
        columns,
        packed=packed.flatten(),
        absmax=state.absmax,
        code=state.code,
        nested_absmax=state.state2.absmax,
        nested_code=state.state2.code,
        offset=state.offset,
    )
    return weight, packed, state


def dequantise() -> None:
    """Time by tile and warps, and that of bitsandbytes."""
    for name, (rows, columns) in SHAPES.items():
        weights = [quantised(rows, columns) for _ in range(6)]
        out = torch.empty(rows, columns, device=DEVICE, dtype=torch.bfloat16)
        turn = iter(range(10**9))
        best = None
        for tile in (1024, 2048, 4096, 8192):
            for warps in (4, 8, 16):
                if tile // warps < 128:
                    continue
                us = microseconds(
                    lambda t=tile, w=warps, ws=weights, o=out: nf4.dequantize_4bit(
                        ws[next(turn) % 6][0], o, tile=t, warps=w
                    )
                )
                RESULTS[f"dequantise {name} tile {tile} warps {warps} us"] = us
                best = min(best or (us,), (us, tile, warps))
        note(f"dequantise {name} best us, tile, warps", tuple(round(x, 1) for x in best))
        default = microseconds(lambda ws=weights, o=out: nf4.dequantize_4bit(ws[next(turn) % 6][0], o))
        note(f"dequantise {name} default us", default)
        note(f"dequantise {name} default TB/s", rows * columns * (0.516 + 2) / default / 1e6)
        theirs = microseconds(lambda ws=weights: bnb.dequantize_4bit(*ws[next(turn) % 6][1:]))
        note(f"dequantise {name} bitsandbytes us", theirs)


def linear_time() -> None:
    """Where a layer's time goes: base GEMM, dequantise, adapter, at several token counts and workspaces."""
    for name in ("4096x4096", "11008x4096", "24576x6144"):
        rows, columns = SHAPES[name]
        weights = [quantised(rows, columns)[0] for _ in range(4)]
        dense = [FrozenWeight(rows, columns, dense=w.values(torch.bfloat16)) for w in weights]
        turn = iter(range(10**9))
        for tokens in (368, 2048, 4096):
            x = torch.randn(tokens, columns, device=DEVICE, dtype=torch.bfloat16)
            grad = torch.randn(tokens, rows, device=DEVICE, dtype=torch.bfloat16)
            a = torch.randn(16, columns, device=DEVICE, dtype=torch.bfloat16)
            b = torch.randn(rows, 16, device=DEVICE, dtype=torch.bfloat16)
            flops = 2 * tokens * rows * columns
            key = f"{name} x{tokens}"
            us = microseconds(lambda: x @ dense[next(turn) % 4].dense.t())
            note(f"{key} GEMM us, TFLOP/s", (round(us, 1), round(flops / us / 1e6)))
            us = microseconds(lambda: grad @ dense[next(turn) % 4].dense)
            note(f"{key} GEMM of dX us, TFLOP/s", (round(us, 1), round(flops / us / 1e6)))
            options = linear.LinearOptions(2.0)
            projected = lora_products.project(x, a, None, 2.0)
            parts = {
                "forward packed": lambda: lora_products.forward(x, weights[next(turn) % 4], None, projected, b, None),
                "forward dense": lambda: lora_products.forward(x, dense[next(turn) % 4], None, projected, b, None),
                "forward dense, no adapter": lambda: lora_products.forward(
                    x, dense[next(turn) % 4], None, None, None, None
                ),
                "project x A": lambda: lora_products.project(x, a, None, 2.0),
                "adapter in place": lambda: grad.addmm_(projected, b.t()),
                "d projected": lambda: lora_products.scaled_product(grad, b, 2.0),
                "dA wide": lambda: lora_products.wide_product(projected.t(), x, torch.float32),
                "dA bf16": lambda: projected.t() @ x,
                "dB wide": lambda: lora_products.wide_product(grad.t(), projected, torch.float32),
                "dB bf16": lambda: grad.t() @ projected,
                "dB transposed wide": lambda: lora_products.wide_product(projected.t(), grad, torch.float32),
                "backward packed": lambda: lora_products.backward(
                    grad, x, projected, weights[next(turn) % 4], a, b, None, options, True, torch.float32
                ),
                "backward dense": lambda: lora_products.backward(
                    grad, x, projected, dense[next(turn) % 4], a, b, None, options, True, torch.float32
                ),
            }
            for limit in (8, 16, 32, 64):
                parts[f"forward packed, workspace {limit} MiB"] = lambda m=limit: lora_products.forward(
                    x, weights[next(turn) % 4], None, projected, b, m << 20
                )
            # The adapter as 16 more columns of one GEMM, and the adapter first with the GEMM adding to it.
            wide = torch.cat([dense[0].dense, b], dim=1)
            wide_x = torch.cat([x, projected], dim=1)
            parts["GEMM of in + 16"] = lambda: wide_x @ wide.t()
            y = torch.empty(tokens, rows, device=DEVICE, dtype=torch.bfloat16)

            def adapter_first():
                torch.mm(projected, b.t(), out=y)
                return y.addmm_(x, dense[next(turn) % 4].dense.t())

            parts["adapter first, GEMM adds"] = adapter_first
            for part, function in parts.items():
                grad.normal_()
                RESULTS[f"{key} {part} us"] = us = microseconds(function)
                print(f"    {key} {part}: {us:.1f} us", flush=True)
            note(
                f"{key} us: fwd packed/dense/bare, bwd packed/dense",
                [
                    round(RESULTS[f"{key} {p} us"])
                    for p in (
                        "forward packed",
                        "forward dense",
                        "forward dense, no adapter",
                        "backward packed",
                        "backward dense",
                    )
                ],
            )


def host_cost() -> None:
    """Microseconds of host time to call one linear, forward and backward, on work too small to count."""
    weight = quantised(64, 64)[0]
    x = torch.randn(1, 16, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    a, b = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((8, 64), (64, 8)))
    lora = a.detach().bfloat16(), b.detach().bfloat16()
    dense = FrozenWeight(64, 64, dense=weight.values(torch.bfloat16))

    def clock(function, count: int = 300) -> float:
        for _ in range(20):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            function()
        spent = time.perf_counter() - start
        torch.cuda.synchronize()
        return spent / count * 1e6

    for kind, w in (("packed", weight), ("dense", dense)):
        call = lambda w=w: linear.qlora_linear(x, w, None, a, b, *lora, None, linear.LinearOptions(2.0))  # noqa: E731
        note(f"host us, eager {kind} forward", clock(call))
        note(f"host us, eager {kind} forward + backward", clock(lambda c=call: c().sum().backward()))

        def op(w=w):
            constants = *w[:2], *w[9:], 0.0, 0, 2.0, None
            return torch.ops.qlora.linear(x, a, b, None, *lora, None, None, *w[2:9], *constants)

        with torch.no_grad():
            note(f"host us, op {kind} forward, no grad", clock(op))
            note(
                f"host us, plain {kind} forward", clock(lambda w=w: lora_products.forward(x, w, None, None, None, None))
            )
    y = torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16)
    note("host us, one mm", clock(lambda: y @ y))
    out = torch.empty(64, 64, device=DEVICE, dtype=torch.bfloat16)
    note("host us, one dequantise", clock(lambda: nf4.dequantize_4bit(weight, out)))


def attend() -> None:
    """Packed attention, torch's varlen_attn (flash) and cuDNN, on rows of one length and on packed ones; also with fewer
    keys than heads, windows and sinks."""
    from torch.nn.attention.varlen import varlen_attn

    two = (2048, 2048)
    shapes = ((32, 32, 128, two), (64, 64, 96, (2048,)), (16, 16, 64, (2048,) * 4), (71, 71, 64, (2048,)))
    for heads, key_heads, size, lengths in (*shapes, (32, 4, 128, two), (64, 8, 64, two)):
        for kind, rows in (("equal", lengths), ("packed", (170,) * (sum(lengths) // 170))):
            tokens, longest = sum(rows), max(rows)
            q, k, v = (
                torch.randn(tokens, count, size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
                for count in (heads, key_heads, key_heads)
            )
            sinks = torch.randn(heads, device=DEVICE, dtype=torch.bfloat16)
            cu = torch.arange(0, tokens + 1, longest, device=DEVICE, dtype=torch.int32)
            grad = torch.randn_like(q)
            key = f"attention time {heads}x{size}, {key_heads} keys, {kind} {tokens}"

            def backward_of(forward, q=q, k=k, v=v, grad=grad):
                out = forward()
                return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

            forms = {
                "ours": lambda a=(q, k, v, cu, longest, size**-0.5, None): attention.packed_attention(*a),
                "varlen": lambda a=(q, k, v, cu, cu, longest, longest): varlen_attn(*a, window_size=(-1, 0)),
            }
            if key_heads < heads:
                given = (q, k, v, cu, longest, size**-0.5)
                forms |= {
                    "ours, window 128": lambda a=given: attention.packed_attention(*a, 128),
                    "ours, window 513": lambda a=given: attention.packed_attention(*a, 513),
                    "ours, sinks": lambda a=given: attention.packed_attention(*a, None, sinks),
                }
            if key_heads < heads and kind == "equal":
                forms["cuDNN, sinks"] = lambda a=given: attention.packed_attention(*a, None, sinks, equal_rows=True)
            if kind == "packed":
                forms["ours, longest 2048"] = lambda a=(q, k, v, cu, 2048, size**-0.5, None): (
                    attention.packed_attention(*a)
                )
            for form, forward in forms.items():
                try:
                    note(
                        f"{key} {form} fwd, bwd us",
                        (round(microseconds(forward)), round(microseconds(backward_of(forward)))),
                    )
                except Exception as error:
                    note(f"{key} {form} FAILED", str(error).splitlines()[0][:120])
            if kind == "equal":
                forward = partial(attention.equal_rows_attention, q, k, v, len(rows), size**-0.5)
                try:
                    note(
                        f"{key} cuDNN fwd, bwd us",
                        (round(microseconds(forward)), round(microseconds(backward_of(forward)))),
                    )
                except Exception as error:
                    note(f"{key} cuDNN FAILED", str(error).splitlines()[0][:120])


def loss() -> None:
    """Time of the chunked cross-entropy by chunk."""
    for vocabulary, size, tokens in (
        (32000, 4096, 4096),
        (50432, 6144, 2048),
        (50304, 1024, 8192),
        (65024, 4544, 2048),
    ):
        hidden = torch.randn(tokens, size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocabulary, size, device=DEVICE, dtype=torch.bfloat16) * 0.02
        targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
        for chunk in (256, 512, 1024, 2048, 4096):
            us = microseconds(
                lambda c=chunk, h=hidden, w=weight, t=targets: cross_entropy.linear_cross_entropy(
                    h, w, None, t, chunk=c
                )
            )
            note(f"loss {tokens} x {size} x {vocabulary}, chunk {chunk} ms", us / 1e3)


def dropping() -> None:
    """Time of the dropout kernel."""
    x = torch.ones(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    seed = torch.tensor(7, device=DEVICE)
    note("dropout us, 4096 x 4096", microseconds(lambda: dropout.drop(x, seed, 0.1)))


def bandwidth() -> None:
    """Copies to and from pinned memory, one way and both at once, and on the device."""
    size = 2**28
    device, host, other = (
        torch.empty(size, dtype=torch.uint8, device=DEVICE),
        *(torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)),
    )
    back = torch.empty_like(device)
    note("to host GB/s", size / microseconds(lambda: host.copy_(device, non_blocking=True)) / 1e3)
    note("to device GB/s", size / microseconds(lambda: device.copy_(host, non_blocking=True)) / 1e3)
    side = torch.cuda.Stream()

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            other.copy_(back, non_blocking=True)
        device.copy_(host, non_blocking=True)
        torch.cuda.current_stream().wait_stream(side)

    note("both ways GB/s each", size / microseconds(both) / 1e3)
    note("on device TB/s, read + write", 2 * size / microseconds(lambda: back.copy_(device)) / 1e6)


PARTS = {
    "dequantise": (dequantise, 150),
    "linear": (linear_time, 150),
    "host": (host_cost, 60),
    "attention": (attend, 150),
    "loss": (loss, 60),
    "dropout": (dropping, 60),
    "bandwidth": (bandwidth, 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--json", default="step_kernels.json")
    arguments = parser.parse_args()

    def too_long(*_: object) -> None:
        raise TimeoutError("this part took too long")

    signal.signal(signal.SIGALRM, too_long)
    torch.manual_seed(0)
    for name in arguments.part or PARTS:
        function, limit_seconds = PARTS[name]
        signal.alarm(limit_seconds)
        started = time.time()
        try:
            function()
        except Exception as error:
            traceback.print_exc()
            note(f"PART {name} FAILED", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        signal.alarm(0)
        RESULTS[f"part {name} seconds"] = round(time.time() - started, 1)
        torch.cuda.empty_cache()
        RESULTS["device"] = torch.cuda.get_device_name()
        RESULTS["torch"] = torch.__version__
        Path(arguments.json).write_text(json.dumps(RESULTS, indent=1, default=str))
    print("\n" + "\n".join(f"{name:<75} {value}" for name, value in TABLE))


if __name__ == "__main__":
    main()
