"""Ranges of settings: each number and text has one, both ends are taken, and nothing beyond them gets into a command."""

import math
import subprocess
import sys
from dataclasses import fields
from typing import get_origin

import pytest

from qlora_cli.config import GenerateConfig, InspectConfig, MergeConfig, PrepareConfig, TrainConfig
from qlora_cli.config_file import read_config_file
from qlora_cli.core.runs.validate import report_idle
from qlora_cli.errors import UsageError
from qlora_cli.settings.ranges import Numbers, WordOrNumber, Words
from qlora_cli.settings.setting import recorded_fields, type_of

CONFIGS = (PrepareConfig, TrainConfig, MergeConfig, GenerateConfig, InspectConfig)
FIELDS = {(config, option.name): option for config in CONFIGS for option in fields(config)}


def ranged(kind):
    return [(config, name, option.metadata["range"]) for (config, name), option in FIELDS.items()
            if isinstance(option.metadata["range"], kind)]  # fmt: skip


def test_every_number_and_every_text_has_a_range_or_choices():
    missing = {
        f"{config.__name__}.{name}"
        for (config, name), option in FIELDS.items()
        if type_of(option)[0] is not bool and not option.metadata["choices"] and option.metadata["range"] is None
    }
    assert not missing, "give each `setting(...)` a range="


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_lie_in_their_ranges(config):
    config()


def test_both_ends_of_a_range_are_taken_and_nothing_beyond():
    for config, name, allowed in ranged(Numbers):
        kind = type_of(FIELDS[config, name])[0]
        inside = [(allowed.low, allowed.open_low), (allowed.high, allowed.open_high)]
        for end, is_open in inside:
            if not is_open:
                assert getattr(config(**{name: kind(end)}), name) == end
        outside = [allowed.low - 1, allowed.high + max(1, 1e-9 * allowed.high)]
        outside += [math.nan, math.inf, -math.inf] if kind is float else []
        for value in outside + [end for end, is_open in inside if is_open]:
            with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is ") as caught:
                config(**{name: value})
            assert caught.value.hint


def test_a_name_is_text_that_can_be_one():
    for config, name, _ in ranged(Words):
        for text in ("", "a\0b", "a\x1b[2Jb", "a\udcff", "x" * (2**20 + 1)):
            value = (text,) if get_origin(type_of(FIELDS[config, name])[0]) is tuple else text
            with pytest.raises(UsageError):
                config(**{name: value})
    for config, name, _ in ranged(WordOrNumber):
        for text in ("maybe", "-1", "1e3", "10001", "9" * 5000, "²"):
            with pytest.raises(UsageError):
                config(**{name: text})


def test_a_settings_file_is_held_to_the_same_ranges(tmp_path):
    for config, name, allowed in ranged(Numbers):
        if name in recorded_fields(config):
            (tmp_path / "r.yaml").write_text(f"{name}: {int(allowed.high) + 10**6 + int(1e-6 * allowed.high)}")
            with pytest.raises(UsageError, match=name) as caught:
                read_config_file(tmp_path / "r.yaml", config)
            assert "r.yaml" in caught.value.message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (TrainConfig(model="m", data=("d",)), []),
        (TrainConfig(model="m", data=("d",), train_on="all", sample_every=2, sample_prompt=("?",)), []),
        (
            TrainConfig(model="m", prepared="p", train_on="all", limit=3, max_length=64, sample_every=2),
            [
                "--sample-every does nothing without --sample-prompt.",
                "--train-on, --limit do nothing: rows of --prepared are as qlora prepare has made them.",
            ],
        ),
        (MergeConfig(gguf_type="q8_0"), ["--gguf-type does nothing without --format gguf."]),
        (MergeConfig(gguf_type="q8_0", format="gguf", min_kept=0.5, quantize=True, push="o/n", public=True), []),
        (MergeConfig(public=True), ["--public does nothing without --push."]),
        (GenerateConfig(temperature=0.0, top_p=0.5), ["--top-p does nothing with --temperature 0."]),
    ],
)
def test_a_setting_that_does_nothing_beside_the_others_is_said(config, said):
    events: list = []
    report_idle(config, events.append)
    assert [event.text for event in events] == said


def test_what_a_setting_needs_is_a_setting_and_one_of_its_values():
    for (config, _), option in FIELDS.items():
        name, _, value = (option.metadata["needs"] or "").partition("=")
        if name:
            needed = FIELDS[config, name]
            assert not value or value in needed.metadata["choices"]


REFUSED = """
--learning-rate 1e6|--learning-rate nan|--learning-rate -1|--learning-rate inf|--learning-rate 0|--seed -1
--seed 9223372036854775808|--seed 18446744073709551621|--dropout nan|--dropout 1|--alpha inf|--alpha nan|--alpha 0
--weight-decay nan|--weight-decay 1e30|--max-grad-norm nan|--max-grad-norm -1|--warmup-steps -1|--warmup-ratio nan
--warmup-ratio 2|--warmup-ratio 3|--warmup-steps 10000000000|--save-every 0|--save-every -1|--keep 0|--keep -3
--eval-rows -1|--eval-fraction nan|--eval-fraction 1|--eval-every 0|--patience 0|--patience -1|--max-length 1
--max-length 1000000000000|--packing --max-length 1000000000|--rank 1000000000|--rank 1000000|--rank 0
--batch-size 1000000000|--gradient-accumulation-steps 1000000000|--limit 0|--limit -5|--compute-dtype float8
--compute-dtype float16 --learning-rate 1e4|--vram 0|--vram -1GiB|--vram nanGiB|--vram lots|--vram 12|--vram 9999999TiB
--gradient-checkpointing 1000000000|--gradient-checkpointing -1|--max-line-bytes 0|--max-steps 1000000000000
--max-steps 0|--epochs 1e-300|--epochs nan|--epochs inf|--epochs -1|--epochs 0|--gpus 0|--target-modules ,|--model=
--report-to nobody|--scheduler steep|--optimizer best
"""
COMMAND_LINES = """
import contextlib, io, sys
from qlora_cli.cli.app import main
for case in sys.argv[1].replace(chr(10), "|").strip("|").split("|"):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["train", "--model", "m", "--data", "d", *case.split()])
    lines = said.getvalue().splitlines()
    assert code == 2 and len(lines) == 2 and "Unexpected" not in lines[0], (case, code, lines)
    print(lines[0])
assert not {"torch", "transformers", "numpy"} & {*sys.modules}, "a value is checked before anything heavy is imported"
"""


def test_values_that_mean_nothing_are_refused_before_anything_heavy_is_imported():
    done = subprocess.run([sys.executable, "-c", COMMAND_LINES, REFUSED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]
    assert "error: --warmup-ratio is 3.0." in done.stdout and "error: --vram is 'lots'." in done.stdout
