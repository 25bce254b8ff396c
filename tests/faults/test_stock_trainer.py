"""The stock Trainer under the same faults: what the figures of this project stand beside. It asserts nothing of it."""

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .conftest import Outcome, Zygote, count
from .test_damage import DAMAGES, damage
from .test_disk import FILL_AFTER_STEP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STATE_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)
SIZES = 50


class Stock:
    """Runs of the stock Trainer on one model."""

    def __init__(self, zygote: Zygote, model: Path, folder: Path) -> None:
        self.zygote, self.model = zygote, model
        self.reference = folder / "reference"
        done = self.train(self.reference)
        assert done.code == 0, done.said

    def train(self, output: Path, **keywords) -> Outcome:
        function = "tests.faults.stock:train"
        return self.zygote.run(function, model=str(self.model), output=str(output), **keywords)

    def equals_reference(self, output: Path) -> bool:
        final = Path("final") / "adapter_model.safetensors"
        return (output / final).read_bytes() == (self.reference / final).read_bytes()


@pytest.fixture(scope="module")
def stock(zygote, tiny_model, tmp_path_factory) -> Stock:
    return Stock(zygote, tiny_model("llama"), tmp_path_factory.mktemp("stock"))


def test_killed_at_every_file_call(stock, tmp_path):
    row = "stock Trainer: SIGKILL at every file call of a run"
    assert stock.train(tmp_path / "counted", fault={"names_to": str(tmp_path / "names")}).code == 0
    for point in range(1, len((tmp_path / "names").read_text().splitlines()) + 1):
        output = tmp_path / f"at{point}"
        killed = stock.train(output, fault={"kill_at": point})
        assert killed.code == -9, killed.said
        resumable = any(output.glob("checkpoint-*"))
        done = stock.train(output, resume=resumable)
        equal = done.code == 0 and stock.equals_reference(output)
        count(row, kills=1, cannot_resume=int(done.code != 0), different=int(done.code == 0 and not equal))


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damage_of_each_file(stock, tmp_path, kind):
    row = f"stock Trainer: checkpoint file {kind}"
    for name in STATE_FILES:
        output = tmp_path / name
        stock.train(output, fault={"killed_after": 5})
        newest = max(output.glob("checkpoint-*"))
        damage(newest / name, kind, random.Random(f"{name} {kind}"))
        done = stock.train(output, resume=True)
        unnoticed = done.code == 0 and name not in done.said
        different = done.code == 0 and not stock.equals_reference(output)
        count(
            row,
            damages=1,
            ended_with_an_exception=int(done.code != 0),
            unnoticed=int(unnoticed),
            of_these_other_weights=int(unnoticed and different),
        )


def test_files_that_cannot_grow(stock, tmp_path):
    row = "stock Trainer: write fails at a file size (RLIMIT_FSIZE)"
    files = [p for p in stock.reference.glob("checkpoint-6/*") if p.is_file()]
    largest = max(path.stat().st_size for path in files)
    for number in range(SIZES + 1):
        output = tmp_path / str(number)
        ended = stock.train(output, fault={"limit_bytes": largest * number // SIZES})
        if ended.code == 0:
            count(row, sizes=1, failed=0)
            continue
        done = stock.train(output, resume=True)
        equal = done.code == 0 and stock.equals_reference(output)
        count(row, sizes=1, failed=1, cannot_resume=int(done.code != 0), different=int(done.code == 0 and not equal))
        shutil.rmtree(output)
    assert FILL_AFTER_STEP == 3  # the same step as in stock.py


def test_nan_in_one_step(stock, tmp_path):
    done = stock.train(tmp_path / "out", fault={"nan_steps": [3]})
    losses = [float(loss) for loss in json.loads((tmp_path / "out" / "log.json").read_text())["losses"]]
    saved = load_file(tmp_path / "out" / "final" / "adapter_model.safetensors")
    count(
        "stock Trainer: NaN in one step",
        runs=1,
        stopped=int(done.code != 0),
        losses_logged_as_0=sum(loss == 0 for loss in losses),
        adapters_saved_as_NaN=int(any(tensor.isnan().any() for tensor in saved.values())),
    )


def test_out_of_memory_in_step_3(stock, tmp_path):
    done = stock.train(tmp_path / "out", fault={"out_of_memory_above": 1})
    assert done.code == 0, done.said
    seen = json.loads((tmp_path / "out" / "log.json").read_text())["steps_run"]
    count(
        "stock Trainer: out of memory in step 3 (auto_find_batch_size)",
        runs=1,
        restarts_at_step_1=int(1 in seen[seen.index(3) :]),
        effective_batch_halved=int(seen[-2:].count(6) == 2),  # two micro-batches a step still, of half the rows
    )
