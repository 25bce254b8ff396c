"""A loaded model and tokenised prompts in, answers out: chooses how to decode, and with which adapter."""

import gc
import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from qlora_cli.core.decoding.cpu_linears import unpack_linears
from qlora_cli.core.decoding.decoder import Decoder, why_not_stepwise
from qlora_cli.core.decoding.sampling import Sampling
from qlora_cli.core.generation.continuous_batching import answer_all
from qlora_cli.core.generation.hf_generate import answer_plainly
from qlora_cli.core.generation.requests import Completion, Request
from qlora_cli.core.models.structure import underlying_model
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.prompts.formatting import Formatting, PromptTemplate, RowFormatter
from qlora_cli.errors import DataError
from qlora_cli.events import Report

if torch.cuda.is_available() and importlib.util.find_spec("triton"):
    from qlora_cli.core.decoding.graph_decoder import FastModel, GraphDecoder

CAPACITY_STEP = 256  # rows are made for a multiple of so many tokens, so that the next prompt finds them long enough


def context_length(config: Any) -> int | None:
    """Most tokens the model can read at once, prompt and answer together; None where nothing limits it."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)


def make_request(
    index: int, ids: Sequence[int], *, max_new_tokens: int, context: int | None, strip: bool = False
) -> Request:
    """A request that fits the model's context; the answer is cut shorter where it must be.

    Raises:
        DataError: The prompt is empty, or leaves no room for an answer.
    """
    if not ids:
        raise DataError("The prompt is empty.", 'Type: qlora generate --adapter out "Your question"')
    if context is not None and len(ids) >= context:
        raise DataError(
            f"The prompt has {len(ids):,} tokens and the model reads at most {context:,}.", "Shorten the prompt."
        )
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    return Request(index, ids, room, strip)


def find_end_ids(model: Any, tokenizer: Any, formatting: Formatting) -> set[int]:
    """Tokens that end an answer: the end of text, the model's own choices, and what closed the answers in training."""
    encoder = encoder_of(tokenizer)
    own = model.generation_config.eos_token_id
    found = {encoder.spec.eos_id, *(own if isinstance(own, list) else [own])} - {None}
    if formatting.format == "chat":
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        record: dict[str, Any] = {formatting.column or "messages": turns}
    elif formatting.format == "prompt":
        fields = PromptTemplate(formatting.template or "", formatting.completion_column or "", encoder).fields
        record = dict.fromkeys(fields, "a")
    else:
        return found
    (rows,) = RowFormatter(formatting, encoder).format_records([record], "last")
    assert isinstance(rows, list)
    row = rows[-1]
    last_text = max(place for place, (content, _) in enumerate(row) if isinstance(content, str))
    closing = next((content for content, _ in row[last_text + 1 :] if isinstance(content, int)), None)
    return found | ({closing} if closing is not None else set())


class Generator:
    """Answers prompts with one model, under one way of sampling.

    Args:
        model: A transformers causal language model, maybe wrapped by PEFT.
        tokenizer: Of the model.
        sampling: How tokens are chosen.
        engine: "fast", or "plain" for transformers' own generate.
        report: Receives cautions.
    """

    def __init__(self, model: Any, tokenizer: Any, *, sampling: Sampling, engine: str, report: Report) -> None:
        self.model, self.tokenizer, self.sampling, self.report = model, tokenizer, sampling, report
        self._reason = "--engine plain was given" if engine == "plain" else why_not_stepwise(model)
        self._decoder: Decoder | None = None
        self._selected: Any = ...  # the adapter in effect; not known before the first choice
        self._fast: Any = None  # the FastModel, where there is a GPU for it
        self._fast_for: Any = None  # what it was made for
        self._unpacked: bool | None = None  # whether the weights were, None before anybody tried

    @property
    def path(self) -> str:
        """How answers are decoded, and why not faster."""
        if self._reason is not None:
            return f"transformers' own generate, because {self._reason}"
        if self._fast is None:
            held = "unpacked" if self._unpacked else "packed"
            return f"own steps, one forward a token, weights {held}"
        reason = getattr(self._decoder, "obstacle", None)
        how = "CUDA graphs" if reason is None else f"steps launched one by one (not captured: {reason})"
        uncaptured = getattr(getattr(self._decoder, "prompts", None), "obstacle", None)
        if reason is None and uncaptured is not None:
            how += f" (prompts launched one by one, not captured: {uncaptured})"
        return f"{how} over fused kernels: {self._fast.describe()}"

    def select(self, adapter: str | None) -> None:
        """Switches to the adapter of this name, None for the bare base."""
        if not hasattr(self.model, "get_base_model"):  # no PEFT model: none was ever loaded
            assert adapter is None
        elif adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(adapter)
            self.model.eval()
        if self._fast is not None:
            self._fast.refresh()
            if adapter != self._selected and self._fast.adapters_elsewhere:
                self._decoder = None  # its graphs hold the adapter of before
        self._selected = adapter

    def _make_fast(self) -> Any:
        """The model with its fast kernels, made anew when adapters were loaded since."""
        made_for = (id(self.model), *getattr(self.model, "peft_config", ()))
        if self._fast_for != made_for:
            if self._fast is not None:
                self._fast.close()
            self._decoder = None
            self._fast, self._fast_for = FastModel(self.model), made_for
        return self._fast

    def answer(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int,
        seed: int,
        end_ids: Collection[int],
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[Completion]:
        """Answers requests in any order; see `answer_all`."""
        if self._reason is not None:
            model = underlying_model(self.model)
            yield from answer_plainly(
                requests,
                model,
                self.tokenizer,
                batch_size=batch_size,
                sampling=self.sampling,
                seed=seed,
                end_ids=end_ids,
                stop=stop,
                on_text=on_text,
            )
        else:
            yield from answer_all(
                requests,
                self._open,
                self.tokenizer,
                batch_size=batch_size,
                seed=seed,
                end_ids=end_ids,
                stop=stop,
                on_text=on_text,
                report=self.report,
            )

    def _open(self, slots: int, capacity: int) -> Decoder:
        """A decoder with room for so many rows and tokens; the last one again where it has."""
        is_gpu = self.model.get_input_embeddings().weight.device.type == "cuda"
        fast = self._make_fast() if is_gpu and importlib.util.find_spec("triton") else None
        if not is_gpu and self._unpacked is None:
            self._unpacked = unpack_linears(underlying_model(self.model))
        last = self._decoder
        if last is None or last.cache.slots != slots or last.cache.capacity < capacity:
            self._decoder = last = None  # its memory is free before the next one asks
            if is_gpu:
                gc.collect()  # a decoder, its cache and its graphs refer to one another
                torch.cuda.empty_cache()
            capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
            capacity = min(capacity, context_length(self.model.config) or capacity)
            size: dict[str, Any] = {"slots": slots, "capacity": capacity, "sampling": self.sampling}
            self._decoder = last = Decoder(self.model, **size) if fast is None else GraphDecoder(fast, **size)
        last.reset()
        return last
