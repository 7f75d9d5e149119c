"""The published networks: what the package knows, the document's tables, and the commands that it shows."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest
from conftest import ROOT

from rubiks.cli.entry import compose, plain
from rubiks.evaluation.published import Published, published, rows
from rubiks.experiment import Evaluation
from rubiks.models import RubiksNet, cost

# Copied from the release's evaluation logs, one clip and two: top-1, top-5.
ACCURACY = {
    ("tiny", "rubiks3d"): ((54.60, 82.04), (56.65, 84.11)),
    ("small", "rubiks3d"): ((57.46, 84.34), (59.82, 86.16)),
    ("medium", "rubiks3d"): ((58.33, 84.97), (60.78, 86.90)),
    ("large", "rubiks3d"): ((58.95, 85.19), (61.73, 87.30)),
    ("large", "rubiks3d-aq"): ((58.57, 84.65), (61.57, 86.67)),
}
DOCUMENT = (ROOT / "docs/zoo.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("zoo", ROOT / "scripts/zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("tier", "variant"), ACCURACY)
def test_published_accuracy(tier, variant):
    for protocol, (top1, top5) in zip(("one_clip", "two_clip"), ACCURACY[tier, variant], strict=True):
        aq = variant == "rubiks3d-aq"
        file = f"ssv2_{tier}{'_aq_budget0.125' if aq else ''}.pth.tar"
        budget = 0.125 if aq else None
        expected = Published(tier, variant, budget, "ssv2", protocol, top1, top5, file, None)
        assert published("ssv2", tier, variant, protocol) == expected


@pytest.mark.parametrize(
    "wanted",
    [
        ("ssv1", "tiny", "rubiks3d", "one_clip"),
        ("ssv2", "tiny", "rubiks3d-aq", "one_clip"),
        ("ssv2", "tiny", "rubiks3d", "ten_clip"),
        ("kinetics", "tiny", "rubiks3d", "one_clip"),  # a file without an accuracy
    ],
)
def test_nothing_is_published_about_others(wanted):
    assert published(*wanted) is None


def test_kinetics_files_are_known():
    found = {row.file: (row.top1, row.top5) for row in rows() if row.data == "kinetics"}
    assert found == {f"kinetics_{tier}.pth.tar": (None, None) for tier in ("tiny", "small", "medium", "large")}
    assert len(rows()) == 14


def test_the_document_has_the_tables_of_the_csv(script):
    assert script.with_tables(DOCUMENT, script.read()) == DOCUMENT, "run python scripts/zoo.py"


def test_a_measured_row_shows_in_the_table(script):
    (row, *others) = script.read()
    measured = script.tables([{**row, "measured": "54.5 / 82.0", "sha256": "ab12"}, *others])
    assert "| 54.60 / 82.04 | 54.5 / 82.0 |" in measured
    assert "| ab12 |" in measured


def test_the_commands_of_the_table_are_understood():
    commands = re.findall(r"`rubiks eval ([^`]+)`", DOCUMENT)
    assert len(commands) == len(rows())
    for words, row in zip(map(shlex.split, commands), rows(), strict=True):
        settings = Evaluation(**plain(compose(words, "eval")))
        shown = settings.data.source.format, settings.protocol.name, settings.ckpt
        assert shown == (row.data, row.protocol, row.file)


def test_the_costs_in_the_document():
    table = re.findall(
        r"^\| (tiny|small|medium|large)(, rubiks3d-aq[^|]*)? \| ([\d,]+) \|(.*)$", DOCUMENT, re.MULTILINE
    )
    assert len(table) == 5
    for tier, aq, parameters, rest in table:
        net = RubiksNet(tier, 174, "rubiks3d-aq").harden(0.125) if aq else RubiksNet(tier, 174)
        stages = cost.stages(net, 8, 224)
        ours, published_one, products = (float(number) for number in re.findall(r"([\d.]+) G", rest))
        assert int(parameters.replace(",", "")) == sum(stage.parameters for stage in stages)
        assert ours == round(sum(stage.multiply_adds for stage in stages) / 1e9, 2)
        assert published_one == round(sum(stage.multiply_adds for stage in stages) / 1e9, 1)
        assert products == round(cost.counted_flops(net, 8, 224) / 2e9, 2)
