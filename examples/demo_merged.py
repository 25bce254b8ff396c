"""A merged model, the run it came from, and questions in; greedy answers by plain transformers out, one JSON list.

    python examples/demo_merged.py MERGED RUN QUESTION...

The prompts are formatted as the run recorded; all else is what anyone does with a checkpoint of transformers.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.artifacts import read_run_record
from qlora_cli.core.templates import Formatting, format_prompt


def answer_all(merged: Path, run: Path, questions: list[str]) -> list[str]:
    """The greedy answers, each up to the end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    formatting = Formatting.from_dict(read_run_record(run)["formatting"])
    answers = []
    for question in questions:
        ids = torch.tensor([format_prompt(question, formatting, tokenizer)])  # (1, prompt) int64
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        answers.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


if __name__ == "__main__":
    print(json.dumps(answer_all(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])))
