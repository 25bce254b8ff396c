"""Run directory: what counts as a run, for training and for inspection, and what is never taken for one."""

import pytest

from qlora_cli.artifacts import (
    ADAPTER_CONFIG,
    CHECKPOINTS,
    LOCK,
    METRICS,
    MODEL_CARD,
    RUN_RECORD,
    RUN_YAML,
    TRACKER_LOGS,
    is_run,
)
from qlora_cli.core.inspection.run_summary import describe_run
from qlora_cli.core.runs.directory import claimed
from qlora_cli.errors import QloraError, RunError


@pytest.mark.parametrize("sign", [RUN_YAML, CHECKPOINTS, RUN_RECORD, ADAPTER_CONFIG])
def test_any_sign_of_a_run_is_one_to_training_and_inspection(tmp_path, sign):
    if sign == CHECKPOINTS:
        (tmp_path / sign).mkdir()
    else:
        (tmp_path / sign).write_text('{"format": 1}')
    assert is_run(tmp_path)
    with pytest.raises(RunError, match="holds a run already"), claimed(tmp_path, resume=False, overwrite=False):
        pass
    with claimed(tmp_path, resume=True, overwrite=False):
        pass
    if sign != ADAPTER_CONFIG:  # whose weights are missing
        assert describe_run(tmp_path, None)["adapter"].startswith("none yet")


@pytest.mark.parametrize("name", [METRICS, MODEL_CARD, "notes.txt"])
def test_files_that_other_programs_write_too_are_no_run_and_are_never_removed(tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert not is_run(tmp_path)
    with pytest.raises(RunError, match="and no run"), claimed(tmp_path, resume=False, overwrite=True):
        pass
    assert (tmp_path / name).exists()
    with pytest.raises(QloraError):
        describe_run(tmp_path, None)


def test_a_directory_made_for_nothing_is_removed_with_the_tracker_s_logs(tmp_path):
    with claimed(tmp_path / "new", resume=False, overwrite=False):
        (tmp_path / "new" / TRACKER_LOGS).mkdir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with claimed(tmp_path / "old", resume=False, overwrite=False):
        (tmp_path / "old" / TRACKER_LOGS).mkdir()
    assert {path.name for path in (tmp_path / "old").iterdir()} == {LOCK, TRACKER_LOGS}
    with claimed(tmp_path / "old", resume=False, overwrite=False):
        pass
