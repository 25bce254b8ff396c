"""Base of a real architecture with random 4-bit weights, written straight into the cache of quantised bases.

    python -m support.random_base ARCHITECTURE DIRECTORY [DTYPE DEVICE]        # in benchmarks/

It spares the minutes in which a 16-bit checkpoint is written, read and quantised.

The checkpoint beside it is a file of holes, which is read once, by one thread, for the digest that tells one base from
another: 57 GiB of Qwen3-30B-A3B take over a minute, so that mixtures of experts are quicker from support/hollow_checkpoint.py.
Layers share their random weights: neither speed nor memory depends on them, as long as they are no zeros.
"""

import json
from dataclasses import asdict
from pathlib import Path

from support.models import CONFIGS, make_config, write_tokenizer


def write_base(name: str, directory: Path, *, dtype_name: str, device_name: str) -> Path:
    """Makes the model's directory and its copy in the cache (QLORA_CACHE), once.

    Args:
        name: Of the architecture, see models.py.
        directory: Where the model goes.
        dtype_name: Compute dtype of the runs that will use it.
        device_name: "cuda" or "cpu", where they will run.
    """
    import torch

    from qlora_cli.core.device import DTYPES
    from qlora_cli.core.experts.layout import expert_weights, find_experts
    from qlora_cli.core.models.files import resolve_model
    from qlora_cli.core.models.quantized_cache import base_directory, save_base
    from qlora_cli.core.models.structure import build_empty
    from qlora_cli.settings.groups import QuantizationSettings

    dtype, device = DTYPES[dtype_name], torch.device(device_name)
    if not (directory / "tokenizer.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        make_config(name).save_pretrained(directory)
        _write_holes(build_empty(make_config(name)), directory / "model.safetensors")
        write_tokenizer(directory, CONFIGS[name][1]["vocab_size"])
    quantised = {"quant_type": "nf4", "double_quant": True}
    files = resolve_model(str(directory))
    identity = files.identity(QuantizationSettings(**quantised), dtype)
    facts = {**asdict(identity), "model": None, "revision": None, "device": device.type}
    empty = build_empty(files.config)
    if stacks := sum(len(expert_weights(module)) for _, module in find_experts(empty)):
        facts |= {"experts": stacks, "left": []}  # as loading.py says of a model all of whose experts are packed
    if base_directory(facts).exists():
        return directory
    save_base(build_base(files.config, dtype, device), facts)
    assert base_directory(facts).exists()
    return directory


def build_base(config, dtype, device, *, apart: bool = False):
    """A causal language model on the device with random weights, its linears and experts in NF4 with double quantisation.

    Args:
        config: Of the architecture.
        dtype: Of all that is not packed.
        apart: Whether each linear has weights of its own: those of one shape moved on by some bytes.
    """
    import torch
    from torch import nn

    from qlora_cli.core.experts.four_bit_experts import pack_experts
    from qlora_cli.core.experts.layout import find_experts
    from qlora_cli.core.experts.stack import pack_matrix
    from qlora_cli.core.models.quantization import pack_weight, restored_linear
    from qlora_cli.core.models.structure import build_empty, linear_names

    model = build_empty(config)
    torch.manual_seed(0)
    packed: dict[torch.Size, dict] = {}
    biases: dict[int, torch.Tensor] = {}
    for number, linear_name in enumerate(linear_names(model)):
        linear = model.get_submodule(linear_name)
        shape = linear.weight.shape
        if shape not in packed:
            weight = torch.randn(shape, dtype=dtype, device=device) * 0.02
            packed[shape] = pack_weight(weight, quant_type="nf4", double_quant=True)
        parts = dict(packed[shape])
        if apart:
            moved = {name: parts[name].roll(1 + 101 * number, 0) for name in ("", ".absmax")}
            parts |= moved | {".nested_absmax": parts[".nested_absmax"].clone()}
        bias = None
        if linear.bias is not None:
            bias = biases.setdefault(shape[0], torch.zeros(shape[0], dtype=dtype, device=device))
        model.set_submodule(linear_name, restored_linear(dtype, device, parts, bias))
    held = {"quant_type": "nf4", "double_quant": True}
    matrices: dict[tuple[int, int], object] = {}  # one for all experts of a shape
    for _, module in list(find_experts(model)):
        experts = pack_experts(module, compute_dtype=dtype, device=device, **held)
        for weight in experts.expert_weights:
            shape = (weight.rows, weight.columns)
            if shape not in matrices:
                matrices[shape] = pack_matrix(torch.randn(shape, dtype=dtype, device=device) * 0.02, **held)
            for expert in range(weight.experts):
                experts.put_experts(weight.name, expert, matrices[shape])
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02
                value = value if parameter.ndim > 1 else torch.full_like(value, float(leaf == "weight"))
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    for owner in model.modules():
        if any(buffer.is_meta for buffer in owner.buffers(recurse=False)):  # rotary embeddings, computed when made
            for leaf, buffer in type(owner)(model.config).named_buffers():
                owner._buffers[leaf] = buffer.to(device)
    return model


def _write_holes(model, path: Path) -> None:
    """A safetensors file of the model's shapes in bfloat16 that takes no room."""
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [end, end + 2 * parameter.numel()],
        }
        end += 2 * parameter.numel()
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


if __name__ == "__main__":
    import sys

    from qlora_cli.core.device import choose_device, dtype_name, resolve_compute_dtype

    if len(sys.argv) == 3:  # as `qlora train` chooses on this machine
        chosen = choose_device()
        sys.argv += [dtype_name(resolve_compute_dtype(None, chosen)), chosen.type]
    write_base(sys.argv[1], Path(sys.argv[2]), dtype_name=sys.argv[3], device_name=sys.argv[4])
