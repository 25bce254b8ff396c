"""What a model's step needs and what the device has in; which layers keep, recompute or send away activations, out."""

from dataclasses import dataclass

import torch

from qlora_cli.kernels.cross_entropy import CHUNK_BYTES

MARGIN_BYTES = 2**30  # for what the estimate does not see: workspaces of libraries, fragmentation
OPTIMIZER_BYTES_A_PARAMETER = 16  # fp32 value, gradient and two moments: the most any optimizer here takes


@dataclass(frozen=True)
class StepNeeds:
    """Bytes a training step asks for beside the loaded model.

    Attributes:
        layers: Decoder layers.
        saved_bytes: What one layer saves at the largest micro-batch.
        hidden_bytes: Hidden states of the largest micro-batch.
        trainable_parameters: Of the adapter.
        dense_bytes: All linear weights dequantised.
        largest_dense_bytes: The largest linear weight dequantised.
        embedding_bytes: The input embeddings, 0 where they cannot leave the device.
    """

    layers: int
    saved_bytes: int
    hidden_bytes: int
    trainable_parameters: int
    dense_bytes: int
    largest_dense_bytes: int
    embedding_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """The cheapest way, in time, to stay within memory.

    Attributes:
        recomputed: How many layers, the first ones, are recomputed in the backward pass.
        offload_activations: Whether what layers save waits on the host.
        offload_embeddings: Whether input embeddings stay on the host.
        resident_weights: Whether dequantised weights stay on the device.
    """

    recomputed: int
    offload_activations: bool
    offload_embeddings: bool
    resident_weights: bool


def free_bytes(device: torch.device) -> int:
    """Memory this process can still take on a CUDA device, its allocator's cache included."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(index)) - reserved
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
    """Takes each measure only when those before it do not suffice; what is given is not decided anew.

    The order is that of cost: dequantised weights are dropped first, then layers are recomputed one by one, then
    activations go to the host, last the input embeddings.

    Args:
        needs: Of a step.
        available_bytes: What the device has left.
        recomputed: Layers to recompute; None decides.
        offload_activations: None decides.
        offload_embeddings: None decides.
        resident_weights: None decides.
    """
    # In a layer's backward pass: its activations, about as much of gradients, and one dequantised weight.
    fixed = (
        OPTIMIZER_BYTES_A_PARAMETER * needs.trainable_parameters
        + 2 * needs.saved_bytes
        + needs.largest_dense_bytes
        + 3 * CHUNK_BYTES
        + 2 * needs.hidden_bytes
        + MARGIN_BYTES
    )
    room = available_bytes - fixed

    def activations(recomputed_layers: int) -> int:
        return recomputed_layers * needs.hidden_bytes + (needs.layers - recomputed_layers) * needs.saved_bytes

    least = activations(needs.layers if recomputed is None else recomputed)
    embeddings = least > room if offload_embeddings is None else offload_embeddings
    room += needs.embedding_bytes if embeddings else 0
    offload = least > room if offload_activations is None else offload_activations
    if recomputed is None:
        fitting = (n for n in range(needs.layers + 1) if activations(n) <= room)
        recomputed = needs.layers if offload else next(fitting, needs.layers)
    if resident_weights is None:
        resident_weights = not offload and recomputed == 0 and activations(0) + needs.dense_bytes <= room
    return MemoryPlan(recomputed, offload, embeddings, resident_weights)
