"""Report of a run as one HTML page without a network: charts of its metrics, figures, settings and data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import REPORT_PAGE, read_metrics, write_bytes
from qlora_cli.sizes import format_bytes

WIDTH, HEIGHT = 560, 220  # of a chart, in CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 30  # around its axes
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #6a737d; --line: #d8dee4; --page: #fff; --one: #0a5bb5;
  --two: #c2410c; --faint: #9ec5f0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #30363d; --page: #0d1117;
  --one: #6cb0ff; --two: #ff9d5c; --faint: #2f4f75 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1180px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.charts { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; flex: 1 1 480px }
figcaption { font-weight: 600 } svg { width: 100%; height: auto } svg text { fill: var(--soft); font-size: 11px }
table { border-collapse: collapse } .text { white-space: pre-wrap }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0;
  text-align: left; vertical-align: top; overflow-wrap: anywhere } th { font-weight: 500; color: var(--soft) }
""".strip()

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: For the legend.
        points: (step, value), in order.
        colour: A CSS colour.
        dots: Whether each point is marked.
    """

    name: str
    points: Sequence[Point]
    colour: str
    dots: bool = False


def write_report_page(
    directory: Path, *, title: str, results: Mapping[str, Any], settings: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    """Writes the page into a run directory, from its metrics and what is given.

    Args:
        results: What training reported at its end.
        settings: Of the run; what is None is left out.
        data: What is known of the rows.
    """
    lines = read_metrics(directory)
    held_out = column(lines, "eval_loss")
    loss = column(lines, "loss")
    charts = [
        draw_chart(
            "Loss, nats per token",
            [
                Series("step", loss, "var(--faint)"),
                Series("mean", centred_mean(loss), "var(--one)"),
                Series("held-out rows", held_out, "var(--two)", dots=True),
            ],
        ),
        draw_chart("Learning rate", [Series("", column(lines, "learning_rate"), "var(--one)")]),
        draw_chart("Gradient norm, before clipping", [Series("", column(lines, "grad_norm"), "var(--one)")]),
        draw_chart("Tokens per second", [Series("", column(lines, "tokens_per_second"), "var(--one)")]),
        draw_chart(
            "Peak memory of the card, GiB",
            [Series("", [(s, v / 2**30) for s, v in column(lines, "peak_vram_bytes")], "var(--one)")],
        ),
    ]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(summarise(loss, held_out))}</p>",
        f'<div class="charts">{"".join(charts)}</div>',
        tabulate_samples(lines),
        *(tabulate(head, facts) for head, facts in (("Results", results), ("Settings", settings), ("Data", data))),
        "</body></html>",
    ]
    write_bytes(directory / REPORT_PAGE, "\n".join(parts).encode())


def column(lines: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """(step, value) of the lines that have a value under that name."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def centred_mean(points: Sequence[Point]) -> list[Point]:
    """Mean over a twentieth of the points on either side of each, at least two, fewer only at both ends."""
    reach = max(2, len(points) // 20)
    smooth = []
    for index, (step, _) in enumerate(points):
        side = min(reach, index, len(points) - 1 - index)
        window = points[index - side : index + side + 1]
        smooth.append((step, sum(value for _, value in window) / len(window)))
    return smooth


def summarise(loss: Sequence[Point], held_out: Sequence[Point]) -> str:
    """What a reader wants first, in a sentence."""
    if not loss:
        return "No step was taken."
    tenth = max(1, len(loss) // 10)
    first, last = (sum(value for _, value in part) / len(part) for part in (loss[:tenth], loss[-tenth:]))
    text = f"{loss[-1][0]:,} steps; the loss went from {first:.4f} to {last:.4f}"
    if held_out:
        step, best = min(held_out, key=lambda point: point[1])
        text += f", on held-out rows to {held_out[-1][1]:.4f} (lowest {best:.4f}, after step {step:,})"
    return text + "."


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count`."""
    rough = (high - low) / count
    if low + rough <= low or high - rough >= high:  # nothing that numbers of this size can tell apart
        return [low]
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * (first + n) for n in range(math.floor(high / step + 1e-9) - first + 1)]


def draw_chart(title: str, series: Sequence[Series]) -> str:
    """A line chart as SVG in a figure; "" where there is nothing to draw."""
    series = [each for each in series if each.points]
    if not series:
        return ""
    steps, values = zip(*(point for each in series for point in each.points), strict=True)
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = max(0.0, low - margin) if low >= 0 else low - margin, high + margin

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - left) / (right - left) if right > left else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    drawn = []
    for value in ticks(low, high, 4):
        drawn.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in ticks(left, right, 6):
        drawn.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{step:,.0f}</text>')
    for each in series:
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in each.points)
        drawn.append(f'<path d="M{path}" fill="none" stroke="{each.colour}" stroke-width="1.6"/>')
        marked = each.points if each.dots or len(each.points) == 1 else ()
        drawn += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{each.colour}"/>' for s, v in marked]
    legend = " ".join(f'<span style="color:{each.colour}">— {escape(each.name)}</span>' for each in series if each.name)
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption>{escape(title)} {legend}</figcaption>{picture}</figure>"


def tabulate_samples(lines: Sequence[Mapping[str, Any]]) -> str:
    """Answers to the sample prompts, before, during and after training; "" where there were none."""
    prompts: dict[str, dict[int, str]] = {}
    for line in lines:
        if "answer" in line:
            prompts.setdefault(line["prompt"], {})[line["step"]] = line["answer"]
    tables = []
    for prompt, answers in prompts.items():
        rows = "".join(
            f"<tr><th>{f'step {step:,}' if step else 'before'}</th><td class=text>{escape(answer)}</td></tr>"
            for step, answer in sorted(answers.items())
        )
        tables.append(f"<p class=text><b>{escape(prompt)}</b></p><table>{rows}</table>")
    return f"<h2>Samples</h2>{''.join(tables)}" if tables else ""


def tabulate(head: str, facts: Mapping[str, Any]) -> str:
    """A heading and a table of what is known."""
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(_written(name, value))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<h2>{escape(head)}</h2><table>{rows}</table>"


def _written(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_written(str(key), each)}" for key, each in value.items() if each is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
