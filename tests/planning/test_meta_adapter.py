"""What is counted and traced over an adapter made without PEFT is what PEFT's own adapter gives, on every architecture."""

import subprocess
import sys

import pytest
import torch

from benchmarks.support.architectures import ARCHITECTURES, make_config
from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.planning import model_profile
from qlora_cli.core.planning.meta_adapter import attach_on_meta
from qlora_cli.errors import AdapterError
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.conftest import most_slow
from tests.hub import PROJECT

KEPT = ("gpt2", "qwen3_moe")


def profile(architecture, lora, traced):
    return model_profile.profile_model(
        make_config(architecture), lora, QuantizationSettings(), compute_dtype=torch.bfloat16, traced=traced
    )


@pytest.mark.parametrize("architecture", most_slow([name for name in ARCHITECTURES if name != "t5"], KEPT))
def test_profiles_are_those_over_pefts_adapter(architecture, monkeypatch):
    settings = LoraSettings(rank=4, dropout=0.1)
    ours = profile(architecture, settings, traced=True)
    monkeypatch.setattr(model_profile, "attach_on_meta", lambda model, lora, fused: attach_adapter(model, lora))
    assert ours == profile(architecture, settings, traced=True)


@pytest.mark.slow
def test_a_model_is_traced_alike_each_time():
    """Also where tensors die on the way, whose addresses others get."""
    first, *others = (profile("nemotron_h", LoraSettings(rank=4, dropout=0.1), traced=True) for _ in range(16))
    assert all(other == first for other in others)


def test_what_is_no_plain_adapter_is_attached_by_peft_and_mistakes_are_the_same():
    for settings in (
        LoraSettings(dora=True),
        LoraSettings(modules_to_save=("lm_head",)),
        LoraSettings(rank_pattern=("q_proj=2",)),
    ):
        model = attach_on_meta(build_empty(make_config("llama")), settings, fused=True)
        assert hasattr(model, "peft_config")
    with pytest.raises(AdapterError, match="v_porj matches no linear layer"):
        attach_on_meta(build_empty(make_config("llama")), LoraSettings(target_modules=("q_proj", "v_porj")), fused=True)


@pytest.mark.slow  # 12 s of imports, in a process of its own
def test_inspect_of_a_model_imports_neither_peft_nor_bitsandbytes(tiny_model):
    script = (
        "import sys; from qlora_cli.cli.app import main; code = main(['inspect', '--model', sys.argv[1], '--vram', '12GiB'])\n"
        "assert code == 0; print([name for name in ('torch', 'peft', 'bitsandbytes') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_model("llama"))], capture_output=True, text=True, cwd=PROJECT
    )
    assert done.stdout.splitlines()[-1:] == ["['torch']"], done.stderr
