"""Scaling of rotary positions (RoPE), asked for in place of what a model's configuration has: linear, dynamic, YaRN, llama3, LongRoPE.

transformers computes it; here its parameters are put where its models read them, and where a merged config.json has them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qlora_cli.errors import UsageError
from qlora_cli.settings.ranges import parse_rope_scaling

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What a kind of scaling has beside the base of its frequencies, which is the model's own and stays.
SCALING_KEYS = frozenset(
    (
        *("rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),  # YaRN
        *("low_freq_factor", "high_freq_factor"),  # llama3
        *("short_factor", "long_factor"),  # LongRoPE
    )
)
FREQUENCIES = ("rope_theta", "partial_rotary_factor")
LIMIT, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"
NEEDS_ORIGINAL = ("yarn", "llama3", "longrope")
WHOLE_ROWS = "full_attention"  # of layers that differ, those that see whole rows: windows see no further than before


def scale_positions(config: "PreTrainedConfig", asked: str, name: str) -> str:
    """Changes a configuration to the scaling that was asked for, and its limit of positions with it.

    A model with a scaling of its own takes another one as JSON only, which says all of it. The limit becomes the
    original one times the factor, but under dynamic scaling, which goes by the original one.

    Args:
        config: Of the whole model.
        asked: As typed.
        name: Of the model.

    Returns:
        What was done, as a sentence.

    Raises:
        UsageError: Its positions are not rotary, are scaled already, or do not go with what was asked for.
    """
    text: Any = config.get_text_config(decoder=True)
    given = parse_rope_scaling(asked)
    limit = given.pop(LIMIT, None)
    own = _own_parameters(text, name)
    kind, factor = given["rope_type"], given["factor"]
    own_kind = own.get("rope_type") or own.get("type") or "default"
    own_factor = own.get("factor")  # which some kinds need not have
    own_words = own_kind if own_factor is None else f"{own_kind}, factor {own_factor:g}"
    before = "" if own_kind == "default" else f", in place of its own {own_words}"
    if before and not asked.lstrip().startswith("{"):
        raise UsageError(
            f"The positions of {name} are scaled already: {own_words}.",
            "Leave out --rope-scaling, or give all of another scaling as JSON, original_max_position_embeddings included.",
        )
    for key in FREQUENCIES:
        if key in given and given[key] != own.get(key):
            raise UsageError(
                f"--rope-scaling gives {key} {given[key]}, and {name} has {own.get(key, 'none')}.",
                f"Leave {key} out: scaling starts from the frequencies that the model was trained with.",
            )
    context = getattr(text, LIMIT, None)
    original = given.get(ORIGINAL) or own.get(ORIGINAL) or context
    if not original or (context and original > context):
        raise UsageError(
            f"--rope-scaling starts from {original} positions, and {name} has {context}.",
            f"Give {ORIGINAL} as JSON: how long the rows were that it was trained on.",
        )
    if kind in NEEDS_ORIGINAL:
        given[ORIGINAL] = original
        if hasattr(text, ORIGINAL):  # beside the parameters, which it overrides (phi3)
            setattr(text, ORIGINAL, original)
    if kind != "dynamic":
        if kind == "yarn" and limit is None:  # transformers wants it to be the ratio of the limits to the last bit
            given["factor"] = int(original * factor) / original
        limit = limit or int(original * factor)
        if context and limit < context:
            raise UsageError(
                f"--rope-scaling by {factor:g} gives {limit:,} positions, and {name} has {context:,} without.",
                "Leave it out, or give a larger factor.",
            )
        setattr(text, LIMIT, limit)
    _set_parameters(text, {key: value for key, value in own.items() if key not in SCALING_KEYS} | given)
    with _warnings_as_errors(name, kind):
        text.standardize_rope_params()
        text.validate_rope()
    longest = int(original * factor) if kind == "dynamic" else limit
    return f"Positions of {name} are scaled: {kind}, factor {factor:g}, {longest:,} of them{before}."


def scaling_of(config: "PreTrainedConfig") -> dict[str, Any]:
    """A configuration's scaling, and its limit of positions: what `scale_positions` makes the same of, as JSON."""
    text: Any = config.get_text_config(decoder=True)
    own = _own_parameters(text, config.model_type)
    return {key: value for key, value in own.items() if key in SCALING_KEYS} | {LIMIT: getattr(text, LIMIT)}


def changed_positions(config: "PreTrainedConfig") -> dict[str, Any] | None:
    """What `from_pretrained` is given to load a model with positions that were scaled; None where it would not reach the
    language model of a multimodal one."""
    text: Any = config.get_text_config(decoder=True)
    return {"rope_parameters": text.rope_parameters, LIMIT: getattr(text, LIMIT)} if text is config else None


def describe_scaling(scaling: dict[str, Any] | None) -> str:
    """A `scaling_of` in words; None for that of the model's own configuration."""
    if scaling is None:
        return "its own positions"
    return f"positions scaled by {scaling['rope_type']}, factor {scaling['factor']:g}"


def write_scaling(section: dict[str, Any], scaling: dict[str, Any]) -> None:
    """Writes a `scaling_of` into what a config.json says of the language model, under the names that it has there.

    transformers 5 has `rope_parameters`, and the base of the frequencies in them; earlier ones, and those who read their
    files, `rope_scaling` with a `type`.
    """
    parameters = {key: value for key, value in scaling.items() if key != LIMIT}
    section[LIMIT] = scaling[LIMIT]
    if ORIGINAL in section and ORIGINAL in parameters:
        section[ORIGINAL] = parameters[ORIGINAL]
    if isinstance(section.get("rope_parameters"), dict):
        own = section["rope_parameters"]
        place = own[WHOLE_ROWS] if isinstance(own.get(WHOLE_ROWS), dict) else own
        for key in SCALING_KEYS & set(place):
            del place[key]
        place.update(parameters)
        return
    before = section.get("rope_scaling") or {}
    kept = {key: value for key, value in before.items() if key not in SCALING_KEYS}
    section["rope_scaling"] = {**kept, **parameters, "type": parameters["rope_type"]}


def growth(text_config: Any) -> float:
    """By what a model's rows may be longer than its configuration's limit: the factor under dynamic scaling, which goes by
    the original limit."""
    own = getattr(text_config, "rope_parameters", None) or {}
    own = own.get(WHOLE_ROWS, own) if isinstance(own, dict) else {}
    scaled = isinstance(own, dict) and own.get("rope_type") == "dynamic" and isinstance(own.get("factor"), int | float)
    return max(1.0, own["factor"]) if scaled else 1.0


def require_scaled(model: Any, name: str) -> None:
    """Checks that a model, built with a scaling that was asked for, has positions that go by it.

    Raises:
        UsageError: None of its modules does.
    """
    kind = scaling_of(model.config)["rope_type"]
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    if not any(kind in (found.values() if isinstance(found, dict) else (found,)) for found in kinds):
        raise UsageError(f"The positions of {name} do not go by --rope-scaling.", "Leave it out.")


def _own_parameters(text: Any, name: str) -> dict[str, Any]:
    """The parameters of a model's rotary positions; of layers that differ, of those that see whole rows."""
    own = getattr(text, "rope_parameters", None)
    nested = isinstance(own, dict) and all(isinstance(value, dict | None) for value in own.values())
    own = own.get(WHOLE_ROWS) if nested and own else own
    if not isinstance(own, dict) or not own or getattr(text, "alibi", False):
        raise UsageError(
            f"{name} has no rotary positions that --rope-scaling could scale ({text.model_type}).",
            "Leave it out: rows can be as long as the model has positions for.",
        )
    return own


def _set_parameters(text: Any, parameters: dict[str, Any]) -> None:
    nested = isinstance(text.rope_parameters.get(WHOLE_ROWS), dict)
    text.rope_parameters = {**text.rope_parameters, WHOLE_ROWS: parameters} if nested else parameters


@contextmanager
def _warnings_as_errors(name: str, kind: str) -> Iterator[None]:
    """Turns what transformers warns of in the block, or raises, into an error: it would go on with other positions."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(" ".join(record.getMessage().split()))

    logger, collector = logging.getLogger("transformers.modeling_rope_utils"), Collector()
    level, propagates = logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    except (KeyError, ValueError, TypeError) as error:
        found.append(str(error.args[0] if error.args else error))
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate = propagates
    if found:
        raise UsageError(
            f"--rope-scaling by {kind} does not go with {name}: {found[0].rstrip('.')}.",
            "Change what it says, as the documentation of transformers' rope_parameters has it.",
        )
