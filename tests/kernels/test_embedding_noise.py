"""NEFTune's noise is as large as its paper says for each row of a pack, only in training, and that of transformers for one row."""

import pytest
import torch
from torch import nn

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.data.packing import collate
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.kernels.embedding_noise import add_noise, tokens_of_rows
from qlora_cli.settings.groups import LoraSettings, StepSettings
from tests.training.training_case import MemoryRows

SIZE = 64


def test_a_row_alone_is_as_transformers_does_it():
    from transformers.integrations.neftune import neftune_post_forward_hook

    module = nn.Embedding(10, SIZE)
    module.neftune_noise_alpha = 5.0
    embedded = torch.randn(1, 24, SIZE)
    torch.manual_seed(3)
    want = neftune_post_forward_hook(module, (), embedded)
    torch.manual_seed(3)
    got = add_noise(embedded, torch.tensor([[24]]), 5.0)
    torch.testing.assert_close(got, want)


def test_each_row_of_a_pack_has_the_magnitude_of_its_own_length():
    boundaries = torch.tensor([0, 9, 9, 109, 128], dtype=torch.int32)
    lengths = tokens_of_rows(boundaries, 128)
    assert lengths.tolist() == [[9] * 9 + [100] * 100 + [19] * 19]
    noise = add_noise(torch.zeros(1, 128, SIZE), lengths, 7.0)[0]
    for start, end in ((0, 9), (9, 109), (109, 128)):
        magnitude = 7.0 / ((end - start) * SIZE) ** 0.5
        part = noise[start:end]
        assert 0.9 * magnitude < part.abs().max() <= magnitude
        assert part.abs().mean() == pytest.approx(magnitude / 2, rel=0.15)


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("architecture", ["llama", "falcon"])  # packed and padded rows
def test_noise_is_of_training_alone_and_repeats_by_the_seed(load_tiny, architecture, engine):
    base, _ = load_tiny(architecture)
    model = attach_adapter(base, LoraSettings(rank=4), seed=0)
    rows = MemoryRows(count=3)
    batch = collate([rows[i] for i in range(3)], [0, 1, 2])

    def losses(alpha: float) -> tuple[list[float], float]:
        step = install_engine(
            model,
            StepSettings(engine=engine, neftune_noise_alpha=alpha),
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            max_tokens=batch.tokens,
            total_steps=2,
            report=lambda event: None,
        )
        try:
            found = []
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                found.append(step.loss(step.prepare(batch)).item())
            model.eval()
            return found, step.loss(batch).item()
        finally:
            model.train()
            step.close()

    model.train()
    (plain, *_), evaluated = losses(0.0)
    (first, again, other), evaluated_with = losses(5.0)
    assert first == again != other and plain not in (first, other)
    assert evaluated == evaluated_with
