"""What is counted on the meta device is what a real step of the real engines keeps."""

import numpy as np
import pytest
import torch
import transformers

from qlora_cli.core.adapters.lora import attach_adapter
from qlora_cli.core.data.packing import collate
from qlora_cli.core.engine import packed_attention as engine_attention
from qlora_cli.core.engine.engine import install_engine
from qlora_cli.core.engine.memory_plan import MemoryPlan
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.structure import build_empty
from qlora_cli.core.planning.activation_trace import TRACED_TOKENS, Growth, Peak, trace_model
from qlora_cli.core.planning.memory_estimate import ResolvedStep, estimate_training
from qlora_cli.core.planning.meta_ops import Attention, LiveBytes
from qlora_cli.core.planning.model_profile import profile_model
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.kernels.attention import head_groups
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings
from tests.conftest import ARCHITECTURES, most_slow

TOKENS = 1024
BF16 = 2


def trace(config, *, rank=4, targets=None, fused=True):
    model = attach_adapter(
        build_empty(config).to(torch.bfloat16), LoraSettings(rank=rank, alpha=8, target_modules=targets)
    )
    return trace_model(model, fused=fused)


def llama_of_7b_s_width():
    return transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=6, num_attention_heads=32, intermediate_size=11008
    )


def test_a_llama_layer_keeps_what_can_be_counted_by_hand():
    layer = trace(llama_of_7b_s_width(), rank=16).layers[5]
    hidden, wide, heads, adapters = 4096, 11008, 32, 7 * 16
    # Under a compiler: layer input, both norms' outputs, q, k, v, attention's output, the stream after attention, and
    # gate, up and their product.
    assert layer.compiled.held.per_token == BF16 * (8 * hidden + 3 * wide)
    # Compiled leanly: the input, what linears give but for the last, and attention's output.
    assert layer.lean == 6 * hidden + 2 * wide
    # As written, norms keep their input and its scale in float32 rather than the stream in 16 bits, the activation its
    # result; attention a number a head, each adapter its projection.
    eager = BF16 * (6 * hidden + 4 * wide) + 2 * (4 * hidden + 4) + 4 * heads + BF16 * adapters
    assert layer.kept.held.per_token == eager
    assert layer.recomputed.held.per_token == BF16 * hidden


def test_layers_without_adapters_keep_no_input():
    config = transformers.GPTNeoXConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=1024
    )
    attention_only = trace(config, targets=("query_key_value",)).layers[1].kept.held.per_token
    everywhere = trace(config).layers[1].kept.held.per_token
    # The second norm's output and the activation: read by linears alone. Attention's output is kept anyway, but its copy
    # token by token, which the output projection reads, is not.
    assert everywhere - attention_only == pytest.approx(BF16 * (256 + 1024 + 256 + 3 * 4), rel=1e-6)


def test_layers_that_share_keys_and_look_tokens_up_can_be_followed():
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}
    config = transformers.Gemma4TextConfig(
        **{**sizes, "num_key_value_heads": 2, "global_head_dim": 32, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
        layer_types=["sliding_attention", "full_attention"] * 2,
        **{"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 512, "attention_k_eq_v": True},
        num_global_key_value_heads=1,
    )
    layers = trace(config).layers
    assert [layer.key_heads for layer in layers] == [2, 1, 2, 1]
    assert layers[3].kept.held.per_token < layers[1].kept.held.per_token, "the last has no keys of its own"


@pytest.mark.each_choice
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("architecture", most_slow(ARCHITECTURES, ("llama", "falcon", "bloom")))
def test_every_architecture_can_be_followed(tiny_model, architecture, fused):
    config = resolve_model(str(tiny_model(architecture))).config
    found = trace(config, fused=fused)
    assert len(found.layers) == 2
    assert found.vocabulary == 512
    for layer in found.layers:
        hidden_bytes = BF16 * layer.hidden
        # Bloom alone is outside the attention interface and keeps scores of every pair.
        assert (layer.kept.held.per_pair > 0) == (architecture == "bloom") == (layer.keys_and_values == 0)
        assert layer.recomputed.held.per_token == pytest.approx(hidden_bytes)
        assert layer.kept.held.per_token > 3 * hidden_bytes
        size = TRACED_TOKENS[0], TRACED_TOKENS[0]
        assert layer.kept.backward.bytes(*size) > layer.kept.held.bytes(*size)
        assert layer.recomputed.backward.bytes(*size) > layer.kept.held.bytes(*size)


def test_the_model_is_left_as_it_was(tiny_model):
    config = resolve_model(str(tiny_model("llama"))).config
    model = attach_adapter(build_empty(config), LoraSettings(rank=4, alpha=8))
    before = {name: type(module) for name, module in model.named_modules()}
    trace_model(model, fused=True)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == build_empty(config).config._attn_implementation


def test_a_peak_is_the_highest_of_its_moments():
    peak = Peak(((0, Growth(10.0, 0.0)), (1000, Growth(1.0, 0.5))))
    assert peak.bytes(10, 2) == 1000 + 10 * (1.0 + 0.5 * 2)
    assert peak.bytes(1000, 2) == 10 * 1000
    assert peak.bytes(10, 2, most_scratch=30) == 10 * 10


class ZeroAttention(Attention):
    """Attention that keeps what the card's does, with zeros for values: the CPU's own keeps scores of every pair."""

    @staticmethod
    def forward(ctx, *inputs):
        return Attention.forward(ctx, *inputs).zero_()

    @staticmethod
    def backward(ctx, *gradients):
        return tuple(g if g is None else g.zero_() for g in Attention.backward(ctx, *gradients))


def flash_attention(query, key, value, *_, **__):
    return ZeroAttention.apply(query, key, value)


def packed_flash_attention(query, key, value, *_):
    query, key, value = (tensor.contiguous().transpose(0, 1)[None] for tensor in (query, key, value))
    return ZeroAttention.apply(query, key, value)[0].transpose(0, 1)


def attention_in_groups(query, key, value, *_):
    query, key, value = (tensor.contiguous().transpose(0, 1)[None] for tensor in (query, key, value))
    return ZeroAttention.apply(query, key, value, head_groups(key.shape[1], 2**20))[0].transpose(0, 1)


def cudnn_attention(query, key, value, *_):
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return ZeroAttention.apply(query, key, value)[0].transpose(0, 1)


@pytest.mark.parametrize(
    ("architecture", "engine", "recompute", "heads", "tile"),
    [
        ("llama", "fast", "1", 4, 0),
        ("gpt_neox", "plain", "on", 4, 0),
        ("llama", "fast", "on", 4, 256),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", "fast", "off", 4, 0),
                ("llama", "plain", "off", 4, 0),
                ("gpt_neox", "fast", "on", 2, 0),
                ("llama", "fast", "off", 2, 0),
                ("llama", "fast", "on", 4, 0),
                ("gpt_neox", "fast", "off", 4, 0),
                ("gpt_neox", "fast", "off", 2, 0),
                ("gpt_neox", "fast", "on", 4, 0),
                ("gpt_neox", "fast", "on", 4, 256),
                ("llama", "fast", "off", 4, 256),
            )
        ),
    ],
)
def test_a_real_step_is_as_high_as_predicted(tmp_path, monkeypatch, architecture, engine, recompute, heads, tile):
    config_class = {"llama": transformers.LlamaConfig, "gpt_neox": transformers.GPTNeoXConfig}[architecture]
    config = config_class(
        vocab_size=16,
        hidden_size=64 if heads == 4 else 128,
        num_hidden_layers=3,
        num_attention_heads=heads,
        intermediate_size=192,
        max_position_embeddings=TOKENS,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    files = resolve_model(str(tmp_path))
    base, _ = load_base(
        files,
        QuantizationSettings(base_cache=False),
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    model = attach_adapter(base, LoraSettings(rank=4, alpha=8))
    installed = install_engine(
        model,
        StepSettings(
            engine=engine, gradient_checkpointing=recompute, resident_weights=True, compile=False, tile_tokens=tile
        ),
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        max_tokens=TOKENS,
        total_steps=1,
        report=lambda event: None,
    )
    TrainableParameters(model)
    model.train()
    batch = collate([(np.arange(TOKENS, dtype=np.int32) % 16, np.ones(TOKENS, dtype=bool))], [0])
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash_attention)
    # Heads of 16 go to flash attention, heads of 64 in rows of one length to cuDNN.
    attention = packed_flash_attention if heads == 4 else cudnn_attention
    attention = attention_in_groups if tile else attention
    monkeypatch.setattr(engine_attention, "packed_attention", attention)
    installed.loss(batch).backward()
    with LiveBytes() as live:
        installed.loss(batch).backward()

    lora = LoraSettings(rank=4, alpha=8)
    profile = profile_model(files.config, lora, QuantizationSettings(), compute_dtype=torch.float32, engine=engine)
    layers = {"off": 0, "on": 3, "1": 1 if engine == "fast" else 3}[recompute]
    step = ResolvedStep(
        tokens=TOKENS,
        row_tokens=TOKENS,
        optimizer="adamw",
        measures=MemoryPlan(recomputed=layers, resident_weights=True, tile_tokens=tile or None),
        engine=engine,
        on_cuda=False,
    )
    predicted = estimate_training(profile, step)
    assert predicted.activation_bytes + predicted.working_bytes == pytest.approx(
        live.highest_bytes[0],
        rel=0.06 if tile else 0.03,  # a tile of 256 of these tokens is a fifth of the peak
    )


SCAN = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
GATED_DELTA = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), [("MambaConfig", SCAN), ("Qwen3_5TextConfig", GATED_DELTA)])
def test_layers_that_loop_over_tokens_are_traced_on_few_of_them(name, arguments):

    from qlora_cli.core.planning import activation_trace

    model = attach_adapter(build_empty(getattr(transformers, name)(**arguments)), LoraSettings(rank=4, alpha=8))
    lengths = []
    with pytest.MonkeyPatch.context() as patch:
        run = activation_trace._Trace.__init__

        def note(self, model, tokens, fused, **options):
            lengths.append(tokens)
            run(self, model, tokens, fused, **options)

        patch.setattr(activation_trace._Trace, "__init__", note)
        trace = trace_model(model, fused=True)
    assert max(lengths) <= 128
    held = [layer.kept.held.bytes(2048, 2048) for layer in trace.layers]
    assert all(bytes_ > 2048 * 64 * 4 for bytes_ in held)  # more than a layer's input
    assert held[1] * 1.9 < trace.layers[1].kept.held.bytes(4096, 2048) < held[1] * 2.1


def test_complex_rotary_embeddings_are_traced_in_16_bits():
    config = transformers.DeepseekV2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        dtype=torch.bfloat16,
    )
    model = build_empty(config).to(torch.bfloat16)
    assert len(trace_model(attach_adapter(model, LoraSettings(rank=4, alpha=8)), fused=True).layers) == 2
