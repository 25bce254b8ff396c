"""A base that streams from host memory against the same base on the card: speed, memory, and whether it learns the same.

    python benchmarks/streaming.py --run neox --run llama-70b --json streaming.json

Each run is a process of its own with a time limit. The base is random, in 4 bits, built on the card, every layer with
weights of its own. First it is whole on the card and takes as much of it as it likes; then its layers wait on the host,
as many as the planner says for the limit, PyTorch's allocator is held to that limit, and the same rows are trained.
Before that the gradients of one micro-batch are compared: whole, whole once more, and streamed. Steps are of four rows
of 2,048 random ids, all trained; figures are of the median step.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step_engine import profile_of, run_apart
from support.models import ALL16, QKV8, make_config

GIB = 2**30
OPTIMIZER = "paged_adamw_8bit"
# What is tried of the whole base, under the measures that the streamed one takes and as it likes, and of the streamed one,
# also looked into, and also multiplied in 8 bits.
WAYS = ["gradients", "same", "free", "streamed", "profile", "fp8"]


class Setting(NamedTuple):
    """What is trained, and within how much of the card."""

    architecture: str
    adapter: dict
    limit_gib: float | None
    rows: int  # of a step
    tokens: int  # of a row


RUNS = {
    "neox": Setting("neox-20b", QKV8, 4.0, 4, 2048),
    "llama-70b": Setting("llama-70b", ALL16, 10.0, 4, 2048),
    "tiny": Setting("tiny-llama", ALL16, 1.5, 4, 64),
}


def plan_of(setting: Setting, compiled: bool, **asked):
    """What `qlora inspect` plans for it."""
    import torch

    from qlora_cli.core.planning.model_profile import profile_model
    from qlora_cli.core.planning.planner import RowLengths, plan_training
    from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings

    architecture, adapter, limit_gib, rows, tokens = setting
    lora = LoraSettings(alpha=32, **adapter)
    profile = profile_model(make_config(architecture), lora, QuantizationSettings(), compute_dtype=torch.bfloat16)
    settings = StepSettings(
        batch_size=rows, gradient_accumulation_steps=1, optimizer=OPTIMIZER, compile=compiled, **asked
    )
    return plan_training(profile, settings, RowLengths(tokens), vram_bytes=int(limit_gib * GIB) if limit_gib else None)


class Bench:
    """One model and its steps."""

    def __init__(self, setting: Setting, device: str, steps: int, compiled: bool, matmul: str = "bf16") -> None:
        import torch
        from support.models import build
        from support.random_base import build_base

        from qlora_cli.core.adapters.lora import attach_adapter
        from qlora_cli.core.models.quantization import freeze_base
        from qlora_cli.core.training.flat_parameters import TrainableParameters
        from qlora_cli.core.training.optimizer import build_optimizer, set_learning_rate
        from qlora_cli.settings.groups import LoraSettings

        architecture, adapter, _, self.rows, self.tokens = setting
        self.device, self.steps, self.compiled, self.matmul = torch.device(device), steps, compiled, matmul
        self.cuda = device == "cuda"
        config = make_config(architecture)
        if config.tie_word_embeddings or hasattr(config, "num_experts") or hasattr(config, "num_local_experts"):
            self.base = build(architecture, device)
        else:
            self.base = freeze_base(build_base(config, torch.bfloat16, self.device, apart=True))
        self.model = attach_adapter(self.base, LoraSettings(alpha=32, **adapter)).train()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter_name, parameter in self.model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0, 0.01)
        self.parameters = TrainableParameters(self.model)
        self.optimizer = build_optimizer(OPTIMIZER if self.cuda else "adamw", self.parameters, weight_decay=0.0)
        set_learning_rate(self.optimizer, 1e-5)

    def wait(self) -> None:
        """Until the card is done."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    def batches(self, tokens: int, seed: int) -> list:
        """The micro-batches of one step, of at most so many tokens each."""
        import numpy as np

        from qlora_cli.core.data.packing import collate

        random = np.random.default_rng(seed)
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        rows = [(random.integers(5, vocabulary, self.tokens).astype(np.int32), np.ones(self.tokens, dtype=bool))]
        rows *= self.rows
        at_once = max(1, tokens // self.tokens)
        made = [collate(rows[i : i + at_once], range(len(rows[i : i + at_once]))) for i in range(0, self.rows, at_once)]
        return [batch.pin() if self.cuda else batch for batch in made]

    def install(self, tokens: int, **asked):
        """An engine for micro-batches of so many tokens; it makes no graphs, so that both ways are alike."""
        import torch

        from qlora_cli.core.engine.engine import install_engine
        from qlora_cli.core.training.optimizer import allocated_state_bytes
        from qlora_cli.settings.groups import StepSettings

        if self.cuda:
            torch.cuda.empty_cache()
        return install_engine(
            self.model,
            StepSettings(**{"resident_weights": False, "compile": self.compiled, "matmul": self.matmul, **asked}),
            device=self.device,
            compute_dtype=torch.bfloat16,
            max_tokens=tokens,
            total_steps=4,
            # Gradients are there already, which `qlora train` allocates later.
            optimizer_bytes=allocated_state_bytes(OPTIMIZER, self.parameters.elements) - 4 * self.parameters.elements,
            report=lambda event: print("   ", event.text, flush=True),
        )

    def gradients(self, engine, tokens: int):
        """Loss and gradients of one micro-batch."""
        import torch

        torch.manual_seed(3)  # dropout's
        self.parameters.zero_gradients()
        batch = self.batches(tokens, 0)[0]
        loss = engine.loss(batch)
        (loss / batch.trained_tokens).backward()
        found = torch.cat([p.grad.flatten().float() for p in self.model.parameters() if p.requires_grad]).cpu()
        self.parameters.zero_gradients()
        return float(loss.detach()), found

    def train(self, engine, tokens: int) -> dict:
        """Seconds and memory of steps."""
        import torch

        from qlora_cli.core.device import count_retries
        from qlora_cli.core.training.optimizer import step_optimizer

        seconds, issued, losses, retries = [], [], [], []
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        batches = self.batches(tokens, 0)
        ready = engine.prepare(batches[0])  # as the trainer has it ready, while the step before computes
        for number in range(1 + self.steps):
            following = self.batches(tokens, number + 1)
            self.wait()
            started, retried = time.perf_counter(), count_retries(self.device)
            for batch in batches:
                while True:
                    try:
                        loss = engine.loss(ready or engine.prepare(batch))
                        (loss / batch.trained_tokens).backward()
                        break
                    except torch.OutOfMemoryError:
                        loss = None
                        if not engine.reduce_memory():
                            raise
                    finally:
                        ready = None
            issued.append(time.perf_counter() - started)  # close to the step's time where the host decides it
            step_optimizer(self.optimizer)
            self.parameters.zero_gradients()
            trained, batches, ready = batch.trained_tokens, following, engine.prepare(following[0])
            self.wait()
            seconds.append(time.perf_counter() - started)
            losses.append(float(loss.detach()) / trained)
            retries.append(count_retries(self.device) - retried)  # each waits for the device
            print(f"    step {number}: {seconds[-1]:.3f} s", flush=True)
        return {
            "tok_s": self.rows * self.tokens / statistics.median(seconds[1:] or seconds),
            "step_s": [round(each, 3) for each in seconds],
            "issued_s": [round(each, 3) for each in issued],
            "losses": losses,
            "allocator_retries": retries,
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if self.cuda else 0.0,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB if self.cuda else 0.0,
            "engine": engine.describe(),
            "predicted_tok_s": self.predicted(engine, tokens),
        }

    def differentiate(self, engine, batch, after_loss=lambda: None) -> None:
        """Forward and backward pass of a micro-batch."""
        loss = engine.loss(engine.prepare(batch))
        after_loss()
        (loss / batch.trained_tokens).backward()
        self.parameters.zero_gradients()

    def moments(self, engine, tokens: int) -> list[tuple[str, float, float]]:
        """(moment, GiB allocated at its end, most of it) of one micro-batch, those of the middle layers left out."""
        import torch

        from qlora_cli.core.engine.decoder_layers import find_layers
        from qlora_cli.core.models.structure import find_decoder

        found: list[tuple[str, float, float]] = []

        def mark(name: str) -> None:
            found.append((name, torch.cuda.memory_allocated() / GIB, torch.cuda.max_memory_allocated() / GIB))
            torch.cuda.reset_peak_memory_stats()

        def after(number: int, output) -> None:
            mark(f"forward {number}")
            output = output[0] if isinstance(output, tuple) else output
            output.register_hook(lambda _: mark(f"gradient of {number}'s output"))

        layers = find_layers(find_decoder(self.base))
        hooks = [
            layer.register_forward_hook(lambda _, __, output, number=number: after(number, output))
            for number, layer in enumerate(layers)
        ]
        torch.cuda.reset_peak_memory_stats()
        self.differentiate(engine, self.batches(tokens, 0)[0], after_loss=lambda: mark("loss"))
        mark("backward 0")
        for hook in hooks:
            hook.remove()
        kept = [i for i in range(len(found)) if i < 3 or i > len(found) - 3 or abs(i - len(layers)) < 5]
        return [(found[i][0], round(found[i][1], 3), round(found[i][2], 3)) for i in kept]

    def predicted(self, engine, tokens: int) -> float | None:
        """Tokens a second by what the engine measured of one layer and of the link, the optimizer left out."""
        planner = engine.planner
        return tokens / engine.plan.micro_batch_seconds(planner.needs) if planner is not None else None


def difference(first: tuple, second: tuple) -> dict:
    """How far losses and gradients of two passes are apart."""
    norm = float(first[1].norm())
    return {"loss": abs(first[0] - second[0]), "gradients": float((first[1] - second[1]).norm()) / norm}


def run(name: str, steps: int, device: str, compiled: bool, ways: list[str], matmul: str) -> dict:
    """Some ways of one model, or all of them."""
    import torch

    from qlora_cli.core.device import CONTEXT_BYTES, limit_memory
    from qlora_cli.core.engine.decoder_layers import find_layers
    from qlora_cli.core.engine.offload import link_bytes_per_second
    from qlora_cli.core.models.structure import find_decoder
    from qlora_cli.core.streaming.streamed_base import stream_base

    started, cuda = time.time(), device == "cuda"

    def say(what: object) -> None:
        print(f"    {time.time() - started:6.1f} s  {what}", flush=True)

    limit_gib = RUNS[name].limit_gib
    plan = plan_of(RUNS[name], compiled, matmul=matmul, **({} if cuda else {"stream": True}))
    measures, tokens = plan.measures, plan.token_budget
    result: dict = {"run": name, "limit_gib": limit_gib, "plan": str(measures), "micro_batch_tokens": tokens}
    say(result)
    if cuda:  # before the first allocation: segments that can grow
        limit_memory(torch.device("cuda", 0), torch.cuda.get_device_properties(0).total_memory)
    bench = Bench(RUNS[name], device, steps, compiled, matmul)
    result["link_gb_s"] = link_bytes_per_second(bench.device) / 1e9 if cuda else 0.0
    say(f"built; link {result['link_gb_s']:.1f} GB/s")
    same = {
        "gradient_checkpointing": "on",
        "offload_activations": measures.offload_activations and cuda,
        "offload_embeddings": measures.offload_embeddings,
    }
    kept = (p for p in bench.model.parameters() if p.requires_grad and "gradients" in ways)
    start = [parameter.detach().to("cpu", copy=True) for parameter in kept]  # not on the card, whose memory is measured
    all_tokens = bench.rows * bench.tokens
    whole: list[tuple] = []
    if "same" in ways or "gradients" in ways:
        engine = bench.install(tokens, **same)
        if "gradients" in ways:
            whole = [bench.gradients(engine, tokens) for _ in range(2)]
            result["two equal passes"] = difference(*whole)
        if "same" in ways:
            result["whole, same measures"] = bench.train(engine, tokens)
            say(result["whole, same measures"])
        engine.close()
    if "free" in ways:
        engine = bench.install(all_tokens)
        result["whole, free"] = bench.train(engine, all_tokens)
        engine.close()
        say(result["whole, free"])
    if "streamed" not in ways:
        return result
    engine = None  # it holds the weights it computed with
    gc.collect()
    before = time.time()
    layers = find_layers(find_decoder(bench.base))
    streamed = stream_base(
        bench.base, layers, bench.device, streamed=measures.streamed, report=lambda event: say(event.text)
    )
    result["locking_s"] = time.time() - before
    say(f"{streamed.describe()}, {streamed.layer_bytes / 2**20:.0f} MiB each, after {result['locking_s']:.1f} s")
    if cuda:
        torch.cuda.empty_cache()
        limit_memory(bench.device, int(limit_gib * GIB) - CONTEXT_BYTES)
        say(
            f"PyTorch is held to {limit_gib - 1:.2f} GiB, of which {torch.cuda.memory_allocated() / GIB:.2f} are in use"
        )
    engine = bench.install(tokens)
    say("installed")
    result["streams"] = bench.train(engine, tokens)
    say(result["streams"])
    if cuda:
        result["needs"] = {name: str(value) for name, value in vars(engine.planner.needs).items()}
    if cuda and "profile" in ways:
        try:
            result["moments"] = bench.moments(engine, tokens)
            batches = bench.batches(tokens, 0)[:1]
            result |= profile_of(lambda batch: bench.differentiate(engine, batch), batches)
        except RuntimeError as error:  # such as no memory: what was measured is of interest all the same
            result["moments"] = str(error)[:300]
    engine.close()
    if "fp8" in ways:
        bench.matmul, engine = "fp8", None
        gc.collect()
        engine = bench.install(tokens)
        result["streams, in 8 bits"] = bench.train(engine, tokens)
        say(result["streams, in 8 bits"])
        engine.close()
        bench.matmul = matmul
    if whole:
        with torch.no_grad():
            for parameter, value in zip((p for p in bench.model.parameters() if p.requires_grad), start, strict=True):
                parameter.copy_(value)
        engine = bench.install(tokens, **same)
        result["streamed and whole"] = difference(whole[0], bench.gradients(engine, tokens))
        engine.close()
    step_s = statistics.median(result["streams"]["step_s"][1:])
    if cuda:
        copied = 2 * streamed.copied_bytes * (all_tokens // tokens)
        result["copies_share_of_step"] = copied / 1e9 / result["link_gb_s"] / step_s
    result["predicted_peak_gib"] = plan.memory.peak_bytes / GIB if plan.memory else None
    for way in ("whole, same measures", "whole, free"):
        if way in result:
            result[f"ratio to {way}"] = result["streams"]["tok_s"] / result[way]["tok_s"]
    return result


def main() -> None:
    """Runs the chosen models one after another and prints what decides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", choices=RUNS)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--limit-s", type=int, default=150)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--matmul", default="bf16")
    parser.add_argument("--way", action="append", choices=WAYS, help="all but fp8, if none is named")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, default=Path("streaming.json"))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        options = (arguments.steps, arguments.device, arguments.compile, arguments.way or WAYS[:-1], arguments.matmul)
        print("RESULT " + json.dumps(run(arguments.inside, *options)), flush=True)
        return
    flags = ["--steps", arguments.steps, "--device", arguments.device, "--matmul", arguments.matmul]
    flags += ["--compile"] * arguments.compile + [f"--way={way}" for way in arguments.way or ()]
    results = []
    for name in arguments.run or [n for n in RUNS if n != "tiny"]:
        command = [sys.executable, __file__, "--inside", name, *map(str, flags)]
        results.append(run_apart(name, command, arguments.limit_s))
        arguments.json.write_text(json.dumps(results, indent=1))
    for result in results:
        result.pop("kernels", None)
        print(f"\n{result['run']}:", result.get("error", ""))
        for key, value in result.items():
            print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
