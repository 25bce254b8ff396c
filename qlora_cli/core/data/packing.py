"""Packing: an epoch's micro-batches by row lengths; their rows as tensors end to end with boundaries, without padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace

import numpy as np
import torch
import torch.nn.functional as F

from qlora_cli.errors import DataError

IGNORED = -100  # label of a position that is not trained
WINDOW_STEPS = 16  # rows are grouped by length among this many steps' worth of shuffled rows


@dataclass(frozen=True)
class Part:
    """What a part of a pack, of which each rank of a group holds one, has to know of the whole.

    Attributes:
        pack_tokens: Of the whole pack.
        filler: Places behind them, so that all parts are of one length.
        next_label: (1, 1) int64, of the token behind this part: what its last token is to predict.
        row_tokens: (1, part) int64, tokens of the row that each belongs to.
    """

    pack_tokens: int
    filler: int
    next_label: torch.Tensor
    row_tokens: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows end to end, T tokens in all.

    A row's first token has nothing before it to be predicted from, so its label is always -100: a loss shifted by
    one over the whole length therefore never crosses from one row into the next.

    Attributes:
        input_ids: (1, T) int64.
        labels: (1, T) int64, -100 where untrained; not shifted.
        position_ids: (1, T) int64, from 0 in every row.
        cu_seqlens: (rows + 1,) int32, where each row starts, and T.
        max_seqlen: Tokens in the longest row.
        tokens: T.
        trained_tokens: Labels that are not -100.
        row_indices: Where each row came from.
        embedded: (1, T, size) of embeddings that were looked up beforehand, on the host; usually None.
        part: Where other ranks hold the rest of the pack. Then `input_ids`, `labels` and `position_ids` are this rank's,
            filled up; `tokens` are its real ones and `trained_tokens` what these predict. All else is of the pack.
        opens_step: Whether gradients are zero before it, and their memory may be lent until its backward pass.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    tokens: int
    trained_tokens: int
    row_indices: tuple[int, ...]
    embedded: torch.Tensor | None = None
    part: Part | None = None
    opens_step: bool = False

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MicroBatch":
        """The same batch with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin(self) -> "MicroBatch":
        """The same batch in pinned host memory, from which a copy to the card need not wait."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        return replace(
            self,
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            position_ids=change(self.position_ids),
            cu_seqlens=change(self.cu_seqlens),
            part=self.part
            and replace(self.part, next_label=change(self.part.next_label), row_tokens=change(self.part.row_tokens)),
        )

    @property
    def pack_tokens(self) -> int:
        """Tokens of the whole pack."""
        return self.tokens if self.part is None else self.part.pack_tokens

    def part_of(self, place: int, parts: int) -> "MicroBatch":
        """The part that one of so many ranks holds: equally many tokens each, in their order; all where there is one."""
        if parts == 1:
            return self
        size = -(-self.tokens // parts)
        filler, start = size * parts - self.tokens, size * place
        lengths = self.cu_seqlens.diff().long()

        def cut(of_tokens: torch.Tensor, fill: int) -> torch.Tensor:
            return F.pad(of_tokens, (0, filler), value=fill)[:, start : start + size]

        following = cut(F.pad(self.labels[:, 1:], (0, 1), value=IGNORED), IGNORED)
        return replace(
            self,
            input_ids=cut(self.input_ids, 0),
            labels=cut(self.labels, IGNORED),
            position_ids=cut(self.position_ids, 0),
            tokens=min(size, max(0, self.tokens - start)),
            trained_tokens=int((following != IGNORED).sum()),
            part=Part(
                pack_tokens=self.tokens,
                filler=filler,
                next_label=following[:, -1:],
                row_tokens=cut(lengths.repeat_interleave(lengths)[None], 1),
            ),
        )

    def last_positions(self, *, padded: bool) -> torch.Tensor:
        """Where each row's last token is, (rows,) int64: in the rows end to end, or in those of `padded` end to end."""
        if not padded:
            return self.cu_seqlens[1:].long() - 1
        lengths = self.cu_seqlens.diff().long()
        return torch.arange(len(lengths), device=lengths.device) * self.max_seqlen + lengths - 1

    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One row a line, padded on the right, for models that know nothing of boundaries.

        Returns:
            input_ids (rows, S) int64 with 0 as padding, attention_mask (rows, S) int64, labels (rows, S) int64 with
            -100 as padding; S is max_seqlen. The mask comes from lengths, never from a token id.
        """
        starts = self.cu_seqlens[:-1].long()
        lengths = self.cu_seqlens.diff().long()
        offsets = torch.arange(self.max_seqlen, device=starts.device)  # (S,)
        real = offsets[None, :] < lengths[:, None]  # (rows, S)
        source = torch.where(real, starts[:, None] + offsets[None, :], 0)
        input_ids = torch.where(real, self.input_ids[0][source], 0)
        labels = torch.where(real, self.labels[0][source], IGNORED)
        return input_ids, real.long(), labels


def collate(rows: Sequence[tuple[np.ndarray, np.ndarray]], indices: Sequence[int]) -> MicroBatch:
    """Lays rows end to end.

    Args:
        rows: (input_ids int32 (n,), trained bool (n,)) of each row, n >= 1.
        indices: The row number of each, kept in `row_indices`.
    """
    lengths = np.fromiter((len(ids) for ids, _ in rows), dtype=np.int64, count=len(rows))
    cu_seqlens = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    starts = cu_seqlens[:-1]
    input_ids = np.concatenate([ids for ids, _ in rows]).astype(np.int64)
    trained = np.concatenate([flags for _, flags in rows])
    trained[starts] = False
    tokens = int(cu_seqlens[-1])
    position_ids = np.arange(tokens, dtype=np.int64) - np.repeat(starts.astype(np.int64), lengths)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(np.where(trained, input_ids, IGNORED))[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(lengths.max()),
        tokens=tokens,
        trained_tokens=int(trained.sum()),
        row_indices=tuple(int(i) for i in indices),
    )


def pack_best_fit(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: longest row first, each into the fullest pack that still has room.

    Rows of one length are placed together, so the cost grows with the number of different lengths and not with the
    number of rows (9 million rows in a few seconds).

    Args:
        lengths: Tokens of each row.
        max_length: Tokens a pack may hold.

    Returns:
        Row indices of each pack.

    Raises:
        DataError: A row is longer than a pack.
    """
    lengths = np.asarray(lengths)
    if lengths.size and int(lengths.max()) > max_length:
        raise DataError(
            f"A row of {int(lengths.max())} tokens does not fit a pack of {max_length}.",
            "Prepare the data again with this --max-length.",
        )
    pack_of_row = np.empty(lengths.size, dtype=np.int64)
    open_packs: list[list[int]] = [[] for _ in range(max_length + 1)]  # pack numbers, by the room left
    packs_made = 0
    order = np.argsort(lengths, kind="stable")[::-1]
    cuts = np.flatnonzero(np.diff(lengths[order])) + 1
    for same_length in np.split(order, cuts):
        if not same_length.size:
            continue
        length, placed = int(lengths[same_length[0]]), 0
        room = length
        while placed < same_length.size and room <= max_length:
            packs = open_packs[room]
            if not packs:
                room += 1
                continue
            count = min(len(packs), same_length.size - placed)
            chosen = packs[-count:]
            del packs[-count:]
            pack_of_row[same_length[placed : placed + count]] = chosen
            open_packs[room - length].extend(chosen)
            placed += count
            room = max(room - length, length)  # what was just filled may be the fullest pack with room
        per_pack = max_length // length if length else same_length.size
        while placed < same_length.size:  # no open pack has room: fill new ones with rows of this length
            rest = same_length.size - placed
            full_packs, count = (rest // per_pack, per_pack) if rest >= per_pack else (1, rest)
            numbers = np.arange(packs_made, packs_made + full_packs)
            pack_of_row[same_length[placed : placed + full_packs * count]] = np.repeat(numbers, count)
            open_packs[max_length - count * length].extend(numbers.tolist())
            packs_made += full_packs
            placed += full_packs * count
    if not packs_made:
        return []
    by_pack = np.argsort(pack_of_row, kind="stable")
    borders = np.cumsum(np.bincount(pack_of_row, minlength=packs_made))[:-1]
    return [part.tolist() for part in np.split(by_pack, borders)]


def plan_epoch(
    lengths: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    accumulation: int,
    packing: bool,
    max_length: int,
    seed: int,
    epoch: int,
    world_size: int = 1,
    token_budget: int | None = None,
) -> list[list[list[list[int]]]]:
    """What each rank computes in one epoch, the same for the same (seed, epoch) on every machine.

    A step takes batch_size * accumulation rows (packs, with packing) of similar length, however many ranks share it: a
    run goes through the same steps on any number of cards. As the loss is a mean over the step's trained tokens, how
    its rows are put into micro-batches does not change the mathematics: they are put into as few of at most
    `token_budget` tokens as possible. All ranks get equally many micro-batches in a full step and, as far as whole
    rows allow, equally many tokens. Of the unfull last step, which may hold fewer rows than there are ranks,
    a rank may get nothing.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows (packs) of a micro-batch on one rank.
        accumulation: Micro-batches of a step on all ranks, before they are filled to the budget.
        packing: Whether to fill packs of `max_length` tokens.
        max_length: Tokens in the longest row, and in a pack.
        seed: Seed of the order.
        epoch: Number of the pass, from 0.
        world_size: Number of ranks; batch_size * accumulation is a multiple of it.
        token_budget: Most tokens in a micro-batch; by default batch_size * max_length.

    Returns:
        Steps, each a list of ranks, each a list of micro-batches, each a list of row indices.

    Raises:
        DataError: A row is longer than `max_length`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    budget = max(token_budget or batch_size * max_length, int(lengths.max(initial=1)))
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(lengths.size)
    if packing:
        packs = pack_best_fit(lengths[order], max_length)
        items = [order[packs[i]] for i in random.permutation(len(packs))]
    else:
        items = list(order[:, None])
    tokens = np.array([lengths[item].sum() for item in items], dtype=np.int64)
    planned = []
    for step in _group_by_length(tokens, batch_size * accumulation, random):
        parts = [items[i] for i in step]
        if len(parts) % world_size:  # the unfull last step: single rows are dealt out more evenly
            parts = list(np.concatenate(parts)[:, None])
        planned.append(_deal_out(_fill_bins(parts, lengths, budget, world_size), world_size))
    return planned


def _group_by_length(tokens: np.ndarray, step_items: int, random: np.random.Generator) -> list[np.ndarray]:
    """Items (already in random order) to steps of similar length, in random order, the unfull one last."""
    steps: list[np.ndarray] = []
    for start in range(0, tokens.size, WINDOW_STEPS * step_items):
        window = np.arange(start, min(start + WINDOW_STEPS * step_items, tokens.size))
        full = window.size - window.size % step_items
        window, last = window[:full], window[full:]
        window = window[np.argsort(tokens[window], kind="stable")]
        groups = window.reshape(-1, step_items)
        steps += [groups[i] for i in random.permutation(len(groups))]
        if last.size:
            steps.append(last)
    return steps


def _fill_bins(
    parts: list[np.ndarray], lengths: np.ndarray, budget: int, world_size: int
) -> list[tuple[int, list[int]]]:
    """Packs (or single rows) in the fewest bins within budget, a multiple of world_size.

    Longest first into the emptiest bin (LPT), which keeps the bins even and, where there are enough parts, none empty.

    Returns:
        (tokens, row indices) of each bin.
    """
    sized = sorted(((int(lengths[part].sum()), part.tolist()) for part in parts), key=lambda item: -item[0])
    count = world_size * max(1, -(-sum(tokens for tokens, _ in sized) // (world_size * budget)))
    while True:  # ends where every part has a bin of its own, if not before
        bins: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(count)]  # a heap
        for tokens, rows in sized:
            load, number, members = bins[0]
            heapreplace(bins, (load + tokens, number, members + rows))
        if max(bins)[0] <= budget:
            return [(load, members) for load, _, members in bins]
        count += world_size


def _deal_out(bins: list[tuple[int, list[int]]], world_size: int) -> list[list[list[int]]]:
    """Equally many bins to each rank, fullest first to the rank that has least; then empty ones are left out."""
    dealt: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for load, rows in sorted(bins, key=lambda item: -item[0]):
        rank = min((r for r in range(world_size) if len(dealt[r]) < len(bins) // world_size), key=loads.__getitem__)
        dealt[rank].append(rows)
        loads[rank] += load
    return [[rows for rows in share if rows] for share in dealt]


def split_micro_batch(row_indices: Sequence[int], lengths: Sequence[int] | np.ndarray) -> tuple[list[int], list[int]]:
    """Two halves of about equally many tokens, for when memory ran out.

    Args:
        row_indices: Rows of the micro-batch.
        lengths: Tokens of every row of the data set.

    Raises:
        DataError: There is one row only.
    """
    if len(row_indices) < 2:
        raise DataError("A micro-batch of one row cannot be split.", "Lower --max-length.")
    halves: tuple[list[int], list[int]] = ([], [])
    loads = [0, 0]
    for row in sorted(row_indices, key=lambda row: -int(lengths[row])):
        lighter = int(loads[1] < loads[0])
        halves[lighter].append(int(row))
        loads[lighter] += int(lengths[row])
    return halves
