"""Prompt look-up: what followed when the last few tokens came before, as guesses of the next ones.

A step then reads the last token and its guesses at once, and takes over as many as the model itself would have chosen
(https://github.com/apoorvumang/prompt-lookup-decoding). Each of them is chosen from the logits and by the random number
of its own place, so that answers are those of steps of one token, sampled or not. All of it happens on the device: the
host learns of a step's tokens while the next one is running.
"""

import functools
from typing import Any

import torch
from torch import Tensor

WIDTH = 8  # tokens of a step with guesses: so many cost 1.2 times as much as one (benchmarks/decode.md)
LONGEST = 6  # last tokens that are looked for; of equally long matches the latest counts
LEAST = 2  # of them have to be found
NOTHING = -1  # no token


class PromptLookUp:
    """Tokens of one row so far, and the guesses that follow from them.

    Args:
        capacity: Most tokens in the row, prompt and answer together.
        device: Where it happens.
        fused: Whether by Triton's kernels, the same in two launches.

    Attributes:
        report: int64 (2 + WIDTH,) of the last step: guesses that were right, whether the first guess was (also where none was
            taken), and the tokens chosen, of which one more than the right guesses count.
    """

    def __init__(self, capacity: int, device: torch.device, *, fused: bool = False) -> None:
        # LONGEST - 1 places of nothing first, so that every token ends a window.
        self._padded = torch.full((LONGEST - 1 + capacity + WIDTH,), NOTHING, dtype=torch.int64, device=device)
        self._ids = self._padded[LONGEST - 1 :]  # (capacity + WIDTH,); places after the last token mean nothing
        self._places = torch.arange(len(self._ids), device=device)
        self.report = torch.zeros(2 + WIDTH, dtype=torch.int64, device=device)
        self._guessed = torch.zeros(WIDTH - 1, dtype=torch.int64, device=device)
        self._kernels: Any = trusted_kernels(device) if fused else None

    def state(self) -> list[Tensor]:
        """What a step changes."""
        return [self._padded, self.report, self._guessed]

    def start(self, ids: Tensor, length: int, first: Tensor) -> None:
        """A prompt and the first token of its answer.

        Args:
            ids: (at least `length`,) int64.
            length: Tokens of the prompt.
            first: int64, one token.
        """
        self._ids[:length] = ids[:length]
        self._ids[length] = first.reshape(())

    def guess(self, last: Tensor) -> Tensor:
        """(WIDTH - 1,) int64: what followed the longest and latest match of the row's end, repeated where that ends.

        Args:
            last: (1,) int64, the place of the last token.
        """
        windows = self._padded.unfold(0, LONGEST, 1)  # (places, LONGEST), each ending at its place
        same = windows == windows.index_select(0, last)
        found = same.flip(1).cumprod(1).sum(1)  # last tokens that agree
        found = torch.where((self._places < last) & (found >= LEAST), found, 0)
        best = torch.where(found > 0, found * len(found) + self._places, 0).argmax(0, keepdim=True)
        period = (last - best).clamp(min=1)
        following = self._ids[best + 1 + self._places[: WIDTH - 1] % period]
        return torch.where(found.index_select(0, best) > 0, following, NOTHING)

    def extend(self, token: Tensor, last: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The last token with its guesses, and their places: (width, 1) and (width,) int64; width 1 takes no guess."""
        if self._kernels is not None:
            sizes = {"least": LEAST, "longest": LONGEST, "nothing": NOTHING}
            tokens, places = self._kernels.guess(self._ids, last, self._guessed, **sizes)
            return tokens[:width, None], places[:width]
        self._guessed.copy_(self.guess(last))
        tokens = torch.cat([token.view(1), self._guessed[: width - 1].clamp(min=0)])
        return tokens[:, None], last + self._places[:width]

    def seen_by_each(self, seen: Tensor, tokens: Tensor) -> Tensor:
        """Tokens that came before each of a step's choices: (width, vocabulary) bool.

        Args:
            seen: (1, vocabulary) bool, the prompt and the answer up to the last token.
            tokens: (width, 1) int64, what the step reads.
        """
        width = len(tokens)
        before = torch.minimum(self._places[:width, None], self._places[None, :width])  # (width, width): not after it
        return seen.repeat(width, 1).scatter_(1, tokens[:, 0][before], True)

    def accept(self, chosen: Tensor, last: Tensor) -> Tensor:
        """Takes over a step's tokens: those after right guesses, and one more. The number of right guesses, (1,) int64.

        Args:
            chosen: (width,) int64, what the model chose after each token of the step.
            last: (1,) int64, the place of the step's first token.
        """
        if self._kernels is not None:
            return self._kernels.accept(self._ids, last, self._guessed, chosen, self.report, nothing=NOTHING)
        width = len(chosen)
        right = (chosen[: width - 1] == self._guessed[: width - 1]).cumprod(0).sum(0, keepdim=True)
        self._ids.index_copy_(0, last + 1 + self._places[:width], chosen.clamp(min=0))
        self.report[:1] = right
        self.report[1:2] = chosen[:1] == self._guessed[:1]
        self.report[2 : 2 + width] = chosen
        return right


@functools.cache
def trusted_kernels(device: torch.device) -> Any:
    """Triton's kernels, where they do on this device what torch does with a small row; None elsewhere."""
    row = torch.tensor([5, 1, 2, 3, 9, 7, 1, 2], device=device)
    last, chosen = row.new_tensor([len(row) - 1]), row.new_tensor([3, 9, 7, 4, 1, 2, 3, 9])
    found = []
    try:
        from qlora_cli.kernels.decode import guesses

        for kernels in (None, guesses):
            tried = PromptLookUp(len(row) + WIDTH, device)
            tried._kernels = kernels
            tried.start(row, len(row) - 1, row[-1])
            found.append([*tried.extend(row[-1:, None], last, WIDTH), tried.accept(chosen, last), *tried.state()])
        right = all(torch.equal(own, other) for own, other in zip(*found, strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a compiler that is not known here says: torch does the same in more launches
        right = False
    return guesses if right else None
