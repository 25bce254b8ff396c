"""The trainer's state on disk: one of another version, or that is no JSON, is refused in a sentence."""

import pytest

from qlora_cli.artifacts import TRAINER_STATE
from qlora_cli.core.training.progress import read_state, read_trainer_state
from qlora_cli.errors import CheckpointError

OTHER, BROKEN = "was written by another version of qlora", "cannot be read"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", OTHER),
        ("{}", OTHER),
        ('{"progress": {"step": 3, "loss_scale": {"of": "tomorrow"}}}', OTHER),
        ("{", BROKEN),
        ("[" * 100_000, BROKEN),
    ],
)
def test_what_is_no_state_of_this_version_is_refused(tmp_path, content, said):
    (tmp_path / TRAINER_STATE).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        read_trainer_state(tmp_path)
    if not content.startswith("{") or said == BROKEN:
        with pytest.raises(CheckpointError, match=said):
            read_state(tmp_path)
