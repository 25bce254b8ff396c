"""Calibration holds what one layer needs, however many layers there are."""

import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.adapters.original_weights import OriginalWeights
from qlora_cli.core.calibration.adapter_start import calibrate_adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.events import report_nothing
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings

SIZE, WIDE, TOKENS = 256, 768, 128


class LiveBytes(TorchDispatchMode):
    """Most bytes of tensors that operations inside the block made and that were alive at once."""

    def __init__(self, model) -> None:
        super().__init__()
        self.now = self.peak = 0
        held = [value for module in model.modules() for value in vars(module).get("_parameters", {}).values()]
        self._known = {id(value.untyped_storage()): value.untyped_storage() for value in held if value is not None}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self._known:
                self._count(storage)
        return result

    def _count(self, storage) -> None:
        key, size = id(storage), storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)


def peak_bytes(directory, layers: int) -> int:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=SIZE, intermediate_size=WIDE, num_hidden_layers=layers, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(directory / str(layers))
    files = resolve_model(str(directory / str(layers)))
    held = QuantizationSettings(base_cache=False)
    base, _ = load_base(files, held, compute_dtype=torch.float32, device=torch.device("cpu"))
    model = attach_adapter(base, LoraSettings(rank=4), seed=0).eval()
    drawn = np.random.default_rng(0).integers(0, 128, (2, 4, TOKENS // 4))
    with OriginalWeights(files) as originals, LiveBytes(model) as live:
        calibrate_adapter(
            model.get_base_model(), originals, list(torch.from_numpy(drawn)), "calibrated", report_nothing
        )
    return live.peak


def test_moments_and_errors_of_a_layer_are_gone_before_the_next_one(tmp_path):
    one, three = peak_bytes(tmp_path, 1), peak_bytes(tmp_path, 3)
    hidden = 2 * 4 * TOKENS * SIZE  # of all rows, which wait on the host
    assert three < one + hidden
    # Three errors of the widest layer, the moments of a layer's four inputs, and its activations.
    assert three < 4 * (4 * SIZE * WIDE + 5 * SIZE * SIZE + TOKENS * (2 * SIZE + 3 * WIDE)) + 2 * hidden
