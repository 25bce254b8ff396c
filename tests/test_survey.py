"""Architectures of every kind, built small and taken down the road by the code of `make survey`."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Of each kind of layer, of state, of experts and of towers one or two, which may be one; the others are slow.
CHOSEN = [
    "deepseek_v3",
    "falcon_h1",
    "gemma4",
    "gpt_oss",
    "gpt2",
    "lfm2",
    "llama4",
    "mamba2",
    "qwen3_5",
    "t5",
]


@pytest.fixture(scope="module")
def survey():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import survey

        yield survey
    for name in ("survey", "support", "support.architectures"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", CHOSEN)
def test_an_architecture_is_right_or_refused_in_a_sentence(survey, name, tmp_path):
    found = survey.survey(name, tmp_path, brief=True)
    assert not [cell for cell in found.values() if "WRONG" in cell], found
    assert ("refused" in found) == (name == "t5"), found


@pytest.mark.slow
def test_every_architecture_is_right_or_refused(survey, tmp_path):
    names = [name for name in survey.ARCHITECTURES if name not in CHOSEN]
    found = {name: survey.survey_in(name, tmp_path) for name in names}
    assert not {n: cells for n, cells in found.items() if any("WRONG" in cell for cell in cells.values())}
