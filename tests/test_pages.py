"""What all HTML pages have in common: one file, escaped text, tables that sort and search."""

from __future__ import annotations

import json

import pytest
from browser import browser  # noqa: F401  a fixture
from conftest import assert_rejected
from jinja2 import ChoiceLoader, DictLoader, PackageLoader

from rubiks.pages import page

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
def test_a_page_is_complete_in_itself(width, dark, written, browser):  # noqa: F811
    shown = browser.open(written, width, dark=dark)
    assert shown.problems() == []
    assert shown.run("document.title") == HOSTILE
    assert names(shown) == [name for name, _ in ROWS]
    assert shown.run("JSON.parse(document.getElementById('data').textContent)") == json.loads(json.dumps(ROWS))


def test_a_table_is_sorted_and_searched(written, browser):  # noqa: F811
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


def test_problems_of_a_page_are_seen(tmp_path, browser):  # noqa: F811
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
