"""A base, adapters and prompts in any form in; answers out, each formatted as in its adapter's training."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_cli.config import QuantizationSettings
from qlora_cli.core.decoding.sampling import Sampling
from qlora_cli.core.generation.generator import Generator, context_length, find_end_ids, make_request
from qlora_cli.core.generation.requests import Completion, Request
from qlora_cli.core.models.adapter_record import AdapterRecord, read_merge_record, read_source
from qlora_cli.core.models.files import ModelFiles
from qlora_cli.core.models.loading import load_base, load_unquantized
from qlora_cli.core.models.lora import load_adapter
from qlora_cli.core.prompts.formatting import Formatting, default_formatting, format_prompt
from qlora_cli.errors import UsageError
from qlora_cli.events import Report

RAW = Formatting(format="text", column="text")


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Which base, and how it is held."""

    files: ModelFiles
    quantization: QuantizationSettings | None  # None: the weights as they are stored
    compute_dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How answers are made.

    Raises:
        UsageError: A number is too small.
    """

    sampling: Sampling
    seed: int
    max_new_tokens: int
    batch_size: int = 1
    stop: tuple[str, ...] = ()
    raw: bool = False  # prompts as they are, without the trained formatting
    engine: str = "fast"

    def __post_init__(self) -> None:
        for flag, value in (("max-new-tokens", self.max_new_tokens), ("batch-size", self.batch_size)):
            if value < 1:
                raise UsageError(f"--{flag} is {value} and has to be 1 or more.", f"Change --{flag}.")


class GenerationSession:
    """Loads the base when the first answer is asked for, and each adapter when it first speaks.

    An adapter goes by its directory; None is the bare base.

    Args:
        base: Which base.
        settings: How answers are made.
        report: Receives what loading and decoding tell.
    """

    def __init__(self, base: BaseSettings, settings: AnswerSettings, report: Report) -> None:
        self.base, self.settings, self.report = base, settings, report
        self.context = context_length(base.files.config)
        self.tokenizer = base.files.tokenizer
        _, self._merged_formatting = read_merge_record(base.files.directory)
        self._sources: dict[str, AdapterRecord] = {}
        self._names: dict[str, str] = {}  # of the loaded adapters in the model
        self._generator: Generator | None = None

    def source(self, adapter: str) -> AdapterRecord:
        """What an adapter says of itself, its base compared with this one.

        Raises:
            AdapterError: There is none, or it was trained on another base.
        """
        if adapter not in self._sources:
            source = read_source(Path(adapter))
            source.require_base(self.base.files)
            self._sources[adapter] = source
        return self._sources[adapter]

    def formatting(self, adapter: str | None) -> Formatting:
        """How prompts are formatted: as in the training of the adapter or merged model, else by the model's template."""
        if self.settings.raw:
            return RAW
        trained = self.source(adapter).formatting if adapter is not None else self._merged_formatting
        return trained or default_formatting(self.tokenizer)

    def request(self, index: int, prompt: Any, adapter: str | None) -> Request:
        """A prompt, formatted for an adapter and tokenised.

        Raises:
            DataError: It has another form than the formatting needs, or leaves no room in the context.
        """
        formatting = self.formatting(adapter)
        return make_request(
            index,
            format_prompt(prompt, formatting, self.tokenizer),
            max_new_tokens=self.settings.max_new_tokens,
            context=self.context,
            strip=formatting.format in ("prompt", "chat"),
        )

    @property
    def path(self) -> str | None:
        """How answers are decoded, once the model is loaded."""
        return self._generator.path if self._generator is not None else None

    def open(self) -> Generator:
        """The loaded model."""
        if self._generator is None:
            base = self.base
            model: PreTrainedModel
            if base.quantization is None:
                model = load_unquantized(base.files, dtype=base.compute_dtype, device=base.device)
            else:
                model, _ = load_base(
                    base.files, base.quantization, compute_dtype=base.compute_dtype, device=base.device
                )
            self._generator = Generator(
                model,
                self.tokenizer,
                sampling=self.settings.sampling,
                engine=self.settings.engine,
                report=self.report,
            )
        return self._generator

    def select(self, adapter: str | None) -> Generator:
        """The loaded model with an adapter in effect."""
        generator = self.open()
        if adapter is not None and adapter not in self._names:
            source, name = self.source(adapter), f"adapter{len(self._names)}"
            generator.model = load_adapter(generator.model, source.directory, name=name)
            self._names[adapter] = name
        generator.select(None if adapter is None else self._names[adapter])
        return generator

    def answer(
        self,
        requests: Sequence[Request],
        adapter: str | None,
        on_text: Callable[[int, str], None] | None = None,
        *,
        base: bool = False,
    ) -> Iterator[Completion]:
        """Answers requests formatted for an adapter, in any order; `base` then leaves that adapter out."""
        generator, settings = self.select(None if base else adapter), self.settings
        yield from generator.answer(
            requests,
            batch_size=settings.batch_size,
            seed=settings.seed,
            end_ids=find_end_ids(generator.model, self.tokenizer, self.formatting(adapter)),
            stop=settings.stop,
            on_text=on_text,
        )
