"""One decoder layer tried out in; how steps keep within the device's memory, for each number of tokens, out."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch
from torch import nn

from qlora_cli.core.engine.cuda_graphs import bucket_tokens
from qlora_cli.core.engine.decoder_layers import LayerBytes
from qlora_cli.core.engine.memory_plan import LayerSeconds, MemoryPlan, StepNeeds, free_bytes, plan_memory
from qlora_cli.core.engine.offload import link_bytes_per_second
from qlora_cli.core.engine.trials import LEAST_TRIAL_TOKENS, Calibration

RELIEF_BYTES, MOST_RELIEFS = 2**28, 16  # how much less memory is planned with each time it runs out
HOST_SHARE = 0.5  # of free host memory, which activations of all ranks there may take


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is asked for; see `install_engine`. None leaves a choice to the engine.

    Attributes:
        recomputed: How many of so many layers are recomputed.
    """

    compute_dtype: torch.dtype
    recomputed: Callable[[int], int | None]
    offload_activations: bool | None
    offload_embeddings: bool | None
    resident_weights: bool | None
    compile: bool | None
    max_tokens: int
    total_steps: int
    optimizer_bytes: int

    def plan(self, layers: int, *, resident: bool) -> MemoryPlan:
        """Of steps that nothing is measured for: what was asked for, and nothing else."""
        recomputed, away = self.recomputed(layers), self.offload_activations
        sent = layers if away and recomputed == 0 else 0
        return MemoryPlan(recomputed or 0, bool(away), bool(self.offload_embeddings), resident, sent=sent)

    def planner(self, layers: int) -> "StepPlanner":
        """Decides what was left open."""
        recomputed = self.recomputed(layers)
        choose = partial(
            plan_memory,
            recomputed=recomputed,
            offload_activations=self.offload_activations,
            offload_embeddings=self.offload_embeddings,
            resident_weights=self.resident_weights,
        )
        return StepPlanner(choose, bucket_tokens(self.max_tokens), adapts=recomputed is None)


class StepPlanner:
    """Plans the steps of one engine on a CUDA device.

    Args:
        choose: `plan_memory` with what was asked for.
        largest_tokens: Of a micro-batch.
        adapts: Whether smaller micro-batches may keep what larger ones recompute.

    Attributes:
        needs: Of the largest micro-batch, once measured.
        available_bytes: What the device had left then, less what running out of memory has taught since.
    """

    def __init__(self, choose: Callable[..., MemoryPlan], largest_tokens: int, *, adapts: bool) -> None:
        self.choose, self.largest_tokens, self.adapts = choose, largest_tokens, adapts
        self.needs: StepNeeds
        self.available_bytes = 0

    def measure(self, trials: Calibration, layer: nn.Module, static: StepNeeds, workspace_bytes: int | None) -> None:
        """Runs the first layer as it stands.

        Args:
            trials: Of the engine.
            layer: The layer.
            static: What is known without running it; the rest is filled in.
            workspace_bytes: Which slices of weights the layer runs on.
        """
        share = 1
        while (measured := trials.measure(layer, self.largest_tokens // share)) is None:
            share *= 2  # not even a layer fits, but a smaller micro-batch may
        bytes_, seconds = measured
        few = trials.measure(layer, max(LEAST_TRIAL_TOKENS, self.largest_tokens // share // 4))
        self.needs = replace(
            _with_layer(static, bytes_, share, workspace_bytes),
            hidden_bytes=self.largest_tokens * trials.hidden_bytes,
            seconds=LayerSeconds(share * seconds.forward, share * seconds.backward),
            fixed_seconds=None if few is None else _fixed(seconds, few[1]),
            link_bytes_per_second=link_bytes_per_second(trials.device),
            host_bytes=int(
                HOST_SHARE * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            ),
        )
        self.available_bytes = free_bytes(trials.device)

    def plan(self) -> MemoryPlan:
        """For the largest micro-batch."""
        return self.choose(self.needs, self.available_bytes)

    def keep_workspace(self, workspace_bytes: int | None) -> None:
        """Plans no other slices from now on: compiled code holds them."""
        self.choose = partial(self.choose, workspaces=(workspace_bytes,))

    def reduce_memory(self, current: MemoryPlan) -> MemoryPlan | None:
        """A leaner plan than the one with which memory ran out; None where there is none."""
        for _ in range(MOST_RELIEFS):
            self.available_bytes -= RELIEF_BYTES
            plan = self.plan()
            if plan != current:
                return plan
        return None

    def for_tokens(self, plan: MemoryPlan, tokens: int) -> MemoryPlan:
        """The plan of a micro-batch: smaller ones than the largest leave room for whole layers."""
        if not (self.adapts and plan.frees_activations):
            return plan
        needs = self.needs.for_share(tokens / self.largest_tokens)
        plans = [
            replace(plan, recomputed=recomputed, sent=sent)
            for recomputed in range(plan.recomputed + 1)
            for sent in range(plan.sent + plan.recomputed - recomputed + 1 if plan.sent else 1)
        ]
        room = max(needs.host_bytes, plan.sent_bytes(needs))  # on the host; what was asked for may be more
        fitting = [
            leaner
            for leaner in plans
            if leaner.step_bytes(needs) <= self.available_bytes and leaner.sent_bytes(needs) <= room
        ]
        return min(fitting, key=lambda leaner: leaner.cost(needs), default=plan)


def _with_layer(static: StepNeeds, layer: LayerBytes, share: int, workspace_bytes: int | None) -> StepNeeds:
    largest = static.largest_dense_bytes
    held = largest if workspace_bytes is None else min(largest, workspace_bytes)
    return replace(static, kept_bytes=layer.kept * share, peak_bytes=(layer.peak - held) * share + largest)


def _fixed(seconds: LayerSeconds, quarter: LayerSeconds) -> LayerSeconds:
    """What does not grow with tokens, from a measurement and one with a quarter of the tokens."""
    forward = min(max((4 * quarter.forward - seconds.forward) / 3, 0.0), seconds.forward)
    backward = min(max((4 * quarter.backward - seconds.backward) / 3, 0.0), seconds.backward)
    return LayerSeconds(forward, backward)
