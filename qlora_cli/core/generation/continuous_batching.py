"""Many prompts in, their answers out as they finish: sorted by length, freed rows refilled while the others go on."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from qlora_cli.core.decoding.decoder import Decoder, Pending, Prompt
from qlora_cli.core.decoding.sampling import draw_uniforms
from qlora_cli.core.generation.requests import Completion, GrowingCompletion, Request
from qlora_cli.errors import ModelError
from qlora_cli.events import Caution, Report

REFILL_SHARE = 8  # prompts are taken in when 1/8 of the rows are free: a forward over prompts holds up all rows


def answer_all(
    requests: Sequence[Request],
    open_decoder: Callable[[int, int], Decoder],
    tokenizer: Any,
    *,
    batch_size: int,
    seed: int,
    end_ids: Collection[int],
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    report: Report,
) -> Iterator[Completion]:
    """Answers requests, `batch_size` at a time, in any order.

    When the GPU has no room for so many rows, half as many are tried.

    Args:
        requests: What to answer.
        open_decoder: Gives a decoder of (slots, capacity).
        tokenizer: Of the model.
        batch_size: Rows decoded at once.
        seed: With a request's index it decides what is sampled.
        end_ids: Tokens that end an answer.
        stop: Strings that end an answer.
        on_text: Told each piece of text with its request's index.
        report: Told when rows had to be given up.

    Raises:
        ModelError: Not even one row has room, or the model's output is not a number.
    """
    left = {request.index: request for request in requests}
    slots = max(1, min(batch_size, len(requests)))
    while left:
        growing = [
            GrowingCompletion(request, tokenizer, end_ids=end_ids, stop=stop, on_text=on_text)
            for request in left.values()
        ]
        try:
            capacity = max(len(request.ids) + request.max_new_tokens for request in left.values())
            for answer in _run(growing, open_decoder(slots, capacity), slots, seed):
                del left[answer.index]
                yield answer
        except torch.OutOfMemoryError as error:
            if slots == 1:
                raise ModelError(
                    f"The GPU has no room for an answer of {capacity:,} tokens with its prompt.",
                    "Lower --max-new-tokens, or shorten the prompt.",
                ) from error
            slots = max(1, slots // 2)
            report(Caution(f"The GPU has no room for so many rows; going on with {slots}."))


def _run(growing: Sequence[GrowingCompletion], decoder: Decoder, slots: int, seed: int) -> Iterator[Completion]:
    waiting = deque(sorted(growing, key=lambda t: -len(t.request.ids)))  # the longest first: no surprise at the end
    running: list[GrowingCompletion | None] = [None] * slots
    flying: deque[tuple[Pending, list[GrowingCompletion | None]]] = deque()  # what the device is at, oldest first
    ahead = 1 if decoder.device.type == "cuda" else 0  # steps launched before the last one's tokens are read

    def launch(pending: Pending, owners: list[GrowingCompletion | None]) -> None:
        flying.append((pending, owners))
        for owner in owners:
            if owner is not None:
                owner.asked += 1
        for slot, runner in enumerate(running):
            if runner is not None and runner.fully_asked:
                running[slot] = None
                decoder.release(slot)

    while waiting or any(running) or flying:
        free = [slot for slot, owner in enumerate(running) if owner is None]
        if waiting and (len(free) == slots or len(free) * REFILL_SHARE >= slots):
            fill = free[: len(waiting)]
            taken = [waiting.popleft() for _ in fill]
            for slot, completion in zip(fill, taken, strict=True):
                running[slot] = completion
            launch(decoder.prefill(fill, [_prompt(t.request, decoder, seed) for t in taken]), [*taken])
        elif any(running):
            launch(decoder.step(), list(running))
        while len(flying) > (ahead if any(running) else 0):
            pending, reported = flying.popleft()
            for token, owner in zip(pending.wait(), reported, strict=True):
                if owner is not None and owner.finish is None and owner.push(token):
                    if owner in running:
                        slot = running.index(owner)
                        running[slot] = None
                        decoder.release(slot)
                    yield owner.answer()


def _prompt(request: Request, decoder: Decoder, seed: int) -> Prompt:
    if decoder.sampling.greedy:
        return Prompt(request.ids)
    return Prompt(request.ids, draw_uniforms(seed, request.index, request.max_new_tokens))
