"""Prompt look-up: how often a real model's answers let it guess, and what steps with guesses bring at a real size.

    python benchmarks/decode_lookup.py record --model demo/smollm2 --answers answers.json      # any machine, minutes on a CPU
    python benchmarks/decode_lookup.py replay --architecture llama3-8b --answers answers.json  # GPU
    python benchmarks/decode_lookup.py same --architecture llama3-8b                           # GPU: logits and answers, on and off

`record` has a small instruction-tuned model answer questions that ask for parts of a text, and some that do not, greedily, with
look-up and without, and keeps the token ids. `replay` decodes a random model of a real shape that is made to choose those
tokens: each step computes all that it always does, and what is guessed rightly is what was in the real answers.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TEXT = (
    "The library of the harbour town opens at nine in the morning and closes at six in the evening, except on Thursdays, when it "
    "stays open until eight. Borrowed books may be kept for four weeks. A fine of twenty cents is due for each day that a book is "
    "late, and never more than five euros. Children under twelve need a card signed by a parent. The reading room on the second "
    "floor has forty seats, twelve of them with a lamp and a socket. In July 2019 the roof was repaired and the old maps were moved "
    "to the cellar, where they can be seen on request."
)
CODE = """def read_rows(path, limit):
    rows = []
    with open(path) as file:
        for number, line in enumerate(file):
            if number == limit:
                break
            rows.append(json.loads(line))
    return rows
"""
QUOTING = [
    f"Repeat the following text word for word:\n\n{TEXT}",
    f"{TEXT}\n\nQuote the sentences of this text that speak of books.",
    f"{TEXT}\n\nQuote the sentences of this text that speak of the reading room and the roof.",
    f"{TEXT}\n\nWrite this text once more, with each sentence on a line of its own.",
    f"{TEXT}\n\nWhen does the library open and close, and how long may books be kept? Answer in the words of the text.",
    f"Write this function again with the argument `limit` renamed to `most`:\n\n```python\n{CODE}```",
    f"Add a docstring to this function and show all of it:\n\n```python\n{CODE}```",
    f"{TEXT}\n\nSummarise this text in three sentences.",
]
OTHER = [
    "What is the capital of France, and what is it known for?",
    "Write a short story about a fox who learns to swim.",
    "Explain to a child why the sky is blue.",
    "Give five tips for a good night's sleep.",
]


def record(arguments: argparse.Namespace) -> None:
    """Answers of the real model, and how they were guessed."""
    from qlora_cli.core.generation.requests import Request
    from qlora_cli.core.generation.session import GenerationSession
    from qlora_cli.core.models.files import resolve_model
    from qlora_cli.settings.generation import GenerationSettings

    found = []
    sessions = {}
    for way in ("off", "on"):
        settings = GenerationSettings(temperature=0.0, seed=0, prompt_lookup=way, quant_type="none")
        files = resolve_model(arguments.model)
        sessions[way] = GenerationSession(settings, lambda event: None, files=files)
        sessions[way].select(None)
    for kind, prompts in (("quotes", QUOTING), ("other", OTHER)):
        for prompt in prompts:
            line: dict = {"kind": kind, "prompt": prompt}
            for way, session in sessions.items():
                ids = session.request(0, prompt, None).ids
                started = time.perf_counter()
                (answer,) = session.answer([Request(0, ids, arguments.new)], session.end_ids(None))
                line[f"{way} seconds"] = time.perf_counter() - started
                line[f"{way} ids"] = list(answer.ids)
            decoder = sessions["on"].decoder
            line |= {"prompt ids": list(ids), "same": line.pop("on ids") == line["off ids"], "text": answer.text}
            line["guessed"] = [decoder.guessed_right, decoder.guessed_steps]
            decoder.guessed_right = decoder.guessed_steps = 0
            found.append(line)
            tokens = len(line["off ids"])
            print(
                f"{kind:7} {tokens:4d} tokens, guessed {line['guessed'][0]:4d} in {line['guessed'][1]:3d} steps, same {line['same']}, "
                f"{line['off seconds'] / line['on seconds']:.2f} times faster   {prompt[:40]!r} → {answer.text[:60]!r}",
                flush=True,
            )
            arguments.answers.write_text(json.dumps(found))


def build_model(name: str, device: str):
    """A random 4-bit model of that shape with an adapter, as decode_speed.py has it."""
    from decode_speed import Bench

    return Bench(name, device)


def open_session(bench, way: str, session=None):
    """A session over the model with look-up or without; both share what is fused."""
    from decode_speed import Words

    from qlora_cli.core.generation.session import GenerationSession
    from qlora_cli.settings.generation import GenerationSettings

    settings = GenerationSettings(temperature=0.0, seed=0, prompt_lookup=way)
    made = GenerationSession(settings, print, model=bench.model, tokenizer=Words())
    if session is not None:
        made._fast = session._fast
    return made


def replay(arguments: argparse.Namespace) -> None:
    """Seconds of recorded answers, token by token and with guesses."""
    import torch

    from qlora_cli.core.decoding import decoder as decoding
    from qlora_cli.core.generation.requests import Request

    bench = build_model(arguments.architecture, arguments.device)
    script = torch.zeros(8192, dtype=torch.int64, device=arguments.device)  # token at each place of the row
    choose = decoding.choose_tokens
    place = torch.zeros(1, dtype=torch.int64, device=arguments.device)

    def scripted(logits, *rest):
        chosen = choose(logits, *rest)  # computed as ever
        return torch.where(chosen > 10**8, chosen, script[place + torch.arange(len(chosen), device=chosen.device) + 1])

    take = decoding.Decoder._take_step

    def placed(self, tokens, positions, mask):
        place.copy_(positions[:1])
        take(self, tokens, positions, mask)

    prefill = decoding.Decoder._prefill

    def prompted(self, numbers, prompts):
        place.fill_(len(prompts[0].ids) - 1)
        return prefill(self, numbers, prompts)

    decoding.choose_tokens, decoding.Decoder._take_step, decoding.Decoder._prefill = scripted, placed, prompted
    lines = json.loads(arguments.answers.read_text())
    sessions = {"off": open_session(bench, "off")}
    times: dict[str, list] = {"off": [], "on": []}
    for way in ("off", "on"):
        session = sessions.setdefault(way, open_session(bench, way, sessions["off"]))
        for line in lines:
            ids = [token % bench.vocabulary for token in line["prompt ids"]]
            answer = [token % bench.vocabulary for token in line["off ids"]]
            script.zero_()
            whole = torch.tensor([*ids, *answer])
            script[: len(whole)] = whole
            best, wanted = float("inf"), len(answer)
            for _ in range(4):  # captures and compiles first
                bench.wait()
                started = time.perf_counter()
                (found,) = session.answer([Request(0, ids, wanted)], [10**9])
                bench.wait()
                best = min(best, time.perf_counter() - started)
            assert list(found.ids) == answer, "not what was written down"
            times[way].append(best)
        decoder = session.decoder
        bench.note(f"look-up {way}, path", session.path)
        if decoder.guessed_steps:
            bench.note("guessed rightly a step of several", decoder.guessed_right / decoder.guessed_steps)
    for kind in dict.fromkeys(line["kind"] for line in lines):
        chosen = [n for n, line in enumerate(lines) if line["kind"] == kind]
        tokens = sum(len(lines[n]["off ids"]) for n in chosen)
        speeds = {way: tokens / sum(times[way][n] for n in chosen) for way in times}
        ratios = [times["off"][n] / times["on"][n] for n in chosen]
        bench.note(f"{kind}: tok/s without and with", f"{speeds['off']:.1f} {speeds['on']:.1f}")
        bench.note(
            f"{kind}: times faster, all, median, least",
            f"{speeds['on'] / speeds['off']:.3f} {statistics.median(ratios):.3f} {min(ratios):.3f}",
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"figures": bench.figures, "times": times}, indent=1))


def same(arguments: argparse.Namespace) -> None:
    """Whether steps of several tokens give the bits of steps of one, the time of each, and whether answers are equal."""
    from qlora_cli.core.decoding.decoder import Prompt
    from qlora_cli.core.generation.requests import Request

    bench = build_model(arguments.architecture, arguments.device)
    prompts = bench.prompts(3, 64)
    sessions, answers = {}, {}
    for way in ("off", "on"):
        session = sessions[way] = open_session(bench, way, sessions.get("off"))
        for attempt in range(3):
            bench.wait()
            started = time.perf_counter()
            answers[way] = [
                list(a.ids) for ids in prompts for a in session.answer([Request(0, ids + ids, arguments.new)], [10**9])
            ]
            bench.wait()
            if attempt == 2:
                bench.note(f"{way}, tok/s", len(prompts) * arguments.new / (time.perf_counter() - started))
        bench.note(f"{way}, path", session.path)
    bench.note("answers equal", answers["off"] == answers["on"])
    decoder = sessions["on"].decoder
    bench.note("guesses rightly, steps of several", f"{decoder.guessed_right} {decoder.guessed_steps}")
    fast = getattr(decoder, "fast", None)
    bench.note("a step of several gives", str(getattr(fast, "guesses", "not fused")))
    for width in (1, 8):
        decoder.reset()
        decoder.prefill([0], [Prompt(prompts[0])])
        decoder._choose_width = lambda width=width: width
        for _ in range(3):
            decoder.step()
        bench.wait()
        started = time.perf_counter()
        for _ in range(20):
            decoder.filled = [100]
            pending = decoder.step()
        pending.wait()
        bench.wait()
        bench.note(f"step of {width}, look-up on, ms", (time.perf_counter() - started) / 20 * 1e3)
    bench.note("step of 1, look-up off, ms", bench.step_seconds(sessions["off"].decoder) * 1e3)
    if arguments.json:
        arguments.json.write_text(json.dumps(bench.figures, indent=1))


def main() -> None:
    """Runs one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("record", "replay", "same"))
    parser.add_argument("--model", help="real model to record")
    parser.add_argument("--architecture", default="llama3-8b")
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--new", type=int, default=160, help="longest answer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    {"record": record, "replay": replay, "same": same}[arguments.part](arguments)


if __name__ == "__main__":
    main()
