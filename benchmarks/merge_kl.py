"""What each way to merge keeps of a fine-tune: a base trained here, an adapter overfit on it, a table of KL out.

    python benchmarks/merge_kl.py --work /tmp/merge_kl

A random base hides errors: its predictions hardly depend on its weights. So a GPT-NeoX base is trained on Python's own
help topics (they ship with Python) until its loss is low, and an adapter is trained with `qlora train` on other text
until it knows it by heart. KL is of the merged model against base + adapter, on the rows the adapter knows, nats a
token. On a CPU the trained model computes in bfloat16 and the merged one, whose weights are rounded as stated, in
float32; on a GPU both compute in their own dtype.
"""

import argparse
import importlib.util
import json
import pydoc_data.topics
import shutil
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from qlora_cli.commands.merge import merge
from qlora_cli.commands.train import train
from qlora_cli.config import MergeConfig, TrainConfig
from qlora_cli.events import Event

ROOT = Path(__file__).resolve().parents[1]
ROWS, ROW_TOKENS, LEARNING_RATE = 8, 128, 3e-3
WAYS = {
    "dequantized, bfloat16": {"dtype": "bfloat16", "base": "dequantized"},
    "dequantized, float16": {"dtype": "float16", "base": "dequantized"},
    "dequantized, float32": {"dtype": "float32", "base": "dequantized"},
    "original, bfloat16": {"dtype": "bfloat16", "base": "original"},
    "dequantized, then 4-bit again": {"dtype": "bfloat16", "base": "dequantized", "quantize": True},
}


def load_demo():
    """The tokenizer of examples/demo_base.py."""
    spec = importlib.util.spec_from_file_location("demo_base", ROOT / "examples" / "demo_base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_base(directory: Path, *, topics: int, steps: int, hidden: int, layers: int, device: str) -> float:
    """Trains a base on some help topics, many times over; returns its last loss."""
    demo = load_demo()
    texts = list(pydoc_data.topics.topics.values())
    tokenizer = demo.train_tokenizer(texts)
    tokens = torch.tensor(tokenizer(demo.END.join(texts[:topics]), verbose=False)["input_ids"])
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=demo.VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=256,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - ROW_TOKENS, (ROWS,))
        rows = torch.stack([tokens[start : start + ROW_TOKENS] for start in starts]).to(device)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"base, step {step}/{steps}: loss {loss.item():.3f}", flush=True)
    model.to("cpu", torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return loss.item()


def main() -> None:
    """Trains what is missing under --work, merges in every way, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--topics", type=int, default=6)
    parser.add_argument("--base-steps", type=int, default=1000)
    parser.add_argument("--adapter-steps", type=int, default=400)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base, run, merged = (arguments.work / name for name in ("base", "run", "merged"))
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tell(event: Event) -> None:
        text = getattr(event, "text", None)
        if text:
            print(f"  {text}")

    if not (base / "tokenizer.json").exists():
        shape = {"hidden": arguments.hidden, "layers": arguments.layers}
        loss = train_base(base, topics=arguments.topics, steps=arguments.base_steps, device=device, **shape)
        print(f"base: last loss {loss:.3f}")
    if not (run / "adapter_config.json").exists():
        rows = arguments.work / "rows.jsonl"
        texts = list(pydoc_data.topics.topics.values())[-20:]  # none the base was trained on
        pieces = [text[start : start + 400] for text in texts for start in range(0, min(len(text), 1600), 400)]
        rows.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces[:48]))
        config = TrainConfig(
            model=str(base),
            data=str(rows),
            output=str(run),
            compute_dtype="bfloat16",
            rank=32,
            alpha=64,
            max_steps=arguments.adapter_steps,
            batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=3e-3,
        )
        result = train(config, tell)
        print(f"adapter: last loss {result.final_loss:.3f}")
    table = {}
    for way, settings in WAYS.items():
        shutil.rmtree(merged, ignore_errors=True)
        config = MergeConfig(adapter=str(run), output=str(merged), verify=True, max_kl=100.0, **settings)
        table[way] = merge(config, lambda event: None).to_dict()["verification"]
        figures = table[way]
        print(
            f"{way:32s} KL {figures['kl_mean']:.2e} (largest {figures['kl_max']:.2e}), perplexity "
            f"{figures['reference_perplexity']:.4f} -> {figures['other_perplexity']:.4f}, same greedy choice "
            f"{100 * figures['greedy_agreement']:.2f} % of {figures['tokens']} tokens",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
