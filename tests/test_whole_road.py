"""GSM8K through all five commands: prepare, train 50 steps, generate, merge, inspect; the merged model agrees."""

import json

import pytest
import torch

from qlora_cli.artifacts import METRICS, find_run_record
from qlora_cli.cli import app as commands
from tests.conftest import SHARED_DATA, write_model

ROWS, TOKENIZER = SHARED_DATA / "gsm8k_train.jsonl", SHARED_DATA / "gpt-neox-tokenizer.json"
QUESTION = "Tom has 3 boxes of 12 pencils. How many pencils does he have?"

pytestmark = pytest.mark.skipif(not ROWS.is_file() or not TOKENIZER.is_file(), reason="GSM8K is not on this machine")


@pytest.fixture
def qlora(tmp_path, monkeypatch, capsys):
    """`qlora(line)`: the JSON result of a command that has to succeed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))

    def run(line, *more):
        capsys.readouterr()
        code = commands.main([*line.split(), *more, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


def test_gsm8k_from_rows_to_merged_model(qlora, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    from qlora_cli.core.prompts.formatting import Formatting, format_prompt

    write_model(tmp_path / "base", "gpt_neox", vocab_size=50432)
    PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), eos_token="<|endoftext|>").save_pretrained(tmp_path / "base")

    prepared = qlora(f"prepare --model base --data {ROWS} --limit 400 --max-length 384 --output prepared")
    assert prepared["rows"] == 400

    trained = qlora(
        "train --model base --prepared prepared --output run --max-steps 50 --batch-size 4 "
        "--gradient-accumulation-steps 1 --learning-rate 5e-3"
    )
    assert trained["steps"] == 50
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3

    answered = qlora("generate --adapter run --temperature 0 --max-new-tokens 24", QUESTION)["answers"][0]
    assert answered["new_tokens"] > 0

    merged = qlora("merge --adapter run --output merged")
    assert merged["verification"]["kl_mean"] < 1e-5

    tokenizer = AutoTokenizer.from_pretrained("merged")
    model = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    formatting = Formatting.from_dict(find_run_record(tmp_path / "run")["formatting"])
    ids = torch.tensor([format_prompt(QUESTION, formatting, tokenizer)])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip() == answered["answer"].strip()

    facts = qlora("inspect --adapter run")
    assert facts["trainable_parameters"] == trained["trainable_parameters"]
    assert qlora("inspect --prepared prepared")["rows"] == 400
