"""Products and rows of 4-bit experts: every way to compute them, checked and timed at the sizes of real layers.

    python benchmarks/experts_speed.py --json experts_speed.json [--layer qwen3 --layer gpt-oss] [--part products ...]

Codes and constants are random bytes. Each part is a process of its own with a time limit. A product's floor is the larger
of its arithmetic at 790 TFLOP/s and the bytes it must move at 4.27 TB/s (packed weights once, rows in, rows out);
in 8 bits, of twice that arithmetic and the bytes that it and its unpacking each move. On the
CPU, under Triton's interpreter, `--layer tiny` shows that it runs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# layer → (experts, choices, hidden, intermediate, tokens of a training step)
LAYERS = {
    "qwen3": (128, 8, 2048, 768, 4096),
    "gpt-oss": (32, 4, 2880, 2880, 4096),
    "tiny": (4, 2, 64, 64, 24),
}
FLOPS, BYTES = 790e12, 4.27e12  # what the card reached in products of matrices, and in copies
DENSE = [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 4)]
CODES = [(128, 256, 128, 8, 4, 64), (128, 256, 128, 8, 3, 64), (128, 256, 128, 8, 4, 0), (128, 128, 128, 4, 3, 0)]
UNPACKED = {False: [((128,), 4), ((256,), 8), ((64,), 8)], True: [((64, 4), 4), ((128, 2), 4), ((128, 1), 4)]}
PACKED = [(128, 128, 64, 8, 4), (256, 128, 64, 8, 3)]
FEW = [(16, 64, 128, 4, 4), (16, 32, 256, 4, 3)]
LANES = [(1, 4, 4), (2, 4, 4), (1, 8, 2), (1, 2, 8), (1, 4, 6)]
BATCHES = (1, 8, 64)


class Layer:
    """Random experts of one size, and tokens on their way to them."""

    def __init__(self, name: str, device: str) -> None:
        import torch

        from qlora_cli.core.experts.layout import ExpertWeight
        from qlora_cli.core.experts.stack import code_tables, empty_stack, nested_block_size
        from qlora_cli.kernels.weights import FrozenWeight

        self.device, self.cuda = device, device == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.experts, self.choices, self.hidden, self.inner, self.tokens = LAYERS[name]
        code, nested_code = code_tables("nf4", torch.device(device))
        self.weights = {}
        for stack, rows, columns in (("up", 2 * self.inner, self.hidden), ("down", self.hidden, self.inner)):
            layout = ExpertWeight(stack, self.experts, rows, columns, False, False, None)
            packed = empty_stack(layout, double_quant=True, device=torch.device(device))
            packed.codes.random_(0, 256), packed.absmax.random_(0, 256)
            packed.nested_absmax.uniform_(0.001, 0.002), packed.offset.fill_(0.05)
            self.weights[stack] = FrozenWeight(
                self.experts * rows,
                columns,
                None,
                packed.codes,
                packed.absmax,
                code,
                packed.nested_absmax,
                nested_code,
                packed.offset,
                64,
                nested_block_size(layout.elements),
            )

    def random(self, *shape: int):
        """Normal values in the compute dtype."""
        import torch

        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def routing(self, tokens: int):
        """Of tokens whose experts are drawn evenly."""
        import torch

        from qlora_cli.kernels.experts.routing import route

        ids = torch.rand(tokens, self.experts, device=self.device).topk(self.choices, dim=1).indices
        return ids, route(ids, self.experts)

    def seconds(self, run) -> float:
        """Median of a call, the caches as the last call left them; one call on the CPU."""
        import time

        if not self.cuda:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        import triton

        return triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median") / 1e3

    def floor(self, weight, rows: int, tokens: int, used: int) -> float:
        """Seconds that a product takes at the least, of which so many experts' matrices are read."""
        elements = weight.rows // self.experts * weight.columns
        moved = used * elements * 33 / 64 + 2 * rows * (weight.rows // self.experts) + 2 * tokens * weight.columns
        return max(2 * rows * elements / FLOPS, moved / BYTES)


def error_of(layer: Layer, found, x, weight, ends, backward: bool, codes=None) -> float:
    """Relative error of a product over a few experts, against float64; of `codes` over the weight's scales."""
    rows = weight.rows // layer.experts
    bounds = [0, *ends.tolist()]
    worst = 0.0
    for e in (0, layer.experts // 2, layer.experts - 1):
        if bounds[e] == bounds[e + 1]:
            continue
        if codes is None:
            values = weight.values(layer.dtype, e * rows, (e + 1) * rows).double()
            values = values if backward else values.T
        else:
            values = codes[e].double().T * weight.stack_scale[e]
        own = x[bounds[e] : bounds[e + 1]].double() @ values
        worst = max(worst, float((found[bounds[e] : bounds[e + 1]].double() - own).norm() / own.norm()))
    return worst


def products(layer: Layer) -> list[dict]:
    """Every way to compute the four products of a training step."""
    import torch

    from qlora_cli.kernels.experts.dense import multiply_dense
    from qlora_cli.kernels.experts.products import Tiling, multiply_packed
    from qlora_cli.kernels.grouped_mm import grouped_mm

    found = []
    _, routing = layer.routing(layer.tokens)
    rows = layer.tokens * layer.choices
    for stack, weight in layer.weights.items():
        height = weight.rows // layer.experts
        values = weight.values(layer.dtype)
        found.append({"what": f"dequantise {stack}", "us": 1e6 * layer.seconds(lambda w=weight: w.values(layer.dtype))})
        for backward in (False, True):
            x = layer.random(rows, height if backward else weight.columns)
            matrices = values.view(layer.experts, height, -1)
            matrices = matrices if backward else matrices.transpose(1, 2)
            out = torch.empty(rows, matrices.shape[2], dtype=layer.dtype, device=layer.device)
            floor = layer.floor(weight, rows, rows, layer.experts)

            def note(what: str, run, x=x, weight=weight, backward=backward, floor=floor, stack=stack) -> None:
                try:
                    error = error_of(layer, run(), x, weight, routing.ends, backward)
                    seconds = layer.seconds(run)
                except Exception as failure:
                    found.append({"what": what, "failed": str(failure).splitlines()[0][:120]})
                    return
                way = f"{stack} {'backward' if backward else 'forward'}: {what}"
                found.append({"what": way, "us": 1e6 * seconds, "floor_us": 1e6 * floor, "error": error})

            if layer.cuda:
                note("library alone", lambda x=x, m=matrices: grouped_mm(x, m, routing.ends))
            for tiling in DENSE if layer.cuda else [(32, 64, 64, 4, 2)]:

                def tiles(x=x, m=matrices, out=out, tiling=tiling):
                    multiply_dense(x, m, routing.ends, out, tiling=Tiling(*tiling))
                    return out

                note(f"tiles alone {tiling}", tiles)
            for tiling in PACKED if layer.cuda else [(32, 64, 64, 4, 2)]:

                def packed(x=x, w=weight, b=backward, tiling=tiling):
                    return multiply_packed(x, w, w.columns, routing.ends, backward=b, tiling=Tiling(*tiling))

                note(f"packed {tiling}", packed)
    return found


def codes(layer: Layer) -> list[dict]:
    """The four products of a training step in 8 bits, and what they are made of; errors are those of both roundings,
    and of the sums alone."""
    import torch

    from qlora_cli.kernels import float8
    from qlora_cli.kernels.experts.codes import unpack_stack
    from qlora_cli.kernels.experts.float8 import multiply_codes
    from qlora_cli.kernels.experts.products import Tiling

    found = []
    _, routing = layer.routing(layer.tokens)
    pairs, experts = layer.tokens * layer.choices, layer.experts

    def note(what: str, run, **more: float) -> None:
        found.append({"what": what, "us": 1e6 * layer.seconds(run), **more})

    for stack, plain in layer.weights.items():
        weight = float8.with_stack_scale(plain, experts)
        height, width = weight.rows // experts, weight.columns
        values = experts * height * width
        note(f"{stack} scales", lambda p=plain: float8.with_stack_scale(p, experts), floor_us=1e6 * values / 64 / BYTES)
        for backward in (False, True):
            way = f"{stack} {'backward' if backward else 'forward'}"
            matrices = unpack_stack(weight, experts, 0, experts, transposed=backward, by_table=False).clone()
            for how in (None, *UNPACKED[backward]) if layer.cuda else (None,):
                given = {"by_table": False} if how is None else {"by_table": True, "tile": how[0], "warps": how[1]}

                def unpack(w=weight, backward=backward, given=given):
                    return unpack_stack(w, experts, 0, experts, transposed=backward, **given)

                other = int((unpack().view(torch.uint8) != matrices.view(torch.uint8)).sum())
                assert other == 0, f"{other} codes of {way} differ, {how}"
                note(f"{way}: unpack {how or 'value by value'}", unpack, floor_us=1e6 * values * 1.52 / BYTES)
            gathered = routing if (stack == "up") != backward else None
            x = layer.random(layer.tokens if gathered else pairs, height if backward else width)
            rounded = float8.quantise_rows(x)
            moved = x.numel() * (1 + layer.dtype.itemsize)
            note(f"{way}: round rows", lambda x=x: float8.quantise_rows(x), floor_us=1e6 * moved / BYTES)
            out = torch.empty(pairs, matrices.shape[1], dtype=layer.dtype, device=layer.device)
            exact = rounded[0].double() * rounded[1]
            if gathered:
                x, exact = (each[routing.source.long() // layer.choices] for each in (x, exact))
            moved = values + pairs * 2 * matrices.shape[1] + rounded[0].numel()
            floor = 1e6 * max(2 * values / experts * pairs / (2 * FLOPS), moved / BYTES)
            for tiling in CODES if layer.cuda else [(32, 64, 64, 4, 2, 16)]:

                def multiply(rounded=rounded, m=matrices, s=weight.stack_scale, out=out, g=gathered, tiling=tiling):
                    multiply_codes(*rounded, m, s, routing.ends, out, gathered=g, tiling=Tiling(*tiling))
                    return out

                error = error_of(layer, multiply(), x, plain, routing.ends, backward)
                own = error_of(layer, out, exact, weight, routing.ends, backward, matrices)
                note(f"{way}: tiles {tiling}, sums {own:.1e}", multiply, floor_us=floor, error=error)
    return found


def few(layer: Layer) -> list[dict]:
    """Products of an answer's steps, of packed values."""
    from qlora_cli.kernels.experts.lanes import LaneTiling, multiply_lanes
    from qlora_cli.kernels.experts.products import Tiling, multiply_packed

    found = []

    def note(what, run, x, weight, routing, floor) -> None:
        error = error_of(layer, run(), x, weight, routing.ends, False)
        found.append({"what": what, "us": 1e6 * layer.seconds(run), "floor_us": 1e6 * floor, "error": error})

    for tokens in BATCHES if layer.cuda else (1, 3):
        _, routing = layer.routing(tokens)
        rows = tokens * layer.choices
        for stack, weight in layer.weights.items():
            x = layer.random(tokens if stack == "up" else rows, weight.columns)
            given = {"source": routing.source, "choices": layer.choices} if stack == "up" else {}
            spread = x[routing.source.long() // layer.choices] if stack == "up" else x
            floor = layer.floor(weight, rows, tokens, int((routing.ends.diff(prepend=routing.ends[:1] * 0) > 0).sum()))
            for tiling in FEW if layer.cuda else [(16, 64, 64, 4, 2)]:

                def run(x=x, w=weight, given=given, tiling=tiling, routing=routing):
                    return multiply_packed(x, w, w.columns, routing.ends, tiling=Tiling(*tiling), **given)

                note(f"batch {tokens} {stack} {tiling}", run, spread, weight, routing, floor)
            for tiling in LANES if layer.cuda else []:

                def by_lanes(x=x, w=weight, given=given, tiling=tiling, routing=routing):
                    how = LaneTiling(*tiling, registers=128 if tiling[1] * tiling[2] <= 16 else 80)
                    return multiply_lanes(x, w, w.columns, routing.ends, tiling=how, **given)

                note(f"batch {tokens} {stack} lanes {tiling}", by_lanes, spread, weight, routing, floor)
    return found


def rows(layer: Layer) -> list[dict]:
    """The launches around the products."""
    from qlora_cli.kernels.experts import rows as kernels
    from qlora_cli.kernels.experts.operands import Gate
    from qlora_cli.kernels.experts.routing import route

    ids, routing = layer.routing(layer.tokens)
    pairs = layer.tokens * layer.choices
    x, wide, thin = layer.random(layer.tokens, layer.hidden), *(layer.random(pairs, n * layer.inner) for n in (2, 1))
    full, weights = layer.random(pairs, layer.hidden), layer.random(layer.tokens, layer.choices)
    silu = Gate("silu")
    size = layer.dtype.itemsize * pairs
    ways = {
        "sort": (lambda: route(ids, layer.experts), 8 * pairs),
        "sort of one token": (lambda: route(ids[:1], layer.experts), 0),
        "expand": (lambda: kernels.expand(x, routing), size * layer.hidden),
        "join": (lambda: kernels.join(full, routing, weights), size * layer.hidden),
        "gate": (lambda: kernels.gate(wide, routing, silu), size * 3 * layer.inner),
        "gate backward": (
            lambda: kernels.gate_backward(thin, wide, routing, silu, weights),
            size * 5 * layer.inner,
        ),
    }
    return [
        {"what": name, "us": 1e6 * layer.seconds(run), "floor_us": 1e6 * moved / BYTES}
        for name, (run, moved) in ways.items()
    ]


PARTS = {"products": products, "codes": codes, "few": few, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", action="append", choices=list(LAYERS))
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit-s", type=int, default=120)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names, parts = arguments.layer or ["qwen3", "gpt-oss"], arguments.part or list(PARTS)
    if arguments.inside:
        print("RESULT " + json.dumps(PARTS[parts[0]](Layer(names[0], arguments.device))))
        return
    results = {}
    for name in names:
        for part in parts:
            command = [sys.executable, __file__, "--inside", "--layer", name, "--part", part]
            command += ["--device", arguments.device]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit_s)
                _, _, text = done.stdout.partition("RESULT ")
                found = json.loads(text) if text else [{"what": "failed", "failed": done.stderr[-1500:]}]
            except subprocess.TimeoutExpired:
                found = [{"what": "failed", "failed": f"longer than {arguments.limit_s} s"}]
            results[f"{name} {part}"] = found
            print(f"{name}, {part}")
            for row in found:
                if "failed" in row:
                    print(f"    {row['what']}: FAILED {row['failed']}")
                    continue
                floor, error = row.get("floor_us"), row.get("error")
                extra = f"  floor {floor:8.1f}" if floor is not None else ""
                extra += f"  error {error:.1e}" if error is not None else ""
                print(f"    {row['us']:9.1f} us{extra}  {row['what']}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
