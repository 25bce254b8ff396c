"""The report is one page that needs nothing else, with every chart there are numbers for."""

import json
import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.artifacts import METRICS, REPORT_PAGE
from qlora_cli.core.runs.report_page import Series, centred_mean, draw_chart, ticks, write_report_page


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(tmp_path, lines, **more):
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"title": "a model", "results": {}, "settings": {}, "data": {}, **more}
    write_report_page(tmp_path, **facts)
    text = (tmp_path / REPORT_PAGE).read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert not parser.open
    return text, parser.seen


def test_a_run_has_a_chart_for_each_number_and_its_settings(tmp_path):
    step = {"learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 900.0, "peak_vram_bytes": 2**31}
    lines = [{"step": n, "loss": 3 - n / 10, **step} for n in range(1, 11)] + [{"step": 10, "eval_loss": 2.5}]
    text, seen = page(tmp_path, lines, settings={"rank": 16, "vram": None}, results={"peak_vram_bytes": 2**31})
    assert seen.count("svg") == 5 and seen.count("circle") == 1
    assert "10 steps; the loss went from 2.9000 to 2.0000, on held-out rows to 2.5000" in text
    assert "2.00 GiB" in text and "<th>rank</th><td>16</td>" in text and "vram</th><td>None" not in text
    assert not re.search(r"(src|href)=|https?:|<script", text)  # nothing is fetched, nothing runs


def test_text_of_others_stays_text(tmp_path):
    text, seen = page(tmp_path, [], title="<img src=x>", data={"source": "<script>alert(1)</script>"})
    assert "img" not in seen and "script" not in seen and "&lt;script&gt;" in text and "No step was taken." in text


def test_the_mean_lies_around_its_point():
    line = [(n, 2.0 * n) for n in range(100)]
    assert centred_mean(line) == line  # of a straight line is that line: no lag
    assert centred_mean([(1, 5.0)]) == [(1, 5.0)] and centred_mean([]) == []


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_within(low, width, count):
    found = ticks(low, low + width, count)
    slack = 1e-6 * (abs(low) + width + 1)
    assert all(low - slack <= tick <= low + width + slack for tick in found) and len(found) <= count + 1


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e9, 1e9)), max_size=20))
def test_any_numbers_can_be_drawn(points):
    picture = draw_chart("x", [Series("", sorted(points), "red")])
    assert "nan" not in picture and "inf" not in picture
    places = [
        float(n)
        for n in re.findall(r'c[xy]="([-\d.]+)"', draw_chart("x", [Series("", sorted(points), "red", dots=True)]))
    ]
    assert all(-1 <= place <= 561 for place in places)
