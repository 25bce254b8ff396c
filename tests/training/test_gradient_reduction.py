"""Gradient buckets: sent while the backward pass runs, in one order on all ranks, whatever comes when."""

import torch
from torch import nn

from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.training.accumulation import Accumulation, ModelReplica, read_batch
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.gradient_reduction import GradientReduction
from tests.training.training_case import MemoryRows


class Sending(ProcessGroup):
    """Writes down where each bucket starts, and how many layers' gradients had come; doubles it, as an equal rank would."""

    def start_all_reduce_sum(self, tensor):
        assert isinstance(self.log, list)
        self.log.append((tensor.storage_offset(), sum(bool(layer.weight.grad.any()) for layer in self.layers)))
        tensor.mul_(2)
        return self

    def wait(self):
        pass


def make(layers=4, bucket_bytes=1):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(layers)))
    parameters = TrainableParameters(model)
    ranks = Sending(0, 2)
    object.__setattr__(ranks, "log", [])
    object.__setattr__(ranks, "layers", list(model))
    return model, parameters, ranks, GradientReduction(parameters, ranks, bucket_bytes)


def test_buckets_go_from_the_end_while_the_layers_below_have_no_gradient_yet():
    model, parameters, ranks, reduction = make()
    x = torch.randn(3, 16)
    model(x).sum().backward()  # an earlier micro-batch: nothing is sent
    assert ranks.log == []
    alone = parameters.gradients()[0].clone()
    parameters.zero_gradients()
    reduction.arm()
    model(x).sum().backward()
    assert ranks.log == [(768, 1), (512, 2), (256, 3), (0, 4)]
    reduction.finish()
    assert len(ranks.log) == 4
    torch.testing.assert_close(parameters.gradients()[0], 2 * alone)


def test_the_order_stays_when_a_parameter_receives_no_gradient_or_nothing_is_computed():
    model, _, ranks, reduction = make()
    reduction.arm()
    model[:2](torch.randn(3, 16)).sum().backward()  # the last two layers are not part of it
    assert ranks.log == []
    reduction.finish()
    assert [start for start, _ in ranks.log] == [768, 512, 256, 0]
    ranks.log.clear()
    reduction.finish()  # a rank without rows in this step
    assert [start for start, _ in ranks.log] == [768, 512, 256, 0]


def test_buckets_cover_every_gradient_once_whatever_their_size():
    for bucket_bytes in (1, 1500, 2**20):
        _, parameters, _, reduction = make(5, bucket_bytes)
        covered = torch.cat([bucket.flatten() for bucket in reversed(reduction.buckets)])
        assert covered.numel() == parameters.elements
        assert sum(reduction.sizes) == 5


class OfTwo(Sending):
    """Counts nothing: the other rank runs two micro-batches."""

    def all_reduce_max(self, value, device):
        return 2

    def all_reduce_sum(self, tensor):
        return tensor


def test_a_rank_with_fewer_micro_batches_sends_its_buckets_at_the_same_pass_as_the_others():
    """Where weights are gathered from all ranks, sums of gradients in another order would wait for ever."""
    model, parameters, _, _ = make()
    ranks = OfTwo(0, 2)
    object.__setattr__(ranks, "layers", list(model))
    rows = MemoryRows()
    batches = [read_batch(rows, [index], torch.device("cpu")) for index in range(2)]
    orders = []

    class Engine:
        def loss(self, batch):
            orders[-1].append("pass")
            return model(torch.ones(3, 16)).sum()

    for count in (2, 1, 0):
        orders.append([])
        object.__setattr__(ranks, "log", Order(orders[-1]))
        accumulation = Accumulation(ModelReplica(model, Engine(), ranks, lockstep=True), rows, parameters)
        accumulation.reduction = GradientReduction(parameters, ranks, 1)
        accumulation.accumulate(batches[:count])
    assert orders[0] == orders[1] == orders[2]
    assert orders[0] == ["pass", "pass", 768, 512, 256, 0]


class Order(list):
    """A log that also goes into a common one."""

    def __init__(self, common):
        super().__init__()
        self.common = common

    def append(self, entry):
        super().append(entry)
        self.common.append(entry[0])
