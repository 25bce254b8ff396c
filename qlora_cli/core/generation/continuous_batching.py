"""Continuous batching: prompts sorted by length, rows that finish refilled while the others go on."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from qlora_cli.core.decoding.decoder import Decoder, Prompt
from qlora_cli.core.decoding.pending_tokens import PendingTokens
from qlora_cli.core.decoding.sampling import draw_uniforms, is_greedy
from qlora_cli.core.device import choose_device, memory_error
from qlora_cli.core.generation.requests import Completion, GrowingCompletion, Request, StartCompletion
from qlora_cli.errors import ModelError
from qlora_cli.events import Caution, Report

REFILL_SHARE = 8  # prompts are taken in when 1/8 of the rows are free: a forward over prompts holds up all rows

Owners = list[GrowingCompletion | None]  # which answer each row belongs to; None for a free one


def answer_all(
    requests: Sequence[Request],
    start: StartCompletion,
    open_decoder: Callable[[int, int], Decoder],
    batch_size: int,
    *,
    seed: int,
    report: Report,
) -> Iterator[Completion]:
    """Answers requests, `batch_size` at a time, in any order.

    When the GPU has no room for so many rows, half as many are tried.

    Args:
        start: Makes a request's answer, nothing of which is there yet.
        open_decoder: Gives a decoder of (rows, capacity).
        seed: With a request's index it decides what is sampled.
        report: Receives a caution when rows had to be given up.

    Raises:
        ModelError: Not even one row has room, or the model's output is not a number.
    """
    left = {request.index: request for request in requests}
    growing: dict[int, GrowingCompletion] = {}
    rows = max(1, min(batch_size, len(requests)))
    while left:
        try:
            capacity = max(len(request.ids) + request.max_new_tokens for request in left.values())
            said = {index: growing[index].said for index in left if index in growing}
            growing = {index: start(request, said=said.get(index, 0)) for index, request in left.items()}
            for answer in _run([*growing.values()], open_decoder(rows, capacity), seed):
                del left[answer.index]
                yield answer
        except torch.OutOfMemoryError as error:
            if rows == 1:
                raise memory_error(
                    ModelError,
                    f"The GPU has no room for an answer of {capacity:,} tokens with its prompt.",
                    "Lower --max-new-tokens, or shorten the prompt.",
                    choose_device(),
                ) from error
            rows = max(1, rows // 2)
            report(Caution(f"The GPU has no room for so many rows; going on with {rows}."))


def _run(growing: Sequence[GrowingCompletion], decoder: Decoder, seed: int) -> Iterator[Completion]:
    rows = decoder.cache.rows
    waiting = deque(sorted(growing, key=lambda g: -len(g.request.ids)))  # the longest first: no surprise at the end
    running: Owners = [None] * rows
    # Forwards that were launched and whose tokens were not read yet, oldest first. On a GPU the next is launched before
    # the last one's tokens are read, so that the device computes while the host turns ids into text.
    launched: deque[tuple[PendingTokens, Owners]] = deque()
    ahead = 1 if decoder.device.type == "cuda" else 0

    def free(row: int) -> None:
        running[row] = None
        decoder.release(row)

    def launch(pending: PendingTokens, owners: Owners) -> None:
        launched.append((pending, owners))
        for owner in owners:
            if owner is not None:
                owner.launched += 1
        for row, owner in enumerate(running):
            if owner is not None and (owner.finish or owner.launched >= owner.request.max_new_tokens):
                free(row)  # nothing more of it need be computed

    while waiting or any(running) or launched:
        free_rows = [row for row, owner in enumerate(running) if owner is None]
        if waiting and (len(free_rows) == rows or len(free_rows) * REFILL_SHARE >= rows):
            filled = free_rows[: len(waiting)]
            taken = [waiting.popleft() for _ in filled]
            for row, new in zip(filled, taken, strict=True):
                running[row] = new
            launch(decoder.prefill(filled, [_prompt(new.request, decoder, seed) for new in taken]), [*taken])
        elif any(running):
            launch(decoder.step(), list(running))
        while len(launched) > (ahead if any(running) else 0):
            pending, owners = launched.popleft()
            for tokens, owner in zip(pending.by_row(), owners, strict=True):
                if owner is None or owner.finish is not None or not any(owner.push(token) for token in tokens):
                    continue  # what comes after the end of an answer is nobody's
                if owner in running:
                    free(running.index(owner))
                yield owner.completion()


def _prompt(request: Request, decoder: Decoder, seed: int) -> Prompt:
    if is_greedy(decoder.sampling):
        return Prompt(request.ids)
    return Prompt(request.ids, draw_uniforms(seed, request.index, request.max_new_tokens))
