"""Screens before a run: of a model, of a plan, of a machine."""

from typing import Any

from qlora_cli.cli.screens.screen import Screen, name_of, trained_of
from qlora_cli.sizes import format_bytes, format_count


def of_a_model(result: dict[str, Any]) -> Screen:
    """Whether it trains on this memory, and what it takes."""
    name = name_of(result["model"])
    sentences = [trained_of(result)]
    facts = []
    if "training" not in result:
        sentences.insert(0, f"{name} can be counted, and its memory {result.get('memory', 'is not known')}.")
    else:
        length = f"{result['settings']['max_length']:,} tokens"
        needed = format_bytes(result["training"]["device_bytes"])
        limit = format_bytes(result["vram_bytes"]) if result.get("vram_bytes") else ""
        answer = {
            True: f"{name} trains on {limit}: {needed} with rows of {length}.",
            False: f"{name} does not train on {limit}: rows of {length} need {needed} at the least{_remedy(result)}.",
            None: f"{name} needs {needed} to train with rows of {length}.",
        }
        sentences.insert(0, answer[result.get("fits")])
        sentences += _held_elsewhere(result["settings"])
        facts = [
            ("to train", f"{needed} of the card, {format_bytes(result['training']['host_bytes'])} of the host"),
            ("to answer", f"{format_bytes(result['generation']['device_bytes'])} of the card"),
            *_to_merge(result),
            _weights(result),
            ("4-bit copy on disk", format_bytes(result["disk"]["base_cache_bytes"])),
        ]
        if least := result.get("smallest_card"):
            where = f"{format_bytes(least['host_bytes'])} of the host"
            facts.insert(1, ("to train at all", f"{format_bytes(least['device_bytes'])} of the card, {where}"))
    sentences += _missing(result)
    if refused := result.get("merging_refused"):
        sentences.append(f"A merge of its adapters will be refused: {refused}")
    facts.append(("in 4 bits", f"{result['four_bit_percent']:.4g} % of the base, embeddings and head apart"))
    if "stored" in result:
        facts.append(("stored", result["stored"]))
    if "mean_quantization_error" in result:
        facts.append(("error of 4 bits", f"{100 * result['mean_quantization_error']:.3g} % of a weight, on average"))
    shown = []
    if cost := result.get("four_bit_cost"):
        lost = cost["loss_in_4_bits"] - cost["loss_in_16_bits"]
        sentences.append(
            f"On {cost['tokens']:,} tokens of the rows 4 bits cost {lost:.4f} nats a token: {cost['loss_in_4_bits']:.4f} "
            f"instead of {cost['loss_in_16_bits']:.4f}."
        )
        shown = [each for each in result["tables"] if each["title"] == "These layers in more bits"]
    return Screen(sentences, facts, shown)


def _to_merge(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What a merge takes; nothing where every merge will be refused."""
    if result.get("merging_refused") and not result.get("merges_original"):
        return []
    return [("to merge", f"{format_bytes(result['merging']['host_bytes'])} of the host")]


def _held_elsewhere(settings: dict[str, Any]) -> list[str]:
    """How a base or rows that are larger than the card are held; nothing where they are whole there."""
    layers, cards = settings.get("streamed_layers"), settings.get("context_parallel", 1)
    said = [f"The weights of {layers} layers stream from host memory as they are used."] if layers else []
    if share := settings.get("waiting_states"):
        said.append(f"{share:.0%} of the optimizer's state waits in host memory for each update.")
    return said + ([f"{cards} cards share the tokens of each row."] if cards > 1 else [])


def _weights(result: dict[str, Any]) -> tuple[str, str]:
    """What is downloaded; where that is nothing, what is read."""
    disk = result["disk"]
    if disk["download_bytes"]:
        return "download", format_bytes(disk["download_bytes"])
    whence = "which are missing here" if "missing_weights" in result else "nothing to download"
    return "weights", f"{format_bytes(disk['weights_bytes'])}, {whence}"


def _missing(result: dict[str, Any]) -> list[str]:
    """That there are no weights to train on yet, if so."""
    return [f"It cannot be trained as it is: {why}"] if (why := result.get("missing_weights")) else []


def _remedy(result: dict[str, Any]) -> str:
    nearest = result.get("nearest")
    if isinstance(nearest, dict):
        changes = ", ".join(f"{n.replace('_', ' ')} {v}" for n, v in nearest.items() if n != "device_bytes")
        return f"; with {changes} it takes {format_bytes(nearest['device_bytes'])}"
    cards = result.get("nearest_with_more_cards")
    if not cards:
        return "; take a smaller model or a larger card"
    how = "sharded over" if "shard" in cards else "with its rows shared by"
    return f"; {how} {cards['gpus']} such cards it fits"


def of_a_plan(result: dict[str, Any]) -> Screen:
    """What `train` would do, and whether it fits."""
    settings, memory = result["configuration"], result["memory"]
    name = name_of(str(settings["model"]))
    steps = f"{format_count(result['total_steps'], 'step')} over {format_count(result['rows'], 'row')}"
    needed = format_bytes(memory["device_bytes"]) if isinstance(memory, dict) else ""
    limit = format_bytes(result["vram_bytes"]) if result.get("vram_bytes") else ""
    if result["fits"] is False:
        first = f"{name} does not fit: {needed} are needed, and {limit} may be taken."
    elif result["fits"]:
        first = f"{name} would train {steps}, in {needed} of {limit}."
    else:
        first = f"{name} would train {steps} on this machine's {result['device'].upper()}."
    nothing = result["fits"] is False and not result.get("next")
    remedy = ["Nothing that was left open makes it fit: take a smaller model or a larger card."] if nothing else []
    begins = [f"It would go on at step {result['first_step']:,}."] if result["first_step"] > 1 else []
    rows = f"{result['rows']:,}" + (f", and {result['held_out_rows']:,} held out" if result["held_out_rows"] else "")
    facts = [
        ("rows", rows),
        ("a step", f"{settings['batch_size']} × {settings['gradient_accumulation_steps']} rows of at most {settings['max_length']:,} tokens"),
        ("recomputed layers", str(settings["gradient_checkpointing"])),
        ("optimizer", str(settings["optimizer"])),
        ("learning rate", f"{settings['learning_rate']:g}, {settings['scheduler']}, {format_count(result['warmup_steps'], 'step')} of warm-up"),
        _weights(result),
        ("written", f"{format_bytes(result['disk']['run_bytes'])} to {result['output']}"),
    ]  # fmt: skip
    elsewhere = _held_elsewhere(result["settings"])
    return Screen([first, *remedy, *_missing(result), *begins, *elsewhere, trained_of(result)], facts)


def of_a_machine(result: dict[str, Any]) -> Screen:
    """Whether 4-bit training works here."""
    checks = next(table for table in result["tables"] if table["title"] == "Checks")
    rows = [dict(zip(checks["columns"], row, strict=True)) for row in checks["rows"]]
    broken = [row for row in rows if not row["works"]]
    devices = next((table for table in result["tables"] if table["title"] == "Devices"), None)
    where = (
        f"{len(devices['rows'])} card{'s' * (len(devices['rows']) > 1)}" if devices else "its CPU, as no card is seen"
    )
    first = (
        f"4-bit training works on this machine, on {where}."
        if result["works"]
        else (f"4-bit training does not work on this machine: {', '.join(str(row['name']) for row in broken)}.")
    )
    facts = [(str(row["name"]), f"{row['found']}" + (f" → {row['fix']}" if row["fix"] else "")) for row in rows]
    facts.append(
        (
            "memory",
            f"{format_bytes(result['host_available_bytes'])} of {format_bytes(result['host_memory_bytes'])} free",
        )
    )
    facts.append(("cache", f"{result['cache']}: {format_bytes(sum(result['caches'].values()))}"))
    return Screen([first], facts, [devices] if devices else [])
