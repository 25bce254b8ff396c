"""Tiny models of which some layers keep a state of fixed size, in 4 bits and with an adapter that changes their answers."""

import sys
from pathlib import Path

import torch

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings

HYBRIDS = (
    "qwen3_5_text",  # gated delta nets
    "qwen3_5",
    "qwen3_5_moe_text",
    "qwen3_next",
    "lfm2",  # short convolutions
    "lfm2_moe",
    "bamba",  # mamba 2
    "granitemoehybrid",
    "falcon_h1",  # beside attention in every layer
    "nemotron_h",  # layers without any state
    "zamba2",  # shared layers
    "jamba",  # mamba 1
)
BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


def load_hybrid(directory: Path, name: str, *, device: torch.device):
    """A model of that architecture, in eval mode; weights and adapter are the same on every device."""
    sys.path.insert(0, BENCHMARKS)
    try:
        from support.architectures import write_model
    finally:
        sys.path.remove(BENCHMARKS)
    write_model(directory, name)
    base, _ = load_base(
        resolve_model(str(directory)),
        QuantizationSettings(base_cache=False),
        compute_dtype=torch.float32,
        device=device,
    )
    model = attach_adapter(base, LoraSettings(rank=4, alpha=16)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model
