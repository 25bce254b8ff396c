"""Prompt look-up in two launches a step, where torch takes forty: guesses before the model runs, what was right after it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # places looked at together


@triton.jit
def _guess(
    ids,
    last,
    guessed,
    tokens,
    places,
    LEAST: tl.constexpr,
    LONGEST: tl.constexpr,
    WIDTH: tl.constexpr,
    NOTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the longest match of the row's end, of equally long ones the latest, and what followed it."""
    end = tl.load(last)
    best = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, end, BLOCK):
        place = first + tl.arange(0, BLOCK).to(tl.int64)
        agree = place < end
        found = tl.zeros((BLOCK,), tl.int64)
        for back in tl.static_range(LONGEST):
            there = agree & (place >= back)
            own = tl.load(ids + end - back, mask=end >= back, other=NOTHING)
            agree = there & (tl.load(ids + place - back, mask=there, other=NOTHING) == own)
            found += agree.to(tl.int64)
        best = tl.maximum(best, tl.where(found >= LEAST, found * 4294967296 + place, 0))
    score = tl.max(best, 0)
    place = score % 4294967296
    period = tl.maximum(end - place, 1)
    number = tl.arange(0, WIDTH).to(tl.int64)  # 0 is the last token itself
    following = tl.load(ids + place + 1 + (number + WIDTH * period - 1) % period)
    following = tl.where(score > 0, following, NOTHING)
    tl.store(guessed + number - 1, following, mask=number > 0)
    tl.store(tokens + number, tl.where(number > 0, tl.maximum(following, 0), tl.load(ids + end)))
    tl.store(places + number, end + number)


@triton.jit
def _accept(ids, last, guessed, chosen, report, right_out, width, WIDTH: tl.constexpr, NOTHING: tl.constexpr):
    """One program: how many guesses were right, one after another from the first, and the tokens into the row."""
    end = tl.load(last)
    number = tl.arange(0, WIDTH)
    token = tl.load(chosen + number, mask=number < width, other=0)
    told = tl.load(guessed + number, mask=number < WIDTH - 1, other=NOTHING)
    wrong = (token != told) | (number >= width - 1)
    right = tl.min(tl.where(wrong, number, WIDTH), 0)
    tl.store(right_out, right.to(tl.int64))
    tl.store(report, right.to(tl.int64))
    hit = tl.load(chosen) == tl.load(guessed)
    tl.store(report + 1, hit.to(tl.int64))
    tl.store(report + 2 + number, token, mask=number < width)
    tl.store(ids + end + 1 + number, tl.maximum(token, 0), mask=number < width)


def guess(
    ids: Tensor, last: Tensor, guessed: Tensor, *, least: int, longest: int, nothing: int
) -> tuple[Tensor, Tensor]:
    """What followed the longest and latest match of the last tokens, repeated where the row ends, after the last one itself.

    Args:
        ids: int64 (places,), of which those up to `last` count.
        last: int64 (1,), the place of the last token.
        guessed: int64 (width - 1,), written; the width is a power of two.
        least: Tokens that have to agree.
        longest: Most tokens that are compared.
        nothing: Stands for no guess.

    Returns:
        int64 (width,) twice: the tokens, 0 for no guess, and their places.
    """
    width = len(guessed) + 1
    tokens, places = torch.empty(2, width, dtype=torch.int64, device=ids.device).unbind()
    with torch.cuda.device_of(ids):
        _guess[(1,)](
            ids,
            last,
            guessed,
            tokens,
            places,
            LEAST=least,
            LONGEST=longest,
            WIDTH=width,
            NOTHING=nothing,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return tokens, places


def accept(ids: Tensor, last: Tensor, guessed: Tensor, chosen: Tensor, report: Tensor, *, nothing: int) -> Tensor:
    """How many guesses were right: int64 (1,). The tokens chosen go into the row, after the last one.

    Args:
        ids: As for `guess`.
        last: Likewise.
        guessed: Likewise, as it was written.
        chosen: int64 (tokens of the step,), at most a width.
        report: int64 (2 + width,), written: right guesses, whether the first would have been, the tokens chosen.
        nothing: Stands for no guess.
    """
    right = torch.empty(1, dtype=torch.int64, device=ids.device)
    with torch.cuda.device_of(ids):
        _accept[(1,)](
            ids,
            last,
            guessed,
            chosen,
            report,
            right,
            len(chosen),
            WIDTH=len(guessed) + 1,
            NOTHING=nothing,
            num_warps=1,
        )
    return right
