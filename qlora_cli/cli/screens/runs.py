"""Screens of what was made: prepared rows, a training, a run or adapter, a merged model, several runs beside each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import REPORT_PAGE
from qlora_cli.cli.screens.curve import sparkline
from qlora_cli.cli.screens.screen import Screen, count, name_of, trained_of
from qlora_cli.cli.units import format_seconds
from qlora_cli.sizes import format_bytes, format_count

CURVE_COLUMNS = 12
IN_WORDS = {"None": "–", "True": "yes", "False": "no"}  # of settings that differ
FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("steps", "steps", "{:,}".format),
    ("loss", "loss", "{:.4f}".format),
    ("held-out loss", "held_out_loss", "{:.4f}".format),
    ("best of it", "best_held_out_loss", "{:.4f}".format),
    ("trained", "trainable_parameters", count),
    ("tokens", "tokens", count),
    ("tokens/s", "tokens_per_second", count),
    ("time", "training_seconds", format_seconds),
    ("peak", "peak_vram_bytes", format_bytes),
)


def of_rows(result: dict[str, Any]) -> Screen:
    """How many rows, and what of them is trained."""
    rows, tokens, trained = result["rows"], result["tokens"], result["trained_tokens"]
    lengths = result["lengths"]
    share = f"{100 * trained / tokens:.0f} %" if tokens else "none"
    again = " (they were there already)" if result.get("cache_hit") else ""
    sentences = [
        f"{format_count(rows, 'row')} {'is' if rows == 1 else 'are'} in {result['directory']}{again}: {count(tokens)} tokens, of which {share} are trained.",
    ]
    lost = []
    if result.get("truncated"):
        lost.append(f"{result['truncated']:,} were cut at {result['max_length']:,} tokens")
    if dropped := sum((result.get("dropped") or {}).values()):
        lost.append(f"{dropped:,} were dropped")
    if result.get("bad_rows"):
        lost.append(f"{result['bad_rows']:,} could not be read")
    if lost:
        sentences.append(f"Of {result['records']:,} records {', '.join(lost)}.")
    form = result.get("formatting") or {}
    facts = [
        ("length of a row", f"{lengths['p50']:,.0f} tokens mostly, {lengths['max']:,.0f} at most (limit {result['max_length']:,})"),
        ("format", f"{form.get('format', '?')}, trained on {result.get('train_on', '?')}"),
        ("data", str((result.get("data") or {}).get("source", "?"))),
    ]  # fmt: skip
    return Screen(sentences, facts)


def of_a_preparation(result: dict[str, Any]) -> Screen:
    """What became of the data, below the rows that are shown."""
    left_out = result["left_out"]
    facts = [
        ("lengths", result["lengths"]),
        ("parts", result["parts"]),
        ("left out", left_out if isinstance(left_out, str) else "\n".join(left_out)),
    ]
    verb = "is" if result["rows"].startswith("1 ") else "are"
    return Screen([f"{result['rows']} {verb} in {result['directory']}: {result['tokens']}."], facts)


def of_a_training(result: dict[str, Any]) -> Screen:
    """How the training went."""
    done = (
        f"{result['steps']:,} of {result['total_steps']:,} steps"
        if result["steps"] < result["total_steps"]
        else format_count(result["steps"], "step")
    )
    loss = f", loss {result['final_loss']:.4f}" if result["final_loss"] is not None else ""
    held_out = f", held-out loss {result['eval_loss']:.4f}" if result.get("eval_loss") is not None else ""
    first = f"The adapter is in {result['output']}: {done} in {format_seconds(result['seconds'])}{loss}{held_out}."
    sentences = [first, trained_of(result)]
    if result.get("stopped_early"):
        sentences.insert(1, "It stopped early: the held-out loss fell no more.")
    if gap := result.get("gap"):
        sentences.append(_gap(gap))
    facts = [("tokens", f"{result['tokens']:,}"), ("report", str(Path(result["output"]) / REPORT_PAGE))]
    if result.get("best_eval_loss") is not None:
        facts.insert(1, ("best held-out loss", f"{result['best_eval_loss']:.4f} at step {result['best_step']:,}"))
    if result.get("peak_vram_bytes"):
        facts.append(("most of the card", format_bytes(result["peak_vram_bytes"])))
    return Screen(sentences, facts)  # fmt: skip


def _gap(gap: dict[str, Any]) -> str:
    """What 4 bits cost, and what the adapter won."""
    four, tuned = gap["four_bits"], gap["adapter"]
    lost = None if gap["sixteen_bits"] is None else four - gap["sixteen_bits"]
    cost = "" if lost is None else "4 bits cost nothing, " if lost <= 0 else f"4 bits cost {lost:.4f} nats a token, "
    won = f"the adapter won {four - tuned:.4f}" if tuned <= four else f"the adapter lost {tuned - four:.4f} more"
    return f"On {gap['tokens']:,} tokens held out {cost}{won}."


def of_a_run(result: dict[str, Any]) -> Screen:
    """What an adapter is, and how far its training came."""
    place, progress, settings = result["directory"], result.get("progress") or {}, result.get("settings") or {}
    kind, training = result["kind"], result.get("training") or {}
    steps, total = progress.get("steps"), training.get("total_steps")
    loss = progress.get("last_loss")
    held_out = progress.get("last_eval_loss")
    if kind == "run" and "adapter" not in result:  # the adapter that is kept may be that of another step
        held_out = training.get("eval_loss", held_out)
    came = f"{steps:,} of {total:,} steps" if total else format_count(steps or 0, "step")
    came = f": {came}" if steps is not None else ""
    came += f", loss {loss:.4f}" if loss is not None else ""
    came += f", held-out loss {held_out:.4f}" if held_out is not None else ""
    base = (result.get("base") or {}).get("model") or result.get("base_model") or settings.get("model")
    if "adapter" in result:
        now = f"is being trained by process {result['process']}" if "process" in result else "has not ended"
        first = f"{place} is a run that {now}{came}."
    else:
        first = f"{place} is {'an' if kind[0] in 'aeiou' else 'a'} {kind} on {name_of(str(base)) if base else 'an unknown base'}{came}."
    trained = [trained_of(result)] if "trainable_parameters" in result else []
    refused = [f"A merge of it will be refused: {why}"] if (why := result.get("merging_refused")) else []
    sentences = [first, *result.get("damaged", ()), *trained, *refused]
    facts = []
    if "rank" in result:
        how = ", ".join(name.replace("_", " ") for name in ("dora", "rslora", "rank_pattern") if result.get(name))
        adapted = ", ".join([*result["target_modules"], *result.get("target_parameters", ())])
        facts.append(
            (
                "adapter",
                f"rank {result['rank']}, alpha {result['alpha']:g} on {adapted}{' · ' + how if how else ''}",
            )
        )
    if base:
        facts.append(("base", str(base)))
    if source := (result.get("data") or {}).get("source"):
        facts.append(("data", str(source)))
    if "learning_rate" in settings:
        facts.append(("learning rate", f"{settings['learning_rate']:g}, {settings.get('scheduler')}"))
    if progress.get("tokens"):
        facts.append(("tokens", f"{progress['tokens']:,}"))
    if result.get("checkpoints"):
        facts.append(("checkpoints", ", ".join(result["checkpoints"])))
    return Screen(sentences, facts)  # fmt: skip


def of_runs(result: dict[str, Any]) -> Screen:
    """Which run came to the lowest loss, and in what they differ."""
    runs = result["runs"]
    measured = "best_held_out_loss" if all(run["best_held_out_loss"] is not None for run in runs) else "loss"
    losses = [run[measured] for run in runs]
    what = "held-out loss" if measured == "best_held_out_loss" else "loss of a step"
    if None in losses:
        first = f"{len(runs)} runs, of which {', '.join(run['name'] for run in runs if run[measured] is None)} took no step."
    else:
        best = min(runs, key=lambda run: run[measured])
        first = f"{best['name']} has the lowest {what}: {best[measured]:.4f}."
    sentences = [first]
    if "rows" in result["differing"] or "eval_rows" in result["differing"] or "eval_fraction" in result["differing"]:
        sentences.append("The runs saw different rows, so that their losses are of different things.")
    if unfinished := [run["name"] for run in runs if not run["ended"]]:
        sentences.append(f"Not ended: {', '.join(unfinished)}.")
    sentences += [said for run in runs for said in run.get("damaged", ())]
    rows = [
        [label, *(form(run[name]) if run[name] is not None else "–" for run in runs)]
        for label, name, form in FIGURES
        if any(run[name] is not None for run in runs)
    ]
    rows.append(["its curve", *(sparkline(run["curve"], CURVE_COLUMNS) for run in runs)])
    names = [run["name"] for run in runs]
    tables: list[dict[str, Any]] = [{"title": None, "columns": ["", *names], "rows": rows}]
    if result["differing"]:
        differing = [
            [name.replace("_", " "), *(IN_WORDS.get(value, value) for value in values)]
            for name, values in result["differing"].items()
        ]
        tables.append({"title": "What differs", "columns": ["", *names], "rows": differing})
    facts = [("picture", result["picture"])] if result["picture"] else []
    return Screen(sentences, facts, tables)


def of_a_merge(result: dict[str, Any]) -> Screen:
    """Where the merged model is, and how near it is to what was trained."""
    dtype = "4 bits" if result["quantized"] else str(result["dtype"])
    weights = {"dequantized": "the weights that were trained against", "original": "the original weights"}[
        result["base"]
    ]
    sentences = [
        f"The merged model is in {result['output']}: {format_bytes(result['total_bytes'])} in {dtype}, merged into {weights}."
    ]
    compared = result.get("verification")
    if compared:
        sentences.append(
            f"It differs from base and adapter by {max(0.0, compared['kl_mean']):.2g} nats a token on average, and makes the same greedy "
            f"choice at {100 * compared['greedy_agreement']:.1f} % of {compared['tokens']:,} tokens."
        )
    else:
        sentences.append("It was not compared with base and adapter.")
    if result.get("kept") is not None:
        sentences.append(f"{100 * result['kept']:.0f} % of what was learned is left in 4 bits.")
    facts = [("base", str(result["base_model"])), ("changed weights", f"{result['changed_weights']:,}")]
    named = {"live": "adapter live", "untuned": "4-bit base alone"}
    for name, loss in (result.get("base_losses") or {}).items():
        facts.append((f"loss, {named.get(name, f'merged into {name}')}", f"{loss:.4f} nats a token"))
    if gguf := result.get("gguf"):
        read = gguf["tensors_checked"]
        checked = "not read back" if read is None else f"{read:,} tensors read back"
        facts.append(("GGUF", f"{gguf['name']}, {format_bytes(gguf['total_bytes'])}, {checked}"))
    if result.get("pushed_to"):
        facts.append(("uploaded to", str(result["pushed_to"])))
    return Screen(sentences, facts)  # fmt: skip
