"""Roofline of training: how many tokens a second the arithmetic of each card allows at most."""

from typing import Any

# Dense 16-bit tensor-core arithmetic with sums in float32, in floating-point operations a second, from NVIDIA's data
# sheets (where those count sparsity, half of it).
CARDS = {
    "T4": 65e12,
    "RTX 3090": 71e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "A100": 312e12,
    "L40S": 362e12,
    "H100, H200": 989e12,
}
# Copies from page-locked host memory to a card, bytes a second: what is left of 16, 32 and 64 GB/s in practice.
LINKS = {"PCIe 3, 16 lanes": 12e9, "PCIe 4, 16 lanes": 25e9, "PCIe 5, 16 lanes": 50e9}
# Measured on an H200 through the fast engine with micro-batches of 2,048 tokens and more (benchmarks/step.md).
REACHED = "an H200 reaches a third to a half of it, with short micro-batches less"


def bound_speed(flops_per_token: float) -> dict[str, Any]:
    """A table of the bound for some cards, by `memory_estimate.count_flops`; memory, launches and the host only lower it."""
    rows = [[card, int(flops / flops_per_token)] for card, flops in CARDS.items()]
    return {"title": f"Speed at most: {REACHED}", "columns": ["card", "tokens_per_second"], "rows": rows}


def bound_streaming(copied_bytes: int, tokens: int) -> dict[str, Any]:
    """A table of how many tokens a second links allow at most, where each micro-batch of so many tokens copies so many
    bytes of weights."""
    rows = [[link, int(tokens * speed / max(1, copied_bytes))] for link, speed in LINKS.items()]
    return {"title": "Speed at most where the base streams", "columns": ["link", "tokens_per_second"], "rows": rows}
