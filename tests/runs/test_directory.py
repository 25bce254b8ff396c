"""Run directory: what counts as a run, for training and for inspection, and what is never taken for one."""

import shutil
from pathlib import Path

import pytest

from qlora_cli.artifacts import (
    ADAPTER_CONFIG,
    CHECKPOINTS,
    LOCK,
    MARK,
    METRICS,
    MODEL_CARD,
    RUN_RECORD,
    RUN_YAML,
    TRACKER_LOGS,
    is_run,
)
from qlora_cli.config import TrainConfig
from qlora_cli.config_file import as_yaml
from qlora_cli.core.inspection.run_summary import describe_run
from qlora_cli.core.runs.directory import begin_run, claimed, finished_files
from qlora_cli.core.storage.checkpoint import newest_valid, write_checkpoint
from qlora_cli.errors import RunError


def write_run(directory, sign):
    """What one of several versions left of a run."""
    directory.mkdir(parents=True, exist_ok=True)
    if sign == RUN_YAML:
        (directory / RUN_YAML).write_text(as_yaml(TrainConfig(model="m")))
    elif sign == RUN_RECORD:
        (directory / RUN_RECORD).write_text('{"format": 1, "qlora_version": "0.1"}')
    elif sign == MARK:
        begin_run(directory, None, print)
        (directory / METRICS).touch()
    else:
        save(directory, 2)


def save(directory, step, run=""):
    def fill(folder):
        (folder / "state.json").write_text(str(step))

    return write_checkpoint(directory / CHECKPOINTS, step, identity={}, fill=fill, needed_bytes=9, run=run)


@pytest.mark.parametrize("sign", [RUN_YAML, CHECKPOINTS, RUN_RECORD, MARK])
def test_any_sign_of_a_run_of_ours_is_one_and_goes_on_or_is_replaced_only_when_asked(tmp_path, sign):
    write_run(tmp_path, sign)
    with pytest.raises(RunError, match="holds a run already"), claimed(tmp_path, resume=False, overwrite=False):
        pass
    for flags in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        before = sorted(tmp_path.rglob("*"))
        with claimed(tmp_path, **flags):
            pass
        assert [path for path in sorted(tmp_path.rglob("*")) if path.name != LOCK] == [
            path for path in before if path.name != LOCK
        ]
    if sign not in (MARK,):
        assert is_run(tmp_path)
        assert describe_run(tmp_path, None)["adapter"].startswith("none yet")


@pytest.mark.parametrize("name", [METRICS, MODEL_CARD, "notes.txt", ADAPTER_CONFIG, RUN_YAML, RUN_RECORD, CHECKPOINTS])
@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_files_that_other_programs_write_too_are_no_run_of_ours_and_never_touched(tmp_path, name, flags):
    if name == CHECKPOINTS:
        (tmp_path / name / "step-00001000").mkdir(parents=True)
        (tmp_path / name / "step-00001000" / "model.ckpt").write_text("years of work")
        (tmp_path / name / "step-00001000" / "manifest.json").write_text('{"theirs": 1}')
    else:
        (tmp_path / name).write_text('{"learning_rate": 1}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    resume, overwrite = flags
    with (
        pytest.raises(RunError, match="and no run of qlora"),
        claimed(tmp_path, resume=resume, overwrite=overwrite),
    ):
        pass
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_dry_run_only_looks(tmp_path):
    with claimed(tmp_path / "new", resume=False, overwrite=False, dry_run=True):
        pass
    assert list(tmp_path.iterdir()) == []
    write_run(tmp_path / "old", RUN_YAML)
    with claimed(tmp_path / "old", resume=False, overwrite=True, dry_run=True):
        pass
    assert [path.name for path in (tmp_path / "old").iterdir()] == [RUN_YAML]


def test_a_new_run_sees_nothing_of_the_older_even_where_it_cannot_be_removed(tmp_path, monkeypatch):
    first = begin_run(tmp_path, None, print)
    save(tmp_path, 6, run=first)
    elsewhere = tmp_path.parent / f"{tmp_path.name}-scratch"  # a link to another disk
    (tmp_path / CHECKPOINTS).rename(elsewhere)
    (tmp_path / CHECKPOINTS).symlink_to(elsewhere)
    cautions = []
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(OSError(39, "Directory not empty")))
        patch.setattr(Path, "rename", lambda *a: (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
        second = begin_run(tmp_path, None, cautions.append)
    assert second != first and "could not be removed" in cautions[0].text
    found, skipped = newest_valid(tmp_path / CHECKPOINTS)
    assert found is None and "another run" in skipped[0].reason
    save(tmp_path, 2, run=second)
    assert newest_valid(tmp_path / CHECKPOINTS)[0].step == 2
    assert begin_run(tmp_path, second, print) == second and newest_valid(tmp_path / CHECKPOINTS)[0].step == 2
    begin_run(tmp_path, None, print)
    assert list(elsewhere.iterdir()) == []


def test_checkpoints_of_a_version_without_ids_go_on(tmp_path):
    save(tmp_path, 2)
    id = begin_run(tmp_path, "", print)
    assert id and newest_valid(tmp_path / CHECKPOINTS)[0].step == 2
    save(tmp_path, 4, run=id)
    begin_run(tmp_path, id, print)
    assert newest_valid(tmp_path / CHECKPOINTS)[0].step == 4


def test_what_a_run_reads_is_never_where_it_writes(tmp_path):
    write_run(tmp_path / "run", CHECKPOINTS)
    model = tmp_path / "run" / CHECKPOINTS / "step-00000002"
    with (
        pytest.raises(RunError, match="which this command reads"),
        claimed(tmp_path / "run", resume=False, overwrite=True, reads=[model]),
    ):
        pass
    template = tmp_path / "run" / "chat_template.jinja"  # which the run writes its own over, or removes
    template.write_text("edited")
    with (
        pytest.raises(RunError, match=r"would remove .*jinja, which this command reads"),
        claimed(tmp_path / "run", resume=False, overwrite=True, reads=[template]),
    ):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with (
        pytest.raises(RunError, match="is what this command reads"),
        claimed(tmp_path / "link", resume=True, overwrite=False, reads=[tmp_path / "run"]),
    ):
        pass


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


def test_a_run_that_ends_again_keeps_no_tokenizer_file_of_another_base(tmp_path):
    for template in ("additional_chat_templates/rag.jinja", "chat_template.jinja"):
        for _ in range(2):
            with finished_files(tmp_path) as directory:
                for name in ("adapter_config.json", "tokenizer.json", template):
                    (directory / name).parent.mkdir(exist_ok=True)
                    (directory / name).write_text("{}")
        assert list(tmp_path.rglob("*.jinja")) == [tmp_path / template]


def test_a_run_that_ends_keeps_the_user_s_files_beside_it(tmp_path):
    for name in ("mine.jinja", "vocab.jsonl", "tokenizer_notes.txt"):
        (tmp_path / name).write_text("mine")
    with finished_files(tmp_path) as directory:
        (directory / "adapter_config.json").write_text("{}")
    assert len([path for path in tmp_path.iterdir() if path.read_text() == "mine"]) == 3
