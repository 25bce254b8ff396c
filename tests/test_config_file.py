"""YAML settings files: what is written is read back, and a mistake in one is named."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.config import TrainConfig
from qlora_cli.config_file import as_yaml, read_config_file
from qlora_cli.errors import UsageError
from qlora_cli.settings.setting import recorded_fields


@settings(max_examples=15)
@given(
    rank=st.integers(1, 512),
    learning_rate=st.floats(1e-9, 1.0),
    targets=st.none() | st.lists(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), min_size=1, max_size=4).map(tuple),
    checkpointing=st.sampled_from(["auto", "on", "off", "12"]),
    template=st.none()
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40),
)
def test_a_written_file_gives_the_same_configuration(
    tmp_path_factory, rank, learning_rate, targets, checkpointing, template
):
    path = tmp_path_factory.mktemp("settings") / "run.yaml"
    config = TrainConfig(
        model="org/base",
        rank=rank,
        learning_rate=learning_rate,
        target_modules=targets,
        gradient_checkpointing=checkpointing,
        template=template,
        double_quant=False,
    )
    path.write_text(as_yaml(config), encoding="utf-8")
    assert TrainConfig(**read_config_file(path, TrainConfig)) == config


def test_how_one_invocation_behaves_is_not_recorded(tmp_path):
    (tmp_path / "run.yaml").write_text(as_yaml(replace(TrainConfig(), resume=True, overwrite=True, dry_run=True)))
    assert {"resume", "overwrite", "dry_run", "trust_remote_code"}.isdisjoint(recorded_fields(TrainConfig))
    assert TrainConfig(**read_config_file(tmp_path / "run.yaml", TrainConfig)) == TrainConfig()


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("learning_rate: 2e-4", "learning_rate", 2e-4),
        ("alpha: 32", "alpha", 32.0),
        ("gradient-checkpointing: off", "gradient_checkpointing", "off"),
        ("target_modules: q_proj, v_proj", "target_modules", ("q_proj", "v_proj")),
        ("target_modules: [q_proj]", "target_modules", ("q_proj",)),
        ("max_steps: null", "max_steps", None),
        ("gradient-checkpointing: yes", "gradient_checkpointing", "on"),
        ("revision: 0123456", "revision", "0123456"),
        ("output: 7.10", "output", "7.10"),
        ("output: no", "output", "no"),
        ("target_modules: [q_proj$|v_proj$]", "target_modules", ("q_proj$|v_proj$",)),
        ("exclude_modules: [no, 12]", "exclude_modules", ("no", "12")),
        ("text_column: $oid", "text_column", "$oid"),
        ("seed: 1_000", "seed", 1000),
        ("max_grad_norm: .5", "max_grad_norm", 0.5),
    ],
)
def test_values_are_read_as_people_write_them(tmp_path, text, field, value):
    (tmp_path / "r.yaml").write_text(text)
    assert read_config_file(tmp_path / "r.yaml", TrainConfig) == {field: value}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("learning_rat: 1", "unknown setting learning_rat", "learning_rate"),
        ("rank: many", "rank should be a whole number, found 'many'", None),
        ("output: ${NOWHERE}/run", "variables are not read in a file", "${NOWHERE}/run"),
        ("output: $PATH/run", "variables are not read in a file", "/bin"),
        ("output: ~", "output should be text, found None", None),
        ("rank: 010", "rank should be a whole number, found 010", "as 16"),
        ("seed: 1:30", "seed should be a whole number, found 1:30", None),
        ("target_modules: [q_proj, null]", "should be a list of words", None),
        ("rank: true", "rank should be a whole number, found True", None),
        ("double_quant: 1", "double_quant should be true or false, found 1", None),
        ("target_modules: 5", "target_modules should be a list of words, found 5", None),
        ("quant_type: int4", "quant_type is 'int4'", "nf4, fp4"),
        ("training:\n  rank: 8", "training is no setting but a group", "each at its beginning"),
        ("- a\n- b", "holds a list", None),
        ("a: [", "line 1 is not YAML", None),
        ("rank: 8\nalpha: 2\nrank: 16", "line 3 is not YAML: 'rank' stands twice", None),
    ],
)
def test_a_mistake_is_named_with_what_to_write(tmp_path, text, message, hint):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        read_config_file(tmp_path / "r.yaml", TrainConfig)
    assert hint is None or hint in error.value.hint


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no configuration file"):
        read_config_file(tmp_path / "absent.yaml", TrainConfig)
