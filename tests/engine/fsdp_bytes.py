"""One of two ranks: shards layers of random bytes as a base's weights, runs them both ways, and compares every byte.

On cards: torchrun --nproc-per-node 2 fsdp_bytes.py [host]
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.engine.calibration import Calibration
from qlora_cli.core.engine.fsdp import gathered, shard_base, sharded_weight_of
from qlora_cli.core.engine.lora_linear import AdapterValues
from qlora_cli.core.models.quantization import pack_weight, restored_linear
from tests.faults.victims import fork_ranks

SIZE, LAYERS, VOCABULARY = 192, 4, 256  # 18,432 bytes a weight and 576 constants: shares of which are filled up


class Layer(nn.Module):
    """Looks at the bytes of its weight whenever it computes, also when it does so again in the backward pass."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(self, x: torch.Tensor) -> torch.Tensor:
        whole = sharded_weight_of(self.linear).gathered()
        self.seen.append((whole.packed.clone(), whole.absmax.clone()))
        return x * x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.look, x, use_reentrant=False)


class Decoder(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Base(nn.Module):
    """A decoder between two tables."""

    def __init__(self, layers: list[Layer], tables: list[torch.Tensor]) -> None:
        super().__init__()
        self.decoder = Decoder(layers)
        self.embedding, self.head = nn.Embedding(1, 1, device="meta"), nn.Linear(1, 1, bias=False, device="meta")
        for module, table in zip((self.embedding, self.head), tables, strict=True):
            module.weight = nn.Parameter(table, requires_grad=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.embedding(ids).requires_grad_())


def run_on_cpu(on_host: bool) -> None:
    """Both ranks, in processes forked from this one."""
    codes = fork_ranks(2, lambda rank: check_bytes("cpu", on_host))
    assert codes == [0, 0], codes


def check_bytes(kind: str, on_host: bool) -> None:
    """One rank. Fails where a byte is another one."""
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    shards = WeightShards(ProcessGroup(dist.get_rank(), dist.get_world_size()), on_host=on_host)
    torch.manual_seed(0)
    layers, truth = [], []
    for _ in range(LAYERS):
        packed = pack_weight(torch.randn(SIZE, SIZE, device=device), quant_type="nf4", double_quant=True)
        for name in ("", ".absmax"):
            packed[name] = torch.randint(256, packed[name].shape, dtype=torch.uint8)
        truth.append((packed[""].flatten().to(device), packed[".absmax"].to(device)))
        for name in ("", ".absmax"):
            share = shards.keep(packed[name])
            packed[name] = share if on_host else share.to(device)
        layers.append(Layer(restored_linear(torch.bfloat16, device, packed, None)))
    tables = [torch.randn(VOCABULARY, SIZE).bfloat16().to(device) for _ in range(2)]
    base = Base(layers, [table.clone() for table in tables])
    shard_base(base, base.decoder, list(layers), shards, device)
    elsewhere = Calibration(base, base.decoder, base.embedding, AdapterValues(torch.bfloat16), torch.device("meta"))
    assert "input_ids" in elsewhere.inputs(4)  # embeddings that wait on the host are gathered like any others
    for _ in range(2):
        base(torch.arange(8, device=device)[None]).sum().backward()
    with gathered(base.head):
        assert torch.equal(base.head.weight, tables[1])
    for layer, expected in zip(layers, truth, strict=True):
        assert len(layer.seen) == 4, len(layer.seen)  # forward and again in the backward pass, twice
        for found in layer.seen:
            assert all(map(torch.equal, found, expected))
    print("all bytes came back", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    check_bytes("cuda", on_host=sys.argv[1:] == ["host"])
