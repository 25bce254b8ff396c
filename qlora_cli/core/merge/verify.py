"""Verification of a merged checkpoint: KL divergence from base + adapter, on rows of the run, against a limit."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qlora_cli.artifacts import RUN_YAML, find_run_record, is_prepared, run_of
from qlora_cli.config import TrainConfig
from qlora_cli.config_file import read_config_file
from qlora_cli.core.adapters.adapter_facts import AdapterFacts
from qlora_cli.core.adapters.lora import load_adapter
from qlora_cli.core.data.dataset import PreparedRows, RowSubset, split_rows
from qlora_cli.core.device import read_free_bytes
from qlora_cli.core.merge.base import Base
from qlora_cli.core.merge.compare_models import KEPT_BYTES, Comparison, Row, choose_rows, compare_models, pad_together
from qlora_cli.core.merge.plan import MergeOptions, MergePlan
from qlora_cli.core.models.files import resolve_model
from qlora_cli.core.models.loading import load_base
from qlora_cli.core.models.quantization import BLOCK_SIZE, freeze_base, is_4bit
from qlora_cli.core.models.structure import model_class
from qlora_cli.errors import MergeError, ModelError, RunError, first_line
from qlora_cli.events import Caution, Notice, Report
from qlora_cli.sizes import format_bytes

MOST_KL = 0.01  # nats a token; rounding to bfloat16 costs 3e-5, merging into the wrong weights 0.1 and more
FOUR_BIT_BYTES = 0.57  # a weight in 4 bits with its constants
WORKING_BYTES = 2**30  # activations and logits of a batch, and what the allocator rounds up
LEAST_TOKENS = 512  # held out, below which rows trained on are added: a mean over few tokens says little
# Plain prose, code and a dialogue: read where a run's own rows are gone.
TEXTS = (
    "The harbour lay still in the early light. A single boat moved along the far wall, its engine barely audible, and "
    "the gulls that had waited all night on the roofs of the fish market rose one after another to follow it out.",
    "Question: A farmer has 3 fields of 12 rows each and plants 25 seeds a row. How many seeds does he need?\n"
    "Answer: There are 3 * 12 = 36 rows, and 36 * 25 = 900, so he needs 900 seeds.",
    'def count_words(text):\n    """Return how often each word occurs."""\n    counts = {}\n    for word in text.split():\n'
    "        counts[word] = counts.get(word, 0) + 1\n    return counts\n",
    "User: My parcel was meant to arrive on Tuesday and the page still says that it is being packed.\n"
    "Assistant: I am sorry about the wait. Could you give me the order number? I will ask the warehouse today and "
    "write to you as soon as I know when it leaves.",
    "In 1854 a physician marked each death on a map of the district. The marks crowded around one street pump, and when "
    "its handle was taken off the outbreak faded. It was among the first times that a map had settled an argument "
    "about the cause of a disease.",
)


def evaluation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype in which a merged model is run: its own on a GPU; float32, which changes no weight, on a CPU."""
    return dtype if device.type == "cuda" else torch.float32


def trained_bytes(base: Base, facts: AdapterFacts, options: MergeOptions) -> float:
    """Memory of the model as it was trained: the base in 4 bits, and the adapter."""
    shapes = {name: parameter.shape for name, parameter in base.model.named_parameters()}
    packed = base.packed
    linear, total = (sum(shapes[name].numel() for name in names) for names in (packed, shapes))
    trained = linear * FOUR_BIT_BYTES + (total - linear) * options.compute_dtype.itemsize
    return trained + sum(4 * prod(shape) for shape, _ in facts.tensors.values())


def why_not_loaded(base: Base, options: MergeOptions) -> str | None:
    """Why this device cannot load the base in 4 bits whatever its memory; None where it can."""
    widths = [base.model.get_parameter(name).shape[-1] for name in base.packed if name.endswith(".weight")]
    if options.device.type == "cpu" and any(width % BLOCK_SIZE for width in widths):
        return f"a CPU cannot load a 4-bit base whose widths are no multiples of {BLOCK_SIZE}"
    return None


def can_verify(plan: MergePlan, base: Base, facts: AdapterFacts, options: MergeOptions, report: Report) -> bool:
    """Whether each of the two models to compare can be loaded here, one at a time; says so where not."""
    trained = trained_bytes(base, facts, options)
    growth = 1 if options.pack else evaluation_dtype(options.dtype, options.device).itemsize
    merged = plan.total_bytes * growth / (1 if options.pack else options.dtype.itemsize)
    needed = int(max(trained, merged)) + KEPT_BYTES + WORKING_BYTES
    free = read_free_bytes(options.device)
    reason = why_not_loaded(base, options)
    if needed > free:
        reason = f"that takes about {format_bytes(needed)} of memory, and {format_bytes(free)} are free"
    if reason:
        report(Caution(f"The merged model is not compared with base + adapter: {reason}. --verify tries all the same."))
    return reason is None


def verify_merge(
    directory: Path, adapter: Path, base: Base, plan: MergePlan, options: MergeOptions, report: Report
) -> tuple[Comparison, str]:
    """Compares a merged checkpoint on the disk with the base as it was trained against and the adapter.

    Returns:
        The figures, and which rows they are from.

    Raises:
        MergeError: There is nothing to compare on, or the checkpoint does not load.
    """
    device = options.device
    tokenizer = resolve_model(str(directory), trust_remote_code=base.files.trust_remote_code).tokenizer
    rows, described = find_rows(adapter, tokenizer)
    vocabulary = plan.vocabulary or base.vocabulary
    chosen = choose_rows(rows, vocabulary=vocabulary, device=device)
    if not chosen:
        raise MergeError("There is no row to compare the merged model on.", "Add --no-verify to merge without proof.")

    @contextmanager
    def open_trained() -> Iterator[nn.Module]:
        files = base.trained or base.files
        model, _ = load_base(files, options.quantization, compute_dtype=options.compute_dtype, device=device)
        yield load_adapter(model, adapter, report=report).eval()

    batches = pad_together(chosen, vocabulary=vocabulary, device=device)
    return compare_models(
        open_trained, lambda: open_merged(directory, base, options), batches, device=device, report=report
    ), described


@contextmanager
def open_merged(directory: Path, base: Base, options: MergeOptions) -> Iterator[nn.Module]:
    """The merged checkpoint as transformers loads it.

    Raises:
        MergeError: It does not load, or leaves weights out.
    """
    dtype = options.dtype if options.pack else evaluation_dtype(options.dtype, options.device)
    try:
        loaded: Any = model_class(base.files.config).from_pretrained(
            directory,
            dtype=dtype,
            device_map={"": options.device},
            trust_remote_code=base.files.trust_remote_code,
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
    linears = [name.removesuffix(".weight") for name in sorted(base.packed) if name.endswith(".weight")]
    packed = [is_4bit(model.get_submodule(name)) for name in linears] if options.pack else []
    if not all(packed):
        raise MergeError(f"{packed.count(False)} linear layers of the merged model are not in 4 bits once loaded.")
    yield freeze_base(model) if options.pack else model.eval()


def require_same(
    comparison: Comparison,
    rows: str,
    *,
    faithful: bool,
    max_kl: float | None,
    report: Report,
    chosen: bool,
) -> None:
    """Reports the figures, and refuses a merged model that is not the trained one.

    Args:
        comparison: The figures.
        rows: They are from.
        faithful: Whether the merge keeps the weights trained against. What other merges lose is their nature: it is
            reported, and refused only past a given `max_kl`.
        max_kl: Limit of the mean, nats a token.
        report: Receives the figures.
        chosen: Whether the base was measured to be the better one: then a distance is no loss.

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
    if chosen and not faithful:
        report(Notice(f"Compared with base + adapter: {figures}."))
    elif not comparison.kl_mean <= MOST_KL:
        report(
            Caution(
                f"Part of the fine-tune is lost: {figures}. With --base dequantized and without --quantize it is kept."
            )
        )
    else:
        report(Notice(f"Verified against base + adapter: {figures}."))


# ---------------------------------------------------------------- rows


def find_rows(
    adapter: Path, tokenizer: PreTrainedTokenizerBase, *, least_tokens: int = LEAST_TOKENS
) -> tuple[Iterator[Row], str]:
    """The best rows there are: held out by the run, else those it trained on, else a built-in text.

    Returns:
        Rows one at a time, and a description that ends a sentence.
    """
    split = _split_of_run(adapter)
    if split is None:
        texts = (np.asarray(tokenizer(text)["input_ids"], dtype=np.int32) for text in TEXTS)
        return ((ids, np.ones(len(ids), dtype=np.bool_)) for ids in texts), "of a built-in text"
    trained, held = split
    if held.lengths.sum() >= least_tokens:
        return _each(held), "held out from training"
    if len(held):
        return chain(_each(held), _each(trained)), "held out from training and trained on"
    return _each(trained), "trained on"


def find_trained_rows(adapter: Path) -> RowSubset | None:
    """Rows that the run trained on; None where they are gone."""
    split = _split_of_run(adapter)
    return None if split is None else split[0]


def _split_of_run(adapter: Path) -> tuple[RowSubset, RowSubset] | None:
    """The rows that a run trained on and those it held out; None where they are gone."""
    rows = _rows_of_run(adapter)
    if rows is None:
        return None
    settings = run_of(adapter) / RUN_YAML
    run = TrainConfig(**(read_config_file(settings, TrainConfig) if settings.is_file() else {}))
    return split_rows(rows, fraction=run.eval_fraction or 0.0, count=run.eval_rows, seed=run.seed)


def _each(rows: RowSubset) -> Iterator[Row]:
    return (rows[index] for index in range(len(rows)))


def _rows_of_run(adapter: Path) -> PreparedRows | None:
    """The rows a run recorded, where they are still the same."""
    data = find_run_record(adapter).get("data") or {}
    directory = Path(str(data.get("prepared") or ""))
    if not data.get("prepared") or not is_prepared(directory):
        return None
    try:
        rows = PreparedRows(directory)
    except RunError:  # others lie there now
        return None
    return rows if rows.manifest.get("rows_sha256") == data.get("rows_sha256") else None
