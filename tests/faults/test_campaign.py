"""Faults at the file calls of all five commands, both caches cold: nothing is lost, and the same command mends it."""

import random
import shutil
import subprocess

import pytest

from .campaign import COMMANDS, LOCKS_LIE, NO_EXCHANGE, NO_LOCKS, NO_RENAME_OVER, Campaign, build_injector
from .conftest import Zygote

SHORT = ("prepare --overwrite", "generate", "inspect")  # merges that are killed: tests/commands/test_merge_faults.py
SHORT_TRIALS = 2  # of each
LONG_TRIALS = 64
LONG_PARTS = 2  # so that one of train is no longer than others
NETWORK_TRIALS = 16
NETWORKS = {
    "no exchange, no locks": NO_EXCHANGE | NO_LOCKS,
    "no exchange, no rename over, locks that lie": NO_EXCHANGE | NO_RENAME_OVER | LOCKS_LIE,
}


CONTAINER = ("unshare", "--fork", "--pid", "--mount-proc")  # in each the first process is number 1
PAIRS = 10


@pytest.fixture(scope="session")
def containers(tmp_path_factory, tiny_model):
    """A campaign in one container, and the process of another."""
    library = build_injector(tmp_path_factory.mktemp("injector"))
    if library is None or subprocess.run([*CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("there is no C compiler, or namespaces are not permitted here")
    environment = {"LD_PRELOAD": str(library), "HF_HUB_OFFLINE": "1"}
    first, second = (Zygote(tmp_path_factory.mktemp("container"), environment, CONTAINER) for _ in range(2))
    yield Campaign(first, tmp_path_factory.mktemp("campaign") / "home", tiny_model("llama")), second
    first.close()
    second.close()


@pytest.fixture(scope="session")
def campaign(zygote, tmp_path_factory, tiny_model):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler to build the injector with")
    return Campaign(zygote, tmp_path_factory.mktemp("campaign") / "home", tiny_model("llama"))


def run(campaign, table, command, trials, ways=0, seed=0):
    wrong = []
    for at, mode in campaign.points(command, random.Random(f"{seed}{command}"))[:trials]:
        wrong += campaign.trial(command, at, mode, table=table, ways=ways)
    assert not wrong, f"{len(wrong)} trials:\n" + "\n".join(wrong)


@pytest.mark.parametrize("command", SHORT)
def test_a_fault_in_a_command_loses_nothing_and_the_same_command_mends_it(campaign, command):
    run(campaign, "any fault (short)", command, SHORT_TRIALS)  # of train see test_kill.py


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(LONG_PARTS))
@pytest.mark.parametrize("command", COMMANDS)
def test_faults_at_file_calls_of_every_command(campaign, command, part):
    assert LONG_TRIALS * len(COMMANDS) >= 500
    run(campaign, "local", command, LONG_TRIALS // LONG_PARTS, seed=part)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_faults_on_file_systems_like_those_of_networks(campaign, name, command):
    run(campaign, name, command, NETWORK_TRIALS, NETWORKS[name], seed=9)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", ["prepare", "train", "generate", "merge"])
@pytest.mark.parametrize("shares_output", [False, True])
def test_two_containers_that_share_a_cache_or_an_output_never_lose_each_other_s_work(
    containers, shares_output, command
):
    campaign, other = containers
    wrong = []
    table = "two containers, one output" if shares_output else "two containers, one cache"
    points = campaign.points(command, random.Random(f"pairs{command}"))
    campaign.warm(command, other)
    for at, mode in points[:PAIRS]:
        wrong += campaign.pair(command, at, mode, other, shares_output=shares_output, table=table)
    assert not wrong, f"{len(wrong)} trials:\n" + "\n".join(wrong)
