"""Files of the newest checkpoint missing, cut short, with one bit flipped, or zeroed: named, skipped, the older used."""

import random
import shutil
from pathlib import Path

import pytest

from qlora_cli.core.storage.checkpoint import MANIFEST, newest_valid
from qlora_cli.core.training.state import REQUIRED_FILES

from .conftest import Run, Zygote, count

DAMAGES = ("missing", "truncated", "bit-flipped", "zeroed")
FILES = (*REQUIRED_FILES, MANIFEST)


def damage(path: Path, kind: str, chooser: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: chooser.randrange(len(content))])
    elif kind == "bit-flipped":
        content[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
        path.write_bytes(content)
    else:
        path.write_bytes(bytes(len(content)))


@pytest.fixture(scope="module")
def stopped(zygote, make_run, tmp_path_factory) -> Run:
    """A run killed after its second checkpoint."""
    run = make_run(tmp_path_factory.mktemp("stopped") / "out")
    for _ in range(2):
        zygote.train({**run.options, "resume": True}, {"kind": "killed_after", "step": 5})
    assert len(run.checkpoints) == 2
    return run


@pytest.mark.each_choice
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_each_damage_of_each_file_is_found_and_named(stopped, tmp_path, name, kind):
    root = shutil.copytree(stopped.output / "checkpoints", tmp_path / "checkpoints")
    older, newer = sorted(root.iterdir())
    damage(newer / name, kind, random.Random(f"{name} {kind}"))
    found, skipped = newest_valid(root, REQUIRED_FILES)
    named = [s.path for s in skipped] == [newer] and name in skipped[0].reason
    used = found is not None and found.path == older
    count("checkpoint file damaged: found at resume", damages=1, unnoticed=int(not (named and used)))
    assert named and used


def resume_damaged(zygote: Zygote, make_run, stopped: Run, directory: Path, name: str, kind: str) -> None:
    shutil.copytree(stopped.output, directory)
    run = make_run(directory)
    newer = run.checkpoints[-1]
    damage(newer / name, kind, random.Random(f"{kind} {name}"))
    done = zygote.train({**run.options, "resume": True})
    said = done.code == 0 and any(newer.name in line and name in line for line in done.said.splitlines())
    equal = said and run.equals_reference()
    count("checkpoint file damaged: run resumed", damages=1, not_named=int(not said), different=int(not equal))
    assert said and equal, done.said


def test_a_run_goes_on_from_the_older_checkpoint(zygote, make_run, stopped, tmp_path):
    resume_damaged(zygote, make_run, stopped, tmp_path / "out", "optimizer.safetensors", "bit-flipped")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on_from_the_older_checkpoint_whatever_the_damage(zygote, make_run, stopped, tmp_path, name, kind):
    resume_damaged(zygote, make_run, stopped, tmp_path / "out", name, kind)
