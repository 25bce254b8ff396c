"""Scaling of rotary positions that was asked for: as in a config.json that says so, or refused by name."""

import copy
import json

import pytest
import torch
import transformers

from qlora_cli.config import TrainConfig
from qlora_cli.core.models.files import context_length, resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.rope_scaling import require_scaled, scale_positions, scaling_of, write_scaling
from qlora_cli.errors import UsageError
from qlora_cli.settings.groups import QuantizationSettings
from qlora_cli.settings.ranges import parse_rope_scaling
from tests.conftest import ARCHITECTURES, most_slow

HALF = 8  # of a head's size of 16
LONGROPE = {"short_factor": [1.0] * HALF, "long_factor": [1.0 + place for place in range(HALF)]}
JSON = {
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"factor": 4.0, **LONGROPE},
    "yarn": {"factor": 2.5, "beta_fast": 16.0, "attention_factor": 1.25, "original_max_position_embeddings": 256},
}
KINDS = ["linear:4", "dynamic:2", "yarn:4", *(json.dumps({"rope_type": kind, **more}) for kind, more in JSON.items())]


def config_of(architecture: str, **changes):
    name, arguments = ARCHITECTURES[architecture]
    return getattr(transformers, name)(**{**arguments, **changes})


@pytest.mark.parametrize("asked", KINDS)
def test_a_config_has_what_was_asked_for_and_its_own_theta(asked):
    config = config_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    scale_positions(config, asked, "it")
    given = parse_rope_scaling(asked)
    assert given.items() <= config.rope_parameters.items() and config.rope_parameters["rope_theta"] == 5e5
    factor, start = given["factor"], given.get("original_max_position_embeddings", 512)
    assert context_length(config) == int(start * factor)
    # Dynamic scaling goes by what the limit was: with another it would not scale.
    assert config.max_position_embeddings == (512 if given["rope_type"] == "dynamic" else int(start * factor))
    again = config_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    scale_positions(again, json.dumps(scaling_of(config)), "it")  # as a record of it has it
    assert again.to_dict() == config.to_dict()


def test_only_layers_that_see_whole_rows_are_scaled_where_layers_differ():
    config = config_of("gemma3")
    before = copy.deepcopy(config.rope_parameters)
    scale_positions(config, "linear:4", "it")
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    whole = before["full_attention"] | {"rope_type": "linear", "factor": 4.0}
    assert config.rope_parameters["full_attention"] == whole and context_length(config) == 2048


@pytest.mark.parametrize("architecture", most_slow(sorted(ARCHITECTURES), ("gpt_neox", "gemma3")))
def test_a_written_config_reads_as_the_scaled_one(architecture, tmp_path):
    """In today's names and in those before."""
    if architecture in ("gpt2", "opt", "bloom", "phi3"):
        pytest.skip("no rotary positions, or none that YaRN scales")
    config_of(architecture).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    old = {name: value for name, value in new.items() if name != "rope_parameters"} | {"rope_theta": 10000.0}
    for content in (new, old) if "full_attention" not in new["rope_parameters"] else (new,):
        path.write_text(json.dumps(content))
        files = resolve_model(str(tmp_path), rope_scaling="yarn:4")
        scaled, section = files.config, copy.deepcopy(content)
        write_scaling(section, files.scaled_positions)
        path.write_text(json.dumps(section))
        read = transformers.AutoConfig.from_pretrained(tmp_path)
        left_out = {"type"}  # which earlier versions ask for
        assert {k: v for k, v in read.rope_parameters.items() if k not in left_out} == scaled.rope_parameters
        assert (
            read.max_position_embeddings
            == scaled.max_position_embeddings
            == 4 * (content.get("max_position_embeddings") or 2048)
        )


def test_without_it_nothing_changes(tiny_model):
    directory = tiny_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    files = resolve_model(str(directory))
    plain = transformers.AutoConfig.from_pretrained(directory)
    assert files.config.to_dict() == plain.to_dict() and files.scaled_positions is None


OWN = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("architecture", "changes", "asked", "said"),
    [
        ("gpt2", {}, "yarn:4", "no rotary positions"),
        ("opt", {}, "linear:2", "no rotary positions"),
        ("falcon", {"alibi": True}, "linear:2", "no rotary positions"),
        ("phi3", {}, "yarn:4", "longrope"),
        ("llama", {"rope_parameters": OWN}, "yarn:4", "scaled already: linear, factor 8"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", **LONGROPE, "rope_theta": 1e4}},
            "linear:2",
            "already: longrope",
        ),
        ("llama", {}, '{"rope_type": "yarn", "factor": 2, "rope_theta": 3e6}', "rope_theta 3000000.0, and it has"),
        ("llama", {}, '{"rope_type": "yarn", "factor": 2, "beta_fst": 32}', "beta_fst"),
        ("llama", {}, '{"rope_type": "llama3", "factor": 2}', "low_freq_factor"),
        ("llama", {}, json.dumps({"rope_type": "longrope", **JSON["longrope"], "long_factor": [1.0]}), "long_factor"),
        ("llama", {}, '{"type": "yarn", "factor": 2, "original_max_position_embeddings": 1024}', "1024 positions"),
        ("llama", {}, '{"type": "yarn", "factor": 2, "original_max_position_embeddings": 64}', "128 positions"),
    ],
)
def test_what_does_not_go_with_a_model_is_said(architecture, changes, asked, said):
    with pytest.raises(UsageError, match=said) as caught:
        scale_positions(config_of(architecture, **changes), asked, "it")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("gemma3", {"layer_types": ["sliding_attention", "full_attention"]})],
)
def test_a_model_whose_modules_do_not_go_by_it_is_refused(architecture, changes):
    model = build_empty(config_of(architecture, **changes))
    scale_positions(model.config, "linear:4", "it")
    with pytest.raises(UsageError, match="do not go by --rope-scaling"):
        require_scaled(model, "it")
    require_scaled(build_empty(model.config), "it")


def test_yarn_takes_a_factor_that_gives_no_whole_number_of_positions():
    config = config_of("llama")
    scale_positions(config, "yarn:1.3", "it")
    assert config.max_position_embeddings == 665 and config.rope_parameters["factor"] == 665 / 512


def test_json_replaces_a_scaling_of_its_own_and_says_so():
    config = config_of("llama", rope_parameters=OWN)
    assert "in place of its own linear, factor 8" in scale_positions(config, '{"type": "yarn", "factor": 2}', "it")
    assert config.rope_parameters == {
        "rope_theta": 1e4,
        "rope_type": "yarn",
        "factor": 2,
        "original_max_position_embeddings": 512,
    }


NO_SCALING = """
yarn|yarn:|yarn:x|yarn:0.5|yarn:nan|yarn:inf|yarn:1e9|ntk:2|llama3:8|:2|{|[]|{"factor": 2}|{"rope_type": "yarn"}
{"rope_type": "yarn", "factor": true}|{"rope_type": [], "factor": 2}|{"rope_type": "ntk", "factor": 2}
{"rope_type": "yarn", "factor": 2, "max_position_embeddings": 0.5}|{"rope_type": "yarn", "factor": NaN}
"""


@pytest.mark.parametrize("text", ["", *NO_SCALING.strip().replace("\n", "|").split("|")])
def test_what_is_no_scaling_is_refused_before_anything_is_read(text):
    with pytest.raises(UsageError, match="rope-scaling is") as caught:
        TrainConfig(rope_scaling=text)
    assert "yarn:4" in (caught.value.hint or "")


@pytest.mark.parametrize("asked", most_slow(KINDS, ("dynamic:2",)))
def test_positions_are_the_scaled_ones_also_from_a_copy_of_the_base(asked, tiny_model, tmp_path, monkeypatch):
    """A copy holds frequencies too: of a plain run none may be taken for a scaled one."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    directory, cpu = tiny_model("llama"), torch.device("cpu")
    by_hand = tmp_path / "by-hand"
    transformers.AutoModelForCausalLM.from_pretrained(directory).save_pretrained(by_hand)
    config = json.loads((by_hand / "config.json").read_text())
    files = resolve_model(str(directory), rope_scaling=asked)
    write_scaling(config, files.scaled_positions)
    (by_hand / "config.json").write_text(json.dumps(config))
    ids = torch.arange(1, 601)[None] % 384

    def logits(model: str, rows: torch.Tensor, **options) -> torch.Tensor:
        files = resolve_model(model, **options)
        base, _ = load_base(files, QuantizationSettings(), compute_dtype=torch.float32, device=cpu)
        with torch.no_grad():
            return torch.cat([base(row).logits for row in (rows, rows[:, :40])], 1)

    wanted = logits(str(by_hand), ids)
    plain = logits(str(directory), ids)
    for _ in range(2):  # quantised, and from its copy
        found = logits(str(directory), ids, rope_scaling=asked)
        assert torch.equal(found, wanted) and not torch.allclose(found, plain, rtol=1e-3)
    assert torch.equal(logits(str(directory), ids), plain)
