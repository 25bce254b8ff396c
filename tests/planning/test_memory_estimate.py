"""More work never takes less memory by the prediction, measures that save it never take more, and the parts add up."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.core.device import CONTEXT_BYTES
from qlora_cli.core.engine.memory_plan import MemoryPlan
from qlora_cli.core.planning.memory_estimate import (
    ResolvedStep,
    count_flops,
    estimate_disk,
    estimate_generation,
    estimate_merging,
    estimate_training,
)
from qlora_cli.core.planning.meta_experts import ExpertNotes
from qlora_cli.core.planning.model_profile import ModelProfile, profile_model
from qlora_cli.core.planning.planner import RowLengths, plan_training
from qlora_cli.settings.groups import LoraSettings, QuantizationSettings, StepSettings
from tests.conftest import most_slow

CONFIGS = {
    "llama": transformers.LlamaConfig(
        vocab_size=32000, hidden_size=1024, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2816
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=16,
        intermediate_size=4096,
        tie_word_embeddings=False,
    ),
    "bloom": transformers.BloomConfig(vocab_size=4096, hidden_size=512, n_layer=4, n_head=8),
}


def profile(config, engine: str = "fast", **lora) -> ModelProfile:
    settings = LoraSettings(**{"rank": 4, "alpha": 16, **lora})
    return profile_model(config, settings, QuantizationSettings(), compute_dtype=torch.bfloat16, engine=engine)


@cache
def profile_of(name: str, rank: int = 16, engine: str = "fast", dropout: float = 0.0) -> ModelProfile:
    return profile(CONFIGS[name], engine, rank=rank, dropout=dropout)


LAYERS = {"llama": 4, "gpt_neox": 4, "bloom": 4}


@st.composite
def steps(draw, name: str):
    row_tokens = draw(st.integers(16, 8192))
    return ResolvedStep(
        tokens=row_tokens * draw(st.integers(1, 8)),
        row_tokens=row_tokens,
        optimizer=draw(st.sampled_from(("paged_adamw_8bit", "adamw", "adamw_8bit", "lion", "sgd"))),
        measures=MemoryPlan(
            recomputed=draw(st.integers(0, LAYERS[name])),
            offload_activations=draw(st.booleans()),
            offload_embeddings=draw(st.booleans()),
            resident_weights=draw(st.booleans()),
            workspace_bytes=draw(st.sampled_from((None, 2**20, 2**26))),
        ),
        compiled=draw(st.booleans()),
    )


def with_measures(step: ResolvedStep, **measures) -> ResolvedStep:
    return replace(step, measures=replace(step.measures, **measures))


@pytest.mark.parametrize("name", most_slow(CONFIGS, ["llama"]))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_more_work_never_takes_less_and_savings_never_more(name, data):
    model_profile = profile_of(name)
    step = data.draw(steps(name))
    peak_bytes = estimate_training(model_profile, step).peak_bytes

    more = data.draw(st.integers(0, 5000))
    assert estimate_training(model_profile, replace(step, tokens=step.tokens + more)).peak_bytes >= peak_bytes
    longer = replace(step, tokens=step.tokens + more, row_tokens=step.row_tokens + more)
    assert estimate_training(model_profile, longer).peak_bytes >= peak_bytes
    for name_ in ("offload_activations", "offload_embeddings"):
        assert estimate_training(model_profile, with_measures(step, **{name_: True})).peak_bytes <= peak_bytes + 1
    assert estimate_training(model_profile, with_measures(step, resident_weights=True)).peak_bytes >= peak_bytes
    assert estimate_training(model_profile, with_measures(step, workspace_bytes=2**18)).peak_bytes <= peak_bytes
    heavier = replace(step, optimizer="adamw")
    assert estimate_training(model_profile, heavier).peak_bytes >= peak_bytes


@pytest.mark.parametrize("name", most_slow(CONFIGS, ["llama"]))
def test_a_higher_rank_never_takes_less(name):
    step = ResolvedStep(4096, 2048, "adamw")
    peaks = [estimate_training(profile_of(name, rank), step).peak_bytes for rank in (1, 64)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_that_are_sent_are_on_the_card_one_at_a_time(compiled):
    model_profile = profile_of("llama")
    kept, two, three = (
        estimate_training(
            model_profile, ResolvedStep(8192, 2048, "adamw", measures=MemoryPlan(sent=sent), compiled=compiled)
        )
        for sent in (0, 2, 3)
    )
    layer = model_profile.trace.layers[1]
    lean = 2 * layer.lean if compiled else layer.kept.held.per_token
    assert two.activation_bytes - three.activation_bytes == 8192 * lean
    assert three.host_bytes - two.host_bytes == 8192 * lean
    assert kept.activation_bytes > two.activation_bytes and kept.host_bytes < two.host_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputing_and_offloading_save_what_is_kept(name):
    model_profile = profile_of(name)
    kept = ResolvedStep(16384, 2048, "adamw")
    recomputed = with_measures(kept, recomputed=LAYERS[name])
    offloaded = with_measures(recomputed, offload_activations=True)
    peaks = [estimate_training(model_profile, step).peak_bytes for step in (kept, recomputed, offloaded)]
    assert peaks[0] > 1.2 * peaks[1] > 1.2 * peaks[2]
    hidden_bytes = 16384 * model_profile.trace.layers[0].hidden * 2
    saved = peaks[1] - peaks[2]
    assert saved == pytest.approx((LAYERS[name] - 2) * hidden_bytes * 1.01, rel=0.3)


@pytest.mark.parametrize("tokens", [600, 16384])
def test_the_loss_holds_more_logits_beside_resident_weights_on_a_card_alone(tokens):
    model_profile, step = profile_of("gpt_neox"), ResolvedStep(tokens, 300, "adamw")
    for on_cuda, wide in ((True, min(tokens, 5248)), (False, min(tokens, 640))):
        packed, resident = (
            estimate_training(model_profile, with_measures(replace(step, on_cuda=on_cuda), resident_weights=way))
            for way in (False, True)
        )
        assert packed.moment == resident.moment == "loss"
        assert resident.working_bytes - packed.working_bytes == (wide - min(tokens, 640)) * 50304 * 2
        assert resident.resident_bytes - packed.resident_bytes == model_profile.dense_bytes


def test_products_in_8_bits_hold_the_codes_of_the_widest_rows():
    model_profile, step = profile_of("llama"), ResolvedStep(16384, 2048, "adamw")
    eight = replace(step, in_8_bits=True)
    values = model_profile.largest_weight_bytes // model_profile.itemsize
    wide = 16384 * values // model_profile.trace.layers[0].hidden
    for way, saved in ((True, 0), (False, values)):
        peaks = [
            estimate_training(model_profile, with_measures(s, resident_weights=way)).peak_bytes for s in (step, eight)
        ]
        assert peaks[1] - peaks[0] == pytest.approx(wide - saved, rel=0.01)


def test_experts_in_8_bits_take_half_the_bytes_while_they_are_multiplied():
    config = transformers.Qwen3MoeConfig(
        vocab_size=4096, hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        num_experts=64, num_experts_per_tok=8, moe_intermediate_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    model_profile, unfused = (profile(config, target_modules=("q_proj", "v_proj"), dora=way) for way in (False, True))
    assert unfused.traced(None, in_8_bits=True) == unfused.trace
    stack = 64 * 1024 * 2 * 512  # values of gates and ups, the larger stack

    def peaks(tokens):
        step = ResolvedStep(tokens, tokens, "adamw", MemoryPlan(2))
        return [estimate_training(model_profile, replace(step, in_8_bits=way)).peak_bytes for way in (False, True)]

    plain, eight = peaks(4096)
    codes = 4096 * 8 * 1024  # of the gradient of what they give, for each pair
    assert plain - eight == pytest.approx(stack - codes, rel=0.15)
    few = peaks(192)
    assert few[0] <= few[1]  # 24 rows for each expert: read in 4 bits

    def decide(matmul):
        asked = StepSettings(matmul=matmul, gradient_checkpointing="on", batch_size=1)
        return plan_training(model_profile, asked, RowLengths(4096), vram_bytes=None).memory.peak_bytes

    assert decide("auto") == decide("bf16") > decide("fp8")  # a short run stays in 16 bits


def test_the_parts_add_up():
    memory = estimate_training(profile_of("llama"), ResolvedStep(4096, 2048, "paged_adamw_8bit", MemoryPlan(3)))
    content = memory.to_dict()
    outside = ("peak_bytes", "device_bytes", "paged_bytes", "context_bytes", "host_bytes")
    parts = [value for name, value in content.items() if name.endswith("_bytes") and name not in outside]
    assert sum(parts) == content["peak_bytes"]
    assert content["device_bytes"] == content["peak_bytes"] + content["paged_bytes"] + CONTEXT_BYTES
    assert content["optimizer_bytes"] == 0 < content["paged_bytes"]


def test_the_weights_of_the_prediction_are_those_of_the_count():
    model_profile = profile_of("gpt_neox")
    step = ResolvedStep(2048, 2048, "adamw", MemoryPlan(4))
    memory = estimate_training(model_profile, step)
    trained = model_profile.footprint.trainable_parameters
    assert memory.base_bytes == model_profile.footprint.base_bytes
    assert memory.adapter_bytes == (4 + 2) * trained  # float32, and a copy in bfloat16
    assert memory.gradient_bytes == 4 * trained
    assert memory.optimizer_bytes == 8 * trained
    without = estimate_training(model_profile, with_measures(step, offload_embeddings=True))
    assert memory.base_bytes - without.base_bytes == 50304 * 1024 * 2
    assert without.host_bytes - memory.host_bytes == 50304 * 1024 * 2


@pytest.mark.parametrize(
    ("changes", "movable"),
    [
        pytest.param({}, True, marks=pytest.mark.slow),
        ({"modules_to_save": ("embed_tokens",)}, False),
        pytest.param({"target_modules": ("q_proj", "embed_tokens")}, False, marks=pytest.mark.slow),
        pytest.param({"modules_to_save": ("lm_head",)}, True, marks=pytest.mark.slow),
    ],
)
def test_embeddings_that_are_trained_stay_on_the_card(changes, movable):
    model_profile = profile(CONFIGS["llama"], **changes)
    assert (model_profile.embedding_bytes > 0) == movable


def test_the_plain_engine_takes_more_than_the_fast_one():
    fast = ResolvedStep(4096, 2048, "adamw")
    plain = replace(fast, engine="plain")
    assert (
        estimate_training(profile_of("llama", engine="plain"), plain).peak_bytes
        > 1.3 * estimate_training(profile_of("llama"), fast).peak_bytes
    )


def test_dropout_takes_room_for_what_it_drops():
    step = ResolvedStep(4096, 2048, "adamw")
    assert (
        estimate_training(profile_of("llama", dropout=0.1), step).peak_bytes
        >= estimate_training(profile_of("llama"), step).peak_bytes
    )


def test_written_out_attention_grows_with_the_square_of_a_row():
    model_profile = profile_of("bloom")
    short = ResolvedStep(8192, 512, "adamw")
    peaks = [
        estimate_training(model_profile, replace(short, row_tokens=row)).activation_bytes for row in (512, 1024, 2048)
    ]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.01)
    assert peaks[1] > 1.3 * peaks[0]


def test_answers_need_room_for_keys_and_values():
    model_profile = profile_of("llama")
    one = estimate_generation(model_profile, rows=1, row_tokens=1024)
    assert one["cache_bytes"] == 1024 * 4 * 2 * 1024 * 2  # tokens, layers, keys and values, width, bytes
    eight = estimate_generation(model_profile, rows=8, row_tokens=1024)
    assert eight["cache_bytes"] == 8 * one["cache_bytes"]
    assert eight["peak_bytes"] > one["peak_bytes"] > model_profile.footprint.base_bytes


def test_grouped_heads_keep_fewer_keys_and_values():
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=512,
    )
    model_profile = profile(config)
    assert model_profile.trace.layers[0].keys_and_values == 2 * 2 * 32


def test_disk_and_merging_follow_the_checkpoint():
    model_profile = profile_of("llama")
    parameters = model_profile.footprint.total_parameters - model_profile.footprint.trainable_parameters
    disk = estimate_disk(model_profile, is_local=False, optimizer="adamw", kept_checkpoints=2)
    assert disk["download_bytes"] == 2 * parameters  # the configuration names no dtype: 16 bits
    assert disk["base_cache_bytes"] == model_profile.footprint.base_bytes
    assert disk["run_bytes"] == (4 + 3 * 12) * model_profile.footprint.trainable_parameters
    assert estimate_merging(model_profile)["disk_bytes"] == disk["download_bytes"] == disk["weights_bytes"]


@pytest.mark.parametrize(
    ("settings", "bytes_"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1 + 4 / 128**2),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 0.5159),
    ],
)
def test_a_base_stored_quantised_is_as_large_as_it_is_stored_and_what_it_leaves_in_16_bits_is_held_so(settings, bytes_):
    left = "modules_to_not_convert" if settings["quant_method"] == "fp8" else "llm_int8_skip_modules"
    settings |= {left: ["model.layers.0.self_attn", "lm_head"]}
    found = profile(transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "quantization_config": settings}))
    plain, attention = profile_of("llama"), 4 * 1024**2
    codes = sum(found.footprint.quantized_numels)
    assert codes == sum(plain.footprint.quantized_numels) - attention
    assert found.stored_bytes == pytest.approx(plain.stored_bytes - codes * (2 - bytes_), rel=1e-3)
    assert found.merged_bytes == plain.merged_bytes == plain.stored_bytes
    more = found.footprint.base_bytes - plain.footprint.base_bytes
    assert more == pytest.approx(attention * (2 - 0.5159), rel=1e-2)


@pytest.mark.slow
def test_the_checkpoint_s_dtype_decides_the_download():
    halves = transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "dtype": "float16"})
    floats = transformers.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "dtype": "float32"})
    half, whole = (profile(config).stored_bytes for config in (halves, floats))
    assert whole == 2 * half


def test_arithmetic_is_four_operations_a_weight_and_half_as_much_again_recomputed():
    model_profile = profile_of("llama")
    weights = sum(model_profile.footprint.quantized_numels) + 32000 * 1024
    step = ResolvedStep(2048, 1, "adamw")
    adapter = model_profile.footprint.trainable_parameters
    assert count_flops(model_profile, step) == pytest.approx(4 * weights + 6 * adapter, rel=1e-3)
    again = count_flops(model_profile, with_measures(step, recomputed=4))
    assert again - count_flops(model_profile, step) == pytest.approx(
        2 * (weights - 32000 * 1024) + 2 * adapter, rel=1e-3
    )


def test_adapters_of_experts_are_not_copied_and_a_token_meets_some_of_them():
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
    )
    attention = {"rank": 16, "target_modules": ("q_proj", "v_proj")}
    plain, adapted = (
        profile_model(config, LoraSettings(**attention, **more), QuantizationSettings(), compute_dtype=torch.bfloat16)
        for more in ({}, {"adapt_experts": True, "expert_rank": 16})
    )
    step = ResolvedStep(256, 256, "paged_adamw_8bit")
    of_experts = adapted.footprint.trainable_parameters - plain.footprint.trainable_parameters
    assert adapted.footprint.expert_adapter_parameters == of_experts == 2 * 8 * 16 * ((64 + 128) + (64 + 64))
    before, after = (estimate_training(found, step) for found in (plain, adapted))
    assert after.adapter_bytes - before.adapter_bytes == after.gradient_bytes - before.gradient_bytes == 4 * of_experts
    more = count_flops(adapted, step) - count_flops(plain, step)
    assert more == pytest.approx(6 * of_experts * 2 / 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("measure", ["kept", "resident", "recomputed", "offloaded"])
def test_the_card_takes_what_was_predicted(tmp_path, measure):
    import numpy as np

    from qlora_cli.core.adapters.lora import attach_adapter
    from qlora_cli.core.data.packing import collate
    from qlora_cli.core.engine.engine import install_engine
    from qlora_cli.core.models.files import resolve_model
    from qlora_cli.core.models.loading import load_base
    from qlora_cli.core.training.flat_parameters import TrainableParameters
    from qlora_cli.core.training.optimizer import build_optimizer, set_learning_rate, step_optimizer
    from qlora_cli.settings.groups import LoraSettings, QuantizationSettings

    device, rows, row_tokens = torch.device("cuda", 0), 8, 2048
    transformers.LlamaForCausalLM(CONFIGS["llama"]).to(torch.bfloat16).save_pretrained(tmp_path)
    torch._C._cuda_clearCublasWorkspaces()  # of tests before: they are part of what is predicted
    start_bytes = torch.cuda.memory_allocated()
    base, _ = load_base(
        resolve_model(str(tmp_path)),
        QuantizationSettings(base_cache=False),
        compute_dtype=torch.bfloat16,
        device=device,
    )
    model = attach_adapter(base, LoraSettings(rank=16, alpha=16)).train()
    options = {
        "gradient_checkpointing": "off" if measure in ("kept", "resident") else "on",
        "offload_activations": measure == "offloaded",
        "offload_embeddings": measure == "offloaded",
        "resident_weights": measure == "resident",
    }
    engine = install_engine(
        model,
        StepSettings(compile=False, **options),
        device=device,
        compute_dtype=torch.bfloat16,
        max_tokens=rows * row_tokens,
        total_steps=3,
        report=lambda event: None,
    )
    parameters = TrainableParameters(model)
    optimizer = build_optimizer("adamw", parameters, weight_decay=0.0)
    set_learning_rate(optimizer, 1e-4)
    random = np.random.default_rng(0)
    ids = [random.integers(0, 32000, row_tokens).astype(np.int32) for _ in range(rows)]
    batch = collate([(row, np.ones(row_tokens, dtype=bool)) for row in ids], range(rows)).pin()

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        engine.loss(batch).backward()
        step_optimizer(optimizer)
        parameters.zero_gradients()
    measured_bytes = torch.cuda.max_memory_allocated() - start_bytes
    engine.close()
    step = ResolvedStep(
        tokens=rows * row_tokens,
        row_tokens=row_tokens,
        optimizer="adamw",
        measures=MemoryPlan(
            recomputed=0 if options["gradient_checkpointing"] == "off" else LAYERS["llama"],
            resident_weights=options["resident_weights"],
            offload_activations=options["offload_activations"],
            offload_embeddings=options["offload_embeddings"],
        ),
    )
    assert estimate_training(profile_of("llama"), step).peak_bytes == pytest.approx(measured_bytes, rel=0.05)


def test_the_product_that_a_repetition_leaves_out_is_not_counted_in_it(monkeypatch):
    """Of experts whose answer is only added up; what stands behind them, as a norm, needs it."""
    config = transformers.MixtralConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
    )

    def beside_the_second_stack():
        moments = dict(profile(config).trace.layers[1].recomputed.backward.moments)
        return moments[8 * 512 * 128 * 2].per_token  # while it is dequantised

    left_out = beside_the_second_stack()
    monkeypatch.setattr(ExpertNotes, "settle", lambda self: None)
    assert left_out < beside_the_second_stack()
