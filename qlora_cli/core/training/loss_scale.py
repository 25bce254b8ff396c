"""Whether a scaled gradient overflowed in; the factor for the next loss out. Only float16 arithmetic needs one."""

from dataclasses import dataclass

GROWTH_INTERVAL_STEPS = 2000


@dataclass
class LossScale:
    """Dynamic loss scaling (https://arxiv.org/abs/1710.03740, section 3.2): as large as float16 bears.

    The fields are its whole state, saved with a checkpoint.
    """

    scale: float = 65536.0
    good_steps: int = 0

    def accept(self) -> None:
        """A step had finite gradients: after many in a row the scale doubles."""
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL_STEPS:
            self.scale, self.good_steps = min(2 * self.scale, 2.0**24), 0

    def lower(self) -> bool:
        """A step overflowed: halves the scale. False when it is 1 already, so that the fault lies elsewhere."""
        self.good_steps = 0
        if self.scale <= 1:
            return False
        self.scale /= 2
        return True
