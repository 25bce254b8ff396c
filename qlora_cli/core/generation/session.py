"""Generation session: a base model with any of its LoRA adapters, answering prompts formatted as in their training."""

import gc
import importlib.util
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_cli.core.adapters.adapter_record import AdapterRecord, find_adapter, read_adapter_record, read_merge_record
from qlora_cli.core.adapters.lora import adapter_state, load_adapter, report_unchanged
from qlora_cli.core.adapters.vocabulary import has_replaced_vocabulary
from qlora_cli.core.decoding.cpu_linears import unpack_linears
from qlora_cli.core.decoding.decoder import Decoder, why_not_stepwise
from qlora_cli.core.decoding.sampling import check_sampling
from qlora_cli.core.device import choose_device, resolve_compute_dtype
from qlora_cli.core.generation.base_loading import load_answering_base
from qlora_cli.core.generation.continuous_batching import answer_all
from qlora_cli.core.generation.hf_generate import answer_plainly
from qlora_cli.core.generation.requests import (
    Completion,
    GrowingCompletion,
    Marks,
    Request,
    find_end_ids,
    find_marks,
    make_request,
)
from qlora_cli.core.models.files import ModelFiles, are_same_tokenizer, context_length, files_beside, has_tokenizer
from qlora_cli.core.models.loading import load_unquantized
from qlora_cli.core.models.structure import underlying_model
from qlora_cli.core.prompts.formatting import Formatting, default_formatting, format_prompt, with_template_settings
from qlora_cli.errors import AdapterError, DataError
from qlora_cli.events import Caution, Report
from qlora_cli.settings.generation import GenerationSettings

RAW = Formatting(format="text", column="text")
UNQUANTIZED = "none"  # quant_type of a base whose weights stay as they are stored
CAPACITY_STEP = 256  # rows are made for a multiple of so many tokens, so that the next prompt finds them long enough


class GenerationSession:
    """One base model, loaded when the first adapter is selected, and any number of adapters.

    An adapter goes by its directory; None is the bare base.

    Args:
        settings: How the base is held, and how answers are made.
        report: Receives what decoding reports.
        files: Of the base.
        model: A loaded causal language model, maybe wrapped by PEFT, where there are no files.
        tokenizer: Of that model.
        fused: Whether to decode over fused kernels; by default on a GPU with Triton.

    Attributes:
        seed: Of sampling; drawn where the settings have none.
        decoder: What the last answers were decoded by; None before them, and with transformers' own generate.
        path: How the last answers were decoded, and why not faster.
        loaded_at: `time.perf_counter()` when base and first adapter were loaded.
        first_text_at: The same when the first piece of text came.

    Raises:
        UsageError: A setting is out of range.
        ModelError: The base's configuration or tokenizer cannot be read.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        report: Report,
        *,
        files: ModelFiles | None = None,
        model: Any = None,
        tokenizer: Any = None,
        fused: bool | None = None,
    ) -> None:
        check_sampling(settings)
        self.settings, self.report, self.files = settings, report, files
        self.model, self.tokenizer = model, tokenizer
        self.seed = secrets.randbits(31) if settings.seed is None else settings.seed
        self.decoder: Decoder | None = None
        self.path: str | None = None
        self.loaded_at: float | None = None
        self.first_text_at: float | None = None
        self._trained_formatting: Formatting | None = None  # of a merged model
        if files is not None:
            config, self.tokenizer, self.device = files.config, files.tokenizer, choose_device()
            _, self._trained_formatting = read_merge_record(files.directory)
        else:
            config, self.device = model.config, model.get_input_embeddings().weight.device
        self.context = context_length(config)
        self.compute_dtype = resolve_compute_dtype(settings.compute_dtype, self.device)
        has_triton = importlib.util.find_spec("triton") is not None
        self._fused = fused if fused is not None else self.device.type == "cuda" and has_triton
        self._whole = True  # whether no layer of the base streams
        self._fast: Any = None  # the FastModel
        self._unpacked: bool | None = None  # whether a CPU's weights were dequantised; None before that was tried
        self._sources: dict[str, AdapterRecord] = {}
        self._said: set[str] = set()  # cautions that are due once
        self._names: dict[str, str] = {}  # of the loaded adapters in the model
        self._files: dict[str, ModelFiles] = {}  # by adapter, those with its tokenizer
        self._selected: str | None = None
        self._marks: dict[str | None, Marks] = {}  # by adapter

    # ------------------------------------------------------------ prompts to requests

    def files_of(self, adapter: str | None) -> ModelFiles | None:
        """Files whose tokenizer an adapter's prompts take: its own where tokens were added to the base's.

        Raises:
            ModelError: Its tokenizer cannot be read.
        """
        if adapter is None or self.files is None:
            return self.files
        if adapter not in self._files:
            directory, own = self.source(adapter).directory, self.files
            beside = files_beside(own, directory) if has_tokenizer(directory) else own
            if beside is not own and not are_same_tokenizer(directory, own.directory):
                own = beside if len(beside.tokenizer) > len(own.tokenizer) else own
            self._files[adapter] = own
        return self._files[adapter]

    def tokenizer_of(self, adapter: str | None) -> Any:
        """The tokenizer of an adapter's prompts and answers."""
        files = self.files_of(adapter)
        return self.tokenizer if files is None or files is self.files else files.tokenizer

    def source(self, adapter: str) -> AdapterRecord:
        """What an adapter's run recorded, its base compared with this one.

        Raises:
            AdapterError: There is none (see `find_adapter`), or it was trained on another base.
        """
        if adapter not in self._sources:
            source = read_adapter_record(find_adapter(Path(adapter), self.report), self.report)
            if self.files is not None:
                source.require_base(self.files)
            self._sources[adapter] = source
        return self._sources[adapter]

    def formatting(self, adapter: str | None) -> Formatting:
        """How prompts are formatted: as in the training of the adapter or merged model, else by the model's template.

        Raises:
            UsageError: Variables of a chat template are set, but prompts are no chats.
        """
        if self.settings.raw:
            return with_template_settings(RAW, self.settings.template_setting)
        trained = self.source(adapter).formatting if adapter is not None else self._trained_formatting
        given = self.settings.template_setting
        found = with_template_settings(trained or default_formatting(self.tokenizer_of(adapter)), given)
        for unread in found.unread_settings() if given else ():
            if unread not in self._said:
                self._said.add(unread)
                self.report(Caution(unread))
        return found

    def request(self, index: int, prompt: Any, adapter: str | None) -> Request:
        """A prompt, formatted for an adapter and tokenised.

        Raises:
            DataError: It is empty, has another form than the formatting needs, or leaves no room in the context.
        """
        formatting = self.formatting(adapter)
        # A template would make a text of nothing.
        if isinstance(prompt, str) and not prompt.strip() and not self.settings.raw:
            raise DataError("The prompt is empty.", "Type one, in quotes; --raw gives the model what is typed alone.")
        if adapter not in self._marks:
            self._marks[adapter] = find_marks(self.tokenizer_of(adapter), formatting)
        return make_request(
            index,
            format_prompt(prompt, formatting, self.tokenizer_of(adapter)),
            max_new_tokens=self.settings.max_new_tokens,
            context=self.context,
            strip=formatting.format in ("prompt", "chat"),
            marks=self._marks[adapter],
        )

    def without_thought(self, answer: str, adapter: str | None) -> str:
        """An answer's text without the thought before it, where control tokens tell them apart."""
        marks = self._marks.get(adapter)
        if marks is None or not marks.opening:
            return answer
        opening = self.tokenizer_of(adapter).decode(marks.opening, skip_special_tokens=False)
        return answer.rpartition(opening)[2]

    def end_ids(self, adapter: str | None) -> set[int]:
        """Tokens that end an answer to a prompt formatted for an adapter."""
        found = find_end_ids(self.model, self.tokenizer_of(adapter), self.formatting(adapter))
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if (unknown := sorted(token for token in found if token >= vocabulary)) and "end" not in self._said:
            self._said.add("end")
            self.report(
                Caution(
                    f"No answer can end in {', '.join(map(str, unknown))}, an eos_token_id of the model's generation_config."
                    f"json or config.json: it has {vocabulary} tokens."
                )
            )
        return found

    # ------------------------------------------------------------ requests to completions

    def select(self, adapter: str | None) -> None:
        """Puts an adapter in effect; it, and the base, are loaded when they are first needed.

        Raises:
            AdapterError: There is none, or it belongs to another base; or the bare base is asked for and has no longer its
                own embeddings.
            ModelError: The base cannot be loaded.
        """
        if self.model is None:
            assert self.files is not None
            if self.settings.quant_type == UNQUANTIZED:
                self.model = load_unquantized(self.files, dtype=self.compute_dtype, device=self.device)
            else:
                self.model, streams = load_answering_base(
                    self.files,
                    self.settings,
                    compute_dtype=self.compute_dtype,
                    device=self.device,
                    report=self.report,
                )
                self._whole = not streams
                self._fused = self._fused and self._whole  # fused layers hold weights of their own
        if adapter is not None and adapter not in self._names:
            directory, name = self.source(adapter).directory, f"adapter{len(self._names)}"
            if self._fast is not None:  # made for the layers that are about to be wrapped
                self._fast.close()
                self._fast = self.decoder = None
            self.model = load_adapter(self.model, directory, name=name, report=self.report)
            report_unchanged(adapter_state(self.model, name).items(), directory, self.report)
            self._names[adapter] = name
        if adapter is not None:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self._names[adapter])
            self.model.eval()
        elif has_replaced_vocabulary(underlying_model(self.model)):
            raise AdapterError(
                "The bare base cannot answer any more: an adapter of this session put its own embeddings in their place.",
                "Ask it in another call of generate, without --adapter.",
            )
        elif hasattr(self.model, "get_base_model"):
            self.model.base_model.disable_adapter_layers()
        if self._fast is not None:
            self._fast.refresh()
            if adapter != self._selected and self._fast.adapters_elsewhere:
                self.decoder = None  # its graphs hold the adapter of before
        self._selected = adapter
        self.loaded_at = self.loaded_at or time.perf_counter()

    def answer(
        self,
        requests: Sequence[Request],
        end_ids: Collection[int],
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[Completion]:
        """Answers requests with the selected adapter, in any order.

        Args:
            end_ids: Tokens that end an answer.
            on_text: Called with a request's index and each piece of its answer.

        Raises:
            ModelError: Not even one row has room, the model's output is not a number, or it has no embedding for a
                token of a prompt.
        """

        def on_piece(index: int, piece: str) -> None:
            self.first_text_at = self.first_text_at or time.perf_counter()
            if on_text is not None:
                on_text(index, piece)

        files = self.files_of(self._selected)
        if files is not None and requests:  # an adapter may have brought more embeddings than the base has
            vocabulary = underlying_model(self.model).get_input_embeddings().weight.shape[0]
            files.check_token(max(max(request.ids) for request in requests), vocabulary)
        settings = self.settings
        tokenizer, stop = self.tokenizer_of(self._selected), settings.stop or ()
        start = partial(GrowingCompletion, tokenizer=tokenizer, end_ids=end_ids, stop=stop, on_text=on_piece)
        reason = "--engine plain was given" if settings.engine == "plain" else why_not_stepwise(self.model)
        try:
            if reason is None:
                yield from answer_all(
                    requests, start, self._open_decoder, settings.batch_size, seed=self.seed, report=self.report
                )
            else:
                model = underlying_model(self.model)
                yield from answer_plainly(
                    requests, start, model, settings.batch_size, settings, seed=self.seed, report=self.report
                )
        finally:
            self.path = f"transformers' own generate, because {reason}" if reason else self._describe_decoder()

    def _open_decoder(self, rows: int, capacity: int) -> Decoder:
        """A decoder with room for so many rows and tokens; the last one again where it has."""
        wanted = self.settings.prompt_lookup
        make: Callable[..., Decoder] = partial(Decoder, self.model, look_up=wanted == "on")
        if self._fused:
            from qlora_cli.core.decoding.graph_decoder import FastModel, GraphDecoder  # needs Triton

            self._fast = self._fast or FastModel(self.model)
            make = partial(GraphDecoder, self._fast, look_up=wanted != "off", near=wanted == "on")
        elif self.device.type == "cpu" and self._unpacked is None and self._whole:
            self._unpacked = unpack_linears(underlying_model(self.model))
        decoder = self.decoder
        if decoder is None or decoder.cache.rows != rows or decoder.cache.capacity < capacity:
            self.decoder = decoder = None  # its memory is free before the next one asks
            if self.device.type == "cuda":
                gc.collect()  # a decoder, its cache and its graphs refer to one another
                torch.cuda.empty_cache()
            capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
            capacity = min(capacity, self.context or capacity)
            self.decoder = decoder = make(rows=rows, capacity=capacity, sampling=self.settings)
        decoder.reset()
        return decoder

    def _describe_decoder(self) -> str | None:
        if self.decoder is None:
            return None
        held = "" if self._fused else f", weights {'unpacked' if self._unpacked else 'packed'}"
        return self.decoder.describe() + held
