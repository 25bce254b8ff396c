"""Recommendations for what a run's settings leave open, each with the evidence that it rests on."""

import math

RATE, RATE_OF_LARGE = (
    2e-4,
    1e-4,
)  # QLoRA for 7B and 13B, and for 33B and 65B (https://arxiv.org/abs/2305.14314, table 9)
LARGE_PARAMETERS = 15e9  # between the two
# Held out where it costs little of the data, and so that a loss is known to some hundredths.
LEAST_ROWS, HELD_OUT_SHARE, MOST_HELD_OUT = 1_000, 0.02, 200
FEW_STEPS, ENOUGH_STEPS = 30, 100  # of the rate's rise and fall; GSM8K on a 135M model has won half by step 100
# What an adapter can hold: 2 bits a parameter (https://arxiv.org/abs/2404.05405); a trained token tells it about one.
BITS_OF_PARAMETER, BITS_OF_TOKEN = 2, 1
MOST_RANK = 256


def recommended_learning_rate(total_parameters: int) -> float:
    """Peak learning rate for a base of so many parameters."""
    return RATE if total_parameters <= LARGE_PARAMETERS else RATE_OF_LARGE


def recommended_held_out_rows(rows: int, largest_document: int = 1) -> int:
    """How many of these rows to hold out for evaluation.

    0 where there are few, or where the rows of one document, which stay together, could make them half of all.

    Args:
        rows: All of them.
        largest_document: Rows of the conversation or document that became most.
    """
    held_out = min(MOST_HELD_OUT, int(HELD_OUT_SHARE * rows)) if rows >= LEAST_ROWS else 0
    return held_out if held_out + largest_document <= rows // 2 else 0


def recommended_rank(rank: int, trainable_parameters: int, trained_tokens: int) -> int:
    """`rank`, or the next of its doubles whose parameters hold what so many trained tokens tell."""
    held = BITS_OF_PARAMETER * trainable_parameters
    doubles = math.ceil(math.log2(max(1.0, BITS_OF_TOKEN * trained_tokens / max(1, held))))
    return max(rank, min(MOST_RANK, rank * 2**doubles))


def advise_on_length(total_steps: int, epochs: float) -> str | None:
    """What to say of a run that is too short to learn much; None where it is not."""
    if total_steps >= FEW_STEPS:
        return None
    more = math.ceil(epochs * ENOUGH_STEPS / max(1, total_steps))
    return (
        f"{total_steps:,} step{'s' * (total_steps != 1)} in all teach{'es' * (total_steps == 1)} little: --epochs {more} makes about {ENOUGH_STEPS}, and "
        "--gradient-accumulation-steps 4 more of each epoch."
    )


def advise_on_rank(rank: int, trainable_parameters: int, trained_tokens: int) -> str | None:
    """What to say of an adapter that holds less than the rows tell; None where it does not."""
    better = recommended_rank(rank, trainable_parameters, trained_tokens)
    if better == rank:
        return None
    return (
        f"{trained_tokens:,} trained tokens tell more than the {trainable_parameters:,} parameters of --rank {rank} hold "
        f"(about 2 bits each): --rank {better} would hold them."
    )
