"""Ownership: only what this program wrote is replaced, nothing that a command reads, nothing around that."""

import errno
import os
import random
from pathlib import Path

import pytest

from qlora_cli.artifacts import (
    MARK,
    MERGE_RECORD,
    PREPARED_MANIFEST,
    PREPARED_ROWS,
    RUN_RECORD,
    RUN_YAML,
    write_json,
)
from qlora_cli.core.storage.ownership import (
    MERGED,
    PREPARED,
    RUN,
    Mark,
    may_replace,
    may_write_file,
    read_mark,
    resolve,
    write_mark,
)
from qlora_cli.core.storage.publish import atomic_directory
from qlora_cli.errors import RunError

FILES = (PREPARED_MANIFEST, PREPARED_ROWS)


def publish(target: Path, *, overwrite: bool = False, text: str = "rows", reads: tuple[Path, ...] = ()) -> None:
    place = may_replace(target, PREPARED, overwrite=overwrite, reads=reads, files=FILES)
    with atomic_directory(place) as directory:
        (directory / PREPARED_ROWS).write_text(text)
        write_json(directory / PREPARED_MANIFEST, {"format": 1, "rows_sha256": "", "digest": ""})


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def refused(target: Path, match: str, *, overwrite: bool = True, reads: tuple[Path, ...] = ()) -> None:
    root = Path(os.path.realpath(target)).parent
    before = content(root)
    with pytest.raises(RunError, match=match):
        publish(target, overwrite=overwrite, reads=reads)
    assert content(root) == before


def test_what_we_published_carries_our_mark_and_is_replaced_when_asked(tmp_path):
    target = tmp_path / "p"
    publish(target)
    mark = read_mark(target)
    assert mark.kind == PREPARED and mark.files == {MARK, PREPARED_MANIFEST, PREPARED_ROWS} and len(mark.id) == 16
    refused(target, "exists already", overwrite=False)
    publish(target, overwrite=True, text="new")
    assert (target / PREPARED_ROWS).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_one_of_an_older_version_is_known_by_its_record(tmp_path):
    target = tmp_path / "p"
    publish(target)
    (target / MARK).unlink()
    publish(target, overwrite=True)
    (target / MARK).unlink()
    (target / "notes.txt").write_text("mine")
    refused(target, r"did not write \(notes\.txt\)")


@pytest.mark.parametrize(
    ("name", "record", "kind"),
    [
        (MERGE_RECORD, {"format": 1, "formatting": None}, MERGED),
        (RUN_RECORD, {"format": 1, "qlora_version": "0.1"}, RUN),
        (RUN_YAML, dict.fromkeys(("model", "output", "learning_rate", "rank", "quant_type"), 1), RUN),
    ],
)
def test_so_are_runs_and_merged_models_and_others_with_less_in_it_are_not(tmp_path, name, record, kind):
    write_json(tmp_path / name, record)  # which is YAML, too
    assert read_mark(tmp_path) == Mark(kind)
    record.popitem()
    write_json(tmp_path / name, record)
    assert read_mark(tmp_path) is None


@pytest.mark.parametrize("name", ["notes.txt", "README.md", ".hidden", "model.py", "x.tmp", ".x.old"])
def test_a_file_that_we_did_not_write_is_never_replaced(tmp_path, name):
    target = tmp_path / "p"
    target.mkdir()
    (target / name).write_text("mine")
    refused(target, "which qlora did not write")
    (target / name).unlink()
    publish(target)
    (target / name).write_text("mine")
    refused(target, "that qlora did not write")


def test_records_of_other_programs_links_and_folders_are_not_ours(tmp_path):
    target = tmp_path / "p"
    target.mkdir()
    for record in ("[]", "{}", '{"format": "1", "rows_sha256": "", "digest": ""}', "{" * 100_000, '{"qlora": 2}'):
        for name in (PREPARED_MANIFEST, MARK, MERGE_RECORD):
            (target / name).write_text(record)
            refused(target, "which qlora did not write")
            (target / name).unlink()
    publish(target)
    (target / PREPARED_ROWS).unlink()
    (target / PREPARED_ROWS).symlink_to(tmp_path)
    refused(target, "did not write")
    (target / PREPARED_ROWS).unlink()
    (target / PREPARED_ROWS).mkdir()
    refused(target, "did not write")


def test_another_kind_of_ours_is_not_replaced(tmp_path):
    publish(tmp_path / "p")
    with pytest.raises(RunError, match="holds prepared rows, and not a merged model"):
        may_replace(tmp_path / "p", MERGED, overwrite=True)


def test_nothing_that_is_read_and_nothing_above_it_is_replaced(tmp_path, monkeypatch):
    publish(tmp_path / "a")
    inner = tmp_path / "a" / PREPARED_ROWS
    refused(tmp_path / "a", "is what this command reads", reads=(tmp_path / "a",))
    refused(tmp_path / "a", "is above", reads=(inner,))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    refused(tmp_path / "link", "is above", reads=(inner,))
    refused(tmp_path / "a", "is what this command reads", reads=(tmp_path / "link",))
    monkeypatch.chdir(tmp_path / "a")
    refused(Path("../a"), "is above", reads=(Path(PREPARED_ROWS),))
    with pytest.raises(RunError, match="is above"):
        may_replace(Path("/"), PREPARED, overwrite=True, reads=(inner,))
    publish(tmp_path / "b", reads=(tmp_path / "missing", inner))  # what is not there cannot be lost


def test_a_file_of_answers_is_no_input_under_any_name(tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("{}")
    (tmp_path / "hard").hardlink_to(prompts)
    (tmp_path / "soft").symlink_to(prompts)
    for name in ("p.jsonl", "hard", "soft", "./p.jsonl"):
        with pytest.raises(RunError, match="is what this command reads"):
            may_write_file(tmp_path / name, [prompts])
    with pytest.raises(RunError, match="not a regular file"):
        may_write_file(tmp_path, [prompts])
    with pytest.raises(RunError, match="not a regular file"):
        may_write_file(Path("/dev/null"), [prompts])
    assert may_write_file(tmp_path / "new", [prompts]) == tmp_path / "new"


def test_links_work_or_are_refused_before_the_work(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far")
    publish(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and read_mark(tmp_path / "far").kind == PREPARED
    publish(tmp_path / "link", overwrite=True, text="new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / PREPARED_ROWS).read_text() == "new"
    (tmp_path / "dangling").symlink_to("nowhere")
    refused(tmp_path / "dangling", "leads nowhere")
    (tmp_path / "circle").symlink_to("circle")
    refused(tmp_path / "circle", "leads nowhere")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path / ("n" * 256), "too long")
    publish(tmp_path / ("n" * 255))
    publish(tmp_path / ("ü" * 127), overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_work_that_cannot_go_into_the_working_directory_any_more_is_kept_there(tmp_path, monkeypatch):
    """Beside it may be another file system, as around a mount point."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    place = may_replace(Path(), PREPARED, overwrite=False)
    with pytest.raises(RunError, match="What was made is in"), atomic_directory(place) as temporary:
        (temporary / PREPARED_ROWS).write_text("rows")
        Path("mine").write_text("x")
    (kept,) = Path().glob("here.new-*")
    assert (kept / PREPARED_ROWS).read_text() == "rows" and Path("mine").read_text() == "x"


def test_the_working_directory_is_filled_and_never_swapped_away(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    number = Path.cwd().stat().st_ino
    publish(Path())
    assert Path.cwd().stat().st_ino == number and read_mark(Path()).kind == PREPARED
    assert sorted(path.name for path in Path().iterdir()) == [MARK, PREPARED_MANIFEST, PREPARED_ROWS]
    refused(Path(), "working directory")
    Path(PREPARED_MANIFEST).unlink()  # as a kill leaves it, which the next attempt clears
    publish(Path(), text="again")
    assert Path(PREPARED_ROWS).read_text() == "again"
    refused(Path(".."), "did not write")


def test_what_comes_to_stand_there_during_the_work_is_not_replaced_and_the_work_is_kept(tmp_path):
    for overwrite in (False, True):
        target = tmp_path / f"p{overwrite}"
        place = may_replace(target, PREPARED, overwrite=overwrite, files=FILES)
        with pytest.raises(RunError, match="What was made is in") as error, atomic_directory(place) as directory:
            (directory / PREPARED_ROWS).write_text("rows")
            target.mkdir()
            (target / "notes.txt").write_text("mine")
        assert (target / "notes.txt").read_text() == "mine"
        (kept,) = tmp_path.glob(f"p{overwrite}.new-*")
        assert str(kept) in error.value.message and (kept / PREPARED_ROWS).read_text() == "rows"


def test_in_random_trees_no_foreign_file_ever_changes(tmp_path):
    chooser = random.Random(0)
    names = ["notes.txt", "README.md", PREPARED_ROWS, PREPARED_MANIFEST, MARK, "deep/x", "checkpoints/step-00000001/a"]
    for number in range(150):
        root = tmp_path / str(number)
        root.mkdir()
        if chooser.random() < 0.4:
            publish(root / "t")
        ours = set(content(root))
        foreign = {}
        for name in chooser.sample(names, chooser.randrange(4)):
            path = root / "t" / name
            if str(path.relative_to(root)) in ours:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(chooser.choice(["{}", "mine", '{"format": 1}']))
            foreign[path] = path.read_bytes()
        try:
            publish(root / "t", overwrite=chooser.random() < 0.8, text="new")
        except RunError:
            assert foreign or ours
        assert all(path.read_bytes() == before for path, before in foreign.items())
        assert not list(root.rglob(".t.*"))


def test_nothing_can_be_made_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    for below in (tmp_path / "file" / "out", tmp_path / "file" / "far" / "out"):
        with pytest.raises(RunError, match=f"out cannot be written: {tmp_path}/file is a file"):
            may_replace(below, PREPARED, overwrite=False)


@pytest.mark.parametrize("form", ["/{0}/kept", "//{0}/kept", "../outside/kept", "folder/link/kept"])
def test_what_a_mark_lists_outside_its_directory_is_not_removed(tmp_path, monkeypatch, form):
    """What it lists is removed where the working directory is filled, and anyone may have written it."""
    here, outside = tmp_path / "here", tmp_path / "outside"
    for directory in (here / "folder", outside):
        directory.mkdir(parents=True)
    (outside / "kept").write_text("kept")
    (here / "model.safetensors").write_text("of an earlier attempt")
    (here / "folder" / "link").symlink_to(outside)
    write_mark(here, MERGED, files=["model.safetensors", MARK, "folder/link", form.format(str(outside)[1:])])
    monkeypatch.chdir(here)
    with atomic_directory(may_replace(here, MERGED, overwrite=False)) as made:
        (made / MERGE_RECORD).write_text("{}")
    assert (outside / "kept").read_text() == "kept"
    assert (here / MERGE_RECORD).exists() and not (here / "model.safetensors").exists()


def test_nothing_can_be_made_in_a_closed_folder(tmp_path, monkeypatch):
    lstat = Path.lstat

    def closed(path):
        if path.parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", closed)  # as for everybody but root
    with pytest.raises(RunError, match="out cannot be written: Permission denied"):
        resolve(tmp_path / "out")
