"""Adapters that do something: PEFT starts with B zero."""

import torch


def draw_b(model, *, seed: int = 1, scale: float = 0.05):
    """Draws every B of a model's adapters, and returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model
