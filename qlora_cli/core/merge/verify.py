"""A merged checkpoint, its base and its adapter in; how far it predicts apart from them, and a verdict, out."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_cli.core.device import read_free_bytes
from qlora_cli.core.merge.base import Base
from qlora_cli.core.merge.compare_models import KEPT_BYTES, Comparison, choose_rows, compare_models
from qlora_cli.core.merge.plan import Arithmetic, MergePlan
from qlora_cli.core.merge.verify_rows import find_rows
from qlora_cli.core.merge.weight_tying import embedding_names
from qlora_cli.core.models.loading import load_base, load_tokenizer
from qlora_cli.core.models.lora import AdapterFacts, load_adapter
from qlora_cli.core.models.quantization import BLOCK_SIZE, freeze_base, is_4bit
from qlora_cli.core.models.structure import linear_names
from qlora_cli.errors import MergeError, ModelError, first_line
from qlora_cli.events import Caution, Notice, Report

MOST_KL = 0.01  # nats a token; rounding to bfloat16 costs 3e-5, merging into the wrong weights 0.1 and more
FOUR_BIT_BYTES = 0.57  # a weight in 4 bits with its constants
WORKING_BYTES = 2**30  # activations and logits of one row, and what the allocator rounds up


def evaluation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype in which a merged model is run: its own on a GPU; float32, which changes no weight, on a CPU."""
    return dtype if device.type == "cuda" else torch.float32


def can_verify(plan: MergePlan, base: Base, facts: AdapterFacts, arithmetic: Arithmetic, report: Report) -> bool:
    """Whether each of the two models to compare can be loaded here, one at a time; says so where not."""
    shapes = {name: parameter.shape for name, parameter in base.model.named_parameters()}
    linears = [f"{name}.weight" for name in linear_names(base.model)]
    linear, total = (sum(shapes[name].numel() for name in names) for names in (linears, shapes))
    trained = linear * FOUR_BIT_BYTES + (total - linear) * arithmetic.compute_dtype.itemsize
    trained += sum(4 * prod(shape) for shape, _ in facts.tensors.values())
    growth = 1 if arithmetic.pack else evaluation_dtype(arithmetic.dtype, arithmetic.device).itemsize
    merged = plan.total_bytes * growth / (1 if arithmetic.pack else arithmetic.dtype.itemsize)
    needed = int(max(trained, merged)) + KEPT_BYTES + WORKING_BYTES
    free = read_free_bytes(arithmetic.device)
    free = psutil.virtual_memory().available if free is None else free
    reason = None
    if needed > free:
        reason = f"that takes about {needed:,} bytes of memory, and {free:,} are free"
    elif arithmetic.device.type == "cpu" and any(shapes[name][-1] % BLOCK_SIZE for name in linears):
        reason = f"a CPU cannot load a 4-bit base whose widths are no multiples of {BLOCK_SIZE}"
    if reason:
        report(Caution(f"The merged model is not compared with base + adapter: {reason}. --verify tries all the same."))
    return reason is None


def verify(
    directory: Path, adapter: Path, base: Base, plan: MergePlan, arithmetic: Arithmetic, report: Report
) -> tuple[Comparison, str]:
    """Compares a merged checkpoint on the disk with the base as it was trained against and the adapter.

    Returns:
        The figures, and which rows they are from.

    Raises:
        MergeError: There is nothing to compare on, or the checkpoint does not load.
    """
    device = arithmetic.device
    tokenizer = load_tokenizer(str(directory), trust_remote_code=base.trust_remote_code)
    rows, described = find_rows(adapter, tokenizer)
    vocabulary = plan.vocabulary or base.model.get_parameter(embedding_names(base.model)[0]).shape[0]
    chosen = choose_rows(rows, vocabulary=vocabulary, device=device)
    if not chosen:
        raise MergeError("There is no row to compare the merged model on.", "Add --no-verify to merge without proof.")

    @contextmanager
    def open_trained() -> Iterator[nn.Module]:
        model, _ = load_base(
            base.name,
            revision=base.revision,
            quant_type=arithmetic.quant_type,
            double_quant=arithmetic.double_quant,
            compute_dtype=arithmetic.compute_dtype,
            device=device,
            trust_remote_code=base.trust_remote_code,
        )
        if plan.vocabulary is not None:
            model.resize_token_embeddings(plan.vocabulary, mean_resizing=False)
        yield load_adapter(model, adapter).eval()

    return compare_models(
        open_trained, lambda: open_merged(directory, base, arithmetic), chosen, device=device, report=report
    ), described


@contextmanager
def open_merged(directory: Path, base: Base, arithmetic: Arithmetic) -> Iterator[nn.Module]:
    """The merged checkpoint as transformers loads it.

    Raises:
        MergeError: It does not load, or leaves weights out.
    """
    dtype = arithmetic.dtype if arithmetic.pack else evaluation_dtype(arithmetic.dtype, arithmetic.device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map={"": arithmetic.device},
            trust_remote_code=base.trust_remote_code,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelError("The merged model does not fit in memory.", "Add --no-verify.") from error
        raise MergeError(f"The merged model does not load: {first_line(error)}") from error
    model, loading = loaded
    wrong = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if wrong:
        raise MergeError(f"The merged model lacks {len(wrong)} weights, first {wrong[0]}.")
    packed = [is_4bit(model.get_submodule(name)) for name in linear_names(model)]
    if arithmetic.pack and not all(packed):
        raise MergeError(f"{packed.count(False)} linear layers of the merged model are not in 4 bits once loaded.")
    yield freeze_base(model) if arithmetic.pack else model.eval()


def judge(comparison: Comparison, rows: str, *, faithful: bool, max_kl: float | None, report: Report) -> None:
    """Tells the figures, and refuses a merged model that is not the trained one.

    Args:
        comparison: The figures.
        rows: Which rows they are from.
        faithful: Whether the merge keeps the weights trained against. What other merges lose is their nature: it is
            told, and refused only past a given `max_kl`.
        max_kl: Limit of the mean, nats a token.
        report: Told.

    Raises:
        MergeError: The divergence is past the limit.
    """
    limit = max_kl if max_kl is not None else MOST_KL if faithful else None
    figures = (
        f"mean KL {comparison.kl_mean:.2e} nats a token, perplexity {comparison.reference_perplexity:.4f} with the "
        f"adapter and {comparison.other_perplexity:.4f} merged, same greedy choice at "
        f"{100 * comparison.greedy_agreement:.2f} % of {comparison.tokens:,} tokens {rows}"
    )
    if limit is not None and not comparison.kl_mean <= limit:  # NaN is past any limit
        raise MergeError(
            f"The merged model is not the trained one: {figures}. The limit is {limit:g}; nothing was kept.",
            "Try --dtype float32; if that does not help, the adapter was trained on another base."
            if faithful
            else "Merge with --base dequantized and without --quantize, or raise --max-kl.",
        )
    if not comparison.kl_mean <= MOST_KL:
        report(
            Caution(
                f"Part of the fine-tune is lost: {figures}. With --base dequantized and without --quantize it is kept."
            )
        )
    else:
        report(Notice(f"Verified against base + adapter: {figures}."))
