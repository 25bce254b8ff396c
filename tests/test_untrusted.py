"""Hostile models, adapters, settings and texts: refused in a sentence; nothing is run, read outside, or takes long."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_RECORD
from qlora_cli.cli.console import to_json
from qlora_cli.cli.visible import visible, visible_event
from qlora_cli.config import TrainConfig
from qlora_cli.config_file import read_config_file
from qlora_cli.core.adapters.adapter_facts import read_adapter
from qlora_cli.core.adapters.adapter_record import read_adapter_record
from qlora_cli.core.merge.checkpoint_files import find_tokenizer
from qlora_cli.core.models.files import files_beside, resolve_model
from qlora_cli.core.models.hub import READ_FILES
from qlora_cli.core.untrusted import check_expressions, check_files, is_ours
from qlora_cli.errors import AdapterError, ModelError, QloraError, RunError, UsageError
from qlora_cli.events import Caution, Notice, Progress, RowShown, TextGenerated, report_nothing
from tests.hub import PROJECT


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A model directory to do evil in; its weights are left out."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model", ignore=ignored))


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}))


# ---------------------------------------------------------------- links


SECRET = "root:secret"
NAMES = ["tokenizer.model", "tokenizer_x", "generation_config.json", "config.json", "chat_template.jinja", "vocab.txt"]


@pytest.mark.parametrize("name", [*NAMES, "modeling_x.py", "preprocessor_config.json"])
def test_a_link_out_of_a_model_directory_is_not_followed(model, tmp_path, name):
    (tmp_path / "secret").write_text(SECRET)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="link out of it") as caught:
        resolve_model(str(model))
    assert SECRET not in caught.value.message


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "/dev/zero", "../none", "tokenizer.model"])
def test_no_kind_of_link_leads_anywhere(model, tmp_path, target):
    (tmp_path / "secret").write_text(SECRET)
    (model / "tokenizer.model").symlink_to(target)
    with pytest.raises(ModelError):
        resolve_model(str(model))


def test_what_is_no_regular_file_is_not_opened(model):
    os.mkfifo(model / "tokenizer.model")
    with pytest.raises(ModelError, match="no regular file"):
        resolve_model(str(model))
    (model / "tokenizer.model").unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(model / "vocab.txt"))
        with pytest.raises(ModelError, match="no regular file"):
            resolve_model(str(model))


def test_links_within_a_model_and_of_the_hub_cache_are_followed(model, tmp_path):
    (model / "tokenizer_copy.json").symlink_to("tokenizer.json")
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (model / "vocab.txt").rename(blobs / "abc") if (model / "vocab.txt").exists() else (blobs / "abc").write_text("a")
    (model / "vocab.txt").symlink_to(blobs / "abc")
    (tmp_path / "named").symlink_to(model)
    assert resolve_model(str(tmp_path / "named")).config.model_type == "llama"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_x"])
def test_a_link_in_an_adapter_does_not_land_in_what_is_merged_and_pushed(model, tmp_path, name):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "secret").write_text(SECRET)
    shutil.copy(model / "tokenizer.json", tmp_path / "adapter")
    (tmp_path / "adapter" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="link out of it"):
        find_tokenizer(resolve_model(str(model)), tmp_path / "adapter", 512, report_nothing)
    (tmp_path / "adapter" / name).rename(tmp_path / "adapter" / "plot.py")  # the user's own, which nothing names
    assert find_tokenizer(resolve_model(str(model)), tmp_path / "adapter", 512, report_nothing)


CODE = "from transformers import PreTrainedTokenizerFast\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"


@pytest.mark.parametrize("reference", ["own.Own", "further.Own", "folder/own.Own", "org/code--own.Own"])
def test_an_adapter_s_tokenizer_runs_its_base_s_code_where_that_was_asked_for_and_no_other(model, tmp_path, reference):
    (model / "own.py").write_text(CODE)
    adapter, proof = Path(shutil.copytree(model, tmp_path / "adapter")), tmp_path / "executed"
    (adapter / "config.json").unlink()
    edit(adapter / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, reference]})
    base, trusted = (resolve_model(str(model), trust_remote_code=trust) for trust in (False, True))
    if reference == "own.Own":
        assert type(files_beside(trusted, adapter).tokenizer).__name__ == "Own"
        with pytest.raises(ModelError, match="custom code"):
            find_tokenizer(base, adapter, 512, report_nothing)
    evil = adapter / f"{reference.partition('--')[0].removesuffix('.Own')}.py"
    evil.parent.mkdir(exist_ok=True)
    evil.write_text(f"open({str(proof)!r}, 'w')\n{CODE}")
    with pytest.raises(ModelError, match="cannot be read"):
        find_tokenizer(trusted, adapter, 512, report_nothing)
    assert not proof.exists()


# ---------------------------------------------------------------- configurations


HUGE = {
    "hidden_size": 10**9,
    "num_hidden_layers": 10**6,
    "vocab_size": 10**12,
    "num_attention_heads": 10**6,
    "num_key_value_heads": 10**5,
    "intermediate_size": 10**10,
    "max_position_embeddings": 10**12,
    "num_local_experts": 10**6,
    "n_layer": 10**9,
    "n_embd": 10**9,
    "head_dim": 10**9,
    "num_experts": [10**7],
    "d_model": 1e300,
    "n_positions": -(2**40),
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("nested", [False, True])
def test_sizes_are_bounded_before_anything_is_built(model, name, nested):
    edit(model / "config.json", **({"text_config": {name: HUGE[name]}} if nested else {name: HUGE[name]}))
    with pytest.raises(ModelError, match=f"says {name}: "):
        resolve_model(str(model))


@pytest.mark.parametrize(
    ("file", "content", "trusted"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil/repo--conf.Config"}}, True),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "evil/repo--x.Y"}}}, True),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil/repo--tok.T", None]}}, True),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "evil/repo--p.P"}}, True),
        ("config.json", {"custom_pipelines": {"x": {"impl": "evil/repo--p.P"}}}, True),
        ("config.json", {"_attn_implementation": "evil/kernel"}, False),
        ("config.json", {"attn_implementation": "evil/kernel:x"}, True),
        ("config.json", {"_attn_implementation_internal": "evil/kernel"}, False),
        ("config.json", {"vision_config": {"_attn_implementation": "evil/kernel"}}, False),
        ("config.json", {"attn_implementation": {"text_config": "evil/kernel"}}, False),
    ],
)
def test_a_second_repository_that_nobody_pinned_is_not_reached(model, file, content, trusted):
    edit(model / file, **content)
    with pytest.raises(ModelError, match="evil"):
        resolve_model(str(model), trust_remote_code=trusted)


def test_code_of_another_repository_is_no_matter_where_no_code_is_run(model):
    edit(model / "config.json", auto_map={"AutoConfig": "tiiuae/falcon-7b--configuration_falcon.FalconConfig"})
    assert resolve_model(str(model)).config.model_type == "llama"


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "\x00", "", "{", '"' + "a" * 2**27 + '"'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_file_that_is_no_configuration_is_one_sentence(model, name, text):
    (model / name).write_text(text)
    with pytest.raises(ModelError):
        resolve_model(str(model))


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_what_a_clone_without_large_files_holds_is_called_so(model, name):
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ModelError, match=f"{name} is a pointer of Git LFS") as refused:
        _ = resolve_model(str(model)).weights_sha256
    assert refused.value.hint.startswith(f"Type: git -C {model} lfs pull")


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapter(tmp_path):
    """`adapter(**changes)`: an adapter whose configuration says that."""

    def make(**changes) -> Path:
        directory = tmp_path / "adapter"
        directory.mkdir(exist_ok=True)
        good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (directory / ADAPTER_CONFIG).write_text(json.dumps({**good, **changes}))
        names = [
            f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{half}.weight" for i in (0, 1) for half in "AB"
        ]
        save_file({name: torch.zeros(4, 4) for name in names}, directory / ADAPTER_WEIGHTS)
        return directory

    return make


SLOW = "(([a-z_.0-9]+)+)+X"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 10**9}, "rank"),
        ({"r": 0}, "rank"),
        ({"r": -1}, "rank"),
        ({"r": "4"}, "rank"),
        ({"r": True}, "rank"),
        ({"r": None}, "rank"),
        ({"r": 4.5}, "rank"),
        ({"lora_alpha": float("nan")}, "alpha"),
        ({"lora_alpha": float("inf")}, "alpha"),
        ({"lora_alpha": -1}, "alpha"),
        ({"lora_alpha": "x"}, "alpha"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha"),
        ({"rank_pattern": [1]}, "mapping"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "antigravity"),
        ({"target_modules": SLOW}, "too long"),
        ({"exclude_modules": SLOW}, "too long"),
        ({"rank_pattern": {SLOW: 4}}, "too long"),
        ({"alpha_pattern": {SLOW: 4}}, "too long"),
        ({"layers_pattern": SLOW}, "too long"),
        ({"layers_pattern": [SLOW]}, "too long"),
        ({"target_modules": "(" * 5}, "no regular expression"),
        ({"rank_pattern": {"[": 4}}, "no regular expression"),
        ({"peft_type": "../../x"}, "adapter"),
        ({"lora_dropout": [1]}, "dropout"),
        ({"lora_dropout": 2}, "dropout"),
        ({"target_modules": 5}, "target_modules"),
        ({"target_modules": [1, {"a": 2}]}, "target_modules"),
        ({"modules_to_save": {"a": 1}}, "modules_to_save"),
    ],
)
def test_an_adapter_made_to_harm_is_refused(adapter, changes, says, monkeypatch):
    monkeypatch.setattr("qlora_cli.core.untrusted.MATCH_SECONDS", 0.05)
    with pytest.raises(AdapterError, match=says):
        read_adapter(adapter(**changes))


def test_an_expression_is_tried_on_the_names_of_the_base_too(adapter, monkeypatch):
    monkeypatch.setattr("qlora_cli.core.untrusted.MATCH_SECONDS", 0.05)
    config = {"target_modules": r"((a+)+)+b|.*q_proj"}
    check_expressions(config, ["model.layers.0.self_attn.q_proj"], Path("a"))
    with pytest.raises(AdapterError, match="too long"):
        check_expressions(config, ["a" * 60], Path("a"))


def test_expressions_that_people_write_are_taken(adapter):
    facts = read_adapter(
        adapter(target_modules=r".*\.(q_proj|v_proj)$", rank_pattern={r"^model\.layers\.0.*q_proj": 4, "v_proj": 4})
    )
    assert facts.rank == 4


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", "5", "\x00", ""])
def test_an_adapter_configuration_that_is_none_is_one_sentence(adapter, text):
    directory = adapter()
    (directory / ADAPTER_CONFIG).write_text(text)
    with pytest.raises(AdapterError):
        read_adapter(directory)


BASE = {
    "model": "m",
    "revision": None,
    "config_sha256": "c",
    "weights_sha256": "w",
    "quant_type": "nf4",
    "double_quant": True,
    "compute_dtype": "float32",
}


@pytest.mark.parametrize(
    "record",
    [
        {"base": {"model": 5}},
        {"base": {**BASE, "model": 5}},
        {"base": {**BASE, "revision": ["x"]}},
        {"base": {**BASE, "double_quant": "yes"}},
        {"base": "m"},
        {"base": [BASE]},
        {"formatting": "junk"},
        {"formatting": {"format": "junk"}},
        {"formatting": {"format": 5}},
        {"formatting": {"column": "text"}},
        {"formatting": {"format": "chat"}},
        {"formatting": {"format": "prompt", "template": "{a} {b}", "completion_column": None}},
        {"formatting": {"format": "prompt", "completion_column": "b"}},
        {"formatting": {"format": "text"}},
        {"formatting": {"format": "chat", "template": {"a": 1}}},
        {"formatting": {"format": "chat", "conversation": [1]}},
        {"formatting": {"format": "chat", "conversation": {"messages": 5}}},
        {"formatting": {"format": "chat", "template_settings": "x"}},
    ],
)
def test_a_record_that_is_none_is_one_sentence(adapter, record):
    directory = adapter()
    (directory / RUN_RECORD).write_text(json.dumps({"format": 1, **record}))
    with pytest.raises(QloraError, match="is no record of a run: "):
        read_adapter_record(directory, print)


@pytest.mark.parametrize(
    "record",
    [
        *([], 5, "x", {}, {"format": "x"}, {"format": 1, "data": 5}, {"format": 1, "training": 5}),
        *({"format": 1, "training": {name: value}} for name in ("steps", "total_steps") for value in ("x", [1])),
    ],
)
def test_a_record_of_other_types_is_one_sentence(adapter, record):
    directory = adapter()
    (directory / RUN_RECORD).write_text(json.dumps(record))
    with pytest.raises(RunError, match="is no record of a run: "):
        read_adapter_record(directory, print)


def test_a_tokenizer_whose_limit_is_no_number_is_one_sentence(model):
    edit(model / "tokenizer_config.json", model_max_length="x")
    with pytest.raises(ModelError, match=r"The tokenizer of .* cannot be read"):
        _ = resolve_model(str(model)).tokenizer


def test_a_record_with_what_newer_versions_add_is_read(adapter):
    directory = adapter()
    formatting = {"shape": "chat", "template": "x", "conversation": {"messages": "m", "more": 1}, "more": 2}
    record = {"format": 1, "base": {**BASE, "more": 3}, "formatting": formatting}
    (directory / RUN_RECORD).write_text(json.dumps(record))
    found = read_adapter_record(directory, print)
    assert found.base.model == "m" and found.formatting.format == "chat"
    assert found.formatting.conversation.messages == "m"


# ---------------------------------------------------------------- settings files


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch executed']\n",
        "model: !!python/name:os.system\n",
        BOMB + "model: *i\n",
        "model: " + "[" * 20_000,
        "model: " + "{a: " * 20_000,
        "target_modules: &a [x, x]\nmodel: [[[1]]]\n",
        "model: &m base\ndata: *m\n",
        "seed: " + "9" * 5000,
        "model: \x00",
        "x" * (2**20 + 1),
    ],
)
def test_a_settings_file_made_to_harm_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"r\.yaml") as caught:
        read_config_file(tmp_path / "r.yaml", TrainConfig)
    assert len(caught.value.message) < 1000 and not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- control sequences


SEQUENCES = {
    "clear": "\x1b[2J",
    "title": "\x1b]0;pwned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "C1": "\x9b31m",
    "carriage return": "harmless\rerror",
    "backspace": "good\x08\x08\x08\x08evil",
    "delete": "a\x7f",
    "override": "\u202egnp.exe",
    "isolate": "\u2066x\u2069",
    "bell": "\x07",
    "null": "\0",
}


@pytest.mark.parametrize("text", SEQUENCES.values(), ids=SEQUENCES)
def test_no_control_sequence_is_shown_as_it_is(text, capsys):
    """In events of every kind, results and errors; JSON keeps the text, escaped."""
    events = [
        Notice(text),
        Caution(text),
        Progress(text, 1, 2),
        TextGenerated(text),
        RowShown(0, ((text, True),), 1, 1),
    ]
    for event in events:
        assert not any(character in repr(visible_event(event)) for character in text if not character.isprintable())
    shown = visible({text: [text, {"a": (text, 5, None)}]})
    assert all(character.isprintable() for character in str(shown))
    written = to_json({"answer": text})
    assert all(character.isprintable() or character == "\n" for character in written)
    assert json.loads(written) == {"answer": text}
    assert visible("two\nlines\tof 東京 🙂 é") == "two\nlines\tof 東京 🙂 é"


SCRIPT = """
import sys, types
from qlora_cli.cli.app import main
from qlora_cli.errors import DataError
from qlora_cli.events import Caution, Notice, Progress, RowShown, TextGenerated, report_nothing
evil = "\\x1b]0;pwned\\x07\\x1b[2J\\u202e"
def prepare(config, report):
    for event in (Notice(evil), Caution(evil), Progress(evil, 1, 2), TextGenerated(evil, True), RowShown(0, ((evil, True),), 1, 1, evil)):
        report(event)
    if config.show: raise DataError(evil, evil)
    return types.SimpleNamespace(to_dict=lambda: {"kind": evil, evil: evil, "tables": [{"title": evil, "columns": [evil], "rows": [[evil]]}]})
sys.modules["qlora_cli.commands.prepare"] = types.SimpleNamespace(prepare=prepare, summarise=lambda summary: summary.to_dict())
main(["prepare", "--model", "m", "--data", "d", "--output", "o"])
main(["prepare", "--model", "m", "--data", "d", "--show", "1", "--debug"])
main(["prepare", "--model", "m\\x1b[2J"])
main(["prepare", "--\\x1b[2J"])
"""


def test_whatever_a_command_reports_reaches_streams_without_control_sequences(tmp_path):
    (tmp_path / "m").mkdir()
    for name in ("m/config.json", "d"):  # what is not there is said before
        (tmp_path / name).write_text("{}")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, check=True, cwd=tmp_path, env=environment
    )
    for stream in (done.stdout, done.stderr):
        assert b"pwned" in stream and not {0x1B, 0x07} & {*stream} and "\u202e".encode() not in stream


# ---------------------------------------------------------------- what another user wrote


def test_what_others_may_write_is_not_taken(tmp_path):
    path = tmp_path / "base"
    path.mkdir(mode=0o755)
    assert is_ours(path)
    path.chmod(0o777)
    assert not is_ours(path)
    path.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
        assert not is_ours(path)
    assert is_ours(tmp_path / "none")  # whoever reads it says that it is missing


def test_the_checks_read_nothing_but_the_directory(model, monkeypatch):
    opened = []
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: opened.append(self) or read(self, *a, **k))
    check_files(model, "m", READ_FILES, trust_remote_code=False)
    assert opened and all(path.parent == model for path in opened)
