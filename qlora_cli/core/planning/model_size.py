"""Size of a model: true parameter counts, and the bytes each kind of module takes, from the meta device."""

from dataclasses import dataclass
from typing import Any

import torch

from qlora_cli.core.adapters.adapter_facts import base_name
from qlora_cli.core.device import dtype_name
from qlora_cli.core.experts.layout import expert_weights, find_experts
from qlora_cli.core.experts.stack import stack_bytes
from qlora_cli.core.models.account import FourBitPlan, plan_packing
from qlora_cli.core.models.quantization import BLOCK_SIZE, NESTED_BLOCK_SIZE, count_parameters, logical_numel
from qlora_cli.core.models.structure import head_names, underlying_model
from qlora_cli.settings.groups import QuantizationSettings


@dataclass(frozen=True)
class ModuleRow:
    """All modules of one kind: the same last name and class.

    `parameters` and `held_bytes` are of the base; `trainable` counts the adapter on these modules, and their copy where
    they are trained in full.
    """

    module: str
    kind: str  # class, and how it is held: "LlamaRMSNorm, bfloat16", "Linear, nf4"
    count: int
    parameters: int
    trainable: int
    held_bytes: int


@dataclass(frozen=True)
class Footprint:
    """What a model and its adapter consist of."""

    rows: tuple[ModuleRow, ...]
    total_parameters: int  # base and adapter
    trainable_parameters: int
    trainable_numels: tuple[int, ...]  # of each trained tensor
    expert_adapter_parameters: int  # of them, in adapters of experts, whose kernels read them as they are
    quantized_numels: tuple[int, ...]  # of each linear layer's weight held in 4 bits
    expert_numels: tuple[int, ...]  # of each stack of experts held in 4 bits
    quantized_bytes: int  # of all of them, as they are held
    packed_bytes: dict[str, int]  # of each, by its name in the base
    base_bytes: int
    adapter_bytes: int

    @property
    def trainable_percent(self) -> float:
        """Share of the parameters that is trained, in percent."""
        return 100 * self.trainable_parameters / self.total_parameters


def packed_bytes(numel: int, *, double_quant: bool) -> int:
    """Bytes of one 4-bit weight with its statistics, as bitsandbytes holds it on the device.

    Half a byte a weight; a float32 constant a block of 64, or with double quantisation one byte a block, a float32 a
    256 blocks, an offset and a table of 256 floats; and the table of the 16 values
    (https://arxiv.org/abs/2305.14314, section 3; bitsandbytes/functional.py, `quantize_4bit`).
    """
    blocks = -(-numel // BLOCK_SIZE)
    if double_quant:
        statistics = blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + 4 + 4 * 256
    else:
        statistics = 4 * blocks
    return -(-numel // 2) + statistics + 4 * 16


def measure_footprint(
    model: Any, quantization: QuantizationSettings, compute_dtype: torch.dtype, packing: FourBitPlan | None = None
) -> Footprint:
    """Counts a model from `build_empty`, maybe with an adapter attached, as it will be held: in 4 bits what
    `packing` says, by default `plan_packing`, all else of the base in `compute_dtype`."""
    base: Any = underlying_model(model)
    heads = tuple(f"{name}." for name in head_names(base))  # inside of one that is trained in full is the one before
    packing = packing or plan_packing(base)
    packed = {base_name(n) for n in packing.packed if not n.removesuffix("weight").startswith(heads)}
    quantized = {name.removesuffix(".weight") for name in packed if name.endswith(".weight")}
    stacks = {
        f"{base_name(name)}.{weight.name}": weight
        for name, module in find_experts(model)
        for weight in expert_weights(module)
        if f"{base_name(name)}.{weight.name}" in packed
    }
    owners = {base_name(name): type(module).__name__ for name, module in model.named_modules() if ".lora_" not in name}
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    quantized_numels: list[int] = []
    expert_numels: list[int] = []
    packed_weights: dict[str, int] = {}
    experts, expert_adapters = {base_name(name) for name, _ in find_experts(model)}, 0
    for name, parameter in model.named_parameters():
        owner = base_name(name) if ".lora_" in name else base_name(name).rpartition(".")[0]
        stack = stacks.get(base_name(name)) if ".lora_" not in name else None
        held = quantization.quant_type if owner in quantized or stack else dtype_name(compute_dtype)
        key = owner.rpartition(".")[2], f"{owners[owner]}, {held}"
        group = groups.setdefault(key, {"owners": set(), "parameters": 0, "trainable": 0, "held_bytes": 0})
        group["owners"].add(owner)
        numel = logical_numel(parameter)
        if parameter.requires_grad:
            group["trainable"] += numel
            expert_adapters += numel * (owner in experts)
            continue
        group["parameters"] += numel
        if stack is not None:
            expert_numels.append(stack.elements * stack.experts)
            held_bytes = packed_weights[base_name(name)] = stack_bytes(stack, double_quant=quantization.double_quant)
        elif owner in quantized and name.endswith("weight"):
            quantized_numels.append(numel)
            held_bytes = packed_bytes(numel, double_quant=quantization.double_quant)
            packed_weights[base_name(name)] = held_bytes
        else:
            held_bytes = numel * compute_dtype.itemsize
        group["held_bytes"] += held_bytes
    rows = tuple(ModuleRow(module, kind, len(group.pop("owners")), **group) for (module, kind), group in groups.items())
    trainable, total = count_parameters(model)
    return Footprint(
        rows=rows,
        total_parameters=total,
        trainable_parameters=trainable,
        trainable_numels=tuple(p.numel() for p in model.parameters() if p.requires_grad),
        expert_adapter_parameters=expert_adapters,
        quantized_numels=tuple(quantized_numels),
        expert_numels=tuple(expert_numels),
        quantized_bytes=sum(packed_weights.values()),
        packed_bytes=packed_weights,
        base_bytes=sum(row.held_bytes for row in rows),
        adapter_bytes=4 * trainable,  # in float32
    )
