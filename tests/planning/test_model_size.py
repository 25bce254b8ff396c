"""Counts from a configuration alone are those of the real model, and 4-bit bytes those that bitsandbytes takes."""

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import count_parameters
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.planning.model_profile import profile_model
from qlora_cli.core.planning.model_size import measure_footprint, packed_bytes
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings
from tests.conftest import ARCHITECTURES, most_slow

# The architectures in their true sizes; adapters of the five tutorials.
KNOWN = {
    "gpt-neox-20b": (
        transformers.GPTNeoXConfig,
        {
            "vocab_size": 50432,
            "hidden_size": 6144,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "intermediate_size": 24576,
            "tie_word_embeddings": False,
        },
        (8, ("query_key_value",)),
        (8_650_752, 20_554_567_680),
    ),
    "llama-2-7b": (
        transformers.LlamaConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "tie_word_embeddings": False,
        },
        (16, None),
        (39_976_960, 6_738_415_616),
    ),
    "pythia-410m": (
        transformers.GPTNeoXConfig,
        {
            "vocab_size": 50304,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "tie_word_embeddings": False,
        },
        (16, None),
        (6_291_456, 405_334_016),
    ),
    "falcon-7b": (
        transformers.FalconConfig,
        {
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
            "new_decoder_architecture": False,
        },
        (16, ("query_key_value",)),
        (4_718_592, 6_921_720_704),
    ),
}
HELD = QuantizationSettings(), torch.bfloat16


@pytest.mark.parametrize("name", most_slow(KNOWN, ["pythia-410m", "falcon-7b"]))
def test_known_models_have_their_known_counts(name):
    config_class, arguments, (rank, targets), (trainable, base) = KNOWN[name]
    model = attach_adapter(
        build_empty(config_class(**arguments)), LoraSettings(rank=rank, alpha=32, target_modules=targets)
    )
    found = measure_footprint(model, *HELD)
    assert found.trainable_parameters == trainable == sum(row.trainable for row in found.rows)
    assert found.total_parameters == base + trainable
    assert sum(row.parameters for row in found.rows) == base
    assert found.trainable_percent == pytest.approx(100 * trainable / (base + trainable))


def test_the_falcon_base_fits_where_it_must():
    config_class, arguments, _, _ = KNOWN["falcon-7b"]
    assert measure_footprint(build_empty(config_class(**arguments)), *HELD).base_bytes < 4.6 * 2**30


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("numel_shape", [(64, 64), (192, 64), (128, 200), (33, 65)])
def test_packed_bytes_are_those_bitsandbytes_takes(numel_shape, double_quant):
    linear = Linear4bit(numel_shape[1], numel_shape[0], bias=False)
    linear.weight = Params4bit(torch.randn(numel_shape), quant_type="nf4", compress_statistics=double_quant)
    linear.to("cpu")
    state = linear.weight.quant_state
    tensors = [linear.weight.data, state.absmax, state.code]
    if double_quant:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    taken = sum(tensor.nbytes for tensor in tensors)
    assert packed_bytes(numel_shape[0] * numel_shape[1], double_quant=double_quant) == taken


@pytest.mark.parametrize("architecture", most_slow([*ARCHITECTURES], ["gpt_neox", "gpt2", "gemma3"]))
def test_the_meta_count_is_the_loaded_count(tiny_model, architecture):
    directory = str(tiny_model(architecture))
    meta = attach_adapter(build_empty(resolve_model(directory).config), LoraSettings(rank=4, alpha=8))
    base, _ = load_base(
        resolve_model(directory),
        QuantizationSettings(base_cache=False),
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    loaded = attach_adapter(base, LoraSettings(rank=4, alpha=8))
    found = measure_footprint(meta, QuantizationSettings(), torch.float32)
    assert (found.trainable_parameters, found.total_parameters) == count_parameters(loaded)
    plain = sum(p.nbytes for p in loaded.parameters() if not p.requires_grad and p.dtype == torch.float32)
    packed = sum(packed_bytes(numel, double_quant=True) for numel in found.quantized_numels)
    assert found.base_bytes == plain + packed


def test_modules_trained_in_full_count_as_trained(tiny_model):
    config = resolve_model(str(tiny_model("llama"))).config
    plain = measure_footprint(attach_adapter(build_empty(config), LoraSettings(rank=4, alpha=8)), *HELD)
    model = attach_adapter(build_empty(config), LoraSettings(rank=4, alpha=8, modules_to_save=("lm_head",)))
    found = measure_footprint(model, *HELD)
    head = config.vocab_size * config.hidden_size
    assert found.trainable_parameters == plain.trainable_parameters + head
    assert next(row for row in found.rows if row.module == "lm_head").trainable == head


def test_experts_are_counted_in_4_bits_and_dequantised_a_layer_at_a_time():
    config = transformers.MixtralConfig(num_hidden_layers=4)
    with_experts = profile_model(config, LoraSettings(), QuantizationSettings(), compute_dtype=torch.bfloat16)
    found = with_experts.footprint
    assert found.total_parameters - found.trainable_parameters == 46_702_792_704 - 28 * 1_451_270_144
    assert 3 * 2**30 < found.base_bytes < 3.5 * 2**30  # 11 GiB in 16 bits
    assert with_experts.met_experts == 2 / 8
    values_bytes = 2 * 14336 * 4096 * 2  # of gate and up of one expert, in bfloat16
    layer = with_experts.trace.layers[1].recomputed.backward
    assert layer.bytes(1, 1, most_scratch=0) >= values_bytes


def test_what_a_mixer_reads_raw_is_counted_in_16_bits():
    mixer = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8, "time_step_rank": 64}
    model = build_empty(transformers.MambaConfig(**mixer))
    found = {row.module: row.kind for row in measure_footprint(model, *HELD).rows}
    assert found["in_proj"] == "Linear, nf4" and found["dt_proj"] == "Linear, bfloat16"
