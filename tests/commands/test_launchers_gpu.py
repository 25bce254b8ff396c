"""On two cards: a sharded base trains as a whole one, on the cards or waiting on the host; a killed rank ends the other."""

import time

import psutil
import pytest
import torch

from tests.experts.expert_modules import write_expert_model

from .test_launchers import given, losses, newest, start, wait  # noqa: F401 - a fixture

pytestmark = pytest.mark.gpu
CARDS = {"ACCELERATE_USE_CPU": "0"}


@pytest.fixture(autouse=True)
def two_cards():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")


@pytest.mark.parametrize(("layout", "tolerance"), [(None, 2e-3), ("qwen3_moe", 2e-2), ("gpt_oss", 2e-2)])
def test_a_sharded_base_trains_as_a_whole_one(given, tmp_path, layout, tolerance):  # noqa: F811
    """Dense, and of experts, where another order of adding sends tokens to other ones now and then."""
    folder, (_, flags) = tmp_path, given
    if layout is not None:
        write_expert_model(layout, folder / "model")
        flags = ["--model", str(folder / "model"), *flags[2:]]
    found = {}
    for name, more in (("whole", []), ("sharded", ["--shard"]), ("away", ["--shard-offload"])):
        command = ["python", "-m", "qlora_cli", "train", *flags, "--gpus", "2", "--output", folder / name, *more]
        code, _, said = wait(start(command, **CARDS))
        assert code == 0 and ("base sharded over the cards" in said) == bool(more), said
        found[name] = losses(folder / name)
    assert found["sharded"] == pytest.approx(found["whole"], rel=tolerance)
    assert found["away"] == pytest.approx(
        found["sharded"], rel=tolerance
    )  # attention's backward pass adds in any order


def test_cards_that_share_tokens_train_as_one(given, tmp_path):  # noqa: F811
    """Alone, and with the base sharded too; what memory is planned with is predicted."""
    _, flags = given
    ways = {"one": [], "shared": ["--gpus", "2", "--context-parallel", "2"]}
    ways["sharded"] = [*ways["shared"], "--shard"]
    found = {}
    for name, more in ways.items():
        command = ["python", "-m", "qlora_cli", "train", *flags, "--output", tmp_path / name, *more]
        code, _, said = wait(start(command, **CARDS))
        assert code == 0 and ("packs shared by 2 ranks" in said) == bool(more), said
        found[name] = losses(tmp_path / name)
    assert found["shared"] == pytest.approx(found["one"], rel=2e-3)
    assert found["sharded"] == pytest.approx(found["one"], rel=2e-3)


def test_a_killed_rank_ends_the_one_that_waits_for_it_in_a_collective(given):  # noqa: F811
    folder, flags = given
    output = folder / "killed-on-card"
    command = ["python", "-m", "qlora_cli", "train", *flags, "--output", output, "--gpus", "2", "--max-steps", "100000"]
    process = start(command, **CARDS)
    while not newest(output):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    next(rank for rank in psutil.Process(process.pid).children() if rank.environ()["RANK"] == "1").kill()
    code, _, said = wait(process)
    assert code == 1 and said.count("error:") == 1 and "error: Rank 1 of 2" in said, said
