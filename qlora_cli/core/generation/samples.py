"""Sample prompts: answers of a model while it is trained, by the engine of its steps, so that nothing is loaded or undone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from qlora_cli.core.data.packing import collate
from qlora_cli.core.device import free_memory
from qlora_cli.core.engine.engine import Engine
from qlora_cli.core.generation.requests import GrowingCompletion, Request, find_end_ids, make_request
from qlora_cli.core.prompts.formatting import Formatting, format_prompt
from qlora_cli.core.training.rng_state import undisturbed_random_state
from qlora_cli.events import Caution, Event, SampleAnswered

LONGEST_ANSWER = 64  # tokens: the model reads the whole row again for each, as it keeps nothing between steps


def make_requests(
    prompts: Sequence[str], formatting: Formatting, tokenizer: Any, context: int | None
) -> dict[str, Request]:
    """Prompts, formatted as in training and tokenised, by their text.

    Raises:
        DataError: One has another form than the formatting needs, or leaves no room in the context.
    """
    return {
        prompt: make_request(
            index,
            format_prompt(prompt, formatting, tokenizer),
            max_new_tokens=LONGEST_ANSWER,
            context=context,
            strip=formatting.format in ("prompt", "chat"),
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
        start = partial(
            GrowingCompletion,
            tokenizer=self.tokenizer,
            end_ids=find_end_ids(self.model, self.tokenizer, self.formatting),
        )
        growing = [start(request) for request in self.requests.values()]
        rows = [list(request.ids) for request in self.requests.values()]
        self.model.eval()
        try:
            with undisturbed_random_state(self.device), torch.no_grad():
                while left := [number for number, answer in enumerate(growing) if answer.finish is None]:
                    ids = [np.asarray(rows[number], dtype=np.int32) for number in left]
                    batch = collate([(row, np.ones(len(row), dtype=bool)) for row in ids], left)
                    chosen = self.engine.next_logits(batch).argmax(-1).tolist()
                    for number, token in zip(left, chosen, strict=True):
                        rows[number].append(token)
                        growing[number].push(token)
        except torch.OutOfMemoryError:
            free_memory(self.device)
            return [Caution("There is no memory to answer the sample prompts: none is answered at this step.")]
        finally:
            self.model.train()
        answers = [answer.completion().text for answer in growing]
        return [SampleAnswered(step, prompt, text) for prompt, text in zip(self.requests, answers, strict=True)]
