"""Answers on the CPU against transformers' own generate: processor seconds of the same greedy tokens.

    python benchmarks/decode_cpu.py

Processor time, not wall time, so that other work on the machine does not count. Small random models in float32, an
adapter of rank 8, 24 new tokens after 32, one thread, medians of five.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.generate import generate_greedily

NEW, PROMPT, NEVER = 24, 32, 10**6
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
CASES = [("llama", {}), ("gpt_neox", {}), ("llama", {**WIDE, "num_key_value_heads": 8})]


def main() -> None:
    """Prints a line a case."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import torch

    from qlora_cli.core.adapters.lora import attach_adapter
    from qlora_cli.core.generation.requests import Request
    from qlora_cli.core.generation.session import GenerationSession
    from qlora_cli.core.models.files import resolve_model
    from qlora_cli.core.models.loading import load_base
    from qlora_cli.settings.generation import GenerationSettings
    from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
    from tests.conftest import make_tokenizer, write_model

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="decode_cpu."))
    for number, (architecture, changes) in enumerate(CASES):
        directory = write_model(work / str(number), architecture, **changes)

        def load(directory=directory):
            options = {"compute_dtype": torch.float32, "device": torch.device("cpu")}
            return attach_adapter(
                load_base(resolve_model(str(directory)), QuantizationSettings(base_cache=False), **options)[0],
                LoraSettings(rank=8, alpha=16),
            ).eval()

        for rows in (1, 8):
            ids = torch.randint(5, 380, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
            theirs, ours = load().get_base_model(), load()
            settings = GenerationSettings(temperature=0.0, seed=0, batch_size=rows)
            session = GenerationSession(settings, print, model=ours, tokenizer=make_tokenizer())
            requests = [Request(i, row, NEW) for i, row in enumerate(ids.tolist())]

            def transformers_seconds(theirs=theirs, ids=ids):
                started = time.process_time()
                generate_greedily(theirs, ids, new_tokens=NEW)
                return time.process_time() - started

            def own_seconds(session=session, requests=requests):
                started = time.process_time()
                list(session.answer(requests, [NEVER]))
                return time.process_time() - started

            transformers_seconds(), own_seconds()
            a = statistics.median(transformers_seconds() for _ in range(5))
            b = statistics.median(own_seconds() for _ in range(5))
            width = changes.get("hidden_size", 64)
            print(f"{architecture} {width} batch {rows}: transformers {a:.3f} s, own {b:.3f} s, {a / b:.2f} times")


if __name__ == "__main__":
    main()
