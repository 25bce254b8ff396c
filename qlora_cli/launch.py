"""Which of the processes of a launcher this one is: torchrun, accelerate, SLURM's script and `--gpus` say it in the environment."""

import os


def launched_rank() -> int | None:
    """This process's number among those of its launch; None where no launcher started it.

    RANK alone is a variable of the user's, LoRA's rank perhaps: as another rank this process would not say a word.
    """
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return int(rank) if rank.isdecimal() and size.isdecimal() and int(rank) < int(size) else None


def is_silent_rank() -> bool:
    """Whether another process of the launch speaks for this one."""
    return bool(launched_rank())
