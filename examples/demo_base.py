"""Small llama and its tokenizer, trained from scratch on Python's own help topics.

    python examples/demo_base.py DIRECTORY

Everything is made here: the tokenizer and the weights come from the text of `help()`, which ships with Python, so that
the demo needs neither network nor GPU nor a file in the repository.
"""

import pydoc_data.topics
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 1024
CONTEXT = 256
STEPS = 600
ROWS, ROW_TOKENS = 4, 128
LEARNING_RATE = 3e-3


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts, ending a text with `<|endoftext|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=CONTEXT)


def train_model(tokens: torch.Tensor, *, steps: int) -> LlamaForCausalLM:
    """A small llama trained on random windows of a text.

    Args:
        tokens: (length,) int64, the whole text.
        steps: Optimizer steps; the learning rate falls to zero over them.
    """
    torch.manual_seed(0)  # of the weights and the windows
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,  # 0.02, meant for wider models, needs twice the steps for the same loss
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - ROW_TOKENS, (ROWS,))
        rows = torch.stack([tokens[start : start + ROW_TOKENS] for start in starts])  # (ROWS, ROW_TOKENS)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{steps}: loss {loss.item():.2f}", flush=True)
    return model.eval()


def build_base(directory: Path, *, steps: int = STEPS) -> None:
    """Writes the model and its tokenizer as the hub would hold them."""
    texts = list(pydoc_data.topics.topics.values())
    tokenizer = train_tokenizer(texts)
    tokens = torch.tensor(tokenizer(END.join(texts), verbose=False)["input_ids"])
    print(f"{len(texts)} help topics, {len(tokens):,} tokens, a vocabulary of {VOCABULARY:,}")
    model = train_model(tokens, steps=steps)
    print(f"{model.num_parameters():,} parameters")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    build_base(Path(sys.argv[1]))
