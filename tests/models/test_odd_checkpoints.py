"""Odd configurations, tokenizers and generation settings end in one sentence, or change nothing."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora_cli.commands.generate import generate
from qlora_cli.commands.inspect import inspect
from qlora_cli.commands.merge import merge
from qlora_cli.commands.train import train
from qlora_cli.config import GenerateConfig, InspectConfig, MergeConfig, TrainConfig
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import build_empty, has_position_table
from qlora_cli.errors import ModelError, UsageError
from qlora_cli.events import report_nothing
from qlora_cli.settings.groups import QuantizationSettings
from tests.commands.merge_case import make_case

GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "base_cache": False}


def edited(source, directory, file="config.json", **changes):
    """A copy of a checkpoint with other settings; None takes one out."""
    shutil.copytree(source, directory)
    path = directory / file
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "auto"},
        {"torch_dtype": "torch.bfloat16"},
        {"torch_dtype": {"": "bfloat16"}},
        {"dtype": 16},
        {"num_attention_heads": 0},
        {"hidden_size": 66},
        {"max_position_embeddings": "512"},
        {"vocab_size": -1},
        {"pad_token_id": 5000},
        {"hidden_act": "nope"},
        {"model_type": None},
    ],
    ids=str,
)
def test_a_broken_configuration_is_refused_in_a_sentence(tiny_model, tmp_path, changes):
    directory = edited(tiny_model("llama"), tmp_path / "model", **changes)
    with pytest.raises(ModelError):
        build_empty(resolve_model(str(directory)).config)


@pytest.mark.parametrize("changes", [{"architectures": None}, {"dtype": None}, {"dtype": "float64"}], ids=str)
def test_what_a_configuration_leaves_out_is_not_needed(tiny_model, tmp_path, changes):
    directory = edited(tiny_model("llama"), tmp_path / "model", **changes)
    assert type(build_empty(resolve_model(str(directory)).config)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("name", "arguments", "limited"),
    [
        ("GPT2Config", {"n_positions": 48}, True),
        ("GPTJConfig", {"n_positions": 48, "rotary_dim": 4}, True),
        ("CodeGenConfig", {"n_positions": 48, "rotary_dim": 4}, True),
        ("GPTBigCodeConfig", {"n_positions": 48}, True),
        ("GPTNeoConfig", {"max_position_embeddings": 48, "attention_types": [[["global"], 2]]}, True),
        ("OPTConfig", {"max_position_embeddings": 48, "ffn_dim": 32, "word_embed_proj_dim": 64}, True),
        ("MptConfig", {"max_seq_len": 48}, True),
        ("BloomConfig", {"seq_length": 48}, False),
        ("LlamaConfig", {"max_position_embeddings": 48}, False),
        ("GPTNeoXConfig", {"max_position_embeddings": 48}, False),
    ],
)
def test_positions_that_are_looked_up_in_a_table_end_with_it(name, arguments, limited):
    small = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, name)(**small, **arguments)
    assert has_position_table(config) is limited


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"The quick brown fox number {n}"}) + "\n" for n in range(4)))
    return str(path)


def test_a_tokenizer_larger_than_the_embeddings_is_refused_where_its_tokens_are_used(tiny_model, tmp_path, rows):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([f"<unused{n}>" for n in range(512 - len(tokenizer))] + ["fox"])
    tokenizer.save_pretrained(directory)
    config = TrainConfig(model=str(directory), data=rows, output=str(tmp_path / "out"), base_cache=False)
    with pytest.raises(ModelError, match=r"token 512 \('fox'\).* embeddings for 512"):
        train(config, report_nothing)
    with pytest.raises(ModelError, match=r"token 512 \('fox'\)"):
        generate(GenerateConfig(model=str(directory), **GREEDY), ["a fox"], report_nothing)
    assert generate(GenerateConfig(model=str(directory), **GREEDY), ["a dog"], report_nothing).answers


def test_training_past_a_table_of_positions_is_refused(tiny_model, tmp_path, rows):
    config = TrainConfig(model=str(tiny_model("gpt2")), data=rows, max_length=600, output=str(tmp_path / "out"))
    with pytest.raises(UsageError, match="600 is past the 512 positions"):
        train(config, report_nothing)


def test_float16_that_overflows_is_said(tiny_model, tmp_path, rows):
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 3e4
    weights["model.layers.0.mlp.up_proj.weight"] *= 30
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = TrainConfig(
        model=str(directory), data=rows, output=str(tmp_path / "out"), compute_dtype="float16", base_cache=False
    )
    with pytest.raises(ModelError, match="not a number in float16"):
        train(config, report_nothing)


SETTINGS_OF_A_MODEL = {
    "do_sample": True,
    "temperature": 0.9,
    "top_k": 5,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [5, 6, 7],
    "min_new_tokens": 3,
    "max_length": 12,
    "num_beams": 3,
    "num_return_sequences": 2,
    "bad_words_ids": [[200]],
    "forced_eos_token_id": 9,
    "cache_implementation": "static",
}


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_generation_settings_that_come_with_a_model_change_no_greedy_answer(tiny_model, tmp_path, engine):
    plain = tiny_model("llama")
    directory = edited(plain, tmp_path / "model", "generation_config.json", **SETTINGS_OF_A_MODEL)
    found = [
        generate(GenerateConfig(model=str(model), engine=engine, **GREEDY), ["The quick"], report_nothing).answers
        for model in (plain, directory)
    ]
    assert found[0] == found[1]


def test_end_marks_are_read_as_they_are_now_and_alone(tiny_model, tmp_path):
    """A copy of the quantised base that was kept before they were mended has none of its own; and what transformers
    refuses beside them (several answers of a greedy search) is for nothing here."""
    directory = edited(tiny_model("llama"), tmp_path / "model", "generation_config.json")
    config = GenerateConfig(model=str(directory), **{**GREEDY, "base_cache": True})
    whole = generate(config, ["The quick"], report_nothing).answers[0]
    settings = {"eos_token_id": list(range(2, 512)), "num_return_sequences": 2, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    ended = generate(config, ["The quick"], report_nothing).answers[0]
    assert (whole["finish"], ended["finish"], ended["new_tokens"]) == ("length", "end", 0)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda t: (t * 100).to(torch.int8), "is stored as I8"), (lambda t: t[:32], r"is \(32.*config.json makes it")],
    ids=["codes", "shape"],
)
def test_a_tensor_that_cannot_be_the_weight_is_refused_by_name(tiny_model, tmp_path, name, change, said):
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors[name]).clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    held = QuantizationSettings(base_cache=False)
    with pytest.raises(ModelError, match=f"{name} .*{said}"):
        load_base(resolve_model(str(directory)), held, compute_dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fp8", "weight_block_size": 128},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": "lm_head"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
    ],
    ids=str,
)
def test_a_quantisation_that_is_not_described_as_it_is_read_is_refused_by_name(tiny_model, tmp_path, settings):
    directory = edited(tiny_model("llama"), tmp_path / "model", quantization_config=settings)
    with pytest.raises(ModelError, match=f"{list(settings)[-1]} is .* in the quantization_config"):
        _ = resolve_model(str(directory)).weights


def test_a_head_that_the_configuration_ties_and_the_checkpoint_does_not_stays_its_own(
    tiny_model, tmp_path, monkeypatch
):
    """From the checkpoint, from the copy that is kept of the base, and merged; transformers 4 would tie it without a word."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    base = shutil.copytree(tiny_model("qwen2"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = head = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    counted = inspect(InspectConfig(model=str(base)), report_nothing)  # what memory is predicted from
    base_parameters = counted["total_parameters"] - counted["trainable_parameters"]
    assert base_parameters == sum(weight.numel() for weight in weights.values())
    for _ in range(2):
        events = []
        files = resolve_model(str(base), report=events.append)
        held = {"compute_dtype": torch.float32, "device": torch.device("cpu")}
        model, _ = load_base(files, QuantizationSettings(base_cache=True), **held)
        assert torch.equal(model.lm_head.weight, head)
        assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
        said = " ".join(getattr(event, "text", "") for event in events)
        assert "hold two that differ" in said
    assert "Using the quantised base" in said
    case = make_case(base, tmp_path, target_modules=["q_proj"])
    case.merge()
    assert json.loads((case.output / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(case.output / "model.safetensors")["lm_head.weight"], head)
    assert (case.merged_logits() - case.live).abs().max() < 2e-4


def test_a_model_with_code_of_its_own_is_trained_answers_and_is_merged_whole(tiny_model, tmp_path):
    base, rows = shutil.copytree(tiny_model("llama"), tmp_path / "base"), tmp_path / "rows.jsonl"
    config = json.loads((base / "config.json").read_text()) | {"model_type": "own", "architectures": ["Own"]}
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text()) | {"tokenizer_class": "OwnTokenizerFast"}
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name, code in {
        "configuration_own": "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'",
        "modeling_own": "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig",
        "tokenization_own": "from transformers import PreTrainedTokenizerFast\nfrom .pieces_own import NAMES\n"
        "class OwnTokenizerFast(PreTrainedTokenizerFast):\n    pass",
        "pieces_own": "NAMES = {'vocab_file': 'own.tiktoken', 'words': 'own_vocab_v1.txt'}",
        "of_the_user": "'not named by any setting'",
    }.items():
        (base / f"{name}.py").write_text(code)
    for name in ("own.tiktoken", "own_vocab_v1.txt", "tokenizer_notes.txt", "vocab.bak", "mine.model"):
        (base / name).write_text("a line")
    rows.write_text("".join(f'{{"text": "a fox {number}"}}\n' for number in range(8)))
    trusted = {"trust_remote_code": True, "model": str(base)}
    sizes = {"rank": 4, "max_steps": 1, "batch_size": 2, "max_length": 32, "init": "default", "base_cache": False}
    train(TrainConfig(data=str(rows), output=str(tmp_path / "run"), **trusted, **sizes), report_nothing)
    adapter = str(tmp_path / "run")
    assert generate(GenerateConfig(adapter=adapter, **trusted, **GREEDY), ["a fox"], report_nothing).answers
    merge(MergeConfig(adapter=adapter, output=str(tmp_path / "merged"), verify=False, **trusted), report_nothing)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert type(loaded).__name__ == "Own"
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert type(own).__name__ == "OwnTokenizerFast"
    for directory in (
        tmp_path / "run",
        tmp_path / "merged",
    ):  # what its code names, and nothing of the user's beside it
        names = {path.name for path in directory.iterdir()}
        assert names >= {"own.tiktoken", "own_vocab_v1.txt", "tokenization_own.py", "pieces_own.py", "tokenizer.json"}
        assert not names & {"of_the_user.py", "tokenizer_notes.txt", "vocab.bak", "mine.model"}
