"""On a GPU: copies on a stream of their own never change what is computed, however fast layers are used."""

import gc

import pytest
import torch

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.engine.decoder_layers import find_layers
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import find_decoder
from qlora_cli.core.streaming.host_memory import TOUCHED_BYTES, lock_pages
from qlora_cli.core.streaming.streamed_base import stream_base
from qlora_cli.events import report_nothing
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings
from tests.engine.test_engine import batch_of, gradients

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# Layers of 18 MiB that compute on some 80 tokens: copying takes far longer than computing.
WIDE = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 9, "num_attention_heads": 16}


@pytest.fixture(scope="module")
def whole_and_streamed(tiny_model, tmp_path_factory):
    """The same base with the same adapter, on the card and streaming: from the host, and from its copy on the disk."""
    directory = tiny_model("llama", **WIDE, num_key_value_heads=16)

    def load(where):
        shards = WeightShards(ProcessGroup(), on_host=True, in_copy=where == "disk") if where else None
        base, _ = load_base(
            resolve_model(str(directory), report=report_nothing),
            QuantizationSettings(base_cache=True),
            compute_dtype=torch.bfloat16,
            device=CUDA,
            weight_shards=shards,
        )
        if where:
            stream_base(base, find_layers(find_decoder(base)), CUDA, streamed=9)
        torch.manual_seed(0)
        model = attach_adapter(base, LoraSettings(rank=4, alpha=8)).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield {where: load(where) for where in ("", "host", "disk")}


def steps(model, *, compiled=False, **options):
    """Losses and gradients of ten micro-batches, with passes of evaluation in between."""
    engine = install_engine(
        model,
        StepSettings(compile=compiled, resident_weights=False, **options),
        device=CUDA,
        compute_dtype=torch.bfloat16,
        max_tokens=128,
        total_steps=1,
        report=report_nothing,
    )
    found = []
    for seed in range(10):
        model.zero_grad(set_to_none=True)
        loss = engine.loss(batch_of(seed=seed))
        if seed % 3 == 0:
            with torch.no_grad():
                engine.loss(batch_of((9,), seed=7))
        loss.backward()
        found.append((loss.item(), gradients(model)))
    engine.close()
    return found


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", ["off", "on", "4"])
def test_streamed_gradients_are_as_near_as_those_of_two_equal_passes(
    whole_and_streamed, where, compiled, checkpointing
):
    options = {"gradient_checkpointing": checkpointing, "compiled": compiled, "offload_activations": False}
    whole, again = (steps(whole_and_streamed[""], **options) for _ in range(2))
    streamed = steps(whole_and_streamed[where], **options)
    for (loss, expected), (loss_again, other), (found_loss, found) in zip(whole, again, streamed, strict=True):
        assert abs(found_loss - loss) <= abs(loss_again - loss) + 1e-6 * abs(loss)
        assert (found - expected).norm() <= 2 * (other - expected).norm() + 1e-6 * expected.norm()


def test_locked_pages_are_copied_from_at_once_and_may_be_given_up_before_the_copy_is_done():
    buffer = lock_pages(TOUCHED_BYTES)
    assert buffer.is_pinned() and buffer.sum() == 0
    expected = buffer.random_(generator=torch.Generator().manual_seed(0)).clone()
    torch.cuda._sleep(50_000_000)
    found = buffer.to(CUDA, non_blocking=True)
    del buffer
    gc.collect()
    assert torch.equal(found.cpu(), expected)
