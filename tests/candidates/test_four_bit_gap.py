"""What 4 bits cost: the losses are those of the whole models, and layers left in more bits bring what they say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.adapters.original_weights import OriginalWeights
from qlora_cli.core.candidates.four_bit_gap import measure_gap, measure_layers
from qlora_cli.core.merge.compare_models import pad_together
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_unquantized
from qlora_cli.events import report_nothing
from qlora_cli.settings.groups import LoraSettings
from tests.adapted import draw_b
from tests.conftest import most_slow
from tests.training.training_case import MemoryRows

ROWS = [MemoryRows(count=6)[i] for i in range(6)]
APART, TOGETHER = (
    pad_together(ROWS, vocabulary=512, device=torch.device("cpu"), most_tokens=most) for most in (1, None)
)


def loss_of(model) -> float:
    total = tokens = 0
    for ids, trained in ROWS:
        batch = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=batch[None], use_cache=False).logits[0, :-1]
        places = np.flatnonzero(trained[1:])
        total += F.cross_entropy(logits[places].float(), batch[1:][places], reduction="sum").item()
        tokens += len(places)
    return total / tokens


@pytest.mark.parametrize("architecture", most_slow(["llama", "gpt2", "qwen2"], ["gpt2"]))  # plain, transposed, biased
def test_losses_are_those_of_the_whole_models(tiny_model, load_tiny, architecture):
    files = resolve_model(str(tiny_model(architecture)))
    original = load_unquantized(files, dtype=torch.float32, device=torch.device("cpu"))
    base, _ = load_tiny(architecture)
    with OriginalWeights(files) as originals:
        gap, layers, mixtures = measure_layers(base, originals, APART, report_nothing)
        four_bits = loss_of(base)
        assert gap.four_bits == pytest.approx(four_bits, abs=1e-5)
        assert gap.sixteen_bits == pytest.approx(loss_of(original), abs=1e-5)
        assert [layer.error for layer in layers] == sorted((layer.error for layer in layers), reverse=True)
        assert all(0 < layer.error < 1 for layer in layers)
        eight, sixteen = mixtures
        assert (eight.bits, sixteen.bits) == (8, 16) and eight.layers == sixteen.layers == (layers[0].layer,)
        assert eight.loss == pytest.approx(sixteen.loss, abs=2e-3) and 0 < eight.more_bytes < sixteen.more_bytes
        assert loss_of(base) == four_bits  # nothing is left behind

        model = draw_b(attach_adapter(base, LoraSettings(rank=4, init="gaussian"), seed=0)).eval()
        with_adapter = measure_gap(model, originals, TOGETHER, report_nothing)
        assert with_adapter.adapter == pytest.approx(loss_of(model), abs=1e-5)
        assert with_adapter.four_bits == pytest.approx(four_bits, abs=1e-5)
        assert with_adapter.sixteen_bits == pytest.approx(gap.sixteen_bits, abs=1e-6)
        assert measure_gap(model, None, TOGETHER, report_nothing).sixteen_bits is None
