"""What all HTML pages have in common: one file, escaped text, tables that sort and search."""

from __future__ import annotations

import itertools
import json

import pytest
from conftest import assert_rejected
from jinja2 import ChoiceLoader, DictLoader, PackageLoader

from rubiks.pages import charts, page

HOSTILE = '</script><script>alert("1")</script>'
ROWS = [("Zebra", 5.0), ("apple 10", None), ("apple 9", 80.25), (HOSTILE, 12.5), ("‏ימין", 99.0)]
TEMPLATE = """
{% extends "base.html" %}
{% import "table.html" as table %}
{% block title %}{{ rows[3][0] }}{% endblock %}
{% block main %}
{{ table.search("own", "Search") }}
<div class="scroll"><table id="own" data-sortable>
<thead><tr><th>class</th><th data-type="number">recall</th></tr></thead>
<tbody>{% for name, value in rows %}<tr><th scope="row">{{ name }}</th>{{ table.share(value) }}</tr>{% endfor %}</tbody>
</table></div>
<script type="application/json" id="data">{{ rows | tojson }}</script>
{% endblock %}
"""


@pytest.fixture
def written(monkeypatch, tmp_path):
    """A page with the table above."""
    monkeypatch.setattr(
        page, "PackageLoader", lambda name: ChoiceLoader([DictLoader({"own.html": TEMPLATE}), PackageLoader(name)])
    )
    page.write(tmp_path / "page.html", "own.html", ["table.js"], rows=ROWS)
    return tmp_path / "page.html"


def names(shown) -> list[str]:
    return shown.texts("tbody th")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_page_is_complete_in_itself(width, dark, written, browser):
    shown = browser.open(written, width, dark=dark)
    assert shown.problems() == []
    assert shown.run("document.title") == HOSTILE
    assert names(shown) == [name for name, _ in ROWS]
    assert shown.run("JSON.parse(document.getElementById('data').textContent)") == json.loads(json.dumps(ROWS))


def test_a_table_is_sorted_and_searched(written, browser):
    shown = browser.open(written)
    shown.click("thead th:nth-child(2) button")
    assert names(shown) == ["‏ימין", "apple 9", HOSTILE, "Zebra", "apple 10"]
    shown.click("thead th:nth-child(2) button")
    assert names(shown) == ["Zebra", HOSTILE, "apple 9", "‏ימין", "apple 10"]  # without a number: last
    shown.click("thead th:nth-child(1) button")
    assert names(shown)[1:4] == ["apple 9", "apple 10", "Zebra"]
    assert shown.run("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "ascending"
    shown.type("[data-search=own]", "10 APP")
    assert names(shown) == ["apple 10"]
    assert shown.texts("[data-shown=own]") == ["1 of 5"]
    shown.type("[data-search=own]", "")
    assert len(names(shown)) == 5
    assert shown.problems() == []


def test_problems_of_a_page_are_seen(tmp_path, browser):
    """The tests above could not fail otherwise."""
    path = tmp_path / "page.html"
    path.write_text("<div style='width:5000px'>.</div><img src=other.png><script>undefined.x</script>")
    problems = browser.open(path).problems()
    assert [any(part in problem for problem in problems) for part in ("other.png", "TypeError", "too wide")] == [
        True
    ] * 3


def test_a_page_that_cannot_be_written(written, tmp_path):
    (tmp_path / "file").touch()
    assert_rejected(lambda: page.write(tmp_path / "file" / "page.html", "own.html", rows=ROWS), "cannot be written")


# ---- charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, ["0", "20", "40", "60", "80", "100"]),
        (-1, 1, ["-1", "-0.5", "0", "0.5", "1"]),
        (9, 19_990, ["5k", "10k", "15k"]),
        (0, 0.00033, ["0", "0.0001", "0.0002", "0.0003"]),
        (1.1e-5, 3.2e-5, ["1.5e-5", "2e-5", "2.5e-5", "3e-5"]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low, high, expected):
    assert [charts.label(value) for value in charts.ticks(low, high)] == expected


def test_places_in_a_plot():
    plot = charts.Plot((0, 10), (-1, 1), width=120, height=80, left=10, right=10, top=20, bottom=20)
    assert plot.line([(0, -1), (5, 0), (10, 1)]) == "M10,60 L60,40 L110,20"
    boxes = charts.Plot((0, 10), (0, 4), width=120, height=80, left=10, right=10, top=20, bottom=20).bars([1, 0, 4])
    assert [(y, height) for _, y, _, height in boxes] == [(50, 10), (60, 0), (20, 40)]
    edges = [(x, round(x + width, 2)) for x, _, width, _ in boxes]
    assert all(10 <= left < right <= 110 for left, right in edges)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(edges))


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0, -2.0], [1e-9, 2e-9], [0, 1e12]])
def test_any_values_have_axes(values):
    low, high = charts.span(values)
    assert low < high
    plot = charts.Plot((low, high), (low, high)).rounded()
    assert plot.y[0] <= min(values) <= max(values) <= plot.y[1]
    assert len(plot.y_ticks) >= 2


@pytest.mark.parametrize("count", [1, 2, 399, 400, 401, 12_345])
def test_a_long_curve_is_thinned(count):
    points = [(float(number), 2.0 * number) for number in range(count)]
    thin = charts.thinned(points, 400)
    assert len(thin) <= 401
    assert thin[-1] == points[-1]
    assert all(y == pytest.approx(2 * x) for x, y in thin)
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)
    assert count > 400 or thin == points
