"""Experts that stay unpacked: of as many layers as asked for, whole layers only, until they are let go."""

import pytest
import torch

pytest.importorskip("triton")

from qlora_cli.core.experts import fused_experts
from qlora_cli.core.experts.fused_experts import fuse_experts
from qlora_cli.core.experts.unpacked_experts import UnpackedExperts
from tests.experts.expert_modules import make_experts, pack


@pytest.fixture
def layers():
    return torch.nn.ModuleList(pack(make_experts("qwen3_moe").float(), torch.float32) for _ in range(3))


def test_experts_that_stay_unpacked_are_let_go_also_once_they_are_fused_no_more(layers):
    unpacked, put_back = UnpackedExperts(layers), fuse_experts(layers)
    for count in (2, 3, 1):
        unpacked.keep(count)
        assert [len(layer.unpacked) for layer in layers] == [2 * (number < count) for number in range(3)]
        assert [layer.fused.up[1].dense is None for layer in layers] == [number >= count for number in range(3)]
    put_back()
    unpacked.keep(0)
    assert not any(layer.unpacked for layer in layers)


def test_where_memory_runs_out_whole_layers_of_experts_stay_unpacked(layers, monkeypatch):
    unpacked, put_back = UnpackedExperts(layers), fuse_experts(layers)
    unpack, done = fused_experts.grouped.unpack, []

    def unpack_three(*given):
        if len(done) == 3:
            raise torch.OutOfMemoryError
        return done.append(given) or unpack(*given)

    monkeypatch.setattr(fused_experts.grouped, "unpack", unpack_three)
    with pytest.raises(torch.OutOfMemoryError):
        unpacked.keep(3)
    assert [len(layer.unpacked) for layer in layers] == [2, 0, 0]
    unpacked.keep(0)
    assert not any(layer.unpacked for layer in layers)
    put_back()
