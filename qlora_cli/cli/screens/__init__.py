"""Screens: of a command's result the sentence that a person wants, and one short table; the rest is for --verbose."""

from collections.abc import Callable
from typing import Any

from qlora_cli.cli.screens import models, runs
from qlora_cli.cli.screens.screen import Screen

# Facts that tell a result, and what makes a screen of it.
SCREENS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], Screen]], ...] = (
    (("kind", "four_bit_percent", "total_parameters"), models.of_a_model),
    (("configuration", "held_out_rows", "total_steps"), models.of_a_plan),
    (("works", "versions", "system"), models.of_a_machine),
    (("base_losses", "merge_seconds", "base_model"), runs.of_a_merge),
    (("rows", "trained_tokens", "lengths", "directory"), runs.of_rows),
    (("rows", "parts", "left_out", "directory"), runs.of_a_preparation),
    (("final_loss", "total_steps", "output", "tokens"), runs.of_a_training),
    (("kind", "runs", "differing", "picture"), runs.of_runs),
    (("kind", "directory", "next", "tables"), runs.of_a_run),
)


def screen_of(result: dict[str, Any]) -> Screen | None:
    """The screen of a result; None where there is none, and all facts are to be shown."""
    return next((make(result) for keys, make in SCREENS if all(key in result for key in keys)), None)
