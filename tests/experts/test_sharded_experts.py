"""Experts sharded over two ranks: what each gathers while a layer computes is the whole stack, bit for bit."""

import torch
import torch.distributed as dist
from torch import nn

from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.distributed.weight_shards import WeightShards
from qlora_cli.core.engine.fsdp import shard_base
from qlora_cli.core.experts.fused_experts import fuse_experts
from tests.experts.expert_modules import make_experts, pack
from tests.faults.victims import fork_ranks


class Layer(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        index = torch.arange(len(x) * 2).view(-1, 2) % 5
        return self.experts(x, index, torch.ones(len(x), 2) / 2)


class Base(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.decoder = nn.Sequential(*layers)
        self.embedding, self.head = nn.Embedding(8, 64), nn.Linear(64, 8, bias=False)
        self.requires_grad_(False)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.decoder(self.embedding(ids).requires_grad_())


def check_answers(fused):
    """One rank. Fails where the answer or the gradient is another one than that of the whole module."""
    dist.init_process_group("gloo")
    shards = WeightShards(ProcessGroup(dist.get_rank(), dist.get_world_size()))
    torch.manual_seed(0)
    whole, sharded = ([pack(make_experts("gpt_oss", seed=n), torch.float32) for n in range(2)] for _ in range(2))
    base = Base([Layer(experts) for experts in sharded])
    ids = torch.arange(8)
    if fused:
        fuse_experts(nn.ModuleList(whole))
    expected = base.embedding(ids).requires_grad_()
    out = Layer(whole[1])(Layer(whole[0])(expected))
    out.sum().backward()
    for experts in sharded:
        for weight in experts.expert_weights:
            experts.keep_shards(weight.name, shards)
    shard_base(base, base.decoder, list(base.decoder), shards, torch.device("cpu"))
    if fused:
        fuse_experts(base)
        assert all(experts.fused.up[1] is None for experts in sharded)
    seen = []
    base.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]) or inputs[0].retain_grad())
    found = base(ids)
    found.sum().backward()
    assert torch.equal(found, out)
    assert torch.equal(seen[0].grad, expected.grad)
    dist.destroy_process_group()


def run(fused=False):
    codes = fork_ranks(2, lambda rank: check_answers(fused))
    assert codes == [0, 0], codes


def test_two_ranks_compute_with_the_whole_stack(zygote):
    outcome = zygote.run("tests.experts.test_sharded_experts:run")
    assert outcome.code == 0, outcome.said
