"""Sample prompts: answers of a model while it is trained, without loading or undoing anything.

On a card the engine of the steps reads the rows anew for each token: its forward passes take milliseconds, and it is what
knows where weights and embeddings lie. On the CPU, where each would take seconds, its parts are set aside for a while, and
a session answers as `generate` does: weights dequantised once, keys and values kept.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qlora_cli.core.data.packing import collate
from qlora_cli.core.device import free_memory
from qlora_cli.core.engine.engine import Engine, set_aside
from qlora_cli.core.generation.requests import GrowingCompletion, Request, find_end_ids, find_marks, make_request
from qlora_cli.core.generation.session import GenerationSession
from qlora_cli.core.prompts.formatting import Formatting, format_prompt
from qlora_cli.core.training.rng_state import undisturbed_random_state
from qlora_cli.events import Caution, Event, SampleAnswered, report_nothing
from qlora_cli.settings.generation import GenerationSettings

LONGEST_ANSWER = 64  # tokens


def make_requests(
    prompts: Sequence[str], formatting: Formatting, tokenizer: Any, context: int | None
) -> dict[str, Request]:
    """Prompts, formatted as in training and tokenised, by their text.

    Raises:
        DataError: One has another form than the formatting needs, or leaves no room in the context.
    """
    marks = find_marks(tokenizer, formatting)
    return {
        prompt: make_request(
            index,
            format_prompt(prompt, formatting, tokenizer),
            max_new_tokens=LONGEST_ANSWER,
            context=context,
            strip=formatting.format in ("prompt", "chat"),
            marks=marks,
        )
        for index, prompt in enumerate(dict.fromkeys(prompts))
    }


@dataclass(frozen=True)
class SamplePrompts:
    """Prompts that are asked again and again while a model is trained.

    Attributes:
        requests: Of `make_requests`.
        formatting: Of the rows.
        tokenizer: Of the base.
        model: In training, maybe wrapped by PEFT.
        engine: Of its steps.
        device: Of the engine.
    """

    requests: Mapping[str, Request]
    formatting: Formatting
    tokenizer: Any
    model: Any
    engine: Engine
    device: torch.device

    def ask(self, step: int) -> list[Event]:
        """The likeliest answers after a step, without a trace on the training that goes on; a caution without memory."""
        end_ids = find_end_ids(self.model, self.tokenizer, self.formatting)
        self.model.eval()
        try:
            with undisturbed_random_state(self.device), torch.no_grad():
                answer = self._read_again if self.device.type == "cuda" else self._keep_what_was_read
                texts = answer(list(self.requests.values()), end_ids)
        except torch.OutOfMemoryError:
            free_memory(self.device)
            return [Caution("There is no memory to answer the sample prompts: none is answered at this step.")]
        finally:
            self.model.train()
        return [SampleAnswered(step, prompt, text) for prompt, text in zip(self.requests, texts, strict=True)]

    def _read_again(self, requests: Sequence[Request], end_ids: Collection[int]) -> list[str]:
        """Answers by the engine, which reads the whole rows for each token."""
        growing = [GrowingCompletion(request, tokenizer=self.tokenizer, end_ids=end_ids) for request in requests]
        rows = [list(request.ids) for request in requests]
        while left := [number for number, answer in enumerate(growing) if answer.finish is None]:
            ids = [np.asarray(rows[number], dtype=np.int32) for number in left]
            batch = collate([(row, np.ones(len(row), dtype=bool)) for row in ids], left)
            chosen = self.engine.next_logits(batch).argmax(-1).tolist()
            for number, token in zip(left, chosen, strict=True):
                rows[number].append(token)
                growing[number].push(token)
        return [answer.completion().text for answer in growing]

    def _keep_what_was_read(self, requests: Sequence[Request], end_ids: Collection[int]) -> list[str]:
        """Answers by a session on the model as it is without its engine."""
        settings = GenerationSettings(temperature=0.0, max_new_tokens=LONGEST_ANSWER)
        with set_aside(self.model):
            session = GenerationSession(settings, report_nothing, model=self.model, tokenizer=self.tokenizer)
            texts = {answer.index: answer.text for answer in session.answer(requests, end_ids)}
        return [texts[request.index] for request in requests]
