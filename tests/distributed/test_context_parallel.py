"""Ranks that share the tokens of each row compute what one rank computes with whole rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ARCHITECTURES
from tests.experts.expert_modules import write_expert_model

ROOT = Path(__file__).resolve().parents[2]


def test_losses_and_gradients_are_those_of_whole_packs(zygote, tiny_model):
    """Fewer keys than ranks, windows and capped scores; rotary frequencies that follow from the longest row."""
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    longrope |= {"original_max_position_embeddings": 36, "factor": 4.0}
    long = tiny_model("phi3", rope_parameters=longrope, original_max_position_embeddings=36)
    compare(zygote, [tiny_model("gemma2", num_key_value_heads=1), long], world_size=2, context=2)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "context"), [(4, 4), (4, 2)])
def test_every_architecture_that_packs_shares_its_tokens(zygote, tiny_model, world_size, context):
    models = [tiny_model(name) for name in ARCHITECTURES if name != "bloom"]
    compare(zygote, models, world_size=world_size, context=context, gradient_checkpointing="on")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_experts_and_sinks_too(zygote, tmp_path, layout):
    write_expert_model(layout, tmp_path / "model")
    compare(zygote, [tmp_path / "model"], world_size=2, context=2)


@pytest.mark.slow
def test_keys_that_ranks_do_not_divide_are_copied(zygote, tiny_model):
    shape = {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 192, "head_dim": 16}
    compare(zygote, [tiny_model("llama", **shape)], world_size=3, context=3)


@pytest.mark.gpu
def test_cards_share_tokens_too(tiny_model):
    """Also heads of a size that cuDNN takes, and keys of which there are fewer than cards."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    wide = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 2048}
    models = [tiny_model("llama", **wide), tiny_model("qwen2", **wide, num_key_value_heads=1), tiny_model("gemma2")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed.context_ranks", "2", *map(str, models)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("all as one rank's") == 2, done.stdout + done.stderr


def compare(zygote, models, **how):
    done = zygote.run("tests.distributed.context_ranks:run_on_cpu", directories=list(map(str, models)), **how)
    assert done.code == 0 and done.said.count("all as one rank's") == how["world_size"], done.said
