"""What a model's step needs and what the device has in; which layers keep, recompute or send away activations, out."""

from dataclasses import dataclass, replace

import torch

from qlora_cli.kernels.cross_entropy import CHUNK_BYTES

# For what is not measured: libraries' workspaces, fragmentation, the optimizer's temporary values, a compiled layer's
# other order of allocation. With 96 MiB each of three models near their limit ran out of memory.
MARGIN_BYTES = 320 * 2**20
SLICE_BYTES = 64 * 2**20  # of a weight, where memory is too short for whole dequantised ones

# Cost of each measure as a share of a step: recomputing all layers, of which the last linear is left out; a hidden state
# a layer on its way to the host and back; embeddings looked up by the host; weights dequantised in slices; dequantising.
RECOMPUTE_COST, OFFLOAD_COST, HOST_EMBEDDING_COST, SLICE_COST, DEQUANTISE_COST = 0.35, 0.03, 0.01, 0.05, 0.08


@dataclass(frozen=True)
class StepNeeds:
    """Bytes a training step asks for beside the loaded model.

    Attributes:
        layers: Decoder layers.
        kept_bytes: What one layer saves at the largest micro-batch.
        peak_bytes: The most one layer holds at once in its forward and backward pass, `kept_bytes` included.
        hidden_bytes: Hidden states of the largest micro-batch.
        optimizer_bytes: Gradients of the adapter and the optimizer's state.
        dense_bytes: All linear weights dequantised.
        largest_dense_bytes: The largest linear weight dequantised, of which `peak_bytes` contains one.
        embedding_bytes: The input embeddings, 0 where they cannot leave the device.
    """

    layers: int
    kept_bytes: int
    peak_bytes: int
    hidden_bytes: int
    optimizer_bytes: int
    dense_bytes: int
    largest_dense_bytes: int
    embedding_bytes: int

    def for_share(self, share: float) -> "StepNeeds":
        """The same for a micro-batch with that share of the largest one's tokens."""
        passing = self.peak_bytes - self.largest_dense_bytes
        return replace(
            self,
            kept_bytes=int(self.kept_bytes * share),
            peak_bytes=int(passing * share) + self.largest_dense_bytes,
            hidden_bytes=int(self.hidden_bytes * share),
        )


@dataclass(frozen=True)
class MemoryPlan:
    """How a step stays within memory.

    Attributes:
        recomputed: How many layers, the first ones, are recomputed in the backward pass.
        offload_activations: Whether what recomputed layers save, or all layers where none is, waits on the host.
        offload_embeddings: Whether input embeddings stay on the host.
        resident_weights: Whether dequantised weights stay on the device.
        workspace_bytes: Most bytes of a weight dequantised at once; None for whole weights.
    """

    recomputed: int
    offload_activations: bool
    offload_embeddings: bool
    resident_weights: bool
    workspace_bytes: int | None = None

    def step_bytes(self, needs: StepNeeds) -> int:
        """Most bytes beside the loaded model that a step with these measures holds at once."""
        peak, kept = needs.peak_bytes, needs.kept_bytes
        if self.workspace_bytes is not None:
            peak -= max(0, needs.largest_dense_bytes - self.workspace_bytes)
        whole = needs.layers - self.recomputed
        waiting = self.recomputed * needs.hidden_bytes
        if self.offload_activations:  # two layers' are on their way
            waiting = min(self.recomputed, 2) * needs.hidden_bytes
            whole = whole if self.recomputed else min(whole, 2)
        head = 4 * needs.hidden_bytes + 2 * CHUNK_BYTES
        # Either at the head or its neighbour, where all that is kept is there, or in a layer repeated later.
        above = waiting + whole * kept + max(head, peak - kept if whole else 0)
        below = waiting + peak + needs.hidden_bytes
        step = max(above, below if self.recomputed else 0) + needs.optimizer_bytes + MARGIN_BYTES
        step += needs.dense_bytes if self.resident_weights else 0
        return step - (needs.embedding_bytes if self.offload_embeddings else 0)

    def cost(self, needs: StepNeeds) -> float:
        """Time the measures take, as a share of a step."""
        return (
            RECOMPUTE_COST * self.recomputed / max(needs.layers, 1)
            + OFFLOAD_COST * self.offload_activations * (1 if self.recomputed else 10)
            + HOST_EMBEDDING_COST * self.offload_embeddings
            + SLICE_COST * (self.workspace_bytes is not None)
            + DEQUANTISE_COST * (not self.resident_weights)
        )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def limit_memory(device: torch.device, limit_bytes: int) -> None:
    """Keeps PyTorch's allocator within so many bytes of a CUDA device, from before anything is loaded."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), _index(device))
    # Near a limit, pieces too small for the next tensor would be lost.
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def free_bytes(device: torch.device) -> int:
    """Memory this process can still take on a CUDA device, its allocator's cache included."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(_index(device))) - reserved
    return min(free, allowed) + reserved - allocated


def plan_memory(
    needs: StepNeeds,
    available_bytes: int,
    *,
    recomputed: int | None,
    offload_activations: bool | None,
    offload_embeddings: bool | None,
    resident_weights: bool | None,
) -> MemoryPlan:
    """The fastest way to stay within memory, or the leanest where none does; what is given is not decided anew.

    Args:
        needs: Of a step.
        available_bytes: What the device has left.
        recomputed: Layers to recompute; None decides.
        offload_activations: None decides; that of layers kept whole is never decided on, it takes too long.
        offload_embeddings: None decides.
        resident_weights: None decides.
    """
    either = (False, True)
    plans = [
        MemoryPlan(layers, away, embeddings, resident, workspace)
        for layers in (range(needs.layers + 1) if recomputed is None else (recomputed,))
        for away in (either if offload_activations is None and layers else (bool(offload_activations),))
        for embeddings in (
            either if offload_embeddings is None and needs.embedding_bytes else (bool(offload_embeddings),)
        )
        for resident in (either if resident_weights is None else (resident_weights,))
        for workspace in ((None, SLICE_BYTES) if needs.largest_dense_bytes > SLICE_BYTES and not resident else (None,))
    ]
    fitting = [plan for plan in plans if plan.step_bytes(needs) <= available_bytes]
    if not fitting:
        return min(plans, key=lambda plan: (plan.step_bytes(needs), plan.cost(needs)))
    return min(fitting, key=lambda plan: plan.cost(needs))
